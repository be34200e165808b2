"""Tables as a book stores them: 8-bit integers with a scale for each row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def quantize_rows(
    matrix: NDArray[np.floating],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Int8 ``[n, m]`` and a float32 scale for each row.

    >>> stored, scales = quantize_rows(np.array([[0.5, -1.0]]))
    >>> stored.tolist(), round(float(scales[0]) * 127, 6)
    ([[64, -127]], 1.0)
    """
    largest = np.abs(matrix).max(axis=1, initial=0)
    scales = np.maximum(largest, 1e-30).astype(np.float32) / np.float32(127)
    return np.rint(matrix / scales[:, None]).astype(np.int8), scales


def quantize_columns(
    matrix: NDArray[np.floating],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Int8 ``[n, m]`` and a float32 scale for each column."""
    stored, scales = quantize_rows(matrix.T)
    return np.ascontiguousarray(stored.T), scales


def restored_columns(
    stored: NDArray[np.int8], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Undo `quantize_columns` up to its rounding, with the values a decoder uses."""
    restored: NDArray[np.float32] = stored.astype(np.float32) * scales
    return restored
