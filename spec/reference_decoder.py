"""A small decoder of .tsc 1.0, written from the pages beside it and sharing no code with tscfile.

It favours plainness over speed, keeps the whole file in memory, and is no judge of hostile files.

    File(open("session.tsc", "rb").read()).snapshots[-1]["tracks"][0]["rows"]

Archives of a book tier need the bytes of the book, `File(data, book)`. Their rows are computed in
float64; `File.integers` gives the integers they are made from.
"""

from __future__ import annotations

import struct

import numpy as np
import xxhash
import zstandard
from blake3 import blake3

CHUNK, OPAQUE, SNAPSHOT, INDEX = 1, 2, 3, 4
BLOCKS = {  # element type: (elements, bytes, has minimum, bits of a code); tsc.md and fields.md
    2: (32, 18, False, 4), 3: (32, 20, True, 4), 6: (32, 22, False, 5), 7: (32, 24, True, 5),
    8: (32, 34, False, 8), 20: (32, 18, False, 4),
}  # fmt: skip
FLOATS = {0: 4, 1: 2, 30: 2}
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), "BbHhIifQqd", strict=True))


class Damaged(Exception):
    """The file breaks a rule of the specification."""


def need(condition, message):
    if not condition:
        raise Damaged(message)


def checksum(data):
    return xxhash.xxh3_64_intdigest(data)


def unzstd(data, limit):
    size = zstandard.frame_content_size(data)
    need(0 <= size <= limit, "zstd content size")
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)


class Cursor:
    """Reads fields one after another."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        need(n <= len(self.data) - self.at, "bytes run out")
        self.at += n
        return self.data[self.at - n : self.at]

    def u8(self):
        return self.take(1)[0]

    def fixed(self, layout):
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def uvarint(self):
        value = 0
        for shift in range(0, 70, 7):
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                need((byte or not shift) and value < 1 << 64, "uvarint out of range")
                return value
        raise Damaged("uvarint without end")

    def several(self, read):
        return [read() for _ in range(self.uvarint())]

    def string(self):
        return self.take(self.uvarint()).decode()

    def ref(self):
        return self.uvarint(), self.uvarint()

    def value(self, type_=None):
        type_ = self.u8() if type_ is None else type_
        if type_ == 9:
            item = self.u8()
            need(item != 9, "array of arrays")
            return self.several(lambda: self.value(item))
        if type_ in (7, 8):
            return bool(self.u8()) if type_ == 7 else self.string()
        need(type_ in SCALARS, "metadata value type")
        return self.fixed(SCALARS[type_])[0]

    def metadata(self):
        entries = self.several(lambda: (self.string(), self.value()))
        need(len(dict(entries)) == len(entries), "a metadata key occurs twice")
        return dict(entries)

    def ints(self, n):
        coding, body = self.u8(), Cursor(self.take(self.uvarint()))
        need(coding <= 2, "ints coding")
        if coding == 0:
            values = []
            while body.at < len(body.data):
                start, step = (u >> 1 ^ -(u & 1) for u in (body.uvarint(), body.uvarint()))
                values += [start + step * i for i in range(body.uvarint())]
            need(len(values) == n, "number of integers")
            return np.array(values, np.int32)
        raw = unzstd(body.data, 4 * n)
        need(len(raw) == 4 * n, "number of integers")
        planes = np.frombuffer(raw, np.uint8).reshape(4, n)
        values = np.ascontiguousarray(planes.T).view("<i4").reshape(n)
        return np.cumsum(values, dtype=np.int32) if coding == 2 else values

    def end(self):
        need(self.at == len(self.data), "bytes left over")


# --- classed-rans and fields ------------------------------------------------------------------


def read_plane(cursor, size):
    if cursor.u8() == 0:
        raw = cursor.take(size)
    else:
        raw = unzstd(cursor.take(cursor.uvarint()), size)
    need(len(raw) == size, "size of a plane")
    return np.frombuffer(raw, np.uint8)


def unpack_plane(packed, width, n):
    m = -(-n // 8)
    stored, runs = packed.reshape(width, m), np.zeros((8, m), np.uint8)
    runs[:width] = stored & ((1 << width) - 1)
    for q in range(8 - width):
        for a in range(width):
            runs[width + q] |= (stored[a] >> (width + q) & 1) << a
    return runs.reshape(-1)[:n]


def decode_stream(data, bits, n_rows, n_columns):
    """uint32 [n_rows, n_columns] of a classed-rans stream."""
    cursor, n = Cursor(data), n_rows * n_columns
    low_bits = cursor.u8()
    need(low_bits <= bits, "low bits")
    out = np.zeros(n, np.uint32)
    whole, width = divmod(low_bits, 8)
    for p in range(whole):
        out |= read_plane(cursor, n).astype(np.uint32) << (8 * p)
    if width:
        packed = read_plane(cursor, width * -(-n // 8))
        out |= unpack_plane(packed, width, n).astype(np.uint32) << (8 * whole)
    if low_bits < bits:
        out |= decode_high(cursor, n, n_columns, bits - low_bits) << low_bits
    cursor.end()
    return out.reshape(n_rows, n_columns)


def decode_high(cursor, n, n_columns, bits):
    tables = Cursor(unzstd(cursor.take(cursor.uvarint()), 4 + 512 + n_columns + 131072))
    n_symbols = tables.uvarint()
    alphabet = np.array(tables.fixed(f"{n_symbols}H"), np.uint32)
    need(n_symbols and (np.diff(alphabet.astype(int)) > 0).all(), "alphabet")
    need(int(alphabet[-1]) >> bits == 0, "alphabet")
    n_classes = tables.uvarint()
    classes = np.frombuffer(tables.take(n_columns), np.uint8)
    need(classes.max() < n_classes, "class of a column")
    low, high = (np.frombuffer(tables.take(n_classes * n_symbols), np.uint8) for _ in range(2))
    tables.end()
    f = (low + 256 * high.astype(np.uint32)).reshape(n_classes, n_symbols)
    lengths = np.array(cursor.fixed("32I"), np.int64)
    words = cursor.take(2 * int(lengths.sum()))
    return alphabet[decode_lanes(words, lengths, f, classes, n)]


def decode_lanes(data, lengths, f, classes, n):
    """``n`` symbols, int64. ``f``: uint32 [classes, symbols]; ``classes``: of each column."""
    n_lanes = len(lengths)
    need(1 <= n_lanes <= 32 and lengths.min() >= 2, "lanes")
    need((f.sum(axis=1) == 4096).all(), "frequencies")
    first = (np.cumsum(f, axis=1) - f).astype(np.uint32)
    symbol_of_slot = np.array([np.repeat(np.arange(f.shape[1]), row) for row in f])
    words = np.append(np.frombuffer(data, "<u2"), 0).astype(np.uint32)
    ends = np.cumsum(lengths)
    at = ends - lengths + 2
    x = words[at - 2] << 16 | words[at - 1]
    symbols = np.empty(n, np.int64)
    for i in range(0, n, n_lanes):  # all lanes side by side; the last step may lack some
        lanes = slice(0, min(n_lanes, n - i))
        k = classes[np.arange(i, i + lanes.stop) % len(classes)]
        slot = x[lanes] & 0xFFF
        s = symbols[i : i + lanes.stop] = symbol_of_slot[k, slot]
        state = f[k, s].astype(np.uint32) * (x[lanes] >> 12) + slot - first[k, s]
        short = state < 1 << 16
        x[lanes] = np.where(short, state << 16 | words[np.minimum(at, ends[-1])[lanes]], state)
        at[lanes] += short
    need((x == 1 << 16).all() and (at == ends).all(), "a lane does not end as it should")
    return symbols


def decode_fields(cursor, n_frames, element_type, row_bytes):
    """Rows of codec 1: uint8 [n_frames, row bytes] of each tensor."""
    if element_type in BLOCKS:
        elements, block, has_minimum, code_bits = BLOCKS[element_type]
        layout = [(16, 1)] * (1 + has_minimum) + [(code_bits, elements)]
    else:
        block = FLOATS.get(element_type, 1)
        layout = [(8 * block, 1)]
    counts = [n // block for n in row_bytes]
    parts = []
    for bits, per_block in layout:
        data = cursor.take(cursor.uvarint())
        matrix = decode_stream(data, bits, n_frames, per_block * sum(counts))
        parts.append(np.split(matrix, per_block * np.cumsum(counts)[:-1], axis=1))
    if element_type not in BLOCKS:
        return [part.astype(f"<u{block}").view(np.uint8) for part in parts[0]]
    return [join(part, n_frames, code_bits) for part in zip(*parts, strict=True)]


def join(part, n_frames, code_bits):
    *halves, codes = part
    pieces = [half.astype("<u2").view(np.uint8).reshape(n_frames, -1, 2) for half in halves]
    codes = codes.astype(np.uint8).reshape(n_frames, -1, 32)
    if code_bits == 5:
        pieces.append(np.packbits(codes >> 4, axis=2, bitorder="little"))
    if code_bits < 8:
        codes = codes[:, :, :16] & 15 | codes[:, :, 16:] << 4
    return np.concatenate([*pieces, codes], axis=2).reshape(n_frames, -1)


# --- books, book-transform and segments --------------------------------------------------------


class Book:
    """``facts``, ``tiers`` (name: log_step, KL, ratio), ``arrays``; ``id`` in hexadecimal."""

    def __init__(self, data):
        need(data[:12] == b"\x89TSCBOOK\r\n\x1a\n" and len(data) >= 44, "magic of a book")
        need(blake3(data[:-32]).digest() == data[-32:], "hash of a book")
        self.id = data[-32:].hex()
        c = Cursor(data[12:-32])
        need(c.uvarint() == 1, "version of a book")
        self.facts = c.metadata()
        self.tiers = dict(c.several(lambda: (c.string(), c.fixed("idd"))))
        self.arrays = dict(c.several(lambda: book_array(c)))
        c.end()
        need(self.facts["book.rope_pairing"] == "neox", "pairing of a book")
        a = self.arrays
        self.basis, self.predictor, self.vectors = (
            a[name].astype(float) * a[scales].reshape(shape)
            for name, scales, shape in (
                ("basis", "basis_scales", (-1, 1)),
                ("predictor", "predictor_scales", (1, -1)),
                ("token_vectors", "token_scales", (-1, 1)),
            )
        )

    def predict(self, tokens, pos):
        """Mean and prediction, float64 [n, C]."""
        at = pos[:, None].astype(np.int64) - np.arange(self.facts["book.history"])
        known = (at >= 0) & (at < len(tokens))
        token = np.append(tokens, 0)[np.where(known, at, -1)]
        known &= (token >= 0) & (token < len(self.vectors))
        features = self.vectors[np.where(known, token, 0)] * known[:, :, None]
        return self.arrays["mean"] + features.reshape(len(pos), -1) @ self.predictor

    def rows(self, log_steps, values, tensors, tokens, pos, pairing):
        """uint8 [n, row bytes] of each tensor, from integers [n, R] and the step of each frame."""
        steps = np.float32(2.0 ** (log_steps / 256)).astype(float)
        x = self.predict(tokens, pos) + (values * steps[:, None]) @ self.basis
        order = sorted(range(len(tensors)), key=lambda i: (tensors[i][1], tensors[i][0]))
        n_channels = [tensors[i][3] // FLOATS[tensors[i][2]] for i in order]
        need(sum(n_channels) == x.shape[1], "channels of the book")
        rows = [None] * len(tensors)
        for i, part in zip(order, np.split(x, np.cumsum(n_channels)[:-1], axis=1), strict=True):
            _, role, type_, *_ = tensors[i]
            rows[i] = as_rows(self.turn(part, pos, pairing) if role == 0 else part, type_)
        return rows

    def turn(self, keys, pos, pairing):
        """Apply RoPE to float64 [n, channels] and put each head's pairs where the source does."""
        inv_freq, scale = self.arrays["inv_freq"], float(np.float32(self.facts["book.rope_scale"]))
        angles = (pos.astype(np.float32)[:, None] * inv_freq).astype(float)  # float32 product
        cos, sin = np.cos(angles)[:, None] * scale, np.sin(angles)[:, None] * scale
        heads = keys.reshape(len(pos), -1, self.facts["book.head_dim"])
        m = len(inv_freq)
        a, b = heads[..., :m], heads[..., m : 2 * m]
        pair = np.stack([a * cos - b * sin, b * cos + a * sin], axis=2 if pairing == "neox" else 3)
        turned = pair.reshape(*heads.shape[:2], 2 * m)
        return np.concatenate([turned, heads[..., 2 * m :]], axis=2).reshape(keys.shape)


def book_array(c):
    name, code = c.string(), c.string()
    need(code in ("f4", "f2", "i1", "i2", "i4", "u2"), "type of an array")
    shape = c.several(c.uvarint)
    size = int(code[1])
    for n in shape:
        size *= n
    content = unzstd(c.take(c.uvarint()), size)
    need(len(content) == size, "size of an array")
    return name, np.frombuffer(content, "<" + code).reshape(shape)


def decode_segments(c, n_frames, book):
    """int64 log_steps [n] and integers [n, R] of a book-coded chunk."""
    sigmas = book.arrays["log_sigmas"].astype(np.int64)
    f = book.arrays["frequencies"].astype(np.uint32)
    steps, parts, left = [], [], n_frames
    while left:
        n, (log_step,) = c.uvarint(), c.fixed("h")
        need(1 <= n <= left, "frames of a segment")
        units = sigmas - log_step + 768
        stored = units >= 0
        classes = np.minimum(units[stored] // 64, 39)
        values = np.zeros((n, len(sigmas)), np.int64)
        if len(classes):
            lengths = np.array(c.several(c.uvarint), np.int64)
            data = c.take(2 * int(lengths.sum()))
            symbols = decode_lanes(data, lengths, f, classes, n * len(classes))
            found = (symbols + 1) // 2 * np.where(symbols % 2, 1, -1)
            for i in np.flatnonzero(symbols == 31):
                u = c.uvarint()
                need(u < 1 << 32, "an escaped value")
                found[i] = u >> 1 ^ -(u & 1)
            values[:, stored] = found.reshape(n, -1)
        steps.append(np.full(n, log_step))
        parts.append(values)
        left -= n
    return np.concatenate(steps), np.concatenate(parts)


def as_rows(values, type_):
    """Round to nearest, ties to even."""
    if type_ == 30:
        bits = values.astype("<f4").view("<u4")
        stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    else:
        with np.errstate(over="ignore"):
            stored = values.astype({0: "<f4", 1: "<f2"}[type_])
    return np.ascontiguousarray(stored).view(np.uint8)


# --- container --------------------------------------------------------------------------------


class File:
    """``snapshots``: dicts with tokens, source, tracks, opaque; see `_snapshot` and `_track`."""

    def __init__(self, data, book=None):
        self.data = data
        self.book = Book(book) if book is not None else None
        need(data[:8] == b"\x89TSC\r\n\x1a\n" and len(data) >= 32, "magic")
        major, _, required, _, _, check = struct.unpack("<HHIIIQ", data[8:32])
        need(check == checksum(data[:24]), "header checksum")
        need(major == 1 and not required, "version or feature is not known")
        ref, self.end = self._find_trailer()
        self.blocks, snapshots = self._read_chain(ref)
        self.decoded, self.snapshots = {}, []
        for ref in snapshots:
            self.snapshots.append(self._snapshot(Cursor(self.payload(ref, SNAPSHOT)[0])))

    def payload(self, ref, type_, end=None):
        offset, length = ref
        end = self.end if end is None else end
        need(24 <= length <= end - offset, "reference outside the file")
        head = self.data[offset : offset + 24]
        got, _, padding, check, size, payload_check = struct.unpack("<BBHIQQ", head)
        need(check == checksum(head[:4] + head[8:]) & 0xFFFFFFFF, "record header checksum")
        need(got == type_ and 24 + padding + size == length, "not the record that was meant")
        payload = self.data[offset + 24 + padding : offset + length]
        need(payload_check == checksum(payload), "payload checksum")
        return payload, payload_check

    def _find_trailer(self):
        for t in range(len(self.data) - 32, 31, -1):
            if self.data[t + 24 : t + 32] != b"\x89TSCEND\n":
                continue
            offset, length, check = struct.unpack("<QQQ", self.data[t : t + 24])
            if check == checksum(self.data[t : t + 16] + struct.pack("<Q", t)):
                try:
                    self.payload((offset, length), INDEX, end=t)
                    return (offset, length), t + 32
                except Damaged:
                    pass
        raise Damaged("no whole index")

    def _read_chain(self, ref):
        chain = []
        while ref[1]:
            cursor = Cursor(self.payload(ref, INDEX)[0])
            previous = cursor.ref()
            need(previous[0] < ref[0] and len(chain) < 4096, "chain of indices")
            first_block, blocks = cursor.uvarint(), cursor.several(lambda c=cursor: block_entry(c))
            first_snapshot, snapshots = cursor.uvarint(), cursor.several(cursor.ref)
            for _ in range(cursor.uvarint()):
                cursor.u8()
                need(not cursor.u8() & 1, "a critical record is not known")
                cursor.ref()
            cursor.end()
            chain.append((first_block, blocks, first_snapshot, snapshots))
            ref = previous
        blocks, snapshots = [], []
        for first_block, more, first_snapshot, refs in reversed(chain):
            need((first_block, first_snapshot) == (len(blocks), len(snapshots)), "numbering")
            blocks, snapshots = blocks + more, snapshots + refs
        return blocks, snapshots

    def _snapshot(self, c):
        number, parent = c.uvarint(), c.uvarint()
        need(number == len(self.snapshots) and parent <= number, "number or parent")
        out = {"parent": parent - 1 if parent else None}
        out |= {"plan": c.string(), "tier": c.string(), "name": c.string()}
        out |= {"source": c.metadata(), "identity": c.metadata(), "coding": c.metadata()}
        kept, n_new = c.uvarint(), c.uvarint()
        before = self.snapshots[parent - 1]["tokens"] if parent else np.zeros(0, np.int32)
        need(kept <= len(before), "kept tokens")
        out["tokens"] = np.concatenate([before[:kept], c.ints(n_new)])
        out["tracks"] = c.several(lambda: self._track(c, out))
        opaque = c.several(lambda: self._opaque(c))
        out["opaque"] = dict(opaque)
        c.end()
        need(len(out["opaque"]) == len(opaque), "an opaque name occurs twice")
        places = {(track["cache"], track["stream"]) for track in out["tracks"]}
        need(len(places) == len(out["tracks"]), "a track occurs twice")
        return out

    def _track(self, c, snapshot):
        out = {"cache": c.uvarint(), "stream": c.uvarint(), "attributes": c.metadata()}
        tensors = []  # (layer, role, element type, row bytes, rotation)
        for _ in range(c.uvarint()):
            layer, count, role = c.uvarint(), c.uvarint(), c.u8()
            rest = (role, c.uvarint(), c.uvarint(), c.uvarint() - 1)
            tensors += [(layer + i, *rest) for i in range(count)]
        out["tensors"] = tensors
        runs = c.several(lambda: (c.uvarint(), c.uvarint(), c.uvarint()))
        n = sum(count for _, _, count in runs)
        need(n <= sum(block["frames"] for block in self.blocks), "more cells than frames")
        out["pos"], out["seq_counts"] = c.ints(n), c.ints(n)
        out["seq_ids"] = c.ints(int(out["seq_counts"].sum()))
        out["columns"] = c.several(lambda: cell_column(c, out["pos"], snapshot["tokens"]))
        out["rows"] = [np.empty((n, row_bytes), np.uint8) for _, _, _, row_bytes, _ in tensors]
        at = 0
        for number, first, count in runs:
            need(number < len(self.blocks), "block number")
            need(first + count <= self.blocks[number]["frames"], "frame run outside its block")
            pos = out["pos"][at : at + count]
            found = self._frames(number, slice(first, first + count), snapshot, tensors, pos)
            for rows, part in zip(out["rows"], found, strict=True):
                rows[at : at + count] = part
            at += count
        return out

    def _opaque(self, c):
        name, ref, length, id_ = c.string(), c.ref(), c.uvarint(), c.take(16)
        content = unzstd(self.payload(ref, OPAQUE)[0], length)
        need(len(content) == length and blake3(content).digest(length=16) == id_, "opaque part")
        return name, content

    def _frames(self, number, span, snapshot, tensors, pos):
        """Rows of the frames ``span`` of a block, which sit at the positions ``pos``."""
        chunks = self.blocks[number]["chunks"]
        need(not any(chunk["said"][1] for chunk in chunks), "quality layer is not known")
        firsts, counts = ([chunk["said"][i] for chunk in chunks] for i in (2, 3))
        need([*firsts, len(tensors)] == [0, *np.cumsum(counts).tolist()], "tensors of a block")
        if any(chunk["said"][0] == 2 for chunk in chunks):
            log_steps, values = self.integers(number, snapshot, tensors)
            pairing = snapshot["coding"]["rope_pairing"]
            need(pairing in ("norm", "neox"), "pairing of the keys")
            return self.book.rows(
                log_steps[span], values[span], tensors, snapshot["tokens"], pos, pairing
            )
        return [rows[span] for rows in self.block(number, tensors)]

    def integers(self, number, snapshot, tensors):
        """int64 log_step [frames] and integers [frames, R] of a book-coded block."""
        if number not in self.decoded:
            wanted = snapshot["coding"].get("book")
            need(self.book is not None and self.book.id == wanted, f"book {wanted} is needed")
            need(len(self.blocks[number]["chunks"]) == 1, "one chunk in a book-coded block")
            self.decoded[number] = self._chunk(
                self.blocks[number], self.blocks[number]["chunks"][0], tensors
            )
        return self.decoded[number]

    def block(self, number, tensors):
        """Rows of all tensors of a block: uint8 [frames, row bytes] each."""
        if number not in self.decoded:
            entry = self.blocks[number]
            chunks = [self._chunk(entry, chunk, tensors) for chunk in entry["chunks"]]
            rows = [part for chunk in chunks for part in chunk]
            digest = blake3(b"".join(r.tobytes() for r in rows)).digest(length=16)
            need(digest == entry["content_id"], "content id")
            self.decoded[number] = rows
        return self.decoded[number]

    def _chunk(self, entry, chunk, tensors):
        payload, check = self.payload(chunk["ref"], CHUNK)
        c = Cursor(payload)
        codec, layer, n_frames, first, type_ = c.u8(), c.u8(), c.uvarint(), c.uvarint(), c.uvarint()
        row_bytes = c.several(c.uvarint)
        said = [codec, layer, first, len(row_bytes), n_frames * sum(row_bytes)]
        need(check == chunk["check"] and said == chunk["said"], "chunk and index differ")
        meant = tensors[first : first + len(row_bytes)]
        need(n_frames == entry["frames"], "frames of a chunk")
        need([(type_, n) for n in row_bytes] == [t[2:4] for t in meant], "tensors of a chunk")
        need(codec <= 2, "codec is not known")
        if codec == 2:
            need(blake3(payload).digest(length=16) == entry["content_id"], "content id")
            rows = decode_segments(c, n_frames, self.book)
        elif codec == 1:
            rows = decode_fields(c, n_frames, type_, row_bytes)
        else:
            rows = [np.frombuffer(c.take(n_frames * n), np.uint8).reshape(-1, n) for n in row_bytes]
        c.end()
        return rows


def block_entry(c):
    frames, content_id, logical_id = c.uvarint(), c.take(16), c.take(16)
    need(frames, "a block without frames")
    chunks = c.several(
        lambda: {
            "ref": c.ref(),
            "check": c.fixed("Q")[0],
            "said": [c.u8(), c.u8(), c.uvarint(), c.uvarint(), c.uvarint()],
        }
    )
    return {"frames": frames, "content_id": content_id, "logical_id": logical_id, "chunks": chunks}


def cell_column(c, pos, tokens):
    coding = c.u8()
    need(coding <= 2, "cell column")
    if coding == 2:
        inside = (pos >= 0) & (pos < len(tokens))
        return np.where(inside, np.append(tokens, 0)[np.where(inside, pos, 0)], -1).astype(np.int32)
    return pos if coding == 1 else c.ints(len(pos))
