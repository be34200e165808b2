"""Caches of transformers models: `from_cache` takes one up, `to_cache` makes one.

A cache is an object in memory, not a file: transformers itself does not save it. Keys and values
are carried in the type they have, bf16 as its 16 bits. The schema of the snapshot is that of
`hf_layout`. Torch and transformers are imported when they are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..archive import Archive
from ..errors import MismatchError, UnsupportedError, UsageError
from ..identity import compare
from ..model import CellTable, ModelIdentity, Snapshot, TensorSpec
from .hf_layout import (
    FORMAT,
    FULL,
    LATENT,
    SLIDING,
    as_transformers,
    check_layout,
    identity_of_config,
    in_transformers,
    is_latent,
    plain_dtype,
    text_cells,
    text_config,
    with_identity,
)

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

_TORCH_NAMES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
_TSC_HEADER = b"\x89TSC"


# --- taking a cache up ----------------------------------------------------------------------------


def from_cache(
    cache: Any,
    *,
    tokens: Any,
    model: Any = None,
    attention_mask: Any = None,
) -> Snapshot:
    """The snapshot of a transformers cache, to be packed (`tscfile.pack`) or appended.

    ``cache``: a ``DynamicCache`` or ``StaticCache`` of full-attention and sliding-window layers, or
    a sequence of ``(keys, values)`` as older versions had, each ``[1, heads, n, head_dim]`` in
    float16, bfloat16 or float32. ``tokens``: ids of the tokens the cache was made of, ``[n]`` or
    ``[1, n]``; there may be more of them than the cache has seen, not fewer. ``model``: the model,
    its configuration or a `ModelIdentity` of its GGUF file, for the facts that a resume compares.
    ``attention_mask``: that of the prefill, if there was one; padding is refused.

    Rows are read from the cache when they are packed, so do not change it in place meanwhile; what
    a static cache holds is copied.

    Raises `UnsupportedError` for kinds of layers and element types that are not carried (by name),
    `MismatchError` where cache and tokens cannot belong together, `UsageError` for more than one
    sequence, an empty cache, or tokens that are no list of ids.
    """
    ids = token_ids(tokens)
    config = config_of(model)
    check_mask(attention_mask, len(ids))
    layers = read_layers(cache, config)
    n_seen = _count_seen(layers, len(ids))
    tracks = [_track(group, cache_number, n_seen) for cache_number, group in _groups(layers)]
    return Snapshot(
        tokens=ids,
        tracks=tracks,
        source={"format": FORMAT, "n_layers": len(layers)},
        identity=_identity_for(model, config),
    )


@dataclass(frozen=True)
class CacheLayer:
    """One layer of a cache: tensors ``[1, heads, n_held, head_dim]``, None if it has none.

    ``n_seen``: how many tokens it has been given; -1 where it cannot tell.
    """

    number: int
    kind: str
    keys: Any = None
    values: Any = None
    n_seen: int = -1
    window: int = 0

    @property
    def n_held(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[-2])


def token_ids(tokens: Any) -> NDArray[np.int32]:
    """Ids as int32 ``[n]`` from a list, an array or a tensor of one row."""
    if hasattr(tokens, "detach"):
        tokens = tokens.detach().cpu().numpy()
    ids = np.asarray(tokens)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim == 2:
        raise UsageError(f"{len(ids)} rows of tokens: a snapshot is one conversation, take one row")
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UsageError("tokens must be a list of integer ids")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 31:
        raise UsageError("token ids must lie between 0 and 2^31 - 1")
    return ids.astype(np.int32)


def config_of(model: Any) -> Any:
    """The decoder's configuration of a model or configuration; None if there is none."""
    if model is None or isinstance(model, ModelIdentity):
        return None
    return text_config(getattr(model, "config", model))


def _identity_for(model: Any, config: Any) -> ModelIdentity:
    if isinstance(model, ModelIdentity):
        return in_transformers(model)
    return ModelIdentity() if config is None else identity_of_config(config)


def check_mask(mask: Any, n_tokens: int) -> None:
    if mask is None:
        return
    values = np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask).reshape(-1)
    if not values.all():
        raise MismatchError(
            f"the attention mask hides {int((values == 0).sum())} of {len(values)} tokens: a "
            "padded cache has its tokens at other positions; prefill without padding"
        )


def read_layers(cache: Any, config: Any) -> list[CacheLayer]:
    if isinstance(cache, tuple | list):
        layers = [_legacy_layer(number, each) for number, each in enumerate(cache)]
    else:
        if not hasattr(cache, "layers"):
            raise UnsupportedError(
                f"a cache of kind {type(cache).__name__} is not carried; DynamicCache and "
                "StaticCache are"
            )
        layers = [_read_layer(number, each) for number, each in enumerate(cache.layers)]
    if not any(layer.n_held for layer in layers):
        raise UsageError("the cache is empty: there is nothing to keep")
    for layer in layers:
        _check_tensors(layer)
    if config is not None and is_latent(config):
        layers = [
            CacheLayer(each.number, LATENT, each.keys, each.values, each.n_seen) for each in layers
        ]
    return layers


def _legacy_layer(number: int, entry: Sequence[Any]) -> CacheLayer:
    if len(entry) not in (2, 3):
        raise UnsupportedError(
            f"layer {number} has {len(entry)} tensors; keys and values are carried"
        )
    keys, values = entry[:2]
    window = entry[2] if len(entry) == 3 else None
    if keys is None or values is None:
        return CacheLayer(number, FULL)
    if window is None:
        return CacheLayer(number, FULL, keys, values, int(keys.shape[-2]))
    # How much it has seen is not told once the window is full.
    n_held, size = int(keys.shape[-2]), int(window)
    return CacheLayer(number, SLIDING, keys, values, n_held if n_held < size - 1 else -1, size)


def _read_layer(number: int, layer: Any) -> CacheLayer:
    kind = type(layer).__name__
    read = _READERS.get(kind)
    if read is None:
        raise UnsupportedError(
            f"layer {number} is a {kind}; carried are {', '.join(_READERS)}"
        )
    if not layer.is_initialized or layer.keys is None or not layer.keys.numel():
        return CacheLayer(number, FULL)
    return read(number, layer)


def _dynamic(number: int, layer: Any) -> CacheLayer:
    return CacheLayer(number, FULL, layer.keys, layer.values, int(layer.keys.shape[-2]))


def _dynamic_sliding(number: int, layer: Any) -> CacheLayer:
    return CacheLayer(
        number, SLIDING, layer.keys, layer.values, int(layer.cumulative_length),
        int(layer.sliding_window),
    )  # fmt: skip


def _static(number: int, layer: Any) -> CacheLayer:
    n = int(layer.cumulative_length)
    # A static layer writes into its tensors, so the rows are copied now.
    return CacheLayer(
        number, FULL, layer.keys[:, :, :n].clone(), layer.values[:, :, :n].clone(), n
    )


def _static_sliding(number: int, layer: Any) -> CacheLayer:
    n = int(layer.cumulative_length_int)
    held = min(n, int(layer.max_cache_len))
    return CacheLayer(
        number, SLIDING, layer.keys[:, :, :held].clone(), layer.values[:, :, :held].clone(), n,
        int(layer.max_cache_len),
    )  # fmt: skip


_READERS = {
    "DynamicLayer": _dynamic,
    "DynamicSlidingWindowLayer": _dynamic_sliding,
    "StaticLayer": _static,
    "StaticSlidingWindowLayer": _static_sliding,
    "DummyLayer": _dynamic,  # has no tensors
}
"""Layers that are carried, by the name of their class: a subclass may mean something else."""


def _check_tensors(layer: CacheLayer) -> None:
    if layer.keys is None:
        return
    for tensor in (layer.keys, layer.values):
        if tensor.ndim != 4:
            raise UnsupportedError(
                f"layer {layer.number} has tensors of {tensor.ndim} dimensions instead of "
                "[1, heads, tokens, head_dim]"
            )
        if tensor.shape[0] != 1:
            raise UsageError(
                f"the cache is of {tensor.shape[0]} sequences; a snapshot is one conversation: "
                "take one out with cache.batch_select_indices"
            )
        plain_dtype(_dtype_name(tensor))
    if layer.keys.shape[1:3] != layer.values.shape[1:3]:
        raise MismatchError(
            f"keys and values of layer {layer.number} differ in heads or tokens: "
            f"{tuple(layer.keys.shape)} and {tuple(layer.values.shape)}"
        )


def _dtype_name(tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return {torch_name: ours for ours, torch_name in _TORCH_NAMES.items()}.get(name, name)


def _count_seen(layers: list[CacheLayer], n_tokens: int) -> int:
    """How many tokens the cache has seen; `MismatchError` if that cannot be right."""
    filled = [layer for layer in layers if layer.n_held]
    told = {layer.n_seen for layer in filled if layer.n_seen >= 0}
    if len(told) > 1:
        raise MismatchError(
            f"the layers have seen different numbers of tokens ({sorted(told)}); a sliding-window "
            "layer that was filled by hand needs its cumulative_length set"
        )
    if not told:
        raise MismatchError(
            "sliding-window layers alone, as tuples, do not say how many tokens they have seen; "
            "give the cache object"
        )
    n_seen = told.pop()
    if n_seen > n_tokens:
        raise MismatchError(
            f"the cache has seen {n_seen} tokens and {n_tokens} are given: token list and cache do "
            "not belong together"
        )
    all_sliding = all(layer.kind == SLIDING for layer in filled)
    if all_sliding and n_tokens > n_seen + 1 and all(
        layer.n_held == n_seen == layer.window - 1 for layer in filled
    ):  # fmt: skip
        raise MismatchError(
            f"the cache says that it has seen {n_seen} tokens, exactly what its windows hold, and "
            f"{n_tokens} are given: set cumulative_length, or give the tokens it has seen"
        )
    return n_seen


def _groups(layers: list[CacheLayer]) -> list[tuple[int, list[CacheLayer]]]:
    """Layers of one kind, window and length together; the fullest group first."""
    groups: dict[tuple[bool, str, int, int], list[CacheLayer]] = {}
    for layer in layers:
        if layer.n_held:
            key = (layer.kind == SLIDING, layer.kind, -layer.window, -layer.n_held)
            groups.setdefault(key, []).append(layer)
    return list(enumerate(groups[key] for key in sorted(groups)))


def _track(group: list[CacheLayer], cache: int, n_seen: int) -> TensorTrack:
    first = group[0]
    attributes: dict[str, Any] = {
        "kind": first.kind,
        "layers": [layer.number for layer in group],
        "n_kv_heads": [int(layer.keys.shape[1]) for layer in group],
    }
    if first.kind == SLIDING:
        attributes["window"] = first.window
    tensors = [layer.keys for layer in group] + [layer.values for layer in group]
    specs = []
    for index, tensor in enumerate(tensors):
        dtype = plain_dtype(_dtype_name(tensor))
        n_channels = int(tensor.shape[1] * tensor.shape[3])
        role = "k" if index < len(group) else "v"
        specs.append(
            TensorSpec(index % len(group), role, dtype, dtype.row_bytes(n_channels))
        )
    cells = text_cells(np.arange(n_seen - first.n_held, n_seen))
    return TensorTrack(cache, 0, cells, specs, attributes, tensors)


@dataclass
class TensorTrack:
    """A `tscfile.model.Track` over torch tensors ``[1, heads, n, head_dim]``."""

    cache: int
    stream: int
    cells: CellTable
    tensors: Sequence[TensorSpec]
    attributes: dict[str, Any]
    data: Sequence[Any] = field(repr=False)

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Frames ``start`` to ``stop``, uint8 ``[stop - start, row_bytes]`` for each tensor."""
        if not 0 <= start <= stop <= len(self.cells):
            raise IndexError(f"frames {start} to {stop} of a track of {len(self.cells)}")
        chosen = range(len(self.tensors)) if tensors is None else tensors
        return [_tensor_rows(self.data[i], start, stop) for i in chosen]


def _tensor_rows(tensor: torch.Tensor, start: int, stop: int) -> NDArray[np.uint8]:
    import torch

    rows = tensor.detach()[0, :, start:stop].transpose(0, 1).reshape(stop - start, -1)
    # bf16 has no counterpart in NumPy: its bytes are all that is wanted.
    as_bytes: NDArray[np.uint8] = rows.cpu().contiguous().view(torch.uint8).numpy()
    return as_bytes


# --- making a cache -------------------------------------------------------------------------------


def to_cache(
    source: Any,
    snapshot: int = -1,
    device: Any = "cpu",
    dtype: Any = None,
    model: Any = None,
) -> DynamicCache:
    """A transformers cache of a snapshot, ready to be given as ``past_key_values``.

    ``source``: an archive (path or open), a file that `tscfile.sources.open_source` reads, or a
    `Snapshot`. ``snapshot``: its number in an archive. ``dtype``: a torch type, by default the
    stored one. ``model``: the model that is to use the cache, or its configuration; then its
    facts, kinds of layers and (of a model) element type are compared with the snapshot's. It is
    needed for states of llama.cpp with sliding windows, or without recorded head size. Keys that
    came from llama.cpp are put in transformers' order of channels (`hf_layout`).

    The cache holds what was seen, not logits: a prompt that is no longer than the cache needs its
    last token computed again (`tscfile.resume.transformers.prepare` does it).

    Raises `MismatchError` for another model, layers or type, `UnsupportedError` for what has no
    counterpart in transformers (named), and what reading the archive raises.
    """
    with opened_snapshot(source, snapshot) as state:
        state.need_frames()
        return build_cache(as_hf_snapshot(state, model, dtype), device, dtype, model)


@contextmanager
def opened_snapshot(source: Any, number: int) -> Iterator[Snapshot]:
    """Snapshot ``number`` of whatever ``source`` is; see `to_cache`."""
    from ..unpacking import choose_snapshot

    wanted = None if number == -1 else number
    if isinstance(source, Snapshot):
        yield source
    elif isinstance(source, Archive):
        yield choose_snapshot(source, wanted)
    elif not isinstance(source, str | os.PathLike):
        raise UsageError(f"a {type(source).__name__} is no archive, path or snapshot")
    elif _is_archive(source):
        with Archive(source) as archive:
            yield choose_snapshot(archive, wanted)
    else:
        from . import open_source

        yield open_source(source)


def _is_archive(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_TSC_HEADER)) == _TSC_HEADER


def as_hf_snapshot(state: Snapshot, model: Any, dtype: Any = None) -> Snapshot:
    """The snapshot in transformers' form, checked against ``model`` if there is one."""
    config = config_of(model)
    identity = _identity_for(model, config)
    if state.source.get("format") != FORMAT:
        kinds, windows = layer_kinds(config) if config is not None else (None, [0])
        state = _dequantized(state, identity, dtype)
        if kinds and SLIDING in kinds and len(state.tracks) == 1:
            _check_within_window(state, min(size for size in windows if size))
        state = as_transformers(state, identity, kinds, max(windows))
    check_layout(state)
    differences = compare(state.identity, identity)
    if differences:
        raise MismatchError(f"the cache was made by another model: {'; '.join(differences)}")
    return state


def _dequantized(state: Snapshot, identity: ModelIdentity, dtype: Any) -> Snapshot:
    quantized = any(t.dtype.is_quantized for track in state.tracks for t in track.tensors)
    if dtype is None or not quantized:
        return state
    from ..retype import retype

    wanted = {f"torch.{name}": ours for ours, name in _TORCH_NAMES.items()}.get(str(dtype))
    if wanted is None:
        raise UnsupportedError(f"a cache of {dtype} is not made; {', '.join(_TORCH_NAMES)} are")
    facts = {k: v for k, v in identity.facts.items() if k.startswith("head_dim")}
    return retype(with_identity(state, ModelIdentity(facts)), wanted)


def _check_within_window(state: Snapshot, window: int) -> None:
    n = 1 + max((int(t.cells.pos.max()) for t in state.tracks if len(t.cells)), default=-1)
    if n > window:
        raise MismatchError(
            f"the model has sliding windows of {window} positions; this state was computed by "
            f"llama.cpp without them and has {n}"
        )


def layer_kinds(config: Any) -> tuple[list[str], list[int]]:
    """Kind of each layer, '' for one without a cache; window of each, 0 for one without.

    `UnsupportedError` names the first layer of a kind that is not carried.
    """
    _need_transformers()
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, options = get_layer_types_and_kwargs(config)
    kinds: list[str] = []
    for number, name in enumerate(types):
        if name not in _CONFIG_KINDS:
            raise UnsupportedError(
                f"layer {number} of the model is of kind {name}, which is not carried; "
                f"{', '.join(_CONFIG_KINDS)} are"
            )
        kinds.append(LATENT if is_latent(config) else _CONFIG_KINDS[name])
    return kinds, [int(each.get("sliding_window", 0)) for each in options]


_CONFIG_KINDS = {
    "full_attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": SLIDING,
    "dummy": "",
}


def _need_transformers() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"a transformers cache needs {error.name}: pip install 'tscfile[hf]'"
        ) from None


def build_cache(
    state: Snapshot, device: Any, dtype: Any, model: Any, n_frames: int | None = None
) -> DynamicCache:
    """A cache of a snapshot in transformers' form, cut to its first ``n_frames`` positions.

    `MismatchError` if a sliding-window layer no longer holds what such a cut needs.
    """
    _need_transformers()
    from transformers import DynamicCache

    config = config_of(model)
    n_seen = seen(state)
    n_keep = n_seen if n_frames is None else n_frames
    if not 0 < n_keep <= n_seen:
        raise UsageError(f"{n_keep} frames of a cache of {n_seen}")
    entries: list[tuple[Any, ...]] = [(None, None)] * int(state.source["n_layers"])
    for track in state.tracks:
        for layer, entry in _track_entries(track, n_keep, device, dtype):
            entries[layer] = entry
    _check_layers(entries, state, config)
    _check_dtype(entries, model)
    if config is not None:
        entries = [entry[:2] for entry in entries]
    made = DynamicCache(ddp_cache_data=entries, config=config)
    made_layers: list[Any] = list(made.layers)
    for each in made_layers:
        # A layer that is filled at once counts what it was given, not what had been before.
        if getattr(each, "is_sliding", False) and each.is_initialized:
            each.cumulative_length = n_keep
    return made


def seen(state: Snapshot) -> int:
    """How many tokens a cache in transformers' form has seen."""
    n_seen = {int(track.cells.pos[-1]) + 1 for track in state.tracks if len(track.cells)}
    if len(n_seen) != 1:
        raise MismatchError(
            "the snapshot holds no cells" if not n_seen
            else f"the tracks end at different positions ({sorted(n_seen)})"
        )  # fmt: skip
    return n_seen.pop()


def _track_entries(
    track: Any, n_keep: int, device: Any, dtype: Any
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Model layer and tensors ``[1, heads, n, head_dim]`` of each layer of a track."""
    kind, window = track.attributes["kind"], track.attributes.get("window")
    first_held = int(track.cells.pos[0])
    first = max(0, n_keep - window + 1) if kind == SLIDING else 0
    if first < first_held:
        raise MismatchError(
            f"a sliding-window layer holds positions {first_held} to {int(track.cells.pos[-1])} "
            f"and {first} is needed to go on after {n_keep} tokens: it cannot step back; add at "
            "least one token to what was cached"
        )
    all_rows = track.read(first - first_held, n_keep - first_held)
    layers, heads = track.attributes["layers"], track.attributes["n_kv_heads"]
    made: dict[tuple[int, str], Any] = {}
    for spec, rows in zip(track.tensors, all_rows, strict=True):
        made[spec.layer, spec.role] = _to_tensor(rows, spec, heads[spec.layer], device, dtype)
    size = () if kind != SLIDING else (_window_tensor(window),)
    for index, layer in enumerate(layers):
        yield layer, (made[index, "k"], made[index, "v"], *size)


def _to_tensor(
    rows: NDArray[np.uint8], spec: TensorSpec, n_heads: int, device: Any, dtype: Any
) -> Any:
    import torch

    plain_dtype(spec.dtype.name)
    stored = getattr(torch, _TORCH_NAMES[spec.dtype.name])
    heads = np.ascontiguousarray(rows).view(f"<i{spec.dtype.block_bytes}")
    heads = np.ascontiguousarray(heads.reshape(len(rows), n_heads, -1).swapaxes(0, 1))
    tensor = torch.from_numpy(heads).view(stored)[None]
    return tensor.to(device=device, dtype=dtype or stored)


def _window_tensor(window: int) -> Any:
    import torch

    return torch.tensor(window, dtype=torch.long)


def _check_layers(entries: Sequence[tuple[Any, ...]], state: Snapshot, config: Any) -> None:
    """`MismatchError` unless the model's layers can take the snapshot's."""
    if config is None:
        return
    kinds, windows = layer_kinds(config)
    if len(kinds) != len(entries):
        raise MismatchError(f"the cache has {len(entries)} layers, the model {len(kinds)}")
    stored = {
        layer: track.attributes for track in state.tracks for layer in track.attributes["layers"]
    }
    for number, kind in enumerate(kinds):
        found = stored.get(number, {"kind": ""})
        # A cache made without a configuration keeps all of a sliding layer's positions.
        cut = kind == SLIDING and found["kind"] == FULL
        if found["kind"] != kind and not cut:
            raise MismatchError(
                f"layer {number} of the cache is {found['kind'] or 'without a cache'}, that of "
                f"the model {kind or 'without one'}"
            )
        if kind == SLIDING and found.get("window", windows[number]) != windows[number]:
            raise MismatchError(
                f"the window of layer {number} is {found['window']} in the cache and "
                f"{windows[number]} in the model"
            )


def _check_dtype(entries: Sequence[tuple[Any, ...]], model: Any) -> None:
    """`MismatchError` if the model computes in another type than the cache would have."""
    wanted = getattr(model, "dtype", None) if hasattr(model, "parameters") else None
    found = {entry[0].dtype for entry in entries if entry[0] is not None}
    if wanted is not None and found - {wanted}:
        names = ", ".join(sorted(str(each) for each in found))
        raise MismatchError(
            f"the cache is {names} and the model computes in {wanted}: transformers would widen "
            f"the cache or fail; give dtype={wanted}"
        )
