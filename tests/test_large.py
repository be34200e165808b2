"""A session of a gigabyte: packed and unpacked in bounded memory, described at once."""

from __future__ import annotations

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

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Room for source, archive and output, given back at once."""
    if shutil.disk_usage(tmp_path).free < 5 * GIB:
        pytest.skip("less than 5 GiB of disk are free")
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


MEASURED = """
import resource, sys
from tscfile_cli.main import main
code = main(sys.argv[1:])
try:
    status = open("/proc/self/status").read()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak, file=sys.stderr)
sys.exit(code)
"""
"""Runs a command and says its peak memory. The kernel's VmHWM, because ``ru_maxrss`` of a child
begins with what its parent had."""


def run(*arguments: str | Path) -> tuple[float, float]:
    """Seconds and peak memory in bytes of a command that must succeed."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return time.monotonic() - start, float(done.stderr.splitlines()[-1])


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
    """What is compared above is the child's own peak, whatever this process has."""
    assert 1 << 23 < run("--version")[1] < MOST_MEMORY / 3
