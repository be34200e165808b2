"""Continuing a snapshot in transformers, behind guards.

transformers takes any cache whose shapes fit, and some whose shapes do not, and answers with wrong
text instead of an error. `prepare` makes the cache and the inputs so that this cannot happen:

    prepared = prepare("session.tsc", model, input_ids)
    out = model.generate(**prepared.inputs, max_new_tokens=64)

`check` is for a cache that comes from elsewhere. What they look for, and what happens without:

===========================================  =====================================================
other tokens than those of the cache         continues the cached text and not the prompt
a cache as long as the prompt                the last token is attended to twice
keys and values of another type              widened without a word, or an error deep inside
a sliding layer filled by hand               its window begins at the wrong position
left padding                                 tokens are at other positions than the model assumes
another model of the same shape              text of no meaning
===========================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MismatchError, UsageError
from ..sources.hf_cache import (
    CacheLayer,
    as_hf_snapshot,
    build_cache,
    check_mask,
    config_of,
    layer_kinds,
    opened_snapshot,
    read_layers,
    seen,
    token_ids,
)
from ..sources.hf_layout import SLIDING
from .guards import MAX_ERROR, MAX_ERROR_LOSSY, PROBE_TOKENS, relative_error

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache


@dataclass(frozen=True)
class Prepared:
    """A cache and what is to be computed on top of it.

    ``input_ids``: int64 ``[1, n]``, the whole conversation, as ``generate`` wants it. ``new_ids``:
    the part that is not in the cache, as a call of the model wants it; at least one token.
    ``n_reused``: positions that come from the snapshot. ``probe_error``: largest relative error of
    the rows that were computed again, None if none were. ``n_recomputed``: positions of the
    snapshot that the model has read again in place of taking its rows. ``notes``: what was
    converted or skipped.
    """

    cache: DynamicCache
    input_ids: Tensor
    new_ids: Tensor
    n_reused: int
    probe_error: float | None
    n_recomputed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments for ``generate``. The mask hides nothing: left out, it is guessed."""
        import torch

        return {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids),
            "past_key_values": self.cache,
        }


def prepare(
    source: Any,
    model: Any,
    input_ids: Any = None,
    *,
    snapshot: int = -1,
    probe: bool = True,
    recompute: bool = False,
) -> Prepared:
    """A snapshot as a cache of ``model``, and the inputs that go on from it.

    ``source``, ``snapshot``: see `tscfile.to_cache`. ``input_ids``: the conversation from its first
    token on, ``[n]`` or ``[1, n]``, by default the tokens of the snapshot; it must begin with the
    cached ones. Where it does not go beyond them, the cache is cut back so that its last token is
    computed again: logits are not part of a cache. Rows are converted to the type that the model
    computes in. ``probe`` computes the first tokens again and compares their rows. ``recompute``:
    the model reads the snapshot's tokens again, so that nothing of a lossy tier is in the cache; an
    archive of tier ``tokens`` needs it, and then only facts tell the model from another one of the
    same shape.

    Raises `MismatchError` where the cache cannot be that of the model or of these tokens, or where
    a sliding window cannot be cut back; `UsageError` and `UnsupportedError` as `to_cache`.
    """
    import torch

    with opened_snapshot(source, snapshot) as opened:
        if not recompute:
            opened.need_frames()
        state = as_hf_snapshot(opened, model, model.dtype)
        n_seen = seen(state)
        ids = token_ids(state.tokens if input_ids is None else input_ids)
        _check_prefix(token_ids(state.tokens)[:n_seen], ids)
        n_keep = min(n_seen, len(ids) - 1)
        if n_keep < 1:
            raise UsageError(f"{len(ids)} tokens are nothing to resume: compute them")
        notes, error = _conversions(state, model), None
        if not opened.n_absent:
            cache = build_cache(state, model.device, model.dtype, model, n_keep)
    reason = "the archive does not hold them"
    if not opened.n_absent:
        error = check(
            cache, model, ids[:n_keep], ids, probe=probe, exact=opened.exact
        )  # fmt: skip
        reason = "no layer holds the first tokens" if probe else "switched off"
    if error is None:
        notes.append(f"rows were not computed again for comparison: {reason}")
    if recompute:
        start = torch.as_tensor(ids[:n_keep], dtype=torch.int64, device=model.device)[None]
        with torch.no_grad():
            cache = model(input_ids=start, use_cache=True, logits_to_keep=1).past_key_values
    whole = torch.as_tensor(ids, dtype=torch.int64, device=model.device)[None]
    reused, computed = (0, n_keep) if recompute else (n_keep, 0)
    return Prepared(cache, whole, whole[:, n_keep:], reused, error, computed, tuple(notes))


def check(
    cache: Any,
    model: Any,
    tokens: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    *,
    probe: bool = True,
    exact: bool = True,
) -> float | None:
    """`MismatchError` unless ``model`` can go on from ``cache``; the largest error of the probe.

    ``tokens``: ids of exactly the tokens that the cache has seen. ``input_ids``: what is to be
    given to ``generate``: those and at least one more. ``attention_mask``: the one of the prefill
    or of the call to come. ``exact``: False for rows from a lossy tier, which are near those that
    the model computes. Returns None where no row was computed again.
    """
    config = config_of(model)
    ids = token_ids(tokens)
    check_mask(attention_mask, len(ids))
    layers = read_layers(cache, config)
    _check_kinds(layers, config)
    _check_seen(layers, len(ids))
    _check_types(layers, model)
    if input_ids is not None:
        whole = token_ids(input_ids)
        _check_prefix(ids, whole)
        if len(whole) <= len(ids):
            raise MismatchError(
                f"the cache holds all {len(ids)} tokens of the prompt and transformers would "
                "compute the last one a second time: cut the cache with crop(-1) first"
            )
    bound = MAX_ERROR if exact else MAX_ERROR_LOSSY
    return _probe(layers, model, ids, bound) if probe else None


# --- what is compared -----------------------------------------------------------------------------


def _check_prefix(cached: NDArray[np.int32], ids: NDArray[np.int32]) -> None:
    n = min(len(cached), len(ids))
    differing = np.flatnonzero(cached[:n] != ids[:n])
    if len(differing):
        at = int(differing[0])
        raise MismatchError(
            f"token {at} of the input is {int(ids[at])} and that of the cache {int(cached[at])}: "
            "the cache is of another text, or one of them is padded on the left"
        )


def _check_kinds(layers: Sequence[CacheLayer], config: Any) -> None:
    kinds, windows = layer_kinds(config)
    if len(layers) != len(kinds):
        raise MismatchError(f"the cache has {len(layers)} layers, the model {len(kinds)}")
    for layer, kind, window in zip(layers, kinds, windows, strict=True):
        if bool(layer.n_held) != bool(kind):
            raise MismatchError(
                f"layer {layer.number} has {'no ' if kind else 'a '}cache, in the model it has "
                f"{'one' if kind else 'none'}"
            )
        if layer.kind == SLIDING and (kind != SLIDING or layer.window != window):
            raise MismatchError(
                f"layer {layer.number} of the cache slides over {layer.window} positions, that of "
                f"the model over {window or 'all'}: make the cache with the model's config"
            )


def _check_seen(layers: Sequence[CacheLayer], n_tokens: int) -> None:
    for layer in layers:
        if not layer.n_held or layer.n_seen == n_tokens:
            continue
        hint = (
            "set cumulative_length when a layer is filled by hand"
            if layer.kind == SLIDING
            else "give exactly the cached tokens, and make the cache with the model's config"
        )
        raise MismatchError(
            f"layer {layer.number} of the cache counts {layer.n_seen} tokens and {n_tokens} are "
            f"given: positions and masks would be wrong; {hint}"
        )
    for layer in layers:
        if layer.kind == SLIDING and layer.n_held < min(layer.window - 1, n_tokens):
            raise MismatchError(
                f"layer {layer.number} holds {layer.n_held} positions, its window needs "
                f"{min(layer.window - 1, n_tokens)}"
            )


def _check_types(layers: Sequence[CacheLayer], model: Any) -> None:
    for layer in layers:
        if layer.n_held and layer.keys.dtype != model.dtype:
            raise MismatchError(
                f"layer {layer.number} of the cache is {layer.keys.dtype} and the model computes "
                f"in {model.dtype}: transformers would widen the cache or fail; convert it first"
            )


def _conversions(state: Any, model: Any) -> list[str]:
    stored = sorted({spec.dtype.name for track in state.tracks for spec in track.tensors})
    target = str(model.dtype).removeprefix("torch.")
    same = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
    others = [name for name in stored if same.get(name) != target]
    return [f"rows were converted from {', '.join(others)} to {target}"] if others else []


# --- what is computed -----------------------------------------------------------------------------


def _probe(
    layers: Sequence[CacheLayer], model: Any, ids: NDArray[np.int32], bound: float
) -> float | None:
    """Compute the first tokens again and compare; the largest relative error of a tensor."""
    import torch

    whole = [layer for layer in layers if layer.n_held and layer.n_held == layer.n_seen]
    if not whole:
        return None
    n = min(PROBE_TOKENS, len(ids))
    start = torch.as_tensor(ids[:n], dtype=torch.int64, device=model.device)[None]
    with torch.no_grad():
        made = model(input_ids=start, use_cache=True).past_key_values
    worst = 0.0
    for layer in whole:
        again = made.layers[layer.number]
        for role, old, new in (("keys", layer.keys, again.keys),
                               ("values", layer.values, again.values)):  # fmt: skip
            worst = max(worst, _compare(f"{role} of layer {layer.number}", old, new, n, bound))
    return worst


def _compare(label: str, old: Any, new: Any, n: int, bound: float) -> float:
    n_common = min(n, int(new.shape[-2]))
    if old.shape[1] != new.shape[1] or old.shape[3] != new.shape[3]:
        raise MismatchError(
            f"{label} have heads of shape {tuple(old.shape[1::2])} in the cache and "
            f"{tuple(new.shape[1::2])} in the model"
        )
    # A sliding layer keeps the last of what it was given.
    first = n - n_common
    stored = old[:, :, first:n].detach().float().cpu().numpy()
    computed = new[:, :, -n_common:].detach().float().cpu().numpy()
    error = relative_error(stored, computed)
    if not error <= bound:
        raise MismatchError(
            f"this model and these tokens did not make this cache: computed again from the first "
            f"{n} tokens, {label} differ by {100 * error:.3g} %, {100 * bound:.0f} % are "
            "allowed; use the model of the save, and no left padding"
        )
    return error
