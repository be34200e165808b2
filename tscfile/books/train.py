"""Learn a book from a model and calibration text.

1. *Metric*: F, the second moment of the gradient of log p(y) by each cached key (before RoPE) and
   value, for continuation tokens y drawn from the model, with random signs so that cross terms
   vanish. KL of the next-token distribution is then about half the F-weighted squared error: F is
   the Fisher matrix of the cache entries (Amari, Natural gradient, 1998).
2. *Moments* of frames and of the token vectors before them, in one pass; from these the linear
   predictor, the covariance of what it leaves, and its eigenvectors in the metric.
3. *Distributions* of quantized coefficients at several steps, pooled by class (`ladder`).
4. *Tiers*: the step that meets each quality target, found by the continuation protocol on
   documents that the first three did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..entropy import ladder
from ..errors import UnsupportedError, UsageError
from ..history import context_of
from ..lossy import size_lengths
from ..quality.arrays import KVArrays, rows
from ..quality.engine import Engine
from ..quality.windows import Text, choose_windows
from ..transforms.rope import HALVES, Rope
from .book import Book
from .measure import measure_tiers

METRICS = ("fisher", "plain")
MAX_CHANNELS = 16384
"""Channels of a frame that one transform takes; larger models need layer groups."""

_HOLD_BACK = 8
_FLOOR = 1e-3
_NARROWEST = 0.04


@dataclass(frozen=True)
class TrainOptions:
    """``n_windows`` windows of ``frames`` tokens for moments, ``n_fisher`` of ``fisher_frames`` and
    ``n_continue`` tokens behind them for the metric, each with ``n_draws`` drawn continuations.
    ``history``: tokens the predictor sees. ``n_measured``: windows that tiers are measured on."""

    metric: str = "fisher"
    n_windows: int = 160
    frames: int = 1024
    n_fisher: int = 48
    fisher_frames: int = 768
    n_continue: int = 128
    n_draws: int = 4
    history: int = 3
    n_measured: int = 8
    token_dims: int = 256
    seed: int = 0


Progress = Callable[[str], None]


def train(
    engine: Engine, text: Text, options: TrainOptions = TrainOptions(),  # noqa: B008 - frozen
    progress: Progress = lambda words: None,
) -> Book:  # fmt: skip
    """Learn a book for the model of ``engine``; see the module's first lines.

    Raises `UnsupportedError` for models whose keys or shapes the transform does not take.
    """
    if options.metric not in METRICS:
        raise UsageError(f"metric {options.metric!r} is unknown; known are {', '.join(METRICS)}")
    learnt, held_back = split_text(text)
    documents = [engine.tokenize(document) for document in learnt.documents]
    windows = choose_windows(documents, options.frames, options.n_windows, options.seed)
    shape = engine.prefill(windows[0].tokens[:8]).shape
    rope, head_dim = _check_shape(shape)
    metric = _metric(engine, documents, options, progress)
    vectors = _token_vectors(engine, documents, options.token_dims)
    moments = _Moments(options.history * vectors.values.shape[1], metric.size)
    for i, window in enumerate(windows):
        progress(f"moments: window {i + 1} of {len(windows)}")
        frames = _frames(engine.prefill(window.tokens), rope)
        moments.add(vectors.history(window.tokens, options.history), frames)
    arrays = _solve(moments, metric, vectors)
    arrays |= {
        "inv_freq": rope.inv_freq.astype(np.float32),
        "frequencies": np.zeros((ladder.N_CLASSES, ladder.N_SYMBOLS), np.uint16),
    }
    facts = dict(engine.identity.facts) | {
        "book.history": options.history,
        "book.rope_pairing": HALVES,
        "book.rope_scale": float(rope.scale),
        "book.head_dim": head_dim,
        "book.metric": options.metric,
        "book.text_blake3": text.digest,
    }
    book = Book(facts, arrays)
    book.arrays["frequencies"] = _distributions(engine, book, windows[::8], rope, progress)
    book.tiers = measure_tiers(
        engine, book, held_back, n_windows=options.n_measured, frames=options.fisher_frames,
        progress=progress,
    )  # fmt: skip
    return book


def split_text(text: Text) -> tuple[Text, Text]:
    """Documents to learn from, and every eighth to measure on; `UsageError` if there are none."""
    held_back = text.documents[_HOLD_BACK - 1 :: _HOLD_BACK]
    learnt = tuple(each for i, each in enumerate(text.documents, 1) if i % _HOLD_BACK)
    if not held_back:
        raise UsageError(f"{text.name}: a book needs at least {_HOLD_BACK} documents to learn from")
    return replace(text, documents=learnt), replace(text, documents=held_back)


# --- what the data look like ------------------------------------------------------------------


def _check_shape(shape: Any) -> tuple[Rope, int]:
    if shape.rope is None:
        raise UnsupportedError("how this model turns its keys is not known; no book can be made")
    sizes = {(one.n_kv_heads * one.key_dim, one.key_dim, one.value_dim) for one in shape.layers}
    if len(sizes) > 1 or any(key != value for _, key, value in sizes):
        raise UnsupportedError("layers of different shapes are not supported by books yet")
    width, head_dim, _ = sizes.pop()
    if 2 * width * len(shape.layers) > MAX_CHANNELS:
        raise UnsupportedError(
            f"{2 * width * len(shape.layers)} channels a frame; books take {MAX_CHANNELS} so far"
        )
    return shape.rope, head_dim


def _frames(cache: KVArrays, rope: Rope) -> NDArray[np.float32]:
    """Float32 ``[n, C]`` in the channel order of `transforms.channels`."""
    positions = cache.shape.positions
    keys = [rows(rope.undo(k.astype(np.float32), positions)) for k in cache.keys]
    return np.concatenate([*keys, *(rows(v.astype(np.float32)) for v in cache.values)], axis=1)


@dataclass
class _TokenVectors:
    """Stored token vectors: int8 and a scale for each, and their float32 product ``values``."""

    stored: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float32]:
        return self.stored.astype(np.float32) * self.scales[:, None]

    def history(self, tokens: NDArray[np.int32], n: int) -> NDArray[np.float32]:
        """Vectors of each token and the ``n - 1`` before it, float32 ``[len, n * D]``."""
        return _lookup(self.values, _history_of(tokens, n))


def _lookup(values: NDArray[np.float32], history: NDArray[np.int32]) -> NDArray[np.float32]:
    found = values[np.maximum(history, 0)] * (history >= 0)[:, :, None]
    return found.reshape(len(history), -1)


def _history_of(tokens: NDArray[np.int32], n: int) -> NDArray[np.int32]:
    return context_of(np.arange(len(tokens), dtype=np.int32), tokens, n).history


def _token_vectors(
    engine: Engine, documents: Sequence[NDArray[np.int32]], dims: int
) -> _TokenVectors:
    """Embedding rows at unit size (as the first layer's norm sees them), in their leading
    ``dims`` directions by frequency of use."""
    rows_ = engine.embeddings()
    unit = rows_ / np.sqrt((rows_**2).mean(axis=1, keepdims=True) + 1e-6)
    if unit.shape[1] > dims:
        counts = np.bincount(np.concatenate(list(documents)), minlength=len(unit))[: len(unit)]
        weighted = unit * np.sqrt(counts + 1.0)[:, None]
        _, vectors = np.linalg.eigh(weighted.T @ weighted)
        unit = unit @ vectors[:, -dims:]
    return _TokenVectors(*_quantize_rows(unit.astype(np.float32)))


def _quantize_rows(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Int8 and a float32 scale for each row."""
    scales = np.maximum(np.abs(matrix).max(axis=1), 1e-30).astype(np.float32) / np.float32(127)
    return np.rint(matrix / scales[:, None]).astype(np.int8), scales


# --- metric -----------------------------------------------------------------------------------


@dataclass
class _Metric:
    """Block-diagonal F: float16 ``[n_tensors, c, c]``, scaled to a mean diagonal of 1."""

    blocks: NDArray[np.float16]

    @property
    def size(self) -> int:
        return int(self.blocks.shape[0] * self.blocks.shape[1])

    def roots(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """F^½ and its inverse, block by block."""
        values, vectors = np.linalg.eigh(self.blocks.astype(np.float64))
        values = np.sqrt(np.maximum(values, 1e-12))
        transposed = vectors.transpose(0, 2, 1)
        root = (vectors * values[:, None, :]) @ transposed
        inverse = (vectors / values[:, None, :]) @ transposed
        return root.astype(np.float32), inverse.astype(np.float32)


def _metric(
    engine: Engine, documents: Sequence[NDArray[np.int32]], options: TrainOptions,
    progress: Progress,
) -> _Metric:  # fmt: skip
    length = options.fisher_frames + options.n_continue
    n_windows = options.n_fisher if options.metric == "fisher" else 1
    windows = choose_windows(documents, length, n_windows, options.seed + 1)
    total: NDArray[np.float64] | None = None
    for i, window in enumerate(windows):
        progress(f"metric: window {i + 1} of {len(windows)}")
        cached, fed = np.split(window.tokens[:length], [options.fisher_frames])
        moment = engine.gradient_moments(cached, fed, options.n_draws, options.seed + i)
        total = moment if total is None else total + moment
    assert total is not None
    if options.metric == "plain":
        total = np.broadcast_to(np.eye(total.shape[1]), total.shape).copy()
    width = total.shape[1]
    diagonal = np.trace(total, axis1=1, axis2=2)[:, None, None] / width
    total = total + _FLOOR * diagonal * np.eye(width)
    return _Metric((total / diagonal.mean()).astype(np.float16))


# --- moments and what follows from them -------------------------------------------------------


class _Moments:
    """Sums over frames of the products of features, 1 and channels with each other."""

    def __init__(self, n_features: int, n_channels: int) -> None:
        self.n_features = n_features
        self.total = np.zeros((n_features + 1 + n_channels,) * 2, np.float64)

    def add(self, features: NDArray[np.float32], frames: NDArray[np.float32]) -> None:
        one = np.ones((len(frames), 1), np.float32)
        joint = np.concatenate([features, one, frames], axis=1)
        self.total += joint.T @ joint


def _solve(moments: _Moments, metric: _Metric, vectors: _TokenVectors) -> dict[str, Any]:
    """Predictor, mean, basis and scales from the moments."""
    f = moments.n_features
    total = moments.total
    ridge = 1e-4 * np.trace(total[:f, :f]) / f * np.eye(f + 1)
    ridge[-1, -1] = 0
    weights = np.linalg.solve(total[: f + 1, : f + 1] + ridge, total[: f + 1, f + 1 :])
    stored, scales = _quantize_rows(weights[:f].T.astype(np.float32))
    used = (stored.astype(np.float32) * scales[:, None]).T.astype(np.float64)
    # The mean makes good what rounding the predictor did to it.
    n = total[f, f]
    mean = (total[f, f + 1 :] - total[f, :f] @ used) / n
    mean = mean.astype(np.float32).astype(np.float64)
    map_ = np.concatenate([used, mean[None]])
    cross = total[: f + 1, f + 1 :]
    residual = total[f + 1 :, f + 1 :] - map_.T @ cross - cross.T @ map_
    residual = (residual + map_.T @ total[: f + 1, : f + 1] @ map_) / n
    return {
        "mean": mean.astype(np.float32),
        "token_vectors": vectors.stored,
        "token_scales": vectors.scales,
        "predictor": np.ascontiguousarray(stored.T),
        "predictor_scales": scales,
        "metric": metric.blocks,
        **_basis(residual, metric),
    }


def _basis(residual: NDArray[np.float64], metric: _Metric) -> dict[str, Any]:
    """Eigenvectors of the residual in the metric, as far as they can matter."""
    root, inverse = metric.roots()
    n, c = root.shape[:2]
    blocks = residual.reshape(n, c, n, c)
    whitened = np.einsum("aij,ajbk,bkl->aibl", root, blocks, root, optimize=True)
    values, vectors = np.linalg.eigh(whitened.reshape(n * c, n * c))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    sigmas = np.sqrt(values)
    keep = max(1, int((sigmas > _NARROWEST * np.sqrt(values.mean())).sum()))
    rows_ = vectors[:, :keep].T.reshape(keep, n, c)
    rows_ = np.einsum("raj,ajk->rak", rows_, inverse, optimize=True).reshape(keep, n * c)
    stored, scales = _quantize_rows(rows_.astype(np.float32))
    log_sigmas = np.rint(np.log2(np.maximum(sigmas[:keep], 1e-12)) * ladder.UNITS_PER_OCTAVE)
    return {
        "basis": stored,
        "basis_scales": scales,
        "log_sigmas": log_sigmas.clip(-32768, 32767).astype(np.int16),
    }


def _distributions(
    engine: Engine, book: Book, windows: Sequence[Any], rope: Rope, progress: Progress
) -> NDArray[np.uint16]:
    """Frequency tables of every class, pooled over coefficients and steps."""
    from ..quantizers.uniform import quantize

    counts = np.full((ladder.N_CLASSES, ladder.N_SYMBOLS), 1e-3)
    counts += _prior()
    lengths = size_lengths(_tables(_prior() + 1e-3))
    middle = int(np.median(book.log_sigmas))
    steps = range(middle - 2 * 256, int(book.log_sigmas.max()) + 2 * 256, 170)
    for i, window in enumerate(windows):
        progress(f"distributions: window {i + 1} of {len(windows)}")
        frames = _frames(engine.prefill(window.tokens), rope)
        history = _history_of(window.tokens, book.history)
        coefficients = (frames - book.predict(history)) @ book.analysis
        for log_step in steps:
            classes = ladder.class_of(book.log_sigmas, log_step)
            used = np.flatnonzero(classes >= 0)
            if not len(used):
                continue
            scale = np.float32(2.0 ** (-log_step / ladder.UNITS_PER_OCTAVE))
            values = quantize(coefficients[:, used] * scale, lengths, classes[used])
            symbols, _ = ladder.to_symbols(values)
            flat = classes[used][None, :] * ladder.N_SYMBOLS + symbols
            counts += np.bincount(flat.ravel(), minlength=counts.size).reshape(counts.shape)
    return _tables(counts)


def _tables(counts: NDArray[np.float64]) -> NDArray[np.uint16]:
    return np.stack([ladder.normalise(row) for row in counts])


def _prior() -> NDArray[np.float64]:
    """What a Laplace distribution of each class's width would give, in a few counts."""
    units = ladder.LOWEST + (np.arange(ladder.N_CLASSES) + 0.5) * (
        ladder.UNITS_PER_OCTAVE / ladder.CLASSES_PER_OCTAVE
    )
    decay = np.exp(-np.sqrt(2.0) / 2.0 ** (units / ladder.UNITS_PER_OCTAVE))[:, None]
    sizes = (np.arange(ladder.N_SYMBOLS) + 1) // 2
    mass = np.where(sizes == 0, 1 - decay**0.6, decay ** (sizes - 0.4) * (1 - decay) / 2)
    mass[:, ladder.ESCAPE] = decay[:, 0] ** (ladder.LARGEST + 0.6)
    return 20 * mass / mass.sum(axis=1, keepdims=True)
