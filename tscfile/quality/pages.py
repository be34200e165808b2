"""Symmetric quantization of pages, as the TSC reports have it.

A page of consecutive values shares one fp16 scale, the largest magnitude a. The levels are 2^bits
evenly spaced values from -a to a, so that the error is at most a / (2^bits - 1), and what comes of
rounding a to fp16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PAGE = 64
"""Values of a page; the reports give none."""


def quantize(
    pages: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Scales float16 ``[n]`` and codes uint8 ``[n, page]`` of float32 ``[n, page]``.

    >>> scales, codes = quantize(np.array([[-3, -1, 1, 3]], np.float32), 2)
    >>> scales.tolist(), codes.tolist()
    ([3.0], [[0, 1, 2, 3]])
    """
    scales = np.abs(pages).max(axis=1).astype(np.float16)
    top = 2**bits - 1
    wide = np.where(scales == 0, 1, scales).astype(np.float32)[:, None]
    codes = np.clip(np.rint((pages / wide + 1) / 2 * top), 0, top)
    return scales, codes.astype(np.uint8)


def dequantize(
    scales: NDArray[np.float16], codes: NDArray[np.uint8], bits: int
) -> NDArray[np.float32]:
    """Undo `quantize`: float32 ``[n, page]``."""
    levels = codes * np.float32(2 / (2**bits - 1)) - 1
    pages: NDArray[np.float32] = levels * scales.astype(np.float32)[:, None]
    return pages


def page_size(n_values: int) -> int:
    """The largest power of two up to `PAGE` that divides ``n_values``.

    >>> page_size(128), page_size(80)
    (64, 16)
    """
    return min(n_values & -n_values, PAGE)
