"""How lossy tiers code the tracks of a snapshot: with a book, or with a basis learnt from it.

Packing sees one protocol, `LossyCoder`, and leaves to it what is learnt, stored and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import blocks, registry, tokens
from .archive import Archive
from .archived_track import ArchivedTrack, lossy_chunks
from .container.records import FrameRun
from .container.snapshots import SnapshotRecord
from .container.writer import ContainerWriter, EncodedChunk
from .context import FrameContext
from .errors import UsageError
from .model import Snapshot, Track
from .product_coding import ProductOptions
from .tiers import CUSTOM, Tier, tiers_from_names

if TYPE_CHECKING:
    from .book_codec import BookCodec
    from .entropy.token_ids import TokenCoder
    from .session_basis import Basis, KeyTurn
    from .session_codec import SessionCodec
    from .session_learning import Sample, Scales

Rows = NDArray[np.uint8]
Span = tuple[int, int]

_TRIED_BLOCKS = 8
_STRUCTURE_BYTES = 900
"""About what an archive takes beside blocks and token ids."""


@dataclass(frozen=True)
class Target:
    """A quality, a size or a quantizer asked for in place of a tier's name; at most one."""

    kl: float | None = None
    ratio: float | None = None
    product: ProductOptions | None = None

    def tiers(self, names: str | Sequence[str] | None) -> list[Tier] | None:
        """The tiers called ``names``, or `CUSTOM` for a target; None if nothing was asked for."""
        choices = (names, self.kl, self.ratio, self.product)
        asked = [each for each in choices if each is not None]
        if len(asked) > 1:
            raise UsageError("give one of a tier, a target KL, a target ratio and a quantizer")
        if not asked:
            return None
        if not all(0 < each < math.inf for each in (self.kl or 1, self.ratio or 1)):
            raise UsageError("a target is a positive number")
        return [CUSTOM] if names is None else tiers_from_names(names)


class LossyCoder(Protocol):
    """``facts``: what the snapshot records as its coding; complete once all tracks are stored.
    ``token_coder``: what token ids are coded with, if there are tables for them. ``from_tokens``:
    a frame is decoded from all tokens up to it."""

    facts: dict[str, Any]
    token_coder: TokenCoder | None
    from_tokens: bool

    def begin(
        self, writer: ContainerWriter, snapshot: Snapshot, track: Track, ranges: Sequence[Span]
    ) -> Callable[[Span], list[EncodedChunk]]:
        """What codes the frames ``ranges`` of a track, one range at a time and in any order: a
        chunk for each quality layer.

        May learn from all of them and store what it learnt. Raises `UnsupportedError` or
        `MismatchError` for tensors that cannot be coded.
        """
        ...

    def takes(self, old: ArchivedTrack, run: FrameRun) -> bool:
        """Whether the snapshot can decode the lossy layers of the block of ``run``, which has some;
        notes what it needs for that."""
        ...

    def distance(
        self, old: ArchivedTrack, run: FrameRun, rows: Sequence[Rows], context: FrameContext
    ) -> NDArray[np.float64]:
        """How far the frames ``rows`` are from what the stored ``run`` gives back in ``context``,
        ``[n]``, in steps or what the codec has for them; infinite where it may not stand for them.
        """
        ...


class BookCoder:
    """Codes with a book at one step, or in quality layers, each at a finer step than the one
    below it."""

    from_tokens = True

    def __init__(self, codec: BookCodec, log_steps: Sequence[int]) -> None:
        from .entropy.refinement import MAX_RATIO

        apart = [a - b for a, b in zip(log_steps, log_steps[1:], strict=False)]
        if not all(0 < each <= MAX_RATIO for each in apart):
            raise UsageError("quality layers go from the coarsest tier to the finest")
        self._codec, self._log_steps = codec, list(log_steps)
        self.token_coder = codec.token_coder
        self.facts: dict[str, Any] = {
            "book": codec.id, "log_step": log_steps[-1], "rope_pairing": codec.pairing,
        }  # fmt: skip
        expected = [codec.book.kl_of_step(step) for step in log_steps]
        if None not in expected:
            self.facts["expected_kl"] = expected[-1]
        if len(log_steps) > 1:
            self.facts["log_steps"] = self._log_steps
            if None not in expected:
                self.facts["expected_kls"] = expected

    def begin(
        self, writer: ContainerWriter, snapshot: Snapshot, track: Track, ranges: Sequence[Span]
    ) -> Callable[[Span], list[EncodedChunk]]:
        from .book_codec import steps_of

        self._codec.check(track.tensors, "pack")
        n_positions = int(track.cells.pos.max(initial=-1)) + 1

        def encode(span: Span) -> list[EncodedChunk]:
            pos = track.cells.pos[slice(*span)]
            layers = [steps_of(pos, n_positions, step) for step in self._log_steps]
            context = FrameContext(pos, snapshot.tokens)
            return self._codec.encode(track.read(*span), track.tensors, context, layers)

        return encode

    def takes(self, old: ArchivedTrack, run: FrameRun) -> bool:
        codecs = {chunk.codec for chunk in lossy_chunks(old.archive.block(run))}
        # Every save has one book.
        return codecs <= registry.BOOK_LOSSY and self._codec.reads(old.codec())

    def distance(
        self, old: ArchivedTrack, run: FrameRun, rows: Sequence[Rows], context: FrameContext
    ) -> NDArray[np.float64]:
        (chunk,) = old.archive.block(run).layer(-1)
        where, payloads = old.lossy_payloads(run.block, chunk)
        return self._codec.distance(payloads, run.first, rows, old.tensors, context, where)


def is_step(value: object) -> bool:
    from .book_codec import MOST_LOG_STEP

    return isinstance(value, int) and abs(value) <= MOST_LOG_STEP


def step_of_ratio(codec: BookCodec, snapshot: Snapshot, ratio: float) -> int:
    """The finest step at which the archive is about as small as ``ratio`` asks: measured on blocks
    here and there, structure and token ids added.

    `UsageError` if even the coarsest does not reach it.
    """
    from .book_codec import MOST_LOG_STEP, steps_of

    nothing = np.zeros(0, np.int32)
    ids = tokens.encode(snapshot.tokens, nothing, codec.token_coder)
    structure = _STRUCTURE_BYTES + len(ids.data)
    pieces, n_frames = [], 0
    for track in snapshot.tracks:
        codec.check(track.tensors, "pack")
        spans = list(blocks.block_ranges(0, len(track.cells), blocks.block_frames(track.tensors)))
        structure += blocks.BLOCK_BYTES * len(spans)
        # The last block is always among them: its frames take a finer step.
        chosen = spans[:: max(1, len(spans) // _TRIED_BLOCKS)][:-1] + spans[-1:]
        n_frames += len(track.cells)
        pieces += [(track, start, stop) for start, stop in chosen]
    tried = sum(stop - start for _, start, stop in pieces)

    def size(log_step: int) -> float:
        total = 0
        for track, start, stop in pieces:
            pos = track.cells.pos[start:stop]
            steps = steps_of(pos, int(track.cells.pos.max()) + 1, log_step)
            context = FrameContext(pos, snapshot.tokens)
            rows = track.read(start, stop)
            total += len(codec.encode(rows, track.tensors, context, [steps])[0].body)
        return total * n_frames / max(tried, 1) + structure

    allowed = snapshot.raw_bytes / ratio
    low, high = -MOST_LOG_STEP, MOST_LOG_STEP
    if size(high) > allowed:
        raise UsageError(
            f"a ratio of {ratio:g} is out of reach: token ids and structure take "
            f"{structure} bytes of the {int(allowed)} it allows"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) <= allowed else (middle, high)
    return high


class SessionCoder:
    """Codes without a book: learns a basis from the new frames, or takes one that is there."""

    from_tokens = False

    def __init__(
        self, tier: Tier, archive: Archive | None = None, parent: SnapshotRecord | None = None
    ) -> None:
        """``parent``: the snapshot of ``archive`` that the new one is planned against."""
        self._tolerance = tier.tolerance
        self.token_coder: TokenCoder | None = None
        self._archive = archive
        coding = parent.coding if parent and "bases" in parent.coding else {}
        self._old_scales = _scales_of(coding, parent)
        self._old_bases = archive.bases(parent) if archive and parent else []
        self.facts: dict[str, Any] = {
            "keys": "as they stand", "tolerance": tier.tolerance, "scales": [], "bases": []
        }  # fmt: skip

    def begin(
        self, writer: ContainerWriter, snapshot: Snapshot, track: Track, ranges: Sequence[Span]
    ) -> Callable[[Span], list[EncodedChunk]]:
        from . import session_learning as learning
        from .session_basis import key_turn
        from .session_codec import SessionCodec, check

        check(track.tensors, "pack")
        turn = key_turn(snapshot.identity, track.tensors)
        if turn is not None:
            self.facts["keys"] = "turned back to position 0"
        new = np.zeros(len(track.cells), bool)
        for span in ranges:
            new[slice(*span)] = True
        place = track.cache, track.stream
        if not ranges:
            scales = self._old_scales.get(place, learning.Scales(1.0, 1.0))
            self.facts["scales"] += [scales.key, scales.value]
            return _nothing_to_encode
        sample = learning.Sample(track, np.flatnonzero(new), turn)
        scales = self._old_scales.get(place) or learning.measure_scales(sample, track.tensors)
        self.facts["scales"] += [scales.key, scales.value]
        shifts = learning.finer_frames(track.cells, new)
        n_frames, at = int(new.sum()), shifts[sample.cells]
        basis, bits = learning.learn(
            sample, track.tensors, turn, scales, self._tolerance, at, n_frames
        )
        codec, old = SessionCodec(basis), self._best_old(sample, track, turn, scales, at, n_frames)
        if old is not None and old[2] <= bits:
            codec, shift, _ = old
            shifts = shifts + shift
        self._store(codec.basis, writer)

        def encode(span: Span) -> list[EncodedChunk]:
            where = slice(*span)
            rows = track.read(*span)
            return [codec.encode(rows, track.tensors, track.cells.pos[where], shifts[where])]

        return encode

    def _store(self, basis: Basis, writer: ContainerWriter) -> None:
        """Put a basis into the file, unless it is there, and note that it is needed."""
        if not basis.id:
            parent = None
            if basis.parent:
                assert self._archive is not None
                parent = self._archive.session_codec(basis.parent, self._archive.path).basis
            basis.id = writer.add_basis(basis.write(parent))
        self._note(basis.id)

    def _note(self, basis: int) -> None:
        name = f"{basis:016x}"
        if name not in self.facts["bases"]:
            self.facts["bases"].append(name)

    def takes(self, old: ArchivedTrack, run: FrameRun) -> bool:
        chunk, *finer = lossy_chunks(old.archive.block(run))
        if finer or chunk.codec != registry.SESSION_TRANSFORM:
            return False
        where, payload = old.archive.chunk_payload(run.block, chunk)
        self._note(old.session_codec(payload, where).basis.id)
        return True

    def distance(
        self, old: ArchivedTrack, run: FrameRun, rows: Sequence[Rows], context: FrameContext
    ) -> NDArray[np.float64]:
        (chunk,) = old.archive.block(run).layer(-1)
        where, payload = old.archive.chunk_payload(run.block, chunk)
        codec = old.session_codec(payload, where)
        return codec.distance(payload, run.first, rows, old.tensors, context.key_pos, where)

    def _best_old(
        self, sample: Sample, track: Track, turn: KeyTurn | None, scales: Scales,
        shifts: NDArray[np.int64], n_frames: int,
    ) -> tuple[SessionCodec, int, float] | None:  # fmt: skip
        """The parent's newest basis, as it is or extended, the shift that meets the tolerance, and
        the bits that takes; None if there is none that serves."""
        from . import session_learning as learning
        from .session_basis import MAX_CHAIN
        from .session_codec import SessionCodec

        codec = self._newest(track, turn)
        if codec is None:
            return None
        frames = codec.basis.frames(sample.rows(), track.tensors, sample.pos)
        choices = [(codec, 0.0)]
        if codec.basis.depth < MAX_CHAIN:
            basis, bits = learning.extend(codec.basis, frames, shifts, n_frames)
            choices += [(SessionCodec(basis), bits)] if basis.rank > codec.basis.rank else []
        found = []
        for each, bits in choices:
            shift = learning.shift_for(each, frames, self._tolerance, scales, track.tensors, shifts)
            if shift is not None:
                bits += learning.bits_of(each, frames, shifts + shift, n_frames)
                found.append((each, shift, bits))
        return min(found, key=lambda choice: choice[2], default=None)

    def _newest(self, track: Track, turn: KeyTurn | None) -> SessionCodec | None:
        """The codec of the last of the parent's bases that is for these tensors."""
        from .session_basis import same_turn

        for number in reversed(self._old_bases):
            assert self._archive is not None
            codec = self._archive.session_codec(number, self._archive.path)
            if same_turn(codec.basis.turn, turn) and codec.basis.fits(track.tensors):
                return codec
        return None


def _nothing_to_encode(span: Span) -> list[EncodedChunk]:
    raise AssertionError("no frames were announced")


def _scales_of(
    coding: dict[str, Any], parent: SnapshotRecord | None
) -> dict[tuple[int, int], Scales]:
    """Scales of the parent's tracks, by cache and stream."""
    from .session_learning import Scales

    numbers = coding.get("scales", [])
    if parent is None or not isinstance(numbers, list) or len(numbers) != 2 * len(parent.tracks):
        return {}
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return {
        (track.cache, track.stream): Scales(*pair)
        for track, pair in zip(parent.tracks, pairs, strict=True)
        if all(isinstance(n, float) and 0 < n < np.inf for n in pair)
    }
