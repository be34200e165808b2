"""Plan a snapshot against an archive: which of its frames are there, which are to be stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import blocks, registry, temporal
from .archive import Archive
from .archived_track import ArchivedTrack, is_absent, is_exact
from .coding import Coding
from .container.records import BlockEntry, FrameRun, common_prefix
from .errors import MismatchError
from .model import Snapshot, Track
from .tokens_tier import TokensCoder


@dataclass
class Planned:
    """The parent, if there is one, and where each track's frames come from."""

    parent: int | None
    n_parent_cells: int | None
    tracks: list[temporal.TrackPlan]
    n_tokens_common: int = 0

    def __post_init__(self) -> None:
        # Counted now: storing a frame makes it one that the file has.
        self.n_new = sum(plan.n_new for plan in self.tracks)
        self.is_new = [plan.block < 0 for plan in self.tracks]
        n_kept = sum(len(plan.block) for plan in self.tracks) - self.n_new
        self.name = temporal.name_plan(n_kept, self.n_parent_cells or 0)


def plan(
    archive: Archive, snapshot: Snapshot, parent: int | None, n_common: int, coding: Coding
) -> Planned:
    """Plan every track against ``parent``, which has ``n_common`` leading tokens in common."""
    if parent is None:
        return Planned(None, None, [temporal.store_all(len(t.cells)) for t in snapshot.tracks])
    if not n_common and len(snapshot.tokens) and len(archive.record(parent).ids):
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

    def plan_track(track: Track) -> temporal.TrackPlan:
        if len(coding.tiers) > 1 and coding.names != record.layers:
            # Its frames would not be there in every tier.
            return temporal.store_all(len(track.cells))
        return _plan_track(archive, old_tracks, track, snapshot, coding)

    plans = [plan_track(track) for track in snapshot.tracks]
    # Where the file has nothing yet, nothing can be in common.
    if n_cells and not n_common and all(plan.n_new == len(plan.block) for plan in plans):
        raise MismatchError(
            f"{archive.path}: the save has no tokens and no frame in common with the file; "
            "pack it into a file of its own"
        )
    return Planned(parent, n_cells, plans, n_common)


def choose_parent(archive: Archive, ids: NDArray[np.int32]) -> tuple[int | None, int]:
    """The snapshot with the most leading tokens in common, the newest of equals, and how many."""
    best: tuple[int | None, int] = (None, -1)
    for number in range(len(archive)):
        n_common = common_prefix(archive.tokens(number), ids)
        if n_common >= best[1]:
            best = (number, n_common)
    return best[0], max(best[1], 0)


def _plan_track(
    archive: Archive,
    old_tracks: dict[tuple[int, int], ArchivedTrack],
    track: Track,
    snapshot: Snapshot,
    coding: Coding,
) -> temporal.TrackPlan:
    old = old_tracks.get((track.cache, track.stream))
    if old is None or [_layout(t) for t in old.tensors] != [_layout(t) for t in track.tensors]:
        if old is not None and len(track.cells):
            raise MismatchError(
                f"{archive.path}: the save's layers or element types are not those of the file; "
                "pack it into a file of its own"
            )
        return temporal.store_all(len(track.cells))

    def same(start: int, stop: int, run: FrameRun) -> NDArray[np.bool_]:
        entry, none = archive.block(run), np.zeros(stop - start, bool)
        if entry.n_layers > 1 or len(coding.tiers) > 1:
            # Demoting could not tell which of the layers a lossy save wants.
            layers_fit = entry.n_layers == len(coding.tiers)
            if not layers_fit and (len(coding.tiers) > 1 or not coding.finest.exact):
                return none
        if is_absent(entry) and not isinstance(coding.lossy, TokensCoder):
            # There is nothing to compare with.
            return none
        if is_exact(entry):
            if _needs_book(entry) and coding.facts().get("book") != old.codec().id:
                # What the snapshot names must decode all its frames.
                return none
            return _same_rows(archive, old, track, start, stop, run)
        if coding.lossy is None or coding.finest.exact:
            # A lossless save takes nothing from a lossy one.
            return none
        return coding.lossy.near(old, snapshot, track, start, stop, run, archive)

    return temporal.plan_track(old.cells, old.runs, track.cells, same)


def _needs_book(block: BlockEntry) -> bool:
    return any(chunk.codec in registry.OF_BOOK for chunk in block.chunks)


def _layout(tensor: object) -> tuple[object, ...]:
    keys = ("layer", "role", "dtype", "row_bytes", "rotation")
    return tuple(getattr(tensor, key) for key in keys)


def _same_rows(
    archive: Archive, old: ArchivedTrack, track: Track, start: int, stop: int, run: FrameRun
) -> NDArray[np.bool_]:
    """Which frames ``start`` to ``stop`` of ``track`` are those of ``run``, row by row."""
    block = archive.block(run)
    new_rows = track.read(start, stop)
    if run.count == block.n_frames and blocks.content_id(new_rows) == block.content_id:
        # The usual case, settled without decoding.
        return np.ones(run.count, bool)
    equal = np.ones(run.count, bool)
    for chunk in block.layer(-1):
        for i, rows in enumerate(old.exact_rows(run.block, chunk), chunk.first_tensor):
            part = rows[run.first : run.first + run.count]
            equal &= (part == new_rows[i]).all(axis=1)
    return equal
