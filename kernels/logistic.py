"""Tables of the token-id model, each made by an integer rule: no platform rounds them otherwise.

Probabilities are 16-bit; their log-odds are counted in 1/256 octaves ("units"), so that a log-odds
of 256 is odds of 2 to 1. ``spec/codecs/token-ids.md`` gives the rules.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOG2_BITS = 12
UNITS_PER_OCTAVE = 256
LONGEST_ODDS = 2816
"""Log-odds are kept within ± this many units: 11 octaves."""

LOWEST_PROBABILITY = 32
"""Of 65536, for either bit: no decision costs more than 11 bits."""

MOST_BUCKETS = 16


def _log2() -> NDArray[np.int64]:
    values = np.arange(1 << LOG2_BITS, dtype=np.uint64)
    values[0] = 1
    octaves = np.zeros(len(values), np.uint64)
    for shift in range(1, LOG2_BITS):
        octaves += values >> np.uint64(shift) > 0
    # A mantissa of 32 bits, squared eight times: each square that reaches 2 gives a binary digit.
    mantissas = values << (np.uint64(31) - octaves)
    units = octaves
    for _ in range(8):
        mantissas = mantissas * mantissas >> np.uint64(31)
        digits = mantissas >> np.uint64(32)
        mantissas >>= digits
        units = units << np.uint64(1) | digits
    return units.astype(np.int64)


LOG2: NDArray[np.int64] = _log2()
"""int64 ``[4096]``: log2 of the index in units, cut off; entry 0 is not used."""


def log2(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Units of positive ``values``, of which the 12 highest bits are looked at."""
    shifts = np.zeros_like(values)
    while (values >> shifts >= 1 << LOG2_BITS).any():
        shifts += values >> shifts >= 1 << LOG2_BITS
    units: NDArray[np.int64] = LOG2[values >> shifts] + UNITS_PER_OCTAVE * shifts
    return units


def _probability() -> NDArray[np.int64]:
    probabilities = np.arange(1, 1 << 16, dtype=np.int64)
    odds = log2(probabilities) - log2((1 << 16) - probabilities)
    wanted = np.arange(-LONGEST_ODDS, LONGEST_ODDS + 1)
    found = 1 + np.searchsorted(odds, wanted)
    return np.clip(found, LOWEST_PROBABILITY, (1 << 16) - LOWEST_PROBABILITY).astype(np.int64)


PROBABILITY: NDArray[np.int64] = _probability()
"""int64 ``[2 * 2816 + 1]``: the lowest probability whose log-odds are index - 2816 or more."""


def ladder(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts that codes stand for: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, …

    >>> ladder(np.arange(10)).tolist()
    [0, 1, 2, 3, 4, 6, 8, 12, 16, 24]
    """
    codes = np.asarray(codes, np.int64)
    return np.where(codes < 2, codes, (2 + (codes & 1)) << np.maximum((codes >> 1) - 1, 0))


def _buckets() -> NDArray[np.int64]:
    steps = ladder(np.arange(MOST_BUCKETS))
    return np.searchsorted(steps, np.arange(int(steps[-1]) + 1), side="right") - 1


BUCKET: NDArray[np.int64] = _buckets()
"""int64 ``[193]``: code of the highest step of the ladder, up to code 15, not above the index."""
