"""Token-position delta as the TSC reports define it: keyframes, and 4-bit differences to them.

``solsticestudio.ai/tsc_paper``, part I: frame t is a keyframe if t is a multiple of the interval;
every other frame is a difference to the keyframe before it as it is decoded, so that no error adds
to another. Differences are quantized in pages (`pages`). The reports keep keyframes in fp32; in
fp16, the type of the cache, they are as exact.

Keys are taken as they lie in the cache, or turned back to before RoPE.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from . import arrays, pages
from .arrays import CacheShape, KVArrays
from .codec import ByteTaker
from .peers import packing
from .peers.per_array import PerArrayCodec

BITS = 4
INTERVALS = (8, 16, 32, 64)
KEYFRAMES = {"fp32": "<f4", "fp16": "<f2"}


class PageDelta(PerArrayCodec):
    """``every``: frames from keyframe to keyframe. ``keyframe``: a name of `KEYFRAMES`."""

    source = "TSC reports, part I"

    def __init__(self, every: int, keyframe: str, turned_back: bool = False) -> None:
        super().__init__({"k": BITS, "v": BITS})
        self.name = f"delta-k{every}-{keyframe}{'-prerope' if turned_back else ''}"
        self.family = f"token delta, {keyframe}{', before RoPE' if turned_back else ''}"
        self._every, self._dtype, self._turned_back = every, KEYFRAMES[keyframe], turned_back

    def encode(self, cache: KVArrays) -> bytes:
        return super().encode(_turn(cache, back=True) if self._turned_back else cache)

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        cache = super().decode(data, shape)
        return _turn(cache, back=False) if self._turned_back else cache

    def quantize(self, x: NDArray[np.float32], bits: int) -> list[NDArray[np.generic]]:
        frames = arrays.rows(x)
        keyframes = frames[:: self._every].astype(self._dtype)
        left = (frames - self._repeated(keyframes, len(frames)))[self._is_delta(len(frames))]
        size = pages.page_size(frames.shape[1])
        scales, codes = pages.quantize(left.reshape(-1, size), bits)
        return [keyframes, scales, packing.pack(codes, bits)]

    def take(self, taker: ByteTaker, role: str, *shape: int) -> NDArray[np.float16]:
        n_heads, n, dim = shape
        width, bits = n_heads * dim, self.bits[role]
        size = pages.page_size(width)
        keyframes = taker.take(self._dtype, -(-n // self._every), width)
        deltas = self._is_delta(n)
        n_pages = int(deltas.sum()) * width // size
        scales = taker.take("<f2", n_pages)
        codes = packing.take(taker, bits, n_pages, size)
        frames = self._repeated(keyframes, n)
        frames[deltas] += pages.dequantize(scales, codes, bits).reshape(-1, width)
        return arrays.heads(frames, n_heads).astype(np.float16)

    def _is_delta(self, n: int) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.arange(n) % self._every != 0
        return found

    def _repeated(self, keyframes: NDArray[np.floating], n: int) -> NDArray[np.float32]:
        return keyframes.astype(np.float32).repeat(self._every, axis=0)[:n]


def _turn(cache: KVArrays, back: bool) -> KVArrays:
    """Keys before RoPE as a cache of float32, or the reverse as one of float16."""
    rope, positions = cache.shape.rope, cache.shape.positions
    if rope is None:
        raise UnsupportedError("the keys' position encoding is not known; leave out prerope")
    keys = [each.astype(np.float32) for each in cache.keys]
    if back:
        return KVArrays(cache.shape, [rope.undo(k, positions) for k in keys], cache.values)  # type: ignore[misc]
    turned = [rope.apply(k, positions).astype(np.float16) for k in keys]
    return KVArrays(cache.shape, turned, cache.values)


def codecs() -> dict[str, PageDelta]:
    """All settings, by name."""
    found = [
        PageDelta(every, keyframe, turned_back)
        for turned_back in (False, True) for keyframe in KEYFRAMES for every in INTERVALS
    ]  # fmt: skip
    return {codec.name: codec for codec in found}
