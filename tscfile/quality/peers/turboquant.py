"""TurboQuant, first stage: random rotation, then one scalar codebook for all coordinates.

Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
arXiv 2504.19874, the variant for mean squared error. A vector (one head's key or value) is divided
by its norm, which is stored in fp16, and turned by a random orthogonal matrix; its coordinates,
times the square root of their number, are then close to standard normal, and each is coded by the
Lloyd-Max quantizer of that distribution. The second stage (one bit of a random projection of the
remainder) is left out: it corrects inner products on average and raises the squared error.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..codec import ByteTaker
from . import packing
from .per_array import PerArrayCodec

_SEED = 0
_LLOYD_STEPS = 2000


class TurboQuant(PerArrayCodec):
    """``key_bits`` and ``value_bits`` 1 to 7."""

    source = "arXiv 2504.19874, MSE variant"

    def __init__(self, key_bits: int, value_bits: int) -> None:
        same = key_bits == value_bits
        suffix = f"{key_bits}" if same else f"k{key_bits}v{value_bits}"
        self.name = f"turboquant-{suffix}"
        self.family = "TurboQuant (stage 1)" if same else "TurboQuant, keys finer"
        super().__init__({"k": key_bits, "v": value_bits})

    def quantize(self, x: NDArray[np.float32], bits: int) -> list[NDArray[np.generic]]:
        dim = x.shape[-1]
        norms = np.linalg.norm(x, axis=-1).astype(np.float16)
        unit = x / np.where(norms == 0, 1, norms).astype(np.float32)[..., None]
        turned = unit @ rotation(dim) * np.float32(np.sqrt(dim))
        levels = lloyd_max(bits)
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, turned)
        return [norms, packing.pack(codes, bits)]

    def take(self, taker: ByteTaker, role: str, *shape: int) -> NDArray[np.float16]:
        norms = taker.take("<f2", *shape[:2]).astype(np.float32)
        codes = packing.take(taker, self.bits[role], *shape)
        turned = lloyd_max(self.bits[role])[codes] / np.float32(np.sqrt(shape[2]))
        return (norms[..., None] * (turned @ rotation(shape[2]).T)).astype(np.float16)


@lru_cache
def rotation(dim: int) -> NDArray[np.float32]:
    """A random orthogonal matrix ``[dim, dim]``, always the same one."""
    q, r = np.linalg.qr(np.random.default_rng(_SEED).standard_normal((dim, dim)))
    turn: NDArray[np.float32] = (q * np.sign(np.diag(r))).astype(np.float32)
    return turn


@lru_cache
def lloyd_max(bits: int) -> NDArray[np.float32]:
    """The ``2^bits`` levels that quantize a standard normal with the least squared error.

    >>> lloyd_max(1).round(4).tolist()
    [-0.7979000210762024, 0.7979000210762024]
    """
    normal = NormalDist()
    n = 1 << bits
    levels = [normal.inv_cdf((i + 0.5) / n) for i in range(n)]
    for _ in range(_LLOYD_STEPS):
        edges = [-np.inf, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), np.inf]
        levels = [
            (normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a))
            for a, b in zip(edges, edges[1:], strict=False)
        ]
    return np.array(levels, np.float32)
