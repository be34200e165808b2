"""Learn a session's basis from its own frames, so that basis and frames together are few bytes.

A tier is a mean squared error: a share of the variance of the keys and one of the values. Each
group of layers gets the step that meets it and as many components as pay for themselves: all that
stand out of the step, a half, a quarter, or none of them, whichever makes rows and frames fewer
bytes at the same error. What components leave over is coded channel by channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .entropy import widths
from .model import CellTable, TensorSpec, Track
from .session_basis import SCALES_PER_OCTAVE, Basis, Floats, Group, KeyTurn, Rows, channels_of
from .session_codec import SessionCodec, check_finite, quantize_group
from .transforms import klt

KEY_SHARE, VALUE_SHARE = 0.75, 1.33
"""Keys are coded finer than values: tolerances in units of their standard deviations. Chosen on the
reference model's calibration text, flat within a tenth."""

N_SINKS, N_RECENT = 4, 16
FINER = 4
"""Quarter octaves by which the step of the first positions, which all later tokens attend to, and
of the newest frames, which the next tokens attend to most, is finer."""

MAX_GROUP_CHANNELS = 8192
SAMPLE_FRAMES = 2048
_SAMPLE_RUN = 256
_FEW_FRAMES = 16
_ROUNDS = 3
_MOST_SHIFT = 25
_CLOSE = 0.03
_LEAST_VARIANCE = 2.0**-20
"""Of the mean square: channels that hardly vary need no finer step than this."""


@dataclass(frozen=True)
class Scales:
    """What tolerances are relative to: standard deviations of keys and of values."""

    key: float
    value: float

    def of(self, tensors: Sequence[TensorSpec]) -> Floats:
        """Scale of each tensor, float32."""
        shares = {"k": KEY_SHARE * self.key, "v": VALUE_SHARE * self.value}
        return np.array([shares[tensor.role] for tensor in tensors], np.float32)


def group_tensors(tensors: Sequence[TensorSpec]) -> list[list[int]]:
    """Indices of tensors in groups of neighbouring layers, keys first in each."""
    layers = sorted({tensor.layer for tensor in tensors})
    size_of = {layer: sum(t.n_channels for t in tensors if t.layer == layer) for layer in layers}
    groups: list[set[int]] = []
    n_channels = 0
    for layer in layers:
        if not groups or n_channels + size_of[layer] > MAX_GROUP_CHANNELS:
            groups.append(set())
            n_channels = 0
        groups[-1].add(layer)
        n_channels += size_of[layer]
    return [
        sorted((i for i, t in enumerate(tensors) if t.layer in group),
               key=lambda i: (tensors[i].role != "k", tensors[i].layer))
        for group in groups
    ]  # fmt: skip


def finer_frames(cells: CellTable, new: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Shift of each cell, int64 ``[n]``: `FINER` for the first positions and for the newest of the
    frames that are ``new``."""
    shifts = np.where(cells.pos < N_SINKS, FINER, 0)
    newest = np.flatnonzero(new)[np.argsort(cells.pos[new], kind="stable")][-N_RECENT:]
    shifts[newest] = FINER
    return shifts.astype(np.int64)


class Sample:
    """Frames of a track that a basis is learnt from: all of the new ones, or runs of them."""

    def __init__(self, track: Track, cells: NDArray[np.intp], turn: KeyTurn | None) -> None:
        """``cells``: indices of the new frames, rising."""
        n_runs = -(-min(len(cells), SAMPLE_FRAMES) // _SAMPLE_RUN)
        if len(cells) > SAMPLE_FRAMES:
            starts = np.linspace(0, len(cells) - _SAMPLE_RUN, n_runs).astype(int)
            cells = np.unique(np.concatenate([cells[s : s + _SAMPLE_RUN] for s in starts]))
        self.cells = cells
        self._track = track
        self._turn = turn
        breaks = np.flatnonzero(np.diff(cells) != 1) + 1
        self._spans = [
            (int(part[0]), int(part[-1]) + 1) for part in np.split(cells, breaks) if len(part)
        ]

    @property
    def pos(self) -> NDArray[np.int32]:
        return self._track.cells.pos[self.cells]

    def rows(self) -> list[Rows]:
        """Rows of all tensors, uint8 ``[n, row_bytes]`` each."""
        found = [self._track.read(*span) for span in self._spans]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def channels(self, tensors: Sequence[int]) -> Floats:
        """Real channels of these tensors, float32 ``[n, C]``."""
        part = [self._track.tensors[i] for i in tensors]
        found = [
            channels_of(self._turn, self._track.read(*span, tensors), part,
                        self._track.cells.pos[slice(*span)])
            for span in self._spans
        ]  # fmt: skip
        whole = np.concatenate(found)
        check_finite([whole])
        return whole


def measure_scales(sample: Sample, tensors: Sequence[TensorSpec]) -> Scales:
    """Standard deviations of all keys and of all values around their channels' means."""
    sums = {"k": [0.0, 0.0, 0], "v": [0.0, 0.0, 0]}
    for i, tensor in enumerate(tensors):
        values = sample.channels([i]).astype(np.float64)
        entry = sums[tensor.role]
        entry[0] += float(np.square(values - values.mean(axis=0)).sum())
        entry[1] += float(np.square(values).sum())
        entry[2] += values.size
    found = {}
    for role, (spread, square, count) in sums.items():
        # A few frames say little of how a channel varies.
        few = len(sample.cells) < _FEW_FRAMES
        least = square * (1 / 16 if few else _LEAST_VARIANCE)
        found[role] = max(float(np.sqrt(max(spread, least) / max(count, 1))), 1e-30)
    return Scales(found["k"], found["v"])


def learn(
    sample: Sample, tensors: Sequence[TensorSpec], turn: KeyTurn | None, scales: Scales,
    tolerance: float, shifts: NDArray[np.int64], n_frames: int,
) -> tuple[Basis, float]:  # fmt: skip
    """A basis for ``n_frames`` frames like those of ``sample``, and the bits that it and they take.

    ``tolerance``: mean squared error in units of `Scales`; ``shifts``: those of the sample.
    """
    groups, total = [], 0.0
    for indices in group_tensors(tensors):
        part = [tensors[i] for i in indices]
        units: Floats = np.repeat(scales.of(part), [tensor.n_channels for tensor in part])
        values = sample.channels(indices) / units
        learner = _GroupLearner(values, shifts, n_frames, tolerance, indices, part)
        group, bits = learner.best()
        group.steps = (group.steps * scales.of(part)).astype(np.float32)
        groups.append(group)
        total += bits
    return Basis(turn, groups), total


class _GroupLearner:
    """Finds step and number of components of one group; ``values``: ``[n, C]`` in scales."""

    def __init__(
        self, values: Floats, shifts: NDArray[np.int64], n_frames: int, tolerance: float,
        indices: list[int], tensors: Sequence[TensorSpec],
    ) -> None:  # fmt: skip
        self._indices, self._sizes = indices, [tensor.n_channels for tensor in tensors]
        self._finer = (2.0 ** (shifts / SCALES_PER_OCTAVE)).astype(np.float32)[:, None]
        self._n_frames = n_frames
        self._tolerance = tolerance
        self._mean = values.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._centred = values - self._mean
        self._singular, self._vectors = klt.components(self._centred * self._finer)
        self._squares = np.square(self._singular) / len(values)

    def best(self) -> tuple[Group, float]:
        """Fewer and fewer components, as long as that makes fewer bits."""
        best: tuple[Group, float] | None = None
        for share in (1.0, 0.5, 0.25, 0.0):
            found = self._at_share(share)
            if best is not None and found[1] >= best[1]:
                break
            best = found
        assert best is not None
        return best

    def _at_share(self, share: float) -> tuple[Group, float]:
        """The coarsest step found whose error is the tolerance or just below it."""
        step = self._first_guess(share)
        kept: tuple[Group, float] | None = None
        for _ in range(_ROUNDS):
            group, error, bits = self._try(step, share)
            close = error >= (1 - 2 * _CLOSE) * self._tolerance
            if error <= self._tolerance:
                kept = group, bits
                if close:
                    break
            # The error grows about as the step does, less where much is zero already.
            step *= (self._tolerance * (1 - _CLOSE) / max(error, 1e-12)) ** 0.6
        while kept is None:
            group, error, bits = self._try(step, share)
            if error <= self._tolerance or step < 1e-12:
                kept = group, bits
            step *= 0.9
        return kept

    def _first_guess(self, share: float) -> float:
        """Where uniform noise in what stands out of the step, and all of the rest, meet it."""
        n_channels = len(self._mean)
        for step in 2.0 ** np.arange(3, -14, -0.25):
            inside = self._squares > np.square(klt.LEAST * step)
            if share:
                error = inside.sum() * step * step / 6 + self._squares[~inside].sum()
            else:
                error = n_channels * step * step / 12
            if error <= self._tolerance * n_channels:
                break
        return float(step)

    def _try(self, step: float, share: float) -> tuple[Group, float, float]:
        """Group at a step, its mean squared error in scales, and its bits with all frames."""
        n, n_channels = self._centred.shape
        ratio = np.sqrt(self._n_frames / n)
        scaled = self._centred / np.float32(step)
        rank = int(share * (self._squares > np.square(klt.LEAST * step)).sum())
        singular, rows = self._singular[:rank] / step, self._vectors[:rank]
        weighted = scaled * self._finer
        exponents = klt.exponents_of(singular * ratio)
        group = self._group(step, exponents, rows)
        if rank:
            coefficients = np.rint(weighted @ klt.analysis(group.rows))
            used = coefficients.any(axis=0)
            rows = klt.refit(weighted, coefficients[:, used])
            group = self._group(step, exponents[used], rows)
            used = group.rows.any(axis=1)
            group = self._group(step, exponents[: len(rows)][used], rows[used])
        frames = self._centred / np.float32(step) + (self._mean / np.float32(step) - group.mean)
        coefficients, missed, *_, errors = quantize_group(
            group, klt.analysis(group.rows), frames, self._finer
        )
        bits = sum(float(widths.choose(part)[1].sum()) for part in (coefficients, missed))
        bits *= self._n_frames / n
        for part in np.split(group.entries, np.cumsum(self._sizes)[:-1], axis=1):
            bits += float(widths.choose(np.ascontiguousarray(part.T))[1].sum())
        return group, float(errors.sum()) / (n * n_channels) * step * step, bits

    def _group(self, step: float, exponents: NDArray[np.int8], rows: Floats) -> Group:
        first = klt.exponents_of(np.array([np.sqrt(self._n_frames)]))
        exponents = np.concatenate([first, exponents])
        mean = self._mean[None] / np.float32(step)
        entries = klt.round_rows(np.concatenate([mean, rows]), exponents)
        return Group(
            self._indices,
            self._sizes,
            np.full(len(self._sizes), step, np.float32),
            exponents,
            entries,
        )


def shift_for(
    codec: SessionCodec, frames: Sequence[Floats], tolerance: float, scales: Scales,
    tensors: Sequence[TensorSpec], shifts: NDArray[np.int64],
) -> int | None:  # fmt: skip
    """Quarter octaves by which a basis that is in the file must be finer for these frames; None if
    no shift that is stored meets the tolerance."""
    steps = [
        float(group.steps[0] / scales.of([tensors[group.tensors[0]]])[0])
        for group in codec.basis.groups
    ]
    weights = np.square(np.array(steps)) / codec.basis.n_channels
    for shift in range(_MOST_SHIFT):
        errors = codec.quantize(frames, shifts + shift)[2]
        if float((errors @ weights).mean()) <= tolerance:
            return shift
    return None


def bits_of(
    codec: SessionCodec, frames: Sequence[Floats], shifts: NDArray[np.int64], n_frames: int
) -> float:
    """Bits of ``n_frames`` frames like these, the basis not counted."""
    values = codec.quantize(frames, shifts)[0]
    return float(widths.choose(values)[1].sum()) * n_frames / len(values)


def extend(
    basis: Basis, frames: Sequence[Floats], shifts: NDArray[np.int64], n_frames: int
) -> tuple[Basis, float]:
    """A basis with further rows for what ``basis`` misses of ``frames``, and the bits of those.

    ``frames``: `Basis.frames` of a sample; ``n_frames``: how many will be coded.
    """
    finer = (2.0 ** (shifts / SCALES_PER_OCTAVE)).astype(np.float32)[:, None]
    ratio = np.sqrt(n_frames / len(shifts))
    groups, bits = [], 0.0
    for group, values in zip(basis.groups, frames, strict=True):
        scaled = values * finer
        known = np.rint(scaled @ klt.analysis(group.rows)) @ group.rows
        singular, rows = klt.components(scaled - known)
        rank = int((np.square(singular) > len(values) * klt.LEAST**2).sum())
        rank = min(rank, group.n_channels - group.rank)
        exponents = klt.exponents_of(singular[:rank] * ratio)
        entries = klt.round_rows(rows[:rank], exponents)
        for part in np.split(entries, np.cumsum(group.sizes)[:-1], axis=1):
            bits += float(widths.choose(np.ascontiguousarray(part.T))[1].sum())
        groups.append(
            Group(
                group.tensors, group.sizes, group.steps,
                np.concatenate([group.exponents, exponents]),
                np.concatenate([group.entries, entries]),
            )
        )  # fmt: skip
    return Basis(basis.turn, groups, basis.id, depth=basis.depth + 1), bits
