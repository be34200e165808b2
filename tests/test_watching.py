"""``tsc watch``: saves are taken whole, once, into the archive that they continue; none is lost."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import REGENERATED, SAMPLES, SESSION, SESSION_BF16, TURNS, write_kv
from tiny_models import MODELS, Engine
from tscfile_cli.main import main

import tscfile
from tscfile import files, watching
from tscfile.collecting import PackOptions, SaveReport
from tscfile.identity import identity_from_gguf
from tscfile.staging import PREFIX
from tscfile.watching import Watcher

Capture = pytest.CaptureFixture[str]
FORK = multiprocessing.get_context("fork")
TSC = [sys.executable, "-m", "tscfile_cli.main"]


@pytest.fixture
def slots(tmp_path: Path) -> Path:
    (tmp_path / "slots").mkdir()
    return tmp_path / "slots"


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    return tmp_path / "archives"


def put(save: Path, slot: Path, age: float = 60) -> None:
    """``save`` in a slot, left alone for ``age`` seconds."""
    slot.write_bytes(save.read_bytes())
    then = time.time() - age
    os.utime(slot, (then, then))


def watch(slots: Path, archives: Path, **options: Any) -> list[SaveReport]:
    names = ("tier", "book", "identity")
    packing = PackOptions(**{name: options.pop(name) for name in names if name in options})
    with closing(Watcher(slots, archives, packing, **options).run(once=True)) as reports:
        return list(reports)


def stored(archives: Path) -> dict[str, list[bytes]]:
    """Every snapshot of every archive as the file that it came from."""
    found: dict[str, list[bytes]] = {}
    out = archives.parent / "out.kv"
    for path in sorted(archives.glob("*.tsc")):
        problems = tscfile.verify(path).problems
        # What a kill in the middle of an append leaves, until the next append.
        assert all("no whole commit" in problem for problem in problems), problems
        found[path.name] = []
        with tscfile.open(path) as archive:
            count = len(archive)
        for number in range(count):
            tscfile.unpack(path, out, snapshot=number, force=True)
            found[path.name].append(out.read_bytes())
    out.unlink(missing_ok=True)
    return found


def bytes_of(*paths: Path) -> list[bytes]:
    return [path.read_bytes() for path in paths]


# What is taken ----------------------------------------------------------------------------------


def test_a_slot_that_is_overwritten(slots: Path, archives: Path) -> None:
    slot = slots / "slot0.bin"
    expected: dict[str, list[bytes]] = {"slot0.tsc": []}
    for turn in (*TURNS, REGENERATED):
        put(turn, slot)
        [report] = watch(slots, archives)
        assert report.report is not None and report.report.snapshot == len(expected["slot0.tsc"])
        expected["slot0.tsc"].append(turn.read_bytes())
        # The same again adds nothing, from whatever slot.
        put(turn, slots / "slot1.bin")
        for again in watch(slots, archives):
            assert again.report is None and again.problem is None
            assert again.archive == str(archives / "slot0.tsc")
        (slots / "slot1.bin").unlink()
    # Another conversation in the same slot.
    put(SESSION, slot)
    assert [each.archive for each in watch(slots, archives) if each.report] == [
        str(archives / "slot0-2.tsc")
    ]
    expected["slot0-2.tsc"] = bytes_of(SESSION)
    assert stored(archives) == expected
    assert bytes_of(slot) == bytes_of(SESSION) and len(os.listdir(slots)) == 1


def test_several_slots_in_one_pass(slots: Path, archives: Path) -> None:
    for age, (save, name) in enumerate([
        (TURNS[2], "c"), (SESSION_BF16, "b.kv"), (TURNS[0], "a"), (SESSION, "d.kv"),
    ]):  # fmt: skip
        put(save, slots / name, age=1000 - age)
    (slots / "folder").mkdir()
    (slots / "link.kv").symlink_to(TURNS[3])
    (slots / ".hidden.kv").write_bytes(TURNS[3].read_bytes())
    (slots / "x.tsc").write_bytes(b"x")
    os.mkfifo(slots / "fifo")
    assert all(report.problem is None for report in watch(slots, archives))
    # Other element types are another cache, even of the same tokens.
    assert stored(archives) == {
        "c.tsc": bytes_of(TURNS[2], TURNS[0]),
        "b.tsc": bytes_of(SESSION_BF16), "d.tsc": bytes_of(SESSION),
    }  # fmt: skip


def test_what_is_no_whole_save_is_left(slots: Path, archives: Path) -> None:
    whole = TURNS[1].read_bytes()
    half = slots / "half.kv"
    for data in (b"", whole[:10], whole[:-1], whole[: len(whole) // 2], b"no save at all"):
        half.write_bytes(data)
        os.utime(half, (0, 0))
        [report] = watch(slots, archives, delete_source=True)
        assert report.problem and report.problem.startswith(str(half)) and report.exit_code
        assert PREFIX not in report.problem and half.read_bytes() == data
    put(TURNS[1], half)
    [report] = watch(slots, archives, delete_source=True)
    assert report.deleted and not half.exists()
    assert stored(archives) == {"half.tsc": [whole]} and os.listdir(archives) == ["half.tsc"]


def test_a_problem_is_told_once(slots: Path, archives: Path) -> None:
    (slots / "bad").write_bytes(b"no save")
    watcher = Watcher(slots, archives, PackOptions(), settle=0, interval=0.01)
    told: list[SaveReport] = []
    with closing(watcher.run()) as reports:
        told.append(next(reports))
        put(TURNS[0], slots / "good")
        told.append(next(reports))
        (slots / "bad").write_bytes(b"no save either")
        told.append(next(reports))
    assert [Path(each.source).name for each in told] == ["bad", "good", "bad"]
    assert told[1].problem is None and told[0].problem and told[2].problem


def test_a_file_that_changes_is_waited_for(
    slots: Path, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written to in place while it is copied, before and behind where the copy is."""
    slot, genuine, pieces = slots / "slot", files.private, itertools.count()
    put(TURNS[0], slot)
    size = slot.stat().st_size

    class Slow:
        def __init__(self, path: Path) -> None:
            self._file = genuine(path)

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, piece: bytes) -> None:
            self._file.write(piece)
            if next(pieces) == 20:
                with slot.open("r+b") as file:
                    for at in (10_000, size - 1):
                        file.seek(at)
                        file.write(b"\x01")

    monkeypatch.setattr(watching, "_PIECE", 1000)
    monkeypatch.setattr(files, "private", Slow)
    started = time.monotonic()
    [report] = watch(slots, archives, settle=0.5)
    # A mixture of both would be a save like any other.
    assert report.report is not None and time.monotonic() - started > 0.5
    assert next(pieces) > size / 1000 + 20
    assert stored(archives) == {"slot.tsc": bytes_of(slot)}


def test_a_young_file_is_waited_for(slots: Path, archives: Path) -> None:
    put(TURNS[1], slots / "slot", age=0)
    started = time.monotonic()
    [report] = watch(slots, archives, settle=0.5)
    assert report.report is not None and time.monotonic() - started > 0.5


def test_still_being_written(slots: Path, archives: Path) -> None:
    slot = slots / "slot"
    slot.write_bytes(b"x")
    stop = time.monotonic() + 2.5

    def write() -> None:
        while time.monotonic() < stop:
            with slot.open("ab") as file:
                file.write(b"x")
            time.sleep(0.05)

    writer = FORK.Process(target=write)
    writer.start()
    try:
        [report] = watch(slots, archives, settle=0.6)
    finally:
        writer.join()
    assert report.exit_code == 1 and "still being written" in str(report.problem)


# Deleting ---------------------------------------------------------------------------------------


def test_deleted_when_safe(slots: Path, archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot, order = slots / "slot", []
    for name in ("fsync", "unlink", "rename"):
        genuine = getattr(os, name)

        def call(*rest: Any, name: str = name, genuine: Any = genuine) -> Any:
            order.append(name)
            return genuine(*rest)

        monkeypatch.setattr(os, name, call)
    for turn in TURNS[:2]:
        put(turn, slot)
        order.clear()
        [report] = watch(slots, archives, delete_source=True)
        assert report.deleted and not slot.exists()
        assert "fsync" in order[: order.index("rename")]
    # One that was stored before, by somebody who may not have got as far as the disk.
    put(TURNS[0], slot)
    order.clear()
    [report] = watch(slots, archives, delete_source=True)
    assert report.deleted and report.report is None and order.index("fsync") < order.index("rename")
    assert stored(archives) == {"slot.tsc": bytes_of(*TURNS[:2])} and os.listdir(slots) == []


@pytest.mark.parametrize("replaced", [False, True])
def test_a_save_written_over_before_it_is_deleted(
    replaced: bool, slots: Path, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, genuine = slots / "slot", os.rename
    put(TURNS[0], slot)

    def rename(source: Path, target: Path) -> None:
        """Just before it the server opens the slot; with ``replaced`` just after it again."""
        with slot.open("wb") as file:
            genuine(source, target)
            file.write(TURNS[1].read_bytes())
        if replaced:
            slot.write_bytes(TURNS[2].read_bytes())

    monkeypatch.setattr(os, "rename", rename)
    [report] = watch(slots, archives, delete_source=True)
    assert report.report is not None and not report.deleted
    monkeypatch.undo()
    assert len(os.listdir(slots)) == 1 + replaced
    assert bytes_of(slot) == bytes_of(TURNS[1 + replaced])
    for name in os.listdir(slots):
        os.utime(slots / name, (0, 0))
    assert all(report.deleted for report in watch(slots, archives, delete_source=True))
    saves = bytes_of(*TURNS[: 2 + replaced])
    found = stored(archives)
    assert sorted(found["slot.tsc"]) == sorted(saves) and len(found) == 1
    assert os.listdir(slots) == []


# Killed -----------------------------------------------------------------------------------------

CHANGES = ("pwrite", "fsync", "ftruncate", "rename", "unlink", "link", "mkdir", "fchmod")


def killed_at(number: int, work: Callable[[], object]) -> tuple[int, int]:
    """Do ``work`` in a process that is killed at change ``number`` of a file; its exit code and
    how many changes there were."""
    ours, theirs = FORK.Pipe()

    def body() -> None:
        count = itertools.count()
        for name in CHANGES:
            genuine = getattr(os, name)

            def call(*rest: Any, genuine: Any = genuine, **options: Any) -> Any:
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return genuine(*rest, **options)

            setattr(os, name, call)
        work()
        theirs.send(next(count))

    process = FORK.Process(target=body)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode, ours.recv() if process.exitcode == 0 else 0


@pytest.mark.parametrize("delete_source", [False, True])
def test_killed_at_each_change(delete_source: bool, tmp_path: Path) -> None:
    """A save that goes on, one that starts an archive, one that is stored already."""
    first, second, other = (write_kv(tmp_path / f"{n}.kv", n, seed=n // 100) for n in (40, 60, 150))
    start = tmp_path / "start"
    start.mkdir()
    put(first, start / "slot0")
    watch(start, start / "archives")
    put(second, start / "slot1")
    put(other, start / "slot2")
    for at in itertools.count():
        folder = tmp_path / str(at)
        shutil.copytree(start, folder)
        arguments = (folder, folder / "archives")
        work = partial(watch, *arguments, delete_source=delete_source)
        code, n_changes = killed_at(at, work)
        kept = [p.read_bytes() for p in folder.iterdir() if p.is_file()]
        kept += itertools.chain(*stored(folder / "archives").values())
        assert all(data in kept for data in bytes_of(first, second, other))
        assert all(report.problem is None for report in watch(*arguments, delete_source=True))
        assert stored(folder / "archives") == {
            "slot0.tsc": bytes_of(first, second), "slot2.tsc": bytes_of(other),
        }  # fmt: skip
        assert os.listdir(folder) == ["archives"]
        assert sorted(os.listdir(folder / "archives")) == ["slot0.tsc", "slot2.tsc"]
        assert not any(tscfile.verify(p).problems for p in (folder / "archives").iterdir())
        shutil.rmtree(folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert at == n_changes > 20


def write_slowly(slots: Path, queue: Any, seed: int, patient: bool) -> None:
    """A server with two slots: saves of growing conversations, in place, a piece at a time."""
    rng = random.Random(seed)
    lengths = {0: 30, 1: 30}
    for step in range(14):
        slot = rng.randrange(2)
        conversation = slot + (2 if step >= 9 else 0)
        lengths[slot] += rng.randrange(1, 200)
        source = slots.parent / f"{conversation}-{step}.kv"
        data = write_kv(source, lengths[slot], seed=conversation).read_bytes()
        path = slots / f"slot{slot}.bin"
        deadline = time.monotonic() + 20
        while patient and path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        taken = patient and not path.exists()
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(data), 1 + len(data) // 6):
                file.write(data[start : start + 1 + len(data) // 6])
                time.sleep(rng.random() * 0.06)
        queue.put((source.name, slot, taken))
        time.sleep(rng.random() * 0.4)
    queue.put(None)


@pytest.mark.parametrize("delete_source", [False, True])
def test_killed_at_random(delete_source: bool, slots: Path, archives: Path) -> None:
    rng = random.Random(3)
    queue: Any = FORK.Queue()
    writer = FORK.Process(target=write_slowly, args=(slots, queue, 5, delete_source))
    options = ["--settle", "0.15", "--interval", "0.02", "-q"]
    options += ["--delete-source"] if delete_source else []
    command = ["watch", str(slots), "--into", str(archives), *options]
    writer.start()
    n_kills = 0
    while writer.is_alive():
        running = FORK.Process(target=main, args=(command,))
        running.start()
        time.sleep(rng.choice([0.05, 0.2, 1.0]) * rng.random() + 0.02)
        assert running.exitcode is None
        running.kill()
        running.join()
        n_kills += 1
    writer.join()
    assert n_kills >= 8
    last = FORK.Process(target=lambda: os._exit(main([*command, "--once"])))
    last.start()
    last.join(60)
    assert last.exitcode == 0
    written, newest = [], {}
    while (entry := queue.get(timeout=10)) is not None:
        name, slot, was_taken = entry
        data = (slots.parent / name).read_bytes()
        written.append(data)
        if was_taken and slot in newest:
            # It had gone before the next one was written, so it must be in an archive.
            newest[f"{slot} before {name}"] = newest[slot]
        newest[slot] = data
    kept = [data for saves in stored(archives).values() for data in saves]
    assert len(set(kept)) == len(kept) >= 4, "a save is stored twice"
    assert all(data in written for data in kept), "a half-written save was taken"
    assert all(data in kept for data in newest.values()), "a save is lost"
    assert all(name.endswith(".tsc") for name in os.listdir(archives))
    if delete_source:
        assert os.listdir(slots) == []


def test_nothing_is_lost_to_a_full_disk(
    slots: Path, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    put(TURNS[0], slots / "slot")
    genuine, full = os.pwrite, [True]

    def pwrite(*rest: Any) -> int:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return genuine(*rest)

    monkeypatch.setattr(os, "pwrite", pwrite)
    watcher = Watcher(slots, archives, PackOptions(), settle=0.05, interval=0.01,
                      delete_source=True)  # fmt: skip
    with closing(watcher.run()) as reports:
        report = next(reports)
        assert "no space left" in str(report.problem) and (slots / "slot").exists()
        full[0] = False
        report = next(reports)
    assert report.deleted and stored(archives) == {"slot.tsc": bytes_of(TURNS[0])}


# The command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stops_when_told(number: int, slots: Path, archives: Path) -> None:
    put(TURNS[0], slots / "slot")
    running = subprocess.Popen(
        [*TSC, "watch", str(slots), "--into", str(archives), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert running.stdout is not None
    report = json.loads(running.stdout.readline())
    assert report["archive"] == str(archives / "slot.tsc") and report["report"]["snapshot"] == 0
    running.send_signal(number)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err) == (0, b"", b"")
    assert os.listdir(archives) == ["slot.tsc"]


def test_command(slots: Path, archives: Path, tmp_path: Path, capfd: Capture) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = main(["watch", *map(str, arguments)])
        finally:
            signal.signal(signal.SIGTERM, before)
        return code, *capfd.readouterr()

    put(TURNS[0], slots / "slot")
    code, out, err = run(slots, "--into", archives, "--once")
    assert (code, out) == (0, "") and "keyframe" in err and "slot.tsc, snapshot 0" in err
    (slots / "bad").write_bytes(b"")
    code, out, err = run(slots, "--into", archives, "--once", "-q", "--settle", "0")
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith(f"tsc: {slots / 'bad'}")
    for code, arguments in (
        (2, [slots]), (2, [tmp_path / "none", "--into", archives]),
        (2, [slots, "--into", TURNS[0]]), (2, [slots, "--into", archives, "--interval", "0"]),
        (2, [slots, "--into", archives, "--interval", "nan"]),
        (2, [slots, "--into", archives, "--once", "--tiers", "near,archive,near"]),
        (2, [slots, "--into", archives, "--once", "--settle", "-1"]),
        (1, [slots, "--into", tmp_path / "none" / "x", "--once"]),
        (3, [slots, "--into", archives, "--once", "--book", TURNS[0]]),
    ):  # fmt: skip
        found, out, err = run(*arguments)
        assert (found, out, err.count("\n")) == (code, "", 1), (arguments, err)


def test_quality_layers_of_a_book(slots: Path, archives: Path) -> None:
    book = SAMPLES / "model" / "reference-llama-6m.tscbook"
    identity = identity_from_gguf(SAMPLES / "model" / "reference-llama-6m-f16.gguf")
    for turn in TURNS[:3]:
        put(turn, slots / "slot")
        [report] = watch(slots, archives, tier=["balanced", "near"], book=book,
                         identity=identity)  # fmt: skip
        assert report.report is not None and report.report.tier == "balanced,near"
        assert report.report.n_frames_new == (90 if turn == TURNS[0] else 80)
    assert watch(slots, archives, book=book)[0].report is None
    with tscfile.open(archives / "slot.tsc", book=book) as archive:
        assert len(archive) == 3


def test_archives_that_cannot_be_read(slots: Path, archives: Path) -> None:
    put(TURNS[0], slots / "slot")
    watch(slots, archives)
    data = (archives / "slot.tsc").read_bytes()
    (archives / "slot.tsc").write_bytes(data[:100])
    (archives / "other.tsc").write_bytes(b"not mine")
    put(TURNS[1], slots / "slot")
    reports = watch(slots, archives)
    assert [Path(each.source).name for each in reports] == ["other.tsc", "slot.tsc", "slot"]
    assert [each.exit_code for each in reports] == [3, 3, 0]
    assert reports[2].archive == str(archives / "slot-2.tsc")
    assert (archives / "slot.tsc").read_bytes() == data[:100]
    assert (archives / "other.tsc").read_bytes() == b"not mine"
    # A torn one is gone on with.
    with (archives / "slot-2.tsc").open("ab") as file:
        file.write(b"an append that was cut off")
    put(TURNS[2], slots / "slot")
    assert watch(slots, archives)[-1].archive == str(archives / "slot-2.tsc")
    assert not tscfile.verify(archives / "slot-2.tsc").problems


def test_saves_of_a_server(slots: Path, archives: Path, tmp_path: Path) -> None:
    """llama.cpp itself writes the slot, of two models with the same tokens."""
    pytest.importorskip("llama_cpp")
    tokens = [(7 * i) % 250 + 3 for i in range(120)]
    written: dict[str, list[bytes]] = {}
    for name in ("llama", "gemma3"):
        MODELS[name](tmp_path / name)
        with Engine(tmp_path / name) as engine:
            for start, stop in ((0, 50), (50, 90), (90, 120)):
                engine.decode(tokens[start:stop], start)
                data = engine.save("sequence", tokens[:stop], 0, slots)
                written.setdefault(name, []).append(data)
                os.utime(slots / "saved.kv", (0, 0))
                [report] = watch(slots, archives, delete_source=True)
                assert report.deleted and report.report is not None
                # The window of gemma's second cache lets go of old frames.
                assert report.report.n_frames_new < 3 * (stop - start)
    assert stored(archives) == {"saved.tsc": written["llama"], "saved-2.tsc": written["gemma3"]}


def test_interval_is_kept(slots: Path, archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        list(Watcher(slots, archives, PackOptions(), interval=7).run())
    assert slept == [7, 7, 7] and os.listdir(archives) == []
