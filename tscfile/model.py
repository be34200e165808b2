"""What a conversation's state is, apart from any file that holds it.

A *session* is one conversation; a *snapshot* is its state at one save. A snapshot has the token
ids, one or more *tracks*, and whatever else its source carried. A *track* is a run of *cells* that
share one set of tensors: one KV cache (a model with sliding-window layers has two) of one stream.
A *frame* is what one cell holds: one row of every tensor of the track. Frames keep the order in
which the source stores them, which need not be the order of positions.

Rows are bytes here: shape ``[n_frames, row_bytes]``, uint8. What the bytes mean is said by the
tensor's element type (`tscfile.dtypes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .dtypes import DType
from .errors import UsageError

BLOCK_FRAMES = 256
"""Frames of a sealed block, unless told otherwise."""

NOT_STORED = "frames are not stored (tier tokens); recompute them with --recompute and --model"
"""What is said to who asks for frames that an archive does not hold."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a track: all frames of the keys or the values of one layer.

    ``layer`` counts the layers of the track from 0. ``rotation`` is the block size of the
    Hadamard rotation already applied to the rows, 0 for none, -1 where the source cannot tell.
    """

    layer: int
    role: str
    dtype: DType
    row_bytes: int
    rotation: int = 0

    @property
    def n_channels(self) -> int:
        return self.dtype.n_channels(self.row_bytes)


def tensor_runs(tensors: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Tensors in runs that differ only in their layer, which rises by one."""
    runs: list[list[TensorSpec]] = []
    for tensor in tensors:
        last = runs[-1][-1] if runs else None
        if last and replace(last, layer=last.layer + 1) == tensor:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return runs


@dataclass
class CellTable:
    """Who sits in each cell of a track; row ``i`` of every array belongs to frame ``i``.

    ``pos``: int32 ``[n]``, temporal position. ``seq_counts``: int32 ``[n]``, how many sequences
    share the cell; ``seq_ids``: int32 ``[seq_counts.sum()]``, their ids, cell after cell.
    ``ext``: int32 ``[n, n_ext]``, what the source adds to a cell (llama.cpp: x, y, token).
    """

    pos: NDArray[np.int32]
    seq_counts: NDArray[np.int32]
    seq_ids: NDArray[np.int32]
    ext: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.pos)


@runtime_checkable
class Track(Protocol):
    """A run of cells and the tensors that hold their frames; see the module's first lines.

    ``cache`` and ``stream`` say which KV cache of the model and which stream of it this is;
    ``attributes`` are facts about the track that its source needs in order to write it again.
    """

    cache: int
    stream: int
    cells: CellTable
    tensors: Sequence[TensorSpec]
    attributes: dict[str, Any]

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Frames ``start`` to ``stop`` of the tensors with these indices (all by default).

        Returns one uint8 array ``[stop - start, row_bytes]`` for each.
        """
        ...


def read_into(track: Track, start: int, stop: int, out: Sequence[NDArray[np.uint8]]) -> None:
    """Frames ``start`` to ``stop`` of all tensors into arrays of the right shapes, one for each.

    A track that can decode in place has ``read_into(start, stop, out)`` and saves a copy.
    """
    in_place = getattr(track, "read_into", None)
    if in_place is not None:
        in_place(start, stop, out)
        return
    for place, rows in zip(out, track.read(start, stop), strict=True):
        place[:] = rows


@dataclass
class ModelIdentity:
    """What is known of the model that made the state; unknown facts are absent.

    Keys are those of `tscfile.identity` (``architecture``, ``weights_blake3``, …).
    """

    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Snapshot:
    """The state of a conversation at one save.

    ``tokens``: int32 ``[n_tokens]``. ``source``: which format the snapshot came from (key
    ``format``) and the facts needed to write it again bit for bit (scalars, strings and lists of
    integers). ``opaque``: byte strings of the source that are kept as they are, by name.
    ``exact``: rows are those the engine computed, not an approximation of them.
    ``n_absent``: frames that an archive does not hold and that must be computed again.
    """

    tokens: NDArray[np.int32]
    tracks: Sequence[Track]
    source: dict[str, Any]
    opaque: dict[str, bytes] = field(default_factory=dict)
    identity: ModelIdentity = field(default_factory=ModelIdentity)
    exact: bool = True
    n_absent: int = 0

    @property
    def raw_bytes(self) -> int:
        """Bytes of all rows at their source types: the numerator of the snapshot ratio."""
        return sum(
            len(track.cells) * sum(tensor.row_bytes for tensor in track.tensors)
            for track in self.tracks
        )

    def need_frames(self) -> None:
        """`UsageError` if there are frames to be computed again first."""
        if self.n_absent:
            raise UsageError(f"{self.n_absent} {NOT_STORED}")
