"""Code a matrix of integers: high bits by rANS with classed columns, low bits as they are.

Columns (channels) of a cache differ in scale and mean, so each wants a distribution of its own;
a block of 256 frames is too short to pay for one each. Columns are therefore gathered in a few
classes by the likeness of their histograms, and every class gets one table: within a few
thousandths of the cost of a table for every column, tables included.
``spec/codecs/classed-rans.md`` gives every byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import ops

from ..bytestream import ByteReader, ByteWriter
from ..errors import DamagedError
from . import classes, zstd

Matrix = NDArray[np.unsignedinteger]

_PLANE_RAW, _PLANE_ZSTD = 0, 1
_PROBE_BYTES = 1 << 15
_WORTH_ZSTD = 0.98


def encode(matrix: Matrix, bits: int, low_bits: int) -> bytes:
    """Code ``[n_rows, n_columns]`` of ``bits``-bit integers, of which ``low_bits`` are noise.

    The matrix is uint8, uint16 or uint32 and not empty. The result is never larger than the bits
    themselves plus 32 bytes: where rANS gains nothing, all bits are taken as low bits.
    """
    symbols = _symbols(matrix, bits, low_bits)
    coded = None
    if symbols is not None:
        coded = _encode_symbols(symbols)
        if len(coded) >= symbols.size * (bits - symbols.low_bits) / 8:
            coded = None
    low_bits = symbols.low_bits if symbols is not None and coded is not None else bits
    writer = ByteWriter().u8(low_bits)
    _write_low_bits(writer, matrix, low_bits)
    return writer.raw(coded or b"").bytes()


def decode(
    data: memoryview, bits: int, n_rows: int, n_columns: int, dtype: np.dtype, where: str
) -> Matrix:
    """Undo `encode`: a ``dtype`` matrix ``[n_rows, n_columns]``; `DamagedError` on nonsense."""
    reader = ByteReader(data, where)
    low_bits = reader.u8()
    if low_bits > bits:
        raise DamagedError(f"{where}: {low_bits} low bits in a field of {bits}; damaged")
    out = _read_low_bits(reader, low_bits, n_rows, n_columns, dtype)
    if low_bits < bits:
        _decode_symbols(reader, bits, low_bits, out)
    reader.end()
    return out


# --- low bits ---------------------------------------------------------------------------------


def _write_low_bits(writer: ByteWriter, matrix: Matrix, low_bits: int) -> None:
    """Whole bytes as planes from the lowest up, then the remaining bits packed."""
    n_planes, width = divmod(low_bits, 8)
    for plane in range(n_planes):
        _write_plane(writer, (matrix >> (8 * plane)).astype(np.uint8))
    if width:
        rest = (matrix >> (8 * n_planes)).astype(np.uint8) & np.uint8((1 << width) - 1)
        _write_plane(writer, ops.pack_bits(rest.reshape(-1), width))


def _write_plane(writer: ByteWriter, plane: NDArray[np.uint8]) -> None:
    raw = plane.tobytes()
    # Noise is the rule; look at a part before paying for the whole.
    probe = raw[:_PROBE_BYTES]
    if len(zstd.compress(probe, 1)) < _WORTH_ZSTD * len(probe):
        packed = zstd.compress(raw)
        if len(packed) < _WORTH_ZSTD * len(raw):
            writer.u8(_PLANE_ZSTD).uvarint(len(packed)).raw(packed)
            return
    writer.u8(_PLANE_RAW).raw(raw)


def _read_low_bits(
    reader: ByteReader, low_bits: int, n_rows: int, n_columns: int, dtype: np.dtype
) -> Matrix:
    n_values = n_rows * n_columns
    n_planes, width = divmod(low_bits, 8)
    parts = [_read_plane(reader, n_values) for _ in range(n_planes)]
    if width:
        packed = _read_plane(reader, ops.packed_bytes(n_values, width))
        parts.append(ops.unpack_bits(packed, width, n_values))
    # A copy even of a single plane: the symbols are merged into it.
    out: Matrix = parts[0].astype(dtype) if parts else np.zeros(n_values, dtype)
    for i, part in enumerate(parts[1:], 1):
        out |= part.astype(dtype) << dtype.type(8 * i)
    return out.reshape(n_rows, n_columns)


def _read_plane(reader: ByteReader, n_bytes: int) -> NDArray[np.uint8]:
    coding = reader.u8()
    if coding == _PLANE_RAW:
        return np.frombuffer(reader.take(n_bytes), np.uint8)
    if coding != _PLANE_ZSTD:
        raise DamagedError(f"{reader.where}: a plane is coded in an unknown way ({coding})")
    content = zstd.decompress(reader.take(reader.uvarint()), n_bytes, reader.where)
    if len(content) != n_bytes:
        raise DamagedError(f"{reader.where}: a plane holds {len(content)} bytes, not {n_bytes}")
    return np.frombuffer(content, np.uint8)


# --- high bits --------------------------------------------------------------------------------


class _Symbols:
    """High bits of a matrix as indices into the sorted alphabet of those that occur."""

    def __init__(self, indices: NDArray[np.uint8], alphabet: NDArray[np.int64], low_bits: int):
        self.indices = indices
        self.alphabet = alphabet
        self.low_bits = low_bits
        self.size = indices.size


def _symbols(matrix: Matrix, bits: int, low_bits: int) -> _Symbols | None:
    """None if there would be no low bits left to leave out, so nothing is to be coded."""
    low_bits = max(low_bits, bits - 16)
    # Coding sees 256 different symbols at most; give up low bits until no more occur.
    while low_bits < bits:
        seen = ops.seen_symbols(matrix, low_bits, 1 << (bits - low_bits))
        alphabet = np.flatnonzero(seen)
        if len(alphabet) <= 256:
            index_of = np.zeros(len(seen), np.uint8)
            index_of[alphabet] = np.arange(len(alphabet), dtype=np.uint8)
            return _Symbols(ops.index_symbols(matrix, low_bits, index_of), alphabet, low_bits)
        low_bits += 1
    return None


def _encode_symbols(symbols: _Symbols) -> bytes:
    counts = ops.count_symbols(symbols.indices, len(symbols.alphabet))
    class_of_column, frequencies = classes.choose(counts)
    words, lengths = ops.rans_encode(symbols.indices, class_of_column, frequencies)
    tables = ByteWriter().uvarint(len(symbols.alphabet))
    tables.raw(symbols.alphabet.astype("<u2").tobytes())
    tables.uvarint(len(frequencies)).raw(class_of_column.tobytes())
    # Low and high bytes apart: nearly all high bytes are zero.
    tables.raw((frequencies & 0xFF).astype(np.uint8).tobytes())
    tables.raw((frequencies >> 8).astype(np.uint8).tobytes())
    packed = zstd.compress(tables.bytes())
    writer = ByteWriter().uvarint(len(packed)).raw(packed)
    writer.raw(lengths.astype("<u4").tobytes())
    return writer.raw(words.astype("<u2").tobytes()).bytes()


def _decode_symbols(reader: ByteReader, bits: int, low_bits: int, out: Matrix) -> None:
    alphabet, class_of_column, frequencies = _read_tables(reader, bits - low_bits, out.shape[1])
    lengths = np.frombuffer(reader.take(4 * ops.LANES), "<u4").astype(np.uint32)
    words = np.frombuffer(reader.take(2 * int(lengths.sum(dtype=np.uint64))), "<u2")
    values = (alphabet << low_bits).astype(out.dtype)
    words = np.ascontiguousarray(words, np.uint16)
    if not ops.rans_decode(words, lengths, class_of_column, frequencies, values, out):
        raise DamagedError(f"{reader.where}: an entropy-coded lane does not end as it should")


def _read_tables(
    reader: ByteReader, symbol_bits: int, n_columns: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint16]]:
    packed = reader.take(reader.uvarint())
    limit = 4 + 2 * 256 + n_columns + 256 * 256 * 2
    tables = ByteReader(zstd.decompress(packed, limit, reader.where), reader.where)
    n_symbols = tables.uvarint(limit=256)
    alphabet = np.frombuffer(tables.take(2 * n_symbols), "<u2").astype(np.int64)
    if not n_symbols or (np.diff(alphabet) <= 0).any() or alphabet[-1] >> symbol_bits:
        raise DamagedError(f"{reader.where}: the alphabet is not rising {symbol_bits}-bit values")
    n_classes = tables.uvarint(limit=256)
    class_of_column = np.frombuffer(tables.take(n_columns), np.uint8)
    low, high = (np.frombuffer(tables.take(n_classes * n_symbols), np.uint8) for _ in range(2))
    tables.end()
    wide: NDArray[np.uint16] = low | high.astype(np.uint16) << np.uint16(8)
    frequencies = wide.reshape(n_classes, n_symbols)
    if not n_classes or int(class_of_column.max(initial=0)) >= n_classes:
        raise DamagedError(f"{reader.where}: a column names a class that has no table; damaged")
    if (frequencies.sum(axis=1, dtype=np.uint32) != 1 << ops.PROBABILITY_BITS).any():
        raise DamagedError(f"{reader.where}: frequencies of a class do not add up; damaged")
    return alphabet, class_of_column, frequencies
