"""Token ids, as codecs/token-ids.md says; to be merged into reference_decoder.py."""

from __future__ import annotations

import numpy as np


class Damaged(Exception):
    """The file breaks a rule of the specification."""


def need(condition, message):
    if not condition:
        raise Damaged(message)


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
        if arrays is None:
            return
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


class TokenModel:
    def __init__(self, tables, data, n):
        self.tables, self.data = tables, data
        self.mixing, self.match = tables.mixing.copy(), list(tables.match)
        self.sums = np.cumsum([0, *tables.weights, 1]).tolist()
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

    def node(self, lo, hi):
        both = self.sums[lo] + self.sums[hi]
        return min(range(lo + 1, hi), key=lambda m: (abs(2 * self.sums[m] - both), m))

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
            m = self.node(lo, hi)
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


def token_model(data, n, arrays, context):
    """The model behind the context; ids of the leaves beside it."""
    if arrays is None:
        need(len(data) and data[0] <= 20, "size of token ids")
        tables, data = TokenTables(bits=data[0]), data[1:]
    else:
        tables = TokenTables(arrays)
    leaf_of = {id_: leaf for leaf, id_ in enumerate(tables.ids)}
    model = TokenModel(tables, bytes(data), len(context) + n)
    for id_ in context:
        model.token(leaf_of.get(id_, len(tables.ids)))
    return model


def decode_token_ids(data, n, arrays=None, context=()):
    """int32 [n]; arrays of the book by name, or None without tables."""
    context = list(context)[-(1 << 16) :]
    need(n or not data, "bytes for no tokens")
    if not n:
        return np.zeros(0, np.int32)
    model, found = token_model(data, n, arrays, context), []
    for _ in range(n):
        leaf = model.token()
        if leaf < len(model.tables.ids):
            found.append(model.tables.ids[leaf])
        else:
            bits = "".join(str(model.decide(1 << 15)) for _ in range(32))
            found.append(int(bits, 2) - (1 << 32 if bits[0] == "1" else 0))
            need(not 0 <= found[-1] < len(model.tables.ids), "escape of an id that has a leaf")
    model.end()
    if arrays is None:
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
