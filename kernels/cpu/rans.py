"""Numba twin of `tscfile_kernels.reference.rans`.

The 32 lanes are what makes this fast: their dependency chains are independent, so the processor
overlaps them. The decoder reads one table entry (frequency, slot offset and symbol in 32 bits) for
each symbol and never tests for the end of a lane; see `rans_decode`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..ops import LANES, LOWER_BOUND, PROBABILITY_BITS

_SLOT_MASK = (1 << PROBABILITY_BITS) - 1
_BOUND = np.uint32(LOWER_BOUND)
_BITS = np.uint32(PROBABILITY_BITS)
_MASK = np.uint32(_SLOT_MASK)

# Parts of the decoder's scratch: states first, then these.
_CURSOR, _SLOT, _ENTRY, _WORD = LANES, 2 * LANES, 3 * LANES, 4 * LANES


def rans_encode(
    symbols: NDArray[np.uint8],
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
    lanes: int,
) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    # At most one word leaves a lane for each symbol, and two words at the end.
    room = -(-symbols.size // lanes) + 2
    streams = np.empty((lanes, room), np.uint16)
    lengths = np.empty(lanes, np.uint32)
    _encode(symbols, class_of_column, frequencies, streams, lengths)
    words = [part[room - length :] for part, length in zip(streams, lengths.tolist(), strict=True)]
    return np.concatenate(words), lengths


def rans_decode(
    words: NDArray[np.uint16],
    lengths: NDArray[np.uint32],
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
    values: NDArray[np.unsignedinteger],
    out: NDArray[np.unsignedinteger],
) -> bool:
    # A lane takes at most one word for each symbol; with that many zeros behind the last lane no
    # stream, however damaged, can read past the array, and the inner loop needs no test.
    lanes = len(lengths)
    padded = np.zeros(len(words) + -(-out.size // lanes) + 1, np.uint16)
    padded[: len(words)] = words
    ends = np.cumsum(lengths, dtype=np.int64)
    tables = _tables(frequencies.tobytes(), frequencies.shape)
    table_of_column = class_of_column.astype(np.uint32) << PROBABILITY_BITS
    states = np.empty(lanes, np.uint32)
    cursors = (ends - lengths).astype(np.uint32)
    flat_tables = tables.reshape(-1)
    if lanes == LANES and out.shape[1] % LANES == 0:
        _decode_aligned(padded, table_of_column, flat_tables, values, out, states, cursors)
    else:
        _decode_any(padded, table_of_column, flat_tables, values, out, states, cursors)
    return bool((states == LOWER_BOUND).all() and (cursors == ends).all())


@lru_cache(maxsize=8)
def _tables(frequencies: bytes, shape: tuple[int, int]) -> NDArray[np.uint32]:
    """Kept, as the chunks of a file often share their frequencies."""
    tables = np.empty((shape[0], _SLOT_MASK + 1), np.uint32)
    _build_tables(np.frombuffer(frequencies, np.uint16).reshape(shape), tables)
    return tables


@njit(nogil=True, cache=True)
def _encode(symbols, class_of_column, frequencies, streams, lengths):  # type: ignore[no-untyped-def]
    n_classes, n_symbols = frequencies.shape
    starts = np.zeros((n_classes, n_symbols), np.uint32)
    for k in range(n_classes):
        for s in range(1, n_symbols):
            starts[k, s] = starts[k, s - 1] + frequencies[k, s - 1]
    n_rows, n_columns = symbols.shape
    n_lanes, room = streams.shape
    states = np.full(n_lanes, _BOUND, np.uint32)
    heads = np.full(n_lanes, room, np.int64)
    lane = n_rows * n_columns % n_lanes
    for row in range(n_rows - 1, -1, -1):
        for column in range(n_columns - 1, -1, -1):
            lane = (lane if lane else n_lanes) - 1
            k, s = class_of_column[column], symbols[row, column]
            frequency = np.uint32(frequencies[k, s])
            state = states[lane]
            if state >> np.uint32(32 - PROBABILITY_BITS) >= frequency:
                heads[lane] -= 1
                streams[lane, heads[lane]] = np.uint16(state & np.uint32(0xFFFF))
                state >>= np.uint32(16)
            quotient = state // frequency
            rest = state - quotient * frequency
            states[lane] = (quotient << _BITS) + rest + starts[k, s]
    for lane in range(n_lanes):
        streams[lane, heads[lane] - 1] = np.uint16(states[lane] & np.uint32(0xFFFF))
        streams[lane, heads[lane] - 2] = np.uint16(states[lane] >> np.uint32(16))
        lengths[lane] = np.uint32(room - heads[lane] + 2)


@njit(nogil=True, cache=True)
def _build_tables(frequencies, tables):  # type: ignore[no-untyped-def]
    # One entry: frequency - 1 (12 bits), slot - start (12 bits), symbol (8 bits).
    for k in range(frequencies.shape[0]):
        slot = 0
        for s in range(frequencies.shape[1]):
            frequency = np.uint32(frequencies[k, s])
            for offset in range(frequency):
                entry = (frequency - np.uint32(1)) << np.uint32(20)
                tables[k, slot] = entry | np.uint32(offset) << np.uint32(8) | np.uint32(s)
                slot += 1


@njit(nogil=True, cache=True)
def _start_lanes(words, states, cursors):  # type: ignore[no-untyped-def]
    for lane in range(len(states)):
        high, low = words[cursors[lane]], words[cursors[lane] + 1]
        states[lane] = np.uint32(high) << np.uint32(16) | np.uint32(low)
        cursors[lane] += np.uint32(2)


@njit(nogil=True, cache=True)
def _decode_aligned(words, table_of_column, tables, values, out, states, cursors):  # type: ignore[no-untyped-def]
    # One step of all lanes at a time, cut into loops of which each is either table look-ups or
    # arithmetic: the compiler then makes vector code of the arithmetic. All scratch is one array,
    # so that it can see that the parts do not overlap.
    n_columns = out.shape[1]
    symbols = np.empty(n_columns, np.uint8)
    _start_lanes(words, states, cursors)
    scratch = np.empty(5 * LANES, np.uint32)
    for lane in range(LANES):
        scratch[lane], scratch[_CURSOR + lane] = states[lane], cursors[lane]
    for row in range(out.shape[0]):
        for first in range(0, n_columns, LANES):
            for lane in range(LANES):
                slot = scratch[lane] & _MASK
                scratch[_SLOT + lane] = table_of_column[first + lane] + slot
            for lane in range(LANES):
                scratch[_ENTRY + lane] = tables[scratch[_SLOT + lane]]
            for lane in range(LANES):
                scratch[_WORD + lane] = words[scratch[_CURSOR + lane]]
            for lane in range(LANES):
                entry = scratch[_ENTRY + lane]
                state = ((entry >> np.uint32(20)) + np.uint32(1)) * (scratch[lane] >> _BITS)
                state += (entry >> np.uint32(8)) & _MASK
                short = state < _BOUND
                refilled = (state << np.uint32(16)) | scratch[_WORD + lane]
                scratch[lane] = refilled if short else state
                scratch[_CURSOR + lane] += np.uint32(short)
            for lane in range(LANES):
                symbols[first + lane] = np.uint8(scratch[_ENTRY + lane] & np.uint32(0xFF))
        for column in range(n_columns):
            out[row, column] |= values[symbols[column]]
    for lane in range(LANES):
        states[lane], cursors[lane] = scratch[lane], scratch[_CURSOR + lane]


@njit(nogil=True, cache=True)
def _decode_any(words, table_of_column, tables, values, out, states, cursors):  # type: ignore[no-untyped-def]
    _start_lanes(words, states, cursors)
    lane = 0
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            entry = tables[table_of_column[column] + (states[lane] & _MASK)]
            state = ((entry >> np.uint32(20)) + np.uint32(1)) * (states[lane] >> _BITS)
            state += (entry >> np.uint32(8)) & _MASK
            if state < _BOUND:
                state = (state << np.uint32(16)) | np.uint32(words[cursors[lane]])
                cursors[lane] += np.uint32(1)
            states[lane] = state
            out[row, column] |= values[entry & np.uint32(0xFF)]
            lane = lane + 1 if lane + 1 < len(states) else 0
