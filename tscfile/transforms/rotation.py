"""The Hadamard rotation that llama.cpp applies to quantized keys and values.

Since April 2026 rows are multiplied with an orthonormal Walsh-Hadamard matrix before they are
quantized: the channels of a row are cut into blocks of ``n`` and each block is rotated. The matrix
is symmetric and its own inverse, so the same call rotates and un-rotates.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

MIN_BLOCK = 64


def rotation_block(role: str, head_dim: int) -> int:
    """Channels that llama.cpp rotates together for a quantized cache; 0 if it does not rotate.

    Keys (``role`` ``k``) use the largest power of two from 64 on that divides the head size,
    values always 64; head sizes that are no multiple of 64 are not rotated.

    >>> [rotation_block("k", size) for size in (64, 192, 256, 80)], rotation_block("v", 256)
    ([64, 64, 256, 0], 64)
    """
    if head_dim <= 0 or head_dim % MIN_BLOCK:
        return 0
    return head_dim & -head_dim if role == "k" else MIN_BLOCK


@lru_cache(maxsize=8)
def hadamard(n: int) -> NDArray[np.float32]:
    """The orthonormal Sylvester-Hadamard matrix, float32 ``[n, n]``; ``n`` a power of two.

    >>> hadamard(2).round(3).tolist()
    [[0.7070000171661377, 0.7070000171661377], [0.7070000171661377, -0.7070000171661377]]
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard matrix of {n} rows does not exist by Sylvester's rule")
    signs = np.ones((1, 1))
    while len(signs) < n:
        signs = np.block([[signs, signs], [signs, -signs]])
    matrix: NDArray[np.float32] = (signs / np.sqrt(n)).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def rotate(rows: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Rows with every ``block`` channels rotated; ``block`` 0 returns them as they are.

    ``rows``: float32 ``[n, channels]``, ``channels`` a multiple of ``block`` (`ValueError`
    otherwise). Applying it twice gives the rows back up to rounding.

    >>> rows = np.ones((1, 4), np.float32)
    >>> rotate(rows, 4).tolist()
    [[2.0, 0.0, 0.0, 0.0]]
    """
    if block == 0:
        return rows
    n, channels = rows.shape
    if channels % block:
        raise ValueError(f"{channels} channels are no whole number of blocks of {block}")
    return (rows.reshape(-1, block) @ hadamard(block)).reshape(n, channels)
