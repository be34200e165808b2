"""One archive under any sequence of commands keeps every snapshot as it was when it was stored."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import strategies as own
from conftest import MemoryTrack, make_snapshot, same_state
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import tscfile
from tscfile.errors import UsageError
from tscfile.explanation import explain
from tscfile.model import Snapshot
from tscfile.salvage import salvage

LAYERS = ("near", "lossless")
CHOICES = (None, ("lossless",), ("near",), LAYERS)
N_FRAMES = 48


@dataclass
class Held:
    """A snapshot that the archive should have: its save, and the rows that each tier gave back when
    it was stored."""

    save: Snapshot = field(repr=False)
    rows: dict[str, list[np.ndarray]] = field(repr=False)

    @property
    def is_exact(self) -> bool:
        return "lossless" in self.rows


def rows_of(snapshot: Snapshot) -> list[np.ndarray]:
    [track] = snapshot.tracks
    return track.read(0, len(track.cells))


class ArchiveMachine(RuleBasedStateMachine):
    """Commands that change a file, and after each a look at all that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="tscfile-"))
        self.path, self.out = self.folder / "a.tsc", self.folder / "out.tsc"
        self.held: list[Held] = []

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # --- commands that add ---------------------------------------------------------------------

    @initialize(n=st.integers(1, N_FRAMES), tiers=st.sampled_from(CHOICES))
    def pack(self, n: int, tiers: tuple[str, ...] | None) -> None:
        save = make_snapshot(n, n_channels=8)
        tscfile.pack(save, self.path, tier=tiers)
        self._note(save, tiers or ("lossless",))

    @rule(data=st.data(), tiers=st.sampled_from(CHOICES))
    def append(self, data: st.DataObject, tiers: tuple[str, ...] | None) -> None:
        """Of what any older save had: more, less, other frames, frames elsewhere."""
        like = data.draw(st.sampled_from(self.held)).save
        save = self._edited(data.draw, like)
        report = tscfile.append(save, self.path, tier=tiers)
        self._note(save, tuple(report.tier.split(",")))
        assert tiers is None or tiers == tuple(report.tier.split(","))

    def _edited(self, draw: own.Draw, save: Snapshot) -> Snapshot:
        [track] = save.tracks
        n = len(track.cells)
        edit = draw(st.sampled_from(["grow", "branch", "cut short", "again", "mixed", "cut out"]))
        if edit == "grow":
            more = make_snapshot(draw(st.integers(1, N_FRAMES)), n_channels=8)
            return more
        if edit == "branch":
            at, n = draw(st.integers(1, n)), draw(st.integers(1, N_FRAMES))
            return make_snapshot(max(at, n), n_channels=8, edited_from=at, seed=0)
        which, rng = np.arange(n), np.random.default_rng(draw(own.SEEDS))
        tokens = save.tokens
        if edit == "cut short":
            which = which[: draw(st.integers(1, n))]
            tokens = tokens[: len(which)]
        elif edit == "mixed":
            which = rng.permutation(n)
        elif edit == "cut out" and n > 20:
            # The keys are not turned: as good as any other rows.
            start = draw(st.integers(1, 10))
            which = np.delete(which, np.arange(start, start + draw(st.integers(1, 6))))
            tokens = np.delete(tokens, np.setdiff1d(np.arange(n), which)[:len(tokens)])
        rows = [part[which].copy() for part in track.read(0, n)]
        cells = own.taken(track.cells, which)
        if edit == "cut out":
            cells = replace(cells, pos=np.arange(len(which), dtype=np.int32))
        if edit == "again":
            for part in rows:
                part[rng.integers(len(part)), ::2] ^= 1
        made = MemoryTrack(cells, track.tensors, rows, dict(track.attributes))
        return replace(save, tokens=tokens, tracks=[made])

    def _note(self, save: Snapshot, tiers: tuple[str, ...]) -> None:
        with tscfile.open(self.path) as archive:
            assert tuple(archive.record().layers) == tiers
            rows = {tier: rows_of(archive.snapshot(-1, tier)) for tier in tiers}
        for tier, stored in rows.items():
            real = rows_of(save)
            if tier == "lossless":
                assert all(map(np.array_equal, stored, real))
                continue
            for mine, theirs in zip(stored, real, strict=True):
                error = mine.view("<f2").astype(float) - theirs.view("<f2")
                assert np.square(error).mean() <= 0.1 * np.square(theirs.view("<f2")).mean() + 1
        self.held.append(Held(save, rows))

    # --- commands that write the file again -----------------------------------------------------

    @rule(data=st.data(), in_place=st.booleans())
    def compact(self, data: st.DataObject, in_place: bool) -> None:
        dropped = data.draw(own.drops(len(self.held)))
        report = tscfile.compact(self.path, None if in_place else self.out, drop=dropped)
        self._replace(in_place)
        self.held = [each for number, each in enumerate(self.held) if number not in dropped]
        assert report.n_snapshots == len(self.held)

    @precondition(lambda self: len(self.held) > 1)
    @rule(data=st.data())
    def keep_last(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, len(self.held) - 1))
        tscfile.compact(self.path, drop=range(len(self.held) - n))
        self.held = self.held[-n:]

    @rule()
    def demote(self) -> None:
        """Refused where an exact snapshot has no layer to leave."""
        before = self.path.read_bytes()
        impossible = any(tuple(each.rows) == ("lossless",) for each in self.held)
        try:
            report = tscfile.demote(self.path, self.out, "near")
        except UsageError:
            assert impossible and self.path.read_bytes() == before and not self.out.exists()
            return
        assert not impossible
        assert report.n_demoted == sum(each.is_exact for each in self.held)
        self._replace(False)
        for each in self.held:
            each.rows.pop("lossless", None)

    @rule()
    def salvage(self) -> None:
        report = salvage(self.path, self.out)
        assert report.is_complete and not report.found.problems
        self._replace(False)

    @rule(tiers=st.sampled_from(CHOICES[1:]))
    def recode(self, tiers: tuple[str, ...]) -> None:
        """Exact snapshots are put into another tier; others are refused."""
        before = self.path.read_bytes()
        with tscfile.open(self.path) as archive:
            # A save of a lossy tier whose frames all came from exact ones is exact.
            lossy = not all(snapshot.exact for snapshot in archive)
        try:
            tscfile.compact(self.path, tier=tiers)
        except UsageError:
            assert lossy and self.path.read_bytes() == before
            return
        assert not lossy
        saves, self.held = [each.save for each in self.held], []
        with tscfile.open(self.path) as archive:
            assert len(archive) == len(saves)
            for number, save in enumerate(saves):
                assert tuple(archive.record(number).layers) == tiers
                rows = {tier: rows_of(archive.snapshot(number, tier)) for tier in tiers}
                self.held.append(Held(save, rows))

    def _replace(self, done: bool) -> None:
        if not done:
            self.out.replace(self.path)

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def nothing_has_changed(self) -> None:
        if not self.held:
            return
        problems = tscfile.verify(self.path).problems
        assert not problems
        with tscfile.open(self.path) as archive:
            assert len(archive) == len(self.held)
            for number, each in enumerate(self.held):
                assert archive.record(number).layers == list(each.rows)
                assert np.array_equal(archive.tokens(number), each.save.tokens)
                if each.is_exact:
                    assert same_state(archive.snapshot(number), each.save)
                for tier, rows in each.rows.items():
                    found = rows_of(archive.snapshot(number, tier))
                    assert all(map(np.array_equal, found, rows)), (number, tier)
            for info, each in zip(explain(archive), self.held, strict=True):
                n_cells = len(each.save.tracks[0].cells)
                assert sum(part.n_frames for part in info.parts) == n_cells
                assert info.parent is None or info.parent < info.number


@pytest.mark.usefixtures("monkeypatch")
def test_any_sequence_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    run_state_machine_as_test(
        ArchiveMachine, settings=settings(own.examples(25), stateful_step_count=12)
    )
