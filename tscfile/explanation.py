"""Explain how the snapshots of an archive were stored: what each took from its parent, what it
added, and what storing it anew would have cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .archive import Archive
from .container.snapshots import SnapshotRecord, TrackRecord
from .temporal import OldFrames, cut_runs

KEPT, MOVED, SHARED, DIFFERENCE, NEW = "kept", "moved", "shared", "difference", "new"
"""From the parent, where they were or elsewhere; from another snapshot; stored as a difference to
frames of the parent; stored by themselves."""


@dataclass(frozen=True)
class PlanPart:
    """Frames of a track at positions ``first`` to ``last`` that were got in one way.

    ``moved``: by how much they, or those that they are a difference to, have moved since the
    parent. ``n_bytes``: of the chunks that hold them, if this snapshot stored them, shared out by
    frames.
    """

    cache: int
    stream: int
    kind: str
    n_frames: int
    first: int
    last: int
    moved: int
    n_bytes: int


@dataclass(frozen=True)
class PlanInfo:
    """How a snapshot was stored. ``keyframe_bytes``: about what its frames would have taken had
    all been stored anew, by the mean of frames that stand by themselves."""

    number: int
    plan: str
    parent: int | None
    tier: str
    parts: list[PlanPart]
    frame_bytes: int
    keyframe_bytes: int
    max_delta_error: float | None


def explain(archive: Archive) -> list[PlanInfo]:
    """One for each snapshot of an open archive; `DamagedError` if its structure is damaged."""
    seen: set[int] = set()
    found = []
    for number in range(len(archive)):
        record = archive.record(number)
        used = {run.block for track in record.tracks for run in track.runs}
        parts = [part for track in record.tracks for part in _parts(archive, record, track, seen)]
        error = record.coding.get("max_delta_error")
        found.append(
            PlanInfo(
                number, record.plan, record.parent, record.tier, parts,
                sum(part.n_bytes for part in parts), _keyframe_bytes(archive, record),
                error if isinstance(error, float) else None,
            )
        )  # fmt: skip
        seen |= used
    return found


def _parts(
    archive: Archive, record: SnapshotRecord, track: TrackRecord, seen: set[int]
) -> Iterator[PlanPart]:
    frames, entries = OldFrames(track.cells, track.runs), archive.container.blocks
    before = _positions(archive, record, track)
    pos = track.cells.pos.astype(np.int64)
    kinds, moved, sizes = [], np.zeros(len(pos), np.int64), np.zeros(len(pos))
    places = zip(frames.block.tolist(), frames.frame.tolist(), strict=True)
    for i, (block, frame) in enumerate(places):
        entry, there = entries[block], before.get((block, frame))
        if there is not None:
            moved[i] = pos[i] - there
            kinds.append(MOVED if moved[i] else KEPT)
            continue
        if block in seen:
            kinds.append(SHARED)
            continue
        kinds.append(DIFFERENCE if entry.sources else NEW)
        sizes[i] = sum(chunk.ref.length for chunk in entry.chunks) / entry.n_frames
        if entry.sources:
            (source,) = cut_runs(entry.sources, frame, frame + 1)
            there = before.get((source.block, source.first))
            moved[i] = 0 if there is None else pos[i] - there
    order = np.argsort(pos, kind="stable")
    start = 0
    for stop in range(1, len(order) + 1):
        a, b = order[start], order[stop] if stop < len(order) else -1
        if stop < len(order) and (kinds[a], moved[a]) == (kinds[b], moved[b]):
            continue
        part = order[start:stop]
        yield PlanPart(
            track.cache, track.stream, kinds[a], len(part), int(pos[a]), int(pos[part[-1]]),
            int(moved[a]), round(float(sizes[part].sum())),
        )  # fmt: skip
        start = stop


def _positions(
    archive: Archive, record: SnapshotRecord, track: TrackRecord
) -> dict[tuple[int, int], int]:
    """Where the frames of the parent's track are in it: position by block and frame."""
    if record.parent is None:
        return {}
    for old in archive.record(record.parent).tracks:
        if (old.cache, old.stream) == (track.cache, track.stream):
            frames = OldFrames(old.cells, old.runs)
            places = zip(frames.block.tolist(), frames.frame.tolist(), strict=True)
            return dict(zip(places, old.cells.pos.tolist(), strict=True))
    return {}


def _keyframe_bytes(archive: Archive, record: SnapshotRecord) -> int:
    entries = archive.container.blocks
    total = 0.0
    for track in record.tracks:
        numbers = archive.with_sources(run.block for run in track.runs)
        alone = [entries[number] for number in numbers if not entries[number].sources]
        n_bytes = sum(chunk.ref.length for entry in alone for chunk in entry.chunks)
        n_frames = sum(entry.n_frames for entry in alone)
        total += len(track.cells) * n_bytes / max(n_frames, 1)
    return round(total)
