"""How long an append takes as its file grows.

    python tests/bench/append_time.py [--turns 400] [--tier lossless] [--book BOOK] [--json OUT]

A conversation of ``samples/session.kv`` is saved over and over in one archive: each save has its
last few frames changed (a turn that is generated again), so that the file grows and the saves do
not. Prints the median time of the appends in each tenth of the run beside that of the first tenth.
"Floor": two syncs of a small file, which every append does, in the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import tscfile
from tscfile.identity import identity_from_gguf
from tscfile.model import CellTable, Snapshot, TensorSpec, Track
from tscfile.sources import open_source

SAMPLES = Path(__file__).parents[2] / "samples"
N_FRAMES, N_CHANGED = 300, 4


class Edited:
    """The first frames of a track, the last of them with other rows."""

    def __init__(self, track: Track, rows: list[NDArray[np.uint8]]) -> None:
        n, cells = N_FRAMES, track.cells
        self.cache, self.stream, self.attributes = track.cache, track.stream, track.attributes
        self.tensors: tuple[TensorSpec, ...] = tuple(track.tensors)
        self.cells = CellTable(
            cells.pos[:n], cells.seq_counts[:n], cells.seq_ids[:n], cells.ext[:n]
        )
        self._rows = rows

    def read(
        self, start: int, stop: int, tensors: list[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        chosen = range(len(self._rows)) if tensors is None else tensors
        return [self._rows[i][start:stop] for i in chosen]


def saves(n_turns: int) -> list[Snapshot]:
    whole = open_source(SAMPLES / "session.kv")
    [track] = whole.tracks
    rows = track.read(0, N_FRAMES + n_turns * N_CHANGED % 97)
    found = []
    for turn in range(n_turns):
        # Another token and rows of other frames at the end.
        tokens, own = whole.tokens[:N_FRAMES].copy(), [part[:N_FRAMES].copy() for part in rows]
        tokens[-N_CHANGED:] = (turn, turn * 7 % 1024, turn * 13 % 1024, turn * 31 % 1024)
        at = turn * 3 % (N_FRAMES - N_CHANGED)
        for part in own:
            part[-N_CHANGED:] = part[at : at + N_CHANGED]
        found.append(replace(
            whole, tokens=tokens, tracks=[Edited(track, own)],
            source={**whole.source, "cell_counts": [N_FRAMES]},
        ))  # fmt: skip
    return found


def floor(folder: Path) -> float:
    times = []
    with (folder / "sync").open("wb") as file:
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(2):
                os.write(file.fileno(), bytes(512))
                os.fsync(file.fileno())
            times.append(time.perf_counter() - started)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=400)
    parser.add_argument("--tier", default="lossless")
    parser.add_argument("--book", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    identity = identity_from_gguf(SAMPLES / "model" / "reference-llama-6m-f16.gguf")
    times, sizes = [], []
    with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
        path = Path(folder) / "a.tsc"
        for turn, save in enumerate(saves(arguments.turns)):
            started = time.perf_counter()
            if turn:
                tscfile.append(save, path, book=arguments.book)
            else:
                tscfile.pack(
                    save, path, tier=arguments.tier, book=arguments.book, identity=identity
                )
            times.append(time.perf_counter() - started)
            sizes.append(path.stat().st_size)
        least = floor(Path(folder))
    # The first appends load and compile.
    parts = np.array_split(np.arange(5, len(times)), 10)
    medians = [float(np.median(np.array(times)[part])) for part in parts]
    rows = [
        {
            "saves": int(part[-1]) + 1, "file_bytes": sizes[part[-1]], "median_s": median,
            "of_first_tenth": median / medians[0],
        }
        for part, median in zip(parts, medians, strict=True)
    ]  # fmt: skip
    print(f"{arguments.tier}, saves of {N_FRAMES} frames; floor {1e3 * least:.1f} ms")
    print(f"{'saves':>6}{'file':>12}{'append':>12}{'of first':>10}")
    for row in rows:
        print(
            f"{row['saves']:>6}{row['file_bytes']:>12}{1e3 * row['median_s']:>9.1f} ms"
            f"{row['of_first_tenth']:>9.2f}x"
        )
    if arguments.json:
        found = {"tier": arguments.tier, "floor_s": least, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
