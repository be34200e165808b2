"""Rows of a track to 16-bit patterns in the order in which they are coded exactly, and back.

Layer after layer its values, then its keys; channels of a key that are turned together stand side
by side. Angles are integers that every machine computes alike. ``spec/codecs/book-exact.md`` gives
every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels.exact import ANGLE_BITS

from ..model import TensorSpec
from .channels import tensor_order
from .rope import HALVES, pair_slices

Rows = NDArray[np.uint8]
Patterns = NDArray[np.uint16]
Ints = NDArray[np.int64]

_FINE = 30
_QUARTER_TURNS = 0.6366197723675814
_SINE = (1686629713, -693598668, 85569304, -5026994, 172272)
_COSINE = (1073741824, -1324676119, 272378143, -22402376, 987035)
"""Taylor series of sin and cos of π/2·x in x², in units of ``1 / (1 << 30)``."""


@dataclass(frozen=True)
class ExactOrder:
    """Channels of a frame: ``n_layers`` of ``width`` channels a role, heads of ``head_dim``, the
    first ``2 * n_pairs`` channels of a key head turned."""

    n_layers: int
    width: int
    head_dim: int
    n_pairs: int

    @property
    def n_channels(self) -> int:
        return 2 * self.n_layers * self.width

    def pairs(self) -> Ints:
        """Of each channel the row of its angle, -1 if it is not turned: int64 ``[C]``."""
        head = np.full(self.head_dim, -1, np.int64)
        head[: 2 * self.n_pairs] = np.repeat(np.arange(self.n_pairs), 2)
        keys = np.tile(head, self.width // self.head_dim)
        layer = np.concatenate([np.full(self.width, -1), keys])
        return np.tile(layer, self.n_layers)

    def places(self, pairing: str = HALVES) -> Ints:
        """Where each channel is among keys, then values of all layers, as rows of this pairing
        have them: int64 ``[C]``."""
        head = np.arange(self.head_dim)
        turned = np.arange(2 * self.n_pairs)
        first, second = pair_slices(2 * self.n_pairs, pairing)
        head[turned[0::2]], head[turned[1::2]] = turned[first], turned[second]
        starts = np.arange(0, self.width, self.head_dim)
        keys = (starts[:, None] + head).reshape(-1)
        half = self.n_layers * self.width
        layers = [
            np.concatenate([half + at + np.arange(self.width), at + keys])
            for at in range(0, half, self.width)
        ]
        places: Ints = np.concatenate(layers).astype(np.int64)
        return places

    def gather(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], pairing: str
    ) -> Patterns:
        """uint16 ``[C, n_frames]`` from one uint8 ``[n_frames, 2 * width]`` for each tensor."""
        whole = np.concatenate([_patterns(rows[i]) for i in tensor_order(tensors)], axis=1)
        return np.ascontiguousarray(whole.T[self.places(pairing)])

    def scatter(
        self, patterns: Patterns, tensors: Sequence[TensorSpec], pairing: str
    ) -> list[Rows]:
        """Undo `gather`."""
        whole = np.empty_like(patterns)
        whole[self.places(pairing)] = patterns
        rows: list[Rows] = [np.zeros((0, 0), np.uint8)] * len(tensors)
        for at, i in enumerate(tensor_order(tensors)):
            part = whole[at * self.width : (at + 1) * self.width].T.astype("<u2")
            rows[i] = np.ascontiguousarray(part).view(np.uint8)
        return rows


def _patterns(rows: Rows) -> Patterns:
    return np.ascontiguousarray(rows).view("<u2").astype(np.uint16, copy=False)


def angles(positions: NDArray[np.int32], inv_freq: NDArray[np.float32]) -> tuple[Ints, Ints]:
    """Cosine and sine of each pair's angle at each position, int64 ``[n_pairs, n]`` in units of
    ``1 / (1 << ANGLE_BITS)``: the same integers on every machine.

    >>> cos, sin = angles(np.array([0, 1, -2], np.int32), np.array([1.0], np.float32))
    >>> cos.tolist(), sin.tolist()
    ([[32768, 17705, -13636]], [[0, 27573, -29796]])
    """
    with np.errstate(over="ignore", invalid="ignore"):
        # The model rounds this product too.
        angle = positions.astype(np.float32) * inv_freq[:, None]
        turns = np.where(np.isfinite(angle), angle, 0).astype(np.float64) * _QUARTER_TURNS
    whole = np.floor(turns + 0.5)
    rest = np.floor((turns - whole) * (1 << _FINE) + 0.5).astype(np.int64)
    square = (rest * rest) >> _FINE
    sine = (rest * _series(_SINE, square)) >> _FINE
    cosine = _series(_COSINE, square)
    half = 1 << (_FINE - ANGLE_BITS - 1)
    sine, cosine = (sine + half) >> (_FINE - ANGLE_BITS), (cosine + half) >> (_FINE - ANGLE_BITS)
    quadrant = np.mod(whole, 4).astype(np.int64)
    both = np.stack([cosine, -sine, -cosine, sine])
    cos = np.take_along_axis(both, quadrant[None], axis=0)[0]
    sin = np.take_along_axis(both, ((quadrant + 3) % 4)[None], axis=0)[0]
    return cos, sin


def _series(terms: Sequence[int], square: Ints) -> Ints:
    total = np.full_like(square, terms[-1])
    for term in terms[-2::-1]:
        total = ((total * square) >> _FINE) + term
    return total
