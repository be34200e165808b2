"""One step for every coefficient, rounded for rate and distortion together.

The transform's coefficients are orthonormal in the metric, so one step serves all: their squared
errors add up to what the model's output feels, and no bit is better spent elsewhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LAMBDA = 0.14
"""Squared steps that one bit is worth: chosen on calibration text, flat between 0.1 and 0.2."""


def quantize(
    scaled: NDArray[np.float32], lengths: NDArray[np.float32], classes: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Integers that minimise squared error plus `LAMBDA` times bits.

    ``scaled``: float32 ``[n, R]``, coefficients in units of the step. ``lengths``: float32
    ``[n_classes, largest + 2]``, bits of a value of each size, the last for all larger ones.
    ``classes``: int64 ``[R]`` or, for each value its own, ``[n, R]``. Tries the two nearest sizes
    and zero for each.
    """
    size = np.abs(scaled)
    low = np.floor(size)
    best = np.zeros(scaled.shape, np.float32)
    table = lengths * np.float32(LAMBDA)
    cost = size * size + table[classes, 0]
    largest = lengths.shape[1] - 1
    for candidate in (low, low + 1):
        bits = table[classes, np.minimum(candidate, largest).astype(np.int64)]
        # Zero is compared once, as the starting point.
        found = (size - candidate) ** 2 + bits
        better = (found < cost) & (candidate > 0)
        best = np.where(better, candidate, best)
        cost = np.where(better, found, cost)
    return np.where(scaled < 0, -best, best).astype(np.int32)


def dequantize(values: NDArray[np.int32], step: float) -> NDArray[np.float32]:
    """Float32 ``[n, R]``: values times the step."""
    return values.astype(np.float32) * np.float32(step)
