"""Prediction of a frame from its tokens: a small network over the text up to the frame.

    features f: vectors of the frame's token and those before it, decaying means of all token
                vectors so far, two functions of the position
    hidden   a = max(0, f W + b)
    z        = f L + a O

``z`` are coordinates in the prediction basis of a book. Nothing but tokens and positions enters,
so every frame is predicted on its own and a decoder needs no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..context import FrameContext

Floats = NDArray[np.float32]

N_POSITION = 2
"""Features of the position p: log2(p + 1) / 16 and 1 / (p + 1)."""

_PIECE = 256
_FORGOTTEN = 2.0**-26
"""A token whose weight in a decaying mean is below this cannot be seen in float32."""


@dataclass(frozen=True)
class Features:
    """Token vectors and how they are put together.

    ``vectors``: float32 ``[V, D]``. ``history``: tokens taken one by one. ``decays``: factor from
    one token to the next of each mean. ``decay_dims``: leading numbers of a vector that enter them.
    """

    vectors: Floats
    history: int
    decays: tuple[float, ...]
    decay_dims: int

    @property
    def n_features(self) -> int:
        means = len(self.decays) * self.decay_dims
        width: int = self.vectors.shape[1]
        return self.history * width + means + N_POSITION

    def dense(self, context: FrameContext) -> Floats:
        """Means and position of each frame, float32 ``[n, E * D' + 2]``."""
        pos = np.maximum(context.pos, 0).astype(np.float64)
        place = np.stack([np.log2(pos + 1) / 16, 1 / (pos + 1)], axis=1).astype(np.float32)
        return np.concatenate([self._means(context), place], axis=1)

    def all(self, context: FrameContext) -> Floats:
        """Every feature of each frame, float32 ``[n, F]``; `apply` does without this matrix."""
        found = self.lookup(context.history(self.history))
        return np.concatenate([found.reshape(len(context.pos), -1), self.dense(context)], axis=1)

    def lookup(self, tokens: NDArray[np.int32]) -> Floats:
        """Vectors of ``tokens``, zeros for those that have none."""
        known = (tokens >= 0) & (tokens < len(self.vectors))
        found: Floats = self.vectors[np.where(known, tokens, 0)] * known[..., None]
        return found

    def apply(self, matrix: Floats, context: FrameContext) -> Floats:
        """All features times ``matrix``, float32 ``[n, columns]``."""
        width = self.vectors.shape[1]
        out: Floats = self.dense(context) @ matrix[self.history * width :]
        for k, tokens in enumerate(context.history(self.history).T):
            # Text repeats its tokens: each one's share is computed once.
            each, which = np.unique(tokens, return_inverse=True)
            share = self.lookup(each) @ matrix[k * width : (k + 1) * width]
            out += np.take(share, which, axis=0)
        return out

    def _means(self, context: FrameContext) -> Floats:
        n_dims = self.decay_dims
        out = np.zeros((len(context.pos), len(self.decays) * n_dims), np.float32)
        if not out.size:
            return out
        order = np.argsort(context.pos, kind="stable")
        for span in _pieces(context.pos[order]):
            where = order[span]
            pos = context.pos[where].astype(np.int64)
            for e, decay in enumerate(self.decays):
                columns = slice(e * n_dims, (e + 1) * n_dims)
                out[where, columns] = self._mean_of(context.tokens, pos, decay)
        return out

    def _mean_of(self, tokens: NDArray[np.int32], pos: NDArray[np.int64], decay: float) -> Floats:
        """Decaying means at rising positions that lie close together."""
        start, last = max(int(pos[0]), 0), int(pos[-1])
        reach = int(np.ceil(np.log(_FORGOTTEN) / np.log(decay)))
        powers = decay ** np.arange(max(reach, last - start) + 1.0)
        # What lies before the first position has faded by the same factor for all of them.
        from_ = max(start - reach, 0)
        older = self.lookup(tokens[from_:start])[:, : self.decay_dims]
        ages = start - np.arange(from_, from_ + len(older))
        before = powers[ages].astype(np.float32) @ older
        newer = self.lookup(tokens[start : max(last + 1, start)])[:, : self.decay_dims]
        if len(pos) == len(newer) and (pos == np.arange(start, start + len(pos))).all():
            weights = _falling(decay, _PIECE)[: len(pos), : len(pos)]
        else:
            age = pos[:, None] - np.arange(start, start + len(newer))
            weights = (powers[np.maximum(age, 0)] * (age >= 0)).astype(np.float32)
        fade = powers[np.maximum(pos - start, 0)] * (pos >= start)
        total = (1 - decay ** (np.maximum(pos, 0) + 1.0)) / (1 - decay)
        mean: Floats = weights @ newer + fade.astype(np.float32)[:, None] * before
        mean /= total.astype(np.float32)[:, None]
        return mean


@lru_cache(maxsize=16)
def _falling(decay: float, n: int) -> Floats:
    """Weight of position j in the sum of position i, for neighbours."""
    age = np.arange(n)[:, None] - np.arange(n)
    return np.where(age >= 0, decay ** np.maximum(age, 0).astype(np.float64), 0).astype(np.float32)


def _pieces(pos: NDArray[np.int32]) -> Iterator[slice]:
    """Rising positions in runs that span at most `_PIECE`."""
    start = 0
    while start < len(pos):
        stop = int(np.searchsorted(pos, int(pos[start]) + _PIECE))
        yield slice(start, stop)
        start = stop


@dataclass(frozen=True)
class Network:
    """Weights of the prediction, float32: ``first`` ``[F, M + P]`` (W beside L), ``bias`` ``[M]``,
    ``output`` ``[M, P]``."""

    features: Features
    first: Floats
    bias: Floats
    output: Floats

    def __call__(self, context: FrameContext) -> Floats:
        """Coordinates z, float32 ``[n, P]``."""
        both = self.features.apply(self.first, context)
        n_hidden = len(self.bias)
        hidden = both[:, :n_hidden]
        hidden += self.bias
        np.maximum(hidden, 0, out=hidden)
        z: Floats = both[:, n_hidden:] + hidden @ self.output
        return z
