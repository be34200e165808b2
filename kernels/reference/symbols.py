"""Reference of the operations that choose symbols and classes, of `tscfile_kernels.ops`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def seen_symbols(
    matrix: NDArray[np.unsignedinteger], low_bits: int, n_symbols: int
) -> NDArray[np.bool_]:
    return np.isin(np.arange(n_symbols), matrix >> low_bits)


def index_symbols(
    matrix: NDArray[np.unsignedinteger], low_bits: int, index_of: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    symbols: NDArray[np.uint8] = index_of[matrix >> low_bits]
    return symbols


def count_symbols(symbols: NDArray[np.uint8], n_symbols: int) -> NDArray[np.uint32]:
    columns = [np.bincount(column, minlength=n_symbols) for column in symbols.T]
    return np.array(columns, np.uint32).reshape(symbols.shape[1], n_symbols)


def nearest_class(counts: NDArray[np.uint32], lengths: NDArray[np.int32]) -> NDArray[np.uint8]:
    bits = counts.astype(np.int64) @ lengths.T.astype(np.int64)
    labels: NDArray[np.uint8] = bits.argmin(axis=1).astype(np.uint8)
    return labels


def class_totals(
    counts: NDArray[np.uint32], labels: NDArray[np.uint8], n_classes: int
) -> NDArray[np.int64]:
    totals = np.zeros((n_classes, counts.shape[1]), np.int64)
    np.add.at(totals, labels, counts)
    return totals
