"""Archives written again: dropped snapshots, joined blocks."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MemoryTrack, make_snapshot, same_state
from tscfile_cli.main import main

import tscfile
from tscfile.archive import Archive
from tscfile.compaction import compact
from tscfile.container import records
from tscfile.errors import DamagedError, TscError, UsageError
from tscfile.identity import identity_from_gguf
from tscfile.sources import open_source
from tscfile.verification import verify

SAMPLES = Path(__file__).parent.parent / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"
SERIES = [SAMPLES / "series" / f"turn-{n}.kv" for n in ("1", "2", "3", "4", "4-regenerated", "5")]
TIERS: dict[str, object] = {
    "lossless": {"tier": "lossless"},
    "balanced": {"tier": "balanced", "book": BOOK},
    "layers": {"tier": ["archive", "balanced", "lossless"], "book": BOOK, "embed_book": True},
    "no book": {"tier": "balanced"},
    "tokens": {"tier": "tokens", "book": BOOK},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The series of samples/ in each tier."""
    folder = tmp_path_factory.mktemp("series")
    identity = identity_from_gguf(MODEL)
    paths = {}
    for name, options in TIERS.items():
        path = paths[name] = folder / f"{name}.tsc"
        tscfile.pack(SERIES[0], path, identity=identity, **options)  # type: ignore[arg-type]
        for save in SERIES[1:]:
            tscfile.append(save, path, book=None if "book" not in options else BOOK)  # type: ignore[operator]
    return paths


def content(path: Path, number: int) -> list[np.ndarray]:
    """What is stored of each frame of a snapshot: integers of lossy layers, rows of exact ones, and
    its tokens."""
    with Archive(path, book=BOOK) as archive:
        snapshot = archive.snapshot(number)
        found = [snapshot.tokens]
        for tier in archive.record(number).layers:
            (track,) = archive.snapshot(number, tier).tracks
            for run in track.runs:
                chunks = track.chunks(run)
                if not chunks:
                    continue
                if track.is_exact() or len(chunks) > 1:
                    continue
                where, payloads = track.lossy_payloads(run.block, chunks[0])
                if len(archive.basis_records(archive.record(number))):
                    codec = track.session_codec(payloads[0], where)
                    values = codec.integers(payloads[0], where)
                    found.append(np.array([len(values)]))
                    continue
                for segment in track.codec().read(payloads, where):
                    whole = np.zeros((len(segment.values), 4096))
                    whole[:, track.codec().book.columns(segment.counts)] = segment.values
                    whole[:, -1] = segment.step
                    part = slice(
                        max(run.first - segment.start, 0),
                        max(run.first + run.count - segment.start, 0),
                    )
                    found.append(whole[part])
            if track.is_exact():
                found += track.read(0, len(track.cells))
    lossy = [part for part in found if part.ndim == 2 and part.shape[1] == 4096]
    rest = [part for part in found if part.ndim != 2 or part.shape[1] != 4096]
    return [*rest, *([np.concatenate(lossy)] if lossy else [])]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b)
    for mine, theirs in zip(a, b, strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("name", TIERS)
def test_nothing_that_is_kept_changes(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    path, out = made[name], tmp_path / "out.tsc"
    report = compact(path, out, book=BOOK)
    assert (report.snapshots_before, report.n_snapshots) == (6, 6)
    assert report.file_bytes == out.stat().st_size < report.bytes_before
    assert not verify(out, book=BOOK).problems
    with Archive(path, book=BOOK) as before, Archive(out, book=BOOK) as after:
        for number in range(6):
            old, new = before.record(number), after.record(number)
            assert (old.parent, old.plan, old.tier, old.name, old.coding) == (
                new.parent, new.plan, new.tier, new.name, new.coding
            )  # fmt: skip
            assert_same(content(path, number), content(out, number))


@pytest.mark.parametrize("name", ["lossless", "balanced", "layers"])
def test_small_blocks_are_joined(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    report = compact(made[name], tmp_path / "out.tsc", book=BOOK)
    # 256 frames and the rest of the longest save, and those that the regenerated one has alone.
    assert (report.blocks_before, report.n_blocks) == (6, 3)
    again = compact(tmp_path / "out.tsc", tmp_path / "again.tsc", book=BOOK)
    assert again.n_blocks == 3
    assert (tmp_path / "again.tsc").read_bytes() == (tmp_path / "out.tsc").read_bytes()


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("drop", [[0], [1, 3], [-1], [0, 1, 2, 3], [4, 5]], ids=str)
def test_dropped_snapshots(
    name: str, drop: list[int], made: dict[str, Path], tmp_path: Path
) -> None:
    path, out = made[name], tmp_path / "out.tsc"
    kept = [number for number in range(6) if number not in drop and number - 6 not in drop]
    report = compact(path, out, drop=drop, book=BOOK)
    assert report.n_snapshots == len(kept)
    assert not verify(out, book=BOOK).problems
    for new, old in enumerate(kept):
        assert_same(content(path, old), content(out, new))
    with Archive(out, book=BOOK) as archive:
        used = {run.block for n in range(len(kept)) for t in archive.record(n).tracks
                for run in t.runs}  # fmt: skip
        assert used == set(range(len(archive.container.blocks)))
    # And the conversation goes on.
    more = tscfile.append(SERIES[-1], out, book=BOOK if "book" in TIERS[name] else None)  # type: ignore[operator]
    assert more.n_frames_kept > 0


def test_what_no_snapshot_needs_goes_too(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mixed.tsc"
    identity = identity_from_gguf(MODEL)
    tscfile.pack(SERIES[0], path, tier="balanced", book=BOOK, embed_book=True, identity=identity)
    tscfile.append(SERIES[1], path, tier="lossless")
    compact(path, drop=[0])
    with Archive(path) as archive:
        assert not archive.container.extras(records.BOOK)
        snapshot = archive.snapshot()
        given = open_source(SERIES[1])
        assert snapshot.exact and snapshot.tokens.tolist() == given.tokens.tolist()
    assert path.stat().st_size < 1 << 20
    bases = tmp_path / "bases.tsc"
    shutil.copyfile(made["no book"], bases)
    tscfile.append(SERIES[-1], bases, tier="lossless")
    with Archive(bases) as archive:
        assert archive.container.extras(records.BASIS)
    compact(bases, drop=range(6))
    with Archive(bases) as archive:
        assert len(archive) == 1 and not archive.container.extras(records.BASIS)


def test_saves_with_and_without_a_book_in_one_file(tmp_path: Path) -> None:
    """Frames that a save without a book has stay readable without it."""
    path, out = tmp_path / "mixed.tsc", tmp_path / "out.tsc"
    identity = identity_from_gguf(MODEL)
    tscfile.pack(SERIES[0], path, identity=identity)
    for save in SERIES[1:3]:
        tscfile.append(save, path, tier="lossless", book=BOOK)
    tscfile.append(SERIES[3], path, tier=["archive", "lossless"], book=BOOK)
    compact(path, out, book=BOOK)
    assert not verify(out, book=BOOK).problems
    for number in range(4):
        back = tmp_path / "back.kv"
        book = BOOK if number else None
        tscfile.unpack(out, back, snapshot=number, book=book, force=True)
        assert back.read_bytes() == SERIES[number].read_bytes()
    compact(out, drop=[0], book=BOOK)
    tscfile.unpack(out, tmp_path / "last.kv", book=BOOK)
    assert (tmp_path / "last.kv").read_bytes() == SERIES[3].read_bytes()


def test_in_place_or_not_at_all(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "series.tsc"
    shutil.copyfile(made["lossless"], path)
    before = path.read_bytes()

    def stop(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compact(path, drop=[0], progress=stop)
    with pytest.raises(UsageError, match="exists"):
        compact(path, made["balanced"])
    for drop, words in (([7], "no snapshot 7; there are 6"), (range(6), "all snapshots")):
        with pytest.raises(UsageError, match=words):
            compact(path, drop=drop)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["series.tsc"]
    compact(path, drop=[0])
    assert path.read_bytes() != before and os.listdir(tmp_path) == ["series.tsc"]
    path.write_bytes(before + b"half")
    with pytest.raises(DamagedError, match="no whole commit"):
        compact(path)


def test_other_writers_are_waited_for_or_not(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "series.tsc"
    shutil.copyfile(made["lossless"], path)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TscError, match="another process"):
            compact(path, wait=False)


def test_command(
    made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "series.tsc"
    shutil.copyfile(made["lossless"], path)

    def run(code: int, *arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == code
        return "".join(capfd.readouterr())

    assert "give --drop or --keep-last" in run(2, "compact", path, "--drop", 1, "--keep-last", 2)
    assert "numbers of saves" in run(2, "compact", path, "--drop", "first")
    assert "the source itself" in run(2, "compact", path, "-o", path, "-f")
    assert "no such file" in run(1, "compact", tmp_path / "none.tsc")
    assert "2 of 6 snapshots" in run(0, "compact", path, "--keep-last", 2)
    tscfile.unpack(path, tmp_path / "back.kv")
    assert (tmp_path / "back.kv").read_bytes() == SERIES[-1].read_bytes()


def test_another_tier(made: dict[str, Path], tmp_path: Path) -> None:
    """Exact saves are coded anew, with their names and branches; the file shrinks in its place."""
    path = tmp_path / "a.tsc"
    shutil.copy(made["lossless"], path)
    options = ["--tier", "balanced", "--book", str(BOOK), "--drop", "0"]
    assert main(["compact", str(path), *options]) == 0
    assert path.stat().st_size < made["lossless"].stat().st_size / 50
    assert not verify(path, book=BOOK).problems
    with Archive(made["lossless"]) as old, Archive(path, book=BOOK) as new:
        assert len(new) == 5
        for number in range(5):
            before, after = old.record(number + 1), new.record(number)
            assert (after.tier, after.name) == ("balanced", before.name)
            assert after.identity == before.identity and after.source == before.source
            assert np.array_equal(old.tokens(number + 1), new.tokens(number))
            alone = tmp_path / "alone.tsc"
            tscfile.pack(old.snapshot(number + 1), alone, tier="balanced", book=BOOK, force=True)
            with Archive(alone, book=BOOK) as single:
                # The frames of the newest turn have the same steps.
                n = len(after.ids) - 5
                wanted, found = (
                    np.concatenate(each.tracks[0].read(n, n + 5), axis=1).view(np.float16)
                    for each in (single.snapshot(), new.snapshot(number))
                )
                assert np.allclose(wanted, found, rtol=2e-3, atol=2e-3)
        # The branch, a turn that was generated twice, is one still.
        parents = [old.head(number + 1).parent for number in range(1, 5)]
        assert [new.head(number).parent for number in range(1, 5)] == [p - 1 for p in parents if p]
        assert len(set(parents)) < 4


def test_another_tier_without_the_save_that_links_others(tmp_path: Path) -> None:
    """Two parts of a conversation that share no token: what follows from what the file says."""
    path, out, made = tmp_path / "a.tsc", tmp_path / "b.tsc", make_snapshot(300)
    parts = [
        replace(make_snapshot(100), tokens=made.tokens[first : first + 100])
        for first in (0, 50, 100, 150)
    ]
    for each in parts[1:]:
        [track] = each.tracks
        assert isinstance(track, MemoryTrack)
        track.rows = [255 - part for part in track.rows]
    tscfile.pack(parts[0], path)
    for part in parts[1:]:
        tscfile.append(part, path)
    assert tscfile.compact(path, out, drop=(1,), tier="lossless").n_snapshots == 3
    with Archive(out) as archive:
        assert all(
            same_state(a, b) for a, b in zip(archive, [parts[0], *parts[2:]], strict=True)
        )


def test_only_exact_saves_change_their_tier(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tsc"
    shutil.copy(made["balanced"], path)
    before = path.read_bytes()
    assert main(["compact", str(path), "--tier", "archive", "--book", str(BOOK)]) == 2
    assert "snapshot 0 is of tier balanced; only exact ones" in capsys.readouterr().err
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
