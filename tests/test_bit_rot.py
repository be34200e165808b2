"""Flipped bits and lost sectors: found, placed, and all that they do not hit can be had again.

What is to be expected is worked out here from the whole file alone: which record every byte belongs
to, and which snapshots need that record. No byte of an archive goes unnoticed: those that carry no
meaning are padding and gaps, which must be zero, and indices and trailers that a later commit has
replaced.
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REGENERATED, ROOT, TURNS, make_snapshot, same_state
from tscfile_cli.main import main

import tscfile
from tscfile import workers
from tscfile.archive import Archive
from tscfile.container.records import (
    BASIS,
    BOOK,
    INDEX,
    Header,
    Index,
    RecordHeader,
    Trailer,
)
from tscfile.container.survey import MOST_TRIED_BYTES, survey
from tscfile.container.writer import ContainerWriter
from tscfile.errors import DamagedError, UsageError
from tscfile.model import Snapshot
from tscfile.salvage import SalvageReport, salvage
from tscfile.sources import open_source

Capture = pytest.CaptureFixture[str]
VECTORS = ROOT / "spec" / "vectors" / "valid"
TINY: dict[str, Any] = {"n_layers": 1, "n_channels": 4}
PART = {"outputs": b"what the source carried"}


@pytest.fixture(autouse=True)
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few bytes one after another: handing them to threads takes most of the time."""
    monkeypatch.setattr(workers, "in_order", lambda work, items: map(work, items))
    monkeypatch.setattr(workers, "run", lambda work, items: [work(item) for item in items])


@dataclass
class Sample:
    """An undamaged archive and what it holds. ``regions``: offset of every record, trailer and gap,
    with its kind; ``users``: snapshots that need the record at an offset."""

    path: Path
    data: bytes
    book: Path | None
    snapshots: list[Snapshot]
    regions: list[tuple[int, str]]
    users: dict[int, set[int]]

    @classmethod
    def of(cls, path: Path, book: Path | None = None) -> Sample:
        found = survey(path)
        assert not found.flaws
        regions = [(0, "header"), *((at, "trailer") for at in found.trailers)]
        for record in found.records:
            regions.append((record.offset, record.kind))
            stop = record.ref.offset + record.ref.length
            if stop % 8:
                regions.append((stop, "gap"))
            if record.header.padding:
                regions.append((record.offset + RecordHeader.SIZE, "padding"))
                regions.append((stop - record.header.length, f"payload of {record.kind}"))
        with Archive(path, book=book) as archive:
            states = [_loaded(archive.snapshot(number)) for number in range(len(archive))]
            users = _users(archive)
        return cls(path, path.read_bytes(), book, states, sorted(regions), users)

    def region(self, offset: int) -> tuple[int, str]:
        """Where the record, trailer or gap that a byte belongs to begins, and what it is."""
        place = bisect_right(self.regions, (offset, "~")) - 1
        start, kind = self.regions[place]
        if kind.startswith("payload of "):
            return self.regions[place - 2][0], kind.removeprefix("payload of ")
        return start, kind

    def needing(self, start: int, stop: int) -> set[int]:
        """Snapshots that need a record of which bytes ``start`` to ``stop`` are a part."""
        places = {self.region(at)[0] for at in range(start, stop)}
        return set().union(*(self.users.get(place, set()) for place in places))


def _loaded(snapshot: Snapshot) -> Snapshot:
    """With its rows in memory."""
    for track in snapshot.tracks:
        rows = [] if snapshot.n_absent else track.read(0, len(track.cells))
        track.read = lambda start, stop, _=None, rows=rows: [part[start:stop] for part in rows]  # type: ignore[method-assign]
    return snapshot


def _users(archive: Archive) -> dict[int, set[int]]:
    users: dict[int, set[int]] = {}
    for number in range(len(archive)):
        record = archive.record(number)
        blocks = {run.block for track in record.tracks for run in track.runs}
        needed = [chunk.ref for n in blocks for chunk in archive.container.blocks[n].chunks]
        needed += [part.ref for part in record.opaque]
        needed += archive.basis_records(record)
        pending: list[int | None] = [number]
        while pending:
            ancestor = pending.pop()
            if ancestor is not None:
                needed.append(archive.container.snapshots[ancestor])
                head = archive.head(ancestor)
                pending += [head.parent, head.dictionary]
        for ref in needed:
            users.setdefault(ref.offset, set()).add(number)
    return users


def archive_of(path: Path, tier: str, **options: Any) -> Path:
    """Three saves of a conversation, of which the second goes another way from frame 5 on."""
    shape = TINY | options
    tscfile.pack(make_snapshot(6, opaque=PART, **shape), path, tier=tier)
    tscfile.append(make_snapshot(8, edited_from=5, **shape), path)
    tscfile.append(make_snapshot(9, **shape), path)
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    folder = tmp_path_factory.mktemp("rot")
    return {tier: Sample.of(archive_of(folder / f"{tier}.tsc", tier)) for tier in TIERS}


TIERS = ("lossless", "near")


@dataclass
class Place:
    """Files that are written again and again."""

    damaged: Path
    out: Path


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """In memory where the system has such a folder: every output is synced."""
    shared = Path("/dev/shm")
    folder = shared / f"tscfile-{os.getpid()}" if os.access(shared, os.W_OK) else tmp_path / "rot"
    folder.mkdir()
    yield Place(folder / "damaged.tsc", folder / "out.tsc")
    shutil.rmtree(folder)


def salvaged(sample: Sample, data: bytes, place: Place) -> SalvageReport | None:
    """What `salvage` makes of ``data``: a valid archive of nothing but what was there, or nothing;
    and the damaged file is as it was."""
    place.damaged.write_bytes(data)
    place.out.unlink(missing_ok=True)
    try:
        report = salvage(place.damaged, place.out, book=sample.book)
    except DamagedError:
        assert not place.out.exists()
        return None
    assert place.damaged.read_bytes() == data
    assert not tscfile.verify(place.out, book=sample.book).problems
    with Archive(place.out, book=sample.book) as archive:
        assert len(archive) == len(report.kept)
        for kept in report.kept:
            found, there = archive.snapshot(kept.snapshot), sample.snapshots[kept.original]
            if there.n_absent:
                assert np.array_equal(found.tokens, there.tokens)
            elif kept.is_whole:
                assert same_state(found, there)
            else:
                assert_begins(there, found, kept.n_cells)
    numbers = [each.original for each in (*report.kept, *report.lost)]
    # Of the newest nothing may be left that tells of it.
    assert sorted(numbers) == list(range(len(numbers)))
    return report


def assert_begins(whole: Snapshot, found: Snapshot, n_cells: int) -> None:
    """``found`` is the first ``n_cells`` frames of ``whole``, of one track, and their tokens."""
    (track,), (there,) = found.tracks, whole.tracks
    n = min(n_cells, len(whole.tokens)) if n_cells < len(there.cells) else len(whole.tokens)
    assert np.array_equal(found.tokens, whole.tokens[:n])
    assert len(track.cells) == n_cells and list(track.tensors) == list(there.tensors)
    assert np.array_equal(track.cells.pos, there.cells.pos[:n_cells])
    for mine, theirs in zip(track.read(0, n_cells), there.read(0, n_cells), strict=True):
        assert np.array_equal(mine, theirs)


# Single bits --------------------------------------------------------------------------------------


def check_flip(sample: Sample, at: int, bit: int, place: Place) -> None:
    """One flipped bit is noticed, placed, and put right."""
    data = bytearray(sample.data)
    data[at] ^= 1 << bit
    report = salvaged(sample, bytes(data), place)
    assert report is not None and report.is_complete
    start, kind = sample.region(at)
    (damage,) = report.found.damages
    assert (damage.kind, damage.offset) == (kind, start)
    harmless = kind in ("gap", "padding")
    assert (damage.flipped, report.n_mended) == ((None, 0) if harmless else (at, 1))
    (problem,) = report.found.problems
    assert f"{kind} at offset {start}" in problem
    hit = sample.users.get(start, set())
    assert {loss.snapshot for loss in damage.losses} == hit
    assert {state.number for state in report.found.snapshots if state.loss} == hit
    assert report.found.whole == sorted(set(range(len(sample.snapshots))) - hit)


@pytest.mark.parametrize("tier", TIERS)
def test_flipped_bits_all_over_the_file(
    tier: str, samples: dict[str, Sample], place: Place
) -> None:
    sample = samples[tier]
    for at in range(0, len(sample.data), 1 if tier == "lossless" else 3):
        check_flip(sample, at, (at ^ at >> 3) % 8, place)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tier", TIERS)
def test_every_flipped_bit(tier: str, samples: dict[str, Sample], place: Place) -> None:
    sample = samples[tier]
    for at in range(len(sample.data)):
        for bit in range(8):
            check_flip(sample, at, bit, place)


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.tsc")), ids=lambda path: path.stem)
def test_flipped_bits_of_the_vectors(path: Path, place: Place) -> None:
    """With a book, a book inside, quality layers, and no frames at all."""
    book = path.with_suffix(".tscbook")
    sample = Sample.of(path, book if book.exists() else None)
    for at in range(0, len(sample.data), 1 + len(sample.data) // 150):
        data = bytearray(sample.data)
        data[at] ^= 1 << at % 8
        report = salvaged(sample, bytes(data), place)
        start, kind = sample.region(at)
        assert report is not None and report.is_complete
        assert [(each.kind, each.offset) for each in report.found.damages] == [(kind, start)]


def test_every_padding_byte(tmp_path: Path, place: Path) -> None:
    """Padding comes before payloads of 4096 bytes; nobody reads it, and it must be zero."""
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(64, n_channels=32), path)
    sample = Sample.of(path)
    begun = [at for at, kind in sample.regions if kind == "padding"]
    ended = [at for at, kind in sample.regions if kind.startswith("payload")]
    assert begun
    for at in (at for span in zip(begun, ended, strict=True) for at in range(*span)):
        check_flip(sample, at, at % 8, place)
    start = ended[0]
    # Of a payload in its place the record begins further ahead.
    assert sample.region(start) == (begun[0] - RecordHeader.SIZE, "chunk")
    check_flip(sample, start + 5, 3, place)


def test_long_payloads_are_not_tried(tmp_path: Path, place: Place) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(520, n_channels=64), path)
    sample = Sample.of(path)
    with Archive(path) as archive:
        chunks = [entry.chunks[0] for entry in archive.container.blocks]
    assert [chunk.ref.length > MOST_TRIED_BYTES for chunk in chunks] == [True, True, False]
    data = bytearray(sample.data)
    data[chunks[1].ref.offset + 5000] ^= 4
    report = salvaged(sample, bytes(data), place)
    assert report is not None and report.n_mended == 0
    assert [kept.n_cells for kept in report.kept] == [256]
    data[chunks[1].ref.offset + 5000] ^= 4
    data[chunks[2].ref.offset + 5] ^= 4
    report = salvaged(sample, bytes(data), place)
    assert report is not None and report.is_complete and report.n_mended == 1


# More than a bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("width", [3, 40])
def test_lost_bytes_anywhere(
    tier: str, width: int, samples: dict[str, Sample], place: Place
) -> None:
    """What does not need a record that is hit is kept as it was, of others at most the beginning;
    `verify` says the same."""
    sample, rng = samples[tier], np.random.default_rng(0)
    n_cut = n_whole = 0
    for start in range(0, len(sample.data), 13):
        stop = min(start + width, len(sample.data))
        data = bytearray(sample.data)
        data[start:stop] = rng.integers(0, 256, stop - start, np.uint8).tobytes()
        report = salvaged(sample, bytes(data), place)
        needing = sample.needing(start, stop)
        untouched = set(range(len(sample.snapshots))) - needing
        whole = {kept.original for kept in report.kept if kept.is_whole} if report else set()
        assert whole >= untouched, start
        n_whole += len(whole)
        if report is None:
            continue
        n_cut += len(report.kept) - len(whole)
        assert report.found.problems and set(report.found.whole) >= untouched
        told = {state.number for state in report.found.snapshots if state.loss}
        assert told <= needing and {lost.original for lost in report.lost} <= told
        problems = tscfile.verify(place.damaged).problems
        assert problems == report.found.problems
    assert n_cut and n_whole


@pytest.mark.parametrize("name", ["lossy", "layered", "tokens", "smallest"])
def test_lost_bytes_of_the_vectors(name: str, place: Place) -> None:
    path = VECTORS / f"{name}.tsc"
    book = path.with_suffix(".tscbook")
    sample, rng = Sample.of(path, book if book.exists() else None), np.random.default_rng(1)
    for start in range(0, len(sample.data), 9):
        data = bytearray(sample.data)
        stop = min(start + 12, len(data))
        data[start:stop] = rng.integers(0, 256, stop - start, np.uint8).tobytes()
        report = salvaged(sample, bytes(data), place)
        untouched = set(range(len(sample.snapshots))) - sample.needing(start, stop)
        whole = {kept.original for kept in report.kept if kept.is_whole} if report else set()
        assert whole >= untouched, start


def test_lost_bytes_of_every_place_are_told_by_verify(
    samples: dict[str, Sample], place: Place
) -> None:
    """A record that cannot be read at all is named by what it was."""
    sample = samples["lossless"]
    named = {"chunk": "block", "snapshot": "snapshot", "opaque": "outputs", "index": "index",
             "trailer": "trailer", "header": "header"}  # fmt: skip
    for at, kind in sample.regions:
        if kind == "gap":
            continue
        data = bytearray(sample.data)
        data[at : at + 24] = bytes(range(24))
        place.damaged.write_bytes(data)
        report = tscfile.verify(place.damaged)
        assert named[kind] in report.problems[0], (at, kind)
        hit = sample.users.get(at, set())
        assert {state.number for state in report.snapshots if state.loss} == hit


def without_indices(data: bytes, path: Path) -> bytes:
    """The file with every index and trailer overwritten."""
    path.write_bytes(data)
    found, changed = survey(path), bytearray(data)
    for record in found.records:
        if record.header.type == INDEX:
            changed[record.offset : record.offset + record.ref.length] = b"x" * record.ref.length
    for at in found.trailers:
        changed[at : at + Trailer.SIZE] = b"y" * Trailer.SIZE
    return bytes(changed)


@pytest.mark.parametrize("tier", [*TIERS, "tokens"])
def test_all_indices_lost(tier: str, tmp_path: Path, place: Place) -> None:
    """Blocks get their numbers and the very ids that the indices had."""
    path, identity = tmp_path / "a.tsc", {"weights_blake3": "0" * 64, "architecture": "llama"}
    sample = Sample.of(archive_of(path, tier, identity=identity))
    report = salvaged(sample, without_indices(sample.data, place.damaged), place)
    assert report is not None and report.is_complete and report.n_mended == 0
    with Archive(path) as before, Archive(place.out) as after:
        old, new = before.container.blocks, after.container.blocks
        assert report.counted == list(range(len(old)))
        for mine, theirs in zip(new, old, strict=True):
            assert mine.n_frames == theirs.n_frames
            assert tier == "near" or mine.content_id == theirs.content_id
            assert tier == "tokens" or mine.logical_id == theirs.logical_id
        assert len(before.container.extras(BASIS)) == len(after.container.extras(BASIS))
    with pytest.raises(DamagedError):
        tscfile.open(place.damaged)


def test_books_and_layers_without_indices(place: Place) -> None:
    for name in ("lossy", "layered", "embedded", "tokens"):
        path = VECTORS / f"{name}.tsc"
        book = path.with_suffix(".tscbook")
        sample = Sample.of(path, book if book.exists() else None)
        report = salvaged(sample, without_indices(sample.data, place.damaged), place)
        assert report is not None and report.is_complete, name
        assert report.counted


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, list[int]]:
    """One save of five blocks in one commit, and the offsets of their chunks."""
    path = tmp_path_factory.mktemp("long") / "long.tsc"
    tscfile.pack(make_snapshot(1100, **TINY), path)
    with Archive(path) as archive:
        offsets = [entry.chunks[0].ref.offset for entry in archive.container.blocks]
    assert len(offsets) == 5
    return Sample.of(path), offsets


@pytest.mark.parametrize("lost", range(5))
@pytest.mark.parametrize("what", ["header", "payload"])
def test_index_and_a_chunk_lost(
    lost: int, what: str, long: tuple[Sample, list[int]], place: Place
) -> None:
    """Numbers are counted up to what is lost."""
    sample, offsets = long
    data = bytearray(without_indices(sample.data, place.damaged))
    at = offsets[lost] + (0 if what == "header" else 100)
    data[at : at + 20] = b"z" * 20
    report = salvaged(sample, bytes(data), place)
    if not lost:
        assert report is None
        return
    assert report is not None
    assert [kept.n_cells for kept in report.kept] == [256 * lost]
    assert report.counted == list(range(lost))
    (loss,) = (state.loss for state in report.found.snapshots)
    assert loss is not None and [(c.start, c.stop) for c in loss.cells] == [(256 * lost, 1100)]


def test_chunks_in_another_order_are_not_mistaken(tmp_path: Path, place: Place) -> None:
    """Blocks that do not fit the frame runs that would lead to them are all given up."""
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(300, **TINY), path)
    with Archive(path) as archive:
        first, second = (entry.chunks[0].ref for entry in archive.container.blocks)
    data = bytearray(without_indices(path.read_bytes(), place.damaged))
    a = data[first.offset : first.offset + first.length]
    b = data[second.offset : second.offset + second.length]
    end = second.offset + second.length + -second.length % 8
    swapped = bytes(b) + bytes(-len(b) % 8) + bytes(a)
    data[first.offset : end] = swapped + bytes(end - first.offset - len(swapped))
    place.damaged.write_bytes(data)
    with pytest.raises(DamagedError):
        salvage(place.damaged, place.out)
    assert not place.out.exists()


# What is kept of a snapshot -----------------------------------------------------------------------


def overwritten(path: Path, offset: int, length: int = 20) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"z" * length)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Saves of 90, 170 and 250 frames; the offsets of their chunks by `chunk_of`."""
    path = tmp_path / "series.tsc"
    tscfile.pack(TURNS[0], path)
    for save in TURNS[1:3]:
        tscfile.append(save, path)
    return path


def chunk_of(path: Path, block: int) -> int:
    with Archive(path) as archive:
        return archive.container.blocks[block].chunks[0].ref.offset


def snapshot_of(path: Path, number: int) -> int:
    with Archive(path) as archive:
        return archive.container.snapshots[number].offset


def test_a_cut_save_is_a_state_of_its_own(series: Path, tmp_path: Path) -> None:
    """It unpacks, says what it is, and goes on with the next save of the conversation."""
    out, state = tmp_path / "out.tsc", tmp_path / "out.kv"
    overwritten(series, chunk_of(series, 2) + 300)
    report = salvage(series, out)
    assert [(kept.n_cells, kept.is_whole) for kept in report.kept][:2] == [
        (len(open_source(save).tracks[0].cells), True) for save in TURNS[:2]
    ]
    cut = report.kept[2]
    assert not cut.is_whole and cut.n_cells == report.kept[1].n_cells
    with tscfile.open(out) as archive:
        assert f"first {cut.n_cells} of {cut.n_cells_before} frames" in archive.record(2).name
        assert archive.record(2).source["cell_counts"] == [cut.n_cells]
    tscfile.unpack(out, state)
    found, whole = open_source(state), open_source(TURNS[2])
    assert np.array_equal(found.tokens, whole.tokens[: cut.n_cells])
    assert_begins(whole, found, cut.n_cells)
    assert tscfile.append(TURNS[2], out).n_frames_kept == cut.n_cells
    assert not tscfile.verify(out).problems


def test_children_of_what_is_cut_or_lost(series: Path, tmp_path: Path) -> None:
    """A whole save below one that was cut keeps its tokens and frames."""
    out = tmp_path / "out.tsc"
    tscfile.append(TURNS[3], series)
    tscfile.append(REGENERATED, series)
    with Archive(series) as archive:
        record = archive.record(4)
        assert record.parent == 3 and record.ids.kept > 200
        (alone,) = {run.block for run in archive.record(3).tracks[0].runs} - {
            run.block for run in record.tracks[0].runs
        }
    overwritten(series, chunk_of(series, alone) + 300)
    report = salvage(series, out)
    assert [kept.is_whole for kept in report.kept] == [True, True, True, False, True]
    with Archive(out) as archive:
        assert archive.record(4).parent == 3
        assert same_state(archive.snapshot(4), open_source(REGENERATED))
    assert not tscfile.verify(out).problems
    # And where nothing is left of the parent.
    overwritten(series, snapshot_of(series, 4) + 30)
    overwritten(series, chunk_of(series, 0) + 300)
    with pytest.raises(DamagedError, match="can be had"):
        salvage(series, out, force=True)


def test_an_opaque_part_that_can_be_spared(tmp_path: Path, place: Place) -> None:
    path = tmp_path / "a.tsc"
    for name, is_kept in (("outputs", True), ("recurrent", False)):
        tscfile.pack(make_snapshot(6, opaque={name: b"p" * 20}, **TINY), path, force=True)
        tscfile.append(make_snapshot(9, **TINY), path)
        with Archive(path) as archive:
            (part,) = archive.record(0).opaque
        overwritten(path, part.ref.offset + RecordHeader.SIZE, 12)
        report = salvage(path, place.out, force=True)
        assert [kept.original for kept in report.kept] == ([0, 1] if is_kept else [1])
        if is_kept:
            assert report.kept[0].parts == ("outputs",) and not report.is_complete
        else:
            assert "recurrent" in report.lost[0].reason
        with Archive(place.out) as archive:
            assert same_state(archive.snapshot(-1), make_snapshot(9, **TINY))
            assert archive.record(-1).parent == (0 if is_kept else None)


def test_cells_out_of_order_are_not_cut(tmp_path: Path, place: Place) -> None:
    """A sliding window, for one, says nothing of an earlier moment."""
    path, snapshot = tmp_path / "a.tsc", make_snapshot(300, **TINY)
    snapshot.tracks[0].cells.pos += 100
    snapshot.tokens = np.concatenate([np.arange(100, dtype=np.int32), snapshot.tokens])
    tscfile.pack(snapshot, path)
    overwritten(path, chunk_of(path, 1) + 100)
    with pytest.raises(DamagedError, match="not in order"):
        salvage(path, place.out)
    (state,) = tscfile.verify(path).snapshots
    assert state.loss is not None
    (cells,) = state.loss.cells
    assert (cells.start, cells.stop, cells.first_position, cells.last_position) == (
        256, 300, 356, 399,
    )  # fmt: skip


@pytest.mark.parametrize("where", [0, 40])
def test_a_book_that_is_damaged_inside(where: int, tmp_path: Path, place: Place) -> None:
    """Blocks are copied by their checksums; with the book at hand they are as they were."""
    path, book = VECTORS / "embedded.tsc", tmp_path / "lost.tscbook"
    with Archive(path) as archive:
        (ref,) = archive.container.extras(BOOK)
        states = [_loaded(snapshot) for snapshot in archive]
        wanted = archive.record(0).coding["book"]
        data = bytes(archive.container.read(ref, BOOK))
    place.damaged.write_bytes(path.read_bytes())
    overwritten(place.damaged, ref.offset + where)
    (problem,) = tscfile.verify(place.damaged).problems
    assert "book" in problem and "lost: cells 0 to 5 of snapshot 0; cells" in problem
    report = salvage(place.damaged, place.out)
    assert report.undecoded and all(kept.is_whole for kept in report.kept) and not report.lost
    with pytest.raises(UsageError, match=wanted[:16]), Archive(place.out) as archive:
        archive.snapshot(0).tracks[0].read(0, 1)
    book.write_bytes(data)
    with Archive(place.out, book=book) as archive:
        assert all(same_state(mine, state) for mine, state in zip(archive, states, strict=True))


def differing(path: Path, *, branch: int) -> list[Snapshot]:
    """Three saves: frames 40 to 110 of one are stored as differences to those of the one before it
    but for a branch from frame 30 on, which is number ``branch``."""
    first, second = make_snapshot(120), make_snapshot(140)
    rng = np.random.default_rng(1)
    for i, part in enumerate(second.tracks[0].rows):  # type: ignore[attr-defined]
        rows = part.copy().view(np.uint16)
        rows[40:110] ^= rng.integers(0, 2, rows[40:110].shape).astype(np.uint16)
        second.tracks[0].rows[i] = rows.view(np.uint8)  # type: ignore[attr-defined]
    saves = [first, second]
    saves.insert(branch, make_snapshot(60, edited_from=30))
    tscfile.pack(saves[0], path)
    for save in saves[1:]:
        tscfile.append(save, path)
    return saves


def test_differences_to_what_is_damaged(tmp_path: Path, place: Place) -> None:
    path = tmp_path / "a.tsc"
    saves = differing(path, branch=0)
    with Archive(path) as archive:
        entries = archive.container.blocks
        (number,) = (n for n, entry in enumerate(entries) if entry.sources)
        (source,) = {run.block for run in entries[number].sources}
        at, beside = chunk_of(path, source), chunk_of(path, number)
    whole = path.read_bytes()
    place.damaged.write_bytes(whole)
    overwritten(place.damaged, at + 100)
    (damage,) = tscfile.verify(place.damaged).damages
    assert damage.block == source
    lost = {loss.snapshot: [(c.start, c.stop) for c in loss.cells] for loss in damage.losses}
    # What shares the block, and what is a difference to it.
    assert lost == {1: [(30, 120)], 2: [(30, 120)]}
    report = salvage(place.damaged, place.out)
    assert [(kept.n_cells, kept.is_whole) for kept in report.kept] == [
        (60, True), (30, False), (30, False),
    ]  # fmt: skip
    # The difference itself, and with the index: what only that says of it cannot be had.
    place.damaged.write_bytes(whole)
    overwritten(place.damaged, beside + 100)
    report = salvage(place.damaged, place.out, force=True)
    assert [kept.n_cells for kept in report.kept] == [60, 120, 40]
    place.damaged.write_bytes(without_indices(whole, place.damaged))
    report = salvage(place.damaged, place.out, force=True)
    assert [kept.n_cells for kept in report.kept] == [60, 120, 40]
    with Archive(place.out) as archive:
        for found, save in zip(archive, saves, strict=True):
            assert_begins(save, found, len(found.tracks[0].cells))


def test_a_difference_behind_a_block_that_is_left_out(tmp_path: Path, place: Place) -> None:
    """Blocks are numbered anew; the difference finds its frames."""
    first, _, last = differing(place.damaged, branch=1)
    overwritten(place.damaged, snapshot_of(place.damaged, 1) + 30)
    report = salvage(place.damaged, place.out)
    assert [(kept.original, kept.is_whole) for kept in report.kept] == [(0, True), (2, True)]
    assert not tscfile.verify(place.out).problems
    with Archive(place.out) as archive:
        numbers = [n for n, entry in enumerate(archive.container.blocks) if entry.sources]
        assert numbers == [1]
        assert all(same_state(*pair) for pair in zip(archive, (first, last), strict=True))


def test_an_archive_within_an_archive_is_not_salvaged(tmp_path: Path, place: Place) -> None:
    """Its index lists what is not there."""
    inner = tmp_path / "inner.tsc"
    tscfile.pack(make_snapshot(6, seed=7, **TINY), inner)
    tscfile.pack(make_snapshot(9, **TINY), place.damaged)
    with Archive(place.damaged) as archive, place.damaged.open("r+b") as file:
        writer = ContainerWriter(file.fileno(), archive.container)
        writer.add_opaque(inner.read_bytes())
        writer.add_snapshot(b"not of use")
        writer.commit()
    data = bytearray(place.damaged.read_bytes())
    at = data.index(inner.read_bytes())
    data[at - RecordHeader.SIZE : at] = b"z" * RecordHeader.SIZE
    place.damaged.write_bytes(data)
    report = salvage(place.damaged, place.out)
    assert [kept.original for kept in report.kept] == [0]
    with Archive(place.out) as archive:
        assert same_state(archive.snapshot(), make_snapshot(9, **TINY))


# Files and exit codes -----------------------------------------------------------------------------


def run(capfd: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    capfd.readouterr()
    return main([str(argument) for argument in arguments]), *capfd.readouterr()


def test_command(series: Path, tmp_path: Path, capfd: Capture) -> None:
    out, whole = tmp_path / "out.tsc", series.read_bytes()
    code, printed, told = run(capfd, "verify", series, "--salvage", out)
    assert (code, printed) == (0, "") and "3 of 3 snapshots are whole" in told
    # A flipped bit of an index: everything can be had.
    data = bytearray(whole)
    data[-60] ^= 1
    series.write_bytes(data)
    assert run(capfd, "verify", series)[0] == 3
    assert run(capfd, "verify", series, "--salvage", out)[0] == 2
    code, _, told = run(capfd, "verify", series, "--salvage", out, "-f")
    assert code == 0 and "index at offset" in told and "flipped bits put right: 1" in told
    for number, save in enumerate(TURNS[:3]):
        state = tmp_path / f"{number}.kv"
        assert run(capfd, "unpack", out, "--snapshot", str(number), "-o", state)[0] == 0
        assert state.read_bytes() == save.read_bytes()
    # A lost sector of the last save.
    series.write_bytes(whole)
    overwritten(series, chunk_of(series, 2) + 300, 512)
    damaged = series.read_bytes()
    code, _, told = run(capfd, "verify", series, "--salvage", out, "-f", "-q")
    assert code == 3 and told.count("\n") == 1 and "block 2; lost: cells" in told
    assert "whole as they are: snapshots 0 to 1" in run(capfd, "verify", series)[2]
    code, printed, told = run(capfd, "verify", series, "--salvage", out, "-f", "--json")
    report = json.loads(printed)
    assert code == 3 and told.count("\n") == len(report["found"]["problems"])
    assert [kept["original"] for kept in report["kept"]] == [0, 1, 2]
    assert series.read_bytes() == damaged


def test_what_is_refused(series: Path, tmp_path: Path, capfd: Capture) -> None:
    out, whole = tmp_path / "out.tsc", series.read_bytes()
    link = tmp_path / "link.tsc"
    link.symlink_to(series)
    for target in (series, link):
        with pytest.raises(UsageError, match="itself"):
            salvage(series, target, force=True)
    assert run(capfd, "verify", series, "--quick", "--salvage", out)[0] == 2
    assert series.read_bytes() == whole and not out.exists()
    series.write_bytes(Header(major=2).write() + whole[Header.SIZE :])
    assert run(capfd, "verify", series, "--salvage", out)[0] == 5
    for content in (b"", b"\x00" * 500, os.urandom(3000), whole[:40]):
        series.write_bytes(content)
        code, _, told = run(capfd, "verify", series, "--salvage", out)
        assert code == 3 and told.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["link.tsc", "series.tsc"]


def test_right_checksums_that_contradict_each_other(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Index.write
    monkeypatch.setattr(Index, "write", lambda self: write(replace(self, first_snapshot=7)))
    tscfile.append(TURNS[3], series)
    monkeypatch.undo()
    assert "does not follow the one before" in tscfile.verify(series).problems[0]
    report = salvage(series, tmp_path / "out.tsc")
    assert [kept.original for kept in report.kept] == [0, 1, 2, 3]
    assert all(kept.is_whole for kept in report.kept)
    assert not tscfile.verify(tmp_path / "out.tsc").problems


def test_a_full_disk_leaves_nothing(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="space"):
        salvage(series, tmp_path / "out.tsc")
    assert sorted(os.listdir(tmp_path)) == before
