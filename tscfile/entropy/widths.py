"""Integers in columns of known width, as a compact rANS stream with tables that need no learning.

The *width* of a column is its standard deviation in quarter octaves from 1/8 on, counted from 1;
0 says that the column is zero and not stored. Up to `N_CLASSES` it names the table that codes the
column; beyond, low bits are stored as they are until what is left is that narrow.
``spec/codecs/session-transform.md`` gives every byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import ops

from ..bytestream import ByteReader, ByteWriter
from ..errors import DamagedError
from . import ladder, zstd
from .width_tables import FREQUENCIES

N_CLASSES = len(FREQUENCIES)
WIDTHS_PER_OCTAVE = 4
LARGEST_WIDTH = 112
"""As many as 23 low bits: no value that such a column may hold leaves 32 bits but by an escape."""

_SYMBOLS_PER_LANE = 4096
_LENGTHS = (12 - np.log2(FREQUENCIES.astype(np.float64))).astype(np.float32)

Ints = NDArray[np.int32]
Widths = NDArray[np.uint8]


def classes_of(widths: Widths) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Table and number of low bits of columns that are stored, each ``[C]``.

    >>> [part.tolist() for part in classes_of(np.array([1, 20, 21, 24, 25], np.uint8))]
    [[0, 19, 16, 19, 16], [0, 0, 1, 1, 2]]
    """
    wide = widths.astype(np.int64)
    low_bits = np.maximum(0, -(-(wide - N_CLASSES) // WIDTHS_PER_OCTAVE))
    return (wide - 1 - WIDTHS_PER_OCTAVE * low_bits).astype(np.uint8), low_bits


def choose(values: Ints) -> tuple[Widths, NDArray[np.float32]]:
    """The width that codes each column of ``[n, C]`` shortest, and the bits that takes, ``[C]``."""
    n, n_columns = values.shape
    widths = np.zeros(n_columns, np.uint8)
    bits = np.zeros(n_columns, np.float32)
    largest = np.abs(values).max(axis=0, initial=0)
    columns = np.flatnonzero(largest)
    bits[columns] = np.inf
    low_bits = 0
    while len(columns) and N_CLASSES + WIDTHS_PER_OCTAVE * low_bits <= LARGEST_WIDTH:
        high = (values[:, columns] + ((1 << low_bits) >> 1)) >> low_bits
        symbols = ladder.to_symbols(high)[0]
        counts = ops.count_symbols(symbols, ladder.N_SYMBOLS).astype(np.float32)
        first = 0 if not low_bits else N_CLASSES - WIDTHS_PER_OCTAVE
        escaped = np.where(symbols == ladder.ESCAPE, np.abs(high).astype(np.float32), 0)
        # Zigzag varints of seven bits a byte.
        extra = 8 * np.ceil(np.log2(2 * escaped + 1) / 7).sum(axis=0, dtype=np.float32)
        costs = counts @ _LENGTHS[first:].T + (extra + np.float32(n * low_bits))[:, None]
        best = costs.argmin(axis=1)
        cost = costs[np.arange(len(columns)), best]
        better = cost < bits[columns]
        chosen = columns[better]
        bits[chosen] = cost[better]
        widths[chosen] = best[better] + first + 1 + WIDTHS_PER_OCTAVE * low_bits
        low_bits += 1
        columns = columns[largest[columns] >> low_bits >= 2]
    return widths, bits


def write_widths(writer: ByteWriter, widths: Widths) -> None:
    """Append ``[C]``; zeros at the end take no bytes."""
    n = int(np.flatnonzero(widths)[-1]) + 1 if widths.any() else 0
    writer.uvarint(n)
    if n:
        packed = zstd.compress(np.diff(widths[:n], prepend=np.uint8(0)).tobytes(), 19)
        writer.uvarint(len(packed)).raw(packed)


def read_widths(reader: ByteReader, n_columns: int) -> Widths:
    """uint8 ``[n_columns]`` that `write_widths` appended."""
    n = reader.uvarint(limit=n_columns)
    widths = np.zeros(n_columns, np.uint8)
    if n:
        raw = zstd.decompress(reader.take(reader.uvarint()), n, reader.where)
        if len(raw) != n:
            raise DamagedError(f"{reader.where}: {len(raw)} widths where {n} belong; damaged")
        widths[:n] = np.cumsum(np.frombuffer(raw, np.uint8), dtype=np.uint8)
        if int(widths.max()) > LARGEST_WIDTH:
            raise DamagedError(f"{reader.where}: a column is too wide; damaged")
    return widths


def finer(widths: Widths, shift: int) -> Widths:
    """Widths of the same columns where the step is ``shift`` quarter octaves finer."""
    return np.where(widths, np.minimum(widths.astype(int) + shift, LARGEST_WIDTH), 0).astype(
        np.uint8
    )


def encode(writer: ByteWriter, values: Ints, widths: Widths) -> None:
    """Append int32 ``[n, C]``; columns of width 0 must be zero."""
    used = np.flatnonzero(widths)
    if not len(used) or not len(values):
        return
    classes, low_bits = classes_of(widths[used])
    shifted = values[:, used].astype(np.int64) + ((1 << low_bits) >> 1)
    high = shifted >> low_bits
    symbols, escaped = ladder.to_symbols(high)
    lanes = int(np.clip(symbols.size // _SYMBOLS_PER_LANE, 1, ops.LANES))
    words, lengths = ops.rans_encode(symbols, classes, FREQUENCIES, lanes)
    writer.uvarint(lanes)
    for length in lengths.tolist():
        writer.uvarint(length)
    writer.raw(words.astype("<u2").tobytes())
    planes = [
        (shifted[:, low_bits > bit] >> bit & 1).astype(np.uint8).ravel()
        for bit in range(int(low_bits.max()))
    ]
    if planes:
        writer.raw(np.packbits(np.concatenate(planes), bitorder="little").tobytes())
    for value in escaped.tolist():
        writer.uvarint(2 * value if value >= 0 else -2 * value - 1)


def decode(reader: ByteReader, n_rows: int, widths: Widths) -> Ints:
    """Undo `encode`: int32 ``[n_rows, C]``; `DamagedError` on nonsense."""
    values = np.zeros((n_rows, len(widths)), np.int32)
    used = np.flatnonzero(widths)
    if not len(used) or not n_rows:
        return values
    classes, low_bits = classes_of(widths[used])
    symbols = np.zeros((n_rows, len(used)), np.uint8)
    lanes = reader.uvarint(limit=ops.LANES)
    lengths = np.array([reader.uvarint(limit=symbols.size + 2) for _ in range(lanes)], np.uint32)
    words = np.frombuffer(reader.take(2 * int(lengths.sum(dtype=np.uint64))), "<u2")
    numbers = np.arange(ladder.N_SYMBOLS, dtype=np.uint8)
    if not ops.rans_decode(
        words.astype(np.uint16), lengths, classes, FREQUENCIES, numbers, symbols
    ):
        raise DamagedError(f"{reader.where}: an entropy-coded lane does not end as it should")
    n_wide = [int((low_bits > bit).sum()) for bit in range(int(low_bits.max()))]
    n_bits = n_rows * sum(n_wide)
    packed = np.frombuffer(reader.take(-(-n_bits // 8)), np.uint8)
    low = np.unpackbits(packed, count=n_bits, bitorder="little")
    n_escaped = int((symbols == ladder.ESCAPE).sum())
    if n_escaped > reader.remaining:
        raise DamagedError(f"{reader.where}: escaped values are missing; damaged")
    coded = np.array([reader.uvarint(limit=(1 << 32) - 1) for _ in range(n_escaped)], np.int64)
    high = ladder.from_symbols(symbols, ((coded >> 1) ^ -(coded & 1)).astype(np.int32))
    wide = (high.astype(np.int64) << low_bits) - ((1 << low_bits) >> 1)
    at = 0
    for bit, n in enumerate(n_wide):
        plane = low[at : at + n_rows * n].reshape(n_rows, n).astype(np.int64)
        wide[:, low_bits > bit] += plane << bit
        at += n_rows * n
    if wide.min() < -(1 << 31) or wide.max() >= 1 << 31:
        raise DamagedError(f"{reader.where}: an integer leaves 32 bits; damaged")
    values[:, used] = wide
    return values
