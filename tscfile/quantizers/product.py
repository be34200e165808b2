"""Product quantization: vectors as bytes that each name one of 256 centroids.

A *stage* is a byte of the code. It has some columns of the vector, a codebook over them, and says
which of the codebook's centroids is added there. Stages of different columns are the sub-vectors of
product quantization (Jégou, Douze, Schmid 2011), stages that meet in a column are its residual
stages (Chen, Guan, Wang 2010): the first ones say the most, and any number of them, from the first
on, is a code. Decoding is a look-up and a sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import ops

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

CENTROIDS = 256
BEAM = 8
"""Codes of a vector that are followed from stage to stage; the best at the end is taken."""

_BLOCK = 256
_PATIENCE = 8
"""Stages that may be worth too little, each, before no more are tried."""


@dataclass(frozen=True)
class ProductQuantizer:
    """``columns``: int32 ``[S, d]``, those of each stage; ``books``: int32 ``[S]``, its codebook;
    ``centroids``: float32 ``[B, k, d]``, k at most `CENTROIDS`.

    Codes of several vectors are one array, those of a vector in the order of its stages, with an
    array of how many each has.
    """

    columns: NDArray[np.int32]
    books: NDArray[np.int32]
    centroids: Floats

    @property
    def n_stages(self) -> int:
        return len(self.columns)

    def encode_worth(
        self, values: Floats, worth: NDArray[np.float64], beam: int = BEAM
    ) -> tuple[Codes, NDArray[np.int64]]:
        """Codes uint8 and their counts int64 ``[n]`` of vectors float32 ``[n, W]``: of as many
        stages as each is worth, where one more must save the squared error ``worth[i]`` a byte.

        >>> columns, books = np.array([[0, 1], [0, 1]], np.int32), np.array([0, 1], np.int32)
        >>> centroids = np.array([[[0, 0], [8, 8]], [[1, 0], [-1, 0]]], np.float32)
        >>> quantizer = ProductQuantizer(columns, books, centroids)
        >>> vectors = np.array([[6.5, 8], [6.5, 8], [1, 1]], np.float32)
        >>> codes, counts = quantizer.encode_worth(vectors, np.array([1, 4, 4.0]))
        >>> codes.tolist(), counts.tolist()
        ([1, 1, 1], [2, 1, 0])
        """
        counts = np.zeros(len(values), np.int64)
        codes = np.zeros((len(values), self.n_stages), np.uint8)
        for start in range(0, len(values), _BLOCK):
            numbers = np.arange(start, min(start + _BLOCK, len(values)))
            paths = _Paths(self, values[numbers], beam)
            least = np.zeros(len(values))
            while paths.stage < self.n_stages and len(numbers):
                found, change = paths.extend()
                cost = change + worth[numbers] * paths.stage
                better = cost < least[numbers]
                chosen = numbers[better]
                least[chosen], counts[chosen] = cost[better], paths.stage
                codes[chosen, : paths.stage] = found[better]
                going = paths.stage - counts[numbers] < _PATIENCE
                paths.keep(going)
                numbers = numbers[going]
        return _flat(codes, counts), counts

    def encode_counts(
        self, values: Floats, counts: NDArray[np.int64], beam: int = BEAM
    ) -> Codes:
        """Codes of the first ``counts[i]`` (int64 ``[n]``) stages of each vector."""
        codes = np.zeros((len(values), self.n_stages), np.uint8)
        if beam == 1:
            self._encode_greedily(values.copy(), counts, codes)
            return _flat(codes, counts)
        for start in range(0, len(values), _BLOCK):
            numbers = np.arange(start, min(start + _BLOCK, len(values)))
            paths = _Paths(self, values[numbers], beam)
            while paths.stage < int(counts[numbers].max(initial=0)):
                found, _ = paths.extend()
                here = counts[numbers] == paths.stage
                codes[numbers[here], : paths.stage] = found[here]
        return _flat(codes, counts)

    def _encode_greedily(
        self, left: Floats, counts: NDArray[np.int64], codes: Codes
    ) -> None:
        for stage in range(int(counts.max(initial=0))):
            here = np.flatnonzero(counts > stage)[:, None]
            columns, centroids = self.columns[stage], self.centroids[self.books[stage]]
            part = np.ascontiguousarray(left[here, columns])
            found = ops.nearest_centroids(part, centroids)
            codes[here[:, 0], stage] = found
            left[here, columns] = part - centroids[found]

    def errors(self, values: Floats, beam: int = BEAM) -> NDArray[np.float64]:
        """Squared error of vectors float32 ``[n, W]`` with codes of 0, 1, … all stages: float64
        ``[n, S + 1]``."""
        errors = np.zeros((len(values), self.n_stages + 1))
        errors[:, 0] = np.square(values, dtype=np.float64).sum(axis=1)
        for start in range(0, len(values), _BLOCK):
            block = slice(start, start + _BLOCK)
            paths = _Paths(self, values[block], beam)
            for stage in range(self.n_stages):
                errors[block, stage + 1] = errors[block, 0] + paths.extend()[1]
        return np.maximum(errors, 0)

    def decode(self, codes: Codes, counts: NDArray[np.int64], n_columns: int) -> Floats:
        """Vectors float32 ``[n, n_columns]``; `ValueError` for a code without a centroid."""
        return ops.gather_centroids(
            codes, counts, self.books, self.columns, self.centroids, n_columns
        )


def _flat(codes: Codes, counts: NDArray[np.int64]) -> Codes:
    return np.ascontiguousarray(codes[np.arange(codes.shape[1]) < counts[:, None]])


class _Paths:
    """The best codes so far of each of some vectors, and what they leave."""

    def __init__(self, quantizer: ProductQuantizer, values: Floats, beam: int) -> None:
        used, places = np.unique(quantizer.columns, return_inverse=True)
        self._quantizer, self._beam = quantizer, beam
        self._places = places.reshape(quantizer.columns.shape)
        self._left = values[:, None, used]
        self._cost = np.zeros((len(values), 1), np.float32)
        self._codes = np.zeros((len(values), 1, quantizer.n_stages), np.uint8)
        self.stage = 0

    def extend(self) -> tuple[Codes, Floats]:
        """Go on by one stage: of each vector the best codes ``[n, stage]``, and what they change
        its squared error by."""
        places = self._places[self.stage]
        centroids = self._quantizer.centroids[self._quantizer.books[self.stage]]
        n, n_paths, _ = self._left.shape
        products = self._left[:, :, places].reshape(n * n_paths, -1) @ centroids.T
        costs = np.square(centroids).sum(axis=1) - 2 * products.reshape(n, n_paths, -1)
        costs = (costs + self._cost[:, :, None]).reshape(n, -1)
        beam = min(self._beam, costs.shape[1])
        chosen = np.argpartition(costs, beam - 1, axis=1)[:, :beam]
        # In order, so that the same paths come out whatever the partition did with them.
        chosen.sort(axis=1)
        paths, code = chosen // len(centroids), chosen % len(centroids)
        self._cost = np.take_along_axis(costs, chosen, axis=1)
        self._left = np.take_along_axis(self._left, paths[:, :, None], axis=1)
        self._left[:, :, places] -= centroids[code]
        self._codes = np.take_along_axis(self._codes, paths[:, :, None], axis=1)
        self._codes[:, :, self.stage] = code
        self.stage += 1
        best = self._cost.argmin(axis=1)
        return self._codes[np.arange(n), best, : self.stage], self._cost[np.arange(n), best]

    def keep(self, which: NDArray[np.bool_]) -> None:
        """Go on with some of the vectors only."""
        if not which.all():
            self._left, self._cost = self._left[which], self._cost[which]
            self._codes = self._codes[which]


# --- learning ---------------------------------------------------------------------------------


def kmeans(
    vectors: Floats, n_centroids: int, iterations: int, rng: np.random.Generator,
    first: Floats | None = None,
) -> Floats:  # fmt: skip
    """Centroids float32 ``[n_centroids, d]`` of vectors ``[n, d]`` by Lloyd's iterations.

    ``first``: where to begin; else at vectors drawn at random, or with faiss, if that is installed.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if first is None:
        trained = _by_faiss(vectors, n_centroids, iterations, int(rng.integers(1 << 31)))
        if trained is not None:
            return trained
        first = vectors[rng.choice(len(vectors), n_centroids, replace=len(vectors) < n_centroids)]
    centroids = np.ascontiguousarray(first, np.float32)
    for _ in range(iterations):
        centroids = means(vectors, ops.nearest_centroids(vectors, centroids), centroids, rng)
    return centroids


def means(
    vectors: Floats, labels: Codes, centroids: Floats, rng: np.random.Generator
) -> Floats:
    """The mean of the vectors of each label; one that has none begins again at a vector."""
    counts = np.bincount(labels, minlength=len(centroids))
    there = np.flatnonzero(counts)
    starts = (np.cumsum(counts) - counts)[there]
    moved = vectors[rng.integers(len(vectors), size=len(centroids))]
    sums = np.add.reduceat(vectors[np.argsort(labels, kind="stable")], starts, axis=0)
    moved[there] = sums / counts[there, None]
    return moved


def _by_faiss(
    vectors: Floats, n_centroids: int, iterations: int, seed: int
) -> Floats | None:
    try:
        import faiss
    except ImportError:
        return None
    trainer = faiss.Kmeans(
        vectors.shape[1], n_centroids, niter=iterations, seed=seed,
        min_points_per_centroid=1, max_points_per_centroid=len(vectors),
    )  # fmt: skip
    trainer.train(vectors)
    return np.ascontiguousarray(trainer.centroids, np.float32)


def learn_stages(
    vectors: Floats, n_stages: int, width: int, iterations: int, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int32], Floats]]:
    """Residual stages one after another: columns int32 ``[width]``, centroids float32
    ``[256, width]``. Each is over the columns that the ones before leave the most of.

    ``vectors``: float32 ``[n, W]``; what the stages leave of them is in them at the end. Before
    the next stage the caller may round the centroids, in place.
    """
    for _ in range(n_stages):
        power = np.square(vectors).mean(axis=0)
        columns = np.sort(np.argsort(-power, kind="stable")[:width]).astype(np.int32)
        part = np.ascontiguousarray(vectors[:, columns])
        centroids = kmeans(part, CENTROIDS, iterations, rng)
        yield columns, centroids
        vectors[:, columns] = part - centroids[ops.nearest_centroids(part, centroids)]


def learn_rotation(
    vectors: Floats, width: int, rounds: int, rng: np.random.Generator
) -> Floats:
    """The rotation float32 ``[d, d]`` of vectors ``[n, d]`` that sub-vectors of ``width`` columns
    cost the least error in: optimized product quantization (Ge, He, Ke, Sun 2013), which finds
    codes and rotation in turn."""
    size = vectors.shape[1]
    values, directions = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
    rotation = directions[:, balanced(values, size // width)].astype(np.float32)
    centroids: list[Floats | None] = [None] * (size // width)
    for _ in range(rounds):
        turned = vectors @ rotation
        coded = np.empty_like(turned)
        for i, first in enumerate(centroids):
            part = np.ascontiguousarray(turned[:, i * width : (i + 1) * width])
            found = kmeans(part, CENTROIDS, 2 if first is not None else 4, rng, first)
            coded[:, i * width : (i + 1) * width] = found[ops.nearest_centroids(part, found)]
            centroids[i] = found
        left, _, right = np.linalg.svd((vectors.T @ coded).astype(np.float64))
        rotation = (left @ right).astype(np.float32)
    return rotation


def balanced(values: NDArray[np.float64], n_parts: int) -> NDArray[np.int64]:
    """An order of the columns in which each run of ``len(values) / n_parts`` has about the same
    product of ``values``: each in turn, the largest first, goes where the product is least.

    >>> balanced(np.array([1.0, 8.0, 4.0, 2.0]), 2).tolist()
    [1, 0, 2, 3]
    """
    size = len(values) // n_parts
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    logs = np.log(np.maximum(values, values.max(initial=0) * 1e-9 + 1e-30))
    for column in np.argsort(-logs, kind="stable").tolist():
        open_parts = [part for part in parts if len(part) < size]
        min(open_parts, key=lambda part: (float(logs[part].sum()), len(part))).append(column)
    return np.array([column for part in parts for column in part], np.int64)
