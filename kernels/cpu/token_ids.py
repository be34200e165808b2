"""Numba twin of `tscfile_kernels.reference.token_ids`.

One loop serves encoding, decoding and the context: they differ in where a decision comes from and
whether it is coded. A token takes ten to fifteen decisions of about 80 ns.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..logistic import BUCKET, LOG2, LONGEST_ODDS, MOST_BUCKETS, PROBABILITY
from ..ops import TokenTables

_LOG2_END = len(LOG2)
_LAST_BUCKET = len(BUCKET) - 1
_MASK = 0xFFFFFFFF
_HASH = np.uint64(0x9E3779B97F4A7C15)
_PAIR = np.uint64(1 << 63)
_MATCH_BITS = 16

# Parts of the coder's state.
_LOW, _HIGH, _CODE, _AT = range(4)


def token_tree(weights: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    cumulative = np.zeros(len(weights) + 1, np.int64)
    np.cumsum(weights, out=cumulative[1:])
    children = np.zeros((len(weights), 2), np.int32)
    _build_tree(cumulative, children)
    return cumulative, children


def encode_tokens(
    tables: TokenTables,
    weights: NDArray[np.int32],
    match: NDArray[np.int32],
    ids: NDArray[np.int32],
    leaves: NDArray[np.int32],
    n_context: int,
) -> NDArray[np.uint8]:
    # Bytes beyond the buffer are counted and not written; with room for them it is done again.
    room = 64 + 4 * (len(leaves) - n_context)
    # Copies are writable, whatever the arrays are: one compiled function serves both directions.
    ids, leaves = ids.copy(), leaves.copy()
    while True:
        data = np.zeros(room, np.uint8)
        learnt = weights.copy(), match.copy()
        room, _ = _run(tables, *learnt, ids, leaves, n_context, data, False)
        if room <= len(data):
            weights[:], match[:] = learnt
            return data[:room]


def decode_tokens(
    tables: TokenTables,
    weights: NDArray[np.int32],
    match: NDArray[np.int32],
    data: NDArray[np.uint8],
    ids: NDArray[np.int32],
    leaves: NDArray[np.int32],
    n_context: int,
) -> bool:
    end, genuine = _run(tables, weights, match, ids, leaves, n_context, data.copy(), True)
    return bool(genuine) and end == len(data)


@njit(nogil=True, cache=True)
def _build_tree(cumulative, children):  # type: ignore[no-untyped-def]
    # Every second step at least halves the weight, so far fewer than 256 nodes are waiting.
    starts, stops = np.empty(256, np.int64), np.empty(256, np.int64)
    parents, sides = np.empty(256, np.int64), np.empty(256, np.int64)
    starts[0], stops[0], parents[0], sides[0] = 0, len(children), 0, 1
    n_waiting = 1
    while n_waiting:
        n_waiting -= 1
        start, stop = starts[n_waiting], stops[n_waiting]
        node = _split(cumulative, start, stop)
        children[parents[n_waiting], sides[n_waiting]] = node
        for side in range(2):
            first, last = (node, stop) if side else (start, node)
            if last - first > 1:
                starts[n_waiting], stops[n_waiting] = first, last
                parents[n_waiting], sides[n_waiting] = node, side
                n_waiting += 1


@njit(nogil=True, cache=True)
def _split(cumulative, start, stop):  # type: ignore[no-untyped-def]
    both = cumulative[start] + cumulative[stop]
    low, high = start + 1, stop - 1
    while low < high:
        middle = (low + high) >> 1
        if 2 * cumulative[middle] < both:
            low = middle + 1
        else:
            high = middle
    if low > start + 1 and both - 2 * cumulative[low - 1] <= 2 * cumulative[low] - both:
        low -= 1
    return low


@njit(nogil=True, cache=True)
def _log2(value):  # type: ignore[no-untyped-def]
    units = 0
    while value >= _LOG2_END:
        value >>= 1
        units += 256
    return units + LOG2[value]


@njit(nogil=True, cache=True)
def _odds(zeros, ones):  # type: ignore[no-untyped-def]
    odds = _log2(16 * ones + 2) - _log2(16 * zeros + 2)
    return min(max(odds, -LONGEST_ODDS), LONGEST_ODDS)


@njit(nogil=True, cache=True)
def _bucket(zeros, ones):  # type: ignore[no-untyped-def]
    bucket = BUCKET[min(zeros + ones, _LAST_BUCKET)]
    return bucket + MOST_BUCKETS if zeros and ones else bucket


@njit(nogil=True, cache=True)
def _count(pair, bit):  # type: ignore[no-untyped-def]
    if pair[bit] < 255:
        pair[bit] += np.uint8(1)
    if pair[1 - bit] > 2:
        pair[1 - bit] = (pair[1 - bit] >> 1) + 1


@njit(nogil=True, cache=True)
def _find(leaves, start, stop, leaf):  # type: ignore[no-untyped-def]
    while start < stop:
        middle = (start + stop) >> 1
        if leaves[middle] < leaf:
            start = middle + 1
        else:
            stop = middle
    return start


@njit(nogil=True, cache=True)
def _code_bit(coder, data, decoding, probability, bit):  # type: ignore[no-untyped-def]
    span = coder[_HIGH] - coder[_LOW]
    middle = coder[_LOW] + (span >> 16) * probability + ((span & 0xFFFF) * probability >> 16)
    if decoding:
        bit = 1 if coder[_CODE] <= middle else 0
    if bit:
        coder[_HIGH] = middle
    else:
        coder[_LOW] = middle + 1
    while (coder[_LOW] ^ coder[_HIGH]) >> 24 == 0:
        at = coder[_AT]
        if decoding:
            following = np.int64(data[at + 4]) if at + 4 < len(data) else 0
            coder[_CODE] = coder[_CODE] << 8 & _MASK | following
        elif at < len(data):
            data[at] = coder[_HIGH] >> 24
        coder[_AT] = at + 1
        coder[_LOW] = coder[_LOW] << 8 & _MASK
        coder[_HIGH] = coder[_HIGH] << 8 & _MASK | 0xFF
    return bit


@njit(nogil=True, cache=True)
def _finish(coder, data, decoding):  # type: ignore[no-untyped-def]
    # The fewest bytes that, zeros following, lie between low and high.
    n_bytes, last = 0, np.int64(0)
    while True:
        rest = np.int64(_MASK) >> (8 * n_bytes)
        last = (coder[_LOW] + rest) & ~rest
        if last <= coder[_HIGH]:
            break
        n_bytes += 1
    if not decoding:
        for i in range(n_bytes):
            if coder[_AT] + i < len(data):
                data[coder[_AT] + i] = last >> (24 - 8 * i) & 0xFF
    return coder[_AT] + n_bytes, not decoding or coder[_CODE] == last


@njit(nogil=True, cache=True)
def _run(tables, weights, match, ids, leaves, n_context, data, decoding):  # type: ignore[no-untyped-def]
    cumulative, children = tables.cumulative, tables.children
    n_leaves, n_tokens = len(children), len(leaves)
    escape = n_leaves - 1
    slot_bits = 12
    while slot_bits < 22 and 1 << slot_bits < 256 * n_tokens:
        slot_bits += 1
    slot_shift = np.uint64(64 - slot_bits)
    single_counts = np.zeros((n_leaves, 2), np.uint8)
    slot_counts = np.zeros((1 << slot_bits, 2), np.uint8)
    last_seen = np.zeros(1 << _MATCH_BITS, np.int32)
    coder = np.array([0, _MASK, 0, 0], np.int64)
    if decoding:
        for i in range(4):
            coder[_CODE] = coder[_CODE] << 8 | (np.int64(data[i]) if i < len(data) else 0)
    inputs, buckets = np.zeros(7, np.int64), np.zeros(7, np.int64)
    start1 = stop1 = start2 = stop2 = 0
    match_at, match_length = 0, 0
    before1 = before2 = np.uint64(0)
    for t in range(n_tokens):
        coded = t >= n_context
        given = not (coded and decoding)
        leaf = np.int64(leaves[t]) if given else 0
        predicted = np.int64(leaves[match_at]) if match_length else -1
        length = min(match_length, 15)
        first, last, node = 0, n_leaves, np.int64(children[0, 1])
        single_key = before1 << np.uint64(21)
        pair_key = _PAIR | before2 << np.uint64(42) | before1 << np.uint64(21)
        while True:
            # What each part of the model says of this decision.
            ones, zeros = cumulative[last] - cumulative[node], cumulative[node] - cumulative[first]
            odds = _log2(ones) - _log2(zeros)
            inputs[0] = min(max(odds, -LONGEST_ODDS), LONGEST_ODDS)
            inputs[1] = inputs[2] = 0
            buckets[1] = buckets[2] = 0
            table_order = session_order = 0
            cut1, cut2 = start1, start2
            if start1 < stop1:
                cut1 = _find(tables.next1, start1, stop1, node)
                zeros = tables.total1[cut1] - tables.total1[start1]
                ones = tables.total1[stop1] - tables.total1[cut1]
                inputs[1], buckets[1] = _odds(zeros, ones), _bucket(zeros, ones)
                table_order = 1
            if start2 < stop2:
                cut2 = _find(tables.next2, start2, stop2, node)
                zeros = tables.total2[cut2] - tables.total2[start2]
                ones = tables.total2[stop2] - tables.total2[cut2]
                inputs[2], buckets[2] = _odds(zeros, ones), _bucket(zeros, ones)
                table_order = 2
            zeros, ones = np.int64(single_counts[node, 0]), np.int64(single_counts[node, 1])
            inputs[3], buckets[3] = _odds(zeros, ones), _bucket(zeros, ones)
            slot1 = (single_key | np.uint64(node)) * _HASH >> slot_shift
            zeros, ones = np.int64(slot_counts[slot1, 0]), np.int64(slot_counts[slot1, 1])
            inputs[4], buckets[4] = _odds(zeros, ones), _bucket(zeros, ones)
            if zeros + ones:
                session_order = 1
            slot2 = (pair_key | np.uint64(node)) * _HASH >> slot_shift
            zeros, ones = np.int64(slot_counts[slot2, 0]), np.int64(slot_counts[slot2, 1])
            inputs[5], buckets[5] = _odds(zeros, ones), _bucket(zeros, ones)
            if zeros + ones:
                session_order = 2
            matching = first <= predicted < last
            expected = 1 if predicted >= node else 0
            inputs[6], buckets[6] = 0, 0
            if matching:
                odds = _log2(np.int64(match[length])) - _log2((1 << 16) - np.int64(match[length]))
                inputs[6] = odds if expected else -odds
                buckets[6] = length
            # Mix, decide, learn.
            chosen = weights[(table_order * 3 + session_order) * 2 + (1 if matching else 0)]
            odds = 0
            for i in range(7):
                odds += np.int64(chosen[i, buckets[i]]) * inputs[i]
            odds = min(max(odds >> 16, -LONGEST_ODDS), LONGEST_ODDS)
            probability = PROBABILITY[odds + LONGEST_ODDS]
            bit = 1 if leaf >= node else 0
            if coded:
                bit = _code_bit(coder, data, decoding, probability, bit)
            error = (bit << 16) - probability
            for i in range(7):
                change = (inputs[i] * error + (1 << 18)) >> 19
                weight = np.int64(chosen[i, buckets[i]]) + change
                chosen[i, buckets[i]] = min(max(weight, -(1 << 20)), 1 << 20)
            if matching:
                if bit == expected:
                    match[length] += (65535 - match[length]) >> 6
                else:
                    match[length] = max(match[length] - (match[length] >> 6), 64)
            _count(single_counts[node], bit)
            _count(slot_counts[slot1], bit)
            _count(slot_counts[slot2], bit)
            # To the side that was taken.
            if bit:
                first = node
                start1, start2 = cut1, cut2
            else:
                last = node
                stop1, stop2 = cut1, cut2
            if last - first == 1:
                break
            node = np.int64(children[node, bit])
        leaf = np.int64(first)
        if coded:
            if decoding:
                leaves[t] = leaf
            if leaf == escape:
                value = np.int64(ids[t]) & _MASK
                for i in range(31, -1, -1):
                    bit = _code_bit(coder, data, decoding, 1 << 15, value >> i & 1)
                    if decoding:
                        value = value & ~(1 << i) | bit << i
                if decoding:
                    ids[t] = value - (1 << 32) if value >> 31 else value
        # Contexts of the next token.
        if start1 < stop1:
            start2, stop2 = tables.first2[start1], tables.first2[start1 + 1]
        else:
            start2 = stop2 = 0
        start1 = stop1 = 0
        if leaf < escape:
            start1, stop1 = tables.first1[leaf], tables.first1[leaf + 1]
        if match_length and predicted == leaf:
            match_at, match_length = match_at + 1, match_length + 1
        else:
            match_length = 0
        before2, before1 = before1, np.uint64(leaf + 1)
        if t:
            key = before2 << np.uint64(21) | before1
            slot = key * _HASH >> np.uint64(64 - _MATCH_BITS)
            if not match_length and last_seen[slot]:
                match_at = np.int64(last_seen[slot])
                while (
                    match_length < min(16, match_at)
                    and leaves[match_at - 1 - match_length] == leaves[t - match_length]
                ):
                    match_length += 1
            last_seen[slot] = t + 1
    return _finish(coder, data, decoding)
