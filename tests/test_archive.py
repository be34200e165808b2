"""Archives: what goes in comes out, later saves cost their new frames, failures change nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    ALL_DTYPES,
    REGENERATED,
    SESSION,
    SESSION_BF16,
    TURNS,
    MemoryTrack,
    make_snapshot,
    plain_cells,
    same_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import tscfile
from tscfile import blocks, temporal
from tscfile.container.reader import Container
from tscfile.container.records import CHUNK, FrameRun
from tscfile.description import describe
from tscfile.dtypes import DTYPES
from tscfile.errors import MismatchError, TscError, UnsupportedError, UsageError
from tscfile.model import CellTable, ModelIdentity, Snapshot, TensorSpec

few = settings(max_examples=40, deadline=None, derandomize=True)


def packed(snapshot: Snapshot, path: Path) -> Snapshot:
    """The snapshot after a way through the archive ``path``, which stays open until the end."""
    tscfile.pack(snapshot, path, force=True)
    return tscfile.open(path).snapshot()


def with_track(snapshot: Snapshot, **changes: Any) -> Snapshot:
    """The same with another first track."""
    [track] = snapshot.tracks
    return replace(snapshot, tracks=[replace(track, **changes)])  # type: ignore[type-var]


# There and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SESSION, SESSION_BF16, *TURNS, REGENERATED], ids=lambda p: p.name)
def test_samples_come_back(path: Path, tmp_path: Path) -> None:
    report = tscfile.pack(path, tmp_path / "a.tsc")
    assert report.file_bytes < path.stat().st_size
    assert tscfile.unpack(tmp_path / "a.tsc", tmp_path / "out.kv") == path.stat().st_size
    assert (tmp_path / "out.kv").read_bytes() == path.read_bytes()
    assert not tscfile.verify(tmp_path / "a.tsc").problems


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("n_frames", [0, 1, 256, 300])
def test_every_type_comes_back(dtype: str, n_frames: int, tmp_path: Path) -> None:
    snapshot = make_snapshot(n_frames, dtype=dtype, identity={"architecture": "llama", "x": [1]})
    assert same_state(packed(snapshot, tmp_path / "a.tsc"), snapshot)


def test_unusual_snapshots_come_back(tmp_path: Path) -> None:
    """Holes, shared cells, extra columns, cells without layers, empty tracks, opaque parts."""
    rng = np.random.default_rng(0)
    base = make_snapshot(40)
    [track] = base.tracks
    counts = rng.integers(0, 4, 40).astype(np.int32)
    shared = CellTable(
        rng.integers(-5, 1 << 30, 40).astype(np.int32),
        counts,
        rng.integers(0, 256, counts.sum()).astype(np.int32),
        rng.integers(-9, 9, (40, 3)).astype(np.int32),
    )
    cases = {
        "cells": with_track(base, cells=shared),
        "no layers": with_track(base, tensors=[], rows=[]),
        "no tracks": replace(base, tracks=[]),
        "no tokens": replace(base, tokens=np.zeros(0, np.int32)),
        "streams": replace(
            base,
            tracks=[
                track,
                replace(track, stream=3, attributes={"v_trans": 1, "n_rot_k": 64}),
                replace(make_snapshot(7, dtype="q8_0").tracks[0], cache=1),  # type: ignore[type-var]
                replace(make_snapshot(0).tracks[0], cache=2),  # type: ignore[type-var]
            ],
        ),
        "opaque": replace(
            base, opaque={"recurrent": rng.bytes(5000), "appendix": b"", "outputs": bytes(9 << 20)}
        ),
        "rotation": with_track(base, tensors=[replace(t, rotation=64) for t in track.tensors]),
        "types": with_track(
            base,
            tensors=[
                TensorSpec(i, "k", dtype, 4 * dtype.block_bytes)
                for i, dtype in enumerate(ALL_DTYPES)
            ],
            rows=[rng.integers(0, 256, (40, 4 * d.block_bytes), np.uint8) for d in ALL_DTYPES],
        ),
    }
    for name, snapshot in cases.items():
        path = tmp_path / f"{name}.tsc"
        assert same_state(packed(snapshot, path), snapshot), name
        assert not tscfile.verify(path).problems, name
        report = tscfile.append(snapshot, path)
        assert report.n_frames_new == 0, name
        with tscfile.open(path) as archive:
            assert same_state(archive.snapshot(1), snapshot), name
        # Written again in parts, none of it is missing.
        tscfile.compact(path, tmp_path / "out.tsc", drop=[0], force=True)
        with tscfile.open(tmp_path / "out.tsc") as archive:
            assert same_state(archive.snapshot(), snapshot) and archive.snapshot().exact, name


def test_long_rows_make_short_blocks(tmp_path: Path) -> None:
    """A reader takes chunks of a bounded size only, so none larger may be written."""
    rows = np.zeros((20, 1 << 20), np.uint8)
    rows[:, ::4096] = np.arange(20)[:, None]
    specs = [TensorSpec(0, "k", DTYPES["f16"], 1 << 20)]
    base = with_track(make_snapshot(20), tensors=specs, rows=[rows])
    assert same_state(packed(base, tmp_path / "a.tsc"), base)
    with Container(tmp_path / "a.tsc") as container:
        assert [block.n_frames for block in container.blocks] == [8, 8, 4]
    huge = [TensorSpec(0, "k", DTYPES["f16"], blocks.MOST_CHUNK_BYTES + 2)]
    wide = np.zeros((1, huge[0].row_bytes), np.uint8)
    with pytest.raises(UnsupportedError):
        snapshot = with_track(make_snapshot(1), tensors=huge, rows=[wide])
        tscfile.pack(snapshot, tmp_path / "b.tsc")
    assert not (tmp_path / "b.tsc").exists()


@few
@given(st.integers(0, 2**32 - 1), st.integers(0, 300), st.integers(0, 3), st.sampled_from([1, 5]))
def test_any_cells_come_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n_cells: int, n_ext: int, spread: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, n_cells).astype(np.int32)
    cells = CellTable(
        np.sort(rng.integers(0, spread * n_cells + 1, n_cells)).astype(np.int32),
        counts,
        rng.integers(0, 8, counts.sum()).astype(np.int32),
        rng.integers(-1, 3, (n_cells, n_ext)).astype(np.int32),
    )
    snapshot = with_track(make_snapshot(n_cells, n_layers=1), cells=cells)
    path = tmp_path_factory.mktemp("cells") / "a.tsc"
    assert same_state(packed(snapshot, path), snapshot)
    # Appended to itself, and as a save whose cells moved, it is stored once.
    assert tscfile.append(snapshot, path).n_frames_new == 0
    order = rng.permutation(n_cells)
    starts = np.cumsum(counts) - counts
    ids = [cells.seq_ids[starts[i] : starts[i] + counts[i]] for i in order]
    moved = CellTable(
        cells.pos[order], counts[order], np.concatenate([*ids, np.zeros(0, np.int32)]),
        cells.ext[order],
    )  # fmt: skip
    [track] = snapshot.tracks
    shuffled = with_track(snapshot, cells=moved, rows=[part[order] for part in track.rows])  # type: ignore[attr-defined]
    tscfile.append(shuffled, path)
    with tscfile.open(path) as archive:
        assert same_state(archive.snapshot(0), snapshot)
        assert same_state(archive.snapshot(2), shuffled)


# Reading a part ---------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets of the chunks that are read."""
    offsets: list[int] = []
    genuine = Container.read

    def read(self: Container, ref: Any, type_: int, *rest: Any) -> memoryview:
        if type_ == CHUNK:
            offsets.append(ref.offset)
        return genuine(self, ref, type_, *rest)

    monkeypatch.setattr(Container, "read", read)
    return offsets


def test_read_decodes_only_what_is_asked_for(tmp_path: Path, counted: list[int]) -> None:
    # 2048 channels of f16: one tensor fills a chunk, three blocks of 256 frames.
    snapshot = make_snapshot(600, n_layers=3, n_channels=2048)
    [track] = snapshot.tracks
    tscfile.pack(snapshot, tmp_path / "a.tsc")
    with tscfile.open(tmp_path / "a.tsc") as archive:
        assert [len(entry.chunks) for entry in archive.container.blocks] == [6, 6, 6]
        for layers, frames, n_chunks in [
            (None, None, 18),
            ([1], None, 6),
            ([1], (0, 256), 2),
            ([0, 2], (256, 257), 4),
            ([2], (200, 300), 4),
            ([0], (599, 10_000), 2),
            ([0], (30, 30), 0),
            ([], None, 0),
        ]:
            counted.clear()
            result = archive.read(layers=layers, frames=frames)
            assert len(counted) == len(set(counted)) == n_chunks
            wanted = [i for i, t in enumerate(track.tensors) if layers is None or t.layer in layers]
            start, stop = frames or (0, 600)
            assert [part.tensor for part in result] == [track.tensors[i] for i in wanted]
            for i, part in zip(wanted, result, strict=True):
                assert (part.cache, part.stream, part.values.dtype) == (0, 0, np.float16)
                raw = track.read(start, min(stop, 600), [i])[0]
                assert np.array_equal(part.values.view(np.uint8), raw)
        counted.clear()
        archive.record()
        archive.restore_bytes()
        assert not counted


@pytest.mark.parametrize(
    ("dtype", "values"), [("bf16", np.uint16), ("f32", np.float32), ("q8_0", np.uint8)]
)
def test_values_of_other_types(dtype: str, values: type, tmp_path: Path) -> None:
    snapshot = make_snapshot(300, dtype=dtype)
    tscfile.pack(snapshot, tmp_path / "a.tsc")
    with tscfile.open(tmp_path / "a.tsc") as archive:
        for part, raw in zip(archive.read(), snapshot.tracks[0].read(0, 300), strict=True):
            assert part.values.dtype == values
            assert np.array_equal(part.values.view(np.uint8), raw)


def test_wrong_ranges_are_refused(tmp_path: Path) -> None:
    tscfile.pack(make_snapshot(30), tmp_path / "a.tsc")
    with tscfile.open(tmp_path / "a.tsc") as archive:
        for frames in ((5, 3), (-2, 3)):
            with pytest.raises(UsageError):
                archive.read(frames=frames)
        [track] = archive.snapshot().tracks
        for start, stop in ((5, 3), (-1, 3), (0, 31)):
            with pytest.raises(IndexError):
                track.read(start, stop)
        for number in (1, -2, 1000):
            with pytest.raises(UsageError, match="no snapshot"):
                archive.record(number)


# A series ---------------------------------------------------------------------------------------


def test_series_comes_back(archive_of_series: Path, tmp_path: Path) -> None:
    saves = (*TURNS, REGENERATED)
    for number, save in enumerate(saves):
        for asked in (number, number - len(saves)):
            out = tmp_path / "out.kv"
            tscfile.unpack(archive_of_series, out, snapshot=asked, force=True)
            assert out.read_bytes() == save.read_bytes()
    assert not tscfile.verify(archive_of_series).problems


def test_series_is_planned_as_it_was_made(archive_of_series: Path) -> None:
    with tscfile.open(archive_of_series) as archive:
        records = [archive.record(number) for number in range(len(archive))]
        assert [record.plan for record in records] == ["keyframe"] + ["append"] * 4 + [
            "truncate+append"
        ]
        assert [record.parent for record in records] == [None, 0, 1, 2, 3, 4]
        assert [record.name for record in records] == [s.name for s in (*TURNS, REGENERATED)]
        info = describe(archive)
        assert sum(entry.n_frames for entry in archive.container.blocks) == 410 + 310 - 228
    assert info.series_ratio > 2.5
    raw = sum(snapshot.raw_bytes for snapshot in info.snapshots)
    assert info.series_ratio == raw / archive_of_series.stat().st_size
    # What a later snapshot needs does not count what only others need.
    assert info.snapshots[0].restore_bytes < info.snapshots[-2].restore_bytes
    assert info.snapshots[-1].restore_bytes < info.file_bytes


def test_plans(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"

    def appended(snapshot: Snapshot) -> tuple[str, int | None, int, int, int]:
        report = tscfile.append(snapshot, path)
        with tscfile.open(path) as archive:
            assert same_state(archive.snapshot(), snapshot)
        return (
            report.plan, report.parent, report.n_tokens_common, report.n_frames_kept,
            report.n_frames_new,
        )  # fmt: skip

    assert tscfile.pack(make_snapshot(100), path).plan == "keyframe"
    # It grows.
    assert appended(make_snapshot(150)) == ("append", 0, 100, 100, 50)
    # The same again.
    size = path.stat().st_size
    assert appended(make_snapshot(150)) == ("append", 1, 150, 150, 0)
    assert path.stat().st_size - size < 1024
    # The last answer again, and another way.
    assert appended(make_snapshot(160, edited_from=120)) == ("truncate+append", 2, 120, 120, 40)
    # Cut short.
    assert appended(make_snapshot(90)) == ("truncate+append", 3, 90, 90, 0)
    # A branch from the oldest: of those that share most, the newest.
    assert appended(make_snapshot(200)) == ("append", 2, 150, 150, 50)
    assert appended(make_snapshot(130, edited_from=95))[:3] == ("truncate+append", 5, 95)
    # On the branch again.
    assert appended(make_snapshot(140, edited_from=95))[:3] == ("append", 6, 130)
    assert not tscfile.verify(path).problems


def test_recomputed_prefix_is_stored_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(100), path)
    later = make_snapshot(120)
    [track] = later.tracks
    rows = [part.copy() for part in track.rows]  # type: ignore[attr-defined]
    # The last bit of one key of ten frames, as another batch size gives.
    rows[1][40:50, 6] ^= 1
    later = with_track(later, rows=rows)
    report = tscfile.append(later, path)
    assert (report.plan, report.n_frames_kept, report.n_frames_new) == ("patch", 90, 30)
    assert report.n_frames_changed == 10
    with tscfile.open(path) as archive:
        assert same_state(archive.snapshot(0), make_snapshot(100))
        assert same_state(archive.snapshot(1), later)


def test_cells_that_share_position_and_sequence(tmp_path: Path) -> None:
    """The patches of an image: equal frames of equal cells are not all the first of them."""
    def image(n_cells: int) -> Snapshot:
        ones = np.ones(n_cells, np.int32)
        cells = CellTable(0 * ones, ones, 0 * ones, np.zeros((n_cells, 0), np.int32))
        rows = [np.zeros((n_cells, 64), np.uint8) for _ in range(4)]
        return with_track(make_snapshot(n_cells), cells=cells, rows=rows)

    path = tmp_path / "a.tsc"
    tscfile.pack(image(10), path)
    report = tscfile.append(image(30), path)
    assert (report.n_frames_kept, report.n_frames_new) == (10, 20)
    with tscfile.open(path) as archive:
        assert same_state(archive.snapshot(), image(30))


def test_planned_runs_are_whole_and_in_order() -> None:
    old, new = plain_cells(100), plain_cells(130)
    runs = [FrameRun(0, 0, 60), FrameRun(3, 5, 40)]
    asked = []

    def judge(start: int, stop: int, run: FrameRun, moved: int) -> tuple[np.ndarray, bool]:
        assert not moved
        asked.append((start, stop, run))
        return np.arange(start, stop) % 50 != 49, False

    frames = temporal.OldFrames(old, runs)
    plan = temporal.plan_track(frames, new, None, judge, lambda run, moved: False)
    assert asked == [(0, 60, runs[0]), (60, 100, runs[1])]
    assert plan.new_ranges() == [(49, 50), (99, 130)] and plan.n_new == 32
    plan.store(49, 50, 7)
    plan.store(99, 130, 8)
    assert plan.runs() == (
        FrameRun(0, 0, 49), FrameRun(7, 0, 1), FrameRun(0, 50, 10), FrameRun(3, 5, 39),
        FrameRun(8, 0, 31),
    )  # fmt: skip


def test_opaque_parts_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    noise = np.random.default_rng(1).bytes(100_000)
    tscfile.pack(make_snapshot(10, opaque={"appendix": noise}), path)
    assert tscfile.append(make_snapshot(12, opaque={"appendix": noise}), path).bytes_added < 4000
    other = make_snapshot(14, opaque={"appendix": noise[1:]})
    assert tscfile.append(other, path).bytes_added > 100_000
    with tscfile.open(path) as archive:
        assert archive.snapshot(1).opaque == {"appendix": noise}
        assert archive.snapshot(2).opaque == other.opaque


def test_equal_prefixes_have_equal_ids(tmp_path: Path) -> None:
    """The logical id names model and tokens: the same in another file, other for other tokens."""
    def ids(snapshot: Snapshot) -> list[bytes]:
        tscfile.pack(snapshot, tmp_path / "a.tsc", force=True)
        with Container(tmp_path / "a.tsc") as container:
            return [block.logical_id for block in container.blocks]

    first = ids(make_snapshot(600))
    assert ids(make_snapshot(512))[:2] == first[:2] and len(set(first)) == 3
    edited = ids(make_snapshot(600, edited_from=300))
    assert edited[0] == first[0] and edited[1] != first[1] and edited[2] != first[2]
    assert ids(make_snapshot(600, identity={"architecture": "llama"}))[0] != first[0]
    assert ids(replace(make_snapshot(600), tokens=np.zeros(0, np.int32))) == [bytes(16)] * 3


def test_names_that_are_no_text(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"s\xff.kv")
    source.write_bytes(TURNS[0].read_bytes())
    tscfile.pack(source, tmp_path / "a.tsc")
    with tscfile.open(tmp_path / "a.tsc") as archive:
        assert archive.record().name == "s\ufffd.kv"


# Refused and failed appends ---------------------------------------------------------------------


def refused() -> dict[str, Snapshot]:
    other_role = make_snapshot(120)
    [track] = other_role.tracks
    rotated = [replace(tensor, rotation=64) for tensor in track.tensors]
    return {
        "another conversation": make_snapshot(120, seed=1),
        "another type": make_snapshot(120, dtype="bf16"),
        "more layers": make_snapshot(120, n_layers=3),
        "fewer layers": make_snapshot(120, n_layers=1),
        "other channels": make_snapshot(120, n_channels=64),
        "rotated": with_track(other_role, tensors=rotated),
        "another model": make_snapshot(120, identity={"weights_blake3": "b" * 64}),
        "no tokens and other rows": replace(
            make_snapshot(120, seed=1), tokens=np.zeros(0, np.int32)
        ),
    }


@pytest.mark.parametrize("kind", refused())
def test_refused_append_changes_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(100, identity={"weights_blake3": "a" * 64}), path)
    before, times = path.read_bytes(), path.stat().st_mtime_ns
    with pytest.raises(MismatchError):
        tscfile.append(refused()[kind], path)
    assert path.read_bytes() == before and path.stat().st_mtime_ns == times
    assert os.listdir(tmp_path) == ["a.tsc"]


def test_identity_is_carried_on_and_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(10), path, identity=ModelIdentity({"weights_blake3": "a" * 64}))
    tscfile.append(make_snapshot(12), path)
    tscfile.append(make_snapshot(14), path, identity=ModelIdentity({"architecture": "llama"}))
    with tscfile.open(path) as archive:
        assert archive.record(1).identity == {"weights_blake3": "a" * 64}
        assert archive.record(2).identity == {
            "weights_blake3": "a" * 64, "architecture": "llama",
        }  # fmt: skip
    with pytest.raises(MismatchError, match="another one"):
        tscfile.append(
            make_snapshot(16), path, identity=ModelIdentity({"weights_blake3": "c" * 64})
        )


class Writes:
    """Stands in for ``os.pwrite``: fails once ``n`` bytes are written, as a full disk does."""

    def __init__(self, n: int, error: BaseException) -> None:
        self.left = n
        self.error = error
        self.genuine = os.pwrite

    def __call__(self, fd: int, data: memoryview, offset: int) -> int:
        if not self.left:
            raise self.error
        part = memoryview(data)[: self.left]
        self.left -= len(part)
        return self.genuine(fd, part, offset)


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


ERRORS = {"disk full": disk_full, "interrupt": KeyboardInterrupt, "memory": MemoryError}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("n_bytes", [0, 1, 100, 3000, 5000])
def test_failed_append_changes_nothing(
    n_bytes: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, error = tmp_path / "a.tsc", ERRORS[kind]()
    tscfile.pack(make_snapshot(100), path)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", Writes(n_bytes, error))
        with pytest.raises(type(error)) as caught:
            tscfile.append(make_snapshot(150), path)
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    # And nothing is locked or lost.
    assert tscfile.append(make_snapshot(150), path, wait=False).bytes_added > 5000


@pytest.mark.parametrize("kind", ERRORS)
def test_failed_pack_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tsc"
    for exists in (False, True):
        for n_bytes in (0, 1000):
            error = ERRORS[kind]()
            with monkeypatch.context() as patched:
                patched.setattr(os, "pwrite", Writes(n_bytes, error))
                with pytest.raises(type(error)):
                    tscfile.pack(make_snapshot(100), path, force=exists)
            assert os.listdir(tmp_path) == (["a.tsc"] if exists else [])
        path.write_bytes(b"what was there")
    assert path.read_bytes() == b"what was there"


def test_failed_unpack_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "a.tsc", tmp_path / "out.kv"
    tscfile.pack(make_snapshot(600), path)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError) as caught:
            tscfile.unpack(path, out)
    assert caught.value.filename == str(out)
    # Damage that shows only when a part is written.
    data = bytearray(path.read_bytes())
    with Container(path) as container:
        data[container.blocks[1].chunks[0].ref.offset + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(tscfile.DamagedError):
        tscfile.unpack(path, out)
    assert os.listdir(tmp_path) == ["a.tsc"]


def test_source_that_fails_half_way(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(100), path)
    before = path.read_bytes()
    later = make_snapshot(3000)

    class Failing(MemoryTrack):
        def read(self, start: int, stop: int, tensors: Any = None) -> Any:
            if stop > 2000:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(start, stop, tensors)

    [track] = later.tracks
    later.tracks = [Failing(**vars(track))]
    with pytest.raises(OSError):
        tscfile.append(later, path)
    assert path.read_bytes() == before
    with pytest.raises(OSError):
        tscfile.pack(later, tmp_path / "b.tsc")
    assert os.listdir(tmp_path) == ["a.tsc"]


# Several processes ------------------------------------------------------------------------------


def append_turns(path: Path, turns: range, started: Any) -> None:
    started.wait()
    for turn in turns:
        tscfile.append(make_snapshot(50 + turn, n_layers=1, n_channels=8), path)


def test_appends_of_two_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(50, n_layers=1, n_channels=8), path)
    context = multiprocessing.get_context("fork")
    started = context.Barrier(2)
    workers = [
        context.Process(target=append_turns, args=(path, range(start, 30, 2), started))
        for start in (1, 2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    with tscfile.open(path) as archive:
        assert archive.torn_bytes == 0
        sizes = sorted(len(archive.snapshot(i).tokens) for i in range(len(archive)))
    assert sizes == [50, *range(51, 80)]
    assert not tscfile.verify(path).problems


def test_append_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(20), path)
    before = path.read_bytes()
    with path.open("r+b") as held:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TscError, match="another process") as caught:
            tscfile.append(make_snapshot(30), path, wait=False)
        assert caught.value.exit_code == 1
        assert path.read_bytes() == before
        # Readers are not in the way of a writer, nor it in theirs.
        with tscfile.open(path) as archive:
            assert len(archive) == 1
    assert tscfile.append(make_snapshot(30), path, wait=False).snapshot == 1


def test_reader_sees_its_own_version(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(20), path)
    with tscfile.open(path) as archive:
        tscfile.append(make_snapshot(30), path)
        assert len(archive) == 1 and same_state(archive.snapshot(), make_snapshot(20))
    with pytest.raises(UsageError):
        tscfile.append(make_snapshot(30), tmp_path)
    with pytest.raises(FileNotFoundError):
        tscfile.append(make_snapshot(30), tmp_path / "none.tsc")
