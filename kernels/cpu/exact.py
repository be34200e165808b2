"""Numba twin of `tscfile_kernels.reference.exact`.

Frames are the inner loop: they do not depend on each other, so the processor overlaps them.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..exact import (
    ANGLE_BITS,
    BIN_FIRST,
    BIN_OF,
    BIN_WIDTH,
    ESCAPE,
    HALF_BINS,
    LEAST_SCALE,
    MAGNITUDE_BITS,
    MEMORY,
    MOST_SCALE,
    N_PLACES,
    N_RATIOS,
    N_RAW,
    PREDICTION_BITS,
    QUARTERS,
    RATIO_OFFSET,
    REGRESSOR_BITS,
    STATE_BITS,
    TABLE_BITS,
    UNIT_BITS,
    ExactGroup,
    Format,
)

_LENGTH = np.array([int(i).bit_length() for i in range(1 << 15)], np.int64)
_LEAST = np.uint64(1 << STATE_BITS)
_WORD = np.uint64(32)
_LOOK = 9
_Q1, _Q2, _Q3 = QUARTERS

Ints = NDArray[np.int64]


def exact_events(
    group: ExactGroup, base: Ints, angles: tuple[Ints, Ints], means: Ints,
    patterns: NDArray[np.uint16], form: Format, cumulative: NDArray[np.uint32],
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint8], Ints, NDArray[np.uint8], NDArray[np.uint8]]:  # fmt: skip  # noqa: E501
    shape = (*patterns.shape, 3)
    starts, sizes = np.zeros(shape, np.uint32), np.zeros(shape, np.uint32)
    bits = np.zeros(shape, np.uint8)
    regressors = np.zeros(patterns.shape, np.int64)
    tables, symbols = np.zeros(patterns.shape, np.uint8), np.zeros(patterns.shape, np.uint8)
    _events(
        *group, base, *angles, means, patterns, *form, cumulative, starts, sizes, bits, regressors,
        tables, symbols,
    )  # fmt: skip
    return starts, sizes, bits, regressors, tables, symbols


def exact_encode(
    starts: NDArray[np.uint32], sizes: NDArray[np.uint32], bits: NDArray[np.uint8], lanes: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    n_channels, n_frames, _ = bits.shape
    # No event takes a state down by more than its bits, and a lane has a state to write.
    room = 3 * n_channels * -(-n_frames // lanes) + 2
    streams, lengths = np.empty((lanes, room), np.uint32), np.empty(lanes, np.uint32)
    _encode(starts, sizes, bits, streams, lengths)
    words = [part[room - length :] for part, length in zip(streams, lengths.tolist(), strict=True)]
    return np.concatenate(words), lengths


def exact_lookup(cumulative: NDArray[np.uint32]) -> NDArray[np.uint8]:
    found = np.empty((len(cumulative), 1 << _LOOK), np.uint8)
    _look_up(cumulative, found)
    return found


def exact_decode(
    group: ExactGroup, base: Ints, angles: tuple[Ints, Ints], means: Ints, form: Format,
    cumulative: NDArray[np.uint32], lookup: NDArray[np.uint8], words: NDArray[np.uint32],
    states: NDArray[np.uint64], cursors: Ints, ends: Ints,
) -> tuple[NDArray[np.uint16], Ints, bool]:  # fmt: skip
    patterns, regressors = np.zeros(base.shape, np.uint16), np.zeros(base.shape, np.int64)
    genuine = _decode(
        *group, base, *angles, means, *form, cumulative, lookup, words, states, cursors, patterns,
        regressors,
    )  # fmt: skip
    return patterns, regressors, bool(genuine)


@njit(nogil=True, cache=True, inline="always")
def _log2(value):  # type: ignore[no-untyped-def]
    """Of 1 to 2^30 - 1, rounded down; -1 for 0."""
    high = value >> 15
    return _LENGTH[high] + 14 if high else _LENGTH[value] - 1


@njit(nogil=True, cache=True, inline="always")
def _shifted(value, left):  # type: ignore[no-untyped-def]
    return value << min(left, 30) if left >= 0 else value >> min(-left, 62)


@njit(nogil=True, cache=True, inline="always")
def _limited(value, limit):  # type: ignore[no-untyped-def]
    return min(max(value, -limit), limit)


@njit(nogil=True, cache=True)
def _predict(weights, weight_bits, scale_bits, unit_bits, pairs, base, cos, sin, regressors, j, first, second):  # type: ignore[no-untyped-def] # noqa: E501
    """Predictions of channel ``j``, and of ``j + 1`` if both are turned together."""
    n = base.shape[1]
    both = 2 if pairs[j] >= 0 else 1
    for member in range(both):
        out = first if member == 0 else second
        row = j + member
        out[:] = base[row]
        for i in range(j):
            weight = weights[row, i]
            if weight:
                for t in range(n):
                    out[t] += weight * regressors[i, t]
        by = PREDICTION_BITS - weight_bits[row]
        for t in range(n):
            out[t] = _limited(_shifted(out[t], by), np.int64(1 << 30))
    if both == 2:
        angle = pairs[j]
        for t in range(n):
            a, b = first[t], second[t]
            first[t] = (a * cos[angle, t] - b * sin[angle, t]) >> ANGLE_BITS
            second[t] = (b * cos[angle, t] + a * sin[angle, t]) >> ANGLE_BITS
    for member in range(both):
        out = first if member == 0 else second
        by = unit_bits[j + member] - scale_bits[j + member] - PREDICTION_BITS
        for t in range(n):
            out[t] = _limited(_shifted(out[t], by), np.int64((1 << UNIT_BITS) - 1))


@njit(nogil=True, cache=True, inline="always")
def _context(mu, mean, sigma, unit, fraction, least):  # type: ignore[no-untyped-def]
    """Where the bins of a value begin, binary logarithm of their width, and their table."""
    size = mu if mu >= 0 else ~mu
    log_cell = max(_log2(size) - fraction, least + unit)
    half = (np.int64(1) << log_cell) >> 1 if log_cell > 0 else np.int64(0)
    mu = mu + half if mu >= 0 else mu - half
    scale = min(max((sigma * mean) >> (MEMORY + 8), LEAST_SCALE), MOST_SCALE)
    octave = _log2(scale)
    mantissa = (scale << 16) >> octave
    quarter = 4 * octave + (mantissa >= _Q1) + (mantissa >= _Q2) + (mantissa >= _Q3)
    far = (mu if mu >= 0 else ~mu) + (np.int64(4) << octave)
    width = max(max(octave - 3, _log2(far) - fraction), max(least + unit, 0))
    place = _shifted(mu, 3 - width) & (N_PLACES - 1)
    ratio = min(max(quarter - 4 * width + RATIO_OFFSET, 0), N_RATIOS - 1)
    return (mu >> width) << width, width, ratio * N_PLACES + place


@njit(nogil=True, cache=True, inline="always")
def _reciprocal(sigma):  # type: ignore[no-untyped-def]
    return (np.int64(1) << 32) // sigma


@njit(nogil=True, cache=True, inline="always")
def _learn(mean, apart, reciprocal):  # type: ignore[no-untyped-def]
    """The running mean after an error of ``apart`` units (negative: none is known)."""
    most = min((mean >> (MEMORY - 3)) + 64, 1 << 16)
    error = most if apart < 0 else min((apart * reciprocal) >> 24, most)
    return mean - (mean >> MEMORY) + error


@njit(nogil=True, cache=True, inline="always")
def _regressor(pattern, scale, fraction, least):  # type: ignore[no-untyped-def]
    magnitude = np.int64(pattern) & 0x7FFF
    exponent = magnitude >> fraction
    if exponent == (0x7FFF >> fraction):
        return np.int64(0)
    number = magnitude & ((1 << fraction) - 1)
    if exponent:
        number |= 1 << fraction
        exponent -= 1
    by = exponent + least + scale
    if by >= 0:
        number <<= min(by, 30)
    elif by > -40:
        number = (number + (np.int64(1) << (-by - 1))) >> -by
    else:
        number = np.int64(0)
    number = min(number, (1 << REGRESSOR_BITS) - 1)
    return -number if pattern & 0x8000 else number


@njit(nogil=True, cache=True)
def _turn_back(regressors, j, cos, sin):  # type: ignore[no-untyped-def]
    half, most = 1 << (ANGLE_BITS - 1), np.int64((1 << REGRESSOR_BITS) - 1)
    for t in range(regressors.shape[1]):
        a, b = regressors[j, t], regressors[j + 1, t]
        regressors[j, t] = _limited((a * cos[t] + b * sin[t] + half) >> ANGLE_BITS, most)
        regressors[j + 1, t] = _limited((b * cos[t] - a * sin[t] + half) >> ANGLE_BITS, most)


@njit(nogil=True, cache=True)
def _events(weights, weight_bits, scale_bits, unit_bits, sigmas, pairs, base, cos, sin, means, patterns, fraction, least, cumulative, starts, sizes, bits, regressors, tables, symbols):  # type: ignore[no-untyped-def] # noqa: E501
    n = base.shape[1]
    mu = np.empty((2, n), np.int64)
    j = 0
    while j < base.shape[0]:
        _predict(
            weights, weight_bits, scale_bits, unit_bits, pairs, base, cos, sin, regressors, j,
            mu[0], mu[1],
        )  # fmt: skip
        both = 2 if pairs[j] >= 0 else 1
        for member in range(both):
            row = j + member
            unit, sigma, reciprocal = unit_bits[row], sigmas[row], _reciprocal(sigmas[row])
            for t in range(n):
                first, width, table = _context(
                    mu[member, t], means[t], sigma, unit, fraction, least
                )
                tables[row, t] = table
                pattern = np.int64(patterns[row, t])
                regressors[row, t] = _regressor(pattern, scale_bits[row], fraction, least)
                magnitude = pattern & 0x7FFF
                exponent = magnitude >> fraction
                number = magnitude & ((1 << fraction) - 1)
                if exponent:
                    number |= 1 << fraction
                by = max(exponent - 1, 0) + least + unit
                size = number >> min(-by, 62) if by < 0 else number << min(by, 40)
                at = size if pattern < 0x8000 else ~size
                narrow = ((at - first) >> width) + HALF_BINS
                symbol = ESCAPE
                if (
                    exponent != (0x7FFF >> fraction) and size < (1 << UNIT_BITS)
                    and 0 <= narrow < 2 * HALF_BINS
                ):  # fmt: skip
                    symbol = BIN_OF[narrow]
                symbols[row, t] = symbol
                starts[row, t, 0] = cumulative[table, symbol]
                sizes[row, t, 0] = cumulative[table, symbol + 1] - cumulative[table, symbol]
                bits[row, t, 0] = TABLE_BITS
                if symbol == ESCAPE:
                    starts[row, t, 2], sizes[row, t, 2] = pattern, 1
                    bits[row, t, 2] = N_RAW
                    means[t] = _learn(means[t], np.int64(-1), reciprocal)
                    continue
                low = first + (BIN_FIRST[symbol] << width)
                log_size = width + BIN_WIDTH[symbol]
                cell = np.int64(1) << max(by, 0)
                begin = at if at >= 0 else at + 1 - cell
                end = min(begin + cell, low + (np.int64(1) << log_size))
                begin = max(begin, low)
                starts[row, t, 1], sizes[row, t, 1] = begin - low, end - begin
                bits[row, t, 1] = log_size
                if by < 0:
                    starts[row, t, 2] = number & ((1 << -by) - 1) if size else magnitude
                    sizes[row, t, 2] = 1
                    bits[row, t, 2] = -by if size else MAGNITUDE_BITS
                means[t] = _learn(means[t], abs(at - mu[member, t]), reciprocal)
        if both == 2:
            _turn_back(regressors, j, cos[pairs[j]], sin[pairs[j]])
        j += both


@njit(nogil=True, cache=True)
def _encode(starts, sizes, bits, streams, lengths):  # type: ignore[no-untyped-def]
    lanes, room = streams.shape
    states = np.full(lanes, _LEAST, np.uint64)
    cursors = np.full(lanes, room, np.int64)
    n_channels, n_frames, _ = bits.shape
    for row in range(n_channels - 1, -1, -1):
        for t in range(n_frames - 1, -1, -1):
            lane = t % lanes
            state = states[lane]
            for event in range(2, -1, -1):
                width = np.uint64(bits[row, t, event])
                if width == 0:
                    continue
                size = np.uint64(sizes[row, t, event])
                # The largest state that still fits 63 bits after taking this event in.
                if state >= size << (np.uint64(63) - width):
                    cursors[lane] -= 1
                    streams[lane, cursors[lane]] = state & np.uint64(0xFFFFFFFF)
                    state >>= _WORD
                quotient = state // size
                state = (quotient << width) + (state - quotient * size)
                state += np.uint64(starts[row, t, event])
            states[lane] = state
    for lane in range(lanes):
        streams[lane, cursors[lane] - 1] = states[lane] & np.uint64(0xFFFFFFFF)
        streams[lane, cursors[lane] - 2] = states[lane] >> _WORD
        lengths[lane] = room - cursors[lane] + 2


@njit(nogil=True, cache=True)
def _look_up(cumulative, found):  # type: ignore[no-untyped-def]
    for table in range(len(cumulative)):
        symbol = 0
        for i in range(1 << _LOOK):
            while cumulative[table, symbol + 1] <= i << (TABLE_BITS - _LOOK):
                symbol += 1
            found[table, i] = symbol


@njit(nogil=True, cache=True, inline="always")
def _refill(state, lane, words, cursors):  # type: ignore[no-untyped-def]
    # No branch, as it would be taken at random. Behind its end a lane reads rubbish, and its cursor
    # is then not where a genuine one ends.
    cursor = cursors[lane]
    more = (state << _WORD) | np.uint64(words[min(cursor, len(words) - 1)])
    short = state < _LEAST
    cursors[lane] = cursor + short
    return more if short else state


@njit(nogil=True, cache=True)
def _decode(weights, weight_bits, scale_bits, unit_bits, sigmas, pairs, base, cos, sin, means, fraction, least, cumulative, lookup, words, states, cursors, patterns, regressors):  # type: ignore[no-untyped-def] # noqa: E501
    n = base.shape[1]
    lanes = len(states)
    mu, where = np.empty((2, n), np.int64), np.empty((3, n), np.int64)
    genuine = True
    j = 0
    while j < base.shape[0]:
        _predict(
            weights, weight_bits, scale_bits, unit_bits, pairs, base, cos, sin, regressors, j,
            mu[0], mu[1],
        )  # fmt: skip
        both = 2 if pairs[j] >= 0 else 1
        for member in range(both):
            row = j + member
            unit, sigma, reciprocal = unit_bits[row], sigmas[row], _reciprocal(sigmas[row])
            # In a loop of its own, as nothing in it waits for the coder.
            for t in range(n):
                where[0, t], where[1, t], where[2, t] = _context(
                    mu[member, t], means[t], sigma, unit, fraction, least
                )
            lane = 0
            for t in range(n):
                first, width, table = where[0, t], where[1, t], where[2, t]
                state = states[lane]
                slot = state & np.uint64((1 << TABLE_BITS) - 1)
                symbol = np.int64(lookup[table, slot >> np.uint64(TABLE_BITS - _LOOK)])
                while cumulative[table, symbol + 1] <= slot:
                    symbol += 1
                begin = np.uint64(cumulative[table, symbol])
                size = np.uint64(cumulative[table, symbol + 1]) - begin
                state = size * (state >> np.uint64(TABLE_BITS)) + slot - begin
                state = _refill(state, lane, words, cursors)
                raw = N_RAW
                apart = np.int64(-1)
                pattern = np.int64(0)
                if symbol != ESCAPE:
                    low = first + (BIN_FIRST[symbol] << width)
                    log_size = width + BIN_WIDTH[symbol]
                    slot = state & ((np.uint64(1) << np.uint64(log_size)) - np.uint64(1))
                    at = low + np.int64(slot)
                    number = at if at >= 0 else ~at
                    if number >= 1 << UNIT_BITS:
                        genuine = False
                        number = np.int64(0)
                        at = np.int64(0)
                    by = max(_log2(number) - fraction, least + unit)
                    cell = np.int64(1)
                    if by >= 0:
                        number >>= by
                        cell <<= by
                        at = number << by if at >= 0 else ~(number << by)
                        pattern = ((by - unit - least) << fraction) + number
                        raw = 0
                    elif number:
                        pattern = ((by - unit - least) << fraction) + (number << -by)
                        raw = -by
                    else:
                        raw = MAGNITUDE_BITS
                    left = at if at >= 0 else at + 1 - cell
                    right = min(left + cell, low + (np.int64(1) << log_size))
                    left = max(left, low)
                    # Whatever was taken for a value out of range need not lie in its bin.
                    size = np.uint64(max(right - left, 1))
                    state = size * (state >> np.uint64(log_size)) + slot
                    state -= np.uint64(left - low) if left - low <= np.int64(slot) else slot
                    state = _refill(state, lane, words, cursors)
                    apart = abs(at - mu[member, t])
                if raw:
                    mask = (np.uint64(1) << np.uint64(raw)) - np.uint64(1)
                    pattern += np.int64(state & mask)
                    state = _refill(state >> np.uint64(raw), lane, words, cursors)
                if symbol != ESCAPE:
                    if pattern > 0x7FFF:
                        genuine = False
                        pattern = np.int64(0)
                    if at < 0:
                        pattern |= 0x8000
                states[lane] = state
                patterns[row, t] = pattern
                where[0, t] = apart
                lane = lane + 1 if lane + 1 < lanes else 0
            for t in range(n):
                regressors[row, t] = _regressor(
                    patterns[row, t], scale_bits[row], fraction, least
                )
                means[t] = _learn(means[t], where[0, t], reciprocal)
        if both == 2:
            _turn_back(regressors, j, cos[pairs[j]], sin[pairs[j]])
        j += both
    return genuine
