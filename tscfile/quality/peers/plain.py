"""The cache as it is, and what a general compressor makes of it."""

from __future__ import annotations

from ..arrays import CacheShape, KVArrays
from ..codec import ByteTaker, join

ZSTD_LEVEL = 19


class RawFp16:
    """fp16 as a serving engine keeps it: layer after layer, keys before values."""

    name = family = "fp16"
    source = "as it lies in memory"
    book_bytes = 0

    def encode(self, cache: KVArrays) -> bytes:
        return join([each for _, arrays in cache.roles() for each in arrays])

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        taker, n = ByteTaker(data), shape.n_tokens
        keys = [taker.take("<f2", one.n_kv_heads, n, one.key_dim) for one in shape.layers]
        values = [taker.take("<f2", one.n_kv_heads, n, one.value_dim) for one in shape.layers]
        return KVArrays(shape, keys, values)


class Zstd(RawFp16):
    """``zstd -19`` of the raw bytes."""

    name = family = f"zstd-{ZSTD_LEVEL}"
    source = "zstd (RFC 8878), level 19, on the raw fp16 bytes"

    def encode(self, cache: KVArrays) -> bytes:
        import zstandard

        return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(super().encode(cache))

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        import zstandard

        return super().decode(zstandard.ZstdDecompressor().decompress(data), shape)
