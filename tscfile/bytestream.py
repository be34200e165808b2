"""Reading and building little-endian byte strings, with every length checked first."""

from __future__ import annotations

import struct
from typing import Any

from .errors import DamagedError, TruncatedError

_CHARACTER_MEMORY = 4
"""About what a byte of text takes: one character of four bytes makes all others as wide."""


class Allowance:
    """Memory that what a file describes may take.

    A few bytes can describe a lot (a run of equal integers, a count of small items), so readers
    claim the memory before they make it.
    """

    def __init__(self, n_bytes: int) -> None:
        self.left = n_bytes

    def claim(self, n_bytes: int, where: str) -> None:
        """`DamagedError` if ``n_bytes`` are more than is left."""
        if n_bytes > self.left:
            raise DamagedError(f"{where}: describes more than a file of its size can hold; damaged")
        self.left -= n_bytes


class ByteReader:
    """Walks over a byte string; a read past its end is a `TruncatedError`.

    ``where`` names the bytes in error messages; ``allowance`` bounds what they may describe.

    >>> reader = ByteReader(b"\\x96\\x01\\x02ab", "example")
    >>> reader.uvarint(), reader.string()
    (150, 'ab')
    """

    def __init__(
        self, data: bytes | memoryview, where: str, allowance: Allowance | None = None
    ) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._allowance = allowance
        self.where = where

    @property
    def remaining(self) -> int:
        return len(self._data) - self._at

    def take(self, length: int) -> memoryview:
        if length > self.remaining:
            raise TruncatedError(
                f"{self.where}: {length} bytes wanted at {self._at}, {self.remaining} there; "
                "the file is damaged"
            )
        self._at += length
        return self._data[self._at - length : self._at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Fixed-width fields in `struct` notation, little-endian."""
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def u8(self) -> int:
        return self.take(1)[0]

    def uvarint(self, limit: int = (1 << 64) - 1) -> int:
        """Unsigned LEB128, shortest form only, at most ``limit``."""
        value = shift = 0
        while True:
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise DamagedError(f"{self.where}: a variable-length integer has no end")
        if (byte == 0 and shift) or value > limit:
            raise DamagedError(f"{self.where}: a variable-length integer is out of range")
        return value

    def svarint(self) -> int:
        """A signed integer of 64 bits: zigzag, then uvarint.

        >>> ByteReader(memoryview(bytes([3])), "here").svarint()
        -2
        """
        value = self.uvarint()
        return value >> 1 ^ -(value & 1)

    def claim(self, n_bytes: int) -> None:
        """Take memory from the allowance, if there is one; `DamagedError` if it is used up."""
        if self._allowance is not None:
            self._allowance.claim(n_bytes, self.where)

    def count(self, item_bytes: int = 1, item_memory: int = 0) -> int:
        """A count of items that take at least ``item_bytes`` bytes each from here on.

        ``item_memory`` is about what an item takes when read; it is claimed for all of them.
        """
        n = self.uvarint()
        if n * item_bytes > self.remaining:
            raise DamagedError(
                f"{self.where}: {n} items cannot lie in {self.remaining} bytes; damaged"
            )
        self.claim(n * item_memory)
        return n

    def string(self) -> str:
        raw = bytes(self.take(self.uvarint()))
        self.claim(_CHARACTER_MEMORY * len(raw))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise DamagedError(f"{self.where}: a string is not UTF-8") from None

    def end(self) -> None:
        """The bytes must be used up."""
        if self.remaining:
            raise DamagedError(f"{self.where}: {self.remaining} bytes are left over; damaged")


class ByteWriter:
    """Builds what `ByteReader` reads; every method returns the writer.

    >>> ByteWriter().uvarint(150).string("ab").bytes()
    b'\\x96\\x01\\x02ab'
    """

    def __init__(self) -> None:
        self._parts = bytearray()

    def __len__(self) -> int:
        return len(self._parts)

    def raw(self, data: bytes | memoryview | bytearray) -> ByteWriter:
        self._parts += data
        return self

    def pack(self, layout: str, *values: int | float) -> ByteWriter:
        return self.raw(struct.pack("<" + layout, *values))

    def u8(self, value: int) -> ByteWriter:
        self._parts.append(value)
        return self

    def uvarint(self, value: int) -> ByteWriter:
        if value < 0:
            raise ValueError(f"{value} is negative")
        while value > 0x7F:
            self._parts.append(value & 0x7F | 0x80)
            value >>= 7
        self._parts.append(value)
        return self

    def svarint(self, value: int) -> ByteWriter:
        return self.uvarint(value << 1 if value >= 0 else (-value << 1) - 1)

    def string(self, text: str) -> ByteWriter:
        raw = text.encode()
        return self.uvarint(len(raw)).raw(raw)

    def bytes(self) -> bytes:
        return bytes(self._parts)
