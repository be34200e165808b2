"""Reference of the bit-packing operations of `tscfile_kernels.ops`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack_bits(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    planes = np.zeros((8, -(-len(values) // 8)), np.uint8)
    planes.reshape(-1)[: len(values)] = values
    packed = planes[:width].copy()
    for q in range(8 - width):
        for i in range(width):
            packed[i] |= ((planes[width + q] >> i) & 1) << (width + q)
    return packed.reshape(-1)


def unpack_bits(packed: NDArray[np.uint8], width: int, n_values: int) -> NDArray[np.uint8]:
    stored = packed.reshape(width, -1)
    planes = np.zeros((8, stored.shape[1]), np.uint8)
    planes[:width] = stored & ((1 << width) - 1)
    for q in range(8 - width):
        for i in range(width):
            planes[width + q] |= ((stored[i] >> (width + q)) & 1) << i
    return planes.reshape(-1)[:n_values]
