"""Files that hold conversations are their owner's alone; no path in a file is followed, nothing is
unpickled, and links stay links."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_snapshot, some_cache, write_kv
from tscfile_cli.main import main

import tscfile
from tscfile.errors import TscError
from tscfile.sources import open_source

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Nothing is held back from others by the process, so that only the program can do it."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): stat.S_IMODE(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


def run(*arguments: str | Path) -> None:
    assert main([str(each) for each in arguments]) == 0


def test_all_that_is_written_is_private(
    open_umask: None, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is only there for a moment: temporary files have their mode from the start."""
    made: dict[str, int] = {}
    replace, link = os.replace, os.link

    def note(source: str | Path, *rest: object, **options: object) -> None:
        made[Path(source).name] = stat.S_IMODE(os.lstat(source).st_mode)

    monkeypatch.setattr(os, "replace", lambda *a, **k: (note(*a, **k), replace(*a, **k)))
    monkeypatch.setattr(os, "link", lambda *a, **k: (note(*a, **k), link(*a, **k)))
    sources, out = tmp_path / "in", tmp_path / "out"
    sources.mkdir(), out.mkdir(0o755)
    first, second = (write_kv(sources / f"{n}.kv", n, dtype="f16") for n in (20, 40))
    run("pack", "-q", first, "-o", out / "a.tsc")
    run("append", "-q", out / "a.tsc", second)
    run("pack", "-q", first, second, "-o", out / "many")
    run("unpack", "-q", out / "a.tsc", "-o", out / "a.kv")
    for suffix in ("gguf", "safetensors", "npz"):
        tscfile.pack(some_cache(), out / f"{suffix}.tsc")
        run("unpack", "-q", out / f"{suffix}.tsc", "--as", suffix, "-o", out / f"a.{suffix}")
    run("convert", "-q", first, out / "c.gguf")
    run("compact", "-q", out / "a.tsc", "--keep-last", "1")
    run("compact", "-q", out / "a.tsc", "-o", out / "compact.tsc")
    known = make_snapshot(20, identity={"weights_blake3": "0" * 64})
    tscfile.pack(known, out / "known.tsc")
    run("demote", "-q", out / "known.tsc", "--to", "tokens", "-o", out / "tokens.tsc")
    run("watch", "-q", sources, "--into", out / "watched", "--once", "--settle", "0")
    found = modes(out)
    assert len(found) > 14 and made
    wrong = {
        name: oct(mode) for name, mode in found.items()
        if mode != (0o700 if (out / name).is_dir() else 0o600)
    }  # fmt: skip
    assert not wrong
    assert set(made.values()) == {0o600}
    # What was there before is as it was.
    assert set(modes(sources).values()) == {0o666} and stat.S_IMODE(out.stat().st_mode) == 0o755


def test_an_append_keeps_the_mode_that_its_owner_gave(tmp_path: Path, open_umask: None) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(5), path)
    path.chmod(0o640)
    tscfile.append(make_snapshot(9), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_links_stay_links(tmp_path: Path, capfd: Capture) -> None:
    """A command that changes an archive changes what a link leads to."""
    path, link = tmp_path / "real" / "a.tsc", tmp_path / "link.tsc"
    path.parent.mkdir()
    identity = {"weights_blake3": "0" * 64}
    tscfile.pack(make_snapshot(5, identity=identity), path)
    link.symlink_to("real/a.tsc")
    tscfile.append(make_snapshot(9, identity=identity), link)
    run("compact", "-q", "--keep-last", "1", link)
    assert link.is_symlink() and not path.is_symlink()
    with tscfile.open(path) as archive:
        assert len(archive) == 1
    # An output is a new file: what a link leads to is not written through it.
    other = tmp_path / "other.tsc"
    other.write_bytes(b"mine")
    out = tmp_path / "out.tsc"
    out.symlink_to(other)
    for command in (["pack", write_kv(tmp_path / "a.kv", 5), "-o"], ["demote", path, "--to",
                    "tokens", "-o"], ["compact", path, "-o"]):  # fmt: skip
        run(*command, out, "-q", "-f")
        assert other.read_bytes() == b"mine" and not out.is_symlink()
        out.unlink()
        out.symlink_to(other)


# --- names in files are only names ----------------------------------------------------------------

EVIL = ["../evil", "/tmp/evil", "..\\evil", "a/b", "\0", "file:///etc/passwd"]


def test_names_of_opaque_parts_are_no_paths(tmp_path: Path, capfd: Capture) -> None:
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    snapshot = make_snapshot(5, opaque=dict.fromkeys(EVIL, b"evil"), identity={"name": "../evil"})
    tscfile.pack(snapshot, folder / "a.tsc", name="../../evil")
    with tscfile.open(folder / "a.tsc") as archive:
        assert list(archive.snapshot().opaque) == EVIL
    for command in (["verify", "-q"], ["info", "--json"], ["unpack", "-q", "-f"],
                    ["compact", "-q", "-o", folder / "b.tsc"]):  # fmt: skip
        main([*map(str, command), str(folder / "a.tsc")])
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {
        "a.tsc", "b.tsc", "a", "a.kv", "evil", "evil.kv"
    }  # fmt: skip
    assert not list(tmp_path.glob("evil*")) and not list((tmp_path / "deep").glob("evil*"))
    assert not Path("/tmp/evil").exists()


def test_a_book_is_found_by_its_id_and_not_by_a_path(tmp_path: Path) -> None:
    """The id in an archive is compared with what lies beside it; it never names a file."""
    from tscfile.books import book

    inside = tmp_path / "archives"
    inside.mkdir()
    shutil.copy(ROOT / "spec" / "vectors" / "valid" / "lossy.tscbook", tmp_path / "x.tscbook")
    for wanted in ("../x.tscbook", str(tmp_path / "x.tscbook"), "../x", "*", ""):
        with pytest.raises(TscError, match="needs book"):
            book.find(wanted, None, str(inside / "a.tsc"))


def test_members_of_a_zip_file_go_nowhere(tmp_path: Path) -> None:
    for name in EVIL:
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo(name + ".npy"), b"evil")
        with pytest.raises(TscError):
            open_source(path)
        assert os.listdir(tmp_path) == ["a.npz"]


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "a.npz"
    data = pickle.dumps(Trap(trap))
    array = np.array([Trap(trap)], object)
    np.savez(path, **{"layers.0.k": array, "layers.0.v": array, "tokens": array})
    with pytest.raises(TscError, match="never unpickled"):
        open_source(path)
    for name in ("a.tsc", "a.kv", "a.safetensors", "a.gguf", "a.tscbook"):
        path = tmp_path / name
        path.write_bytes(data)
        for read in (open_source, tscfile.open):
            with pytest.raises(TscError):
                read(path)
    assert not trap.exists()


def test_no_code_unpickles_or_evaluates() -> None:
    """Neither by name nor by way of NumPy and torch."""
    found = []
    for folder in ("tscfile", "cli", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found += [f"{path.name}:{node.lineno}: {each}" for each in _suspects(node)]
    assert not found


_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}


def _suspects(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [each.name for each in node.names if each.name.split(".")[0] in _MODULES]
    if isinstance(node, ast.ImportFrom):
        return [str(node.module)] if str(node.module).split(".")[0] in _MODULES else []
    if not isinstance(node, ast.Call):
        return []
    name = ast.unparse(node.func)
    options = {each.arg: ast.unparse(each.value) for each in node.keywords}
    if name in ("eval", "exec") or options.get("allow_pickle") == "True":
        return [name]
    unsafe = name == "torch.load" and options.get("weights_only") != "True"
    unsafe |= name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False"
    unsafe |= options.get("trust_remote_code") == "True"
    return [name] if unsafe else []
