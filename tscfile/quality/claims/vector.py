"""Vector quantization as the TSC reports describe it: 256 centroids, one byte a block of values.

Part II and III: blocks of 8, 4, 2 or 1 consecutive channels of a head take one byte each, 1, 2, 4
or 8 bits a value. One codebook is learnt from the cache itself (Lloyd's algorithm) and stored with
it in fp16. Three additions: heads divided by their root mean square, product quantization (the
block cut into parts with a codebook each), and blocks that stay in fp16 because their error is
above a threshold. The reports do not say how heads are normalised or how the error is measured;
here it is the root mean square over the block, in units of the head's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedError
from ..arrays import CacheShape, KVArrays, from_layers
from ..codec import ByteTaker, join

N_CENTROIDS = 256
_SAMPLES = 16384
_ROUNDS = 25
_ROWS_AT_ONCE = 16384

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """What is learnt from a cache: ``scales`` float16, one a head, keys of all layers first;
    ``codebooks`` float16 ``[parts, 256, block / parts]``."""

    scales: NDArray[np.float16]
    codebooks: NDArray[np.float16]


class VectorQuantizer:
    """``block``: values of a block, ``parts``: bytes of a block, ``normalised``: heads are divided
    by their scale, ``threshold``: error above which a block stays in fp16."""

    family = "vector quantization"
    source = "TSC reports, parts II and III"
    book_bytes = 0

    def __init__(
        self, block: int, *, parts: int = 1, normalised: bool = False,
        threshold: float | None = None,
    ) -> None:  # fmt: skip
        self.block, self.parts = block, parts
        self._normalised, self._threshold = normalised, threshold
        self.name = vector_name(block, parts, normalised, threshold)

    @property
    def bits(self) -> float:
        """Bits a value of the codes alone."""
        return 8 * self.parts / self.block

    def encode(self, cache: KVArrays) -> bytes:
        model = self.learn(cache)
        parts: list[NDArray[np.generic]] = [model.codebooks]
        return join([model.scales, *parts] if self._normalised else parts) + self.codes(
            cache, model
        )

    def learn(self, cache: KVArrays) -> Model:
        scales = _scales(cache, self._normalised)
        blocks = self._blocks(cache, scales)
        width = self.block // self.parts
        books = [
            _codebook(blocks[:, i * width : (i + 1) * width]) for i in range(self.parts)
        ]
        return Model(scales, np.stack(books))

    def codes(self, cache: KVArrays, model: Model) -> bytes:
        """A cache in the codes of a model learnt from it or from another."""
        blocks = self._blocks(cache, model.scales)
        width = self.block // self.parts
        codes = np.stack(
            [
                _nearest(blocks[:, i * width : (i + 1) * width], book.astype(np.float32))
                for i, book in enumerate(model.codebooks)
            ],
            axis=1,
        )
        if self._threshold is None:
            return codes.tobytes()
        error = np.sqrt(np.square(blocks - _looked_up(codes, model)).mean(axis=1))
        exact = error > self._threshold
        raw = np.concatenate([each.reshape(-1) for _, role in cache.roles() for each in role])
        parts = [np.packbits(exact), codes[~exact], raw.reshape(-1, self.block)[exact]]
        return join(parts)

    def share_exact(self, cache: KVArrays) -> float:
        """The share of blocks that stay in fp16."""
        data = self.codes(cache, self.learn(cache))
        n_blocks = cache.shape.n_values // self.block
        flags = np.frombuffer(data, np.uint8, -(-n_blocks // 8))
        return float(np.unpackbits(flags, count=n_blocks).mean())

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        taker = ByteTaker(data)
        n_heads = 2 * sum(layer.n_kv_heads for layer in shape.layers)
        scales = np.ones(n_heads, np.float16)
        if self._normalised:
            scales = taker.take("<f2", n_heads)
        books = taker.take("<f2", self.parts, N_CENTROIDS, self.block // self.parts)
        return self.take(taker, shape, Model(scales, books))

    def take(self, taker: ByteTaker, shape: CacheShape, model: Model) -> KVArrays:
        """Undo `codes`."""
        n_blocks = shape.n_values // self.block
        if self._threshold is None:
            return _arrays(_looked_up(taker.take(np.uint8, n_blocks, self.parts), model), shape,
                           model.scales)  # fmt: skip
        exact = np.unpackbits(taker.take(np.uint8, -(-n_blocks // 8)), count=n_blocks).astype(bool)
        blocks = np.zeros((n_blocks, self.block), np.float32)
        n_exact = int(exact.sum())
        codes = taker.take(np.uint8, n_blocks - n_exact, self.parts)
        blocks[~exact] = _looked_up(codes, model)
        cache = _arrays(blocks, shape, model.scales)
        raw = np.concatenate([each.reshape(-1) for _, role in cache.roles() for each in role])
        raw.reshape(-1, self.block)[exact] = taker.take("<f2", n_exact, self.block)
        return _arrays(raw.astype(np.float32), shape, np.ones_like(model.scales))

    def _blocks(self, cache: KVArrays, scales: NDArray[np.float16]) -> Floats:
        if any(each.shape[2] % self.block for _, role in cache.roles() for each in role):
            raise UnsupportedError(f"{self.name} needs heads of a multiple of {self.block} values")
        parts, at = [], 0
        for _, role in cache.roles():
            for each in role:
                own = scales[at : at + len(each), None, None].astype(np.float32)
                parts.append((each.astype(np.float32) / own).reshape(-1, self.block))
                at += len(each)
        return np.concatenate(parts)


def vector_name(
    block: int, parts: int = 1, normalised: bool = False, threshold: float | None = None
) -> str:
    """
    >>> vector_name(8), vector_name(8, 2, True), vector_name(2, threshold=0.05)
    ('vq-8', 'pq-8x2-norm', 'vq-2-above-0.05')
    """
    name = f"vq-{block}" if parts == 1 else f"pq-{block}x{parts}"
    name += "-norm" if normalised else ""
    return name if threshold is None else f"{name}-above-{threshold:g}"


def _scales(cache: KVArrays, normalised: bool) -> NDArray[np.float16]:
    heads = [head for _, role in cache.roles() for each in role for head in each]
    if not normalised:
        return np.ones(len(heads), np.float16)
    found = [np.sqrt(np.square(head, dtype=np.float32).mean()) for head in heads]
    scales: NDArray[np.float16] = np.maximum(np.array(found), 2.0**-14).astype(np.float16)
    return scales


def _arrays(blocks: Floats, shape: CacheShape, scales: NDArray[np.float16]) -> KVArrays:
    values, sizes = ByteTaker(blocks.tobytes()), ByteTaker(scales.tobytes())

    def take(role: str, layer: int, n_heads: int, dim: int) -> NDArray[np.float16]:
        own = sizes.take("<f2", n_heads, 1, 1).astype(np.float32)
        return (values.take("<f4", n_heads, shape.n_tokens, dim) * own).astype(np.float16)

    return from_layers(shape, take)


def _codebook(vectors: Floats) -> NDArray[np.float16]:
    """256 centroids float16 by Lloyd's algorithm on samples of the vectors.

    It starts from samples along their first principal direction, as dense as is best there: of
    vectors of w numbers with density p, p^(w / (w + 2)) (Zador, IEEE Trans. IT-28(2), 1982).
    """
    sample = vectors[:: max(1, -(-len(vectors) // _SAMPLES))]
    along = sample @ np.linalg.svd(sample[:: max(1, len(sample) // 1024)], False)[2][0]
    order = np.argsort(along, kind="stable")
    # Neighbours in order are apart by 1 / p.
    gaps = np.maximum(np.diff(along[order], append=along[order[-1]]), 1e-6)
    share = np.cumsum(gaps.astype(np.float64) ** (2 / (sample.shape[1] + 2)))
    wanted = (np.arange(N_CENTROIDS) + 0.5) / N_CENTROIDS * share[-1]
    places = np.searchsorted(share, wanted).clip(0, len(sample) - 1)
    book: Floats = sample[order[places]].astype(np.float32)
    for _ in range(_ROUNDS):
        codes = _nearest(sample, book)
        counts = np.bincount(codes, minlength=N_CENTROIDS)
        sums = np.stack(
            [np.bincount(codes, column, N_CENTROIDS) for column in sample.T], axis=1
        )
        means = sums / np.maximum(counts, 1)[:, None]
        book = np.where(counts[:, None] > 0, means, book).astype(np.float32)
    return book.astype(np.float16)


def _nearest(vectors: Floats, book: Floats) -> NDArray[np.uint8]:
    """The nearest centroid of each, uint8 ``[n]``."""
    if vectors.shape[1] == 1:
        order = np.argsort(book[:, 0], kind="stable")
        rising = book[order, 0]
        middles = (rising[1:] + rising[:-1]) / 2
        found: NDArray[np.uint8] = order[np.searchsorted(middles, vectors[:, 0])].astype(np.uint8)
        return found
    half = np.square(book).sum(axis=1) / 2
    codes = np.empty(len(vectors), np.uint8)
    for at in range(0, len(vectors), _ROWS_AT_ONCE):
        part = slice(at, at + _ROWS_AT_ONCE)
        codes[part] = (half - vectors[part] @ book.T).argmin(axis=1)
    return codes


def _looked_up(codes: NDArray[np.uint8], model: Model) -> Floats:
    parts = [book[codes[:, i]] for i, book in enumerate(model.codebooks)]
    vectors: Floats = np.concatenate(parts, axis=1).astype(np.float32)
    return vectors
