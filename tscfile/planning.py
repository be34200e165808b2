"""Plan a snapshot against an archive: which of its frames are there, which are to be stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import blocks, registry, temporal
from .archive import MAX_SOURCE_CHAIN, Archive
from .archived_track import ArchivedTrack, is_absent, is_exact
from .coding import Coding
from .container.records import MAX_CONTEXTS, FrameRun
from .container.snapshots import common_prefix
from .context import FrameContext
from .errors import MismatchError
from .model import Snapshot, Track
from .tokens_tier import TokensCoder

Rows = NDArray[np.uint8]


@dataclass
class Planned:
    """The parent, if there is one, and where each track's frames come from. ``old``: the tracks of
    the parent that frames may be coded as differences to; ``contexts``: the parent's contexts that
    the snapshot needs, 0 for its tokens; ``max_delta_error``: how far the rows of the save are at
    most from the stored frames that were taken for them, `LossyCoder.distance`; None if all that
    were taken are those that were packed."""

    parent: int | None
    n_parent_cells: int | None
    tracks: list[temporal.TrackPlan]
    n_tokens_common: int = 0
    old: list[ArchivedTrack | None] = field(default_factory=list)
    contexts: tuple[int, ...] = ()
    max_delta_error: float | None = None

    def __post_init__(self) -> None:
        self.old = self.old or [None] * len(self.tracks)
        # Counted now: storing a frame makes it one that the file has.
        self.n_new = sum(plan.n_new for plan in self.tracks)
        self.is_new = [plan.block < 0 for plan in self.tracks]
        n_cells = sum(len(plan.block) for plan in self.tracks)
        self.n_moved = sum(
            int((((plan.block >= 0) | (plan.base >= 0)) & (plan.moved != 0)).sum())
            for plan in self.tracks
        )
        n_taken_moved = sum(
            int(((plan.block >= 0) & (plan.moved != 0)).sum()) for plan in self.tracks
        )
        n_patched = sum(map(_n_patched, self.tracks))
        self.name = temporal.name_plan(
            n_cells - self.n_new - n_taken_moved, self.n_parent_cells or 0, self.n_moved, n_patched
        )


def store_all(snapshot: Snapshot) -> Planned:
    """The plan of a snapshot that takes nothing from the file."""
    return Planned(None, None, [temporal.store_all(len(t.cells)) for t in snapshot.tracks])


def plan(
    archive: Archive, snapshot: Snapshot, parent: int | None, n_common: int, coding: Coding,
    same_conversation: bool = False,
) -> Planned:  # fmt: skip
    """Plan every track against ``parent``, which has ``n_common`` leading tokens in common.

    `MismatchError` for a save that has nothing in common with it, unless it is known to be of the
    ``same_conversation``, and for other tensors.
    """
    if parent is None:
        return store_all(snapshot)
    origin = None
    if len(snapshot.tokens) and len(archive.head(parent).ids):
        origin = temporal.origins(archive.tokens(parent), snapshot.tokens, n_common)
        if not n_common and origin is None and not same_conversation:
            raise MismatchError(
                f"{archive.path}: the save shares no first token with any of its snapshots; "
                "pack another conversation into a file of its own"
            )
    record = archive.record(parent)
    old_tracks = {
        (track.cache, track.stream): track
        for track in (ArchivedTrack(archive, part, record) for part in record.tracks)
    }
    n_cells = sum(len(track.cells) for track in old_tracks.values())
    old = [_same_layout(archive, old_tracks, track) for track in snapshot.tracks]
    if len(coding.tiers) > 1 and coding.names != record.layers:
        # Its frames would not be there in every tier.
        old = [None] * len(old)
    planner = _Planner(archive, snapshot, coding, origin)
    plans = [
        temporal.store_all(len(track.cells)) if before is None else planner.track(track, before)
        for track, before in zip(snapshot.tracks, old, strict=True)
    ]
    # Where the file has nothing yet, nothing can be in common.
    is_other = n_cells and not n_common and origin is None and not same_conversation
    if is_other and all(plan.n_new == len(plan.block) for plan in plans):
        raise MismatchError(
            f"{archive.path}: the save has no tokens and no frame in common with the file; "
            "pack it into a file of its own"
        )
    return Planned(
        parent, n_cells, plans, n_common, old, _contexts(plans), planner.max_delta_error
    )


def choose_parent(archive: Archive, ids: NDArray[np.int32]) -> tuple[int | None, int]:
    """The snapshot to plan a save of these tokens against, and how many leading tokens they share.

    That with the most in common, the newest of equals; or the newest of all where more of the
    tokens are those of it, moved by a context shift: what is kept in front is common to many.
    """
    best: int | None = None
    most = 0
    for number in reversed(range(len(archive))):
        # Tokens are decoded only where they can tell: in a file of one line those of the newest.
        if best is not None and len(archive.head(number).ids) <= most:
            continue
        n_common = common_prefix(archive.tokens(number), ids)
        if best is None or n_common > most:
            best, most = number, n_common
    newest = len(archive) - 1
    if best is None or best == newest or most == len(ids):
        return best, most
    n_common = common_prefix(archive.tokens(newest), ids)
    if _n_found(archive, newest, ids, n_common) > _n_found(archive, best, ids, most):
        return newest, n_common
    return best, most


def _n_found(archive: Archive, number: int, ids: NDArray[np.int32], n_common: int) -> int:
    """How many tokens are those of a snapshot, where they were or moved."""
    origin = temporal.origins(archive.tokens(number), ids, n_common)
    return n_common if origin is None else int((origin >= 0).sum())


class _Planner:
    def __init__(
        self, archive: Archive, snapshot: Snapshot, coding: Coding, origin: temporal.Ints | None
    ) -> None:
        self._archive, self._snapshot, self._coding = archive, snapshot, coding
        self._origin = origin
        self.max_delta_error: float | None = None

    def track(self, track: Track, old: ArchivedTrack) -> temporal.TrackPlan:
        """Plan one track against that of the parent."""

        def judge(
            start: int, stop: int, run: FrameRun, moved: int
        ) -> tuple[NDArray[np.bool_], bool]:
            return self._judge(track, old, (start, stop), run, moved)

        def may_be_base(run: FrameRun, moved: int) -> bool:
            return self._may_be_base(old, run)

        frames = temporal.OldFrames(old.cells, old.runs)
        plan = temporal.plan_track(frames, track.cells, self._origin, judge, may_be_base)
        # Frames of other tokens are not worth a try.
        alike = old.same_tokens(self._snapshot.tokens, track.cells.pos)
        plan.base[(plan.moved == 0) & ~alike] = -1
        _drop_small(plan, self._frames_of_a_block(old))
        return plan

    def _judge(
        self, track: Track, old: ArchivedTrack, span: tuple[int, int], run: FrameRun, moved: int
    ) -> tuple[NDArray[np.bool_], bool]:
        entry, none = self._archive.block(run), np.zeros(run.count, bool)
        coding = self._coding
        if entry.n_layers > 1 or len(coding.tiers) > 1:
            # Demoting could not tell which of the layers a lossy save wants.
            layers_fit = entry.n_layers == len(coding.tiers)
            if not layers_fit and (len(coding.tiers) > 1 or not coding.finest.exact):
                return none, False
        if is_absent(entry) and not isinstance(coding.lossy, TokensCoder):
            # There is nothing to compare with.
            return none, False
        if is_exact(entry):
            # Moved keys are other rows: a base at best.
            if moved or not self._may_need(old, run.block):
                return none, False
            lossy = coding.lossy if entry.n_layers > 1 else None
            if lossy is not None and not lossy.takes(old, run):
                # Its coarser layers are of another book, or of a basis where a book is given.
                return none, False
            return _same_rows(old, run, track.read(*span)), False
        if coding.lossy is None or coding.finest.exact or not coding.lossy.takes(old, run):
            # A lossless save takes nothing from a lossy one.
            return none, False
        return self._near(track, old, span, run, moved)

    def _near(
        self, track: Track, old: ArchivedTrack, span: tuple[int, int], run: FrameRun, moved: int
    ) -> tuple[NDArray[np.bool_], bool]:
        coder, tokens = self._coding.lossy, self._snapshot.tokens
        assert coder is not None
        pos, near = track.cells.pos[slice(*span)], np.ones(run.count, bool)
        if not moved:
            # Rows of other tokens may be alike; a frame depends on all tokens up to its own.
            alike = old.same_tokens if coder.from_tokens else old.may_be_same
            near = alike(tokens, pos)
        if not near.any():
            return near, False
        rows, block = track.read(*span), self._archive.block(run)
        in_place = not moved and not run.context
        whole = in_place and run.count == block.n_frames
        if whole and blocks.content_id(rows) == block.content_id:
            # The usual case, settled without decoding.
            return near, False
        has_context = coder.from_tokens and not in_place
        context = FrameContext(pos, tokens)
        if has_context:
            # As the parent decodes it, its positions the older ones.
            there = (pos.astype(np.int64) - moved).astype(np.int32)
            before = old.context_in(run, there)
            context = FrameContext(before.pos, before.tokens, before.shift + moved)
        apart = np.where(near, coder.distance(old, run, rows, context), np.inf)
        good = np.isfinite(apart)
        worst = float(apart[good].max(initial=0))
        if worst:
            self.max_delta_error = max(worst, self.max_delta_error or 0)
        return good, has_context

    def _may_be_base(self, old: ArchivedTrack, run: FrameRun) -> bool:
        entry = self._archive.block(run)
        return (
            self._coding.lossy is None
            and entry.n_layers == 1
            and is_exact(entry)
            and self._archive.n_sources(run.block) < MAX_SOURCE_CHAIN
            and self._may_need(old, run.block)
        )

    def _may_need(self, old: ArchivedTrack, block: int) -> bool:
        """What the snapshot names must decode all its frames."""
        entries = self._archive.container.blocks
        needs_book = any(
            chunk.codec in registry.OF_BOOK
            for number in self._archive.with_sources([block])
            for chunk in entries[number].chunks
        )
        return not needs_book or self._coding.facts().get("book") == old.codec().id

    def _frames_of_a_block(self, old: ArchivedTrack) -> int:
        """How many frames cost as much, about, as what is around the frames of a block."""
        entries = [self._archive.block(run) for run in old.runs]
        n_bytes = sum(chunk.ref.length for entry in entries for chunk in entry.chunks)
        n_frames = sum(entry.n_frames for entry in entries)
        return blocks.BLOCK_BYTES * n_frames // n_bytes if n_bytes else 0


def _same_layout(
    archive: Archive, old_tracks: dict[tuple[int, int], ArchivedTrack], track: Track
) -> ArchivedTrack | None:
    """The parent's track of the same place; None if it has none or nothing is to be planned."""
    old = old_tracks.get((track.cache, track.stream))
    if old is None or [_layout(t) for t in old.tensors] == [_layout(t) for t in track.tensors]:
        return old
    if len(track.cells):
        raise MismatchError(
            f"{archive.path}: the save's layers or element types are not those of the file; "
            "pack it into a file of its own"
        )
    return None


def _layout(tensor: object) -> tuple[object, ...]:
    keys = ("layer", "role", "dtype", "row_bytes", "rotation")
    return tuple(getattr(tensor, key) for key in keys)


def _same_rows(old: ArchivedTrack, run: FrameRun, new_rows: Sequence[Rows]) -> NDArray[np.bool_]:
    """Which frames ``new_rows`` are those of ``run``, row by row."""
    block = old.archive.block(run)
    equal = np.ones(run.count, bool)
    if run.count == block.n_frames and blocks.content_id(new_rows) == block.content_id:
        # The usual case, settled without decoding.
        return equal
    for chunk in block.layer(-1):
        for i, rows in enumerate(old.exact_rows(run.block, chunk), chunk.first_tensor):
            part = rows[run.first : run.first + run.count]
            equal &= (part == new_rows[i]).all(axis=1)
    return equal


def _drop_small(plan: temporal.TrackPlan, fewest: int) -> None:
    """Store anew what is taken between frames that are stored, where it is fewer frames than
    ``fewest``: another block would take more bytes."""
    new = plan.block < 0
    for start, stop in plan.segments():
        inside = 0 < start and stop < len(new) and not new[start] and stop - start < fewest
        if inside and new[start - 1] and new[stop]:
            which = np.zeros(len(new), bool)
            which[start:stop] = True
            plan.drop(which)


def _contexts(plans: Sequence[temporal.TrackPlan]) -> tuple[int, ...]:
    """The parent's contexts that plans refer to, the newest first; what refers to more than a
    snapshot may have is stored anew."""
    found = sorted({int(each) for plan in plans for each in plan.context if each >= 0})
    for plan in plans:
        plan.drop(np.isin(plan.context, found[MAX_CONTEXTS:]))
    return tuple(found[:MAX_CONTEXTS])


def _n_patched(plan: temporal.TrackPlan) -> int:
    """Frames stored in the place of old ones, with such behind them as were kept."""
    kept = np.flatnonzero((plan.block >= 0) & (plan.moved == 0))
    last = int(kept[-1]) if len(kept) else -1
    new = plan.block < 0
    return int((new & ((plan.base >= 0) | (np.arange(len(new)) < last))).sum())
