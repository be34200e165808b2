"""Tracks that read their rows from a mapped state file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...model import CellTable, TensorSpec


@dataclass
class StateTrack:
    """One stream of one KV cache, read from the bytes of a state file on demand.

    ``buffer``: uint8, the whole file. ``offsets``: where the rows of each tensor start.
    ``element_bytes``: for a tensor stored channel after channel the bytes of an element, else 0.
    """

    cache: int
    stream: int
    cells: CellTable
    tensors: Sequence[TensorSpec]
    attributes: dict[str, Any]
    buffer: NDArray[np.uint8] = field(repr=False)
    offsets: Sequence[int] = field(repr=False)
    element_bytes: Sequence[int] = field(repr=False)

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Frames ``start`` to ``stop`` as uint8 ``[stop - start, row_bytes]`` for each tensor.

        Rows stored cell after cell are a view of the file, others a copy. `IndexError` if the
        frames are not in the track.
        """
        if not 0 <= start <= stop <= len(self.cells):
            raise IndexError(f"frames {start} to {stop} of a track of {len(self.cells)}")
        chosen = range(len(self.tensors)) if tensors is None else tensors
        return [self._read_tensor(index, start, stop) for index in chosen]

    def _read_tensor(self, index: int, start: int, stop: int) -> NDArray[np.uint8]:
        row_bytes = self.tensors[index].row_bytes
        offset, element = self.offsets[index], self.element_bytes[index]
        if element:
            return self._read_transposed(offset, row_bytes, element, start, stop)
        first, last = offset + start * row_bytes, offset + stop * row_bytes
        return self.buffer[first:last].reshape(stop - start, row_bytes)

    def _read_transposed(
        self, offset: int, row_bytes: int, element: int, start: int, stop: int
    ) -> NDArray[np.uint8]:
        n_cells = len(self.cells)
        stored = self.buffer[offset : offset + n_cells * row_bytes].view(f"<u{element}")
        channels = stored.reshape(row_bytes // element, n_cells)
        rows = np.ascontiguousarray(channels[:, start:stop].T)
        return rows.view(np.uint8).reshape(stop - start, row_bytes)
