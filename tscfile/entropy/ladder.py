"""Distribution classes by scale: one table serves every coefficient that is as wide as its step.

The class of a coefficient is its standard deviation over the step in quarter octaves, both known
as integers of 1/256 octaves: no platform rounds it differently.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels.ops import PROBABILITY_BITS

UNITS_PER_OCTAVE = 256
CLASSES_PER_OCTAVE = 4
LOWEST = -3 * UNITS_PER_OCTAVE
"""Coefficients narrower than 1/8 of the step are taken as zero and not stored."""

N_CLASSES = 40
N_SYMBOLS = 32
ESCAPE = N_SYMBOLS - 1
LARGEST = 15
"""Symbols 0 to 30 are the values 0, 1, -1, 2, -2, … 15, -15; 31 says that the value follows."""


_NUMBERS = np.arange(N_SYMBOLS, dtype=np.int32)
_VALUE_OF_SYMBOL = np.where(_NUMBERS & 1, (_NUMBERS + 1) >> 1, -(_NUMBERS >> 1)).astype(np.int32)


def class_of(log_sigmas: NDArray[np.int16], log_step: int) -> NDArray[np.int64]:
    """Class of each coefficient, int64 ``[R]``; -1 for those that are not stored."""
    units = log_sigmas.astype(np.int64) - log_step - LOWEST
    classes = units * CLASSES_PER_OCTAVE // UNITS_PER_OCTAVE
    return np.where(units < 0, -1, np.minimum(classes, N_CLASSES - 1))


def to_symbols(values: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Symbols of ``values`` and those values that escape, in order."""
    # The least of 32 bits has no positive counterpart in them.
    size = np.abs(values.astype(np.int64))
    symbols = 2 * size - (values > 0)
    escapes = size > LARGEST
    symbols[escapes] = ESCAPE
    return np.ascontiguousarray(symbols, np.uint8), values[escapes]


def from_symbols(symbols: NDArray[np.uint8], escaped: NDArray[np.int32]) -> NDArray[np.int32]:
    """Undo `to_symbols`; the number of escapes must fit."""
    values = _VALUE_OF_SYMBOL[symbols]
    if len(escaped):
        values[symbols == ESCAPE] = escaped
    return values


def normalise(counts: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Frequencies of one class that sum to 4096, every symbol possible."""
    total = 1 << PROBABILITY_BITS
    exact = counts / counts.sum() * (total - len(counts))
    frequencies: NDArray[np.int64] = 1 + np.floor(exact).astype(np.int64)
    order = np.argsort(np.floor(exact) - exact, kind="stable")
    frequencies[order[: total - int(frequencies.sum())]] += 1
    return frequencies.astype(np.uint16)
