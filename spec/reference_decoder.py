"""A small decoder of .tsc 1.0, written from the pages beside it and sharing no code with tscfile.

It favours plainness over speed, keeps the whole file in memory, and is no judge of hostile files.

    File(open("session.tsc", "rb").read()).snapshots[-1]["tracks"][0]["rows"]

Archives of a book tier need the bytes of the book, `File(data, book)`, unless it is inside. Their
rows are computed in float64; `File.integers` gives the integers they are made from.
"""

from __future__ import annotations

import struct
from functools import cached_property

import numpy as np
import xxhash
import zstandard
from blake3 import blake3

CHUNK, OPAQUE, SNAPSHOT, INDEX, BOOK = 1, 2, 3, 4, 6
BLOCKS = {  # element type: (elements, bytes, has minimum, bits of a code); tsc.md and fields.md
    2: (32, 18, False, 4), 3: (32, 20, True, 4), 6: (32, 22, False, 5), 7: (32, 24, True, 5),
    8: (32, 34, False, 8), 20: (32, 18, False, 4),
}  # fmt: skip
FLOATS = {0: 4, 1: 2, 30: 2}
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), "BbHhIifQqd", strict=True))
USUAL_METADATA = {  # tsc.md, section 7.7
    "has_outputs": False, "has_streams": True, "ext_bytes": 0, "has_rotation": False,
    "container": "sequence", "version": 9, "generation": "G", "parts": "kv", "kind": "plain",
    "n_stream": [1], "cell_counts": [0], "arch": "llama", "token_form": "plain", "v_trans": 0,
    "format": "llama.cpp", "attributes": "transformers", "layers": [0, 1, 2, 3, 4, 5, 6, 7],
    "sliding_window": 4096, "rope_scaling_factor": 1.0, "rope_scaling_original_context": 8192,
    "architecture": "qwen3", "name": "llama", "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
    "head_dim_k": 128, "head_dim_v": 128, "rope_base": 10000.0, "rope_dim": 128,
    "rope_scaling": "none", "vocab_size": 128256, "tokenizer_blake3": "0123456789abcdef",
    "weights_blake3": "0123456789abcdef", "book": "0123456789abcdef", "log_step": 0,
    "expected_kl": 0.01, "rope_pairing": "neox", "full": "norm", "keyframe": "balanced",
    "append": "lossless", "truncate+append": "session",
}  # fmt: skip


class Damaged(Exception):
    """The file breaks a rule of the specification."""


def need(condition, message):
    if not condition:
        raise Damaged(message)


def checksum(data):
    return xxhash.xxh3_64_intdigest(data)


def unzstd(data, limit, dictionary=b""):
    """Content of a frame; ``dictionary`` is what it may copy from, raw content."""
    size = zstandard.frame_content_size(data)
    need(0 <= size <= limit, "zstd content size")
    raw = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdDecompressor(dict_data=raw).decompress(data, allow_extra_data=False)


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
        return decode_ints(self.u8(), self.take(self.uvarint()), n)

    def end(self):
        need(self.at == len(self.data), "bytes left over")


def decode_ints(coding, data, n):
    need(coding <= 2, "ints coding")
    if coding == 0:
        body, values = Cursor(data), []
        while body.at < len(data):
            start, step = (u >> 1 ^ -(u & 1) for u in (body.uvarint(), body.uvarint()))
            values += [start + step * i for i in range(body.uvarint())]
        need(len(values) == n, "number of integers")
        return np.array(values, np.int32)
    raw = unzstd(data, 4 * n)
    need(len(raw) == 4 * n, "number of integers")
    planes = np.frombuffer(raw, np.uint8).reshape(4, n)
    values = np.ascontiguousarray(planes.T).view("<i4").reshape(n)
    return np.cumsum(values, dtype=np.int32) if coding == 2 else values


def usual_metadata():
    """Bytes of `USUAL_METADATA`, which the structure of a snapshot without parent copies from."""

    def uvarint(n):
        return bytes([n]) if n < 128 else bytes([n & 0x7F | 0x80]) + uvarint(n >> 7)

    def string(text):
        return uvarint(len(text)) + text.encode()

    def value(v):
        for kind, type_, to_bytes in (
            (bool, 7, lambda v: bytes([v])), (str, 8, string),
            (int, 10, lambda v: struct.pack("<Q", v)), (float, 12, lambda v: struct.pack("<d", v)),
        ):  # fmt: skip
            if isinstance(v, kind):
                return bytes([type_]) + to_bytes(v)
        items = [value(item) for item in v]
        return b"\x09" + items[0][:1] + uvarint(len(v)) + b"".join(item[1:] for item in items)

    entries = [string(key) + value(v) for key, v in USUAL_METADATA.items()]
    return uvarint(len(entries)) + b"".join(entries)


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
        need(c.uvarint() == 2, "version of a book")
        self.facts = c.metadata()
        tiers = c.several(lambda: (c.string(), c.fixed("idd")))
        arrays = c.several(lambda: book_array(c))
        c.end()
        self.tiers, self.arrays = dict(tiers), dict(arrays)
        need(len(self.tiers) == len(tiers) and len(self.arrays) == len(arrays), "a name twice")
        self.history, self.decays, self.decay_dims, self.head_dim, self.n_layers = (
            self.facts["book." + key]
            for key in ("history", "decays", "decay_dims", "head_dim", "n_layers")
        )
        need(self.facts["book.rope_pairing"] == "neox", "pairing of a book")
        self.vectors = self.scaled("token_vectors", "token_scales", axis=0)
        self.first = [self.scaled(name, name + "_scales", axis=1) for name in ("hidden", "linear")]
        self.output = self.scaled("output", "output_scales", axis=1)
        self.groups = list(self.read_groups())

    def scaled(self, name, scales, axis):
        """Float64 of an array of integers, one scale for each index of ``axis``."""
        return self.arrays[name].astype(float) * np.expand_dims(self.arrays[scales], 1 - axis)

    def read_groups(self):
        """Of each group of layers: its channels, the rows of the prediction basis and of the basis,
        and where those are among all."""
        n_groups, rest = divmod(self.n_layers, self.facts["book.group_layers"])
        half = len(self.arrays["mean"]) // 2
        size = half // n_groups
        need(not rest and 2 * size * n_groups == len(self.arrays["mean"]), "groups of layers")
        at = [0, 0]
        for g in range(n_groups):
            keys = np.arange(g * size, (g + 1) * size)
            group = [np.concatenate([keys, half + keys])]
            for i, (name, counts) in enumerate(
                (("prediction", "book.group_predictions"), ("basis", "book.group_coefficients"))
            ):
                span = slice(at[i], at[i] + self.facts[counts][g])
                group += [self.scaled(name, name + "_scales", axis=0)[span], span]
                at[i] = span.stop
            yield group

    @cached_property
    def token_tables(self):
        need("ids_order" in self.arrays, "the book has no tables of token ids")
        return TokenTables(self.arrays)

    def features(self, tokens, pos):
        """float64 [n, F]"""
        known = (tokens >= 0) & (tokens < len(self.vectors))
        v = self.vectors[np.where(known, tokens, 0)] * known[:, None]  # of every token
        none, found = np.zeros(v.shape[1]), []
        for p in pos.tolist():
            f = [v[p - k] if 0 <= p - k < len(v) else none for k in range(self.history)]
            seen = np.arange(min(p + 1, len(v)))
            p = max(p, 0)
            for decay in self.decays:
                total = (1 - decay ** (p + 1)) / (1 - decay)
                f.append(decay ** (p - seen.astype(float)) / total @ v[seen, : self.decay_dims])
            found.append(np.concatenate([*f, [np.log2(p + 1) / 16, 1 / (p + 1)]]))
        return np.array(found)

    def predict(self, tokens, pos):
        """Coordinates in the prediction basis, float64 [n, P]."""
        f = self.features(tokens, pos)
        hidden, linear = self.first
        a = np.maximum(f @ hidden + self.arrays["hidden_bias"], 0)
        return f @ linear + a @ self.output

    def channels(self, z, coefficients):
        """float64 [n, C]"""
        x = np.repeat(self.arrays["mean"][None].astype(float), len(z), axis=0)
        for channels, prediction, of_z, basis, of_r in self.groups:
            x[:, channels] += z[:, of_z] @ prediction + coefficients[:, of_r] @ basis
        return x

    def rows(self, log_steps, values, tensors, tokens, pos, pairing):
        """uint8 [n, row bytes] of each tensor, from integers [n, R] and the step of each frame."""
        steps = np.float32(2.0 ** (log_steps / 256)).astype(float)
        x = self.channels(self.predict(tokens, pos), values * steps[:, None])
        order = sorted(range(len(tensors)), key=lambda i: (tensors[i][1], tensors[i][0]))
        roles = [tensors[i][1] for i in order]
        need(roles == [0] * self.n_layers + [1] * self.n_layers, "tensors of the book")
        parts, rows = np.split(x, len(order), axis=1), [None] * len(tensors)
        for i, part in zip(order, parts, strict=True):
            _, role, type_, row_bytes, _ = tensors[i]
            need(row_bytes == FLOATS[type_] * part.shape[1], "channels of the book")
            rows[i] = as_rows(self.turn(part, pos, pairing) if role == 0 else part, type_)
        return rows

    def turn(self, keys, pos, pairing):
        """Apply RoPE to float64 [n, channels] and put each head's pairs where the source does."""
        inv_freq, scale = self.arrays["inv_freq"], float(np.float32(self.facts["book.rope_scale"]))
        angles = (pos.astype(np.float32)[:, None] * inv_freq).astype(float)  # float32 product
        cos, sin = np.cos(angles)[:, None] * scale, np.sin(angles)[:, None] * scale
        heads = keys.reshape(len(pos), -1, self.head_dim)
        m = len(inv_freq)
        a, b = heads[..., :m], heads[..., m : 2 * m]
        pair = np.stack([a * cos - b * sin, b * cos + a * sin], axis=2 if pairing == "neox" else 3)
        turned = pair.reshape(*heads.shape[:2], 2 * m)
        return np.concatenate([turned, heads[..., 2 * m :]], axis=2).reshape(keys.shape)


def book_array(c):
    name, code = c.string(), c.string()
    need(code in ("f4", "f2", "i1", "u1", "i2", "u2", "i4", "u4"), "type of an array")
    shape = c.several(c.uvarint)
    size = int(code[1])
    for n in shape:
        size *= n
    content = unzstd(c.take(c.uvarint()), size)
    need(len(content) == size, "size of an array")
    return name, np.frombuffer(content, "<" + code).reshape(shape)


def decode_segments(c, n_frames, book):
    """Segments of a chunk of codec 2: log_step and int64 values [n, R] of each."""
    sigmas = book.arrays["log_sigmas"].astype(np.int64)
    segments, left = [], n_frames
    while left:
        n, (log_step,) = c.uvarint(), c.fixed("h")
        need(1 <= n <= left, "frames of a segment")
        units = sigmas - log_step + 768
        stored = units >= 0
        classes = np.tile(np.minimum(units[stored] // 64, 39), n)
        values = np.zeros((n, len(sigmas)), np.int64)
        values[:, stored] = decode_values(c, classes, book).reshape(n, -1)
        segments.append((log_step, values))
        left -= n
    return segments


def decode_refinement(c, below, book):
    """The same of a chunk of codec 4, given the segments of the layer below."""
    sigmas = book.arrays["log_sigmas"].astype(np.int64)
    segments = []
    for coarse, q in below:
        n, (fine,) = c.uvarint(), c.fixed("h")
        need(n == len(q) and 0 < coarse - fine <= 3072, "frames or step of a refinement")
        stored, known = sigmas - fine + 768 >= 0, sigmas - coarse + 768 >= 0
        ratio = int(np.floor(2.0 ** ((coarse - fine) / 256 + 16) + 0.5))
        centres = np.sign(q) * ((np.abs(q) * ratio + 32768) // 65536)
        narrow = np.where(q == 0, coarse - 362, coarse - 459)
        widths = np.where(known, np.minimum(sigmas, narrow), sigmas)
        classes = np.clip((widths - fine + 768) // 64, 0, 39)[:, stored]
        values = np.zeros(q.shape, np.int64)
        found = decode_values(c, classes.reshape(-1), book).reshape(classes.shape)
        values[:, stored] = centres[:, stored] + found
        need((np.abs(values) < 1 << 31).all(), "refined integers")
        segments.append((fine, values))
    return segments


def decode_values(c, classes, book):
    """Integers with their classes, int64 [n]."""
    if not len(classes):
        return np.zeros(0, np.int64)
    lengths = np.array(c.several(c.uvarint), np.int64)
    data = c.take(2 * int(lengths.sum()))
    frequencies = book.arrays["frequencies"].astype(np.uint32)
    symbols = decode_lanes(data, lengths, frequencies, classes, len(classes))
    found = (symbols + 1) // 2 * np.where(symbols % 2, 1, -1)
    for i in np.flatnonzero(symbols == 31):
        u = c.uvarint()
        need(u < 1 << 32, "an escaped value")
        found[i] = u >> 1 ^ -(u & 1)
    return found


def as_rows(values, type_):
    """Round to nearest, ties to even."""
    if type_ == 30:
        bits = values.astype("<f4").view("<u4")
        stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    else:
        with np.errstate(over="ignore"):
            stored = values.astype({0: "<f4", 1: "<f2"}[type_])
    return np.ascontiguousarray(stored).view(np.uint8)


# --- token ids --------------------------------------------------------------------------------


def log2(v):
    """Units of 1/256 octaves; the 12 highest bits of v count."""
    s = max(0, v.bit_length() - 12)
    v >>= s
    octaves = v.bit_length() - 1
    m, units = v << (31 - octaves), octaves
    for _ in range(8):
        m = m * m >> 31
        bit = m >> 32
        m, units = m >> bit, 2 * units + bit
    return units + 256 * s


def clip(v, limit):
    return max(-limit, min(v, limit))


def probabilities():
    found, p = [], 1
    for x in range(-2816, 2817):
        while p < 65535 and log2(p) - log2(65536 - p) < x:
            p += 1
        found.append(max(32, min(p, 65504)))
    return found


PROBABILITY = probabilities()


def step(code):
    return code if code < 2 else (2 + (code & 1)) << (code // 2 - 1)


def bucket(n):
    return max(c for c in range(16) if step(c) <= n)


def from_planes(planes):
    return sum(plane.astype(np.int64) << 8 * i for i, plane in enumerate(planes)).tolist()


def lists(gaps, fan):
    """Rising lists of fan[i] values each."""
    need(sum(fan) == len(gaps), "fan does not add up")
    found, at = [], 0
    for n in fan:
        values = np.cumsum(np.array(gaps[at : at + n], np.int64) + 1) - 1
        found.append(values.tolist())
        at += n
    return found


class TokenTables:
    """Ids of the leaves, their weights, and (leaf, count) lists of followers."""

    def __init__(self, arrays=None, bits=0):
        self.ids = range(1 << bits)
        self.weights = [(1 << 24) // (i + 128) for i in self.ids]
        self.after1, self.after2 = {}, {}
        self.mixing = np.full((18, 7, 32), 28672, np.int64)
        self.match = [61440] * 16
        if arrays is not None:
            self._read(arrays)
        self.leaf_of = {id_: leaf for leaf, id_ in enumerate(self.ids)}
        self.sums = np.cumsum([0, *self.weights, 1]).tolist()
        self.nodes = {}

    def _read(self, arrays):
        self.ids = from_planes(arrays["ids_order"])
        need(sorted(self.ids) == list(range(len(self.ids))), "order of the ids")
        self.weights = [4 * step(c) + 1 for c in arrays["ids_unigram"].tolist()]
        nexts = lists(from_planes(arrays["ids_next1"]), from_planes(arrays["ids_fan1"]))
        counts = [step(c) for c in arrays["ids_count1"].tolist()]
        ranks = iter(lists(from_planes(arrays["ids_next2"]), from_planes(arrays["ids_fan2"])))
        counts2, at = iter([step(c) for c in arrays["ids_count2"].tolist()]), 0
        for first, leaves in enumerate(nexts):
            self.after1[first] = list(zip(leaves, counts[at:], strict=False))
            at += len(leaves)
            for second in leaves:
                self.after2[first, second] = [
                    (nexts[second][rank], next(counts2)) for rank in next(ranks)
                ]
        self.mixing = arrays["ids_weights"].astype(np.int64) << 4
        self.match = arrays["ids_match"].tolist()

    def node(self, lo, hi):
        if (lo, hi) not in self.nodes:
            both = self.sums[lo] + self.sums[hi]
            self.nodes[lo, hi] = min(
                range(lo + 1, hi), key=lambda m: (abs(2 * self.sums[m] - both), m)
            )
        return self.nodes[lo, hi]


class TokenModel:
    """``n``: tokens of context and stream together."""

    def __init__(self, tables, data, n):
        self.tables, self.data, self.sums = tables, data, tables.sums
        self.mixing, self.match = tables.mixing.copy(), list(tables.match)
        self.n_slots = 1 << max(12, min(22, (256 * n - 1).bit_length()))
        self.single, self.slots = {}, {}
        self.history, self.seen, self.match_at, self.match_length = [], {}, 0, 0
        self.low, self.high, self.at = 0, 0xFFFFFFFF, 0
        self.steps = []

    def code(self):
        return int.from_bytes(self.data[self.at : self.at + 4].ljust(4, b"\0"), "big")

    def decide(self, p):
        span = self.high - self.low
        middle = self.low + (span >> 16) * p + ((span & 0xFFFF) * p >> 16)
        bit = int(self.code() <= middle)
        self.steps.append([self.low, self.high, p, bit])
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 24 == self.high >> 24:
            self.low = self.low << 8 & 0xFFFFFFFF
            self.high = self.high << 8 & 0xFFFFFFFF | 0xFF
            self.at += 1
        return bit

    def end(self):
        for k in range(5):
            unit = 1 << (32 - 8 * k)
            v = -(-self.low // unit) * unit
            if v <= self.high:
                break
        need(len(self.data) == self.at + k and self.code() == v, "end of the token ids")

    def slot(self, key, n_slots):
        return (key * 0x9E3779B97F4A7C15 % (1 << 64)) * n_slots >> 64

    def token(self, leaf=None):
        """Decode a leaf, or learn from a known one."""
        h, tables = self.history, self.tables
        after1 = tables.after1.get(h[-1], []) if h else []
        after2 = tables.after2.get((h[-2], h[-1]), []) if len(h) > 1 else []
        x2, x1 = ([0, 0] + [x + 1 for x in h[-2:]])[-2:]
        predicted = h[self.match_at] if self.match_length else None
        length = min(self.match_length, 15)
        lo, hi = 0, len(self.sums) - 1
        while hi - lo > 1:
            m = tables.node(lo, hi)
            pairs = [
                [sum(c for x, c in after if a <= x < b) for a, b in ((lo, m), (m, hi))]
                for after in (after1, after2)
            ]
            keys = [x1 << 21 | m, 1 << 63 | x2 << 42 | x1 << 21 | m]
            places = [(self.single, m)] + [(self.slots, self.slot(k, self.n_slots)) for k in keys]
            pairs += [memory.get(place, [0, 0]) for memory, place in places]
            odds = log2(self.sums[hi] - self.sums[m]) - log2(self.sums[m] - self.sums[lo])
            inputs = [(clip(odds, 2816), 0)]
            for n0, n1 in pairs:
                odds = clip(log2(16 * n1 + 2) - log2(16 * n0 + 2), 2816)
                inputs.append((odds, bucket(n0 + n1) + (16 if n0 and n1 else 0)))
            matching = predicted is not None and lo <= predicted < hi
            if matching:
                p = self.match[length]
                odds = log2(p) - log2(65536 - p)
                inputs.append((odds if predicted >= m else -odds, length))
            else:
                inputs.append((0, 0))
            table_order = 2 if sum(pairs[1]) else 1 if sum(pairs[0]) else 0
            session_order = 2 if sum(pairs[4]) else 1 if sum(pairs[3]) else 0
            w = self.mixing[(3 * table_order + session_order) * 2 + matching]
            total = sum(int(w[i, b]) * odds for i, (odds, b) in enumerate(inputs)) >> 16
            p = PROBABILITY[clip(total, 2816) + 2816]
            bit = self.decide(p) if leaf is None else int(leaf >= m)
            if leaf is None:
                used = [int(w[i, b]) for i, (_, b) in enumerate(inputs)]
                self.steps[-1] += [m, [(o, b, u) for (o, b), u in zip(inputs, used, strict=True)]]
            for i, (odds, b) in enumerate(inputs):
                change = (odds * (65536 * bit - p) + (1 << 18)) >> 19
                w[i, b] = clip(int(w[i, b]) + change, 1 << 20)
            if matching:
                p = self.match[length]
                right = bit == (predicted >= m)
                self.match[length] = p + (65535 - p >> 6) if right else max(64, p - (p >> 6))
            for memory, place in places:
                n = list(memory.get(place, [0, 0]))
                n[bit] = min(255, n[bit] + 1)
                if n[1 - bit] > 2:
                    n[1 - bit] = n[1 - bit] // 2 + 1
                memory[place] = n
            lo, hi = (m, hi) if bit else (lo, m)
        self.learn_match(lo, predicted)
        return lo

    def learn_match(self, leaf, predicted):
        h = self.history
        h.append(leaf)
        if leaf == predicted:
            self.match_at, self.match_length = self.match_at + 1, self.match_length + 1
        else:
            self.match_length = 0
        if len(h) < 2:
            return
        slot = self.slot(h[-2] + 1 << 21 | h[-1] + 1, 1 << 16)
        if not self.match_length and slot in self.seen:
            self.match_at = self.seen[slot]
            while (
                self.match_length < min(16, self.match_at)
                and h[self.match_at - 1 - self.match_length] == h[-1 - self.match_length]
            ):
                self.match_length += 1
        self.seen[slot] = len(h)


def token_model(data, n, tables, context):
    """The model, with the context behind it."""
    if tables is None:
        need(len(data) and data[0] <= 20, "size of token ids")
        tables, data = TokenTables(bits=data[0]), data[1:]
    model = TokenModel(tables, bytes(data), len(context) + n)
    for id_ in context:
        model.token(tables.leaf_of.get(id_, len(tables.ids)))
    return model


def decode_token_ids(data, n, tables=None, context=()):
    """int32 [n]; ``tables`` of the book, or None without."""
    context = list(context)[-4096:]
    need(n or not data, "bytes for no tokens")
    if not n:
        return np.zeros(0, np.int32)
    model, found = token_model(data, n, tables, context), []
    for _ in range(n):
        leaf = model.token()
        if leaf < len(model.tables.ids):
            found.append(model.tables.ids[leaf])
        else:
            bits = "".join(str(model.decide(1 << 15)) for _ in range(32))
            found.append(int(bits, 2) - (1 << 32 if bits[0] == "1" else 0))
            need(not 0 <= found[-1] < len(model.tables.ids), "escape of an id that has a leaf")
    model.end()
    if tables is None:
        largest = max([0, *(i for i in [*context, *found] if 0 <= i < 1 << 20)])
        need(data[0] == largest.bit_length(), "size of token ids")
    return np.array(found, np.int32)


def trace(data, n):
    """Decisions of a stream without tables and escapes: token, node, low, high, probability, bit,
    and (log-odds, bucket, weight) of each input."""
    model = token_model(data, n, None, ())
    for number in range(n):
        need(model.token() < len(model.tables.ids), "no escapes here")
        for low, high, p, bit, node, inputs in model.steps:
            yield number, node, f"{low:08x}", f"{high:08x}", p, bit, inputs
        model.steps.clear()
    model.end()


# --- container --------------------------------------------------------------------------------


class File:
    """``snapshots``: dicts with tokens, source, tracks, opaque; see `_snapshot` and `_track`.
    ``books``: bytes of the books inside and of the one given, by id. ``tier``: of snapshots with
    quality layers the one to read, where they have it, else the last."""

    def __init__(self, data, book=None, tier=None):
        self.data, self.tier = data, tier
        self.books, self._opened = {}, {}
        if book is not None:
            self.books[book[-32:].hex()] = book
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
                type_, flags, extra = cursor.u8(), cursor.u8(), cursor.ref()
                need(not flags & 1 or type_ <= 4 or type_ == BOOK, "a critical record is not known")
                if type_ == BOOK:
                    book = self.payload(extra, BOOK)[0]
                    self.books[book[-32:].hex()] = book
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
        before, dictionary = np.zeros(0, np.int32), usual_metadata()
        if parent:
            before = self.snapshots[parent - 1]["tokens"]
            dictionary = self.snapshots[parent - 1]["structure"][-65536:]
        kept, n_new, coding, ids = c.uvarint(), c.uvarint(), c.u8(), c.take(c.uvarint())
        need(kept <= len(before), "kept tokens")
        length = c.uvarint()
        structure = unzstd(c.take(len(c.data) - c.at), length, dictionary)
        need(len(structure) == length, "length of the structure")
        out = {"parent": parent - 1 if parent else None, "structure": structure}
        c = Cursor(structure)
        out |= {"plan": c.string(), "tier": c.string(), "name": c.string()}
        out |= {"source": c.metadata(), "identity": c.metadata(), "coding": c.metadata()}
        new = self._new_tokens(coding, ids, n_new, before[:kept], out)
        out["tokens"] = np.concatenate([before[:kept], new])
        out["tracks"] = c.several(lambda: self._track(c, out))
        opaque = c.several(lambda: self._opaque(c))
        out["opaque"] = dict(opaque)
        c.end()
        need(len(out["opaque"]) == len(opaque), "an opaque name occurs twice")
        places = {(track["cache"], track["stream"]) for track in out["tracks"]}
        need(len(places) == len(out["tracks"]), "a track occurs twice")
        return out

    def _new_tokens(self, coding, ids, n, kept, snapshot):
        if coding == 3:
            return decode_token_ids(ids, n, None, kept.tolist())
        if coding == 4:
            return decode_token_ids(ids, n, self.book(snapshot).token_tables, kept.tolist())
        return decode_ints(coding, ids, n)

    def book(self, snapshot):
        """The book that a snapshot names."""
        wanted = snapshot["coding"].get("book")
        need(wanted in self.books, f"book {wanted} is needed")
        if wanted not in self._opened:
            self._opened[wanted] = Book(self.books[wanted])
        return self._opened[wanted]

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
        out["absent"] = []  # cells whose frames are not stored; their rows have no meaning
        out["rows"] = [np.zeros((n, row_bytes), np.uint8) for _, _, _, row_bytes, _ in tensors]
        at = 0
        for number, first, count in runs:
            need(number < len(self.blocks), "block number")
            need(first + count <= self.blocks[number]["frames"], "frame run outside its block")
            pos = out["pos"][at : at + count]
            found = self._frames(number, slice(first, first + count), snapshot, tensors, pos)
            for rows, part in zip(out["rows"], found or [], strict=bool(found)):
                rows[at : at + count] = part
            if found is None:
                out["absent"] += range(at, at + count)
            at += count
        return out

    def _opaque(self, c):
        name, ref, length, id_ = c.string(), c.ref(), c.uvarint(), c.take(16)
        content = unzstd(self.payload(ref, OPAQUE)[0], length)
        need(len(content) == length and blake3(content).digest(length=16) == id_, "opaque part")
        return name, content

    def _frames(self, number, span, snapshot, tensors, pos):
        """Rows of the frames ``span`` of a block, which sit at the positions ``pos``; None if the
        block is absent."""
        chunks = self.blocks[number]["chunks"]
        if not chunks and self.blocks[number]["content_id"] == bytes(16):
            need(pos.min() >= 0 and pos.max() < len(snapshot["tokens"]), "tokens of absent frames")
            need(snapshot["tokens"][: pos.max() + 1].min() >= 0, "tokens of absent frames")
            return None
        layers = layers_of(chunks, len(tensors))
        names = snapshot["coding"].get("layers", [snapshot["tier"]])
        wanted = names.index(self.tier) if self.tier in names else len(names) - 1
        layer = layers[min(wanted, len(layers) - 1)] if chunks else []
        if layer and layer[0]["said"][0] in (2, 4):
            log_steps, values = self.integers(number, layer[0]["said"][1], snapshot, tensors)
            pairing = snapshot["coding"]["rope_pairing"]
            need(pairing in ("norm", "neox"), "pairing of the keys")
            return self.book(snapshot).rows(
                log_steps[span], values[span], tensors, snapshot["tokens"], pos, pairing
            )
        return [rows[span] for rows in self.block(number, layer, tensors)]

    def integers(self, number, layer, snapshot, tensors):
        """int64 log_step [frames] and integers [frames, R] of a layer of a book-coded block."""
        if number not in self.decoded:
            entry, book, segments = self.blocks[number], self.book(snapshot), None
            payloads = b""
            for chunk in entry["chunks"]:
                payloads += self.payload(chunk["ref"], CHUNK)[0]
                if chunk["said"][1] <= layer:
                    segments = self._chunk(entry, chunk, tensors, book, segments)
            if entry["chunks"][-1]["said"][0] in (2, 4):
                need(blake3(payloads).digest(length=16) == entry["content_id"], "content id")
            log_steps = np.concatenate([np.full(len(values), step) for step, values in segments])
            self.decoded[number] = log_steps, np.concatenate([values for _, values in segments])
        return self.decoded[number]

    def block(self, number, layer, tensors):
        """Rows of all tensors of a block, from its exact layer: uint8 [frames, row bytes] each."""
        if number not in self.decoded:
            entry = self.blocks[number]
            chunks = [self._chunk(entry, chunk, tensors) for chunk in layer]
            rows = [part for chunk in chunks for part in chunk]
            digest = blake3(b"".join(r.tobytes() for r in rows)).digest(length=16)
            need(digest == entry["content_id"], "content id")
            self.decoded[number] = rows
        return self.decoded[number]

    def _chunk(self, entry, chunk, tensors, book=None, below=None):
        payload, check = self.payload(chunk["ref"], CHUNK)
        c = Cursor(payload)
        codec, layer, n_frames, first, type_ = c.u8(), c.u8(), c.uvarint(), c.uvarint(), c.uvarint()
        row_bytes = row_lengths(c)
        said = [codec, layer, first, len(row_bytes), n_frames * sum(row_bytes)]
        need(check == chunk["check"] and said == chunk["said"], "chunk and index differ")
        meant = tensors[first : first + len(row_bytes)]
        need(n_frames == entry["frames"], "frames of a chunk")
        need([(type_, n) for n in row_bytes] == [t[2:4] for t in meant], "tensors of a chunk")
        need(codec in (0, 1, 2, 4), "codec is not known")
        if codec == 2:
            rows = decode_segments(c, n_frames, book)
        elif codec == 4:
            rows = decode_refinement(c, below, book)
        elif codec == 1:
            rows = decode_fields(c, n_frames, type_, row_bytes)
        else:
            rows = [np.frombuffer(c.take(n_frames * n), np.uint8).reshape(-1, n) for n in row_bytes]
        c.end()
        return rows


def row_lengths(c):
    """Row bytes of each tensor of a chunk."""
    found = []
    for _ in range(c.uvarint()):
        count = c.uvarint()
        need(len(found) + count <= 65535, "tensors of a chunk")
        found += count * [c.uvarint()]
    return found


def layers_of(chunks, n_tensors):
    """Chunks of each quality layer of a block; tsc.md, section 13."""
    last = chunks[-1]["said"][1] if chunks else 0
    layers = [[chunk for chunk in chunks if chunk["said"][1] == n] for n in range(last + 1)]
    need(sum(layers, []) == chunks, "order of the chunks")
    below = set()
    for n, layer in enumerate(layers):
        firsts, counts = ([chunk["said"][i] for chunk in layer] for i in (2, 3))
        need([*firsts, n_tensors] == [0, *np.cumsum(counts).tolist()], "tensors of a layer")
        codecs = {chunk["said"][0] for chunk in layer}
        if codecs <= {0, 1} or codecs == {5}:
            need(n == last, "a layer above the exact one")
            need(codecs != {5} or len(layer) == 1, "one chunk in a layer of codec 5")
        else:
            need(len(layer) == 1, "one chunk in a lossy layer")
            need((codecs == {4}) == (n > 0) and (not n or below <= {2, 4}), "codec of a layer")
        below = codecs
    return layers


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
