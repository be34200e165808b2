"""Every kernel operation: its contract, its checks, and the choice of a backend.

Backends hold functions of the same names and take arguments that were checked here. They are
imported when first used, because Numba takes half a second to import.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

PROBABILITY_BITS = 12
"""Frequencies of a class sum to ``1 << PROBABILITY_BITS``."""

LANES = 32
"""Independent rANS states unless told otherwise; symbol ``i`` of the row-major matrix belongs to
lane ``i % lanes``. More are faster, and each takes four to eight bytes."""

LOWER_BOUND = 1 << 16
"""A state stays in ``[LOWER_BOUND, 1 << 32)`` and is renormalised by 16-bit words."""

BACKENDS = ("cpu", "reference")


def backend(name: str, module: str) -> ModuleType:
    """The ``module`` ("rans", "bits", "symbols") of a backend; `ValueError` for one not known."""
    if name not in BACKENDS:
        raise ValueError(f"no kernel backend {name!r}; there are {', '.join(BACKENDS)}")
    return importlib.import_module(f"tscfile_kernels.{name}.{module}")


def count_symbols(
    symbols: NDArray[np.uint8], n_symbols: int, on: str = "cpu"
) -> NDArray[np.uint32]:
    """How often each symbol occurs in each column.

    ``symbols``: uint8 ``[n_rows, n_columns]``, all below ``n_symbols`` (not checked).
    Returns uint32 ``[n_columns, n_symbols]``.
    """
    _check(symbols, np.uint8, 2, "symbols")
    counts: NDArray[np.uint32] = backend(on, "symbols").count_symbols(symbols, n_symbols)
    return counts


def seen_symbols(
    matrix: NDArray[np.unsignedinteger], low_bits: int, n_symbols: int, on: str = "cpu"
) -> NDArray[np.bool_]:
    """Which values ``matrix >> low_bits`` takes, all below ``n_symbols`` (not checked).

    ``matrix``: uint8, uint16 or uint32 ``[n_rows, n_columns]``. Returns bool ``[n_symbols]``.
    """
    _check_words(matrix, "matrix")
    seen: NDArray[np.bool_] = backend(on, "symbols").seen_symbols(matrix, low_bits, n_symbols)
    return seen


def index_symbols(
    matrix: NDArray[np.unsignedinteger], low_bits: int, index_of: NDArray[np.uint8], on: str = "cpu"
) -> NDArray[np.uint8]:
    """``index_of[matrix >> low_bits]``: uint8 of ``matrix``'s shape."""
    _check_words(matrix, "matrix")
    _check(index_of, np.uint8, 1, "index_of")
    symbols: NDArray[np.uint8] = backend(on, "symbols").index_symbols(matrix, low_bits, index_of)
    return symbols


def nearest_class(
    counts: NDArray[np.uint32], lengths: NDArray[np.int32], on: str = "cpu"
) -> NDArray[np.uint8]:
    """The class whose code is shortest for each column; the first of equals.

    ``counts``: uint32 ``[n_columns, n_symbols]``; ``lengths``: int32 ``[n_classes, n_symbols]``,
    code lengths in any unit. Their products must sum to less than ``1 << 31`` (not checked).
    Returns uint8 ``[n_columns]``.
    """
    _check(counts, np.uint32, 2, "counts")
    _check(lengths, np.int32, 2, "lengths")
    labels: NDArray[np.uint8] = backend(on, "symbols").nearest_class(counts, lengths)
    return labels


def class_totals(
    counts: NDArray[np.uint32], labels: NDArray[np.uint8], n_classes: int, on: str = "cpu"
) -> NDArray[np.int64]:
    """Counts of each class: int64 ``[n_classes, n_symbols]``, rows of ``counts`` added by label."""
    _check(counts, np.uint32, 2, "counts")
    _check(labels, np.uint8, 1, "labels")
    totals: NDArray[np.int64] = backend(on, "symbols").class_totals(counts, labels, n_classes)
    return totals


def rans_encode(
    symbols: NDArray[np.uint8],
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
    lanes: int = LANES,
    on: str = "cpu",
) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """Code a matrix of symbols with one static distribution per class of columns.

    ``symbols``: uint8 ``[n_rows, n_columns]``; ``class_of_column``: uint8 ``[n_columns]``;
    ``frequencies``: uint16 ``[n_classes, n_symbols]``, every row sums to ``1 << 12`` and is
    positive wherever the class uses the symbol (not checked: an unused symbol divides by zero).

    Returns the 16-bit words of all lanes, lane after lane, in the order the decoder reads them,
    and uint32 ``[lanes]``, the number of words of each lane. A lane starts with its final encoder
    state, high word first. Range asymmetric numeral systems as in Duda, arXiv:1311.2540.

    >>> import numpy as np
    >>> symbols = np.zeros((4, 16), np.uint8)
    >>> one_class = np.zeros(16, np.uint8)
    >>> words, lengths = rans_encode(symbols, one_class, np.array([[4095, 1]], np.uint16),
    ...                              on="reference")
    >>> len(words), int(lengths.sum())
    (64, 64)
    """
    _check(symbols, np.uint8, 2, "symbols")
    _check(class_of_column, np.uint8, 1, "class_of_column")
    _check_frequencies(frequencies)
    if len(class_of_column) != symbols.shape[1]:
        raise ValueError("class_of_column needs one entry for each column of symbols")
    if not 1 <= lanes <= LANES:
        raise ValueError(f"{lanes} lanes are not between 1 and {LANES}")
    words, lengths = backend(on, "rans").rans_encode(symbols, class_of_column, frequencies, lanes)
    return words, lengths


def rans_decode(
    words: NDArray[np.uint16],
    lengths: NDArray[np.uint32],
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
    values: NDArray[np.unsignedinteger],
    out: NDArray[np.unsignedinteger],
    on: str = "cpu",
) -> bool:
    """Undo `rans_encode` and merge: ``out |= values[symbol]``.

    ``values``: ``[n_symbols]``, same dtype as ``out`` (uint8, uint16 or uint32); ``out``:
    C-contiguous ``[n_rows, n_columns]``, holding the low bits already. Any ``words`` and
    ``lengths`` that add up are safe to decode; False is returned if the lanes did not end where
    and as a genuine stream ends, and ``out`` is then rubbish.
    """
    _check(words, np.uint16, 1, "words")
    _check(lengths, np.uint32, 1, "lengths")
    _check(class_of_column, np.uint8, 1, "class_of_column")
    _check_frequencies(frequencies)
    _check_words(out, "out")
    if values.dtype != out.dtype or len(values) != frequencies.shape[1]:
        raise ValueError("values needs one entry of out's dtype for each symbol")
    if len(class_of_column) != out.shape[1]:
        raise ValueError("class_of_column needs one entry for each column of out")
    if len(class_of_column) and int(class_of_column.max()) >= len(frequencies):
        raise ValueError("class_of_column names a class without frequencies")
    if not 1 <= len(lengths) <= LANES or int(lengths.sum(dtype=np.uint64)) != len(words):
        return False
    if int(lengths.min()) < 2:
        return False
    ok: bool = backend(on, "rans").rans_decode(
        words, lengths, class_of_column, frequencies, values, out
    )
    return ok


def pack_bits(values: NDArray[np.uint8], width: int, on: str = "cpu") -> NDArray[np.uint8]:
    """Store the low ``width`` (1 to 7) bits of each value in ``width`` bytes per eight values.

    ``values``: uint8 ``[n]``, below ``1 << width``. Value ``p * n8 + j`` (``n8 = ceil(n / 8)``,
    the tail taken as zeros) for ``p < width`` sits in the low bits of byte ``p * n8 + j`` of the
    result; bit ``i`` of value ``(width + q) * n8 + j`` is bit ``width + q`` of byte
    ``i * n8 + j``. Runs of eight planes, so that both directions are vector code.

    >>> import numpy as np
    >>> pack_bits(np.array([1, 2, 3], np.uint8), 7, on="reference").tolist()
    [1, 2, 3, 0, 0, 0, 0]
    """
    _check(values, np.uint8, 1, "values")
    _check_width(width)
    packed: NDArray[np.uint8] = backend(on, "bits").pack_bits(values, width)
    return packed


def unpack_bits(
    packed: NDArray[np.uint8], width: int, n_values: int, on: str = "cpu"
) -> NDArray[np.uint8]:
    """Undo `pack_bits`: uint8 ``[n_values]`` from ``width * ceil(n_values / 8)`` bytes."""
    _check(packed, np.uint8, 1, "packed")
    _check_width(width)
    if len(packed) != packed_bytes(n_values, width):
        raise ValueError(f"{n_values} values of {width} bits do not take {len(packed)} bytes")
    values: NDArray[np.uint8] = backend(on, "bits").unpack_bits(packed, width, n_values)
    return values


def packed_bytes(n_values: int, width: int) -> int:
    """Bytes that `pack_bits` makes of ``n_values`` values."""
    return width * (-(-n_values // 8))


def _check(array: NDArray[np.generic], dtype: type, ndim: int, name: str) -> None:
    if array.dtype != dtype or array.ndim != ndim or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be a C-contiguous {ndim}-d array of {dtype.__name__}")


def _check_words(array: NDArray[np.generic], name: str) -> None:
    if array.dtype not in (np.uint8, np.uint16, np.uint32) or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be a C-contiguous array of uint8, uint16 or uint32")


def _check_frequencies(frequencies: NDArray[np.uint16]) -> None:
    _check(frequencies, np.uint16, 2, "frequencies")
    n_classes, n_symbols = frequencies.shape
    if not 1 <= n_classes <= 256 or not 1 <= n_symbols <= 256:
        raise ValueError("there must be 1 to 256 classes of 1 to 256 symbols")
    if (frequencies.sum(axis=1, dtype=np.uint32) != 1 << PROBABILITY_BITS).any():
        raise ValueError(f"frequencies of a class must sum to {1 << PROBABILITY_BITS}")


def _check_width(width: int) -> None:
    if not 1 <= width <= 7:
        raise ValueError(f"a width of {width} bits is not between 1 and 7")
