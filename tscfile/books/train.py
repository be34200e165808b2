"""Learn a book from a model and calibration text.

1. *Metric*: what an error in each cached entry costs (`metric`).
2. *Prediction basis*: the leading directions of frames in the metric, and a network that predicts
   their coordinates from the tokens (`network`).
3. *Basis*: eigenvectors, in the metric, of what the prediction leaves, for each group of layers.
4. *Distributions* of quantized coefficients at several steps, pooled by class (`ladder`), and of
   token ids (`entropy.token_ids`); codebooks of coefficients (`product`).
5. *Exact coding*: how channels predict each other (`exact`).
6. *Tiers*: the step that meets each quality target, found by the continuation protocol on
   documents that all this did not see (`measure`).

Every step is a sum over windows of text, kept on disk as it grows (`checkpoint`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ..context import FrameContext
from ..entropy import token_ids
from ..errors import UnsupportedError, UsageError
from ..quality.arrays import CacheShape, KVArrays, rows
from ..quality.engine import Engine
from ..quality.windows import Text, choose_windows
from ..transforms.grouped_basis import LayerGroups
from ..transforms.prediction import Features
from ..transforms.rope import HALVES, Rope
from .basis import (
    GROUP_CHANNELS,
    Progress,
    distributions,
    layer_groups,
    second_moments,
    with_basis,
)
from .book import Book
from .checkpoint import Checkpoint, State
from .exact import learn_exact
from .measure import measure_tiers
from .metric import Metric
from .network import Sample, fit_network
from .product import learn_product
from .tables import quantize_rows

METRICS = ("fisher", "attention", "plain")
_HOLD_BACK = 8
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
    n_hidden: int = 1024
    n_predicted: int = 256
    epochs: int = 8
    group_channels: int = GROUP_CHANNELS
    n_measured: int = 8
    seed: int = 0


def train(
    engine: Engine, texts: Sequence[Text], options: TrainOptions = TrainOptions(),  # noqa: B008 - frozen
    progress: Progress = lambda words: None, *, keep: Path | None = None,
) -> Book:  # fmt: skip
    """Learn a book for the model of ``engine``; see the module's first lines.

    ``keep``: a folder for what is done so far; a training that was interrupted goes on from there.
    Raises `UnsupportedError` for models whose keys or shapes the transform does not take.
    """
    if options.metric not in METRICS:
        raise UsageError(f"metric {options.metric!r} is unknown; known are {', '.join(METRICS)}")
    digests = [text.digest for text in texts]
    key = repr((engine.fingerprint(), digests, options))
    checkpoint = Checkpoint(keep, blake3(key.encode()).hexdigest())
    learnt, held_back = split_texts(texts)
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
            "book.text_blake3": digests,
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
    book = with_basis(book, source, metric, checkpoint, progress)
    book.arrays["frequencies"] = distributions(book, source, progress)
    book.arrays |= learn_product(book, source, progress, seed=options.seed)
    progress("token ids")
    book.arrays |= token_ids.learn(documents, len(book.arrays["token_vectors"]))
    book.arrays |= learn_exact(book, source, checkpoint, progress)
    book.tiers = measure_tiers(
        engine, book, held_back, n_windows=options.n_measured, frames=options.fisher_frames,
        progress=progress,
    )  # fmt: skip
    checkpoint.done()
    return book


def split_texts(texts: Sequence[Text]) -> tuple[Text, Text]:
    """Documents to learn from, and every eighth to measure on; `UsageError` if there are none."""
    documents = [document for text in texts for document in text.documents]
    held_back = tuple(documents[_HOLD_BACK - 1 :: _HOLD_BACK])
    learnt = tuple(each for i, each in enumerate(documents, 1) if i % _HOLD_BACK)
    names = ", ".join(text.name for text in texts)
    if not held_back:
        raise UsageError(f"{names}: a book needs at least {_HOLD_BACK} documents to learn from")
    return Text(names, "", learnt), Text(names, "", held_back)


def check_shape(shape: CacheShape, group_channels: int) -> tuple[Rope, int, LayerGroups]:
    """RoPE, head size and groups of layers; `UnsupportedError` for shapes books do not take."""
    if shape.rope is None:
        raise UnsupportedError("how this model turns its keys is not known; no book can be made")
    sizes = {(one.n_kv_heads * one.key_dim, one.key_dim, one.value_dim) for one in shape.layers}
    if len(sizes) > 1 or any(key != value for _, key, value in sizes):
        raise UnsupportedError("layers of different shapes are not supported by books yet")
    width, head_dim, _ = sizes.pop()
    return shape.rope, head_dim, layer_groups(len(shape.layers), width, group_channels)


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

    def __len__(self) -> int:
        return len(self.windows)

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
        seed = options.seed + number
        if options.metric == "attention":
            state["moments"] += engine.attention_moments(tokens, options.n_draws, seed)
        else:
            state["moments"] += engine.gradient_moments(cached, fed, options.n_draws, seed)

    moments = checkpoint.accumulate("metric", windows, start, add)["moments"]
    return Metric.of_moments(moments)


# --- prediction -------------------------------------------------------------------------------


def _prediction(
    engine: Engine, source: _FrameSource, features: Features, metric: Metric, groups: LayerGroups,
    options: TrainOptions, checkpoint: Checkpoint, progress: Progress,
) -> tuple[dict[str, Any], list[int]]:  # fmt: skip
    """Arrays of prediction basis and network, and how many coordinates each group has."""
    moments = second_moments(
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
        whole: NDArray[np.float32] = np.concatenate(parts, axis=1).astype(np.float32)
        return whole

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
