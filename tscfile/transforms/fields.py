"""Split stored rows into fields of integers, and join them again.

A float row is one field of bit patterns. A row of ggml blocks is cut into the scales, the minima
where the type has them, and the codes, because each of the three has its own distribution; see
``spec/codecs/fields.md``. Nothing is converted: joining gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType

Matrix = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Field:
    """One field of a row: ``bits`` per value, of which the low ``low_bits`` look like noise."""

    name: str
    bits: int
    low_bits: int

    @property
    def storage(self) -> np.dtype[np.unsignedinteger]:
        """Smallest unsigned integer type that holds a value."""
        return np.dtype(f"<u{1 if self.bits <= 8 else 2 if self.bits <= 16 else 4}")


# How many low bits are noise was chosen by measuring on real caches: sign, exponent and two
# mantissa bits of a key or value carry all the structure that a static distribution can use.
_F16 = Field("pattern", 16, 8)
_SCALE = Field("scale", 16, 8)
_MINIMUM = Field("minimum", 16, 8)
_FIELDS: dict[str, tuple[Field, ...]] = {
    "f16": (_F16,),
    "bf16": (Field("pattern", 16, 6),),
    "f32": (Field("pattern", 32, 22),),
    "q8_0": (_SCALE, Field("codes", 8, 0)),
    "q4_0": (_SCALE, Field("codes", 4, 0)),
    "iq4_nl": (_SCALE, Field("codes", 4, 0)),
    "q4_1": (_SCALE, _MINIMUM, Field("codes", 4, 0)),
    "q5_0": (_SCALE, Field("codes", 5, 0)),
    "q5_1": (_SCALE, _MINIMUM, Field("codes", 5, 0)),
}
_OPAQUE = (Field("bytes", 8, 0),)


def fields_of(dtype: DType) -> tuple[Field, ...]:
    """The fields of an element type, in stored order.

    >>> from tscfile.dtypes import DTYPES
    >>> [field.name for field in fields_of(DTYPES["q8_0"])]
    ['scale', 'codes']
    """
    return _FIELDS.get(dtype.name, _OPAQUE)


def n_columns(field: Field, dtype: DType, row_bytes: int) -> int:
    """Values of ``field`` in one row of ``row_bytes`` bytes."""
    if field.name in ("scale", "minimum"):
        return row_bytes // dtype.block_bytes
    return dtype.n_channels(row_bytes)


def split(rows: NDArray[np.uint8], dtype: DType) -> list[Matrix]:
    """Fields of uint8 ``[n_frames, row_bytes]``, each ``[n_frames, n_columns]``."""
    rows = np.ascontiguousarray(rows)
    fields = fields_of(dtype)
    if not dtype.is_quantized:
        return [rows.view(fields[0].storage)]
    blocks = rows.reshape(len(rows), -1, dtype.block_bytes)
    parts: list[Matrix] = []
    offset = 0
    for _ in fields[:-1]:
        parts.append(np.ascontiguousarray(blocks[:, :, offset : offset + 2]).view("<u2")[:, :, 0])
        offset += 2
    return [*parts, _codes(blocks[:, :, offset:], fields[-1].bits).reshape(len(rows), -1)]


def join(parts: list[Matrix], dtype: DType) -> NDArray[np.uint8]:
    """Rows, uint8 ``[n_frames, row_bytes]``, from their fields; of floats a view of them."""
    n_frames = len(parts[0])
    if not dtype.is_quantized:
        return parts[0].view(np.uint8)
    codes = parts[-1].reshape(n_frames, -1, dtype.block_elements)
    blocks = np.empty((*codes.shape[:2], dtype.block_bytes), np.uint8)
    offset = 0
    for part in parts[:-1]:
        blocks[:, :, offset : offset + 2] = np.ascontiguousarray(part)[:, :, None].view(np.uint8)
        offset += 2
    _store_codes(codes, fields_of(dtype)[-1].bits, blocks[:, :, offset:])
    return blocks.reshape(n_frames, -1)


def _codes(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of every block, ``[n_frames, n_blocks, 32]``: ggml packs two to a byte, 16 apart."""
    if bits == 8:
        return np.ascontiguousarray(stored)
    nibbles = stored[:, :, -16:]
    codes: NDArray[np.uint8] = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    if bits == 5:
        high = np.unpackbits(stored[:, :, :4], axis=2, bitorder="little")
        codes |= high << 4
    return codes


def _store_codes(codes: NDArray[np.uint8], bits: int, stored: NDArray[np.uint8]) -> None:
    if bits == 8:
        stored[:] = codes
        return
    stored[:, :, -16:] = codes[:, :, :16] & 15 | codes[:, :, 16:] << 4
    if bits == 5:
        stored[:, :, :4] = np.packbits(codes >> 4, axis=2, bitorder="little")
