"""Learn a book from a model and calibration text.

1. *Metric*: what an error in each cached entry costs (`metric`).
2. *Prediction basis*: the leading directions of frames in the metric, and a network that predicts
   their coordinates from the tokens (`network`).
3. *Basis*: eigenvectors, in the metric, of what the prediction leaves; one for each group of layers.
4. *Distributions* of quantized coefficients at several steps, pooled by class (`ladder`), and of
   token ids (`entropy.token_ids`).
5. *Tiers*: the step that meets each quality target, found by the continuation protocol on
   documents that all this did not see (`measure`).

Every step is a sum over windows of text, kept on disk as it grows (`checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ..context import FrameContext
from ..entropy import ladder, token_ids
from ..errors import UnsupportedError, UsageError
from ..lossy import size_lengths
from ..quality.arrays import CacheShape, KVArrays, rows
from ..quality.engine import Engine
from ..quality.windows import Text, choose_windows
from ..quantizers.uniform import quantize
from ..transforms.klt import LayerGroups
from ..transforms.prediction import Features
from ..transforms.rope import HALVES, Rope
from .book import Book
from .checkpoint import Checkpoint, State
from .measure import measure_tiers
from .metric import Metric
from .network import Sample, fit_network
from .tables import quantize_rows

METRICS = ("fisher", "plain")
GROUP_CHANNELS = 16384
"""Channels of a group of layers at most: a basis takes the square of it."""

_HOLD_BACK = 8
_NARROWEST = 0.04
_KEPT_BYTES = 1 << 30
"""Frames that are kept in memory between the passes; more are computed again."""


@dataclass(frozen=True)
class TrainOptions:
    """``n_windows`` windows of ``frames`` tokens at most for moments, ``n_fisher`` of
    ``fisher_frames`` and ``n_continue`` tokens behind them for the metric, each with ``n_draws``
    drawn continuations. ``history``, ``decays``, ``decay_dims``, ``token_dims``: see
    `transforms.prediction.Features`. ``n_hidden``: hidden units. ``n_predicted``: coordinates of
    the prediction for each 1536 channels. ``group_channels``: `GROUP_CHANNELS`. ``n_measured``:
    windows that tiers are measured on."""

    metric: str = "fisher"
    n_windows: int = 160
    frames: int = 2048
    n_fisher: int = 64
    fisher_frames: int = 768
    n_continue: int = 128
    n_draws: int = 4
    history: int = 3
    decays: tuple[float, ...] = (0.8, 0.95, 0.99)
    decay_dims: int = 64
    token_dims: int = 256
    n_hidden: int = 512
    n_predicted: int = 256
    epochs: int = 8
    group_channels: int = GROUP_CHANNELS
    n_measured: int = 8
    seed: int = 0


Progress = Callable[[str], None]


def train(
    engine: Engine, text: Text, options: TrainOptions = TrainOptions(),  # noqa: B008 - frozen
    progress: Progress = lambda words: None, *, keep: Path | None = None,
) -> Book:  # fmt: skip
    """Learn a book for the model of ``engine``; see the module's first lines.

    ``keep``: a folder for what is done so far; a training that was interrupted goes on from there.
    Raises `UnsupportedError` for models whose keys or shapes the transform does not take.
    """
    if options.metric not in METRICS:
        raise UsageError(f"metric {options.metric!r} is unknown; known are {', '.join(METRICS)}")
    key = repr((engine.fingerprint(), text.digest, options))
    checkpoint = Checkpoint(keep, blake3(key.encode()).hexdigest())
    learnt, held_back = split_text(text)
    documents = [engine.tokenize(document) for document in learnt.documents]
    frames = min(options.frames, engine.max_positions)
    windows = _windows(documents, frames, options.n_windows, options.seed)
    shape = engine.prefill(windows[0][:8]).shape
    rope, head_dim, groups = check_shape(shape, options.group_channels)
    source = _FrameSource(engine, windows, rope)
    features = _features(engine, documents, options)
    metric = _metric(engine, documents, source, groups, options, checkpoint, progress)
    arrays, predictions = _prediction(
        engine, source, features, metric, groups, options, checkpoint, progress
    )
    book = Book(
        dict(engine.identity.facts) | {
            "book.history": options.history,
            "book.decays": list(options.decays),
            "book.decay_dims": features.decay_dims,
            "book.n_layers": groups.n_layers,
            "book.group_layers": groups.per_group,
            "book.group_predictions": predictions,
            "book.group_coefficients": [0] * groups.n_groups,
            "book.rope_pairing": HALVES,
            "book.rope_scale": float(rope.scale),
            "book.head_dim": head_dim,
            "book.metric": options.metric,
            "book.text_blake3": text.digest,
        },
        arrays | {
            "metric": metric.blocks,
            "inv_freq": rope.inv_freq.astype(np.float32),
            "mean": np.zeros(metric.blocks.shape[0] * metric.blocks.shape[1], np.float32),
            "basis": np.zeros((0, groups.n_channels), np.int8),
            "basis_scales": np.zeros(0, np.float32),
            "log_sigmas": np.zeros(0, np.int16),
        },
    )  # fmt: skip
    book = _with_basis(book, source, metric, checkpoint, progress)
    book.arrays["frequencies"] = _distributions(book, source, progress)
    progress("token ids")
    book.arrays |= token_ids.learn(documents, len(book.arrays["token_vectors"]))
    book.tiers = measure_tiers(
        engine, book, held_back, n_windows=options.n_measured, frames=options.fisher_frames,
        progress=progress,
    )  # fmt: skip
    checkpoint.done()
    return book


def split_text(text: Text) -> tuple[Text, Text]:
    """Documents to learn from, and every eighth to measure on; `UsageError` if there are none."""
    held_back = text.documents[_HOLD_BACK - 1 :: _HOLD_BACK]
    learnt = tuple(each for i, each in enumerate(text.documents, 1) if i % _HOLD_BACK)
    if not held_back:
        raise UsageError(f"{text.name}: a book needs at least {_HOLD_BACK} documents to learn from")
    return replace(text, documents=learnt), replace(text, documents=held_back)


def check_shape(shape: CacheShape, group_channels: int) -> tuple[Rope, int, LayerGroups]:
    """RoPE, head size and groups of layers; `UnsupportedError` for shapes books do not take."""
    if shape.rope is None:
        raise UnsupportedError("how this model turns its keys is not known; no book can be made")
    sizes = {(one.n_kv_heads * one.key_dim, one.key_dim, one.value_dim) for one in shape.layers}
    if len(sizes) > 1 or any(key != value for _, key, value in sizes):
        raise UnsupportedError("layers of different shapes are not supported by books yet")
    width, head_dim, _ = sizes.pop()
    return shape.rope, head_dim, layer_groups(len(shape.layers), width, group_channels)


def layer_groups(n_layers: int, width: int, group_channels: int) -> LayerGroups:
    """The largest equal groups of at most ``group_channels`` channels.

    >>> layer_groups(32, 1024, 16384).per_group
    8
    """
    fitting = [n for n in range(1, n_layers + 1) if not n_layers % n]
    per_group = max((n for n in fitting if 2 * n * width <= group_channels), default=1)
    return LayerGroups(n_layers, width, per_group)


# --- what the data look like ------------------------------------------------------------------


def _windows(
    documents: Sequence[NDArray[np.int32]], length: int, n_windows: int, seed: int
) -> list[NDArray[np.int32]]:
    """Tokens of up to ``n_windows`` windows: fewer, or shorter ones, where the text is short."""
    n_tokens = sum(map(len, documents))
    length = min(length, n_tokens)
    found = choose_windows(documents, length, min(n_windows, n_tokens // max(length, 1)), seed)
    return [window.tokens for window in found]


class _FrameSource:
    """Frames of each window, float32 ``[n, C]`` in the channel order of `transforms.channels`.

    As many as fit are kept after the first pass.
    """

    def __init__(self, engine: Engine, windows: Sequence[NDArray[np.int32]], rope: Rope) -> None:
        self.windows = windows
        self._engine, self._rope = engine, rope
        self._kept: dict[int, NDArray[np.float16]] = {}
        self._room = _KEPT_BYTES

    def context(self, number: int) -> FrameContext:
        tokens = self.windows[number]
        return FrameContext(np.arange(len(tokens), dtype=np.int32), tokens)

    def frames(self, number: int) -> NDArray[np.float32]:
        if number in self._kept:
            return self._kept[number].astype(np.float32)
        found = frames_of(self._engine.prefill(self.windows[number]), self._rope)
        if found.nbytes // 2 <= self._room:
            self._room -= found.nbytes // 2
            # Caches are fp16; un-rotated keys lose another half unit to rounding.
            self._kept[number] = found.astype(np.float16)
        return found


def frames_of(cache: KVArrays, rope: Rope) -> NDArray[np.float32]:
    """Frames of a cache: keys before RoPE, then values."""
    positions = cache.shape.positions
    keys = [rows(rope.undo(k.astype(np.float32), positions)) for k in cache.keys]
    return np.concatenate([*keys, *(rows(v.astype(np.float32)) for v in cache.values)], axis=1)


def _features(
    engine: Engine, documents: Sequence[NDArray[np.int32]], options: TrainOptions
) -> Features:
    """Embedding rows at unit size (as the first layer's norm sees them), in their leading
    directions by frequency of use, as they are stored."""
    embeddings = engine.embeddings()
    unit = embeddings / np.sqrt((embeddings**2).mean(axis=1, keepdims=True) + 1e-6)
    counts = np.bincount(np.concatenate(list(documents)), minlength=len(unit))[: len(unit)]
    weighted = unit * np.sqrt(counts + 1.0)[:, None]
    _, directions = np.linalg.eigh(weighted.T @ weighted)
    leading = unit @ directions[:, ::-1][:, : options.token_dims]
    stored, scales = quantize_rows(leading)
    vectors = stored.astype(np.float32) * scales[:, None]
    dims = min(options.decay_dims, vectors.shape[1])
    return Features(vectors, options.history, options.decays, dims)


# --- metric -----------------------------------------------------------------------------------


def _metric(
    engine: Engine, documents: Sequence[NDArray[np.int32]], source: _FrameSource,
    groups: LayerGroups, options: TrainOptions, checkpoint: Checkpoint, progress: Progress,
) -> Metric:  # fmt: skip
    if options.metric == "plain":
        variances = np.mean(
            [source.frames(i).var(axis=0) for i in range(min(8, len(source.windows)))], axis=0
        )
        return Metric.plain(variances.reshape(2 * groups.n_layers, -1).mean(axis=1), groups.width)
    length = options.fisher_frames + options.n_continue
    windows = _windows(documents, length, options.n_fisher, options.seed + 1)

    def start() -> State:
        return {"moments": np.zeros((2 * groups.n_layers, groups.width, groups.width))}

    def add(state: State, number: int, tokens: NDArray[np.int32]) -> None:
        progress(f"metric: window {number + 1} of {len(windows)}")
        cached, fed = np.split(tokens, [len(tokens) - options.n_continue])
        state["moments"] += engine.gradient_moments(
            cached, fed, options.n_draws, options.seed + number
        )

    moments = checkpoint.accumulate("metric", windows, start, add)["moments"]
    return Metric.of_moments(moments)


# --- prediction -------------------------------------------------------------------------------


def _prediction(
    engine: Engine, source: _FrameSource, features: Features, metric: Metric, groups: LayerGroups,
    options: TrainOptions, checkpoint: Checkpoint, progress: Progress,
) -> tuple[dict[str, Any], list[int]]:  # fmt: skip
    """Arrays of prediction basis and network, and how many coordinates each group has."""
    moments = _second_moments(
        "frames", source, metric, groups, lambda i: source.frames(i), checkpoint, progress
    )
    total = options.n_predicted * groups.n_groups * groups.n_channels // 1536
    found = [np.linalg.eigh(each) for each in moments.covariances()]
    values = np.concatenate([each[0] for each in found])
    floor = np.sort(values)[-min(max(total, 1), len(values))]
    leading = [vectors[:, lengths >= floor][:, ::-1] for lengths, vectors in found]
    centre = metric.whiten(moments.mean[None].astype(np.float32))[0]

    def coordinates(number: int) -> NDArray[np.float32]:
        whitened = metric.whiten(source.frames(number)) - centre
        parts = [groups.take(whitened, g) @ each for g, each in enumerate(leading)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    scale = np.sqrt(np.concatenate([v[v >= floor][::-1] for v, _ in found])).astype(np.float32)
    targets = []
    for i in range(len(source.windows)):
        progress(f"network: window {i + 1} of {len(source.windows)}")
        targets.append((coordinates(i) / scale).astype(np.float16))
    sample = Sample(source.windows, targets, scale)
    fitted = fit_network(
        features, sample, options.n_hidden, options.epochs, options.seed, engine.device,
        checkpoint, progress,
    )  # fmt: skip
    coloured = [
        metric.colour(np.ascontiguousarray(each.T, np.float32), groups, g)
        for g, each in enumerate(leading)
    ]
    stored, scales = quantize_rows(np.concatenate(coloured))
    vectors, vector_scales = quantize_rows(features.vectors)
    arrays = {
        "token_vectors": vectors,
        "token_scales": vector_scales,
        "prediction": stored,
        "prediction_scales": scales,
        **fitted,
    }
    return arrays, [each.shape[1] for each in leading]


@dataclass
class _Moments:
    """Sums over frames: of frames in channels, of products of whitened frames in each group."""

    state: State
    groups: LayerGroups
    metric: Metric

    @property
    def mean(self) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = self.state["sum"] / self.state["n"]
        return mean

    def covariances(self) -> Iterator[NDArray[np.float64]]:
        """Of each group, in the metric."""
        centre = self.metric.whiten(self.mean[None].astype(np.float32))
        for g in range(self.groups.n_groups):
            part = self.groups.take(centre, g)[0].astype(np.float64)
            yield self.state["products"][g] / self.state["n"] - np.outer(part, part)


def _second_moments(
    stage: str, source: _FrameSource, metric: Metric, groups: LayerGroups,
    vectors: Callable[[int], NDArray[np.float32]], checkpoint: Checkpoint, progress: Progress,
) -> _Moments:  # fmt: skip
    size, n_windows = groups.n_channels, len(source.windows)

    def start() -> State:
        return {
            "n": np.array(0),
            "sum": np.zeros(groups.n_groups * size),
            "products": np.zeros((groups.n_groups, size, size)),
        }

    def add(state: State, number: int, window: NDArray[np.int32]) -> None:
        progress(f"{stage}: window {number + 1} of {n_windows}")
        found = vectors(number)
        whitened = metric.whiten(found)
        state["n"] += len(found)
        state["sum"] += found.sum(axis=0, dtype=np.float64)
        for g in range(groups.n_groups):
            part = groups.take(whitened, g)
            state["products"][g] += part.T @ part

    return _Moments(checkpoint.accumulate(stage, source.windows, start, add), groups, metric)


# --- basis and distributions --------------------------------------------------------------------


def _with_basis(
    book: Book, source: _FrameSource, metric: Metric, checkpoint: Checkpoint, progress: Progress
) -> Book:
    """The book with mean and basis of what its prediction leaves."""
    groups = book.groups

    def residual(number: int) -> NDArray[np.float32]:
        return source.frames(number) - book.predict(source.context(number))

    moments = _second_moments("residual", source, metric, groups, residual, checkpoint, progress)
    stored, scales, sigmas, counts = [], [], [], []
    for g, covariance in enumerate(moments.covariances()):
        values, vectors = np.linalg.eigh(covariance)
        sigma = np.sqrt(np.maximum(values[::-1], 0))
        keep = max(1, int((sigma > _NARROWEST * np.sqrt((sigma**2).mean())).sum()))
        rows_ = metric.colour(
            np.ascontiguousarray(vectors[:, ::-1].T[:keep], np.float32), groups, g
        )
        quantized = quantize_rows(rows_)
        stored.append(quantized[0])
        scales.append(quantized[1])
        sigmas.append(np.log2(np.maximum(sigma[:keep], 1e-12)) * ladder.UNITS_PER_OCTAVE)
        counts.append(keep)
    arrays = book.arrays | {
        "mean": moments.mean.astype(np.float32),
        "basis": np.concatenate(stored),
        "basis_scales": np.concatenate(scales),
        "log_sigmas": np.rint(np.concatenate(sigmas)).clip(-32768, 32767).astype(np.int16),
    }
    return Book(book.facts | {"book.group_coefficients": counts}, arrays)


def _distributions(
    book: Book, source: _FrameSource, progress: Progress
) -> NDArray[np.uint16]:
    """Frequency tables of every class, pooled over coefficients and steps."""
    counts = np.full((ladder.N_CLASSES, ladder.N_SYMBOLS), 1e-3) + _prior()
    lengths = size_lengths(_tables(counts))
    log_sigmas = book.arrays["log_sigmas"]
    steps = range(int(np.median(log_sigmas)) - 512, int(log_sigmas.max()) + 512, 170)
    numbers = range(0, len(source.windows), 8)
    for at, i in enumerate(numbers):
        progress(f"distributions: window {at + 1} of {len(numbers)}")
        residual = source.frames(i) - book.predict(source.context(i))
        coefficients = book.analyse(residual, book.facts["book.group_coefficients"])
        for log_step in steps:
            classes = ladder.class_of(log_sigmas, log_step)
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
