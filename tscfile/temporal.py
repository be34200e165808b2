"""Match the frames of a save with those of an older one that is in the file.

A cache only grows while a conversation goes on, so most frames of a new save are in the file, at
the same position. Where tokens were cut out of the middle, those behind have moved. A stored frame
is taken only if it is the same, or as near as its tier allows, to the *new* rows; what was cut off,
regenerated or recomputed differently is stored as new frames. Whatever the plan, it is right: a
wrong guess costs bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from .container.records import FrameRun
from .model import CellTable

KEYFRAME, APPEND, TRUNCATE_APPEND, SHIFT, PATCH = (
    "keyframe", "append", "truncate+append", "shift", "patch"
)  # fmt: skip

OWN = -1
"""Context of frames that are decoded from the snapshot's own tokens."""

LEAST_MOVED = 16
"""Tokens that must follow one another in both saves for frames to count as moved."""

_NO_BASE = np.iinfo(np.int64).min
"""Where how far a base is from its frame is any number of cells."""

Ints = NDArray[np.int64]


@dataclass
class TrackPlan:
    """Where the frames of a track come from; all arrays are ``[n_cells]``.

    ``block``, ``frame``: int64; block -1 means that the frame is to be stored. ``context``: int64,
    `OWN`, 0 for the parent's tokens, or one of its contexts; ``shift``: int64, see
    `tscfile.container.records.FrameRun`. ``base``: int64, the cell of the parent's track that a
    frame which is to be stored may be coded as a difference to, or -1. ``moved``: int64, by how
    much the frame's position in the parent is less than its own now, for taken and for base frames.
    """

    block: Ints
    frame: Ints
    context: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    shift: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    base: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    moved: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        n = len(self.block)
        for name, usual in (("context", OWN), ("shift", 0), ("base", -1), ("moved", 0)):
            if not len(getattr(self, name)):
                setattr(self, name, np.full(n, usual, np.int64))

    @property
    def n_new(self) -> int:
        return int((self.block < 0).sum())

    def new_ranges(self) -> list[tuple[int, int]]:
        """Runs of frames to be stored, that are differences to frames of one run that have moved
        alike or to none."""
        cells = np.arange(len(self.block))
        base = np.where(self.base < 0, _NO_BASE, self.base - cells)
        kind = np.stack([self.block < 0, base, np.where(self.base < 0, 0, self.moved)])
        edges = np.flatnonzero((np.diff(kind, axis=1) != 0).any(axis=0)) + 1
        starts = [0, *edges.tolist()] if len(cells) else []
        stops = [*edges.tolist(), len(cells)]
        return [(a, b) for a, b in zip(starts, stops, strict=False) if self.block[a] < 0]

    def store(self, start: int, stop: int, block: int) -> None:
        """Frames ``start`` to ``stop`` are now ``block``."""
        self.block[start:stop] = block
        self.frame[start:stop] = np.arange(stop - start)

    def drop(self, which: NDArray[np.bool_]) -> None:
        """Store frames anew that would have been taken: bool ``[n_cells]``."""
        self.block[which], self.context[which], self.shift[which] = -1, OWN, 0
        self.moved[which] = 0

    def runs(self, contexts: Sequence[int] = ()) -> tuple[FrameRun, ...]:
        """The finished plan as runs of frames that follow one another in a block. ``contexts``:
        those of the parent that the snapshot takes over, in its own order."""
        numbers = {OWN: 0} | {context: i for i, context in enumerate(contexts, 1)}
        return tuple(
            FrameRun(
                int(self.block[a]), int(self.frame[a]), b - a, numbers[int(self.context[a])],
                int(self.shift[a]),
            )
            for a, b in self.segments()
        )  # fmt: skip

    def segments(self) -> list[tuple[int, int]]:
        """Longest runs of one block, context and shift with frames rising by one, and of frames to
        be stored, as ``(start, stop)``."""
        if not len(self.block):
            return []
        breaks = (np.diff(self.frame) != 1) & (self.block[1:] >= 0)
        for each in (self.block, self.context, self.shift, self.moved):
            breaks |= np.diff(each) != 0
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(self.block)]
        return list(zip(edges[:-1], edges[1:], strict=True))


@dataclass
class OldFrames:
    """The cells of an older snapshot's track and where their frames are."""

    cells: CellTable
    runs: Sequence[FrameRun]

    def __post_init__(self) -> None:
        counts = [run.count for run in self.runs]
        columns = np.array([(r.block, r.first, r.context, r.shift) for r in self.runs], np.int64)
        block, first, context, shift = np.repeat(columns.reshape(-1, 4), counts, axis=0).T
        starts = np.cumsum(counts, dtype=np.int64) - counts
        self.block: Ints = block
        self.frame: Ints = first + np.arange(len(first)) - np.repeat(starts, counts)
        self.context, self.shift = context, shift


Judge = Callable[[int, int, FrameRun, int], tuple[NDArray[np.bool_], bool]]


def store_all(n_cells: int) -> TrackPlan:
    """A plan that takes nothing from the file."""
    return TrackPlan(np.full(n_cells, -1, np.int64), np.zeros(n_cells, np.int64))


def plan_track(
    old: OldFrames, new: CellTable, origin: Ints | None, judge: Judge,
    may_be_base: Callable[[FrameRun, int], bool],
) -> TrackPlan:  # fmt: skip
    """Find the frames of ``new`` among those of an older snapshot's track: first where they are
    now, then where they may have come from.

    ``origin``: int64 ``[n_tokens]``, for each position of the new save the one in the older where
    its token was, -1 for none; None if no tokens have moved. ``judge(start, stop, run, moved)``
    says for which cells ``start`` to ``stop`` the frames ``run``, as the older snapshot names them,
    will do once they are moved on by ``moved`` positions, bool ``[stop - start]``, and whether they
    are decoded from the tokens that they had in that snapshot. Of those that will not do,
    ``may_be_base(run, moved)`` says whether they are worth a try as the base of a difference.
    """
    plan = store_all(len(new))
    used = np.zeros(len(old.cells), bool)
    _take(plan, old, used, _match_cells(old.cells, new, new.pos), new, judge, may_be_base)
    if origin is not None:
        inside = (new.pos >= 0) & (new.pos < len(origin))
        came_from = np.full(len(new), -1, np.int64)
        came_from[inside] = origin[new.pos[inside]]
        wanted = (plan.block < 0) & (came_from >= 0) & (came_from != new.pos)
        candidate = _match_cells(old.cells, new, np.where(wanted, came_from, -1))
        candidate[~wanted] = -1
        _take(plan, old, used, candidate, new, judge, may_be_base)
    return plan


def _take(
    plan: TrackPlan, old: OldFrames, used: NDArray[np.bool_], candidate: Ints, new: CellTable,
    judge: Judge, may_be_base: Callable[[FrameRun, int], bool],
) -> None:  # fmt: skip
    """Take those of the ``candidate`` cells, -1 for none, that will do and are not ``used`` yet."""
    known = np.flatnonzero(candidate >= 0)
    known = known[~used[candidate[known]]]
    if not len(known):
        return
    tried = store_all(len(candidate))
    at = candidate[known]
    tried.block[known], tried.frame[known] = old.block[at], old.frame[at]
    tried.context[known], tried.shift[known] = old.context[at], old.shift[at]
    tried.moved[known] = new.pos[known].astype(np.int64) - old.cells.pos[at]
    for start, stop in tried.segments():
        if tried.block[start] < 0:
            continue
        run = FrameRun(
            int(tried.block[start]), int(tried.frame[start]), stop - start,
            int(tried.context[start]), int(tried.shift[start]),
        )  # fmt: skip
        moved = int(tried.moved[start])
        good, has_context = judge(start, stop, run, moved)
        cells = np.arange(start, stop)
        taken, rest = cells[good], cells[~good]
        used[candidate[taken]] = True
        plan.block[taken], plan.frame[taken] = tried.block[taken], tried.frame[taken]
        plan.moved[taken] = moved
        if has_context:
            plan.context[taken], plan.shift[taken] = run.context, run.shift + moved
        if len(rest) and may_be_base(run, moved):
            plan.base[rest], plan.moved[rest] = candidate[rest], moved


def origins(old: NDArray[np.int32], new: NDArray[np.int32], n_common: int) -> Ints | None:
    """Where the tokens of ``new`` were in ``old``, int64 ``[len(new)]``, -1 for nowhere; None if
    none has moved.

    The first ``n_common`` tokens are the same in both. Behind them stretches of at least
    `LEAST_MOVED` tokens are looked for, each behind the one before: what is left of a conversation
    when parts of it are cut out.

    >>> old = np.arange(100, dtype=np.int32)
    >>> found = origins(old, np.concatenate([old[:10], old[60:], old[:5]]), 10)
    >>> found[[0, 9, 10, 49, 50]].tolist()
    [0, 9, 60, 99, -1]
    """
    n = LEAST_MOVED
    if min(len(old), len(new)) - n_common < n:
        return None
    data, wanted = (each.astype("<i4").tobytes() for each in (old, new))
    places: dict[bytes, list[int]] = {}
    for i in range(n_common, len(old) - n + 1):
        places.setdefault(data[4 * i : 4 * (i + n)], []).append(i)
    found = np.full(len(new), -1, np.int64)
    found[:n_common] = np.arange(n_common)
    at, least = n_common, n_common
    while at + n <= len(new):
        known = places.get(wanted[4 * at : 4 * (at + n)], [])
        nearest = bisect_left(known, least)
        if nearest == len(known):
            at += 1
            continue
        start = known[nearest]
        rest = min(len(old) - start, len(new) - at)
        different = np.flatnonzero(old[start : start + rest] != new[at : at + rest])
        length = int(different[0]) if len(different) else rest
        found[at : at + length] = np.arange(start, start + length)
        at, least = at + length, start + length
    moved = (found >= 0) & (found != np.arange(len(new)))
    return found if moved.any() else None


def cut_runs(runs: Sequence[FrameRun], start: int, stop: int) -> list[FrameRun]:
    """Frames ``start`` to ``stop`` of those that ``runs`` are together.

    >>> cut_runs([FrameRun(0, 0, 4), FrameRun(2, 1, 3)], 3, 6)
    [FrameRun(block=0, first=3, count=1, context=0, shift=0), \
FrameRun(block=2, first=1, count=2, context=0, shift=0)]
    """
    found, at = [], 0
    for run in runs:
        first, last = max(start - at, 0), min(stop - at, run.count)
        if first < last:
            found.append(replace(run, first=run.first + first, count=last - first))
        at += run.count
    return found


def name_plan(n_kept: int, n_old_cells: int, n_moved: int = 0, n_patched: int = 0) -> str:
    """The word for a snapshot that takes ``n_kept`` frames from the file where they were and
    ``n_moved`` from elsewhere, given the number of cells of its parent; ``n_patched``: new frames
    in the place of old ones with such as were kept behind them."""
    if n_moved:
        return SHIFT
    if n_kept == n_old_cells and n_kept:
        return APPEND
    if n_patched:
        return PATCH
    return TRUNCATE_APPEND if n_kept else KEYFRAME


def _match_cells(old: CellTable, new: CellTable, pos: NDArray[np.integer]) -> Ints:
    """For each new cell, were it at ``pos``, an old one of the same position and sequence, or -1:
    int64 ``[n_new]``.

    Where several cells share both (the patches of an image), the first is matched with the first,
    the second with the second, so that no old cell is taken twice.
    """
    (old_keys, old_order) = _sorted_keys(old, old.pos)
    (new_keys, new_order) = _sorted_keys(new, pos)
    nth = np.arange(len(new_keys)) - np.searchsorted(new_keys, new_keys)
    at = np.searchsorted(old_keys, new_keys) + nth
    inside = np.flatnonzero(at < len(old_keys))
    hits = inside[old_keys[at[inside]] == new_keys[inside]]
    found = np.full(len(new_keys), -1, np.int64)
    found[new_order[hits]] = old_order[at[hits]]
    return found


def _sorted_keys(cells: CellTable, pos: NDArray[np.integer]) -> tuple[Ints, NDArray[np.intp]]:
    """Position and first sequence of each cell in one integer, rising, and whose they are."""
    first = np.full(len(cells), -1, np.int64)
    has_id = cells.seq_counts > 0
    starts = np.cumsum(cells.seq_counts, dtype=np.int64) - cells.seq_counts
    first[has_id] = cells.seq_ids[starts[has_id]]
    keys = first << 32 | pos.astype(np.int64) & 0xFFFFFFFF
    order = np.argsort(keys, kind="stable")
    return keys[order], order
