"""Fuzz targets on their corpus, and for a moment on what coverage leads to: see `fuzz/run.py`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import bounded_memory
from fuzz.seeds import make_seeds
from fuzz.targets import TARGETS, VECTORS
from mending import Rebuilt

import tscfile
from tscfile.container.records import CHUNK, INDEX, SNAPSHOT
from tscfile.description import describe

FUZZ = Path(__file__).parent / "fuzz"
SECONDS = 2


def corpus(name: str) -> list[Path]:
    return sorted((FUZZ / "corpus" / name).iterdir())


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str, tmp_path: Path) -> None:
    """Nothing undocumented is raised, and memory stays within bounds; no atheris is needed."""
    paths, target = corpus(name), TARGETS[name]
    assert len(paths) > 5
    for number, data in enumerate(make_seeds(name)):
        paths.append(tmp_path / f"seed-{number}")
        paths[-1].write_bytes(data)
    for path in paths:
        data = path.read_bytes()
        target.run(data)
        with bounded_memory(path):
            target.run(data)


def test_corpus_is_small() -> None:
    sizes = [path.stat().st_size for name in TARGETS for path in corpus(name)]
    assert sum(sizes) <= 150_000 and max(sizes) <= 8_000


def test_archives_are_put_together_again(tmp_path: Path) -> None:
    """What mutates archives is of use only as long as it keeps up with the format."""
    path = tmp_path / "a.tsc"
    for book in VECTORS.glob("*.tscbook"):
        shutil.copy(book, tmp_path)
    for data in make_seeds("tsc"):
        path.write_bytes(data)
        with tscfile.open(path) as archive:
            before = describe(archive)
        types = Rebuilt(data).types()
        assert {SNAPSHOT, INDEX} <= set(types)
        path.write_bytes(Rebuilt(data).write(lambda number, type_, payload: payload))
        assert not tscfile.verify(path).problems
        # All that comes behind a longer record has another place.
        path.write_bytes(
            Rebuilt(data).write(lambda _, type_, payload: payload + bytes(100 * (type_ == CHUNK)))
        )
        with tscfile.open(path) as archive:
            after = describe(archive)
        assert (after.file_bytes > before.file_bytes) == (CHUNK in types)
        for one, other in zip(before.snapshots, after.snapshots, strict=True):
            assert (one.name, one.n_frames, one.n_tokens) == (
                other.name, other.n_frames, other.n_tokens
            )  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: it is built for Linux on x86-64 and Python up to 3.13",
)
@pytest.mark.parametrize("name", TARGETS)
def test_coverage_guided(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ / "run.py"), name, "--seconds", str(SECONDS)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [*command, "--seed", "1", "--work", str(tmp_path)], env={**os.environ, **threads},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    found = "".join(path.read_text() for path in (tmp_path / "findings").glob("*.txt"))
    assert done.returncode == 0, found or done.stderr[-3000:]
    units = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert units and int(units[1]) > 20
