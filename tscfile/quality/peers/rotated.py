"""Rotated K4V2: Hadamard rotation, then symmetric uniform quantization, keys finer than values.

The configuration of the TSC reports (``solsticestudio.ai/tsc_part4``, ``tsc_paper``): every head's
vector is turned by an orthonormal Hadamard matrix; groups of 64 channels share one fp16 scale, the
largest magnitude a; the levels are 2^bits evenly spaced values from -a to a, so that the error is
at most a / (2^bits - 1). The reports give no group size; 64 makes 4.92 times smaller than fp16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedError
from ...transforms.rotation import rotate
from ..arrays import CacheShape, KVArrays
from ..codec import ByteTaker, join
from . import packing

GROUP = 64


class RotatedUniform:
    """``key_bits`` and ``value_bits`` 1 to 8; head sizes that are multiples of 64."""

    family = "rotated K4V2"
    source = "TSC reports, part IV (Hadamard, symmetric)"
    book_bytes = 0

    def __init__(self, key_bits: int = 4, value_bits: int = 2) -> None:
        self.name = f"rotated-k{key_bits}v{value_bits}"
        self._bits = {"k": key_bits, "v": value_bits}

    def encode(self, cache: KVArrays) -> bytes:
        parts: list[NDArray[np.generic]] = []
        for role, arrays in cache.roles():
            for each in arrays:
                parts += self._quantize(each.astype(np.float32), self._bits[role])
        return join(parts)

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        taker, n = ByteTaker(data), shape.n_tokens
        keys = [self._take(taker, "k", one.n_kv_heads, n, one.key_dim) for one in shape.layers]
        values = [self._take(taker, "v", one.n_kv_heads, n, one.value_dim) for one in shape.layers]
        return KVArrays(shape, keys, values)

    def _quantize(self, x: NDArray[np.float32], bits: int) -> list[NDArray[np.generic]]:
        if x.shape[-1] % GROUP:
            raise UnsupportedError(
                f"{self.name} needs heads of a multiple of {GROUP} and this model has "
                f"{x.shape[-1]}; leave it out"
            )
        groups = rotate(x.reshape(-1, GROUP), GROUP)
        peak = np.abs(groups).max(axis=1).astype(np.float16)
        top = 2**bits - 1
        scaled = groups / np.where(peak == 0, 1, peak).astype(np.float32)[:, None]
        codes = np.clip(np.rint((scaled + 1) / 2 * top), 0, top)
        return [peak, packing.pack(codes, bits)]

    def _take(self, taker: ByteTaker, role: str, *shape: int) -> NDArray[np.float16]:
        bits, n_groups = self._bits[role], int(np.prod(shape)) // GROUP
        peak = taker.take("<f2", n_groups).astype(np.float32)
        codes = packing.take(taker, bits, n_groups, GROUP)
        groups = (codes * np.float32(2 / (2**bits - 1)) - 1) * peak[:, None]
        return rotate(groups, GROUP).reshape(shape).astype(np.float16)
