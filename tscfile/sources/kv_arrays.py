"""A cache as arrays with names, as safetensors and npz files hold it.

==========================  ===========================================================
``layers.{i}.k``            keys of the model's layer i, ``[heads, tokens, head_dim]``
``layers.{i}.v``            values, likewise
``tokens``                  int32 or int64 ``[n]``, at least as many as the cache has seen
==========================  ===========================================================

Arrays are f16, bf16 or f32 and in transformers' order of channels (`hf_layout`): a layer of a
DynamicCache without its first dimension. Metadata, all strings, with JSON where more than a word:

==========================  ===========================================================
``format``, ``version``     ``tscfile-kv``, ``1``
``n_seen``                  how many tokens the cache has seen
``kinds``                   ``full``, ``sliding``, ``latent`` or, without a cache, an
                            empty string, for each layer
``windows``                 positions that a sliding layer sees, 0 for other layers
``identity``                facts of the model (`tscfile.identity`)
==========================  ===========================================================

Without metadata all layers are full. A sliding layer has the last positions only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType
from ..errors import DamagedError, UnsupportedError, UsageError
from ..identity import read_identity
from ..model import BLOCK_FRAMES, CellTable, ModelIdentity, Snapshot, TensorSpec, Track
from .hf_layout import FORMAT, FULL, LATENT, MAX_LAYERS, SLIDING, text_cells

CONTENT, VERSION = "tscfile-kv", "1"
SPAN_BYTES = 64 << 20
"""Rows asked of a track at once, unless 256 frames take more."""

_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([kv])")
_HALVES = re.compile("[\ud800-\udfff]")
_KINDS = (FULL, SLIDING, LATENT, "")


@dataclass(frozen=True)
class Plane:
    """One array to be written: tensor ``tensor`` of track ``track``; shape as in the file."""

    name: str
    dtype: DType
    shape: tuple[int, int, int]
    track: int
    tensor: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.block_bytes


@dataclass(frozen=True)
class HeadArray:
    """One array that was read: bit patterns, unsigned ``[heads, tokens, head_dim]``."""

    dtype: DType
    bits: NDArray[Any]


@dataclass
class HeadsTrack:
    """A `tscfile.model.Track` over arrays ``[heads, n, head_dim]``."""

    cache: int
    stream: int
    cells: CellTable
    tensors: Sequence[TensorSpec]
    attributes: dict[str, Any]
    arrays: Sequence[NDArray[Any]] = field(repr=False)

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Frames ``start`` to ``stop``, uint8 ``[stop - start, row_bytes]`` for each tensor."""
        if not 0 <= start <= stop <= len(self.cells):
            raise IndexError(f"frames {start} to {stop} of a track of {len(self.cells)}")
        chosen = range(len(self.tensors)) if tensors is None else tensors
        return [_as_rows(self.arrays[i][:, start:stop]) for i in chosen]


def _as_rows(part: NDArray[Any]) -> NDArray[np.uint8]:
    n = part.shape[1]
    rows = np.ascontiguousarray(part.swapaxes(0, 1))
    return rows.reshape(n, -1).view(np.uint8)


def spans(track: Track) -> Iterator[tuple[int, int]]:
    """Frame ranges of whole blocks in which a track is read once, in bounded memory."""
    frame_bytes = sum(tensor.row_bytes for tensor in track.tensors) or 1
    step = max(1, SPAN_BYTES // (frame_bytes * BLOCK_FRAMES)) * BLOCK_FRAMES
    for start in range(0, len(track.cells), step):
        yield start, min(start + step, len(track.cells))


# --- from a snapshot ------------------------------------------------------------------------------


def planes(snapshot: Snapshot) -> list[Plane]:
    """The arrays of a snapshot of format ``transformers``, layer by layer, keys before values."""
    found = []
    for number, track in enumerate(snapshot.tracks):
        for index, tensor in enumerate(track.tensors):
            n_heads = track.attributes["n_kv_heads"][tensor.layer]
            shape = (n_heads, len(track.cells), tensor.n_channels // n_heads)
            layer = track.attributes["layers"][tensor.layer]
            found.append((layer, Plane(f"layers.{layer}.{tensor.role}", tensor.dtype, shape,
                                       number, index)))  # fmt: skip
    return [plane for _, plane in sorted(found, key=lambda pair: (pair[0], pair[1].name))]


def metadata(snapshot: Snapshot) -> dict[str, str]:
    """What is written beside the arrays."""
    n_layers = int(snapshot.source["n_layers"])
    kinds, windows = [""] * n_layers, [0] * n_layers
    for track in snapshot.tracks:
        for layer in track.attributes["layers"]:
            kinds[layer] = track.attributes["kind"]
            windows[layer] = track.attributes.get("window", 0)
    n_seen = max((int(track.cells.pos[-1]) + 1 for track in snapshot.tracks if len(track.cells)),
                 default=0)  # fmt: skip
    return {
        "format": CONTENT,
        "version": VERSION,
        "n_seen": str(n_seen),
        "kinds": json.dumps(kinds),
        "windows": json.dumps(windows),
        "identity": json.dumps(snapshot.identity.facts),
    }


def place(rows: NDArray[np.uint8], plane: Plane, start: int, out: NDArray[Any]) -> None:
    """Put rows uint8 ``[n, row_bytes]`` into ``out``, bit patterns of the plane's shape."""
    heads, _, head_dim = plane.shape
    bits = np.ascontiguousarray(rows).view(out.dtype).reshape(len(rows), heads, head_dim)
    out[:, start : start + len(rows)] = bits.swapaxes(0, 1)


# --- to a snapshot --------------------------------------------------------------------------------


def layer_and_role(name: str, where: str) -> tuple[int, str]:
    """What an array is by its name; `UsageError` for names that are none of ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        shown = name if len(name) <= 40 else name[:40] + "…"
        raise UsageError(
            f"{where}: array {shown!r} is not of a cache; arrays are named layers.0.k, layers.0.v, "
            "… and tokens"
        )
    layer = int(match[1])
    if layer >= MAX_LAYERS:
        raise UnsupportedError(f"{where}: layer {layer} is beyond the limit of {MAX_LAYERS}")
    return layer, match[2]


def snapshot_from_arrays(
    arrays: Mapping[str, HeadArray],
    tokens: NDArray[np.integer],
    facts: Mapping[str, str],
    where: str,
) -> Snapshot:
    """A snapshot over arrays by name; ``facts`` is the file's metadata.

    Raises `DamagedError`, `UnsupportedError` or `UsageError` for what contradicts the schema.
    """
    found: dict[int, dict[str, HeadArray]] = {}
    for name, array in arrays.items():
        layer, role = layer_and_role(name, where)
        found.setdefault(layer, {})[role] = array
    for layer, pair in found.items():
        _check_pair(layer, pair, where)
    if not found:
        raise UsageError(f"{where}: holds no layers.0.k: this is not a cache")
    described = _Description.read(facts, found, where)
    if not all(0 <= int(each) < 1 << 31 for each in (tokens.min(initial=0), tokens.max(initial=0))):
        raise DamagedError(f"{where}: a token id is out of range")
    if len(tokens) < described.n_seen:
        raise DamagedError(
            f"{where}: {len(tokens)} tokens for a cache that has seen {described.n_seen}"
        )
    # One table for all tracks, of which each has the end: a layer may be smaller than its cells.
    cells = text_cells(np.arange(described.n_seen, dtype=np.int32))
    return Snapshot(
        tokens=tokens.astype(np.int32),
        tracks=[
            _track(layers, cache, described, found, cells)
            for cache, layers in enumerate(described.groups(found))
        ],
        source={"format": FORMAT, "n_layers": len(described.kinds)},
        identity=described.identity,
    )


def _check_pair(layer: int, pair: Mapping[str, HeadArray], where: str) -> None:
    if len(pair) != 2:
        missing = "v" if "k" in pair else "k"
        raise DamagedError(f"{where}: layers.{layer}.{missing} is missing")
    k, v = pair["k"].bits.shape, pair["v"].bits.shape
    if len(k) != 3 or len(v) != 3 or k[:2] != v[:2] or not all(k) or not all(v):
        raise DamagedError(
            f"{where}: layer {layer} has keys {k} and values {v}; both are [heads, tokens, "
            "head_dim] of the same heads and tokens"
        )


@dataclass(frozen=True)
class _Description:
    """The metadata, read and compared with the arrays."""

    n_seen: int
    kinds: list[str]
    windows: list[int]
    identity: ModelIdentity

    @classmethod
    def read(
        cls, facts: Mapping[str, str], found: Mapping[int, Mapping[str, HeadArray]], where: str
    ) -> _Description:
        n_layers = 1 + max(found)
        longest = max(pair["k"].bits.shape[1] for pair in found.values())
        if facts.get("format") != CONTENT:
            made = cls(longest, [FULL] * n_layers, [0] * n_layers, ModelIdentity())
        else:
            if facts.get("version") != VERSION:
                raise UnsupportedError(
                    f"{where}: version {str(facts.get('version'))[:20]!r} of {CONTENT}; this build "
                    f"reads {VERSION}"
                )
            made = cls(
                _number(facts.get("n_seen", ""), where),
                _list(facts, "kinds", str, where),
                _list(facts, "windows", int, where),
                read_identity(read_facts(_json(facts, "identity", where), where), where),
            )
        made.check(found, where)
        return made

    def check(self, found: Mapping[int, Mapping[str, HeadArray]], where: str) -> None:
        if len(self.kinds) > MAX_LAYERS or len(self.windows) != len(self.kinds):
            raise DamagedError(f"{where}: kinds and windows of layers do not agree")
        unknown = set(self.kinds) - set(_KINDS)
        if unknown:
            raise UnsupportedError(f"{where}: layers of kind {min(unknown)[:40]!r} are not known")
        present = {number for number, kind in enumerate(self.kinds) if kind}
        if present != found.keys():
            odd = min(present ^ found.keys())
            raise DamagedError(f"{where}: layer {odd} has arrays or a kind, but not both")
        for layer, pair in found.items():
            n_held, window = pair["k"].bits.shape[1], self.windows[layer]
            if self.kinds[layer] == SLIDING:
                right = window > 1 and min(window - 1, self.n_seen) <= n_held <= self.n_seen
            else:
                right = n_held == self.n_seen
            if not right:
                raise DamagedError(
                    f"{where}: layer {layer} holds {n_held} tokens of {self.n_seen}, which a "
                    f"{self.kinds[layer]} layer cannot"
                )

    def groups(self, found: Mapping[int, Mapping[str, HeadArray]]) -> list[list[int]]:
        """Layers that share a track, as `hf_layout` has it; full ones first."""
        groups: dict[tuple[bool, str, int, int], list[int]] = {}
        for layer in sorted(found):
            kind = self.kinds[layer]
            n_held = found[layer]["k"].bits.shape[1]
            groups.setdefault((kind == SLIDING, kind, self.windows[layer], -n_held), []).append(
                layer
            )
        return [groups[key] for key in sorted(groups)]


def _track(
    layers: list[int], cache: int, described: _Description,
    found: Mapping[int, Mapping[str, HeadArray]], cells: CellTable,
) -> HeadsTrack:  # fmt: skip
    arrays = [found[layer][role] for role in "kv" for layer in layers]
    specs = []
    for index, array in enumerate(arrays):
        n_heads, _, head_dim = array.bits.shape
        role = "k" if index < len(layers) else "v"
        row_bytes = array.dtype.row_bytes(n_heads * head_dim)
        specs.append(TensorSpec(index % len(layers), role, array.dtype, row_bytes))
    attributes: dict[str, Any] = {
        "kind": described.kinds[layers[0]],
        "layers": layers,
        "n_kv_heads": [array.bits.shape[0] for array in arrays[: len(layers)]],
    }
    if attributes["kind"] == SLIDING:
        attributes["window"] = described.windows[layers[0]]
    first = described.n_seen - arrays[0].bits.shape[1]
    own = CellTable(
        cells.pos[first:], cells.seq_counts[first:], cells.seq_ids[first:], cells.ext[first:]
    )
    return HeadsTrack(cache, 0, own, specs, attributes, [array.bits for array in arrays])


# --- metadata -------------------------------------------------------------------------------------


def parse_json(text: str | bytes, where: str) -> Any:
    """JSON without repeated keys; `DamagedError` if it is none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key occurs twice")
        return made

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        first = str(error).split("\n")[0][:80]
        raise DamagedError(f"{where}: the header is no valid JSON ({first})") from None


def read_facts(values: Any, where: str) -> dict[str, Any]:
    """Facts as an archive can hold them: strings, numbers, truth values and lists of one kind."""
    if not isinstance(values, dict) or len(values) > MAX_LAYERS:
        raise DamagedError(f"{where}: the facts are no table")
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        kinds = {type(item) for item in items}
        if not _fits(name):
            raise DamagedError(f"{where}: fact {name[:40]!r} has no name that can be written")
        if len(kinds) > 1 or not kinds <= {str, int, float, bool} or not all(map(_fits, items)):
            raise DamagedError(f"{where}: fact {name[:40]!r} is no text, number or list of them")
    return values


def _fits(value: Any) -> bool:
    if isinstance(value, str):
        # JSON can hold halves of characters.
        return not _HALVES.search(value)
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return not isinstance(value, float) or math.isfinite(value)


def _json(facts: Mapping[str, str], key: str, where: str) -> Any:
    if key not in facts:
        raise DamagedError(f"{where}: the metadata has no {key!r}")
    return parse_json(facts[key], where)


def _list(facts: Mapping[str, str], key: str, kind: type, where: str) -> list[Any]:
    values = _json(facts, key, where)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise DamagedError(f"{where}: {key!r} is no list of {kind.__name__}")
    if kind is int and any(not 0 <= value < 1 << 31 for value in values):
        raise DamagedError(f"{where}: {key!r} has a value out of range")
    return values


def _number(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise DamagedError(f"{where}: 'n_seen' is {text[:20]!r}, no number of tokens")
    return int(text)
