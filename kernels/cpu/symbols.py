"""Numba twin of `tscfile_kernels.reference.symbols`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


def seen_symbols(
    matrix: NDArray[np.unsignedinteger], low_bits: int, n_symbols: int
) -> NDArray[np.bool_]:
    seen = np.zeros(n_symbols, np.bool_)
    _see(matrix, low_bits, seen)
    return seen


def index_symbols(
    matrix: NDArray[np.unsignedinteger], low_bits: int, index_of: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    symbols = np.empty(matrix.shape, np.uint8)
    _index(matrix, low_bits, index_of, symbols)
    return symbols


def count_symbols(symbols: NDArray[np.uint8], n_symbols: int) -> NDArray[np.uint32]:
    counts = np.zeros((symbols.shape[1], n_symbols), np.uint32)
    _count(symbols, counts)
    return counts


def nearest_class(counts: NDArray[np.uint32], lengths: NDArray[np.int32]) -> NDArray[np.uint8]:
    labels = np.empty(len(counts), np.uint8)
    _nearest(counts, lengths, labels)
    return labels


def class_totals(
    counts: NDArray[np.uint32], labels: NDArray[np.uint8], n_classes: int
) -> NDArray[np.int64]:
    totals = np.zeros((n_classes, counts.shape[1]), np.int64)
    _total(counts, labels, totals)
    return totals


@njit(nogil=True, cache=True)
def _see(matrix, low_bits, seen):  # type: ignore[no-untyped-def]
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            seen[matrix[row, column] >> low_bits] = True


@njit(nogil=True, cache=True)
def _index(matrix, low_bits, index_of, symbols):  # type: ignore[no-untyped-def]
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            symbols[row, column] = index_of[matrix[row, column] >> low_bits]


@njit(nogil=True, cache=True)
def _count(symbols, counts):  # type: ignore[no-untyped-def]
    for row in range(symbols.shape[0]):
        for column in range(symbols.shape[1]):
            counts[column, symbols[row, column]] += np.uint32(1)


@njit(nogil=True, cache=True)
def _nearest(counts, lengths, labels):  # type: ignore[no-untyped-def]
    n_columns, n_symbols = counts.shape
    for column in range(n_columns):
        best, label = np.int32(0x7FFFFFFF), 0
        for k in range(lengths.shape[0]):
            bits = np.int32(0)
            for s in range(n_symbols):
                bits += np.int32(counts[column, s]) * lengths[k, s]
            if bits < best:
                best, label = bits, k
        labels[column] = label


@njit(nogil=True, cache=True)
def _total(counts, labels, totals):  # type: ignore[no-untyped-def]
    for column in range(counts.shape[0]):
        for s in range(counts.shape[1]):
            totals[labels[column], s] += counts[column, s]
