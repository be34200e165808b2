"""Principal components of the cache across all layers and heads: the transform of KVTC.

One row for each token: the keys of all layers and heads side by side, turned back to position 0 in
fp32, or the values likewise. Mean and eigenvectors of the rows' covariance are learnt on
calibration text, the first `N_SINKS` tokens of each window left out. They are the book.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedError
from .. import arrays
from ..arrays import CacheShape, KVArrays
from ..calibration import Calibration

N_SINKS = 4
_N_SAMPLES = 512

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Basis:
    """``mean``: float32 ``[p]``; ``vectors``: float32 ``[p, p]``, most variance first;
    ``samples``: float32 ``[n, p]``, coefficients of some calibration rows, for bit allocation."""

    mean: Rows
    vectors: Rows
    samples: Rows

    def project(self, rows: Rows, rank: int | None = None) -> Rows:
        """Coefficients ``[n, rank]`` of rows ``[n, p]``."""
        centred: Rows = rows - self.mean
        return centred @ self.vectors[:, :rank]

    def expand(self, coefficients: Rows) -> Rows:
        """Rows ``[n, p]`` from their leading coefficients."""
        return coefficients @ self.vectors[:, : coefficients.shape[1]].T + self.mean


def learn_bases(calibration: Calibration) -> dict[str, Basis]:
    """The bases of keys (``k``) and values (``v``)."""
    kept: dict[str, list[Rows]] = {"k": [], "v": []}
    for cache in calibration.caches():
        for role, rows in rows_of(cache).items():
            kept[role].append(rows[N_SINKS:])
    return {role: _learn(parts) for role, parts in kept.items()}


def _learn(parts: Sequence[Rows]) -> Basis:
    n = sum(len(part) for part in parts)
    mean = sum(part.sum(axis=0, dtype=np.float64) for part in parts) / n
    centred = [part - mean.astype(np.float32) for part in parts]
    covariance = sum(part.T.astype(np.float64) @ part for part in centred) / n
    vectors = np.linalg.eigh(covariance)[1][:, ::-1].astype(np.float32)
    every = -(-n // _N_SAMPLES)
    samples = np.concatenate([part[::every] for part in centred]) @ vectors
    return Basis(mean.astype(np.float32), np.ascontiguousarray(vectors), samples)


def rows_of(cache: KVArrays) -> dict[str, Rows]:
    """Float32 rows ``[n_tokens, p]`` of keys before RoPE and of values, layer after layer."""
    rope, positions = cache.shape.rope, cache.shape.positions
    if rope is None:
        raise UnsupportedError(
            "the keys' position encoding is not known, so they cannot be turned back; leave out "
            "kvtc and pca"
        )
    keys = [rope.undo(each.astype(np.float32), positions) for each in cache.keys]
    values = [each.astype(np.float32) for each in cache.values]
    return {
        role: np.concatenate([arrays.rows(each) for each in parts], axis=1)
        for role, parts in (("k", keys), ("v", values))
    }


def cache_from_rows(rows: dict[str, Rows], shape: CacheShape) -> KVArrays:
    """Undo `rows_of`, rounded to fp16."""
    assert shape.rope is not None
    keys, values = _split(rows["k"], shape, "k"), _split(rows["v"], shape, "v")
    turned = [shape.rope.apply(each, shape.positions).astype(np.float16) for each in keys]
    return KVArrays(shape, turned, [each.astype(np.float16) for each in values])


def _split(rows: Rows, shape: CacheShape, role: str) -> list[Rows]:
    dims = [one.key_dim if role == "k" else one.value_dim for one in shape.layers]
    widths = [one.n_kv_heads * dim for one, dim in zip(shape.layers, dims, strict=True)]
    parts = np.split(rows, np.cumsum(widths)[:-1], axis=1)
    return [
        arrays.heads(part, one.n_kv_heads) for part, one in zip(parts, shape.layers, strict=True)
    ]
