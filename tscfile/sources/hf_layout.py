"""What a transformers cache and a llama.cpp state of one model have in common, and what not.

Both hold the keys after RoPE, but for some architectures in another order of channels: llama.cpp's
converter reorders the rows of the query and key projections so that a rotated pair lies side by
side (``norm``), where transformers pairs the first half of a head with the second (``neox``). The
order of channels inside a head is the only difference, so `as_transformers` and `as_llama_state`
lead from one to the other without changing a number.

A snapshot of format ``transformers`` has one track for each kind of layer. Attributes of a track:

==============  ===============================================================================
``kind``        ``full``, ``sliding``, or ``latent`` (MLA: the latent as keys, the roped part of
                the keys as values)
``layers``      the model's layer of each layer of the track
``n_kv_heads``  heads of a row, for each layer of the track; rows are head after head
``window``      of a sliding track: positions that a token sees, itself included
==============  ===============================================================================

Cells are in the order of positions. A full or latent track has position 0 to the last one, a
sliding one at least those of the last ``window - 1`` positions. ``source["n_layers"]`` counts all
layers, also those that share another one's cache and so are in no track. Torch is not needed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType
from ..errors import DamagedError, MismatchError, UnsupportedError, UsageError
from ..identity import ROPE_PAIRING
from ..model import CellTable, ModelIdentity, Snapshot, TensorSpec, Track

FORMAT = "transformers"
LLAMA_CPP = "llama.cpp"
FULL, SLIDING, LATENT = "full", "sliding", "latent"
PLAIN_TYPES = ("f16", "bf16", "f32")
MAX_LAYERS = 1024
"""Bound for layer counts; the largest models have 126."""

ARCHITECTURES: dict[str, str] = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "granite": "granite",
    "granitemoe": "granitemoe", "smollm3": "smollm3", "arcee": "arcee", "olmo": "olmo",
    "cohere": "command-r", "cohere2": "cohere2", "qwen2": "qwen2", "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3": "gemma3", "gemma3_text": "gemma3", "phi3": "phi3", "starcoder2": "starcoder2",
    "stablelm": "stablelm", "gpt_neox": "gptneox", "falcon": "falcon", "olmo2": "olmo2",
    "olmoe": "olmoe", "gpt_oss": "gpt-oss",
}  # fmt: skip
"""GGUF's name of an architecture by transformers' ``model_type``."""

_REORDERED = frozenset(("llama", "granite", "granitemoe", "smollm3", "arcee", "olmo"))
"""Architectures whose heads llama.cpp's converter reorders from halves to neighbours."""
_AS_THEY_ARE = frozenset(("command-r", "cohere2"))
"""Architectures that pair neighbours in both."""
_TWO_CACHES = frozenset(("gemma2", "gemma3", "gpt-oss", "cohere2"))
"""Architectures for which llama.cpp keeps a cache of their sliding-window layers of its own."""


def pairing_in_transformers(architecture: str) -> str | None:
    """Which channels transformers' model rotates together: ``norm``, ``neox``, None if not known.

    ``architecture`` is GGUF's name.

    >>> pairing_in_transformers("llama"), ROPE_PAIRING["llama"]
    ('neox', 'norm')
    """
    if architecture in _REORDERED:
        return "neox"
    if architecture in _AS_THEY_ARE:
        return "norm"
    return "neox" if ROPE_PAIRING.get(architecture) == "neox" else None


# --- facts of a configuration -------------------------------------------------------------------


def identity_of_config(config: Any) -> ModelIdentity:
    """What a transformers configuration says of its model, in the words of `tscfile.identity`.

    Facts whose meaning is not the same in a GGUF file are left out.
    """
    config = text_config(config)
    n_heads = getattr(config, "num_attention_heads", None)
    facts: dict[str, Any] = {
        "architecture": ARCHITECTURES.get(str(getattr(config, "model_type", ""))),
        "name": Path(getattr(config, "_name_or_path", None) or "").name or None,
        "n_layers": getattr(config, "num_hidden_layers", None),
        "n_heads": n_heads,
    }
    if not is_latent(config):
        facts["n_kv_heads"] = getattr(config, "num_key_value_heads", None) or n_heads
        facts["head_dim_k"] = facts["head_dim_v"] = _head_dim(config, n_heads)
        facts |= _rope_facts(config, facts["architecture"], facts["head_dim_k"])
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        facts["sliding_window"] = config.sliding_window
    return ModelIdentity({name: value for name, value in facts.items() if value is not None})


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the decoder."""
    decoder = getattr(config, "get_text_config", None)
    return config if decoder is None else decoder(decoder=True)


def is_latent(config: Any) -> bool:
    """Whether the cache holds MLA's latent in place of keys and values."""
    return bool(getattr(config, "kv_lora_rank", None))


def _head_dim(config: Any, n_heads: int | None) -> int | None:
    width = getattr(config, "hidden_size", None)
    derived = width // n_heads if width and n_heads else None
    return getattr(config, "head_dim", None) or derived


def _rope_facts(config: Any, architecture: str | None, head_dim: int | None) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    # Where layers differ there is one table for each kind; GGUF's plain keys are the full layers'.
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope:
        return {}
    facts: dict[str, Any] = {"rope_base": float(rope["rope_theta"])}
    part = float(rope.get("partial_rotary_factor", 1.0))
    if head_dim:
        facts["rope_dim"] = int(head_dim * part)
    kind = rope.get("rope_type", "default")
    if kind in ("default", "linear", "yarn"):
        # Other kinds have no name in a GGUF file, where their frequencies are a tensor.
        facts["rope_scaling"] = "none" if kind == "default" else kind
    if kind in ("linear", "yarn") and rope.get("factor"):
        facts["rope_scaling_factor"] = float(rope["factor"])
    facts["rope_pairing"] = pairing_in_transformers(architecture) if architecture else None
    return facts


def in_transformers(identity: ModelIdentity) -> ModelIdentity:
    """The identity of a GGUF file with the pairing that transformers' model of it has."""
    facts = {key: value for key, value in identity.facts.items() if key != "rope_pairing"}
    pairing = pairing_in_transformers(str(facts.get("architecture")))
    return ModelIdentity({**facts, "rope_pairing": pairing} if pairing else facts)


# --- tracks in another order ----------------------------------------------------------------------


def split_halves(head_dim: int) -> NDArray[np.int64]:
    """Where each channel of a head in halves comes from in a head of neighbours.

    >>> split_halves(6).tolist(), join_halves(6).tolist()
    ([0, 2, 4, 1, 3, 5], [0, 3, 1, 4, 2, 5])
    """
    return np.arange(head_dim).reshape(-1, 2).T.ravel()


def join_halves(head_dim: int) -> NDArray[np.int64]:
    """The inverse of `split_halves`."""
    return np.arange(head_dim).reshape(2, -1).T.ravel()


@dataclass
class ReorderedTrack:
    """Another track with its frames and the channels of its heads in another order.

    ``frames``: int64 ``[n]``, the source's frame of each frame, None for the same ones.
    ``channels``: for each tensor None or int64 ``[head_dim]``, as `split_halves` has it.
    """

    cache: int
    stream: int
    cells: CellTable
    tensors: Sequence[TensorSpec]
    attributes: dict[str, Any]
    source: Track
    frames: NDArray[np.int64] | None
    channels: Sequence[NDArray[np.int64] | None]

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Frames ``start`` to ``stop``, uint8 ``[stop - start, row_bytes]`` for each tensor."""
        if not 0 <= start <= stop <= len(self.cells):
            raise IndexError(f"frames {start} to {stop} of a track of {len(self.cells)}")
        chosen = list(range(len(self.tensors)) if tensors is None else tensors)
        rows = self._source_rows(start, stop, chosen)
        return [self._reorder(each, i) for i, each in zip(chosen, rows, strict=True)]

    def _source_rows(self, start: int, stop: int, chosen: list[int]) -> list[NDArray[np.uint8]]:
        if self.frames is None:
            return self.source.read(start, stop, chosen)
        wanted = self.frames[start:stop]
        if not len(wanted):
            return self.source.read(0, 0, chosen)
        first = int(wanted.min())
        rows = self.source.read(first, int(wanted.max()) + 1, chosen)
        return [each[wanted - first] for each in rows]

    def _reorder(self, rows: NDArray[np.uint8], tensor: int) -> NDArray[np.uint8]:
        order = self.channels[tensor]
        if order is None:
            return rows
        element = self.tensors[tensor].dtype.block_bytes
        heads = np.ascontiguousarray(rows).view(f"<u{element}").reshape(len(rows), -1, len(order))
        return np.ascontiguousarray(heads[:, :, order]).view(np.uint8).reshape(rows.shape)


def text_cells(positions: NDArray[np.integer]) -> CellTable:
    """Cells of sequence 0 at these positions."""
    n = len(positions)
    ones, zeros = np.ones(n, np.int32), np.zeros(n, np.int32)
    return CellTable(positions.astype(np.int32), ones, zeros, np.zeros((n, 0), np.int32))


# --- what an archive may claim --------------------------------------------------------------------


def check_layout(snapshot: Snapshot) -> None:
    """`DamagedError` unless a snapshot of format ``transformers`` is as the schema has it.

    An archive or a carrier may have been made by anybody.
    """
    n_layers: Any = snapshot.source.get("n_layers")
    if not _is_integer(n_layers, 1, MAX_LAYERS):
        raise DamagedError("the number of layers is missing or out of range; the file is damaged")
    taken: set[int] = set()
    for track in snapshot.tracks:
        if not _fits(track, n_layers) or taken & set(track.attributes["layers"]):
            raise DamagedError(
                f"the facts of cache {track.cache} do not fit its tensors; the file is damaged"
            )
        taken |= set(track.attributes["layers"])


def _fits(track: Track, n_layers: int) -> bool:
    layers, heads = (track.attributes.get(name) for name in ("layers", "n_kv_heads"))
    kind, window = (track.attributes.get(name) for name in ("kind", "window"))
    if not isinstance(layers, list) or not isinstance(heads, list) or not layers:
        return False
    expected = [(role, i) for role in "kv" for i in range(len(layers))]
    pos = track.cells.pos
    return (
        len(layers) == len(heads)
        and [(spec.role, spec.layer) for spec in track.tensors] == expected
        and all(_is_integer(n, 0, n_layers - 1) for n in layers)
        and all(_is_integer(n, 1, 1 << 20) for n in heads)
        and layers == sorted(set(layers))
        and all(not spec.n_channels % heads[spec.layer] for spec in track.tensors)
        and isinstance(kind, str) and kind in (FULL, SLIDING, LATENT)
        and (kind != SLIDING or _is_integer(window, 2, (1 << 31) - 1))
        and len(pos) > 0
        and bool((np.diff(pos) == 1).all())
        and int(pos[0]) >= 0
        and (kind == SLIDING or int(pos[0]) == 0)
    )  # fmt: skip


def _is_integer(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


# --- llama.cpp to transformers --------------------------------------------------------------------


def as_transformers(
    snapshot: Snapshot,
    identity: ModelIdentity | None = None,
    layer_kinds: Sequence[str] | None = None,
    window: int | None = None,
) -> Snapshot:
    """The snapshot as transformers would hold it; rows are reordered when they are read.

    A snapshot of format ``transformers`` is returned as it is. ``identity``: facts of the model
    where the snapshot lacks them (`identity_of_config`). ``layer_kinds`` (``full`` or ``sliding``
    for each layer) and ``window`` are needed where llama.cpp keeps two caches, because its states
    do not say which layers are in which.

    Raises `UnsupportedError` for kinds of state that have no counterpart or whose order of channels
    is not known, `UsageError` where a fact is missing, `MismatchError` for contradictions.
    """
    if snapshot.source.get("format") == FORMAT:
        check_layout(snapshot)
        return snapshot
    if snapshot.source.get("format") != LLAMA_CPP:
        raise UnsupportedError(
            f"a snapshot from {snapshot.source.get('format', 'an unknown source')} cannot become "
            "a transformers cache"
        )
    # The snapshot's own facts come last: the pairing is that of its rows.
    facts = {**(identity.facts if identity else {}), **snapshot.identity.facts}
    architecture = _architecture(snapshot, facts)
    tracks = _tracks_of_one_sequence(snapshot)
    target = pairing_in_transformers(architecture)
    reorder = _must_reorder(architecture, ROPE_PAIRING.get(architecture), target, facts)
    members = _members(tracks, layer_kinds, architecture)
    converted = [
        _to_transformers(track, kind, layers, window, facts, reorder)
        for track, (kind, layers) in zip(tracks, members, strict=True)
    ]
    n_layers = sum(len(layers) for _, layers in members)
    if facts.get("n_layers", n_layers) != n_layers:
        raise MismatchError(f"the state has {n_layers} layers, its model {facts['n_layers']}")
    n_seen = 1 + max(int(track.cells.pos.max()) for track in tracks)
    if 0 < len(snapshot.tokens) < n_seen:
        raise MismatchError(
            f"{len(snapshot.tokens)} tokens do not name {n_seen} cells: token list and cache "
            "belong to different saves"
        )
    return Snapshot(
        tokens=snapshot.tokens,
        tracks=converted,
        source={"format": FORMAT, "n_layers": n_layers},
        identity=ModelIdentity({**snapshot.identity.facts, "rope_pairing": target}),
    )


def _architecture(snapshot: Snapshot, facts: Mapping[str, Any]) -> str:
    stated = snapshot.source.get("arch") or snapshot.identity.facts.get("architecture")
    known = facts.get("architecture") or stated
    if not known:
        raise UsageError(
            "the state does not name its model's architecture, on which the order of channels "
            "depends; give the model"
        )
    if stated and known != stated:
        raise MismatchError(f"the state is of a {stated} model, not of {known}")
    return str(known)


def _tracks_of_one_sequence(snapshot: Snapshot) -> list[Track]:
    if "recurrent" in snapshot.opaque:
        raise UnsupportedError(
            f"a {snapshot.source.get('kind', 'recurrent')} state has a recurrent part, which "
            "cannot become a transformers cache"
        )
    tracks = [track for track in snapshot.tracks if len(track.cells)]
    if not tracks:
        raise MismatchError("the snapshot holds no cells: there is nothing to resume from")
    ids = {int(each) for track in tracks for each in np.unique(track.cells.seq_ids)}
    shared = any((track.cells.seq_counts > 1).any() for track in tracks)
    if len(ids) > 1 or shared or len({track.stream for track in tracks}) > 1:
        raise UnsupportedError(
            f"the state holds {max(len(ids), 2)} sequences: save the one to convert as a sequence "
            "file"
        )
    return tracks


def _must_reorder(
    architecture: str, stored: str | None, target: str | None, facts: Mapping[str, Any]
) -> bool:
    if stored is None or target is None:
        raise UnsupportedError(
            f"how llama.cpp and transformers order the channels of {architecture} keys is not "
            "known here; resume the state in the engine that made it"
        )
    if stored == target:
        return False
    head_dim = facts.get("head_dim_k")
    if facts.get("rope_dim", head_dim) != head_dim:
        raise UnsupportedError(
            f"keys of {architecture} with {facts['rope_dim']} of {head_dim} channels rotated have "
            "no known order of channels; resume the state in the engine that made it"
        )
    return True


def _members(
    tracks: Sequence[Track], layer_kinds: Sequence[str] | None, architecture: str
) -> list[tuple[str, list[int]]]:
    """Kind and model layers of each track."""
    counts = [sum(tensor.role == "k" for tensor in track.tensors) for track in tracks]
    if len(tracks) == 1:
        return [(FULL, list(range(counts[0])))]
    if layer_kinds is None or len(tracks) != 2:
        raise UsageError(
            f"the state has {len(tracks)} caches and does not say which layers of the "
            f"{architecture} model are in which; give the model"
        )
    found = [
        (kind, [i for i, each in enumerate(layer_kinds) if each == kind])
        for kind in (FULL, SLIDING)
    ]
    if [len(layers) for _, layers in found] != counts:
        raise MismatchError(
            f"the state has {counts[0]} full and {counts[1]} sliding-window layers, the model "
            f"{len(found[0][1])} and {len(found[1][1])}"
        )
    return found


def _to_transformers(
    track: Track, kind: str, layers: list[int], window: int | None, facts: Mapping[str, Any],
    reorder: bool,
) -> ReorderedTrack:  # fmt: skip
    for tensor in track.tensors:
        check_plain(tensor)
    if not any(tensor.role == "v" for tensor in track.tensors):
        raise UnsupportedError("a latent (MLA) state of llama.cpp cannot become another engine's")
    dims = {role: _head_size(facts, role) for role in "kv"}
    heads = [
        _n_heads(tensor, dims["k"], facts) for tensor in track.tensors if tensor.role == "k"
    ]
    attributes: dict[str, Any] = {"kind": kind, "layers": layers, "n_kv_heads": heads}
    if kind == SLIDING:
        if not window:
            raise UsageError("the window of the sliding layers is not known; give the model")
        attributes["window"] = window
    order = np.argsort(track.cells.pos, kind="stable")
    cells = text_cells(track.cells.pos[order])
    _check_positions(cells.pos, kind)
    in_order = bool((order == np.arange(len(order))).all())
    halves = split_halves(dims["k"]) if reorder else None
    return ReorderedTrack(
        0, 0, cells, list(track.tensors), attributes, track, None if in_order else order,
        [halves if tensor.role == "k" else None for tensor in track.tensors],
    )  # fmt: skip


def check_plain(tensor: TensorSpec) -> None:
    """`UnsupportedError` unless rows are plain, unrotated floats."""
    if tensor.dtype.name not in PLAIN_TYPES or tensor.rotation:
        raise UnsupportedError(
            f"{tensor.role.upper()} of layer {tensor.layer} is {tensor.dtype.name}, which "
            f"transformers has no cache of; convert it to {', '.join(PLAIN_TYPES)} "
            "(unpack --kv-type, or dtype=)"
        )


def _head_size(facts: Mapping[str, Any], role: str) -> int:
    size = facts.get(f"head_dim_{role}")
    if not isinstance(size, int) or size < 1:
        raise UsageError(
            "the head size is not known, and a llama.cpp state does not have it; pack with "
            "--model, or give --head-dim"
        )
    return size


def _n_heads(tensor: TensorSpec, head_dim: int, facts: Mapping[str, Any]) -> int:
    n_heads, rest = divmod(tensor.n_channels, head_dim)
    wanted = facts.get("n_kv_heads", n_heads)
    if rest or (isinstance(wanted, int) and wanted != n_heads):
        raise MismatchError(
            f"a row of layer {tensor.layer} has {tensor.n_channels} channels, which are not the "
            f"model's {wanted} heads of {head_dim}"
        )
    return n_heads


def _check_positions(positions: NDArray[np.int32], kind: str) -> None:
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 != len(positions) or (np.diff(positions) != 1).any():
        raise MismatchError(
            f"the {len(positions)} cells between positions {first} and {last} have gaps or share "
            "positions: the state cannot be continued token by token"
        )
    if first and kind != SLIDING:
        raise MismatchError(
            f"the cells begin at position {first}: transformers takes the first for position 0"
        )


# --- transformers to llama.cpp --------------------------------------------------------------------


def as_llama_state(snapshot: Snapshot, architecture: str | None = None) -> Snapshot:
    """The snapshot as llama.cpp would hold it, for `tscfile.sources.llama_state.write_state`.

    A snapshot of format ``llama.cpp`` is returned as it is. Without sliding windows it becomes a
    session file of version 10, with them a sequence file. ``architecture`` is GGUF's name, where
    the identity lacks it. Raises like `as_transformers`.
    """
    if snapshot.source.get("format") == LLAMA_CPP:
        return snapshot
    if snapshot.source.get("format") != FORMAT:
        raise UnsupportedError(
            f"a snapshot from {snapshot.source.get('format', 'an unknown source')} cannot be "
            "written as a llama.cpp state"
        )
    check_layout(snapshot)
    facts = snapshot.identity.facts
    known = facts.get("architecture") or architecture
    if not known or (architecture and architecture != known):
        raise UsageError(
            "a llama.cpp state names its model's architecture, which this cache does not; give "
            "the model" if not known else f"the cache is of a {known} model, not {architecture}"
        )  # fmt: skip
    _check_writable(snapshot, known)
    target = ROPE_PAIRING.get(known)
    reorder = _must_reorder(known, pairing_in_transformers(known), target, facts)
    ordered = sorted(snapshot.tracks, key=lambda track: track.attributes["kind"] == SLIDING)
    tracks: list[Track] = [
        _to_llama(track, cache, reorder) for cache, track in enumerate(ordered)
    ]
    return Snapshot(
        tokens=snapshot.tokens,
        tracks=tracks,
        source=_llama_facts(known, tracks),
        identity=ModelIdentity({**facts, "architecture": known, "rope_pairing": target}),
    )


def _check_writable(snapshot: Snapshot, architecture: str) -> None:
    kinds = [track.attributes["kind"] for track in snapshot.tracks]
    if LATENT in kinds:
        raise UnsupportedError("a latent (MLA) cache cannot become a llama.cpp state")
    if architecture in _TWO_CACHES:
        if sorted(kinds) != [FULL, SLIDING]:
            raise UnsupportedError(
                f"llama.cpp keeps one cache of the full and one of the sliding-window layers of "
                f"{architecture}; this snapshot has {', '.join(kinds) or 'none'}"
            )
        return
    held_all = all(
        len(track.cells) and int(track.cells.pos[0]) == 0 and int(track.cells.pos[-1]) + 1
        < track.attributes.get("window", 1 << 31)
        for track in snapshot.tracks
    )  # fmt: skip
    if len(kinds) != 1 or not held_all:
        raise UnsupportedError(
            f"llama.cpp keeps every position of every layer of {architecture}; this snapshot has "
            f"layers of kind {', '.join(kinds) or 'none'}, past their window"
        )


def _to_llama(track: Track, cache: int, reorder: bool) -> ReorderedTrack:
    for tensor in track.tensors:
        check_plain(tensor)
    heads = track.attributes["n_kv_heads"]
    channels = [
        join_halves(tensor.n_channels // heads[tensor.layer])
        if reorder and tensor.role == "k" else None
        for tensor in track.tensors
    ]  # fmt: skip
    return ReorderedTrack(
        cache, 0, track.cells, list(track.tensors), {"v_trans": 0}, track, None, channels
    )


def _llama_facts(architecture: str, tracks: Sequence[Track]) -> dict[str, Any]:
    from .llama_state.layout import KINDS, KV, MROPE_ARCHS, SEQUENCE, SESSION

    if architecture in MROPE_ARCHS:
        raise UnsupportedError(f"positions of {architecture} caches have more than one dimension")
    parts = (KV,) * len(tracks)
    return {
        "format": LLAMA_CPP, "container": SESSION if len(tracks) == 1 else SEQUENCE, "version": 10,
        "generation": "F", "kind": KINDS[parts], "parts": ",".join(parts),
        "n_stream": [1] * len(tracks), "cell_counts": [len(track.cells) for track in tracks],
        "has_outputs": False, "has_streams": True, "ext_bytes": 0, "has_rotation": False,
        "token_form": "plain", "arch": architecture,
    }  # fmt: skip


def plain_dtype(name: str) -> DType:
    """One of the types a transformers cache can have; `UnsupportedError` for others."""
    from ..dtypes import DTYPES

    if name not in PLAIN_TYPES:
        raise UnsupportedError(
            f"a cache of {name} is not carried; {', '.join(PLAIN_TYPES)} are"
        )
    return DTYPES[name]


def with_identity(snapshot: Snapshot, identity: ModelIdentity) -> Snapshot:
    """The snapshot with more facts; its own stay."""
    return replace(
        snapshot, identity=ModelIdentity({**identity.facts, **snapshot.identity.facts})
    )
