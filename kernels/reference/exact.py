"""Reference of the exact operations of `tscfile_kernels.ops`: one value at a time.

``spec/codecs/book-exact.md`` gives every step. Python's shifts of negative numbers round down.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
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
    for t in range(patterns.shape[1]):
        mean = int(means[t])
        for row, mu in _predictions(group, base[:, t], angles, t, regressors[:, t]):
            pattern, unit = int(patterns[row, t]), int(group.unit_bits[row])
            first, width, table = _context(mu, mean, int(group.sigmas[row]), unit, form)
            events, symbol, at = _code(pattern, unit, first, width, form, cumulative[table])
            for i, event in enumerate(events):
                starts[row, t, i], sizes[row, t, i], bits[row, t, i] = event
            tables[row, t], symbols[row, t] = table, symbol
            apart = None if symbol == ESCAPE else abs(at - mu)
            mean = _learn(mean, apart, int(group.sigmas[row]))
            regressors[row, t] = _regressor(pattern, int(group.scale_bits[row]), form)
        means[t] = mean
    return starts, sizes, bits, regressors, tables, symbols


def exact_encode(
    starts: NDArray[np.uint32], sizes: NDArray[np.uint32], bits: NDArray[np.uint8], lanes: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    streams: list[list[int]] = []
    for lane in range(lanes):
        state, words = 1 << STATE_BITS, []
        for row in reversed(range(bits.shape[0])):
            for t in reversed(range(lane, bits.shape[1], lanes)):
                for event in reversed(range(3)):
                    width, size = int(bits[row, t, event]), int(sizes[row, t, event])
                    if not width:
                        continue
                    if state >= size << (STATE_BITS + 32 - width):
                        words.append(state & 0xFFFFFFFF)
                        state >>= 32
                    quotient, rest = divmod(state, size)
                    state = (quotient << width) + rest + int(starts[row, t, event])
        words += [state & 0xFFFFFFFF, state >> 32]
        streams.append(words[::-1])
    lengths = np.array([len(words) for words in streams], np.uint32)
    return np.array([word for words in streams for word in words], np.uint32), lengths


def exact_lookup(cumulative: NDArray[np.uint32]) -> NDArray[np.uint8]:
    return np.zeros((len(cumulative), 0), np.uint8)


def exact_decode(
    group: ExactGroup, base: Ints, angles: tuple[Ints, Ints], means: Ints, form: Format,
    cumulative: NDArray[np.uint32], lookup: NDArray[np.uint8], words: NDArray[np.uint32],
    states: NDArray[np.uint64], cursors: Ints, ends: Ints,
) -> tuple[NDArray[np.uint16], Ints, bool]:  # fmt: skip
    patterns, regressors = np.zeros(base.shape, np.uint16), np.zeros(base.shape, np.int64)
    genuine = True
    lanes = [_Lane(*parts, words) for parts in zip(states, cursors, ends, strict=True)]
    # Frames of a lane follow one another in each channel, so channels are the outer loop.
    frames = [
        _predictions(group, base[:, t], angles, t, regressors[:, t]) for t in range(base.shape[1])
    ]
    for row in range(base.shape[0]):
        unit, sigma = int(group.unit_bits[row]), int(group.sigmas[row])
        for t, frame in enumerate(frames):
            _, mu = next(frame)
            first, width, table = _context(mu, int(means[t]), sigma, unit, form)
            lane = lanes[t % len(lanes)]
            pattern, at = _uncode(lane, unit, first, width, form, cumulative[table])
            if pattern is None:
                genuine, pattern = False, 0
            patterns[row, t] = pattern
            means[t] = _learn(int(means[t]), None if at is None else abs(at - mu), sigma)
            regressors[row, t] = _regressor(pattern, int(group.scale_bits[row]), form)
    for frame in frames:
        # The last pair is turned back when the frame is asked for more.
        assert next(frame, None) is None
    for i, lane in enumerate(lanes):
        states[i], cursors[i] = lane.state, lane.cursor
    return patterns, regressors, genuine


class _Lane:
    """A state of the coder and the words that it goes on with."""

    def __init__(self, state: int, cursor: int, end: int, words: NDArray[np.uint32]) -> None:
        self.state, self.cursor, self._end, self._words = int(state), int(cursor), end, words

    def slot(self, bits: int) -> int:
        return self.state & ((1 << bits) - 1)

    def take(self, start: int, size: int, bits: int) -> None:
        self.state = size * (self.state >> bits) + self.slot(bits) - start
        if self.state < 1 << STATE_BITS:
            more = int(self._words[self.cursor]) if self.cursor < self._end else 0
            self.state = self.state << 32 | more
            self.cursor += 1

    def raw(self, bits: int) -> int:
        value = self.slot(bits)
        self.take(value, 1, bits)
        return value


def _shifted(value: int, left: int) -> int:
    return value << min(left, 30) if left >= 0 else value >> min(-left, 62)


def _limited(value: int, limit: int) -> int:
    return min(max(value, -limit), limit)


def _predictions(
    group: ExactGroup, base: Ints, angles: tuple[Ints, Ints], t: int, regressors: Ints
) -> Iterator[tuple[int, int]]:
    """Channel by channel the prediction in its units; regressors of a pair, once both are there,
    are turned back."""
    row, most = 0, (1 << REGRESSOR_BITS) - 1
    while row < len(base):
        pair = int(group.pairs[row])
        rows = (row,) if pair < 0 else (row, row + 1)
        found = []
        for each in rows:
            total = int(base[each])
            for i in range(row):
                total += int(group.weights[each, i]) * int(regressors[i])
            total = _shifted(total, PREDICTION_BITS - int(group.weight_bits[each]))
            found.append(_limited(total, 1 << 30))
        if pair >= 0:
            cos, sin = (int(part[pair, t]) for part in angles)
            a, b = found
            found = [(a * cos - b * sin) >> ANGLE_BITS, (b * cos + a * sin) >> ANGLE_BITS]
        for each, mu in zip(rows, found, strict=True):
            by = int(group.unit_bits[each]) - int(group.scale_bits[each]) - PREDICTION_BITS
            yield each, _limited(_shifted(mu, by), (1 << UNIT_BITS) - 1)
        if pair >= 0:
            a, b = int(regressors[row]), int(regressors[row + 1])
            half = 1 << (ANGLE_BITS - 1)
            regressors[row] = _limited((a * cos + b * sin + half) >> ANGLE_BITS, most)
            regressors[row + 1] = _limited((b * cos - a * sin + half) >> ANGLE_BITS, most)
        row += len(rows)


def _log2(value: int) -> int:
    return value.bit_length() - 1


def _magnitude(value: int) -> int:
    """Of a number of units that stands for what lies between it and the next outwards."""
    return value if value >= 0 else ~value


def _context(mu: int, mean: int, sigma: int, unit: int, form: Format) -> tuple[int, int, int]:
    """Where the bins of a value begin, binary logarithm of their width, and their table."""
    log_cell = max(_log2(_magnitude(mu)) - form.fraction_bits, form.least + unit)
    half = (1 << log_cell) >> 1 if log_cell > 0 else 0
    mu = mu + half if mu >= 0 else mu - half
    scale = min(max((sigma * mean) >> (MEMORY + 8), LEAST_SCALE), MOST_SCALE)
    octave = _log2(scale)
    mantissa = (scale << 16) >> octave
    quarter = 4 * octave + sum(mantissa >= each for each in QUARTERS)
    far = _log2(_magnitude(mu) + (4 << octave)) - form.fraction_bits
    width = max(octave - 3, far, form.least + unit, 0)
    place = _shifted(mu, 3 - width) & (N_PLACES - 1)
    ratio = min(max(quarter - 4 * width + RATIO_OFFSET, 0), N_RATIOS - 1)
    return (mu >> width) << width, width, ratio * N_PLACES + place


def _learn(mean: int, apart: int | None, sigma: int) -> int:
    """The running mean after an error of ``apart`` units, if it is known."""
    most = min((mean >> (MEMORY - 3)) + 64, 1 << 16)
    error = most if apart is None else min((apart * ((1 << 32) // sigma)) >> 24, most)
    return mean - (mean >> MEMORY) + error


def _code(
    pattern: int, unit: int, first: int, width: int, form: Format, cumulative: NDArray[np.uint32]
) -> tuple[list[tuple[int, int, int]], int, int]:
    """Up to three events (start, size, bits), the symbol, and the value in units."""
    magnitude = pattern & 0x7FFF
    exponent, number = magnitude >> form.fraction_bits, magnitude % (1 << form.fraction_bits)
    if exponent:
        number += 1 << form.fraction_bits
    by = max(exponent - 1, 0) + form.least + unit
    size = number << by if by >= 0 else number >> -by
    at = size if pattern < 0x8000 else ~size
    narrow = ((at - first) >> width) + HALF_BINS
    finite = exponent != 0x7FFF >> form.fraction_bits
    symbol = ESCAPE
    if finite and size < 1 << UNIT_BITS and 0 <= narrow < 2 * HALF_BINS:
        symbol = int(BIN_OF[narrow])
    below, above = int(cumulative[symbol]), int(cumulative[symbol + 1])
    events = [(below, above - below, TABLE_BITS)]
    if symbol == ESCAPE:
        return [*events, (0, 0, 0), (pattern, 1, N_RAW)], symbol, at
    low = first + (int(BIN_FIRST[symbol]) << width)
    bits = width + int(BIN_WIDTH[symbol])
    cell = 1 << max(by, 0)
    begin = at if at >= 0 else at + 1 - cell
    end = min(begin + cell, low + (1 << bits))
    begin = max(begin, low)
    events.append((begin - low, end - begin, bits))
    if by < 0:
        more = (number % (1 << -by), 1, -by) if size else (magnitude, 1, MAGNITUDE_BITS)
        events.append(more)
    return events, symbol, at


def _uncode(
    lane: _Lane, unit: int, first: int, width: int, form: Format, cumulative: NDArray[np.uint32]
) -> tuple[int | None, int | None]:
    """The pattern and the value in units; no value for an escape, no pattern for nonsense."""
    slot = lane.slot(TABLE_BITS)
    symbol = int(np.searchsorted(cumulative, slot, side="right")) - 1
    below, above = int(cumulative[symbol]), int(cumulative[symbol + 1])
    lane.take(below, above - below, TABLE_BITS)
    if symbol == ESCAPE:
        return lane.raw(N_RAW), None
    low = first + (int(BIN_FIRST[symbol]) << width)
    bits = width + int(BIN_WIDTH[symbol])
    slot = lane.slot(bits)
    at, genuine = low + slot, True
    if _magnitude(at) >= 1 << UNIT_BITS:
        at, genuine = 0, False
    number, negative = _magnitude(at), at < 0
    by = max(_log2(number) - form.fraction_bits, form.least + unit)
    if by >= 0:
        number >>= by
        at = ~(number << by) if negative else number << by
    cell = 1 << max(by, 0)
    left = at + 1 - cell if negative else at
    right = min(left + cell, low + (1 << bits))
    left = max(left, low)
    lane.take(min(left - low, slot), max(right - left, 1), bits)
    pattern = 0
    if number or by >= 0:
        pattern = ((by - unit - form.least) << form.fraction_bits) + (number << max(-by, 0))
    if by < 0:
        pattern += lane.raw(-by if number else MAGNITUDE_BITS)
    if pattern > 0x7FFF:
        pattern, genuine = 0, False
    pattern |= 0x8000 if negative else 0
    return pattern if genuine else None, at


def _regressor(pattern: int, scale: int, form: Format) -> int:
    magnitude = pattern & 0x7FFF
    exponent, number = magnitude >> form.fraction_bits, magnitude % (1 << form.fraction_bits)
    if exponent == 0x7FFF >> form.fraction_bits:
        return 0
    if exponent:
        number += 1 << form.fraction_bits
    by = max(exponent - 1, 0) + form.least + scale
    if by >= 0:
        number <<= by
    elif by > -40:
        number = (number + (1 << (-by - 1))) >> -by
    else:
        number = 0
    number = min(number, (1 << REGRESSOR_BITS) - 1)
    return -number if pattern & 0x8000 else number
