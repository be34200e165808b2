"""Reference of the rANS operations of `tscfile_kernels.ops`: one symbol at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..ops import LOWER_BOUND, PROBABILITY_BITS


def rans_encode(
    symbols: NDArray[np.uint8],
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
    lanes: int,
) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    starts = _starts(frequencies)
    flat, n_columns = symbols.ravel(), symbols.shape[1]
    streams: list[list[int]] = []
    for lane in range(lanes):
        state, words = LOWER_BOUND, []
        for i in reversed(range(lane, len(flat), lanes)):
            k, symbol = class_of_column[i % n_columns], flat[i]
            frequency = int(frequencies[k, symbol])
            # The largest state that still fits 32 bits after taking this symbol in.
            if state >= frequency << (32 - PROBABILITY_BITS):
                words.append(state & 0xFFFF)
                state >>= 16
            quotient, rest = divmod(state, frequency)
            state = (quotient << PROBABILITY_BITS) + rest + int(starts[k, symbol])
        words += [state & 0xFFFF, state >> 16]
        streams.append(words[::-1])
    lengths = np.array([len(words) for words in streams], np.uint32)
    return np.array([word for words in streams for word in words], np.uint16), lengths


def rans_decode(
    words: NDArray[np.uint16],
    lengths: NDArray[np.uint32],
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
    values: NDArray[np.unsignedinteger],
    out: NDArray[np.unsignedinteger],
) -> bool:
    starts = _starts(frequencies)
    n_columns = out.shape[1]
    flat = out.reshape(-1)
    ends = np.cumsum(lengths, dtype=np.int64)
    genuine = True
    for lane in range(len(lengths)):
        stream = words[int(ends[lane]) - int(lengths[lane]) : int(ends[lane])].tolist()
        state, used = stream[0] << 16 | stream[1], 2
        for i in range(lane, len(flat), len(lengths)):
            k = class_of_column[i % n_columns]
            slot = state & ((1 << PROBABILITY_BITS) - 1)
            symbol = int(np.searchsorted(starts[k], slot, side="right")) - 1
            state = int(frequencies[k, symbol]) * (state >> PROBABILITY_BITS)
            state += slot - int(starts[k, symbol])
            if state < LOWER_BOUND:
                state = state << 16 | (stream[used] if used < len(stream) else 0)
                used += 1
            flat[i] |= values[symbol]
        genuine &= state == LOWER_BOUND and used == len(stream)
    return genuine


def _starts(frequencies: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """First slot of every symbol: the sum of the frequencies before it."""
    return np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies
