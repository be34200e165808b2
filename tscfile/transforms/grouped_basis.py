"""Bases over groups of layers: coefficients to channels of a frame, and back.

The frame's channels are cut into groups of consecutive layers, each with a basis of its own: a
transform over all layers costs the square of their number. A small model is one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LayerGroups:
    """How channels fall into groups: ``n_layers`` of ``width`` channels a role, ``per_group``
    layers a group. A frame is all keys, layer by layer, then all values; a group has the keys of
    its layers, then their values."""

    n_layers: int
    width: int
    per_group: int

    @property
    def n_groups(self) -> int:
        return self.n_layers // self.per_group

    @property
    def n_channels(self) -> int:
        """Channels of one group."""
        return 2 * self.per_group * self.width

    def tensors(self, group: int) -> list[int]:
        """Indices of a group's tensors among all: keys of all layers, then values of all."""
        layers = range(group * self.per_group, (group + 1) * self.per_group)
        return [*layers, *(self.n_layers + layer for layer in layers)]

    def take(self, frames: Floats, group: int) -> Floats:
        """Channels of one group: ``[n, C]`` to ``[n, C / n_groups]``."""
        if self.n_groups == 1:
            return frames
        size = self.per_group * self.width
        half = self.n_layers * self.width
        keys = slice(group * size, (group + 1) * size)
        values = slice(half + group * size, half + (group + 1) * size)
        return np.concatenate([frames[..., keys], frames[..., values]], axis=-1)

    def put(self, part: Floats, group: int, frames: Floats) -> None:
        """Set the channels of one group in ``frames``."""
        if self.n_groups == 1:
            frames[:] = part
            return
        size = self.per_group * self.width
        half = self.n_layers * self.width
        frames[..., group * size : (group + 1) * size] = part[..., :size]
        start = half + group * size
        frames[..., start : start + size] = part[..., size:]


@dataclass(frozen=True)
class GroupedBasis:
    """Rows over the channels of their group: ``rows`` float32 ``[R, C / n_groups]``, the first
    ``counts[0]`` of them of group 0, and so on."""

    groups: LayerGroups
    rows: Floats
    counts: Sequence[int]

    @cached_property
    def edges(self) -> list[int]:
        return [0, *np.cumsum(self.counts, dtype=np.int64).tolist()]

    def spans(self) -> list[slice]:
        """Rows of each group."""
        return [slice(a, b) for a, b in zip(self.edges[:-1], self.edges[1:], strict=True)]
