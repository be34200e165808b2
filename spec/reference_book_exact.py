"""Codec 5 from its page, codecs/book-exact.md, in the style of reference_decoder.py.

Needs NumPy and zstandard, and `Book` of reference_decoder.py for the arrays and facts of a book.
``rows`` gives the rows of a chunk. Frames are worked through side by side, as they do not depend on
each other, but for the lanes of the coder.
"""

import struct

import numpy as np
import zstandard

TYPES = {1: (10, -24), 30: (7, -133)}  # element type: bits of fraction, log2 of the smallest
WIDTHS = [0] * 32 + [2] * 8 + [4] * 4 + [5] * 4 + [8, 9, 10]
SINE = (1686629713, -693598668, 85569304, -5026994, 172272)
COSINE = (1073741824, -1324676119, 272378143, -22402376, 987035)
ESCAPE = 102
SIDE = np.concatenate([[0], np.cumsum([1 << width for width in WIDTHS])])
FIRST = [int(v) for v in np.concatenate([-SIDE[:0:-1], SIDE[:-1]])]
WIDTH = WIDTHS[::-1] + WIDTHS


class Damaged(Exception):
    """The bytes are not what the page says."""


def need(condition, what):
    if not condition:
        raise Damaged(what)


class Cursor:
    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def take(self, n):
        need(0 <= n <= len(self.data) - self.at, "more bytes than are there")
        self.at += n
        return self.data[self.at - n : self.at]

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

    def ints(self, n):
        """codecs/ints.md"""
        coding, body = self.u8(), Cursor(self.take(self.uvarint()))
        if coding == 0:
            out = []
            while body.at < len(body.data):
                start, step, count = body.uvarint(), body.uvarint(), body.uvarint()
                start, step = ((v >> 1) ^ -(v & 1) for v in (start, step))
                need(0 < count <= n - len(out), "runs")
                out += range(start, start + step * count, step) if step else [start] * count
            need(len(out) == n, "runs")
            return [int(v) for v in out]
        need(coding in (1, 2), "coding of integers")
        need(zstandard.frame_content_size(body.data) == 4 * n, "size of integers")
        planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(body.data), np.uint8)
        values = np.ascontiguousarray(planes.reshape(4, n).T).view("<i4")[:, 0]
        return (np.cumsum(values, dtype=np.int32) if coding == 2 else values).tolist()


def shift(x, n):
    return x << min(n, 30) if n >= 0 else x >> min(-n, 62)


def limit(x, y):
    return min(max(x, -y), y)


def out(x):
    return x if x >= 0 else -1 - x


def log2(x):
    return x.bit_length() - 1


def series(terms, q):
    total = terms[-1]
    for term in terms[-2::-1]:
        total = ((q * total) >> 30) + term
    return total


def angle(position, inv_freq):
    """Cosine and sine of one pair at one position."""
    with np.errstate(all="ignore"):
        product = np.float32(position) * inv_freq
    t = float(product if np.isfinite(product) else 0) * 0.6366197723675814
    v = np.floor(t + 0.5)
    r = int(np.floor((t - v) * 2.0**30 + 0.5))
    q = (r * r) >> 30
    s, c = (((x + (1 << 14)) >> 15) for x in ((r * series(SINE, q)) >> 30, series(COSINE, q)))
    return [(c, s), (-s, c), (-c, -s), (s, -c)][int(np.mod(v, 4))]


class Lane:
    def __init__(self, words):
        self.words, self.at = words, 2
        self.state = words[0] << 32 | words[1]
        need(1 << 31 <= self.state < 1 << 63, "a lane's first state")

    def low(self, bits):
        return self.state & ((1 << bits) - 1)

    def leave(self, start, size, bits):
        self.state = size * (self.state >> bits) + self.low(bits) - start
        if self.state < 1 << 31:
            need(self.at < len(self.words), "words of a lane")
            self.state = self.state << 32 | self.words[self.at]
            self.at += 1

    def raw(self, bits):
        value = self.low(bits)
        self.leave(value, 1, bits)
        return value


class Tables:
    """What a book holds for the codec, by channel."""

    def __init__(self, book):
        arrays = {k[6:]: v for k, v in book.arrays.items() if k.startswith("exact_")}
        self.layers, self.head_dim = book.facts["book.n_layers"], book.facts["book.head_dim"]
        self.c = len(book.arrays["mean"])
        self.w = self.c // (2 * self.layers)
        self.inv_freq = book.arrays["inv_freq"]
        self.vectors, self.vector_scales = (
            book.arrays[name] for name in ("token_vectors", "token_scales")
        )
        window, token_channels, self.token_bits = arrays["sizes"].tolist()
        self.weight_bits, self.scale_bits, self.unit_bits, self.sigmas = (
            arrays[name].tolist() for name in ("weight_bits", "scale_bits", "unit_bits", "sigmas")
        )
        weights = 256 * arrays["weights_high"].astype(np.int64) + arrays["weights_low"]
        self.sums = np.zeros((256, ESCAPE + 2), np.int64)
        np.cumsum(arrays["frequencies"], axis=1, out=self.sums[:, 1:])
        need((self.sums[:, -1] == 65536).all() and (arrays["frequencies"] > 0).all(), "frequencies")
        # Of each channel its place in the group, and where its regressors lie in the list of
        # constant, token and all channels.
        dims, at, self.rows, self.seen = self.vectors.shape[1], 0, [], []
        for a in range(0, self.c, 32):
            b = min(a + 32, self.c)
            head = 1 + (dims if a < token_channels else 0)
            seen = np.concatenate(
                [np.arange(head), 1 + dims + np.arange(max(0, a - window), b)]
            )
            for _ in range(a, b):
                self.rows.append(weights[at : at + len(seen)])
                self.seen.append(seen)
                at += len(seen)
        need(at == len(weights), "number of weights")

    def token(self, i):
        if not 0 <= i < len(self.vectors):
            return [0] * self.vectors.shape[1]
        numbers = self.vectors[i].astype(float) * float(self.vector_scales[i])
        numbers = np.floor(numbers * 2.0**self.token_bits + 0.5)
        return np.clip(numbers, 1 - 2**19, 2**19 - 1).astype(np.int64)

    def pair(self, channel):
        """Pair of a channel and whether it is the second; None if it is not turned."""
        place = channel % (2 * self.w) - self.w
        place = place % self.head_dim if place >= 0 else self.head_dim
        return divmod(place, 2) if place < 2 * len(self.inv_freq) else None

    def place(self, channel, norm):
        """Role (0 keys, 1 values), layer, and channel of the row."""
        layer, at = divmod(channel, 2 * self.w)
        if at < self.w:
            return 1, layer, at
        head, at = divmod(at - self.w, self.head_dim)
        if at < 2 * len(self.inv_freq) and not norm:
            at = at // 2 + (at % 2) * len(self.inv_freq)
        return 0, layer, head * self.head_dim + at


def value(lane, tables, channel, mu, mean, f, l):  # noqa: E741
    """Pattern of one value, and the running mean behind it."""
    u, sigma = tables.unit_bits[channel], tables.sigmas[channel]
    g = max(log2(out(mu)) - f, l + u)
    half = (1 << g) // 2 if g > 0 else 0
    nu = mu + half if mu >= 0 else mu - half
    s = min(max((sigma * mean) >> 13, 16), 1 << 18)
    o = log2(s)
    quarter = 4 * o + sum(((s << 16) >> o) >= each for each in (77936, 92682, 110218))
    k = max(o - 3, log2(out(nu) + (4 << o)) - f, l + u, 0)
    row = 8 * min(max(quarter - 4 * k + 16, 0), 31) + shift(nu, 3 - k) % 8
    sums = tables.sums[row]
    symbol = int(np.searchsorted(sums, lane.low(16), side="right")) - 1
    lane.leave(int(sums[symbol]), int(sums[symbol + 1] - sums[symbol]), 16)
    most = min((mean >> 2) + 64, 1 << 16)
    if symbol == ESCAPE:
        return lane.raw(16), mean - (mean >> 5) + most
    low, bits = ((nu >> k) << k) + (FIRST[symbol] << k), k + WIDTH[symbol]
    x = low + lane.low(bits)
    z, sign = out(x), x < 0
    need(z < 1 << 28, "a value beyond the units")
    b = max(log2(z) - f, l + u)
    if b >= 0:
        z = (z >> b) << b
        x = -1 - z if sign else z
        pattern = ((b - u - l) << f) + (z >> b)
    cell = 1 << max(b, 0)
    left = x + 1 - cell if sign else x
    left, right = max(left, low), min(left + cell, low + (1 << bits))
    lane.leave(left - low, right - left, bits)
    if b < 0:
        pattern = ((b - u - l) << f) + (z << -b) + lane.raw(-b) if z else lane.raw(15)
    need(pattern < 1 << 15, "a pattern beyond 15 bits")
    error = min((abs(x - mu) * ((1 << 32) // sigma)) >> 24, most)
    return pattern + 32768 * sign, mean - (mean >> 5) + error


def regressor(pattern, h, f, l):  # noqa: E741
    e, n = pattern % 32768 >> f, pattern % (1 << f)
    if e == 32767 >> f:
        return 0
    n += (1 << f) if e else 0
    b = max(e - 1, 0) + l + h
    n = n << b if b >= 0 else (n + (1 << (-b - 1))) >> -b if b > -40 else 0
    n = min(n, 2**19 - 1)
    return -n if pattern >= 32768 else n


def rows(body, n_frames, element_type, tensors, tables):
    """Of each tensor, given as (role, layer), the u16 patterns ``[n_frames, w]``."""
    f, l = TYPES[element_type]  # noqa: E741
    c = Cursor(body)
    norm = c.u8()
    need(norm in (0, 1), "pairing")
    positions, tokens = c.ints(n_frames), c.ints(n_frames)
    n_lanes = c.uvarint()
    need(1 <= n_lanes <= 32, "number of lanes")
    lengths = [c.uvarint() for _ in range(n_lanes)]
    need(min(lengths) >= 2, "words of a lane")
    lanes = [Lane(struct.unpack(f"<{n}I", c.take(4 * n))) for n in lengths]
    need(c.at == len(c.data), "bytes are left over")
    dims = tables.vectors.shape[1]
    known = np.zeros((n_frames, 1 + dims + tables.c), np.int64)
    known[:, 0] = 8192
    known[:, 1 : 1 + dims] = [tables.token(i) for i in tokens]
    turns = [[angle(p, each) for each in tables.inv_freq] for p in positions]
    means = [6144] * n_frames
    patterns = np.zeros((n_frames, tables.c), np.uint16)

    def predict(channel, until):
        """P of each frame from the regressors before ``until``."""
        seen = tables.seen[channel]
        before = seen < 1 + dims + until
        sums = known[:, seen[before]] @ tables.rows[channel][before]
        by = 8 - tables.weight_bits[channel]
        return [limit(shift(int(each), by), 1 << 30) for each in sums]

    for channel in range(tables.c):
        pair = tables.pair(channel)
        if pair is None:
            predicted = predict(channel, channel)
        elif pair[1] == 0:
            both = predict(channel, channel), predict(channel + 1, channel)
            turn = [each[pair[0]] for each in turns]
            predicted = [
                (a * c - b * s) >> 15 for a, b, (c, s) in zip(*both, turn, strict=True)
            ]
        else:
            predicted = [
                (b * c + a * s) >> 15 for a, b, (c, s) in zip(*both, turn, strict=True)
            ]
        h = tables.scale_bits[channel]
        for t, p in enumerate(predicted):
            mu = limit(shift(p, tables.unit_bits[channel] - h - 8), (1 << 28) - 1)
            patterns[t, channel], means[t] = value(
                lanes[t % n_lanes], tables, channel, mu, means[t], f, l
            )
            known[t, 1 + dims + channel] = regressor(int(patterns[t, channel]), h, f, l)
        if pair is not None and pair[1]:
            place = 1 + dims + channel
            for t, (c, s) in enumerate(turn):
                a, b = (int(each) for each in known[t, place - 1 : place + 1])
                turned = (a * c + b * s + 2**14) >> 15, (b * c - a * s + 2**14) >> 15
                known[t, place - 1 : place + 1] = [limit(each, 2**19 - 1) for each in turned]
    for lane in lanes:
        need(lane.state == 1 << 31 and lane.at == len(lane.words), "end of a lane")
    found = {each: np.zeros((n_frames, tables.w), np.uint16) for each in tensors}
    for channel in range(tables.c):
        role, layer, at = tables.place(channel, norm)
        found[role, layer][:, at] = patterns[:, channel]
    return found
