"""Rotary position encoding (Su et al., arXiv:2104.09864) of keys, done and undone in fp32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HALVES, NEIGHBOURS = "neox", "norm"
"""Which channels a rotation pairs: ``i`` with ``i + n/2``, or ``2i`` with ``2i + 1``."""


@dataclass(frozen=True)
class Rope:
    """Channel pairs of every head turned by ``position * inv_freq``.

    ``inv_freq``: float32 ``[rope_dim / 2]``; the first ``rope_dim`` channels of a head are turned.
    ``scale`` multiplies the turned channels. Tables are float32, as the model's own.
    """

    inv_freq: NDArray[np.float32]
    pairing: str = HALVES
    scale: float = 1.0

    def apply(self, keys: NDArray[np.float32], positions: NDArray[np.int32]) -> NDArray[np.float32]:
        """Turn float32 ``[n_heads, n_tokens, head_dim]``."""
        return self._turn(keys, positions, 1.0, self.scale)

    def undo(self, keys: NDArray[np.float32], positions: NDArray[np.int32]) -> NDArray[np.float32]:
        """Turn back what `apply` turned."""
        return self._turn(keys, positions, -1.0, 1.0 / self.scale)

    def _turn(
        self, keys: NDArray[np.float32], positions: NDArray[np.int32], sign: float, scale: float
    ) -> NDArray[np.float32]:
        angles = positions.astype(np.float32)[:, None] * self.inv_freq
        cos, sin = np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(sign * scale)
        first, second = pair_slices(2 * len(self.inv_freq), self.pairing)
        out = keys.copy()
        a, b = keys[..., first], keys[..., second]
        out[..., first] = a * cos - b * sin
        out[..., second] = b * cos + a * sin
        return out


def pair_slices(n: int, pairing: str) -> tuple[slice, slice]:
    """The first and the second channels of all pairs among the first ``n`` channels."""
    if pairing == HALVES:
        return slice(0, n // 2), slice(n // 2, n)
    return slice(0, n, 2), slice(1, n, 2)
