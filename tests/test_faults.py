"""Faults in the middle of an append: whatever stops it, the snapshots before it stay readable.

`Disk` stands in for the calls that change a file. It stops an append at each of them in turn, as a
kill, a full disk or a failing one does; a real SIGKILL and lost writes come after it.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MemoryTrack, make_snapshot, plain_cells, same_state, write_kv
from tscfile_cli.main import main

import tscfile
from tscfile.errors import TscError
from tscfile.model import Snapshot
from tscfile.transforms.turning import turn_rows
from tscfile.turns import turn_of

Capture = pytest.CaptureFixture[str]
FORK = multiprocessing.get_context("fork")
CALLS = ("pwrite", "fsync", "ftruncate")


class Killed(BaseException):
    """The process is gone: nothing that runs after it changes the file any more."""


class Disk:
    """Counts the calls that change files and does ``fault`` at number ``at``.

    ``part``: of a write that is stopped, the share that is done all the same.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, at: int = -1, fault: str = "none", part: float = 0.0
    ) -> None:
        self.at, self.fault, self.part = at, fault, part
        self.calls: list[str] = []
        self.writes: list[tuple[int, int]] = []
        """Offset and length of what was written since the last sync."""
        self._genuine = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            patch.setattr(os, name, self._stand_in(name))

    def _stand_in(self, name: str) -> Callable[..., Any]:
        def call(fd: int, *rest: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            if number < self.at or self.fault == "none":
                return self._do(name, fd, *rest)
            if number > self.at and self.fault in ("full", "short"):
                return self._do(name, fd, *rest)
            if name == "pwrite" and number == self.at:
                data, offset = rest
                written = self._do(name, fd, memoryview(data)[: int(len(data) * self.part)], offset)
                if self.fault == "short":
                    return written
            if self.fault == "short":
                return self._do(name, fd, *rest)
            raise self._error()

        return call

    def _do(self, name: str, fd: int, *rest: Any) -> Any:
        result = self._genuine[name](fd, *rest)
        if name == "fsync":
            self.writes.clear()
        elif name == "pwrite":
            self.writes.append((rest[1], result))
        return result

    def _error(self) -> BaseException:
        if self.fault == "killed":
            return Killed()
        if self.fault == "full":
            return OSError(errno.ENOSPC, "No space left on device")
        return OSError(errno.EIO, "Input/output error")


# Each base holds a branch; what is appended brings frames, opaque bytes and, lossy, a basis, or
# shifted, differences to frames that are there.
CASES = ("lossless", "near", "shifted")


def saves(case: str) -> list[Snapshot]:
    wide: dict[str, Any] = {"n_channels": 64, "identity": {"architecture": "llama"}}
    if case == "shifted":
        wide["identity"] |= {
            "rope_base": 10000.0, "rope_dim": 32, "rope_scaling": "none", "rope_pairing": "norm",
            "head_dim_k": 32,
        }  # fmt: skip
        before = make_snapshot(150, **wide)
        branch = make_snapshot(140, edited_from=120, **wide)
        return [make_snapshot(100, **wide), before, branch, shifted(before, 10, 30)]
    return [
        make_snapshot(100, **wide),
        make_snapshot(150, **wide),
        make_snapshot(140, edited_from=120, **wide),
        make_snapshot(260, opaque={"appendix": b"what the source carried"}, **wide),
    ]


def shifted(snapshot: Snapshot, n_keep: int, n_discard: int) -> Snapshot:
    """The context shifted: tokens cut out, keys behind them turned."""
    turn = turn_of(snapshot.identity, [], -n_discard)
    [track] = snapshot.tracks
    assert isinstance(track, MemoryTrack) and turn is not None
    rows = []
    for spec, part in zip(track.tensors, track.rows, strict=True):
        moved = part[n_keep + n_discard :]
        moved = turn_rows(moved, spec.dtype, turn) if spec.role == "k" else moved
        rows.append(np.concatenate([part[:n_keep], moved]))
    tokens = np.delete(snapshot.tokens, slice(n_keep, n_keep + n_discard))
    source = {**snapshot.source, "cell_counts": [len(tokens)]}
    later = replace(track, cells=plain_cells(len(tokens)), rows=rows)
    return replace(snapshot, tokens=tokens, tracks=[later], source=source)


class Case:
    """An archive, the save that is appended to it, and what comes of that if nothing fails."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        *before, self.new = saves(name)
        tier = "near" if name == "near" else "lossless"
        self.base = folder / "base.tsc"
        tscfile.pack(before[0], self.base, tier=tier)
        for save in before[1:]:
            tscfile.append(save, self.base)
        self.whole = folder / "whole.tsc"
        shutil.copy(self.base, self.whole)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch)
            tscfile.append(self.new, self.whole)
            self.calls = disk.calls
        self.kept = [content(self.base, number) for number in range(3)]
        self.added = content(self.whole, 3)

    def copy(self, path: Path) -> Path:
        return Path(shutil.copy(self.base, path))

    def check(self, path: Path) -> bool:
        """The file is as it was or as it was to be; returns which. Then the append is repeated."""
        with tscfile.open(path) as archive:
            n, torn = len(archive), archive.torn_bytes
        assert n in (3, 4)
        expected_end = (self.base if n == 3 else self.whole).stat().st_size
        assert path.stat().st_size == expected_end + torn
        for number, expected in enumerate([*self.kept, self.added][:n]):
            assert content(path, number) == expected
        problems = tscfile.verify(path).problems
        assert len(problems) == (1 if torn else 0)
        if torn:
            assert f"last {torn} bytes are no whole commit; {n} snapshots" in problems[0]
            with pytest.raises(TscError, match="torn|whole commit|--snapshot"):
                tscfile.unpack(path, path.with_suffix(".kv"))
            assert not path.with_suffix(".kv").exists()
        if n == 3:
            tscfile.append(self.new, path)
            assert path.read_bytes() == self.whole.read_bytes()
        return n == 4


def content(path: Path, number: int) -> list[bytes]:
    """What a snapshot gives back: tokens, opaque parts, every row."""
    with tscfile.open(path) as archive:
        snapshot = archive.snapshot(number)
        rows = [part for t in snapshot.tracks for part in t.read(0, len(t.cells))]
        return [snapshot.tokens.tobytes(), *snapshot.opaque.values(), *(r.tobytes() for r in rows)]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("faults"), request.param)


@pytest.mark.parametrize("name", ["lossless", "shifted"])
def test_these_cases_are_exact(name: str, tmp_path: Path) -> None:
    exact = Case(tmp_path, name)
    with tscfile.open(exact.whole) as archive:
        assert all(same_state(a, b) for a, b in zip(archive, saves(name), strict=True))
        has_sources = [bool(block.sources) for block in archive.container.blocks]
    assert any(has_sources) == (name == "shifted")


def stopped(case: Case, path: Path, at: int, fault: str, part: float) -> BaseException | None:
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, at, fault, part)
        try:
            tscfile.append(case.new, path)
        except (Killed, OSError) as error:
            return error
    return None


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_killed_at_each_call(case: Case, part: float, tmp_path: Path) -> None:
    assert case.calls.count("pwrite") >= 4 and case.calls.count("fsync") == 2
    arrived = []
    for at, name in enumerate(case.calls):
        path = case.copy(tmp_path / f"{at}.tsc")
        assert isinstance(stopped(case, path, at, "killed", part), Killed), name
        arrived.append(case.check(path))
    # It counts from its trailer on, and nothing before that does.
    n_after_trailer = 1 + (part == 1.0)
    assert arrived == [False] * (len(arrived) - n_after_trailer) + [True] * n_after_trailer


@pytest.mark.parametrize("part", [0.0, 0.3])
def test_full_disk_at_each_call(case: Case, part: float, tmp_path: Path) -> None:
    for at, name in enumerate(case.calls):
        path = case.copy(tmp_path / f"{at}.tsc")
        error = stopped(case, path, at, "full", part)
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC, name
        assert error.filename == str(path)
        # Cut back to what it was, not merely readable.
        assert path.read_bytes() == case.base.read_bytes()
        assert not case.check(path)


@pytest.mark.parametrize("name", ["lossless", "shifted"])
def test_another_tier_on_a_disk_that_is_full(name: str, tmp_path: Path) -> None:
    """Whatever call fails, the archive is as it was or done, and it is the one that is named."""
    case, path = Case(tmp_path, name), tmp_path / "archive" / "a.tsc"
    path.parent.mkdir()
    case.copy(path)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        tscfile.compact(path, tier="near")
        calls = disk.calls
    swallowed = []
    for at, call in enumerate(calls):
        case.copy(path)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at, "full")
            try:
                tscfile.compact(path, tier="near")
            except OSError as error:
                assert (error.errno, error.filename) == (errno.ENOSPC, str(path))
                assert path.read_bytes() == case.base.read_bytes()
            else:
                swallowed.append(call)
                assert not tscfile.verify(path).problems
        assert [each.name for each in path.parent.iterdir()] == ["a.tsc"]
    # Folders are synced where the system can.
    assert swallowed == ["fsync", "fsync"]


def test_failing_disk_at_each_call(case: Case, tmp_path: Path) -> None:
    """Every later call fails too, that which would cut the file back among them."""
    for at, name in enumerate(case.calls):
        path = case.copy(tmp_path / f"{at}.tsc")
        error = stopped(case, path, at, "failing", 0.5)
        assert isinstance(error, OSError) and error.errno == errno.EIO, name
        assert error.filename == str(path)
        case.check(path)


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_short_writes_are_gone_on_with(case: Case, part: float, tmp_path: Path) -> None:
    for at, name in enumerate(case.calls):
        path = case.copy(tmp_path / f"{at}.tsc")
        if name == "pwrite":
            assert stopped(case, path, at, "short", part) is None
            assert path.read_bytes() == case.whole.read_bytes()


def test_power_cut_loses_any_write_that_was_not_synced(case: Case, tmp_path: Path) -> None:
    """Before a sync the writes reach the disk in any order, or never: zeros in their place."""
    for at in (i for i, name in enumerate(case.calls) if name == "fsync"):
        path = case.copy(tmp_path / f"{at}.tsc")
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, "killed")
            with pytest.raises(Killed):
                tscfile.append(case.new, path)
            written = list(disk.writes)
        assert written
        torn = path.read_bytes()
        for lost in range(1, 1 << min(len(written), 4)):
            data = bytearray(torn)
            for i, (offset, length) in enumerate(reversed(written)):
                if lost >> i & 1:
                    data[offset : offset + length] = bytes(length)
            path.write_bytes(data)
            assert not case.check(path)


# Real processes ---------------------------------------------------------------------------------


def in_process(function: Callable[[], int | None]) -> int:
    """Run in a process of its own; its exit code, or minus the signal that ended it."""
    def body() -> None:
        code = 99
        try:
            code = function() or 0
        finally:
            os._exit(code)

    process = FORK.Process(target=body)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("half", [False, True])
def test_sigkill_at_each_write(case: Case, half: bool, tmp_path: Path) -> None:
    n_writes = case.calls.count("pwrite")
    for at in range(n_writes):
        path = case.copy(tmp_path / f"{at}.tsc")

        def killed_append(path: Path = path, at: int = at) -> None:
            genuine, seen = os.pwrite, iter(range(n_writes))

            def pwrite(fd: int, data: memoryview, offset: int) -> int:
                if next(seen) == at:
                    if half:
                        genuine(fd, data[: len(data) // 2], offset)
                    os.kill(os.getpid(), signal.SIGKILL)
                return genuine(fd, data, offset)

            os.pwrite = pwrite  # type: ignore[assignment]
            tscfile.append(case.new, path, wait=False)

        assert in_process(killed_append) == -signal.SIGKILL
        assert not case.check(path)


@pytest.mark.parametrize("wait", [True, False])
def test_two_commands_append_at_once(wait: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(write_kv(tmp_path / "first.kv", 50), path)
    later = [write_kv(tmp_path / f"{i}.kv", 60 + 10 * i) for i in range(6)]
    barrier = FORK.Barrier(2)
    codes: Any = FORK.Queue()

    def work(mine: list[Path]) -> None:
        barrier.wait()
        for save in mine:
            options = ["-q"] if wait else ["-q", "--no-wait"]
            codes.put((save.name, main(["append", str(path), str(save), *options])))

    processes = [FORK.Process(target=work, args=(later[i::2],)) for i in (0, 1)]
    for process in processes:
        process.start()
    results = dict(codes.get(timeout=60) for _ in later)
    for process in processes:
        process.join(60)
    assert set(results.values()) <= ({0} if wait else {0, 1})
    with tscfile.open(path) as archive:
        assert archive.torn_bytes == 0
        names = [archive.record(number).name for number in range(len(archive))]
        taken = [name for name, code in results.items() if not code]
        assert sorted(names) == sorted(["first.kv", *taken])
        for number, name in enumerate(names):
            assert same_state(
                archive.snapshot(number), tscfile.sources.open_source(tmp_path / name)
            )
    assert not tscfile.verify(path).problems


# Odd files --------------------------------------------------------------------------------------


def run(capfd: Capture, *arguments: str | Path) -> tuple[int, str]:
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err and err.count("\n") == (1 if code else 0)
    return code, err


def run_as_other(*arguments: str | Path) -> tuple[int, str]:
    """The same as somebody whom permissions bind, as root they do not."""
    with tempfile.TemporaryFile() as words:
        def command() -> int:
            sys.stderr = open(words.fileno(), "w", buffering=1, closefd=False)
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            return main([str(argument) for argument in arguments])

        code = in_process(command)
        words.seek(0)
        err = words.read().decode()
    assert "Traceback" not in err and err.count("\n") == (1 if code else 0)
    return code, err


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that others can reach, unlike ``tmp_path``; holds an archive and a later save."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    tscfile.pack(write_kv(path / "a.kv", 20), path / "a.tsc")
    write_kv(path / "b.kv", 30)
    for each in path.iterdir():
        each.chmod(0o644)
        if os.getuid() == 0:
            os.chown(each, 65534, 65534)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def test_read_only_file(folder: Path) -> None:
    archive = folder / "a.tsc"
    before = archive.read_bytes()
    archive.chmod(0o444)
    code, err = run_as_other("append", "-q", archive, folder / "b.kv")
    assert code == 1 and f"{archive}: permission denied; check the permissions" in err
    assert archive.read_bytes() == before
    assert run_as_other("verify", "-q", archive) == (0, "")
    archive.chmod(0)
    for command in ("append", "verify"):
        rest = [folder / "b.kv"] if command == "append" else []
        assert run_as_other(command, "-q", archive, *rest)[0] == 1


def test_read_only_folder(folder: Path) -> None:
    folder.chmod(0o555)
    code, err = run_as_other("pack", "-q", folder / "b.kv", "-o", folder / "b.tsc")
    assert code == 1 and f"{folder / 'b.tsc'}: permission denied" in err
    # An append makes no other file, so that it needs none.
    assert run_as_other("append", "-q", folder / "a.tsc", folder / "b.kv") == (0, "")
    assert sorted(os.listdir(folder)) == ["a.kv", "a.tsc", "b.kv"]
    with tscfile.open(folder / "a.tsc") as opened:
        assert len(opened) == 2


def test_links(folder: Path, capfd: Capture) -> None:
    archive, link, dangling, loop = (folder / n for n in ("a.tsc", "link", "dangling", "loop"))
    link.symlink_to("a.tsc")
    dangling.symlink_to("none.tsc")
    loop.symlink_to("loop")
    assert run(capfd, "append", "-q", link, folder / "b.kv") == (0, "")
    assert link.is_symlink() and not archive.is_symlink()
    with tscfile.open(archive) as opened, tscfile.open(link) as same:
        assert len(opened) == len(same) == 2
    before = archive.read_bytes()
    for wrong, words in ((dangling, "no such file"), (loop, "too many levels")):
        for arguments in (["append", wrong, folder / "b.kv"], ["append", archive, wrong]):
            code, err = run(capfd, *arguments)
            assert code == 1 and str(wrong) in err and words in err
    assert not (folder / "none.tsc").exists() and archive.read_bytes() == before


def test_what_is_no_regular_file(folder: Path, capfd: Capture) -> None:
    archive, fifo = folder / "a.tsc", folder / "fifo"
    os.mkfifo(fifo)
    before = archive.read_bytes()
    for wrong in (fifo, Path("/dev/null"), Path("/dev/zero")):
        for command in (["append", wrong, folder / "b.kv"], ["verify", wrong]):
            code, err = run(capfd, *command)
            assert code == 2 and f"{wrong}: is not a regular file" in err
    assert run(capfd, "append", archive, fifo)[0] == 2
    assert run(capfd, "append", folder, folder / "b.kv")[0] == 2
    assert archive.read_bytes() == before and stat.S_ISFIFO(fifo.stat().st_mode)
