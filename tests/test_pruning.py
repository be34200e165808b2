"""``tsc prune`` removes old archives, and nothing else whatever lies beside them."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from conftest import make_snapshot
from tscfile_cli.main import main

import tscfile
from tscfile.errors import UsageError
from tscfile.pruning import prune

Capture = pytest.CaptureFixture[str]
NAMES = ["d.tsc", "b.tsc", "e.tsc", "a.tsc", "c.tsc"]
"""The oldest first."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five archives of different ages and sizes, among much else that is older."""
    path = tmp_path / "archives"
    path.mkdir()
    for age, name in enumerate(NAMES):
        tscfile.pack(make_snapshot(20 + 20 * age), path / name)
        os.utime(path / name, (1000 + age, 1000 + age))
    tscfile.pack(make_snapshot(20), tmp_path / "outside.tsc")
    (path / "link.tsc").symlink_to("../outside.tsc")
    (path / "inside.tsc").symlink_to("d.tsc")
    (path / "dangling.tsc").symlink_to("none.tsc")
    (path / "notes.tsc").write_text("not an archive")
    (path / "empty.tsc").write_bytes(b"")
    (path / "archive.bin").write_bytes((path / "d.tsc").read_bytes())
    (path / ".hidden.tsc").write_bytes((path / "d.tsc").read_bytes())
    (path / "x.tscbook").write_bytes(b"\x89TSCBOOK")
    (path / "folder.tsc").mkdir()
    tscfile.pack(make_snapshot(20), path / "folder.tsc" / "inner.tsc")
    os.mkfifo(path / "fifo.tsc")
    for name in os.listdir(path):
        if name not in NAMES:
            os.utime(path / name, (1, 1), follow_symlinks=False)
    return path


def left(folder: Path, n_kept: int) -> bool:
    """Are the ``n_kept`` newest archives left, and all that is none?"""
    others = {"link.tsc", "inside.tsc", "dangling.tsc", "notes.tsc", "empty.tsc", "archive.bin",
              ".hidden.tsc", "x.tscbook", "folder.tsc", "fifo.tsc"}  # fmt: skip
    assert (folder.parent / "outside.tsc").exists()
    assert os.listdir(folder / "folder.tsc") == ["inner.tsc"]
    return set(os.listdir(folder)) == others | set(NAMES[len(NAMES) - n_kept :])


def sizes(folder: Path) -> list[int]:
    return [(folder / name).stat().st_size for name in NAMES]


def test_the_newest_are_kept(folder: Path) -> None:
    expected = sizes(folder)
    report = prune(folder, keep_last=2)
    assert left(folder, 2)
    assert [Path(each.path).name for each in report.removed] == NAMES[:3]
    assert report.freed_bytes == sum(expected[:3]) and report.kept_bytes == sum(expected[3:])
    assert prune(folder, keep_last=2).removed == [] and prune(folder, keep_last=9).removed == []
    assert left(folder, 2)


def test_no_more_than_it_takes(folder: Path) -> None:
    of = sizes(folder)
    for max_bytes, keep_last, n_kept in (
        (sum(of), 1, 5), (sum(of) - 1, 1, 4), (sum(of[1:]), 1, 4), (of[3] + of[4], 4, 4),
        (of[3] + of[4], 1, 2), (0, 2, 2), (0, 1, 1), (0, 1, 1),
    ):  # fmt: skip
        prune(folder, keep_last=keep_last, max_bytes=max_bytes)
        assert left(folder, n_kept), (max_bytes, keep_last)


def test_nonsense(folder: Path) -> None:
    for options in ({"keep_last": 0}, {"keep_last": -1}, {"max_bytes": -1}):
        with pytest.raises(UsageError):
            prune(folder, **options)
    assert left(folder, 5)


def test_an_archive_in_use_is_kept(folder: Path) -> None:
    with (folder / NAMES[1]).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        report = prune(folder, keep_last=2)
    assert [Path(each.path).name for each in report.removed] == [NAMES[0], NAMES[2]]
    assert len(report.problems) == 1 and NAMES[1] in report.problems[0]


def test_an_archive_written_to_meanwhile_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tscfile import pruning

    genuine = pruning._remove

    def remove(archive: pruning.PrunedArchive, report: pruning.PruneReport) -> bool:
        if archive.path.endswith(NAMES[0]):
            tscfile.append(make_snapshot(60), archive.path)
        return genuine(archive, report)

    monkeypatch.setattr(pruning, "_remove", remove)
    report = prune(folder, keep_last=4)
    assert report.removed == [] and "meanwhile" in report.problems[0]
    with tscfile.open(folder / NAMES[0]) as archive:
        assert len(archive) == 2


def test_command(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["prune", *map(str, arguments)])
        return code, *capfd.readouterr()

    of = sizes(folder)
    for arguments in (
        [folder], [folder, "--keep-last", 0], [folder, "--max-bytes", "-1"],
        *([folder, "--max-bytes", wrong] for wrong in ("10X", "9" * 400, "", "G", "nan")),
        [folder, "--keep-last", "1.5"], [tmp_path / "none", "--keep-last", 1],
        [folder / NAMES[0], "--keep-last", 1], ["--keep-last", 1],
    ):  # fmt: skip
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
    assert left(folder, 5)
    code, out, err = run(folder, "--keep-last", 3, "--dry-run")
    assert (code, out) == (0, "") and err.count("would remove") == 2 and left(folder, 5)
    code, out, err = run(folder, "--keep-last", 3, "--max-bytes", "1G", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "") and report["removed"] == []
    assert report["kept_bytes"] == sum(of) and left(folder, 5)
    code, out, err = run(folder, "--keep-last", 3, "--max-bytes", of[4])
    assert code == 0 and left(folder, 3) and err.count("removed ") == 2
    assert "2 archives removed" in err and "3 kept" in err and "more than was asked for" in err
    assert run(folder, "--max-bytes", f"{(of[4] + 1) / 1000}k", "-q") == (0, "", "")
    assert left(folder, 1)
