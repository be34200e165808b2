"""Ratio and speed of the lossless tier beside zstd, on one saved session.

    python tests/bench/lossless.py samples/session.kv [--repeat 20]

Decoding of both is timed into warm memory, checksums included, nothing written to disk: what a
restore costs before the disk has its say. zstd runs on one core, as ``zstd -d`` does.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard

import tscfile
from tscfile.model import read_into
from tscfile.workers import n_workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("state", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    raw = arguments.state.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure_tsc(arguments.state, Path(folder) / "s.tsc", arguments.repeat)]
    rows += [measure_zstd(raw, level, arguments.repeat) for level in (3, 19)]
    slowest = rows[-1]
    print(f"{arguments.state}: {len(raw) / 1e6:.2f} MB, {n_workers()} cores for tscfile")
    print(f"{'':10}{'ratio':>8}{'encode':>12}{'decode':>12}   against zstd -19")
    for name, size, encode, decode in rows:
        against = f"encode x{slowest[2] / encode:.1f}, decode x{slowest[3] / decode:.2f}"
        speeds = f"{len(raw) / encode / 1e6:7.0f} MB/s{len(raw) / decode / 1e6:7.0f} MB/s"
        print(f"{name:10}{len(raw) / size:8.4f}{speeds}   {against}")


def measure_tsc(state: Path, path: Path, repeat: int) -> tuple[str, int, float, float]:
    """Name, bytes, seconds to encode, seconds to decode: the best of ``repeat``."""
    encode = best(lambda: tscfile.pack(state, path, force=True), repeat)
    with tscfile.open(path) as archive:
        tracks = archive.snapshot().tracks
        warm = [
            [np.zeros((min(2048, len(t.cells)), s.row_bytes), np.uint8) for s in t.tensors]
            for t in tracks
        ]

        def decode() -> None:
            for track, out in zip(tracks, warm, strict=True):
                for start in range(0, len(track.cells), 2048):
                    stop = min(start + 2048, len(track.cells))
                    read_into(track, start, stop, [part[: stop - start] for part in out])

        return "tscfile", path.stat().st_size, encode, best(decode, repeat)


def measure_zstd(raw: bytes, level: int, repeat: int) -> tuple[str, int, float, float]:
    started = time.perf_counter()
    packed = zstandard.ZstdCompressor(level=level).compress(raw)
    encode = time.perf_counter() - started
    buffer = bytearray(1 << 20)

    def decode() -> None:
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed))
        while reader.readinto(buffer):
            pass

    return f"zstd -{level}", len(packed), encode, best(decode, repeat)


def best(work: Callable[[], object], repeat: int) -> float:
    work()  # compiles kernels and warms caches
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
