"""Numba twin of `tscfile_kernels.reference.bits`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


def pack_bits(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    n_columns = -(-len(values) // 8)
    planes = np.zeros((8, n_columns), np.uint8)
    planes.reshape(-1)[: len(values)] = values
    packed = np.empty((width, n_columns), np.uint8)
    _pack(planes, packed)
    return packed.reshape(-1)


def unpack_bits(packed: NDArray[np.uint8], width: int, n_values: int) -> NDArray[np.uint8]:
    stored = packed.reshape(width, -1)
    planes = np.empty((8, stored.shape[1]), np.uint8)
    _unpack(stored, planes)
    return planes.reshape(-1)[:n_values]


@njit(nogil=True, cache=True)
def _pack(planes, packed):  # type: ignore[no-untyped-def]
    width, n_columns = packed.shape
    for i in range(width):
        for j in range(n_columns):
            byte = planes[i, j]
            for high in range(width, 8):
                byte |= ((planes[high, j] >> np.uint8(i)) & np.uint8(1)) << np.uint8(high)
            packed[i, j] = byte


@njit(nogil=True, cache=True)
def _unpack(stored, planes):  # type: ignore[no-untyped-def]
    width, n_columns = stored.shape
    mask = np.uint8((1 << width) - 1)
    for p in range(width):
        for j in range(n_columns):
            planes[p, j] = stored[p, j] & mask
    for high in range(width, 8):
        for j in range(n_columns):
            planes[high, j] = 0
        for i in range(width):
            for j in range(n_columns):
                bit = (stored[i, j] >> np.uint8(high)) & np.uint8(1)
                planes[high, j] |= bit << np.uint8(i)
