"""Make a large llama.cpp state out of the rows of a small one, for benchmarks.

    python tests/bench/make_state.py samples/session.kv big.kv --frames 4096 --layers 32 --width 8

Every row is ``width`` rows of the small state side by side, taken at random frames, their lowest
bits drawn anew: distributions by channel stay as they are and no stretch of bytes occurs twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tscfile.files import new_mapped_file
from tscfile.model import CellTable, Snapshot, TensorSpec
from tscfile.sources import open_source
from tscfile.sources.llama_state import state_size, write_state

NOISE_BITS = {"f16": 6, "bf16": 2}


class TiledTrack:
    """A `tscfile.model.Track` whose rows are made when they are read."""

    cache = stream = 0

    def __init__(self, small: Snapshot, n_frames: int, n_layers: int, width: int) -> None:
        source = small.tracks[0]
        self.attributes = source.attributes
        ones = np.ones(n_frames, np.int32)
        self.cells = CellTable(
            np.arange(n_frames, dtype=np.int32), ones, 0 * ones, np.zeros((n_frames, 0), np.int32)
        )
        self._width = width
        self._rows = [rows.view("<u2") for rows in source.read(0, len(source.cells))]
        first = source.tensors[0]
        self.tensors = [
            TensorSpec(layer, role, first.dtype, width * first.row_bytes)
            for role in "kv"
            for layer in range(n_layers)
        ]
        self._noise = 1 << NOISE_BITS[first.dtype.name]

    def read(
        self, start: int, stop: int, tensors: list[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        return [self._make(i, start, stop) for i in tensors or range(len(self.tensors))]

    def _make(self, tensor: int, start: int, stop: int) -> NDArray[np.uint8]:
        draw = np.random.default_rng((tensor, start))
        n_small = len(self._rows) // 2
        half, layer = divmod(tensor, len(self.tensors) // 2)
        rows = self._rows[half * n_small + layer % n_small]
        frames = draw.integers(0, len(rows), (self._width, stop - start))
        wide = np.concatenate([rows[each] for each in frames], axis=1)
        wide ^= draw.integers(0, self._noise, wide.shape, dtype=np.uint16)
        return wide.view(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("small", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--frames", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=8)
    arguments = parser.parse_args()
    small = open_source(arguments.small)
    track = TiledTrack(small, arguments.frames, arguments.layers, arguments.width)
    tokens = np.random.default_rng(0).integers(0, 4096, arguments.frames).astype(np.int32)
    source = small.source | {"cell_counts": [arguments.frames]}
    state = Snapshot(tokens, [track], source)
    with new_mapped_file(arguments.out, state_size(state)) as view:
        write_state(state, view)


if __name__ == "__main__":
    main()
