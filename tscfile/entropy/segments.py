"""Integer coefficients of a run of frames that share one step, as a compact rANS stream.

    uvarint n_frames · i16 log_step · uvarint n_lanes · n_lanes x uvarint words of the lane ·
    words · escaped values as zigzag varints

Coefficients that are too narrow for the step are left out, those left are coded with the table of
their class (`ladder`). ``spec/codecs/segments.md`` gives every byte.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import ops

from ..bytestream import ByteReader, ByteWriter
from ..errors import DamagedError
from . import ladder

_BYTES_PER_LANE = 768


def encode(
    writer: ByteWriter, values: NDArray[np.int32], log_step: int,
    classes: NDArray[np.int64], frequencies: NDArray[np.uint16],
) -> None:  # fmt: skip
    """Append int32 ``[n, U]``, the coefficients that are stored at this step.

    ``classes``: int64 ``[U]``, the class of each (`ladder`).
    """
    writer.uvarint(len(values)).pack("h", log_step)
    write_values(writer, values, classes, frequencies)


def write_values(
    writer: ByteWriter, values: NDArray[np.int32], classes: NDArray[np.int64],
    frequencies: NDArray[np.uint16],
) -> None:  # fmt: skip
    """Append int32 ``[n, U]`` with the classes int64 ``[U]`` of its columns."""
    symbols, escaped = ladder.to_symbols(values)
    if symbols.size:
        column_classes = classes.astype(np.uint8)
        guess = ops.rans_encode(symbols, column_classes, frequencies, 1)[0].nbytes
        lanes = int(np.clip(guess // _BYTES_PER_LANE, 1, ops.LANES))
        words, lengths = ops.rans_encode(symbols, column_classes, frequencies, lanes)
        writer.uvarint(lanes)
        for length in lengths.tolist():
            writer.uvarint(length)
        writer.raw(words.astype("<u2").tobytes())
    for value in escaped.tolist():
        writer.uvarint(2 * value if value >= 0 else -2 * value - 1)


def decode(
    reader: ByteReader, log_sigmas: NDArray[np.int16], frequencies: NDArray[np.uint16],
    max_frames: int,
) -> tuple[int, NDArray[np.int32]]:  # fmt: skip
    """The next segment's ``log_step`` and int32 ``[n, U]``: the coefficients that have a class at
    this step, in ascending order. `DamagedError` for a segment that is none."""
    n_frames = reader.uvarint(limit=max_frames)
    if not n_frames:
        raise DamagedError(f"{reader.where}: a segment without frames; damaged")
    (log_step,) = reader.unpack("h")
    classes = ladder.class_of(log_sigmas, log_step)
    return log_step, read_values(reader, n_frames, classes[classes >= 0], frequencies)


def read_values(
    reader: ByteReader, n_rows: int, classes: NDArray[np.int64], frequencies: NDArray[np.uint16]
) -> NDArray[np.int32]:
    """Undo `write_values`: int32 ``[n_rows, len(classes)]``."""
    column_classes = classes.astype(np.uint8)
    symbols = np.zeros((n_rows, len(column_classes)), np.uint8)
    if not symbols.size:
        return symbols.astype(np.int32)
    lanes = reader.uvarint(limit=ops.LANES)
    lengths = np.array([reader.uvarint(limit=symbols.size + 2) for _ in range(lanes)], np.uint32)
    raw = reader.take(2 * int(lengths.sum(dtype=np.uint64)))
    words = np.frombuffer(raw, "<u2").astype(np.uint16)
    numbers = np.arange(ladder.N_SYMBOLS, dtype=np.uint8)
    if not ops.rans_decode(words, lengths, column_classes, frequencies, numbers, symbols):
        raise DamagedError(f"{reader.where}: an entropy-coded lane does not end as it should")
    n_escaped = int((symbols == ladder.ESCAPE).sum())
    escaped = np.fromiter(_escapes(reader, n_escaped), np.int32, n_escaped)
    return ladder.from_symbols(symbols, escaped)


def _escapes(reader: ByteReader, count: int) -> Iterator[int]:
    for _ in range(count):
        coded = reader.uvarint(limit=(1 << 32) - 1)
        yield coded >> 1 if coded % 2 == 0 else -(coded >> 1) - 1
