"""Whatever order the saves of a conversation are appended in, each comes back as it was saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strategies as own
from checks import BOOK, check_bounds, check_holds, check_steps, sample_identity, track_of
from conftest import SESSION, MemoryTrack, plain_cells
from hypothesis import given
from hypothesis import strategies as st

import tscfile
from tscfile import temporal
from tscfile.book_codec import MAX_DELTA
from tscfile.container.records import FrameRun
from tscfile.dtypes import DTYPES
from tscfile.model import CellTable, Snapshot, TensorSpec
from tscfile.session_codec import _ALLOWED as ALLOWED
from tscfile.sources import open_source
from tscfile.transforms import channels
from tscfile.transforms.rope import Rope


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of files that each example overwrites."""
    return tmp_path_factory.mktemp("plans")


# --- conversations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """``index``: which token, with its keys and values; ``again``: how often it was computed."""

    index: int
    again: int = 0


Talk = tuple[Frame, ...]
"""The frames of a save, position after position."""


@st.composite
def talks(draw: own.Draw, n_frames: int, most: int = 5) -> list[Talk]:
    """Saves of one conversation: it grows, an answer is made again, tokens are cut out of the
    middle, frames are computed again; each from any of the earlier saves."""
    found = [tuple(Frame(i) for i in range(draw(st.integers(1, n_frames // 2))))]
    for _ in range(draw(st.integers(1, most - 1))):
        talk = list(draw(st.sampled_from(found)))
        edit = draw(st.sampled_from(["grow", "regenerate", "cut", "again", "insert"]))
        other = draw(st.integers(0, n_frames - 1))
        added = [Frame(i) for i in range(other, min(other + draw(st.integers(1, 40)), n_frames))]
        # The first token stays: a save without it is of another conversation.
        at = draw(st.integers(1, len(talk)))
        if edit == "grow":
            talk += added
        elif edit == "regenerate":
            talk[at:] = added
        elif edit == "cut":
            del talk[at : at + draw(st.integers(1, 40))]
        elif edit == "insert":
            talk[at:at] = added
        else:
            stop = at + draw(st.integers(1, 9))
            talk[at:stop] = [replace(each, again=each.again + 1) for each in talk[at:stop]]
        found.append(tuple(talk))
    return found


def ordered(cells: CellTable, rows: list[np.ndarray], order: np.ndarray) -> dict[str, Any]:
    """Cells and rows of a track in another order."""
    return {"cells": own.taken(cells, order), "rows": [part[order] for part in rows]}


def save_of(talk: Talk, moves_keys: bool, seed: int, shuffled: bool) -> Snapshot:
    """A save of random rows. ``moves_keys``: a key is another one where its position is; else it is
    the same wherever it goes. ``seed``: of the conversation."""
    specs = [TensorSpec(layer, role, DTYPES["f16"], 96) for role in "kv" for layer in range(2)]
    rows = []
    for number, spec in enumerate(specs):
        part = np.empty((len(talk), spec.row_bytes), np.uint8)
        for pos, frame in enumerate(talk):
            state = [seed, number, frame.index]
            part[pos] = np.random.default_rng(state).integers(0, 256, spec.row_bytes, np.uint8)
            part[pos, frame.again % 96] ^= frame.again
            if moves_keys and spec.role == "k":
                part[pos, :8] ^= pos & 0xFF
        rows.append(part)
    tokens = np.array([7 + frame.index for frame in talk], np.int32)
    track = MemoryTrack(plain_cells(len(talk)), specs, rows, {})
    if shuffled:
        order = np.random.default_rng(seed).permutation(len(talk))
        track = replace(track, **ordered(track.cells, rows, order))
    return Snapshot(tokens, [track], {"format": "any"})


def in_any_order(draw: own.Draw, saves: Sequence[Snapshot], path: Path, **options: Any) -> Any:
    """Put saves into the archive ``path`` in any order; returns them in that order."""
    order = draw(st.permutations(range(len(saves))))
    for nth, number in enumerate(order):
        if nth:
            tscfile.append(saves[number], path, **options)
        else:
            tier, facts = options.pop("tier", None), options.pop("identity", None)
            tscfile.pack(saves[number], path, tier=tier, identity=facts, force=True, **options)
    return [saves[number] for number in order]


@own.examples(40)
@given(st.data(), st.booleans(), own.SEEDS)
def test_lossless_saves_in_any_order(
    folder: Path, data: st.DataObject, moves_keys: bool, seed: int
) -> None:
    path, out = folder / "a.tsc", folder / "out.tsc"
    saves = [
        save_of(talk, moves_keys, seed, data.draw(st.booleans()))
        for talk in data.draw(talks(90))
    ]  # fmt: skip
    held = in_any_order(data.draw, saves, path)
    check_holds(path, held)
    dropped = data.draw(own.drops(len(held)))
    tscfile.compact(path, out, drop=dropped, force=True)
    check_holds(out, [each for number, each in enumerate(held) if number not in dropped])


# --- real frames ------------------------------------------------------------------------------


@cache
def sample_frames() -> tuple[Snapshot, np.ndarray]:
    """The sample session, and its channels with all keys turned back to position 0."""
    sample = open_source(SESSION)
    [track] = sample.tracks
    frames = channels.to_frames(track.read(0, 400), track.tensors, track.cells.pos, *_turn())
    return sample, frames


def _turn() -> tuple[Rope, int, str]:
    return Rope((10000.0 ** (-np.arange(32) / 32)).astype(np.float32)), 64, "norm"


def real_save(talk: Talk) -> Snapshot:
    """A save of the sample model whose keys are turned to where they are. What is computed again is
    hardly another."""
    sample, frames = sample_frames()
    [track] = sample.tracks
    which = np.array([frame.index for frame in talk])
    chosen, cells = frames[which].copy(), plain_cells(len(talk))
    for pos, frame in enumerate(talk):
        if frame.again:
            noise = np.random.default_rng([frame.index, frame.again]).normal(0, 1, chosen.shape[1])
            chosen[pos] *= 1 + 5e-4 * noise.astype(np.float32)
    rows = channels.from_frames(chosen, track.tensors, cells.pos, *_turn())
    source = {**sample.source, "cell_counts": [len(talk)]}
    made = MemoryTrack(cells, list(track.tensors), list(rows), dict(track.attributes))
    return Snapshot(sample.tokens[which], [made], source)


@own.examples(12)
@given(st.data(), st.sampled_from(["near", "balanced", "archive", "near without a book"]))
def test_lossy_saves_in_any_order(folder: Path, data: st.DataObject, tier: str) -> None:
    """Each frame that is decoded for a save is as near to it as one that was packed for it may be,
    through every move; and nothing of that changes where the file is written again."""
    path, out = folder / "a.tsc", folder / "out.tsc"
    book = None if tier.endswith("book") else BOOK
    saves = [real_save(talk) for talk in data.draw(talks(150))]
    held = in_any_order(
        data.draw, saves, path, tier=tier.split()[0], book=book, identity=sample_identity()
    )
    dropped = data.draw(own.drops(len(held)))
    tscfile.compact(path, out, drop=dropped, book=book, force=True)
    kept = [each for number, each in enumerate(held) if number not in dropped]
    for each, wanted in ((path, held), (out, kept)):
        assert not tscfile.verify(each, book=book).problems
        with tscfile.open(each, book=book) as archive:
            assert len(archive) == len(wanted)
            for number, save in enumerate(wanted):
                assert np.array_equal(archive.tokens(number), save.tokens)
                if book:
                    check_steps(track_of(archive, number), save.tracks[0], MAX_DELTA)
                else:
                    check_bounds(track_of(archive, number), save.tracks[0], ALLOWED)


# --- the planner alone ------------------------------------------------------------------------


@st.composite
def old_frames(draw: own.Draw) -> temporal.OldFrames:
    """Cells of a track and frames of blocks, none of them twice."""
    runs, n = [], 0
    for block in range(draw(st.integers(0, 4))):
        first, count = draw(st.integers(0, 20)), draw(st.integers(1, 20))
        runs.append(FrameRun(block, first, count, draw(st.integers(0, 2)), draw(st.integers(0, 3))))
        n += count
    return temporal.OldFrames(draw(own.cell_tables(n, np.zeros(0, np.int32))), runs)


@own.examples(200)
@given(st.data(), old_frames(), own.SEEDS)
def test_no_frame_is_planned_twice(
    data: st.DataObject, old: temporal.OldFrames, seed: int
) -> None:
    """Frames that are taken are of the older track, each once, in the cells that were judged good;
    what is stored and what is taken are all cells."""
    n_old = len(old.cells)
    n_new = data.draw(st.integers(0, 60))
    new = data.draw(own.cell_tables(n_new, np.zeros(0, np.int32)))
    rng = np.random.default_rng(seed)
    if n_old and data.draw(st.booleans()):
        which = rng.permutation(n_old)[:n_new]
        new = own.taken(old.cells, which)
    origin = None
    if data.draw(st.booleans()):
        origin = rng.integers(-1, n_old + 2, data.draw(st.integers(0, 80)))
    share = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    asked: dict[tuple[int, int], tuple[int, bool]] = {}
    places = set(zip(old.block.tolist(), old.frame.tolist(), strict=True))

    def judge(start: int, stop: int, run: FrameRun, moved: int) -> tuple[np.ndarray, bool]:
        assert run.count == stop - start > 0
        good = rng.random(run.count) < share
        for i in range(run.count):
            place = run.block, run.first + i
            assert place in places, "a frame that the older track does not have"
            if good[i]:
                assert place not in asked, "a frame that was taken is offered again"
                asked[place] = start + i, bool(moved)
        return good, bool(moved)

    plan = temporal.plan_track(old, new, origin, judge, _always)
    taken = np.flatnonzero(plan.block >= 0)
    found = {(int(plan.block[i]), int(plan.frame[i])): (int(i), bool(plan.moved[i])) for i in taken}
    assert len(found) == len(taken) and found == asked
    assert (plan.base < max(n_old, 1)).all()
    # Segments and ranges to be stored are whole, in order, and of one kind.
    assert [i for a, b in plan.segments() for i in range(a, b)] == list(range(len(new)))
    stored = [i for a, b in plan.new_ranges() for i in range(a, b)]
    assert stored == np.flatnonzero(plan.block < 0).tolist()
    for a, b in plan.new_ranges():
        assert (np.diff(plan.base[a:b]) == 1).all() or (plan.base[a:b] == -1).all()
        assert len(set(plan.moved[a:b].tolist())) == 1 or (plan.base[a:b] == -1).all()
    for a, b in plan.segments():
        if plan.block[a] >= 0:
            assert (np.diff(plan.frame[a:b]) == 1).all()
            assert (plan.block[a:b] == plan.block[a]).all()


def _always(run: FrameRun, moved: int) -> bool:
    return True
