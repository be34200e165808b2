"""Codec 6 from its page, codecs/product.md, in the style of reference_decoder.py.

Needs NumPy and zstandard, and the decoder of codec 3 beside it, which ``import`` must find. `chunk`
takes the body of a chunk apart; `book_stages` and `codebooks` give what codes stand for;
`book_rows` and `session_rows` the rows of some frames.
"""

import numpy as np
import zstandard
from reference_session_transform import FLOATS, Cursor, as_rows, need, turn


def chunk(body, n_frames, n_stages, frame_bytes):
    """The codebooks' id, and for each frame its codes, or bytes if it is exact."""
    c = Cursor(body)
    (codebooks,) = c.fixed("Q")
    forms = []
    while len(forms) < n_frames:
        n, base, width = c.uvarint(), c.uvarint(), c.u8()
        need(1 <= n <= n_frames - len(forms) and base <= 1 + n_stages, "frames of a run")
        need(width <= 112, "width")
        forms += (base + c.matrix(n, np.array([width]))[:, 0]).tolist()
    need(all(0 <= form <= 1 + n_stages for form in forms), "form of a frame")
    frames = []
    for form in forms:
        data = c.take(form - 1 if form else frame_bytes)
        frames.append(np.frombuffer(data, np.uint8) if form else data)
    c.end()
    return codebooks, frames


def sums(frames, stages, n_columns):
    """float64 [n, columns]: what codes stand for; ``stages`` are pairs of columns and centroids."""
    out = np.zeros((len(frames), n_columns))
    for row, codes in zip(out, frames, strict=True):
        for code, (columns, centroids) in zip(codes, stages, strict=False):
            row[columns] += centroids[code]
    return out


# --- with a book ------------------------------------------------------------------------------


def book_stages(arrays):
    """The stages of a book, from its arrays by name."""
    columns, centroids, scales = (
        arrays["product_" + name] for name in ("columns", "centroids", "scales")
    )
    need(columns.ndim == 2 and centroids.shape == (len(columns), 256, columns.shape[1]), "sizes")
    need(scales.shape == (len(columns),), "sizes")
    need(int(columns.max()) < len(arrays["basis"]), "columns")
    need(all(len(set(row)) == len(row) for row in columns.tolist()), "a column twice")
    pairs = zip(columns, centroids, scales, strict=True)
    return [(row, c.astype(float) * scale) for row, c, scale in pairs]


def book_rows(frames, book, tensors, tokens, pos, pairing):
    """uint8 [n, row bytes] of each tensor; ``book`` is a reference_decoder.Book."""
    codes = [() if isinstance(frame, bytes) else frame for frame in frames]
    vectors = sums(codes, book_stages(book.arrays), len(book.arrays["basis"]))
    rows = book.rows(np.zeros(len(pos)), vectors, tensors, tokens, pos, pairing)
    return put_exact(rows, frames)


# --- with the file's own codebooks ------------------------------------------------------------


def codebooks(payload):
    """What a codebooks record says, with the stages of its codes."""
    c, turned = Cursor(payload), None
    kind = c.u8()
    need(kind <= 1, "how keys are turned")
    if kind:
        pairing, head_dim, m = c.u8(), c.uvarint(), c.uvarint()
        need(pairing <= 1 and head_dim >= max(1, 2 * m), "how keys are turned")
        turned = ("norm", "neox")[pairing], head_dim, np.frombuffer(c.take(4 * m), "<f4")
    n, n_keys = c.uvarint(), c.uvarint()
    need(0 < n and n_keys <= n, "tensors")
    sizes = [c.uvarint() for _ in range(n)]
    head, width, rounds = c.uvarint(), c.uvarint(), c.uvarint()
    need(head and width and rounds and not head % width, "a head and its sub-vectors")
    need(all(size and not size % head for size in sizes), "heads of a tensor")
    (error,) = c.fixed("f")
    total, places = sum(sizes), head // width
    need(rounds * (total // width) <= 65536, "number of stages")
    frame, n_books = c.take(len(c.data) - c.at), 2 * places
    shapes = [((total,), "<f2"), ((total // head,), "<f4"), ((rounds, n_books), "<f4"),
              ((rounds, n_books, 256, width), "i1")]  # fmt: skip
    lengths = [int(np.prod(shape)) * np.dtype(code).itemsize for shape, code in shapes]
    need(sum(lengths) <= 16 * len(payload) + (1 << 20), "size of the tables")
    need(zstandard.frame_content_size(frame) == sum(lengths), "size of the tables")
    content, tables, at = zstandard.ZstdDecompressor().decompress(frame), [], 0
    for (shape, code), length in zip(shapes, lengths, strict=True):
        tables.append(np.frombuffer(content[at : at + length], code).reshape(shape).astype(float))
        at += length
    mean, scales, units, entries = tables
    need(all(np.isfinite(t).all() for t in tables) and (scales > 0).all(), "numbers")
    stages = []
    for r in range(rounds):
        for j in range(total // width):
            is_value = j * width >= sum(sizes[:n_keys])
            book = j % places + places * is_value
            columns = np.arange(j * width, (j + 1) * width)
            stages.append((columns, entries[r, book] * units[r, book]))
    out = {"turn": turned, "sizes": sizes, "n_keys": n_keys, "mean": mean, "error": error}
    return out | {"spread": np.repeat(scales, head), "stages": stages}


def session_rows(frames, learnt, tensors, pos):
    """uint8 [n, row bytes] of each tensor: (layer, role, element type, row bytes, …)."""
    order = sorted(range(len(tensors)), key=lambda i: (tensors[i][1], tensors[i][0]))
    need(sum(tensors[i][1] == 0 for i in order) == learnt["n_keys"], "tensors")
    codes = [() if isinstance(frame, bytes) else frame for frame in frames]
    y = sums(codes, learnt["stages"], len(learnt["mean"]))
    x, rows = y * learnt["spread"] + learnt["mean"], [None] * len(tensors)
    need(len(order) == len(learnt["sizes"]), "tensors")
    parts = np.split(x, np.cumsum(learnt["sizes"])[:-1], axis=1)
    for i, part in zip(order, parts, strict=True):
        _, role, type_, row_bytes, *_ = tensors[i]
        need(row_bytes == FLOATS[type_] * part.shape[1], "channels of a tensor")
        turned = role == 0 and learnt["turn"]
        rows[i] = as_rows(turn(part, pos, *learnt["turn"]) if turned else part, type_)
    return put_exact(rows, frames)


def put_exact(rows, frames):
    """Frames that are kept as they are have the rows of all tensors one after another."""
    for i, frame in enumerate(frames):
        if isinstance(frame, bytes):
            at = 0
            for part in rows:
                n = part.shape[1]
                part[i] = np.frombuffer(frame[at : at + n], np.uint8)
                at += n
    return rows
