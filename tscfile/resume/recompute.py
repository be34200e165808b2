"""A snapshot whose rows llama.cpp has computed again from its tokens.

It has the tokens, cells, source facts and opaque parts of the one it was made from, so that it is
written as the same kind of file; only the rows are new. They are what this model makes of these
tokens here and now: the last bits may differ from those that were saved.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..model import CellTable, Snapshot, TensorSpec, Track
from ..sources.hf_layout import as_llama_state
from .llama_cpp import restore


@dataclass(frozen=True)
class Recomputed:
    """``snapshot``: in llama.cpp's order of channels. ``n_tokens`` were computed in ``seconds``.
    ``error``: largest relative error of a tensor's stored rows against the new ones, at the first
    tokens and at the last; None where no rows are stored. ``notes``: guards that were skipped."""

    snapshot: Snapshot
    n_tokens: int
    seconds: float
    error: float | None
    notes: tuple[str, ...]


class _Track:
    """The cells of one track with the rows that another one has at the same positions."""

    def __init__(self, saved: Track, computed: Track, order: NDArray[np.intp]) -> None:
        self.cache, self.stream = saved.cache, saved.stream
        self.cells: CellTable = saved.cells
        self.tensors: Sequence[TensorSpec] = saved.tensors
        self.attributes: dict[str, Any] = saved.attributes
        self._computed, self._order = computed, order

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        wanted = self._order[start:stop]
        if not len(wanted):
            return self._computed.read(0, 0, tensors)
        first = int(wanted.min())
        rows = self._computed.read(first, int(wanted.max()) + 1, tensors)
        return [part[wanted - first] for part in rows]


def recompute(
    snapshot: Snapshot,
    model_path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    identity_check: bool = True,
    probe: bool = True,
    verbose: bool = False,
) -> Recomputed:
    """Compute the rows of ``snapshot`` again in the model at ``model_path``.

    The model must be the one that the snapshot names, and rows that are stored must be near the
    new ones; options and errors are those of `tscfile.resume.llama_cpp.resume`. `UnsupportedError`
    where the engine's cache has other tensors than the save's.
    """
    from ..sources.llama_state import parse_state

    saved = as_llama_state(snapshot)
    with restore(
        snapshot, model_path, n_ctx=n_ctx, identity_check=identity_check, probe=probe,
        recompute=True, verbose=verbose,
    ) as restored:  # fmt: skip
        state = restored.context.state()
        found = parse_state(state.data, where="recomputed", container="state-buffer")
    tracks = [_replace(track, found.tracks) for track in saved.tracks]
    made = replace(saved, tracks=tracks, exact=True, n_absent=0)
    return Recomputed(
        made, restored.n_recomputed, restored.compute_seconds, restored.probe_error,
        tuple(restored.notes),
    )  # fmt: skip


def _replace(saved: Track, computed: Sequence[Track]) -> Track:
    if not len(saved.cells):
        return saved
    track = next((each for each in computed if each.cache == saved.cache), None)
    if track is None or not _alike(saved.tensors, track.tensors):
        raise UnsupportedError(
            f"this build of llama.cpp keeps cache {saved.cache} in other tensors than the save: "
            "resume it in place of writing it"
        )
    order = np.argsort(track.cells.pos, kind="stable")
    at = np.searchsorted(track.cells.pos[order], saved.cells.pos)
    inside = at < len(order)
    if not inside.all() or (track.cells.pos[order[at]] != saved.cells.pos).any():
        raise UnsupportedError(
            f"the recomputed cache {saved.cache} lacks positions that the save has: resume it in "
            "place of writing it"
        )
    return _Track(saved, track, order[at])


def _alike(saved: Sequence[TensorSpec], computed: Sequence[TensorSpec]) -> bool:
    """The same tensors; a source that cannot tell its rotation is believed."""
    return len(saved) == len(computed) and all(
        replace(a, rotation=0) == replace(b, rotation=0)
        and (a.rotation == b.rotation or -1 in (a.rotation, b.rotation))
        for a, b in zip(saved, computed, strict=True)
    )
