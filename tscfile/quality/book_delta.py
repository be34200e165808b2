"""Token-position delta in front of the best coder there is here: does it save bytes?

Frames are coded as a book's tier does, but for what is taken off their coefficients before they are
quantized: a factor times the *decoded* coefficients of an earlier frame. That frame is the keyframe
before it, one every ``every`` positions, or the frame just before it (`PREVIOUS`). The factor is
learnt for each coefficient and distance; 1 for all is the plain difference of the TSC reports, and
0, `NONE`, is no delta at all, to compare with. What is left is coded with the class of its own,
smaller scale (`entropy.ladder`). Frames refer to none outside their block of 256.

Token ids are stored as in an archive, so that two of these codecs differ in the delta alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import ops

from .. import tokens
from ..book_codec import size_lengths, steps_of
from ..books.book import Book, load
from ..bytestream import ByteReader, ByteWriter
from ..context import FrameContext
from ..entropy import ladder
from ..quantizers.uniform import quantize
from ..registry import BOOK_TRANSFORM
from ..tiers import TIERS
from .arrays import CacheShape, KVArrays
from .calibration import Calibration
from .peers.basis import cache_from_rows, rows_of

NONE, PREVIOUS = 0, 1
"""Kinds of ``every`` that are no interval between keyframes."""

BLOCK = 256
_BYTES_PER_LANE = 768
_PASSES = 3
"""How often factors of `PREVIOUS` are learnt anew from frames decoded with the last ones."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tables:
    """What is learnt, by distance to the frame that is taken off, 0 for keyframes.

    ``factors``: float32 ``[D, R]``; ``log_sigmas``: int16 ``[D, R]``, scale of what is left.
    """

    factors: Floats
    log_sigmas: NDArray[np.int16]

    @property
    def n_bytes(self) -> int:
        """One byte a factor and two a scale, keyframes' apart, which the book has."""
        return 3 * self.factors[1:].size


@dataclass(frozen=True)
class Wave:
    """Frames of a block that are coded together: one ``step``, one ``distance`` to theirs."""

    frames: NDArray[np.int64]
    distance: int
    step: int


def waves(steps: NDArray[np.int32], every: int) -> Iterator[Wave]:
    """The waves of one block, such that frames come after those they refer to.

    ``steps``: int32 ``[n]``, the step of each frame.
    """
    n = len(steps)
    if every == PREVIOUS:
        for i in range(n):
            yield Wave(np.array([i]), min(i, 1), int(steps[i]))
        return
    distances = np.arange(n) % every if every else np.zeros(n, np.int64)
    for distance in range(int(distances.max(initial=0)) + 1):
        at = np.flatnonzero(distances == distance)
        for step in np.unique(steps[at]):
            yield Wave(at[steps[at] == step], distance, int(step))


class BookDelta:
    """``every``: frames from keyframe to keyframe, or `NONE` or `PREVIOUS`. ``plain``: factors of 1
    in place of learnt ones."""

    family = "token delta, book"
    source = "TSC reports, part I (keyframes, deltas), before this project's coder"

    def __init__(
        self, tier: str, book: Path, calibration: Calibration, every: int, plain: bool = False
    ) -> None:
        opened = load(book)
        self.name = delta_name(tier, every, plain)
        self._book, self._tokens = opened.book, opened.token_coder
        self._log_step = self._book.tier(tier).log_step
        self._every, self._lengths = every, size_lengths(self._book.frequencies)
        nothing = np.zeros((1, self._book.n_coefficients), np.float32)
        self._tables = Tables(nothing, self._book.log_sigmas[None])
        if every != NONE:
            # Keyframes are coded alike whatever their interval: one table has all distances.
            kind = "previous" if every == PREVIOUS else "keyframe"
            self._tables = calibration.learn(
                f"{kind} delta, {tier}, {plain}",
                partial(self._learn, furthest=1 if every == PREVIOUS else LONGEST - 1, plain=plain),
            )
        self.book_bytes = opened.n_bytes + self._tables.n_bytes

    # --- coding -------------------------------------------------------------------------------

    def encode(self, cache: KVArrays) -> bytes:
        coefficients = self._coefficients(cache)
        writer = ByteWriter()
        ids = tokens.encode(cache.shape.tokens, np.zeros(0, np.int32), self._tokens).data
        writer.uvarint(len(ids)).raw(ids)
        steps = self._steps(cache.shape.n_tokens)
        for start in range(0, len(steps), BLOCK):
            part = slice(start, start + BLOCK)
            values, _ = self._quantize(coefficients[part, None], steps[part], self._every)
            self._write(writer, values[:, 0], steps[part])
        return writer.bytes()

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        reader = ByteReader(memoryview(data), self.name)
        reader.take(reader.uvarint())
        steps = self._steps(shape.n_tokens)
        found = []
        for start in range(0, len(steps), BLOCK):
            part = steps[start : start + BLOCK]
            found.append(self._rebuild(self._read(reader, part), part))
        reader.end()
        book = self._book
        predicted = book.network(FrameContext(shape.positions, shape.tokens))
        frames = book.synthesize(
            predicted, np.concatenate(found), book.facts["book.group_coefficients"]
        )
        return cache_from_rows(dict(zip("kv", np.split(frames, 2, axis=1), strict=True)), shape)

    def _steps(self, n_frames: int) -> NDArray[np.int32]:
        return steps_of(np.arange(n_frames, dtype=np.int32), n_frames, self._log_step)

    def _coefficients(self, cache: KVArrays) -> Floats:
        """All of the book's coefficients of what the tokens do not say, float32 ``[n, R]``."""
        shape = cache.shape
        frames = np.concatenate(list(rows_of(cache).values()), axis=1)
        frames -= self._book.predict(FrameContext(shape.positions, shape.tokens))
        return self._book.analyse(frames, self._book.facts["book.group_coefficients"])

    def _quantize(
        self, coefficients: Floats, steps: NDArray[np.int32], every: int
    ) -> tuple[NDArray[np.int32], Floats]:
        """Integers int32 ``[n, m, R]`` of the n frames of m blocks side by side, and the
        coefficients that a decoder makes of them."""
        values = np.zeros(coefficients.shape, np.int32)
        decoded = np.zeros(coefficients.shape, np.float32)
        for wave in waves(steps, every):
            self._quantize_wave(wave, coefficients, values, decoded)
        return values, decoded

    def _quantize_wave(
        self, wave: Wave, coefficients: Floats, values: NDArray[np.int32], decoded: Floats
    ) -> None:
        step = _width(wave.step)
        expected = self._expected(wave, decoded)
        stored, classes = self._classes(wave)
        left = (coefficients[wave.frames] - expected)[..., stored] / step
        found = quantize(left.reshape(-1, len(stored)), self._lengths, classes)
        found = found.reshape(left.shape)
        integers = np.zeros(expected.shape, np.int32)
        integers[..., stored] = found
        values[wave.frames] = integers
        decoded[wave.frames] = expected + integers * step

    def _rebuild(self, values: NDArray[np.int32], steps: NDArray[np.int32]) -> Floats:
        """Coefficients float32 ``[n, R]`` of one block's integers."""
        decoded = np.zeros(values.shape, np.float32)
        for wave in waves(steps, self._every):
            new = values[wave.frames] * _width(wave.step)
            decoded[wave.frames] = self._expected(wave, decoded) + new
        return decoded

    def _expected(self, wave: Wave, decoded: Floats) -> Floats:
        """What the frames referred to say of a wave's coefficients, float32 ``[…, R]``."""
        if not wave.distance:
            return np.zeros_like(decoded[wave.frames])
        factors = self._tables.factors[wave.distance]
        found: Floats = decoded[wave.frames - wave.distance] * factors
        return found

    def _classes(self, wave: Wave) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Coefficients of a wave that are stored, and the class of each."""
        classes = ladder.class_of(self._tables.log_sigmas[wave.distance], wave.step)
        stored = np.flatnonzero(classes >= 0)
        return stored, classes[stored]

    # --- bytes --------------------------------------------------------------------------------

    def _write(
        self, writer: ByteWriter, values: NDArray[np.int32], steps: NDArray[np.int32]
    ) -> None:
        cells, classes = self._order(steps)
        symbols, escaped = ladder.to_symbols(values.reshape(-1)[cells])
        guess = ops.rans_encode(symbols[None], classes, self._book.frequencies, 1)[0].nbytes
        lanes = int(np.clip(guess // _BYTES_PER_LANE, 1, ops.LANES))
        words, lengths = ops.rans_encode(symbols[None], classes, self._book.frequencies, lanes)
        writer.uvarint(lanes)
        for length in lengths.tolist():
            writer.uvarint(length)
        writer.raw(words.astype("<u2").tobytes())
        for value in escaped.tolist():
            writer.uvarint(2 * value if value >= 0 else -2 * value - 1)

    def _read(self, reader: ByteReader, steps: NDArray[np.int32]) -> NDArray[np.int32]:
        """Undo `_write`."""
        cells, classes = self._order(steps)
        lengths = np.array([reader.uvarint() for _ in range(reader.uvarint())], np.uint32)
        words = np.frombuffer(reader.take(2 * int(lengths.sum())), "<u2").astype(np.uint16)
        symbols = np.zeros((1, len(cells)), np.uint8)
        numbers = np.arange(ladder.N_SYMBOLS, dtype=np.uint8)
        ops.rans_decode(words, lengths, classes, self._book.frequencies, numbers, symbols)
        coded = [reader.uvarint() for _ in range(int((symbols == ladder.ESCAPE).sum()))]
        escaped = [n >> 1 if n % 2 == 0 else -(n >> 1) - 1 for n in coded]
        values = np.zeros((len(steps), self._book.n_coefficients), np.int32)
        values.reshape(-1)[cells] = ladder.from_symbols(symbols[0], np.array(escaped, np.int32))
        return values

    def _order(self, steps: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Which integers of a block are stored, in what order, and the class of each."""
        cells, classes = [], []
        for wave in waves(steps, self._every):
            stored, found = self._classes(wave)
            cells.append((wave.frames[:, None] * self._book.n_coefficients + stored).reshape(-1))
            classes.append(np.tile(found, len(wave.frames)))
        return np.concatenate(cells), np.concatenate(classes).astype(np.uint8)

    # --- learning -----------------------------------------------------------------------------

    def _learn(self, calibration: Calibration, furthest: int, plain: bool) -> Tables:
        """Factors and scales of distances up to ``furthest``, on blocks of calibration text."""
        blocks = calibration.learn("delta coefficients", self._blocks)
        steps = np.full(len(blocks), self._log_step, np.int32)
        # As keyframes all of them, which refer to nothing.
        _, decoded = self._quantize(blocks, steps, NONE)
        tables = _fit(blocks, decoded, self._book, furthest, plain)
        if self._every == PREVIOUS:
            # Frames that are decoded after one another depend on the factors themselves.
            for _ in range(_PASSES):
                self._tables = tables
                _, decoded = self._quantize(blocks, steps, PREVIOUS)
                tables = _fit(blocks, decoded, self._book, furthest, plain)
        return tables

    def _blocks(self, calibration: Calibration) -> Floats:
        """Coefficients of blocks side by side, float32 ``[BLOCK, m, R]``."""
        wholes = [self._coefficients(cache) for cache in calibration.caches()]
        parts = [
            whole[at : at + BLOCK] for whole in wholes
            for at in range(0, len(whole) - BLOCK + 1, BLOCK)
        ]  # fmt: skip
        return np.stack(parts, axis=1)


LONGEST = 64
"""The longest interval between keyframes."""

INTERVALS = (8, 16, 32, 64)


def delta_name(tier: str, every: int, plain: bool = False) -> str:
    """
    >>> delta_name("near", 8), delta_name("near", PREVIOUS, plain=True), delta_name("near", NONE)
    ('delta-k8-near', 'delta-previous-plain-near', 'delta-none-near')
    """
    kind = {NONE: "none", PREVIOUS: "previous"}.get(every, f"k{every}")
    return f"delta-{kind}-{'plain-' if plain else ''}{tier}"


def settings() -> dict[str, tuple[str, int, bool]]:
    """Tier, interval, and whether factors are 1, of every codec by name."""
    kinds = [(NONE, False), *((each, False) for each in (*INTERVALS, PREVIOUS))]
    kinds += [(INTERVALS[0], True), (PREVIOUS, True)]
    return {
        delta_name(tier, *kind): (tier, *kind)
        for tier, known in TIERS.items() if known.codec == BOOK_TRANSFORM
        for kind in kinds
    }  # fmt: skip


def _fit(blocks: Floats, decoded: Floats, book: Book, furthest: int, plain: bool) -> Tables:
    """Least squares of each coefficient on the decoded one ``d`` frames before it."""
    own, other = (np.square(each, dtype=np.float32).sum(axis=1) for each in (blocks, decoded))
    factors = np.zeros((furthest + 1, book.n_coefficients))
    octaves = np.zeros((furthest + 1, book.n_coefficients))
    for d in range(1, furthest + 1):
        product = np.einsum("ijk,ijk->k", blocks[d:], decoded[:-d]).astype(np.float64)
        later, earlier = (own[d:].sum(axis=0), other[:-d].sum(axis=0))
        best = np.divide(product, earlier, out=np.zeros(len(product)), where=earlier > 0)
        factors[d] = 1 if plain else best.clip(-1, 1)
        left = later - 2 * factors[d] * product + factors[d] ** 2 * earlier
        octaves[d] = 0.5 * np.log2(np.maximum(left, 1e-30) / np.maximum(later, 1e-30))
    log_sigmas = book.log_sigmas + np.rint(octaves * ladder.UNITS_PER_OCTAVE)
    return Tables(factors.astype(np.float32), log_sigmas.clip(-32768, 32767).astype(np.int16))


def _width(log_step: int) -> np.float32:
    return np.float32(2.0 ** (log_step / ladder.UNITS_PER_OCTAVE))
