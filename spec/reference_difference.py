"""Codec 7 from its page, codecs/difference.md, in the style of reference_decoder.py.

Needs NumPy and reference_decoder.py, which ``import`` must find. ``decode`` gives the rows of a
chunk's body. Keys are turned number by number, in fractions that are rounded where the page says.
"""

import math
import struct
from fractions import Fraction

import numpy as np
from reference_decoder import BLOCKS, FLOATS, Cursor, decode_fields, decode_stream, join, need

PLACES = {1: (11, -24), 30: (8, -133), 0: (24, -149)}  # bits of a number, log2 of the smallest
MIDDLE = {2: 8, 6: 16}
TURNED = {0, 1, 2, 3, 6, 7, 8, 30}


def decode(body, base, tensors):
    """Rows, uint8 [n, row bytes] of each tensor. ``base``: the same; ``tensors``: (role, type)."""
    c = Cursor(bytes(body))
    turn = read_turn(c)
    modes = []
    while len(modes) < len(tensors):
        count, mode = c.uvarint(), c.u8()
        need(1 <= count <= len(tensors) - len(modes) and mode <= 2, "modes")
        modes += count * [mode]
    rows = [
        turn_rows(part, type_, turn)
        if mode < 2 and turn and takes(part, role, type_, turn) else part
        for part, mode, (role, type_) in zip(base, modes, tensors, strict=True)
    ]  # fmt: skip
    groups = {}
    for i, (mode, tensor) in enumerate(zip(modes, tensors, strict=True)):
        if mode:
            groups.setdefault((mode, tensor), []).append(i)
    for (mode, (_, type_)), members in groups.items():
        own = [rows[i] for i in members]
        sizes = [part.shape[1] for part in own]
        if mode == 2:
            found = decode_fields(c, len(own[0]), type_, sizes)
        else:
            found = differences(c, own, type_)
        for i, part in zip(members, found, strict=True):
            rows[i] = part
    c.end()
    return rows


def read_turn(c):
    kind = c.u8()
    need(kind <= 2, "kind")
    if not kind:
        return None
    log_mixed, head, pairs = c.u8(), c.uvarint(), c.uvarint()
    need(log_mixed <= 16 and 1 <= head <= 65536 and 2 * pairs <= head, "turn")
    cos, sin = c.fixed(f"{pairs}i"), c.fixed(f"{pairs}i")
    need(all(abs(v) <= 1 << 29 for v in (*cos, *sin)), "cosine or sine")
    if kind == 1:
        places = [(j, j + pairs) for j in range(pairs)]
    else:
        places = [(2 * j, 2 * j + 1) for j in range(pairs)]
    return 1 << log_mixed, head, list(zip(places, cos, sin, strict=True))


def takes(rows, role, type_, turn):
    if role or type_ not in TURNED:
        return False
    elements, size = BLOCKS[type_][:2] if type_ in BLOCKS else (1, FLOATS[type_])
    channels = rows.shape[1] // size * elements
    return channels <= 1 << 20 and channels % turn[0] == channels % turn[1] == 0


# --- differences ---------------------------------------------------------------------------------


def differences(c, base, type_):
    n = len(base[0])
    split = [fields(part, type_) for part in base]
    out = []
    for number, bits in enumerate(bits for bits, _ in split[0]):
        predicted = np.concatenate([part[number][1] for part in split], axis=1)
        z = decode_stream(c.take(c.uvarint()), min(bits, 8), *predicted.shape).astype(np.int64)
        far = z == 255
        if bits > 8 and far.any():
            z[far] = decode_stream(c.take(c.uvarint()), bits, int(far.sum()), 1)[:, 0]
        d = np.where(z % 2 == 0, z // 2, -(z // 2) - 1)
        half, whole = 1 << (bits - 1), 1 << bits
        if type_ in BLOCKS or type_ not in FLOATS:
            value = (predicted + d) % whole
        else:
            rank = np.where(predicted < half, predicted + half, whole - 1 - predicted)
            rank = (rank + d) % whole
            value = np.where(rank >= half, rank - half, whole - 1 - rank)
        widths = [part[number][1].shape[1] for part in split]
        out.append(np.split(value, np.cumsum(widths)[:-1], axis=1))
    if type_ in BLOCKS:
        return [join(part, n, BLOCKS[type_][3]) for part in zip(*out, strict=True)]
    kind = f"<u{FLOATS.get(type_, 1)}"
    return [part.astype(kind).view(np.uint8).reshape(n, -1) for part in out[0]]


def fields(rows, type_):
    """Pairs of bits and int64 [n, columns]; codecs/fields.md."""
    n = len(rows)
    if type_ not in BLOCKS:
        size = FLOATS.get(type_, 1)
        return [(8 * size, np.ascontiguousarray(rows).view(f"<u{size}").astype(np.int64))]
    _, size, has_minimum, bits = BLOCKS[type_]
    blocks = np.ascontiguousarray(rows).reshape(n, -1, size)
    halves = 1 + has_minimum
    out = [
        (16, np.ascontiguousarray(blocks[:, :, 2 * i : 2 * i + 2]).view("<u2")[:, :, 0].astype(int))
        for i in range(halves)
    ]
    codes = blocks[:, :, 2 * halves :]
    if bits < 8:
        low = codes[:, :, -16:]
        wide = np.concatenate([low & 15, low >> 4], axis=2)
        if bits == 5:
            wide = wide + 16 * np.unpackbits(codes[:, :, :4], axis=2, bitorder="little")
        codes = wide
    return [*out, (bits, codes.reshape(n, -1).astype(np.int64))]


# --- turning -------------------------------------------------------------------------------------


def turn_rows(rows, type_, turn):
    mixed, head, pairs = turn
    out = []
    for row in rows:
        values = mix(read_values(row, type_), mixed)
        values = [nearest(v, 0) for v in values]
        for first in range(0, len(values), head):
            for (i, j), c, s in pairs:
                x, y = values[first + i], values[first + j]
                values[first + i] = sum_of((x, c), (y, s), minus=True)
                values[first + j] = sum_of((x, s), (y, c))
        values = [v / mixed for v in mix(values, mixed)]
        out.append(store_blocks(values, row, type_) if type_ in BLOCKS else
                   store_floats(values, row, type_))  # fmt: skip
    return np.array(out, np.uint8).reshape(rows.shape)


def sum_of(p, q, minus=False):
    """The sum of two products, given as pairs of a number and an integer, in units of 2^-28."""
    if not all(math.isfinite(x) for x, _ in (p, q)):
        return math.nan
    sign = -1 if minus else 1
    exact = Fraction(p[0]) * p[1] + sign * Fraction(q[0]) * q[1]
    if exact:
        return math.ldexp(float(exact), -28)
    # Fractions have no sign of zero.
    return p[0] * p[1] - q[0] * q[1] if minus else p[0] * p[1] + q[0] * q[1]


def mix(values, block):
    apart = 1
    while apart < block:
        for i in range(len(values)):
            if i % (2 * apart) < apart:
                x, y = values[i], values[i + apart]
                values[i], values[i + apart] = x + y, x - y
        apart *= 2
    return values


def read_values(row, type_):
    if type_ not in BLOCKS:
        data = bytes(row)
        if type_ == 30:
            data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        return [float(v) for (v,) in struct.iter_unpack("<e" if type_ == 1 else "<f", data)]
    parts = fields(row[None], type_)
    codes, scales = parts[-1][1][0], parts[0][1][0]
    lows = parts[1][1][0] if len(parts) > 2 else None
    out = []
    for i, code in enumerate(codes.tolist()):
        q = code - MIDDLE.get(type_, 0) if type_ != 8 else code - 256 * (code > 127)
        low = half(lows[i // 32]) if lows is not None else 0.0
        value = half(scales[i // 32]) * q
        out.append(value + low if lows is not None else value)
    return out


def half(pattern):
    return struct.unpack("<e", struct.pack("<H", int(pattern)))[0]


def nearest(value, type_):
    """The nearest number of a float type, ties to even, as a float; infinite beyond its range."""
    if not math.isfinite(value) or not value:
        return value
    bits, smallest = PLACES[type_]
    place = max(math.frexp(value)[1] - bits, smallest)
    rounded = math.copysign(math.ldexp(round(math.ldexp(value, -place)), place), value)
    most = {1: 65504.0, 30: math.ldexp(255, 120), 0: math.ldexp((1 << 24) - 1, 104)}[type_]
    return rounded if abs(rounded) <= most else math.copysign(math.inf, value)


def store_floats(values, row, type_):
    size, out = FLOATS[type_], b""
    for i, value in enumerate(values):
        rounded = nearest(value, type_)
        if not math.isfinite(rounded):
            out += bytes(row[size * i : size * i + size])
        elif type_ == 30:
            out += struct.pack("<f", rounded)[2:]
        else:
            out += struct.pack("<e" if type_ == 1 else "<f", rounded)
    return list(out)


def store_blocks(values, row, type_):
    _, size, has_minimum, bits = BLOCKS[type_]
    out = b""
    for n in range(len(values) // 32):
        with np.errstate(all="ignore"):
            block = store_block(np.array(values[32 * n : 32 * n + 32]).astype(np.float32), type_)
        if block is None:
            out += bytes(row[size * n : size * n + size])
            continue
        halves, codes = block
        parts = [np.array([[h]]) for h in halves] + [np.array([codes])]
        out += join(parts, 1, bits).tobytes()
    return list(out)


def store_block(v, type_):
    """Patterns of the halves and the codes; None where the block of the base row is taken."""
    one = np.float32
    if not all(np.isfinite(v)):
        return None
    low = one(0)
    if type_ == 8:
        scale = max(abs(x) for x in v) / one(127)
    elif type_ in MIDDLE:
        scale = max(v, key=abs) / one(-MIDDLE[type_])
    else:
        low = min(v) + one(0)
        scale = (max(v) + one(0) - low) / one(15 if type_ == 3 else 31)
    inverse = one(1) / scale if scale else one(0)
    halves = [scale.astype("<f2")] + ([low.astype("<f2")] if type_ in (3, 7) else [])
    if not np.isfinite(halves).all():
        return None
    p = [(x - low) * inverse for x in v]
    most = 15 if type_ in (2, 3) else 31
    if type_ == 8:
        codes = [max(-127, min(127, round(float(x)))) % 256 for x in p]
    else:
        middle = one(MIDDLE.get(type_, 0) + 0.5)
        codes = [max(0, min(most, math.floor(x + middle))) for x in p]
    return [int(h.view("<u2")) for h in halves], codes
