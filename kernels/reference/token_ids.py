"""Reference of the token-id operations of `tscfile_kernels.ops`: one decision at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..logistic import BUCKET, LONGEST_ODDS, MOST_BUCKETS, PROBABILITY, log2
from ..ops import MATCH_LENGTHS, TokenTables

Decide = Callable[[int, int], int]
"""``(probability of 1, the bit if it is known) -> bit``: codes a decision."""

_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


def token_tree(weights: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    sums = [0, *itertools.accumulate(weights.tolist())]
    children = np.zeros((len(weights), 2), np.int32)

    def split(start: int, stop: int) -> int:
        """The leaf that starts the upper half; the lower of two that are as good."""
        if stop - start == 1:
            return 0
        both = sums[start] + sums[stop]
        node = min(range(start + 1, stop), key=lambda leaf: abs(2 * sums[leaf] - both))
        children[node] = split(start, node), split(node, stop)
        return node

    children[0, 1] = split(0, len(weights))
    return np.array(sums, np.int64), children


def encode_tokens(
    tables: TokenTables,
    weights: NDArray[np.int32],
    match: NDArray[np.int32],
    ids: NDArray[np.int32],
    leaves: NDArray[np.int32],
    n_context: int,
) -> NDArray[np.uint8]:
    coder = _Coder()
    model = _Model(tables, weights, match, len(leaves))
    for t in range(len(leaves)):
        decide = coder.encode if t >= n_context else _known
        if model.walk(int(leaves[t]), decide) == len(tables.children) - 1 and t >= n_context:
            for i in reversed(range(32)):
                coder.encode(1 << 15, int(ids[t]) >> i & 1)
    return np.frombuffer(bytes(coder.done) + coder.ending(), np.uint8)


def decode_tokens(
    tables: TokenTables,
    weights: NDArray[np.int32],
    match: NDArray[np.int32],
    data: NDArray[np.uint8],
    ids: NDArray[np.int32],
    leaves: NDArray[np.int32],
    n_context: int,
) -> bool:
    coder = _Coder(data.tobytes())
    model = _Model(tables, weights, match, len(leaves))
    for t in range(len(leaves)):
        if t < n_context:
            model.walk(int(leaves[t]), _known)
            continue
        leaves[t] = model.walk(0, coder.decode)
        if leaves[t] == len(tables.children) - 1:
            bits = [coder.decode(1 << 15, 0) for _ in range(32)]
            ids[t] = np.uint32(int("".join(map(str, bits)), 2)).astype(np.int32)
    return bytes(coder.done) + coder.ending() == coder.data


def _known(_probability: int, bit: int) -> int:
    return bit


class _Coder:
    """Binary arithmetic coder over the interval ``low`` to ``high``, both inside.

    ``done``: the bytes of all numbers left in the interval are alike up to here.
    """

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.done = bytearray()
        self.low, self.high = 0, _MASK32

    def encode(self, probability: int, bit: int) -> int:
        middle = self._middle(probability)
        self.low, self.high = (self.low, middle) if bit else (middle + 1, self.high)
        while self.low >> 24 == self.high >> 24:
            self.done.append(self.low >> 24)
            self.low, self.high = self.low << 8 & _MASK32, self.high << 8 & _MASK32 | 0xFF
        return bit

    def decode(self, probability: int, _bit: int) -> int:
        """Zeros follow the data."""
        window = self.data[len(self.done) : len(self.done) + 4].ljust(4, b"\0")
        return self.encode(probability, int(int.from_bytes(window) <= self._middle(probability)))

    def ending(self) -> bytes:
        """The fewest bytes that, with zeros behind them, name a number in the interval."""
        for n_bytes in range(5):
            unit = 1 << 8 * (4 - n_bytes)
            number = -(-self.low // unit) * unit
            if number <= self.high:
                break
        return number.to_bytes(4)[:n_bytes]

    def _middle(self, probability: int) -> int:
        span = self.high - self.low
        return self.low + (span >> 16) * probability + ((span & 0xFFFF) * probability >> 16)


class _Counts:
    """Decisions seen: zeros and ones of each key, the recent ones counting most."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[int, int]] = {}

    def __getitem__(self, key: int) -> tuple[int, int]:
        return self._pairs.get(key, (0, 0))

    def add(self, key: int, bit: int) -> None:
        same, other = self[key][bit], self[key][1 - bit]
        same, other = min(same + 1, 255), other // 2 + 1 if other > 2 else other
        self._pairs[key] = (other, same) if bit else (same, other)


class _Model:
    """Walks tokens down the tree and learns from each."""

    def __init__(
        self, tables: TokenTables, weights: NDArray[np.int32], match: NDArray[np.int32], n: int
    ) -> None:
        self._tables, self._weights, self._match = tables, weights, match
        self._slot_bits = min(max(12, (256 * n - 1).bit_length()), 22)
        self._single, self._slots = _Counts(), _Counts()
        self._history: list[int] = []
        self._last_seen: dict[int, int] = {}
        self._match_at = self._match_length = 0
        # The pair of `TokenTables.next1` that ends the history.
        self._pair: int | None = None

    def walk(self, leaf: int, decide: Decide) -> int:
        """Decide for each node on the way whether ``leaf`` is above; returns where it ends."""
        tables = self._tables
        table1, table2 = self._followers()
        first, last, node = 0, len(tables.children), int(tables.children[0, 1])
        while True:
            bit = self._step(first, last, node, table1, table2, leaf >= node, decide)
            first, last = (node, last) if bit else (first, node)
            if last - first == 1:
                break
            node = int(tables.children[node, bit])
        pairs = table1[0].tolist()
        self._pair = None
        if first in pairs:
            self._pair = int(tables.first1[self._history[-1]]) + pairs.index(first)
        self._look_for_match(first)
        return first

    def _followers(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Leaves and counts that the tables have behind the last one and the last two tokens."""
        tables, found = self._tables, []
        one = self._history[-1] if self._history else None
        if one == len(tables.children) - 1:
            one = None
        for entry, firsts, leaves, totals in (
            (one, tables.first1, tables.next1, tables.total1),
            (self._pair, tables.first2, tables.next2, tables.total2),
        ):
            part = slice(0, 0) if entry is None else slice(firsts[entry], firsts[entry + 1])
            found.append((leaves[part].astype(np.int64), np.diff(totals)[part]))
        return found

    def _step(
        self,
        first: int,
        last: int,
        node: int,
        table1: tuple[NDArray[np.int64], NDArray[np.int64]],
        table2: tuple[NDArray[np.int64], NDArray[np.int64]],
        known: bool,
        decide: Decide,
    ) -> int:
        sums = self._tables.cumulative.tolist()
        before2, before1 = [leaf + 1 for leaf in [-1, -1, *self._history][-2:]]
        slots = [
            _slot(before1 << 21 | node, self._slot_bits),
            _slot(1 << 63 | before2 << 42 | before1 << 21 | node, self._slot_bits),
        ]
        tables = [_counted(*table, first, node, last) for table in (table1, table2)]
        session = [self._slots[slot] for slot in slots]
        odds = _log_odds(sums[node] - sums[first], sums[last] - sums[node])
        inputs = [(odds, 0)]
        inputs += [_opinion(*pair) for pair in (*tables, self._single[node], *session)]
        length = min(self._match_length, MATCH_LENGTHS - 1)
        predicted = self._history[self._match_at] if self._match_length else -1
        matching, expected = first <= predicted < last, predicted >= node
        if matching:
            odds = _log_odds(65536 - int(self._match[length]), int(self._match[length]))
            inputs.append((odds if expected else -odds, length))
        else:
            inputs.append((0, 0))
        table_order = max([k for k, pair in enumerate(tables, 1) if any(pair)], default=0)
        session_order = max([k for k, pair in enumerate(session, 1) if any(pair)], default=0)
        chosen = self._weights[6 * table_order + 2 * session_order + matching]
        mixed = sum(int(chosen[i, bucket]) * odds for i, (odds, bucket) in enumerate(inputs)) >> 16
        probability = int(PROBABILITY[_clip(mixed, LONGEST_ODDS) + LONGEST_ODDS])
        bit = decide(probability, int(known))
        for i, (odds, bucket) in enumerate(inputs):
            change = (odds * (65536 * bit - probability) + (1 << 18)) >> 19
            chosen[i, bucket] = _clip(int(chosen[i, bucket]) + change, 1 << 20)
        if matching and bit == expected:
            self._match[length] += (65535 - self._match[length]) >> 6
        elif matching:
            self._match[length] = max(self._match[length] - (self._match[length] >> 6), 64)
        self._single.add(node, bit)
        for slot in slots:
            self._slots.add(slot, bit)
        return bit

    def _look_for_match(self, leaf: int) -> None:
        history = self._history
        if self._match_length and history[self._match_at] == leaf:
            self._match_at += 1
            self._match_length += 1
        else:
            self._match_length = 0
        history.append(leaf)
        if len(history) < 2:
            return
        slot = _slot(history[-2] + 1 << 21 | history[-1] + 1, 16)
        if not self._match_length and slot in self._last_seen:
            self._match_at = self._last_seen[slot]
            self._match_length = _common_ending(history[: self._match_at], history)
        self._last_seen[slot] = len(history)


def _slot(key: int, bits: int) -> int:
    return (key * 0x9E3779B97F4A7C15 & _MASK64) >> (64 - bits)


def _counted(
    leaves: NDArray[np.int64], counts: NDArray[np.int64], first: int, node: int, last: int
) -> tuple[int, int]:
    """Counts of the followers below and above ``node``, within ``first`` to ``last``."""
    below = int(counts[(leaves >= first) & (leaves < node)].sum())
    above = int(counts[(leaves >= node) & (leaves < last)].sum())
    return below, above


def _opinion(zeros: int, ones: int) -> tuple[int, int]:
    """Log-odds and bucket of counts."""
    bucket = int(BUCKET[min(zeros + ones, len(BUCKET) - 1)])
    bucket += MOST_BUCKETS if zeros and ones else 0
    return _log_odds(16 * zeros + 2, 16 * ones + 2), bucket


def _log_odds(zeros: int, ones: int) -> int:
    below, above = log2(np.array([zeros, ones], np.int64)).tolist()
    return _clip(above - below, LONGEST_ODDS)


def _clip(value: int, limit: int) -> int:
    return min(max(value, -limit), limit)


def _common_ending(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common suffix, at most 16."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1],
                                              itertools.islice(pairs, 16)))
