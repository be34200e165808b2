"""How lossy tiers code the tracks of a snapshot: with a book, or with a basis learnt from it.

Packing sees one protocol, `LossyCoder`, and leaves to it what is learnt, stored and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import registry
from .archive import Archive, ArchivedTrack
from .container.records import FrameRun, SnapshotRecord, common_prefix
from .container.writer import ContainerWriter, EncodedChunk
from .history import context_of
from .model import Snapshot, Track
from .tiers import Tier

if TYPE_CHECKING:
    from .lossy import BookCodec
    from .session import SessionCodec
    from .session_basis import Basis, KeyTurn
    from .session_learning import Sample, Scales

Span = tuple[int, int]


class LossyCoder(Protocol):
    """``facts``: what the snapshot records as its coding; complete once all tracks are stored."""

    facts: dict[str, Any]

    def begin(
        self, writer: ContainerWriter, snapshot: Snapshot, track: Track, ranges: Sequence[Span]
    ) -> Callable[[Span], EncodedChunk]:
        """What codes the frames ``ranges`` of a track, one range at a time and in any order.

        May learn from all of them and store what it learnt. Raises `UnsupportedError` or
        `MismatchError` for tensors that cannot be coded.
        """
        ...

    def near(
        self, old: ArchivedTrack, snapshot: Snapshot, track: Track, start: int, stop: int,
        run: FrameRun, archive: Archive,
    ) -> NDArray[np.bool_]:  # fmt: skip
        """Which frames ``start`` to ``stop`` the stored ``run`` may stand for, bool ``[n]``."""
        ...


class BookCoder:
    """Codes with a book at the step of one tier."""

    def __init__(self, codec: BookCodec, tier: Tier) -> None:
        entry = codec.book.tiers[tier.name]
        self._codec, self._log_step = codec, entry.log_step
        self.facts: dict[str, Any] = {
            "book": codec.id, "log_step": entry.log_step, "expected_kl": entry.kl,
            "rope_pairing": codec.pairing,
        }  # fmt: skip

    def begin(
        self, writer: ContainerWriter, snapshot: Snapshot, track: Track, ranges: Sequence[Span]
    ) -> Callable[[Span], EncodedChunk]:
        self._codec.check(track.tensors, "pack")

        def encode(span: Span) -> EncodedChunk:
            pos = track.cells.pos[slice(*span)]
            context = context_of(pos, snapshot.tokens, self._codec.book.history)
            return self._codec.encode(track.read(*span), track.tensors, context, self._log_step)

        return encode

    def near(
        self, old: ArchivedTrack, snapshot: Snapshot, track: Track, start: int, stop: int,
        run: FrameRun, archive: Archive,
    ) -> NDArray[np.bool_]:  # fmt: skip
        (chunk,) = archive.block(run).chunks
        if chunk.codec != registry.BOOK_TRANSFORM or self._codec.id != old.codec().id:
            # Every save has one book.
            return np.zeros(stop - start, bool)
        where, payload = archive.chunk_payload(run.block, chunk)
        pos = track.cells.pos[start:stop]
        context = context_of(pos, snapshot.tokens, self._codec.book.history)
        rows = track.read(start, stop)
        near = self._codec.same(payload, run.first, rows, track.tensors, context, where)
        before = context_of(pos, old.tokens, self._codec.book.history)
        same: NDArray[np.bool_] = near & (before.history == context.history).all(axis=1)
        return same


class SessionCoder:
    """Codes without a book: learns a basis from the new frames, or takes one that is there."""

    def __init__(
        self, tier: Tier, archive: Archive | None = None, parent: SnapshotRecord | None = None
    ) -> None:
        """``parent``: the snapshot of ``archive`` that the new one is planned against."""
        self._tolerance = tier.tolerance
        self._archive = archive
        coding = parent.coding if parent and "bases" in parent.coding else {}
        self._old_scales = _scales_of(coding, parent)
        self._old_bases = archive.bases(parent) if archive and parent else []
        self.facts: dict[str, Any] = {
            "keys": "as they stand", "tolerance": tier.tolerance, "scales": [], "bases": []
        }  # fmt: skip

    def begin(
        self, writer: ContainerWriter, snapshot: Snapshot, track: Track, ranges: Sequence[Span]
    ) -> Callable[[Span], EncodedChunk]:
        from . import session_learning as learning
        from .session import SessionCodec, check
        from .session_basis import key_turn

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

        def encode(span: Span) -> EncodedChunk:
            where = slice(*span)
            rows = track.read(*span)
            return codec.encode(rows, track.tensors, track.cells.pos[where], shifts[where])

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

    def near(
        self, old: ArchivedTrack, snapshot: Snapshot, track: Track, start: int, stop: int,
        run: FrameRun, archive: Archive,
    ) -> NDArray[np.bool_]:  # fmt: skip
        (chunk,) = archive.block(run).chunks
        if chunk.codec != registry.SESSION_TRANSFORM:
            return np.zeros(stop - start, bool)
        where, payload = archive.chunk_payload(run.block, chunk)
        codec = old.session_codec(payload, where)
        pos = track.cells.pos[start:stop]
        near = codec.same(payload, run.first, track.read(start, stop), track.tensors, pos, where)
        if len(old.tokens) and len(snapshot.tokens):
            # Rows of other tokens may be alike; a frame depends on all tokens up to its own.
            near &= pos < common_prefix(old.tokens, snapshot.tokens)
        if near.any():
            self._note(codec.basis.id)
        return near

    def _best_old(
        self, sample: Sample, track: Track, turn: KeyTurn | None, scales: Scales,
        shifts: NDArray[np.int64], n_frames: int,
    ) -> tuple[SessionCodec, int, float] | None:  # fmt: skip
        """The parent's newest basis, as it is or extended, the shift that meets the tolerance, and
        the bits that takes; None if there is none that serves."""
        from . import session_learning as learning
        from .session import SessionCodec
        from .session_basis import MAX_CHAIN

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
        for number in reversed(self._old_bases):
            assert self._archive is not None
            codec = self._archive.session_codec(number, self._archive.path)
            known = codec.basis.turn
            same = known == turn if known is None or turn is None else (
                (known.head_dim, known.pairing) == (turn.head_dim, turn.pairing)
                and np.array_equal(known.inv_freq, turn.inv_freq)
            )  # fmt: skip
            if same and codec.basis.fits(track.tensors):
                return codec
        return None


def _nothing_to_encode(span: Span) -> EncodedChunk:
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
