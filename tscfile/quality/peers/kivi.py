"""KIVI: keys in groups along tokens, values in groups along channels, asymmetric, 4 or 2 bits.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750.
A group of ``group`` values has a zero point (its minimum) and a step (range / (2^bits - 1)), both
fp16; codes are rounded to nearest. As in the paper, keys are quantized in whole runs of
``residual`` tokens, so that ``n_tokens % residual`` newest keys stay in fp16, and the newest
``residual`` values always do. Without a residual (``residual=0``) all values are quantized, and
only keys that fill no group stay in fp16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedError
from ..arrays import CacheShape, KVArrays
from ..codec import ByteTaker, join
from . import packing


class Kivi:
    """``bits`` 4 or 2, ``group`` 32 and ``residual`` 128 in the paper."""

    source = "arXiv 2402.02750"
    book_bytes = 0

    def __init__(self, bits: int, group: int = 32, residual: int = 128) -> None:
        self.name = f"kivi-{bits}" if residual else f"kivi-{bits}-r0"
        self.family = "KIVI" if residual else "KIVI, no residual"
        self.bits, self.group, self.residual = bits, group, residual

    def encode(self, cache: KVArrays) -> bytes:
        parts: list[NDArray[np.generic]] = []
        for keys in cache.keys:
            kept = self._n_quantized_keys(keys.shape[1])
            parts += self._quantize(keys[:, :kept].transpose(0, 2, 1))
            parts.append(keys[:, kept:])
        for values in cache.values:
            kept = max(values.shape[1] - self.residual, 0)
            parts += self._quantize(values[:, :kept])
            parts.append(values[:, kept:])
        return join(parts)

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        taker, n = ByteTaker(data), shape.n_tokens
        keys, values = [], []
        for one in shape.layers:
            kept = self._n_quantized_keys(n)
            old = self._dequantize(taker, one.n_kv_heads, one.key_dim, kept).transpose(0, 2, 1)
            new = taker.take("<f2", one.n_kv_heads, n - kept, one.key_dim)
            keys.append(np.concatenate([old, new], axis=1))
        for one in shape.layers:
            kept = max(n - self.residual, 0)
            old = self._dequantize(taker, one.n_kv_heads, kept, one.value_dim)
            new = taker.take("<f2", one.n_kv_heads, n - kept, one.value_dim)
            values.append(np.concatenate([old, new], axis=1))
        return KVArrays(shape, keys, values)

    def _n_quantized_keys(self, n_tokens: int) -> int:
        return n_tokens - n_tokens % (self.residual or self.group)

    def _quantize(self, x: NDArray[np.float16]) -> list[NDArray[np.generic]]:
        """Groups along the last axis of ``[heads, a, b]``: zero points, steps, packed codes."""
        if x.shape[2] % self.group:
            raise UnsupportedError(
                f"{self.name} needs a multiple of {self.group} values and this model has "
                f"{x.shape[2]}; leave it out"
            )
        n_groups = x.shape[2] // self.group
        groups = x.reshape(*x.shape[:2], n_groups, self.group).astype(np.float32)
        low, high = groups.min(axis=-1), groups.max(axis=-1)
        zero = low.astype(np.float16)
        step = ((high - low) / (2**self.bits - 1)).astype(np.float16)
        scaled = (groups - zero[..., None]) / np.where(step == 0, 1, step)[..., None]
        codes = np.clip(np.rint(scaled), 0, 2**self.bits - 1).astype(np.uint8)
        return [zero, step, packing.pack(codes, self.bits)]

    def _dequantize(self, taker: ByteTaker, n: int, a: int, b: int) -> NDArray[np.float16]:
        shape = (n, a, b // self.group)
        zero, step = taker.take("<f2", *shape), taker.take("<f2", *shape)
        codes = packing.take(taker, self.bits, *shape, self.group)
        groups: NDArray[np.float32] = codes * step.astype(np.float32)[..., None] + zero[..., None]
        return groups.astype(np.float16).reshape(n, a, b)
