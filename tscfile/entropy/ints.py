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

_FEW_BREAKS = 8
_SHORT = 24
"""Bytes of runs below which nothing shorter is looked for."""

_MEMORY_PER_VALUE = 12
"""Bytes that reading takes at its peak: the result and two copies of it."""

Ints = NDArray[np.int32]


def write(writer: ByteWriter, values: Ints) -> None:
    """Append the coding of int32 ``[n]``; the reader must know ``n``."""
    values = np.ascontiguousarray(values, np.int32)
    wide = values.astype(np.int64)
    steps = wide[1:] - wide[:-1]
    # Where the step changes at most of the values, runs only lose.
    breaks = np.flatnonzero(np.diff(steps)) + 1
    choices = []
    if len(breaks) <= _FEW_BREAKS + len(values) // 4:
        choices.append((_RUNS, _encode_runs(values, steps, breaks)))
    if not choices or len(choices[0][1]) > _SHORT:
        differences = np.diff(values, prepend=np.int32(0))
        choices.append((_VALUES, _encode_planes(values)))
        choices.append((_DIFFERENCES, _encode_planes(differences)))
    coding, body = min(choices, key=lambda choice: len(choice[1]))
    writer.u8(coding).uvarint(len(body)).raw(body)


def read(reader: ByteReader, n_values: int) -> Ints:
    """int32 ``[n_values]`` that `write` appended.

    A few bytes can stand for any number of values: they are claimed from the reader's allowance.

    >>> import numpy as np
    >>> writer = ByteWriter()
    >>> write(writer, np.arange(1000, dtype=np.int32))
    >>> len(writer), int(read(ByteReader(writer.bytes(), "example"), 1000)[-1])
    (6, 999)
    """
    reader.claim(_MEMORY_PER_VALUE * n_values)
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


def _encode_runs(values: Ints, steps: NDArray[np.int64], breaks: NDArray[np.intp]) -> bytes:
    """``(start, step, count)`` of each run, zigzag varints.

    ``steps``: differences of neighbours; ``breaks``: indices of values after which the step
    changes. A run goes on while the step stays the same; a value is never in two runs.
    """
    writer = ByteWriter()
    start = 0
    while start < len(values):
        step = int(steps[start]) if start < len(steps) else 0
        at = int(np.searchsorted(breaks, start, side="right"))
        stop = int(breaks[at]) + 1 if at < len(breaks) else len(values)
        writer.uvarint(_zigzag(int(values[start]))).uvarint(_zigzag(step)).uvarint(stop - start)
        start = stop
    return writer.bytes()


def _decode_runs(reader: ByteReader, n_values: int) -> Ints:
    values = np.empty(n_values, np.int32)
    filled = 0
    while reader.remaining:
        start, step = _unzigzag(reader.uvarint()), _unzigzag(reader.uvarint())
        count = reader.uvarint()
        if not 0 < count <= n_values - filled:
            raise DamagedError(f"{reader.where}: runs of integers exceed {n_values} values")
        last = start + step * (count - 1)
        if not (-(1 << 31) <= start < 1 << 31 and -(1 << 31) <= last < 1 << 31):
            raise DamagedError(f"{reader.where}: a run of integers leaves 32 bits; damaged")
        run = values[filled : filled + count].view(np.uint32)
        # Modulo 1 << 32, which the first and the last value, and so all, are within.
        run[:] = np.arange(count, dtype=np.uint32)
        run *= np.uint32(step & 0xFFFFFFFF)
        run += np.uint32(start & 0xFFFFFFFF)
        filled += count
    if filled != n_values:
        raise DamagedError(f"{reader.where}: {filled} integers where {n_values} belong; damaged")
    return values


def _encode_planes(values: Ints) -> bytes:
    planes = values.astype("<i4").view(np.uint8).reshape(-1, 4).T
    return zstd.compress(planes.tobytes(), 19)


def _decode_planes(reader: ByteReader, n_values: int) -> Ints:
    raw = zstd.decompress(reader.take(reader.remaining), 4 * n_values, reader.where)
    if len(raw) != 4 * n_values:
        raise DamagedError(f"{reader.where}: {len(raw) // 4} integers where {n_values} belong")
    planes = np.frombuffer(raw, np.uint8).reshape(4, n_values)
    return np.ascontiguousarray(planes.T).view("<i4")[:, 0].astype(np.int32, copy=False)


def _zigzag(value: int) -> int:
    return value * 2 if value >= 0 else -value * 2 - 1


def _unzigzag(value: int) -> int:
    return value >> 1 if value % 2 == 0 else -(value >> 1) - 1
