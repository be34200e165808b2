"""Singular values of the cache: each layer's keys and values as two thin matrices in fp16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import arrays
from ..arrays import CacheShape, KVArrays
from ..codec import ByteTaker, join


class LowRank:
    """``rank`` of the matrix ``[n_tokens, n_heads * dim]`` in the layers ``truncated``; the others
    stay as they are."""

    family = "SVD"
    source = "TSC reports, part IV (rejected there)"
    book_bytes = 0

    def __init__(self, rank: int, truncated: range) -> None:
        self._rank, self._truncated = rank, truncated
        self.name = f"svd-{rank}-layers{truncated.start}to{truncated.stop - 1}"

    def encode(self, cache: KVArrays) -> bytes:
        parts: list[NDArray[np.generic]] = []
        for _, role in cache.roles():
            for layer, each in enumerate(role):
                frames = arrays.rows(each)
                if layer not in self._truncated:
                    parts.append(frames)
                    continue
                u, s, v = np.linalg.svd(frames.astype(np.float32), full_matrices=False)
                rank = min(self._rank, len(s))
                # The root on either side keeps both within fp16.
                root = np.sqrt(s[:rank])
                parts += [(u[:, :rank] * root).astype(np.float16),
                          (v[:rank] * root[:, None]).astype(np.float16)]  # fmt: skip
        return join(parts)

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        taker, n = ByteTaker(data), shape.n_tokens

        def take(role: str, layer: int, n_heads: int, dim: int) -> NDArray[np.float16]:
            width = n_heads * dim
            if layer not in self._truncated:
                return arrays.heads(taker.take("<f2", n, width), n_heads)
            rank = min(self._rank, n, width)
            left, right = taker.take("<f2", n, rank), taker.take("<f2", rank, width)
            frames = left.astype(np.float32) @ right.astype(np.float32)
            return arrays.heads(frames, n_heads).astype(np.float16)

        return arrays.from_layers(shape, take)


def rank_of_bits(bits: float, n_tokens: int, width: int) -> int:
    """The largest rank that takes at most ``bits`` a value in fp16.

    >>> rank_of_bits(3.25, 768, 128)
    22
    """
    return int(n_tokens * width * bits / 16 / (n_tokens + width))
