"""Chains the stages of a codec: rows of a chunk to its body, and back.

Decoding is the list of encoding read upwards: entropy coder, then fields, then rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import registry
from .bytestream import ByteReader, ByteWriter
from .container.records import MAX_CHUNK_BYTES, ChunkHeader
from .container.writer import EncodedChunk
from .dtypes import DType, dtype_from_ggml
from .errors import DamagedError, UnsupportedError
from .transforms import fields

Rows = NDArray[np.uint8]


def encode_chunk(
    rows: Sequence[Rows], dtype: DType, first_tensor: int, codec: int, quality_layer: int = 0
) -> EncodedChunk:
    """Code consecutive tensors of one element type.

    ``rows``: one uint8 ``[n_frames, row_bytes]`` for each tensor, at least one frame. Takes the
    raw codec where the one asked for makes the bytes more.
    """
    body = encode_fields(rows, dtype) if codec == registry.FIELDS_CLASSED_RANS else None
    if body is None or len(body) >= sum(part.nbytes for part in rows):
        codec, body = registry.RAW, b"".join(part.tobytes() for part in rows)
    row_bytes = tuple(part.shape[1] for part in rows)
    header = ChunkHeader(codec, quality_layer, len(rows[0]), first_tensor, dtype.ggml_id, row_bytes)
    return EncodedChunk(header, body)


def decode_chunk(
    payload: memoryview, where: str, max_raw: int = MAX_CHUNK_BYTES
) -> tuple[ChunkHeader, list[Rows]]:
    """Header and rows of a chunk, one uint8 ``[n_frames, row_bytes]`` for each tensor.

    A chunk of more than ``max_raw`` raw bytes is taken for damaged.
    """
    reader = ByteReader(payload, where)
    header = ChunkHeader.read(reader)
    if header.raw_length > max_raw:
        raise DamagedError(f"{where}: {header.raw_length} raw bytes, at most {max_raw}; damaged")
    dtype = dtype_from_ggml(header.dtype_id)
    if any(not n or n % dtype.block_bytes for n in header.row_bytes):
        raise DamagedError(f"{where}: rows are no whole number of {dtype.name} blocks; damaged")
    if header.codec == registry.RAW:
        rows = _read_raw(reader, header)
    elif header.codec == registry.FIELDS_CLASSED_RANS:
        rows = decode_fields(reader, header.n_frames, header.row_bytes, dtype)
    else:
        raise UnsupportedError(f"{where}: codec {header.codec} is not known to this build")
    reader.end()
    return header, rows


def _read_raw(reader: ByteReader, header: ChunkHeader) -> list[Rows]:
    return [
        np.frombuffer(reader.take(header.n_frames * n), np.uint8).reshape(header.n_frames, n)
        for n in header.row_bytes
    ]


def encode_fields(rows: Sequence[Rows], dtype: DType) -> bytes:
    """The streams of codec 1, one for each field of tensors of one element type."""
    from .entropy import classed_rans

    writer = ByteWriter()
    for field, matrix in zip(fields.fields_of(dtype), columns(rows, dtype), strict=True):
        coded = classed_rans.encode(matrix, field.bits, field.low_bits)
        writer.uvarint(len(coded)).raw(coded)
    return writer.bytes()


def decode_fields(
    reader: ByteReader, n_frames: int, row_bytes: Sequence[int], dtype: DType
) -> list[Rows]:
    """Undo `encode_fields`: one uint8 ``[n_frames, row_bytes]`` a tensor."""
    from .entropy import classed_rans

    matrices = [
        classed_rans.decode(
            reader.take(reader.uvarint()), field.bits, n_frames,
            sum(fields.n_columns(field, dtype, n) for n in row_bytes), field.storage, reader.where,
        )
        for field in fields.fields_of(dtype)
    ]  # fmt: skip
    return from_columns(matrices, row_bytes, dtype)


def columns(rows: Sequence[Rows], dtype: DType) -> list[NDArray[np.unsignedinteger]]:
    """One matrix for each field: the columns of the first tensor, then those of the next, …"""
    split = [fields.split(part, dtype) for part in rows]
    return [np.concatenate(parts, axis=1) for parts in zip(*split, strict=True)]


def from_columns(
    matrices: Sequence[NDArray[np.unsignedinteger]], row_bytes: Sequence[int], dtype: DType
) -> list[Rows]:
    """Undo `columns`."""
    split = []
    for field, matrix in zip(fields.fields_of(dtype), matrices, strict=True):
        widths = [fields.n_columns(field, dtype, n) for n in row_bytes]
        split.append(np.split(matrix, np.cumsum(widths)[:-1], axis=1))
    return [fields.join(list(parts), dtype) for parts in zip(*split, strict=True)]
