"""Codec 3 from its page, codecs/session-transform.md, in the style of reference_decoder.py.

Needs NumPy and zstandard. ``basis`` gives a basis from the payload of its record, ``rows`` the rows
of some frames of a chunk. Reads the tables from the page itself.
"""

import re
import struct
from pathlib import Path

import numpy as np
import zstandard

FLOATS = {0: 4, 1: 2, 30: 2}
PAGE = Path(__file__).parent / "codecs" / "session-transform.md"


class Damaged(Exception):
    """The bytes are not what the page says."""


def need(condition, what):
    if not condition:
        raise Damaged(what)


def tables():
    """uint32 [20, 32]: frequencies of each class."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([\d ]+) \| ([\d ]+) \| (\d+) \| (\d+) \|$", text, re.M)
    f = np.ones((20, 32), np.uint32)
    for k, plus, minus, escape, total in rows:
        plus, minus = plus.split(), minus.split()
        f[int(k), 0] = int(total)
        f[int(k), 1 : 2 * len(plus) : 2] = [int(v) for v in plus]
        f[int(k), 2 : 2 * len(minus) + 1 : 2] = [int(v) for v in minus]
        f[int(k), 31] = int(escape)
    need(len(rows) == 20 and (f.sum(axis=1) == 4096).all(), "tables of the page")
    return f


class Cursor:
    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def take(self, n):
        need(0 <= n <= len(self.data) - self.at, "more bytes than are there")
        self.at += n
        return self.data[self.at - n : self.at]

    def fixed(self, layout):
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def u8(self):
        return self.take(1)[0]

    def uvarint(self):
        value = shift = 0
        while True:
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            need(shift < 64, "length of an uvarint")
        need(value < 1 << 64 and (byte or not shift), "form of an uvarint")
        return value

    def end(self):
        need(self.at == len(self.data), "bytes are left over")

    def widths(self, n_columns):
        """int64 [n_columns]"""
        n = self.uvarint()
        need(n <= n_columns, "number of widths")
        out = np.zeros(n_columns, np.int64)
        if n:
            frame = self.take(self.uvarint())
            need(zstandard.frame_content_size(frame) == n, "size of the widths")
            steps = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
            out[:n] = np.cumsum(steps.astype(np.int64)) % 256
        need(out.max(initial=0) <= 112, "width")
        return out

    def matrix(self, n_rows, widths):
        """int64 [n_rows, columns]"""
        out = np.zeros((n_rows, len(widths)), np.int64)
        stored = np.flatnonzero(widths)
        if not len(stored) or not n_rows:
            return out
        low = np.maximum(0, -((20 - widths[stored]) // 4))
        classes = widths[stored] - 1 - 4 * low
        n_lanes = self.uvarint()
        need(1 <= n_lanes <= 32, "number of lanes")
        lengths = [self.uvarint() for _ in range(n_lanes)]
        lanes = [np.frombuffer(self.take(2 * n), "<u2").tolist() for n in lengths]
        symbols = decode_lanes(lanes, classes, n_rows * len(stored)).reshape(n_rows, -1)
        bits_of = [np.flatnonzero(low > b) for b in range(int(low.max()))]
        n_bits = n_rows * sum(len(columns) for columns in bits_of)
        packed = np.frombuffer(self.take((n_bits + 7) // 8), np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[:n_bits].astype(np.int64)
        high = (symbols + 1) // 2 * np.where(symbols % 2, 1, -1)
        for place in np.argwhere(symbols == 31).tolist():
            u = self.uvarint()
            need(u < 1 << 32, "an escaped value")
            high[tuple(place)] = u >> 1 ^ -(u & 1)
        values = (high << low) - ((1 << low) >> 1)
        at = 0
        for b, columns in enumerate(bits_of):
            n = n_rows * len(columns)
            values[:, columns] += bits[at : at + n].reshape(n_rows, -1) << b
            at += n
        need((values >= -(1 << 31)).all() and (values < 1 << 31).all(), "an integer of 32 bits")
        out[:, stored] = values
        return out


def decode_lanes(lanes, classes, n):
    """int64 [n] symbols; symbol i is in lane i mod the number of lanes."""
    f = tables()
    first = np.cumsum(f, axis=1) - f
    symbol_of = np.stack([np.repeat(np.arange(32), row) for row in f]).tolist()
    f, first = f.tolist(), first.tolist()
    out = np.empty(n, np.int64)
    for number, words in enumerate(lanes):
        need(len(words) >= 2, "words of a lane")
        x, at = words[0] << 16 | words[1], 2
        for i in range(number, n, len(lanes)):
            k = int(classes[i % len(classes)])
            slot = x & 4095
            s = symbol_of[k][slot]
            x = f[k][s] * (x >> 12) + slot - first[k][s]
            if x < 1 << 16:
                need(at < len(words), "words of a lane")
                x, at = x << 16 | words[at], at + 1
            out[i] = s
        need(x == 1 << 16 and at == len(words), "end of a lane")
    return out


def basis(payload, before=None):
    """The basis of a record; ``before`` is the one that it extends, where it names one."""
    c = Cursor(payload)
    (parent,) = c.fixed("Q")
    need(bool(parent) == (before is not None), "the basis that is extended")
    if parent:
        out = {"turn": before["turn"], "groups": [dict(g) for g in before["groups"]]}
    else:
        out = {"turn": None, "groups": []}
        turned = c.u8()
        need(turned <= 1, "how keys are turned")
        if turned:
            pairing, head_dim, m = c.u8(), c.uvarint(), c.uvarint()
            need(pairing <= 1 and head_dim >= max(1, 2 * m), "how keys are turned")
            inv_freq = np.frombuffer(c.take(4 * m), "<f4")
            out["turn"] = ("norm", "neox")[pairing], head_dim, inv_freq
        for _ in range(c.uvarint()):
            pairs = [(c.uvarint(), c.uvarint()) for _ in range(c.uvarint())]
            need(pairs and all(size for _, size in pairs), "tensors of a group")
            steps = np.frombuffer(c.take(4 * len(pairs)), "<f4").astype(float)
            need(np.isfinite(steps).all() and (steps > 0).all(), "steps")
            tensors, sizes = [i for i, _ in pairs], [size for _, size in pairs]
            out["groups"].append({"tensors": tensors, "sizes": sizes, "steps": steps})
    budget = 16 * len(payload) + (1 << 20)
    for group in out["groups"]:
        n_channels = sum(group["sizes"])
        n = c.uvarint() + (not parent)
        budget -= n * n_channels
        need(budget >= 0, "entries of a basis")
        exponents = np.frombuffer(c.take(n), np.int8).astype(float)
        widths = c.widths(n * len(group["sizes"])).reshape(n, -1)
        entries = [c.matrix(size, widths[:, t]).T for t, size in enumerate(group["sizes"])]
        rows = np.concatenate(entries, axis=1) * 2.0 ** (-exponents[:, None] / 4)
        if not parent:
            group["mean"], group["rows"] = rows[0], rows[1:]
        else:
            group["rows"] = np.concatenate([group["rows"], rows])
        need(len(group["rows"]) <= n_channels, "more rows than channels")
    c.end()
    return out


def integers(body, n_frames, basis):
    """int64 [frames, R + C], and each frame's shift, from the body of a chunk behind its u64."""
    n_rows = sum(len(g["rows"]) for g in basis["groups"])
    n_channels = sum(sum(g["sizes"]) for g in basis["groups"])
    c = Cursor(body)
    base = c.u8()
    widths = c.widths(n_rows + n_channels)
    parts, shifts, left = [], [], n_frames
    while left:
        n, extra, _ = c.uvarint(), c.u8(), c.fixed("f")
        need(1 <= n <= left, "frames of a segment")
        finer = np.where(widths, np.minimum(widths + extra, 112), 0)
        parts.append(c.matrix(n, finer))
        shifts.append(np.full(n, base + extra))
        left -= n
    c.end()
    return np.concatenate(parts), np.concatenate(shifts)


def rows(values, shifts, basis, tensors, pos):
    """uint8 [n, row bytes] of each tensor: (layer, role, element type, row bytes, …)."""
    out = [None] * len(tensors)
    step = 2.0 ** (-shifts[:, None] / 4)
    held = sorted(i for g in basis["groups"] for i in g["tensors"])
    need(held == list(range(len(tensors))), "tensors of the basis")
    column, channel = 0, sum(len(g["rows"]) for g in basis["groups"])
    for g in basis["groups"]:
        order = [(tensors[i][1], tensors[i][0]) for i in g["tensors"]]
        need(order == sorted(order), "order of a group")
        n_rows, n_channels = g["rows"].shape
        y = values[:, column : column + n_rows] @ g["rows"]
        y = (y + values[:, channel : channel + n_channels]) * step + g["mean"]
        column, channel = column + n_rows, channel + n_channels
        parts = np.split(y, np.cumsum(g["sizes"])[:-1], axis=1)
        for i, part, size, t in zip(g["tensors"], parts, g["sizes"], g["steps"], strict=True):
            _, role, type_, row_bytes, *_ = tensors[i]
            need(size * FLOATS[type_] == row_bytes, "channels of a tensor")
            x = part * t
            if role == 0 and basis["turn"]:
                x = turn(x, pos, *basis["turn"])
            out[i] = as_rows(x, type_)
    return out


def turn(keys, pos, pairing, head_dim, inv_freq):
    """Apply RoPE to float64 [n, channels] and put each head's pairs where the source does."""
    need(not keys.shape[1] % head_dim, "channels of a head")
    angles = (pos.astype(np.float32)[:, None] * inv_freq).astype(float)  # float32 product
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    heads = keys.reshape(len(pos), -1, head_dim)
    m = len(inv_freq)
    a, b = heads[..., :m], heads[..., m : 2 * m]
    pair = np.stack([a * cos - b * sin, b * cos + a * sin], axis=2 if pairing == "neox" else 3)
    turned = pair.reshape(*heads.shape[:2], 2 * m)
    return np.concatenate([turned, heads[..., 2 * m :]], axis=2).reshape(keys.shape)


def as_rows(values, type_):
    """Round to nearest, ties to even."""
    with np.errstate(over="ignore"):
        if type_ == 30:
            bits = values.astype("<f4").view("<u4")
            stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
        else:
            stored = values.astype({0: "<f4", 1: "<f2"}[type_])
    return np.ascontiguousarray(stored).view(np.uint8)
