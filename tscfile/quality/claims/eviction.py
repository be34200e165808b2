"""Eviction by attention received, as the TSC reports describe it, in front of another codec.

Frames are ranked by the attention that they got while the cache was filled (H2O: Zhang et al.,
arXiv 2306.14048; Scissorhands); the least of each layer are dropped. *PreserveEarly* keeps all
frames of the first fifth of the layers. The reports say neither how the fifth is rounded nor what
is protected otherwise; here it is rounded up, and the newest 32 frames are kept, as H2O keeps
recent ones.

Which frames are kept is stored, one bit a frame and layer that drops any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..arrays import CacheShape, KVArrays, from_layers
from ..codec import ByteTaker, join
from ..peers.per_array import PerArrayCodec

if TYPE_CHECKING:
    from ..engine import Engine

EARLY_SHARE = 0.2
N_RECENT = 32

Mask = NDArray[np.bool_]


def n_early(n_layers: int) -> int:
    """Layers that PreserveEarly leaves whole.

    >>> n_early(22), n_early(6)
    (5, 2)
    """
    return math.ceil(EARLY_SHARE * n_layers)


class Ranking:
    """Attention received by each frame in each layer; of the last tokens asked for it is kept."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last: tuple[bytes, NDArray[np.float64]] | None = None

    def received(self, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """Float64 ``[n_layers, n]``."""
        key = tokens.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = key, self._engine.attention_received(tokens)
        return self._last[1]


class Evicting:
    """``inner`` codes what is left. ``kept``: share of frames kept in layers that drop any.
    ``early``: the first layers, which drop none. ``shared``: one ranking for all layers, the mean
    over them, in place of each layer's own."""

    family = "eviction"
    source = "TSC reports, part IV (PreserveEarly, eviction by attention received)"
    book_bytes = 0

    def __init__(
        self, inner: PerArrayCodec, ranking: Ranking, kept: float, early: int = 0,
        shared: bool = False,
    ) -> None:  # fmt: skip
        self._inner, self._ranking, self._kept = inner, ranking, kept
        self._early, self._shared = early, shared
        kind = f"-early{early}" if early else ""
        self.name = f"{inner.name}-keep{kept:g}{kind}{'-shared' if shared else ''}"

    def encode(self, cache: KVArrays) -> bytes:
        masks = self.masks(cache.shape.tokens)
        parts: list[NDArray[np.generic]] = [np.packbits(each) for each in masks[self._early :]]
        for role, arrays in cache.roles():
            for each, mask in zip(arrays, masks, strict=True):
                parts += self._inner.quantize(
                    each[:, mask].astype(np.float32), self._inner.bits[role]
                )
        return join(parts)

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        taker, n = ByteTaker(data), shape.n_tokens
        masks = [np.ones(n, bool)] * self._early
        for _ in shape.layers[self._early :]:
            bits = taker.take(np.uint8, -(-n // 8))
            masks.append(np.unpackbits(bits, count=n).astype(bool))

        def take(role: str, layer: int, n_heads: int, dim: int) -> NDArray[np.float16]:
            whole = np.zeros((n_heads, n, dim), np.float16)
            left = int(masks[layer].sum())
            whole[:, masks[layer]] = self._inner.take(taker, role, n_heads, left, dim)
            return whole

        return from_layers(shape, take, masks)

    def masks(self, tokens: NDArray[np.int32]) -> list[Mask]:
        """Frames that each layer keeps."""
        received = self._ranking.received(tokens)
        if self._shared:
            received = np.tile(received.mean(axis=0), (len(received), 1))
        return kept_frames(received, self._kept, self._early)


def kept_frames(received: NDArray[np.float64], kept: float, early: int) -> list[Mask]:
    """Of each layer the frames that got most, a share ``kept`` of them, the newest ones among
    them; all of them in the first ``early`` layers.

    >>> kept_frames(np.array([[3.0, 1, 2, 5] + [0] * 36]), 0.85, 0)[0][:4].tolist()
    [True, False, False, True]
    """
    n = received.shape[1]
    left = max(round(kept * n), min(N_RECENT, n))
    masks = []
    for layer, row in enumerate(received):
        recent = np.arange(n) >= n - min(N_RECENT, n)
        order = np.argsort(-np.where(recent, np.inf, row), kind="stable")
        mask = np.zeros(n, bool)
        mask[order[: n if layer < early else left]] = True
        masks.append(mask)
    return masks


def overlap(masks: Sequence[Mask]) -> float:
    """The mean share of one layer's kept frames that another one keeps too."""
    pairs = [(a, b) for i, a in enumerate(masks) for b in masks[i + 1 :]]
    return float(np.mean([(a & b).sum() / max(int(a.sum()), 1) for a, b in pairs]))
