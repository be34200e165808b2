"""Learn a book's ``exact_`` arrays: how channels predict each other, and how far they are off.

1. *Weights*: least squares of each channel on those before it, from the second moments of frames,
   rounded so that the prediction suffers least (nearest plane of Babai, Combinatorica 6(1), 1986,
   as in Frantar et al., arXiv:2210.17323).
2. *Scales*: the mean error of each channel, on windows that the weights did not see.
3. *Frequencies* of what the coder codes, in fp16 and in bf16, on the same windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import exact, ops

from ..context import FrameContext
from ..dtypes import DTYPES
from ..exact_codec import ExactCodec
from ..exact_tables import CONSTANT, FREQUENCIES, PREFIX, ExactTables, Layout
from ..model import TensorSpec
from ..transforms import channels
from ..transforms.rope import HALVES

if TYPE_CHECKING:
    from .basis import FrameSource, Progress
    from .book import Book
    from .checkpoint import Checkpoint, State

Floats = NDArray[np.float64]

_MOST_WEIGHTS = 1 << 24
"""About as many as a book may have; models of more channels see a shorter window."""

_FRAMES_PER_WEIGHT = 8
"""So many frames there are at least for each weight of a channel."""

_HOLD_BACK = 8
_MOST_LEARNT, _MOST_HELD = 64, 8
"""Every eighth window is kept from the weights; so many at most are learnt from and measured on.
Four times as many were found to save 0.1 %."""

_ROOT_BITS = 13
"""Regressors have a root mean square of about ``1 << _ROOT_BITS``."""

_RIDGE = 2.0**-21
"""Of a channel's power: what rounding to bf16 adds, halved a few times, as most files are fp16."""

_ROUNDING = 0.1
"""Error of a prediction by the rounding of weights, relative to what it is off anyway."""

_STRIP = 8
"""Groups whose moments are summed with one matrix product."""

_MOST_WEIGHT = (1 << 15) - 1
_LEAST_COUNT = 32.0
_BLOCK = 256


def learn_exact(
    book: Book, source: FrameSource, checkpoint: Checkpoint, progress: Progress
) -> dict[str, NDArray[Any]]:
    """The arrays, by name, for a ``book`` that has all its others."""
    held = range(_HOLD_BACK - 1, len(source), _HOLD_BACK)
    learnt = [i for i in range(len(source)) if i not in held]
    if not held:
        held = range(len(source))
    learnt = _spread(learnt, _MOST_LEARNT)
    learner = _Learner(book, sum(len(source.context(i).pos) for i in learnt))
    moments = learner.moments(source, learnt, checkpoint, progress)
    progress("exact: weights")
    learner.fit(moments)
    measured = _spread(list(held), _MOST_HELD)
    progress("exact: scales")
    learner.scale(source, measured)
    progress("exact: frequencies")
    learner.count(source, measured)
    return {PREFIX + name: array for name, array in learner.arrays.items()}


def _spread(numbers: list[int], most: int) -> list[int]:
    """At most ``most`` of ``numbers``, evenly."""
    return numbers[:: max(1, -(-len(numbers) // most))]


def exact_tables(book: Book, arrays: dict[str, NDArray[Any]], where: str = "book") -> ExactTables:
    return ExactTables(arrays, book.exact_order, book.token_vectors, book.token_scales, where)


@dataclass
class _Piece:
    """A block of frames as it is stored."""

    patterns: NDArray[np.uint16]
    context: FrameContext

    @property
    def ids(self) -> NDArray[np.int32]:
        return self.context.history(1)[:, 0]


class _Learner:
    def __init__(self, book: Book, n_frames: int) -> None:
        self.book = book
        self.order = book.exact_order
        n = self.order.n_channels
        dims = book.token_vectors.shape[1]
        # The first layer's keys and values follow from the token alone.
        token_channels = 2 * self.order.width if dims else 0
        most = min(_MOST_WEIGHTS // n, n_frames // _FRAMES_PER_WEIGHT)
        window = min(n, max(exact.GROUP, most // exact.GROUP * exact.GROUP))
        self.layout = Layout(n, window, dims, token_channels)
        vectors = np.abs(book.token_vectors.astype(np.float64)) * book.token_scales[:, None]
        root = math.sqrt(float((vectors**2).mean())) if vectors.size else 1.0
        self.token_bits = _ROOT_BITS - round(math.log2(max(root, 1e-9)))
        self.arrays: dict[str, NDArray[Any]] = {
            "sizes": np.array([window, token_channels, self.token_bits], np.int32),
            "unit_bits": np.zeros(n, np.int8),
            "sigmas": np.full(n, 2048, np.uint16),
            "frequencies": np.full(FREQUENCIES, _flat(), np.uint16),
        }
        self._keys = self._key_scale()

    def _key_scale(self) -> NDArray[np.float32]:
        """What channels of frames are multiplied with to be those of rows, turned back only."""
        scale = np.ones(self.order.n_channels, np.float32)
        scale[self.order.pairs() >= 0] = self.book.facts["book.rope_scale"]
        return scale

    # --- data ----------------------------------------------------------------------------------

    def _unturned(self, source: FrameSource, number: int) -> NDArray[np.float32]:
        """Channels of a window in the order of coding, keys turned back, float32 ``[n, C]``."""
        return source.frames(number)[:, self.order.places()] * self._keys

    def _pieces(self, source: FrameSource, number: int, dtype: str) -> Iterator[_Piece]:
        """A window as it is stored in an element type, block after block."""
        kind = DTYPES[dtype]
        tensors = [
            TensorSpec(layer, role, kind, 2 * self.order.width)
            for role in "kv" for layer in range(self.order.n_layers)
        ]  # fmt: skip
        context = source.context(number)
        rows = channels.from_frames(
            source.frames(number).copy(), tensors, context.pos, self.book.rope,
            self.order.head_dim, HALVES,
        )  # fmt: skip
        patterns = self.order.gather(rows, tensors, HALVES)
        for start in range(0, patterns.shape[1], _BLOCK):
            part = slice(start, start + _BLOCK)
            yield _Piece(
                np.ascontiguousarray(patterns[:, part]),
                FrameContext(context.pos[part], context.tokens),
            )

    def _tokens(self, context: FrameContext) -> NDArray[np.float32]:
        """Token vector of each frame, float32 ``[n, D]``."""
        ids = context.history(1)[:, 0]
        known = (ids >= 0) & (ids < len(self.book.token_vectors))
        rows = np.where(known, ids, 0)
        scales = np.where(known, self.book.token_scales[rows], np.float32(0))
        vectors: NDArray[np.float32] = self.book.token_vectors[rows] * scales[:, None]
        return vectors

    # --- weights -------------------------------------------------------------------------------

    def moments(
        self, source: FrameSource, numbers: list[int], checkpoint: Checkpoint, progress: Progress
    ) -> State:
        """Sums over frames: ``shared`` of constant and token with themselves, ``band`` of each
        group's channels with constant, token, window and themselves, one group after another."""
        shared = 1 + self.layout.token_dims
        spans = list(zip(self.layout.groups(), self.layout.widths(), strict=True))
        sizes = [(stop - first) * width for (_, first, stop, _), width in spans]

        def start() -> State:
            return {
                "n": np.zeros((), np.int64), "shared": np.zeros((shared, shared)),
                "band": np.zeros(sum(sizes)),
            }  # fmt: skip

        def add(state: State, done: int, number: int) -> None:
            progress(f"exact: window {done + 1} of {len(numbers)}")
            frames = self._unturned(source, number)
            head = np.ones((len(frames), shared), np.float32)
            head[:, 1:] = self._tokens(source.context(number))
            state["n"] += len(frames)
            state["shared"] += head.T.astype(np.float64) @ head
            parts = np.split(state["band"], np.cumsum(sizes)[:-1])
            for at in range(0, len(spans), _STRIP):
                strip = spans[at : at + _STRIP]
                begin, end = strip[0][0][1], strip[-1][0][2]
                left = strip[0][0][0]
                own = np.ascontiguousarray(frames[:, begin:end].T)
                above, beside = own @ head, own @ frames[:, left:end]
                for ((low, first, stop, dims), width), part in zip(
                    strip, parts[at : at + _STRIP], strict=True
                ):
                    rows, sums = slice(first - begin, stop - begin), part.reshape(-1, width)
                    sums[:, : 1 + dims] += above[rows, : 1 + dims]
                    sums[:, 1 + dims :] += beside[rows, low - left : stop - left]

        return checkpoint.accumulate("exact", numbers, start, add)

    def fit(self, moments: State) -> None:
        """Scales of regressors and the weights."""
        n = int(moments["n"])
        spans, widths = self.layout.groups(), self.layout.widths()
        bands, at = [], 0
        for (_, first, stop, _), width in zip(spans, widths, strict=True):
            size = (stop - first) * width
            bands.append(moments["band"][at : at + size].reshape(stop - first, width) / n)
            at += size
        power = np.concatenate([
            np.diagonal(band[:, -(stop - first) :])
            for band, (_, first, stop, _) in zip(bands, spans, strict=True)
        ])  # fmt: skip
        pairs = self.order.pairs()
        turned = pairs >= 0
        power = np.maximum(power, 1e-24)
        shared_power = power.copy()
        shared_power[turned] = np.repeat(power[turned].reshape(-1, 2).mean(axis=1), 2)
        scale_bits = np.clip(_ROOT_BITS - np.rint(np.log2(shared_power) / 2), -60, 60).astype(int)
        units = np.exp2(scale_bits.astype(np.float64))
        token_units = np.exp2(np.array(self.token_bits, np.float64))
        head_units = np.concatenate([[CONSTANT], np.full(self.layout.token_dims, token_units)])
        shared = moments["shared"] / n * np.outer(head_units, head_units)
        weights, weight_bits = [], []
        for g, (low, first, stop, dims) in enumerate(spans):
            head, own = 1 + dims, stop - first
            gram = np.zeros((head + stop - low,) * 2)
            gram[:head, :head] = shared[:head, :head]
            for h in range(g + 1):
                low_h, first_h, stop_h, dims_h = spans[h]
                if stop_h <= low:
                    continue
                rows = np.arange(max(first_h, low), stop_h)
                band = bands[h][rows - first_h] * units[rows, None]
                target = head + rows - low
                gram[target, :head] = band[:, :head] * head_units[:head]
                begin = max(low_h, low)
                skipped = 1 + dims_h + begin - low_h
                inner = band[:, skipped:] * units[begin:stop_h]
                gram[target[0] : target[-1] + 1, head + begin - low : head + stop_h - low] = inner
            found, bits = _weights_of(gram, own, np.flatnonzero(pairs[first:stop] >= 0)[1::2])
            weights.append(found)
            weight_bits.append(bits)
        whole = np.concatenate([each.reshape(-1) for each in weights]).astype(np.int16)
        self.arrays |= {
            "weights_low": (whole & 0xFF).astype(np.uint8),
            "weights_high": (whole >> 8).astype(np.int8),
            "weight_bits": np.concatenate(weight_bits).astype(np.int8),
            "scale_bits": scale_bits.astype(np.int8),
        }

    # --- errors --------------------------------------------------------------------------------

    def _codec(self) -> ExactCodec:
        arrays = {PREFIX + name: array for name, array in self.arrays.items()}
        return ExactCodec(exact_tables(self.book, arrays), self.book.inv_freq, HALVES)

    def scale(self, source: FrameSource, numbers: list[int]) -> None:
        """Unit and mean error of each channel."""
        codec = self._codec()
        total, n = np.zeros(self.order.n_channels), 0
        for number in numbers:
            for piece in self._pieces(source, number, "f16"):
                values = piece.patterns.view(np.float16).astype(np.float64)
                off = np.abs(values - codec.predictions(piece.patterns, exact.FORMATS["f16"],
                                                        piece.context.pos, piece.ids))  # fmt: skip
                total += np.where(np.isfinite(off), off, 0).sum(axis=1)
                n += values.shape[1]
        # A mean error of three quarters, as a Laplacian of scale 1 about has.
        sigma = np.maximum(total / n / 0.75, 2.0**-28)
        bits = 11 - np.floor(np.log2(sigma)).astype(int)
        bits = np.clip(bits, -40, 40)
        self.arrays["unit_bits"] = bits.astype(np.int8)
        self.arrays["sigmas"] = np.clip(np.rint(sigma * np.exp2(bits)), 2048, 4095).astype(
            np.uint16
        )

    def count(self, source: FrameSource, numbers: list[int]) -> None:
        """Frequencies of symbols in each table, learnt from both element types."""
        codec = self._codec()
        n_symbols = exact.N_SYMBOLS
        counts = np.zeros(FREQUENCIES[0] * n_symbols)

        def take(_: slice, events: ops.ExactEvents) -> None:
            at = events.tables.astype(np.int64) * n_symbols + events.symbols
            np.add(counts, np.bincount(at.reshape(-1), minlength=len(counts)), out=counts)

        for dtype in ("f16", "bf16"):
            for number in numbers:
                for piece in self._pieces(source, number, dtype):
                    form = exact.FORMATS[dtype]
                    codec.events(piece.patterns, form, piece.context.pos, piece.ids, take)
        self.arrays["frequencies"] = _frequencies(
            counts.reshape(exact.N_RATIOS, exact.N_PLACES, n_symbols)
        )


def _weights_of(
    gram: Floats, own: int, seconds: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Weights int64 ``[own, k]`` and their bits: the last ``own`` of k variables, each from those
    before it; ``seconds``: those of them that do not see the one right before them."""
    k = len(gram)
    power = np.diagonal(gram).copy()
    lower = _factor(gram, power)
    before = np.arange(k - own, k)
    error = lower[before, before].copy()
    before[seconds] -= 1
    error[seconds] = np.hypot(error[seconds], lower[before[seconds] + 1, before[seconds]])
    diagonal = np.diagonal(lower)
    spread = np.cumsum(diagonal**2)[np.maximum(before - 1, 0)]
    bits = np.ceil(-np.log2(_ROUNDING * error * np.sqrt(12 / spread))).astype(np.int64)
    bits = np.clip(bits, 0, 40)
    while True:
        steps = np.exp2(-bits.astype(np.float64))
        left = lower[k - own :].copy()
        left[np.arange(k)[None] >= before[:, None]] = 0
        found = np.zeros((own, k))
        for i in range(k - 2, -1, -1):
            rows = slice(max(0, i - (k - own)), own)
            whole = np.rint(left[rows, i] / (diagonal[i] * steps[rows]))
            whole[before[rows] <= i] = 0
            found[rows, i] = whole
            left[rows, : i + 1] -= (whole * steps[rows])[:, None] * lower[i, : i + 1]
        large = np.abs(found).max(axis=1, initial=0) > _MOST_WEIGHT
        if not (large & (bits > 0)).any():
            return np.clip(found, -_MOST_WEIGHT, _MOST_WEIGHT).astype(np.int64), bits
        bits -= large & (bits > 0)


def _factor(gram: Floats, power: Floats) -> Floats:
    """Cholesky factor of ``gram``, of which only the lower triangle counts."""
    ridge = _RIDGE
    while True:
        try:
            lower = np.linalg.cholesky(gram + np.diag(ridge * power + 1e-9))
            return lower.astype(np.float64, copy=False)
        except np.linalg.LinAlgError:
            # Sums of float32 products can be off by more than the ridge.
            if ridge > 1:
                raise
            ridge *= 4


def _flat() -> NDArray[np.uint16]:
    """Frequencies of symbols that are all alike."""
    even, rest = divmod(1 << exact.TABLE_BITS, exact.N_SYMBOLS)
    return np.array([even + (i < rest) for i in range(exact.N_SYMBOLS)], np.uint16)


def _frequencies(counts: Floats) -> NDArray[np.uint16]:
    """Tables uint16 ``[ratios * places, symbols]`` of counts ``[ratios, places, symbols]``.

    Where little was counted, places of a ratio count for each other, and ratios for their
    neighbours.
    """
    pooled = counts.sum(axis=1)
    prior = np.full(counts.shape[2], 1 / counts.shape[2])
    tables = np.empty(counts.shape, np.uint16)
    for ratio in range(len(counts) - 1, -1, -1):
        prior = pooled[ratio] + _LEAST_COUNT * prior
        prior /= prior.sum()
        for place in range(counts.shape[1]):
            weighed = counts[ratio, place] + _LEAST_COUNT * prior
            tables[ratio, place] = _rounded(weighed / weighed.sum())
    return tables.reshape(-1, counts.shape[2])


def _rounded(odds: Floats) -> NDArray[np.uint16]:
    """Positive frequencies of the table's sum; what rounding leaves goes to the largest."""
    free = (1 << exact.TABLE_BITS) - len(odds)
    found = 1 + np.floor(odds * free).astype(np.int64)
    found[int(np.argmax(found))] += (1 << exact.TABLE_BITS) - int(found.sum())
    return found.astype(np.uint16)
