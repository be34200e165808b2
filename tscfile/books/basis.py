"""Basis and distributions of a book, from the frames that its prediction leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..book_codec import size_lengths
from ..context import FrameContext
from ..entropy import ladder
from ..quantizers.uniform import quantize
from ..transforms.grouped_basis import LayerGroups
from .book import Book
from .checkpoint import Checkpoint, State
from .metric import Metric
from .tables import quantize_rows

_NARROWEST = 0.04
"""Coefficients narrower than this share of the mean are left out of a basis."""

_MOST_DISTRIBUTED = 40
"""Windows that distributions are counted on."""

GROUP_CHANNELS = 16384
"""Channels of a group of layers at most: a basis takes the square of it."""

Progress = Callable[[str], None]


class FrameSource(Protocol):
    """Windows of text and their frames, float32 ``[n, C]`` in the channel order of
    `transforms.channels`."""

    def __len__(self) -> int: ...

    def frames(self, number: int) -> NDArray[np.float32]: ...

    def context(self, number: int) -> FrameContext: ...


def layer_groups(n_layers: int, width: int, group_channels: int) -> LayerGroups:
    """The largest equal groups of at most ``group_channels`` channels.

    >>> layer_groups(32, 1024, 16384).per_group
    8
    """
    fitting = [n for n in range(1, n_layers + 1) if not n_layers % n]
    per_group = max((n for n in fitting if 2 * n * width <= group_channels), default=1)
    return LayerGroups(n_layers, width, per_group)


@dataclass
class Moments:
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


def second_moments(
    stage: str, source: FrameSource, metric: Metric, groups: LayerGroups,
    vectors: Callable[[int], NDArray[np.float32]], checkpoint: Checkpoint, progress: Progress,
) -> Moments:  # fmt: skip
    size, n_windows = groups.n_channels, len(source)

    def start() -> State:
        return {
            "n": np.array(0),
            "sum": np.zeros(groups.n_groups * size),
            "products": np.zeros((groups.n_groups, size, size)),
        }

    def add(state: State, number: int, window: int) -> None:
        progress(f"{stage}: window {number + 1} of {n_windows}")
        found = vectors(number)
        whitened = metric.whiten(found)
        state["n"] += len(found)
        state["sum"] += found.sum(axis=0, dtype=np.float64)
        for g in range(groups.n_groups):
            part = groups.take(whitened, g)
            state["products"][g] += part.T @ part

    return Moments(checkpoint.accumulate(stage, range(len(source)), start, add), groups, metric)


def with_basis(
    book: Book, source: FrameSource, metric: Metric, checkpoint: Checkpoint, progress: Progress,
    *, shrink: bool = False,
) -> Book:  # fmt: skip
    """The book with mean and basis of what its prediction leaves.

    ``shrink``: allow for frames unlike the few that were seen, in directions that those lack.
    """
    groups = book.groups

    def residual(number: int) -> NDArray[np.float32]:
        return source.frames(number) - book.predict(source.context(number))

    moments = second_moments("residual", source, metric, groups, residual, checkpoint, progress)
    stored, scales, sigmas, counts = [], [], [], []
    for g, covariance in enumerate(moments.covariances()):
        if shrink:
            covariance = _shrunk(covariance, int(moments.state["n"]))
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


def _shrunk(covariance: NDArray[np.float64], n_frames: int) -> NDArray[np.float64]:
    """Mixed with an even spread, the more so the fewer frames there are for each channel."""
    size = len(covariance)
    share = size / (size + 20.0 * n_frames)
    even = np.trace(covariance) / size * np.eye(size)
    mixed: NDArray[np.float64] = (1 - share) * covariance + share * even
    return mixed


def distributions(
    book: Book, source: FrameSource, progress: Progress
) -> NDArray[np.uint16]:
    """Frequency tables of every class, pooled over coefficients and steps."""
    counts = np.full((ladder.N_CLASSES, ladder.N_SYMBOLS), 1e-3) + _prior()
    lengths = size_lengths(_tables(counts))
    log_sigmas = book.arrays["log_sigmas"]
    steps = range(int(np.median(log_sigmas)) - 512, int(log_sigmas.max()) + 512, 170)
    numbers = range(0, len(source), -(-len(source) // _MOST_DISTRIBUTED))
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
    counts: NDArray[np.float64] = 20 * mass / mass.sum(axis=1, keepdims=True)
    return counts
