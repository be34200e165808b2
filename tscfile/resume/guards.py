"""Refusing a restore that cannot be right.

llama.cpp loads any state whose shapes fit, so the proof is made here, from cheap to dear:

1. *tokens* (`check_tokens`): the token list names what the cells hold, position by position.
2. *identity* (`check_identity`): recorded facts and fingerprints agree with the model file.
3. *shape* (`check_shape`): layers and row sizes are those of the model.
4. *probe* (`probe_start`, `take_rows`): the engine computes a few rows again and they agree with
   the stored ones. This needs no recorded facts. The first tokens prove weights and adapters, the
   last one, whose rows depend on every cell before it, proves positions, RoPE and layout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, DType
from ..errors import MismatchError, UnsupportedError
from ..identity import compare, identity_from_gguf
from ..model import ModelIdentity, Snapshot, TensorSpec, Track
from .engine import Context

PROBE_TOKENS = 8
"""Tokens at the start that are computed again."""

MAX_ERROR = 0.1
"""Largest relative error of one tensor's recomputed rows. Unrelated weights give 1.4 and more, a
tenth of noise in them 0.15, RoPE base 11000 for 10000 0.6; the same weights quantized to 8 bits
0.02, the same model in another batch or with other threads at most 0.002 (reference model, 400
cells)."""

MAX_ERROR_COARSE = 0.3
"""The same for types of fewer than 8 bits, where one step is 5 to 10 % of a value."""

MAX_ERROR_LOSSY = 0.8
"""The same for rows from a lossy tier, which is far off where the model feels nothing."""

_PROBE_SEQUENCE = 1


# --- what the snapshot says of itself -----------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """Which positions a snapshot holds: ``n_cells`` from ``first`` to ``last``, without a gap.

    ``n_tokens`` is 0 where the source has no token list. ``exact``: see `tscfile.model.Snapshot`.
    """

    n_cells: int
    first: int
    last: int
    n_tokens: int
    exact: bool = True


def check_tokens(snapshot: Snapshot) -> Extent:
    """The extent of a snapshot that one conversation can be resumed from.

    Raises `MismatchError` where tokens and cells cannot belong together, `UnsupportedError` for
    several sequences or media tokens.
    """
    tracks = [track for track in snapshot.tracks if len(track.cells)]
    if not tracks and "recurrent" in snapshot.opaque:
        raise UnsupportedError("states of purely recurrent models cannot be resumed yet")
    if not tracks:
        raise MismatchError("the snapshot holds no cells: there is nothing to resume from")
    _check_one_sequence(tracks)
    # Sliding-window caches may have let go of cells that the others still hold.
    positions = np.sort(max((track.cells.pos for track in tracks), key=len))
    n_cells, first, last = len(positions), int(positions[0]), int(positions[-1])
    if (np.diff(positions) != 1).any():
        raise MismatchError(
            f"the {n_cells} cells between positions {first} and {last} have gaps or share "
            "positions: the state cannot be continued token by token"
        )
    n_tokens = len(snapshot.tokens)
    if n_tokens:
        _check_token_list(snapshot, n_cells, first)
    return Extent(n_cells, first, last, n_tokens, snapshot.exact)


def _check_one_sequence(tracks: Sequence[Track]) -> None:
    ids = {int(number) for track in tracks for number in np.unique(track.cells.seq_ids)}
    if len(ids) > 1:
        raise UnsupportedError(
            f"the state holds {len(ids)} sequences: save the one to resume as a sequence file"
        )


def _check_token_list(snapshot: Snapshot, n_cells: int, first: int) -> None:
    n_tokens = len(snapshot.tokens)
    if int(snapshot.tokens.min()) < 0:
        raise UnsupportedError("the token list has places for images or sound: cannot be resumed")
    if first or n_tokens < n_cells:
        raise MismatchError(
            f"{n_tokens} tokens do not name {n_cells} cells from position {first} on: "
            "token list and cache belong to different saves"
        )


# --- what the model file says -------------------------------------------------------------------


def check_identity(snapshot: Snapshot, model_path: str | os.PathLike[str]) -> ModelIdentity:
    """Facts of the model file, which agree with all recorded ones; `MismatchError` otherwise.

    The fingerprint of the weights reads the whole file, so it is taken only if one is recorded.
    """
    recorded = snapshot.identity
    actual = identity_from_gguf(model_path, weights="weights_blake3" in recorded.facts)
    differences = compare(recorded, actual)
    if differences:
        raise MismatchError(
            f"{model_path}: the state was made by another model: {'; '.join(differences)}"
        )
    return actual


def check_shape(
    snapshot: Snapshot, identity: ModelIdentity, model_path: str | os.PathLike[str]
) -> None:
    """`MismatchError` if layers, row sizes or token ids cannot be those of this model.

    Where caches differ from each other (sliding windows) only the layer count is looked at, and
    the engine compares the rows.
    """
    facts = identity.facts
    n_vocab = _count(facts, "vocab_size")
    if n_vocab is not None and len(snapshot.tokens) and int(snapshot.tokens.max()) >= n_vocab:
        raise MismatchError(
            f"{model_path}: token {int(snapshot.tokens.max())} of the state is outside the model's "
            f"vocabulary of {n_vocab}"
        )
    for track in snapshot.tracks:
        n_layers = 1 + max((tensor.layer for tensor in track.tensors), default=-1)
        known = _count(facts, "n_layers")
        if known is not None and n_layers > known:
            raise MismatchError(f"{model_path}: the state has {n_layers} layers, the model {known}")
        if len({other.cache for other in snapshot.tracks}) == 1:
            _check_rows(track.tensors, facts, model_path)


def _count(facts: dict[str, Any], key: str) -> int | None:
    """A fact that counts something; None where it is not known, or is no number for all layers."""
    value = facts.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _check_rows(
    tensors: Sequence[TensorSpec], facts: dict[str, Any], model_path: str | os.PathLike[str]
) -> None:
    n_heads = _count(facts, "n_kv_heads")
    for tensor in tensors:
        head_dim = _count(facts, f"head_dim_{tensor.role}")
        if tensor.dtype.name not in DTYPES or head_dim is None or n_heads is None:
            continue
        if tensor.n_channels != n_heads * head_dim:
            raise MismatchError(
                f"{model_path}: a row of {tensor.role} in layer {tensor.layer} of the state has "
                f"{tensor.n_channels} channels, the model's {n_heads} heads of {head_dim} have "
                f"{n_heads * head_dim}"
            )


# --- what the engine computes -------------------------------------------------------------------


@dataclass(frozen=True)
class TensorRows:
    """Some rows of one tensor: float32 ``[n, channels]`` at positions ``[n]``."""

    label: str
    dtype: DType
    positions: NDArray[np.int32]
    values: NDArray[np.float32]


Rows = list[TensorRows]


def can_probe(context: Context, extent: Extent) -> str:
    """Why rows cannot be computed again; empty if they can."""
    if context.model.is_recurrent:
        return "the model keeps running summaries, not rows"
    if not extent.n_tokens:
        return "the state has no token list"
    return ""


def probe_start(context: Context, tokens: Sequence[int], extent: Extent) -> float:
    """Compute the first tokens in a sequence of their own and compare; the largest error.

    Leaves the memory as it was. Needs `PROBE_TOKENS` free cells.
    """
    count = min(PROBE_TOKENS, extent.n_cells)
    stored = take_rows(context, 0, count)
    context.decode(list(tokens[:count]), 0, _PROBE_SEQUENCE)
    what = f"the first {count} tokens"
    return check_rows(stored, _pop_rows(context), what, exact=extent.exact)


def take_rows(context: Context, start: int, stop: int) -> Rows:
    """Rows of sequence 0 at positions ``start`` to ``stop``, as the engine holds them."""
    context.share(0, _PROBE_SEQUENCE, start, stop)
    return _pop_rows(context)


def _pop_rows(context: Context) -> Rows:
    """All rows of the probe's sequence, which is empty afterwards.

    Only the few cells of that sequence are copied, however large the cache is.
    """
    from ..sources.llama_state import parse_state

    state = context.sequence_state(_PROBE_SEQUENCE)
    context.remove(_PROBE_SEQUENCE, -1)
    snapshot = parse_state(state.data, where="probe", arch=context.model.architecture)
    return [rows for track in snapshot.tracks for rows in _track_rows(track)]


def stored_rows(snapshot: Snapshot, start: int, stop: int) -> Rows:
    """Rows of a snapshot at positions ``start`` to ``stop``; they must be in the archive."""
    found: Rows = []
    for track in snapshot.tracks:
        wanted = np.flatnonzero((track.cells.pos >= start) & (track.cells.pos < stop))
        if len(wanted):
            first, last = int(wanted[0]), int(wanted[-1]) + 1
            found += _track_rows(track, first, last)
    return found


def _track_rows(track: Track, start: int = 0, stop: int | None = None) -> Iterator[TensorRows]:
    stop = len(track.cells) if stop is None else stop
    for tensor, rows in zip(track.tensors, track.read(start, stop), strict=True):
        if tensor.dtype.name in DTYPES:
            label = f"{tensor.role} of layer {tensor.layer}"
            if track.cache:
                label += f" of cache {track.cache}"
            pos = track.cells.pos[start:stop]
            yield TensorRows(label, tensor.dtype, pos, to_float(rows, tensor.dtype))


def to_float(rows: NDArray[np.uint8], dtype: DType) -> NDArray[np.float32]:
    """Rows ``[n, row_bytes]`` of a known type as float32 ``[n, channels]``.

    >>> to_float(np.array([[0x80, 0x3f, 0, 0xc0]], np.uint8), DTYPES["bf16"]).tolist()
    [[1.0, -2.0]]
    """
    rows = np.ascontiguousarray(rows)
    if dtype.name == "f32":
        return rows.view("<f4")
    if dtype.name == "f16":
        return rows.view("<f2").astype(np.float32)
    if dtype.name == "bf16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(rows, GGMLQuantizationType(dtype.ggml_id)).astype(np.float32)


def check_rows(stored: Rows, computed: Rows, what: str, *, exact: bool = True) -> float:
    """The largest relative error of rows at the same positions; `MismatchError` beyond bounds.

    What only one side has (the other let go of it behind a sliding window) says nothing.
    """
    worst = 0.0
    recomputed = {rows.label: rows for rows in computed}
    for old in stored:
        new = recomputed.get(old.label)
        if new is None:
            continue
        _, old_index, new_index = np.intersect1d(old.positions, new.positions, return_indices=True)
        if not len(old_index):
            continue
        error = relative_error(old.values[old_index], new.values[new_index])
        coarse = old.dtype.block_bytes < old.dtype.block_elements
        bound = MAX_ERROR_LOSSY if not exact else MAX_ERROR_COARSE if coarse else MAX_ERROR
        if not error <= bound:
            raise MismatchError(
                f"this model and these tokens did not make this cache: computed again from {what}, "
                f"{old.label} differs by {100 * error:.3g} %, {100 * bound:.0f} % are allowed; "
                "use the model, adapter and RoPE settings of the save"
            )
        worst = max(worst, error)
    return worst


def relative_error(stored: NDArray[np.float32], computed: NDArray[np.float32]) -> float:
    """‖stored − computed‖ / ‖computed‖; infinite where that is no number.

    >>> relative_error(np.float32([3, 0]), np.float32([3, 4]))
    0.8
    """
    with np.errstate(all="ignore"):
        difference = np.linalg.norm(stored.astype(np.float64) - computed)
        size = np.linalg.norm(computed.astype(np.float64))
        if difference == 0:
            return 0.0
        error = float(difference / size)
    return error if np.isfinite(error) else float("inf")
