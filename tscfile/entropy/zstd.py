"""zstd behind one door: bounded decompression of byte strings."""

from __future__ import annotations

import struct
from functools import partial

import zstandard

from ..errors import DamagedError

LEVEL = 12


def compress(
    data: bytes | memoryview, level: int = LEVEL, dictionary: bytes | memoryview = b""
) -> bytes:
    """One zstd frame that states its content size; ``dictionary`` is taken to stand before it."""
    made = zstandard.ZstdCompressor(level=level, dict_data=_raw(dictionary))
    return made.compress(data)


def store(data: bytes) -> bytes:
    """One zstd frame that states its content size and holds the content as it is.

    >>> decompress(store(b"abc"), 3, "example")
    b'abc'
    """
    # RFC 8878: magic, descriptor (single segment, size of 8 bytes), size, blocks of type raw.
    frame = bytearray(struct.pack("<IBQ", zstandard.MAGIC_NUMBER, 0xE0, len(data)))
    for at in range(0, max(len(data), 1), zstandard.BLOCKSIZE_MAX):
        block = data[at : at + zstandard.BLOCKSIZE_MAX]
        is_last = at + len(block) == len(data)
        frame += (len(block) << 3 | is_last).to_bytes(3, "little") + block
    return bytes(frame)


def _raw(dictionary: bytes | memoryview) -> zstandard.ZstdCompressionDict | None:
    if not dictionary:
        return None
    raw = zstandard.DICT_TYPE_RAWCONTENT
    return zstandard.ZstdCompressionDict(bytes(dictionary), dict_type=raw)


def decompress(
    data: bytes | memoryview, limit: int, where: str, dictionary: bytes | memoryview = b""
) -> bytes:
    """Content of one zstd frame; `DamagedError` if it is broken or larger than ``limit`` bytes.

    The frame's stated size is checked before anything is allocated.
    """
    broken = partial(DamagedError, f"{where}: zstd frame is damaged")
    try:
        size = zstandard.frame_content_size(data)
    except zstandard.ZstdError:
        raise broken() from None
    if size < 0:
        raise DamagedError(f"{where}: zstd frame does not state its size; damaged")
    if size > limit:
        raise DamagedError(f"{where}: zstd frame of {size} bytes where at most {limit} belong")
    try:
        made = zstandard.ZstdDecompressor(dict_data=_raw(dictionary))
        content = made.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError:
        raise broken() from None
    if len(content) != size:
        raise broken()
    return content
