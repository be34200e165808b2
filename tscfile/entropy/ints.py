"""Arrays of 32-bit integers (token ids, positions, sequence ids) in few bytes.

Three codings, the shortest is taken: runs of equal steps (positions of a plain conversation are
one run), byte planes of the values, byte planes of the differences. See ``spec/codecs/ints.md``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..bytestream import ByteReader, ByteWriter
from ..errors import DamagedError
from . import zstd

_RUNS, _VALUES, _DIFFERENCES = range(3)

Ints = NDArray[np.int32]


def write(writer: ByteWriter, values: Ints) -> None:
    """Append the coding of int32 ``[n]``; the reader must know ``n``."""
    values = np.ascontiguousarray(values, np.int32)
    runs = _encode_runs(values)
    best = (_RUNS, runs)
    if len(runs) > 24:
        differences = np.diff(values, prepend=np.int32(0))
        for coding, numbers in ((_VALUES, values), (_DIFFERENCES, differences)):
            planes = _encode_planes(numbers)
            if len(planes) < len(best[1]):
                best = (coding, planes)
    writer.u8(best[0]).uvarint(len(best[1])).raw(best[1])


def read(reader: ByteReader, n_values: int) -> Ints:
    """int32 ``[n_values]`` that `write` appended.

    The caller answers for ``n_values``: it must be justified by something other than a claim.

    >>> import numpy as np
    >>> writer = ByteWriter()
    >>> write(writer, np.arange(1000, dtype=np.int32))
    >>> len(writer), int(read(ByteReader(writer.bytes(), "example"), 1000)[-1])
    (6, 999)
    """
    coding = reader.u8()
    body = ByteReader(reader.take(reader.uvarint()), reader.where)
    if coding == _RUNS:
        return _decode_runs(body, n_values)
    if coding not in (_VALUES, _DIFFERENCES):
        raise DamagedError(f"{reader.where}: integers are coded in an unknown way ({coding})")
    values = _decode_planes(body, n_values)
    if coding == _DIFFERENCES:
        values = np.cumsum(values, dtype=np.int32)
    return values


def _encode_runs(values: Ints) -> bytes:
    """``(start, step, count)`` of each run, zigzag varints; gives up early where runs are short."""
    writer = ByteWriter()
    steps = np.diff(values.astype(np.int64))
    # A run goes on while the step stays the same; a value is never in two runs.
    breaks = np.flatnonzero(np.diff(steps)) + 1
    start, give_up = 0, 4 * len(values) + 16
    while start < len(values) and len(writer) < give_up:
        step = int(steps[start]) if start < len(steps) else 0
        after = breaks[np.searchsorted(breaks, start, side="right") :]
        # Values after the last one with this step begin the next run.
        stop = int(after[0]) + 1 if len(after) else len(values)
        writer.uvarint(_zigzag(int(values[start]))).uvarint(_zigzag(step)).uvarint(stop - start)
        start = stop
    return writer.bytes()


def _decode_runs(reader: ByteReader, n_values: int) -> Ints:
    values = np.empty(n_values, np.int64)
    filled = 0
    while reader.remaining:
        start, step = _unzigzag(reader.uvarint()), _unzigzag(reader.uvarint())
        count = reader.uvarint()
        if not 0 < count <= n_values - filled:
            raise DamagedError(f"{reader.where}: runs of integers exceed {n_values} values; damaged")
        last = start + step * (count - 1)
        if not (-(1 << 31) <= start < 1 << 31 and -(1 << 31) <= last < 1 << 31):
            raise DamagedError(f"{reader.where}: a run of integers leaves 32 bits; damaged")
        values[filled : filled + count] = start + step * np.arange(count, dtype=np.int64)
        filled += count
    if filled != n_values:
        raise DamagedError(f"{reader.where}: {filled} integers where {n_values} belong; damaged")
    return values.astype(np.int32)


def _encode_planes(values: Ints) -> bytes:
    planes = values.astype("<i4").view(np.uint8).reshape(-1, 4).T
    return zstd.compress(planes.tobytes(), 19)


def _decode_planes(reader: ByteReader, n_values: int) -> Ints:
    raw = zstd.decompress(reader.take(reader.remaining), 4 * n_values, reader.where)
    if len(raw) != 4 * n_values:
        raise DamagedError(f"{reader.where}: {len(raw) // 4} integers where {n_values} belong")
    planes = np.frombuffer(raw, np.uint8).reshape(4, n_values)
    return np.ascontiguousarray(planes.T).view("<i4")[:, 0].astype(np.int32)


def _zigzag(value: int) -> int:
    return value * 2 if value >= 0 else -value * 2 - 1


def _unzigzag(value: int) -> int:
    return value >> 1 if value % 2 == 0 else -(value >> 1) - 1
