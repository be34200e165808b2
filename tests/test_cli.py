"""The ``tsc`` command: exit codes, one line for an error, files that are whole or absent."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SAMPLES, SESSION, TURNS, write_kv, write_large_kv
from tscfile_cli.main import main

import tscfile
from tscfile.container.records import Header

Capture = pytest.CaptureFixture[str]
TSC = [sys.executable, "-m", "tscfile_cli.main"]
COMMANDS = ("pack", "append", "watch", "unpack", "info", "verify", "prune", "resume")
HEAVY = {"torch", "numba", "transformers", "llama_cpp", "safetensors", "gguf", "rich"}


def run(capfd: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def fails(capfd: Capture, code: int, *arguments: str | Path) -> str:
    """The one line that is said."""
    found, out, err = run(capfd, *arguments)
    assert (found, out) == (code, ""), (found, out, err)
    assert err.startswith("tsc: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err and len(err) < 400
    return err


def process(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*TSC, *map(str, arguments)], stderr=subprocess.PIPE, **options)


@pytest.fixture
def session(tmp_path: Path) -> Path:
    return write_kv(tmp_path / "session.kv", 20)


@pytest.fixture
def archive(session: Path) -> Path:
    tscfile.pack(session, session.with_suffix(".tsc"))
    return session.with_suffix(".tsc")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MB of rows: long enough to be interrupted."""
    path = tmp_path_factory.mktemp("large") / "large.kv"
    write_large_kv(path, n_layers=4, n_frames=4096, n_channels=1024, v_trans=1)
    return path


# The usual way ----------------------------------------------------------------------------------


def test_pack_info_verify_unpack(session: Path, tmp_path: Path, capfd: Capture) -> None:
    content, times = session.read_bytes(), session.stat().st_mtime_ns
    code, out, err = run(capfd, "pack", session)
    assert (code, out) == (0, "") and "20 tokens" in err
    packed = tmp_path / "session.tsc"
    assert stat.S_IMODE(packed.stat().st_mode) == 0o600
    code, out, err = run(capfd, "info", packed)
    assert (code, err) == (0, "")
    for word in ("tsc 1.0", "llama.cpp", "x f16", "keyframe", "lossless", "session.kv", "ratio"):
        assert word in out
    assert run(capfd, "verify", packed)[0] == run(capfd, "verify", "--quick", packed)[0] == 0
    # Sources are kept.
    assert (session.read_bytes(), session.stat().st_mtime_ns) == (content, times)
    session.unlink()
    code, out, err = run(capfd, "unpack", packed)
    assert (code, out) == (0, "") and "20 tokens" in err
    assert session.read_bytes() == content
    assert stat.S_IMODE(session.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["session.kv", "session.tsc"]


def test_append_and_unpack_of_any_save(tmp_path: Path, capfd: Capture) -> None:
    path = tmp_path / "a.tsc"
    assert run(capfd, "pack", TURNS[0], "-o", path)[0] == 0
    for turn in TURNS[1:3]:
        code, out, err = run(capfd, "append", path, turn)
        assert (code, out) == (0, "") and "append" in err and "80 new" in err
    for number, turn in enumerate(TURNS[:3]):
        out_path = tmp_path / f"{number}.kv"
        assert run(capfd, "unpack", path, "-o", out_path, "--snapshot", str(number))[0] == 0
        assert out_path.read_bytes() == turn.read_bytes()
    assert run(capfd, "unpack", path, "--snapshot", "-2", "-o", tmp_path / "x.kv")[0] == 0
    assert (tmp_path / "x.kv").read_bytes() == TURNS[1].read_bytes()


def test_quiet(session: Path, tmp_path: Path, capfd: Capture) -> None:
    path = tmp_path / "a.tsc"
    for arguments in (
        ["pack", session, "-o", path], ["append", path, session], ["verify", path],
        ["unpack", path, "-o", tmp_path / "out.kv"],
    ):  # fmt: skip
        assert run(capfd, *arguments, "-q") == (0, "", "")


def test_json(session: Path, tmp_path: Path, capfd: Capture) -> None:
    path = tmp_path / "a.tsc"

    def parsed(*arguments: str | Path) -> dict[str, Any]:
        code, out, err = run(capfd, *arguments, "--json")
        assert (code, err) == (0, "")
        result: dict[str, Any] = json.loads(out)
        return result

    packed = parsed("pack", session, "-o", path)
    assert (packed["plan"], packed["n_tokens"], packed["n_frames_new"]) == ("keyframe", 20, 20)
    assert packed["file_bytes"] == path.stat().st_size
    appended = parsed("append", path, session)
    assert (appended["plan"], appended["snapshot"], appended["parent"]) == ("append", 1, 0)
    info = parsed("info", path)
    assert info["file_bytes"] == path.stat().st_size and len(info["snapshots"]) == 2
    assert info["snapshots"][1]["n_frames"] == 20 and info["series_ratio"] > 0
    assert info["identity"] == {"architecture": "llama"}
    assert info["source"]["container"] == "session"
    assert [group["role"] for group in info["tensors"]] == ["k", "v"]
    report = parsed("verify", path)
    assert (report["problems"], report["n_snapshots"], report["quick"]) == ([], 2, False)


def test_json_of_a_damaged_file(archive: Path, capfd: Capture) -> None:
    data = bytearray(archive.read_bytes())
    data[100] ^= 1
    archive.write_bytes(data)
    code, out, err = run(capfd, "verify", archive, "--json")
    assert code == 3 and json.loads(out)["problems"]
    assert err.count("\n") == len(json.loads(out)["problems"])


def test_help(capfd: Capture) -> None:
    for arguments in (["-h"], *([command, "-h"] for command in COMMANDS)):
        code, out, err = run(capfd, *arguments)
        assert (code, err) == (0, "") and "Usage: tsc" in out
    assert "Exit codes" in run(capfd, "--help")[1]
    code, out, _ = run(capfd, "--version")
    assert code == 0 and tscfile.__version__ in out


# Exit codes -------------------------------------------------------------------------------------


def test_usage_errors(archive: Path, session: Path, tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "o"
    for arguments in (
        ["dance"], ["pack"], ["pack", session, "--nonsense"], ["pack", session, "-o"],
        ["pack", session, "-o", out, "--tier", "worst"], ["append", archive],
        ["append", archive, session, "--tier", "worst"],
        ["unpack", archive, "--snapshot", "x"], ["unpack", archive, "-o", out, "--snapshot", "1"],
        ["unpack", archive, "-o", out, "--snapshot", "-2"],
        ["unpack", archive, "-o", out, "--v-trans", "maybe"],
        ["unpack", archive, "-o", out, "--llama-version", "8"],
        ["info"], ["info", tmp_path], ["verify", tmp_path], ["unpack", tmp_path],
        ["pack", session, "--model", tmp_path / "none.gguf"],
    ):  # fmt: skip
        fails(capfd, 2, *arguments)
    assert not out.exists()


def test_outputs_that_cannot_be(
    archive: Path, session: Path, tmp_path: Path, capfd: Capture
) -> None:
    folder, fifo, file = tmp_path / "folder", tmp_path / "fifo", tmp_path / "file"
    folder.mkdir()
    os.mkfifo(fifo)
    file.write_bytes(b"mine")
    before = sorted(os.listdir(tmp_path))
    for command in (["pack", session], ["unpack", archive]):
        assert "exists" in fails(capfd, 2, *command, "-o", file)
        assert "directory" in fails(capfd, 2, *command, "-o", folder)
        assert "directory" in fails(capfd, 2, *command, "-f", "-o", folder)
        assert "regular" in fails(capfd, 2, *command, "-f", "-o", fifo)
        assert "regular" in fails(capfd, 2, *command, "-f", "-o", "/dev/null")
        assert "does not exist" in fails(capfd, 2, *command, "-o", tmp_path / "none" / "x")
        assert str(file) in fails(capfd, 1, *command, "-o", file / "x")
        assert "too long" in fails(capfd, 1, *command, "-o", tmp_path / ("x" * 300))
    # The default name is taken as well.
    fails(capfd, 2, "pack", session)
    fails(capfd, 2, "unpack", archive)
    # A source is kept even if it is named as output.
    for command in (["pack", session, "-o", session], ["unpack", archive, "-o", archive]):
        assert "source itself" in fails(capfd, 2, *command, "-f")
    assert file.read_bytes() == b"mine" and sorted(os.listdir(tmp_path)) == before
    assert run(capfd, "pack", session, "-f", "-o", file, "-q") == (0, "", "")
    assert file.read_bytes() == archive.read_bytes()


def test_link_is_not_written_through(session: Path, tmp_path: Path, capfd: Capture) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    fails(capfd, 2, "pack", session, "-o", link)
    assert link.is_symlink() and not target.exists()


def test_missing_files(archive: Path, session: Path, tmp_path: Path, capfd: Capture) -> None:
    none = tmp_path / "none"
    for arguments in (
        ["pack", none, "-o", tmp_path / "x"],
        ["append", archive, none], ["append", none, session], ["unpack", none], ["info", none],
        ["verify", none],
    ):  # fmt: skip
        fails(capfd, 1, *arguments)
    fails(capfd, 2, "append", tmp_path, session)
    (tmp_path / "empty").mkdir()
    fails(capfd, 2, "pack", tmp_path / "empty", "-o", tmp_path / "x")


def test_damaged_files(archive: Path, session: Path, tmp_path: Path, capfd: Capture) -> None:
    bad, cut, empty = (tmp_path / name for name in ("bad", "cut", "empty"))
    bad.write_bytes(b"\x00" * 500)
    cut.write_bytes(archive.read_bytes()[:-1])
    empty.write_bytes(b"")
    content = archive.read_bytes()
    for path in (bad, cut, empty):
        fails(capfd, 3, "info", path)
        fails(capfd, 3, "verify", path)
        fails(capfd, 3, "unpack", path, "-o", tmp_path / "x")
        fails(capfd, 3, "append", path, session)
    cut.write_bytes(session.read_bytes()[:-1])
    for path in (cut, empty):
        fails(capfd, 3, "pack", path, "-o", tmp_path / "x")
        fails(capfd, 3, "append", archive, path)
    assert archive.read_bytes() == content and not (tmp_path / "x").exists()


def test_torn_archive(archive: Path, session: Path, tmp_path: Path, capfd: Capture) -> None:
    with archive.open("ab") as file:
        file.write(b"an append that was cut off")
    out = tmp_path / "out.kv"
    assert "--snapshot 0" in fails(capfd, 3, "unpack", archive, "-o", out)
    assert run(capfd, "unpack", archive, "-o", out, "--snapshot", "0")[0] == 0
    assert out.read_bytes() == session.read_bytes()
    code, printed, _ = run(capfd, "info", archive)
    assert code == 0 and "26 bytes are no whole commit" in printed
    fails(capfd, 3, "verify", archive)
    assert run(capfd, "append", archive, session)[0] == 0
    assert run(capfd, "verify", archive)[0] == 0


def test_mismatches(archive: Path, tmp_path: Path, capfd: Capture) -> None:
    content = archive.read_bytes()
    for name, options in {
        "conversation": {"seed": 5}, "type": {"dtype": "bf16"}, "layers": {"n_layers": 3},
    }.items():  # fmt: skip
        other = write_kv(tmp_path / f"{name}.kv", 30, **options)
        assert "file of its own" in fails(capfd, 4, "append", archive, other)
    assert archive.read_bytes() == content


def test_unsupported_files(
    archive: Path, session: Path, tmp_path: Path, capfd: Capture
) -> None:
    with archive.open("r+b") as file:
        file.write(Header(major=2).write())
    for command in ("info", "verify", "unpack"):
        assert "version 2.0" in fails(capfd, 5, command, archive)
    fails(capfd, 5, "append", archive, session)
    newer = bytearray(session.read_bytes())
    newer[4] = 99
    session.write_bytes(newer)
    fails(capfd, 5, "pack", session, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_append_without_waiting(archive: Path, session: Path, capfd: Capture) -> None:
    import fcntl

    with archive.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process" in fails(capfd, 1, "append", "--no-wait", archive, session)
        waiting = process("append", archive, session, "-q")
        time.sleep(1)
        assert waiting.poll() is None
    assert (waiting.wait(30), waiting.stderr.read()) == (0, b"")  # type: ignore[union-attr]
    with tscfile.open(archive) as opened:
        assert len(opened) == 2


def test_odd_names(tmp_path: Path, capfd: Capture) -> None:
    """Names of spaces, line ends and bytes that are no text."""
    bytes_alone = os.fsdecode(b"\xff\xfe.kv")
    for name in ("two words.kv", "line\nend.kv", "-dash.kv", bytes_alone, "ключ.kv"):
        session = write_kv(tmp_path / name, 5)
        packed = session.with_suffix(".tsc")
        assert run(capfd, "pack", session)[0] == 0
        code, out, _ = run(capfd, "info", packed)
        assert code == 0 and "ratio" in out
        assert json.loads(run(capfd, "info", packed, "--json")[1])["n_blocks"] == 1
        fails(capfd, 2, "pack", session)
        content = session.read_bytes()
        session.unlink()
        assert run(capfd, "unpack", packed)[0] == 0 and session.read_bytes() == content


# Pipes and terminals ----------------------------------------------------------------------------


def test_pipes(tmp_path: Path) -> None:
    content = SESSION.read_bytes()
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": tmp_path}
    pack = process("pack", "-", **options)
    packed, err = pack.communicate(content, timeout=60)
    assert pack.returncode == 0 and packed.startswith(Header.MAGIC) and err.count(b"\n") == 1
    unpack = process("unpack", "-", "-q", **options)
    unpacked, err = unpack.communicate(packed, timeout=60)
    assert (unpack.returncode, err) == (0, b"") and unpacked == content
    named = process("pack", "-", "-o", "x.tsc", "-q", **options)
    assert named.communicate(content, timeout=60) == (b"", b"")
    append = process("append", "x.tsc", "-", "-q", **options)
    assert append.communicate(content, timeout=60) == (b"", b"") and append.returncode == 0
    broken = process("pack", "-", **options)
    out, err = broken.communicate(content[:-1], timeout=60)
    assert (broken.returncode, out) == (3, b"") and err.count(b"\n") == 1
    assert os.listdir(tmp_path) == ["x.tsc"]


def test_reader_that_goes_away(archive: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    info = process("info", archive, stdout=write_end)
    os.close(write_end)
    _, err = info.communicate(timeout=60)
    assert (info.returncode, err) == (1, b"")


def test_full_standard_output(archive: Path) -> None:
    for arguments in (["info", archive], ["info", archive, "--json"], ["unpack", archive, "-o-"]):
        with open("/dev/full", "wb") as full:
            done = process(*arguments, stdout=full)
            _, err = done.communicate(timeout=60)
        assert done.returncode == 1 and err.count(b"\n") == 1 and b"no space left" in err


def test_terminal(session: Path, tmp_path: Path) -> None:
    """A bar where stderr is a terminal; binary data is not written to one."""
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*TSC, "pack", str(session), "-o", str(tmp_path / "x.tsc")], stderr=theirs, timeout=60
    )
    os.close(theirs)
    assert done.returncode == 0
    assert b"packing" in os.read(ours, 1 << 16)
    os.close(ours)
    ours, theirs = pty.openpty()
    refused = process("unpack", tmp_path / "x.tsc", "-o", "-", stdout=theirs)
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 2 and b"terminal" in err
    os.close(theirs)
    os.close(ours)


# Full disks and interrupts ----------------------------------------------------------------------


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_file_that_grows_too_large(tmp_path: Path) -> None:
    """As on a full disk: one line, nothing left, nothing changed."""
    packed, kept = tmp_path / "session.tsc", tmp_path / "series.tsc"
    tscfile.pack(SESSION, packed)
    tscfile.pack(TURNS[2], kept)
    content, whole = kept.read_bytes(), packed.read_bytes()
    for arguments in (
        ["pack", SESSION, "-o", tmp_path / "x.tsc"], ["unpack", packed, "-o", tmp_path / "x.kv"],
        ["append", kept, TURNS[4]], ["pack", SESSION, "-f", "-o", kept],
        ["demote", packed, "--to", "lossless", "-o", tmp_path / "x.tsc"], ["compact", packed],
    ):  # fmt: skip
        done = process(*arguments, preexec_fn=small_files)
        _, err = done.communicate(timeout=60)
        assert done.returncode == 1 and err.count(b"\n") == 1 and b"file too large" in err
        assert str(tmp_path).encode() in err and b".tmp" not in err
    assert kept.read_bytes() == content and packed.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["series.tsc", "session.tsc"]


def interrupt_when(running: subprocess.Popen[bytes], ready: Any) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.strip().splitlines() == [b"tsc: interrupted; nothing was changed"]


def grown(folder: Path, suffix: str, n_bytes: int) -> bool:
    return any(
        name.endswith(suffix) and (folder / name).stat().st_size > n_bytes
        for name in os.listdir(folder)
    )


def test_interrupted_pack(large: Path, tmp_path: Path) -> None:
    running = process("pack", large, "-o", tmp_path / "x.tsc")
    interrupt_when(running, lambda: grown(tmp_path, ".tmp", 1 << 20))
    assert os.listdir(tmp_path) == []


def test_interrupted_unpack(large: Path, tmp_path: Path) -> None:
    tscfile.pack(large, tmp_path / "x.tsc")
    running = process("unpack", tmp_path / "x.tsc", "-o", tmp_path / "x.kv")
    interrupt_when(running, lambda: grown(tmp_path, ".tmp", 1 << 20))
    assert os.listdir(tmp_path) == ["x.tsc"]


@pytest.mark.parametrize("command", ["demote", "compact"])
def test_interrupted_rewriting(command: str, large: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    tscfile.pack(large, path)
    content = path.read_bytes()
    options = ["--to", "lossless", "-o", tmp_path / "y.tsc"] if command == "demote" else []
    running = process(command, path, *options)
    interrupt_when(running, lambda: grown(tmp_path, ".tmp", 1 << 20))
    assert os.listdir(tmp_path) == ["x.tsc"] and path.read_bytes() == content


def test_interrupted_append(large: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    # The first 16 frames of the same conversation.
    write_large_kv(tmp_path / "short.kv", n_layers=4, n_frames=16, n_channels=1024, v_trans=0)
    first = tscfile.sources.open_source(tmp_path / "short.kv")
    first.tokens = tscfile.sources.open_source(large).tokens[:16]
    tscfile.pack(first, path)
    content = path.read_bytes()
    running = process("append", path, large)
    interrupt_when(running, lambda: path.stat().st_size > len(content) + (1 << 20))
    assert path.read_bytes() == content


# What is read and imported ----------------------------------------------------------------------


def test_info_reads_no_payload(
    large: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tsc"
    size = tscfile.pack(large, path).file_bytes
    read: list[int] = []
    genuine = os.pread

    def pread(fd: int, n: int, offset: int) -> bytes:
        read.append(n)
        return genuine(fd, n, offset)

    monkeypatch.setattr(os, "pread", pread)
    for arguments in (["info", path], ["verify", "--quick", path]):
        read.clear()
        assert run(capfd, *arguments)[0] == 0
        assert sum(read) < 100_000 < size / 100


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60,
        check=True,
    )  # fmt: skip
    return set(done.stdout.splitlines()[-1].split())


def test_quick_commands_import_little(archive: Path) -> None:
    assert not modules_after("import tscfile") & {*HEAVY, "numpy", "click", "zstandard"}
    assert not modules_after("import tscfile_cli.main") & {*HEAVY, "numpy"}
    for command in (["info", archive], ["info", archive, "--json"], ["verify", "--quick", archive]):
        arguments = [str(argument) for argument in command]
        code = f"from tscfile_cli.main import main\nassert main({arguments}) == 0"
        assert not modules_after(code) & HEAVY
    torch_free = HEAVY - {"numba"}
    reading = f"import tscfile\ntscfile.open({str(archive)!r}).read()"
    assert not modules_after(reading) & torch_free


# What people and supervisors do -----------------------------------------------------------------


def test_terminated_pack_leaves_nothing(large: Path, tmp_path: Path) -> None:
    running = process("pack", large, "-o", tmp_path / "x.tsc")
    deadline = time.monotonic() + 30
    while not grown(tmp_path, ".tmp", 1 << 20):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143
    assert err.splitlines() == [b"tsc: terminated; nothing was changed"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(archive: Path, tmp_path: Path, closed: str) -> None:
    command = " ".join(map(str, (*TSC, "unpack", archive, "-o", tmp_path / "back.kv")))
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert (tmp_path / "back.kv").read_bytes() == archive.with_suffix(".kv").read_bytes()
    done = subprocess.run(
        ["sh", "-c", f"{' '.join(TSC)} info {archive} {closed}"], capture_output=True, check=False
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@pytest.mark.parametrize("source", [".", ""])
def test_a_folder_is_no_session(source: str, capfd: Capture) -> None:
    assert "is a directory" in fails(capfd, 2, "pack", source)


def test_eval_looks_at_its_outputs_first(tmp_path: Path, capfd: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a")
    start = ("eval", "--model", tmp_path / "none.gguf", "--text", text)
    assert "plot is a .png" in fails(capfd, 2, *start, "--plot", tmp_path / "p.txt")
    assert "does not exist" in fails(capfd, 2, *start, "--json", tmp_path / "none" / "x.json")


def test_bench_and_books_refuse_what_they_cannot_take(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    book = SAMPLES / "model" / "reference-llama-6m.tscbook"
    two_caches = next(ROOT.glob("tests/golden/llama/*_gemma3_f16_*.kv"))
    cut = tmp_path / "cut.tscbook"
    cut.write_bytes(book.read_bytes()[:1_000_000])
    cases = [
        (["bench"], 2),
        (["bench", str(SESSION)], 2),
        (["bench", "--shape", "none"], 2),
        (["bench", str(SESSION), "--book", str(cut)], 3),
        (["bench", str(two_caches), "--book", str(book)], (2, 4, 5)),
        (["book", "learn", str(SESSION), "-o", str(tmp_path / "x.tscbook")], 5),
        (["book", "learn", str(book), "-o", str(tmp_path / "x.tscbook")], 2),
        (["book", "learn", str(ROOT / "README.md"), "-o", str(tmp_path / "x.tscbook")], 3),
    ]
    for arguments, code in cases:
        found = main(arguments)
        assert found == code or (isinstance(code, tuple) and found in code), arguments
        assert capfd.readouterr().err.count("\n") == 1, arguments
    assert not (tmp_path / "x.tscbook").exists()
