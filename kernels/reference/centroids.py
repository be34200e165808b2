"""Reference of the operations on codebooks, of `tscfile_kernels.ops`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def nearest_centroids(
    vectors: NDArray[np.float32], centroids: NDArray[np.float32]
) -> NDArray[np.uint8]:
    nearest = np.empty(len(vectors), np.uint8)
    wide = centroids.astype(np.float64)
    for i, vector in enumerate(vectors):
        nearest[i] = np.square(wide - vector).sum(axis=1).argmin()
    return nearest


def gather_centroids(
    codes: NDArray[np.uint8],
    counts: NDArray[np.int64],
    books: NDArray[np.int32],
    columns: NDArray[np.int32],
    centroids: NDArray[np.float32],
    n_columns: int,
) -> NDArray[np.float32]:
    values = np.zeros((len(counts), n_columns), np.float32)
    ends = np.cumsum(counts)
    for i, (count, end) in enumerate(zip(counts.tolist(), ends.tolist(), strict=True)):
        for stage, code in enumerate(codes[end - count : end].tolist()):
            values[i, columns[stage]] += centroids[books[stage], code]
    return values
