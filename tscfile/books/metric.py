"""What an error in each cached entry costs: one matrix for each tensor.

- *fisher*: F, the second moment of the gradient of log p(y) by each cached key (before RoPE) and
  value, for continuation tokens y drawn from the model, with random signs so that cross terms
  vanish. KL of the next-token distribution is then about half the F-weighted squared error: F is
  the Fisher matrix of the cache entries (Amari, Natural gradient, 1998).
- *attention*: what it does to the outputs of attention, layer by layer
  (`Engine.attention_moments`): needs weights and no gradients.
- *plain*: the identity for each tensor, over its mean variance: every tensor counts alike. For
  where there is no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..transforms.grouped_basis import LayerGroups

_FLOOR = 1e-3
"""Added to the diagonal as a share of its mean: no direction is free."""


@dataclass(frozen=True)
class Metric:
    """Block-diagonal F: float16 ``[n_tensors, w, w]``, scaled to a mean diagonal of 1."""

    blocks: NDArray[np.float16]

    @classmethod
    def of_moments(cls, moments: NDArray[np.float64]) -> Metric:
        """From second moments ``[n_tensors, w, w]`` of gradients, at any scale."""
        width = moments.shape[1]
        diagonal = np.trace(moments, axis1=1, axis2=2)[:, None, None] / width
        floored = moments + _FLOOR * diagonal * np.eye(width)
        return cls((floored / diagonal.mean()).astype(np.float16))

    @classmethod
    def plain(cls, variances: NDArray[np.float64], width: int) -> Metric:
        """``variances``: the mean variance of a channel of each tensor, ``[n_tensors]``."""
        return cls.of_moments(np.eye(width) / np.maximum(variances, 1e-12)[:, None, None])

    @cached_property
    def roots(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """F^½ and its inverse, block by block."""
        values, vectors = np.linalg.eigh(self.blocks.astype(np.float64))
        values = np.sqrt(np.maximum(values, 1e-12))
        transposed = vectors.transpose(0, 2, 1)
        root = (vectors * values[:, None, :]) @ transposed
        inverse = (vectors / values[:, None, :]) @ transposed
        return root.astype(np.float32), inverse.astype(np.float32)

    def whiten(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Frames ``[n, C]`` times F^½: squared distances are then costs."""
        return self._times(frames, self.roots[0])

    def colour(
        self, rows: NDArray[np.float32], groups: LayerGroups, group: int
    ) -> NDArray[np.float32]:
        """Undo `whiten` for rows ``[n, c]`` over the channels of one group."""
        return self._times(rows, self.roots[1][groups.tensors(group)])

    @staticmethod
    def _times(rows: NDArray[np.float32], blocks: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = rows.reshape(len(rows), len(blocks), -1).transpose(1, 0, 2)
        products: NDArray[np.float32] = np.matmul(parts, blocks)
        return products.transpose(1, 0, 2).reshape(len(rows), -1)
