"""Plan a snapshot against one that is already in the file.

A cache only grows while a conversation goes on, so most frames of a new save are in the file. A
frame is found by its position and sequence and taken only if its rows are the same bytes; what was
cut off, regenerated or recomputed differently is stored as new frames. Whatever the plan, it is
exact: a wrong guess costs bytes, not correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .container.records import FrameRun
from .model import CellTable

KEYFRAME, APPEND, TRUNCATE_APPEND = "keyframe", "append", "truncate+append"


@dataclass
class TrackPlan:
    """Where the frames of a track come from.

    ``block``, ``frame``: int64 ``[n_cells]``; block -1 means that the frame is to be stored.
    """

    block: NDArray[np.int64]
    frame: NDArray[np.int64]

    @property
    def n_new(self) -> int:
        return int((self.block < 0).sum())

    def new_ranges(self) -> list[tuple[int, int]]:
        """Runs of frames to be stored."""
        edges = np.flatnonzero(np.diff(self.block < 0, prepend=False, append=False))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    def store(self, start: int, stop: int, block: int) -> None:
        """Frames ``start`` to ``stop`` are now ``block``."""
        self.block[start:stop] = block
        self.frame[start:stop] = np.arange(stop - start)

    def runs(self) -> tuple[FrameRun, ...]:
        """The finished plan as runs of frames that follow one another in a block."""
        return tuple(
            FrameRun(int(self.block[a]), int(self.frame[a]), b - a)
            for a, b in _segments(self.block, self.frame)
        )


def store_all(n_cells: int) -> TrackPlan:
    """A plan that takes nothing from the file."""
    return TrackPlan(np.full(n_cells, -1, np.int64), np.zeros(n_cells, np.int64))


def plan_track(
    old_cells: CellTable,
    old_runs: Sequence[FrameRun],
    new_cells: CellTable,
    same: Callable[[int, int, FrameRun], NDArray[np.bool_]],
) -> TrackPlan:
    """Find the frames of ``new_cells`` among those of an older snapshot's track.

    ``same(start, stop, run)`` says which new frames ``start`` to ``stop`` have the rows that
    ``run`` of a stored block has: bool ``[stop - start]``.
    """
    blocks = np.repeat([run.block for run in old_runs], [run.count for run in old_runs])
    frames = [np.arange(run.first, run.first + run.count) for run in old_runs]
    old_block = blocks.astype(np.int64)
    old_frame = np.concatenate([*frames, np.zeros(0, np.int64)]).astype(np.int64)
    candidate = _match_cells(old_cells, new_cells)
    known = candidate >= 0
    plan = store_all(len(new_cells))
    plan.block[known] = old_block[candidate[known]]
    plan.frame[known] = old_frame[candidate[known]]
    for start, stop in _segments(plan.block, plan.frame):
        if plan.block[start] < 0:
            continue
        run = FrameRun(int(plan.block[start]), int(plan.frame[start]), stop - start)
        plan.block[start:stop][~same(start, stop, run)] = -1
    return plan


def name_plan(n_kept: int, n_old_cells: int) -> str:
    """The word for a snapshot that takes ``n_kept`` frames from the file, given the number of cells
    of its parent."""
    if not n_kept:
        return KEYFRAME
    return APPEND if n_kept == n_old_cells else TRUNCATE_APPEND


def _match_cells(old: CellTable, new: CellTable) -> NDArray[np.int64]:
    """For each new cell an old one of the same position and sequence, or -1: int64 ``[n_new]``.

    Where several cells share both (the patches of an image), the first is matched with the first,
    the second with the second, so that no old cell is taken twice.
    """
    (old_keys, old_order), (new_keys, new_order) = _sorted_keys(old), _sorted_keys(new)
    nth = np.arange(len(new_keys)) - np.searchsorted(new_keys, new_keys)
    at = np.searchsorted(old_keys, new_keys) + nth
    inside = np.flatnonzero(at < len(old_keys))
    hits = inside[old_keys[at[inside]] == new_keys[inside]]
    found = np.full(len(new_keys), -1, np.int64)
    found[new_order[hits]] = old_order[at[hits]]
    return found


def _sorted_keys(cells: CellTable) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Position and first sequence of each cell in one integer, rising, and whose they are."""
    first = np.full(len(cells), -1, np.int64)
    has_id = cells.seq_counts > 0
    starts = np.cumsum(cells.seq_counts, dtype=np.int64) - cells.seq_counts
    first[has_id] = cells.seq_ids[starts[has_id]]
    keys = first << 32 | cells.pos.astype(np.int64) & 0xFFFFFFFF
    order = np.argsort(keys, kind="stable")
    return keys[order], order


def _segments(block: NDArray[np.int64], frame: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Longest runs of one block with frames rising by one, as ``(start, stop)``."""
    if not len(block):
        return []
    breaks = (np.diff(block) != 0) | ((np.diff(frame) != 1) & (block[1:] >= 0))
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(block)]
    return list(zip(edges[:-1], edges[1:], strict=True))
