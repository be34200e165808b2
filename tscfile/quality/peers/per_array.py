"""What peers share that code each layer's keys and values on their own, one width for a role."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from ..arrays import CacheShape, KVArrays, from_layers
from ..codec import ByteTaker, join


class PerArrayCodec(ABC):
    """``bits``: bits of a value of the keys ("k") and of the values ("v")."""

    name: str
    book_bytes = 0

    def __init__(self, bits: dict[str, int]) -> None:
        self.bits = bits

    def encode(self, cache: KVArrays) -> bytes:
        parts: list[NDArray[np.generic]] = []
        for role, arrays in cache.roles():
            for each in arrays:
                parts += self.quantize(each.astype(np.float32), self.bits[role])
        return join(parts)

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        taker = ByteTaker(data)

        def take(role: str, layer: int, n_heads: int, dim: int) -> NDArray[np.float16]:
            return self.take(taker, role, n_heads, shape.n_tokens, dim)

        return from_layers(shape, take)

    @abstractmethod
    def quantize(self, x: NDArray[np.float32], bits: int) -> list[NDArray[np.generic]]:
        """The arrays that stand for float32 ``[n_heads, n_tokens, dim]``."""

    @abstractmethod
    def take(self, taker: ByteTaker, role: str, *shape: int) -> NDArray[np.float16]:
        """Undo `quantize`: float16 of ``shape``, ``[n_heads, n_tokens, dim]``."""
