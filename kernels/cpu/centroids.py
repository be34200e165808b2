"""Numba twin of `tscfile_kernels.reference.centroids`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_BLOCK = 4096


def nearest_centroids(
    vectors: NDArray[np.float32], centroids: NDArray[np.float32]
) -> NDArray[np.uint8]:
    nearest = np.empty(len(vectors), np.uint8)
    half = (np.square(centroids.astype(np.float64)).sum(axis=1) / 2).astype(np.float32)
    turned = np.ascontiguousarray(centroids.T)
    for start in range(0, len(vectors), _BLOCK):
        # The product is the matrix library's, as everywhere.
        block = slice(start, start + _BLOCK)
        _argmin(half, vectors[block] @ turned, nearest[block])
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
    _gather(codes, counts, books, columns, centroids, values)
    return values


@njit(nogil=True, cache=True)
def _argmin(half, products, nearest):  # type: ignore[no-untyped-def]
    for i in range(products.shape[0]):
        best, label = half[0] - products[i, 0], 0
        for k in range(1, len(half)):
            distance = half[k] - products[i, k]
            if distance < best:
                best, label = distance, k
        nearest[i] = label


@njit(nogil=True, cache=True)
def _gather(codes, counts, books, columns, centroids, values):  # type: ignore[no-untyped-def]
    at = 0
    for i in range(len(counts)):
        for stage in range(counts[i]):
            centroid = centroids[books[stage], codes[at + stage]]
            for j in range(columns.shape[1]):
                values[i, columns[stage, j]] += centroid[j]
        at += counts[i]
