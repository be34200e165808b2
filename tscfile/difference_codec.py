"""Exact coding of frames as the difference to other frames of the same tensors.

A context shift turns keys and leaves values; another batch size changes the last bits of some
rows. Such frames are nearly those that the archive has: *base rows*, which the caller gives. The
body of a chunk says how keys are turned first and, for each tensor, whether its rows are those
predicted, differences to them, or coded by themselves. ``spec/codecs/difference.md`` gives every
byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from . import pipeline, registry
from .bytestream import ByteReader, ByteWriter
from .container.records import ChunkHeader
from .container.writer import EncodedChunk
from .dtypes import DType
from .entropy import classed_rans
from .errors import DamagedError
from .model import TensorSpec
from .transforms import fields
from .transforms.fields import Field
from .transforms.turning import Turn, read_turn, turn_rows, write_turn

Rows = NDArray[np.uint8]
Matrix = NDArray[np.unsignedinteger]

SAME, DIFFERENCES, ALONE = range(3)
"""Modes of a tensor: the prediction itself, differences to it, coded as codec 1 codes."""

_GOOD_RATIO = 8
"""Differences that are so much smaller than the rows are taken without trying anything else."""

ESCAPE = 255
"""From here on a difference of a field of more than 8 bits is stored on its own."""


def encode_chunk(
    rows: Sequence[Rows], base: Sequence[Rows], tensors: Sequence[TensorSpec],
    turn: Turn | None = None, quality_layer: int = 0,
) -> EncodedChunk:  # fmt: skip
    """All tensors of a track; see `encode`. The header names the type of the first one."""
    header = ChunkHeader(
        registry.DIFFERENCE, quality_layer, len(rows[0]), 0, tensors[0].dtype.ggml_id,
        tuple(part.shape[1] for part in rows),
    )  # fmt: skip
    return EncodedChunk(header, encode(rows, base, tensors, turn))


def encode(
    rows: Sequence[Rows], base: Sequence[Rows], tensors: Sequence[TensorSpec],
    turn: Turn | None = None,
) -> bytes:  # fmt: skip
    """The body of a chunk of ``rows``, given ``base``: uint8 ``[n, row_bytes]`` a tensor, n > 0.

    ``turn`` is what turns the keys of ``base`` into those of ``rows``, or nearly.

    >>> from tscfile.dtypes import DTYPES
    >>> rows, spec = [np.zeros((4, 64), np.uint8)], TensorSpec(0, "v", DTYPES["f16"], 64)
    >>> encode(rows, rows, [spec])
    b'\\x00\\x01\\x00'
    """
    predicted = predict(base, tensors, turn)
    modes = [
        SAME if np.array_equal(part, guess) else DIFFERENCES
        for part, guess in zip(rows, predicted, strict=True)
    ]
    streams = bytearray()
    for members in _groups(modes, tensors):
        dtype = tensors[members[0]].dtype
        own = [rows[i] for i in members]
        coded = _encode_differences(own, [predicted[i] for i in members], dtype)
        if len(coded) * _GOOD_RATIO > sum(part.nbytes for part in own):
            alone = pipeline.encode_fields(own, dtype)
            if len(alone) <= len(coded):
                coded = alone
                for i in members:
                    modes[i] = ALONE
        streams += coded
    if turn is not None and not any(
        mode != ALONE and turn.takes(tensor) for mode, tensor in zip(modes, tensors, strict=True)
    ):
        turn = None
    writer = ByteWriter()
    write_turn(writer, turn)
    for mode, run in groupby(modes):
        writer.uvarint(len(list(run))).u8(mode)
    return writer.raw(streams).bytes()


def decode(
    body: ByteReader, base: Sequence[Rows], tensors: Sequence[TensorSpec]
) -> list[Rows]:  # fmt: skip
    """Undo `encode`: one uint8 ``[n, row_bytes]`` a tensor; `DamagedError` if the bytes are none.

    ``base``: one for each of ``tensors``, of their row lengths and one number of frames, which the
    caller has checked. The body is read to its end.
    """
    turn = read_turn(body)
    modes = _read_modes(body, len(tensors))
    guessing = [i for i, mode in enumerate(modes) if mode != ALONE]
    predicted = predict([base[i] for i in guessing], [tensors[i] for i in guessing], turn)
    out: list[Rows] = list(base)
    for i, guess in zip(guessing, predicted, strict=True):
        out[i] = guess
    for members in _groups(modes, tensors):
        own = [out[i] for i in members]
        dtype = tensors[members[0]].dtype
        if modes[members[0]] == ALONE:
            row_bytes = [part.shape[1] for part in own]
            found = pipeline.decode_fields(body, len(own[0]), row_bytes, dtype)
        else:
            found = _decode_differences(body, own, dtype)
        for i, part in zip(members, found, strict=True):
            out[i] = part
    body.end()
    return out


def predict(base: Sequence[Rows], tensors: Sequence[TensorSpec], turn: Turn | None) -> list[Rows]:
    """What rows are expected to be: those of ``base``, keys turned."""
    return [
        turn_rows(part, tensor.dtype, turn) if turn is not None and turn.takes(tensor) else part
        for part, tensor in zip(base, tensors, strict=True)
    ]


def _groups(modes: Sequence[int], tensors: Sequence[TensorSpec]) -> list[list[int]]:
    """Tensors that share streams: of one mode that has streams, one role and one element type, the
    groups in the order of their first tensors."""
    groups: dict[tuple[int, str, int], list[int]] = {}
    for i, (mode, tensor) in enumerate(zip(modes, tensors, strict=True)):
        if mode != SAME:
            groups.setdefault((mode, tensor.role, tensor.dtype.ggml_id), []).append(i)
    return list(groups.values())


def _read_modes(reader: ByteReader, n_tensors: int) -> list[int]:
    modes: list[int] = []
    while len(modes) < n_tensors:
        count, mode = reader.uvarint(limit=n_tensors - len(modes)), reader.u8()
        if not count or mode > ALONE:
            raise DamagedError(f"{reader.where}: a run of tensors of no known mode; damaged")
        modes += count * [mode]
    return modes


# --- streams ----------------------------------------------------------------------------------


def _encode_differences(rows: Sequence[Rows], base: Sequence[Rows], dtype: DType) -> bytes:
    writer = ByteWriter()
    pairs = zip(pipeline.columns(rows, dtype), pipeline.columns(base, dtype), strict=True)
    for field, (matrix, guess) in zip(fields.fields_of(dtype), pairs, strict=True):
        apart = _zigzag(_rank(matrix, field) - _rank(guess, field), field.bits)
        small = np.minimum(apart, ESCAPE).astype(np.uint8)
        bits = min(field.bits, 8)
        # Few differences are cheaper as bytes for zstd, which needs no tables.
        choices = [classed_rans.encode(small, bits, low_bits) for low_bits in (0, bits)]
        _write_stream(writer, min(choices, key=len))
        if field.bits > 8 and (small == ESCAPE).any():
            far = np.ascontiguousarray(apart[small == ESCAPE][:, None])
            _write_stream(writer, classed_rans.encode(far, field.bits, field.bits - 8))
    return writer.bytes()


def _decode_differences(reader: ByteReader, base: Sequence[Rows], dtype: DType) -> list[Rows]:
    matrices = []
    for field, guess in zip(fields.fields_of(dtype), pipeline.columns(base, dtype), strict=True):
        n_rows, n_columns = guess.shape
        small = classed_rans.decode(
            reader.take(reader.uvarint()), min(field.bits, 8), n_rows, n_columns,
            np.dtype(np.uint8), reader.where,
        )  # fmt: skip
        apart = small.astype(field.storage)
        escapes = small == ESCAPE
        if field.bits > 8 and escapes.any():
            apart[escapes] = classed_rans.decode(
                reader.take(reader.uvarint()), field.bits, int(escapes.sum()), 1, field.storage,
                reader.where,
            )[:, 0]  # fmt: skip
        mask = field.storage.type((1 << field.bits) - 1)
        ranks = (_rank(guess, field) + _unzigzag(apart, field.bits)) & mask
        matrices.append(_unrank(ranks, field))
    return pipeline.from_columns(matrices, [part.shape[1] for part in base], dtype)


def _write_stream(writer: ByteWriter, coded: bytes) -> None:
    writer.uvarint(len(coded)).raw(coded)


# --- differences ------------------------------------------------------------------------------


def _rank(matrix: Matrix, field: Field) -> Matrix:
    """Patterns of floats as integers in the order of the numbers; other fields as they are."""
    if field.name != "pattern":
        return matrix
    sign = matrix.dtype.type(1 << (field.bits - 1))
    return np.where(matrix & sign, ~matrix, matrix | sign)


def _unrank(ranks: Matrix, field: Field) -> Matrix:
    if field.name != "pattern":
        return ranks
    sign = ranks.dtype.type(1 << (field.bits - 1))
    return np.where(ranks & sign, ranks ^ sign, ~ranks)


def _zigzag(apart: Matrix, bits: int) -> Matrix:
    """Differences modulo 2^bits as integers that are small on both sides of zero.

    >>> _zigzag(np.array([0, 15, 1, 8], np.uint8), 4).tolist()
    [0, 1, 2, 15]
    """
    kind = apart.dtype.type
    mask = kind((1 << bits) - 1)
    apart = apart & mask
    signs = apart >> kind(bits - 1)
    return ((apart << kind(1)) ^ (kind(0) - signs)) & mask


def _unzigzag(values: Matrix, bits: int) -> Matrix:
    kind = values.dtype.type
    return (values >> kind(1)) ^ (kind(0) - (values & kind(1)))
