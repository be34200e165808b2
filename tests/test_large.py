"""A session of a gigabyte: packed and unpacked in bounded memory, described at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_large_kv

GIB = 1 << 30
MOST_MEMORY = 1.5e9
N_LAYERS, N_FRAMES, N_CHANNELS = 11, 23_900, 1024
TSC = [sys.executable, "-m", "tscfile_cli.main"]

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Room for source, archive and output, given back at once."""
    if shutil.disk_usage(tmp_path).free < 5 * GIB:
        pytest.skip("less than 5 GiB of disk are free")
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


def run(*arguments: str | Path) -> tuple[float, float]:
    """Seconds and peak memory in bytes of a command that must succeed."""
    start = time.monotonic()
    child = subprocess.Popen([*TSC, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return time.monotonic() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("v_trans", [0, 1])
def test_gigabyte(v_trans: int, folder: Path) -> None:
    source, archive, out = folder / "a.kv", folder / "a.tsc", folder / "b.kv"
    size = write_large_kv(source, N_LAYERS, N_FRAMES, N_CHANNELS, v_trans)
    assert size > GIB
    _, memory = run("pack", source, "-o", archive, "-q")
    assert memory < MOST_MEMORY
    assert archive.stat().st_size < size / 1.1
    seconds = min(run("info", archive)[0] for _ in range(5))
    assert seconds < 0.25
    _, memory = run("unpack", archive, "-o", out, "-q")
    assert memory < MOST_MEMORY
    assert subprocess.run(["cmp", source, out]).returncode == 0
    _, memory = run("verify", archive, "-q")
    assert memory < MOST_MEMORY


def test_memory_is_measured() -> None:
    """What is compared above is the peak of the child, if not less than this process had."""
    assert run("--version")[1] < MOST_MEMORY / 3
