"""Finding the turn that takes keys of one save to those of another (`tscfile.transforms.turning`).

Where the identity tells of the rotary encoding, angles are those that llama.cpp computes for a
shift of positions. Anything else (an unknown model, scaled frequencies) is fitted to the keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .model import ModelIdentity, TensorSpec
from .session_basis import key_turn
from .transforms.block_floats import BLOCK_FLOATS
from .transforms.rope import HALVES, NEIGHBOURS, pair_slices
from .transforms.rotation import rotation_block
from .transforms.turning import FLOATS, Turn, as_doubles, mix

Rows = NDArray[np.uint8]
Doubles = NDArray[np.float64]

_HEAD_SIZES = (32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512)
_ROTATED_PARTS = (1, 2, 4)
"""Of a head's channels all are turned, or the first half or quarter."""

_WORST_FIT = {True: 0.05, False: 1e-4}
"""Of the energy of the keys, quantized or not: rounding to q4_0 or bf16 leaves less."""


def turn_of(identity: ModelIdentity, tensors: Sequence[TensorSpec], shift: int) -> Turn | None:
    """The turn of keys whose positions were moved by ``shift``; None if the identity lacks what
    that takes or tells of frequencies that are scaled in another way than linearly.

    Angles are float32, each from the one before, as in ``ggml_rope_cache_init`` of llama.cpp
    (``ggml/src/ggml-cpu/ops.cpp``): angles of higher precision predict fewer rows.

    >>> facts = {"rope_base": 10000.0, "rope_dim": 2, "rope_scaling": "none",
    ...          "rope_pairing": "neox", "head_dim_k": 2}
    >>> (turn_of(ModelIdentity(facts), [], -1).sin / 2**28).round(6).tolist()
    [-0.841471]
    """
    known = key_turn(identity, tensors)
    if known is None:
        return None
    n_pairs, facts = len(known.inv_freq), identity.facts
    factor = facts["rope_scaling_factor"] if facts["rope_scaling"] == "linear" else 1.0
    ratio = np.float32(math.pow(facts["rope_base"], np.float32(-2.0 / (2 * n_pairs))))
    angles = np.empty(n_pairs, np.float32)
    angle, scale = np.float32(shift), np.float32(1.0 / factor)
    for pair in range(n_pairs):
        angles[pair] = scale * angle
        angle = angle * ratio
    cos, sin = np.cos(angles), np.sin(angles)
    mixed = _mixed(known.head_dim, tensors)[0]
    return Turn.of(
        known.head_dim, known.pairing, cos.astype(np.float64), sin.astype(np.float64), mixed
    )


def fit_turn(
    rows: Sequence[Rows], base: Sequence[Rows], tensors: Sequence[TensorSpec],
    identity: ModelIdentity | None = None,
) -> Turn | None:  # fmt: skip
    """The turn that makes keys of ``base`` nearest to those of ``rows``, the same for all frames.

    One uint8 ``[n, row_bytes]`` a tensor. Head size and pairing are those of the ``identity``, or
    the first of usual ones that explains the keys; None if none does, or no key is of a type that
    is turned.
    """
    keys = [
        (as_doubles(row, tensor.dtype), as_doubles(old, tensor.dtype), tensor)
        for row, old, tensor in zip(rows, base, tensors, strict=True)
        if tensor.role == "k" and tensor.dtype.name in FLOATS | BLOCK_FLOATS
    ]
    if not keys or len({new.shape for new, _, _ in keys}) > 1:
        return None
    new, old = (np.concatenate(part) for part in list(zip(*keys, strict=True))[:2])
    if not (np.isfinite(new).all() and np.isfinite(old).all()):
        return None
    worst = _WORST_FIT[any(tensor.dtype.is_quantized for _, _, tensor in keys)]
    for head_dim, pairing, n_pairs in _candidates(identity, tensors, new.shape[-1]):
        for mixed in _mixed(head_dim, tensors):
            after, before = (mix(part, mixed).reshape(-1, head_dim) for part in (new, old))
            found = _fit(after, before, pairing, n_pairs, worst)
            if found is not None:
                return Turn.of(head_dim, pairing, *found, mixed)
    return None


def _mixed(head_dim: int, tensors: Sequence[TensorSpec]) -> list[int]:
    """How many channels of quantized keys a Hadamard matrix may have mixed, the likeliest first."""
    keys = [t for t in tensors if t.role == "k" and t.dtype.is_quantized]
    said = {max(tensor.rotation, 1) for tensor in keys if tensor.rotation >= 0}
    return sorted(said) or [max(rotation_block("k", head_dim), 1), 1] if keys else [1]


def _candidates(
    identity: ModelIdentity | None, tensors: Sequence[TensorSpec], n_channels: int
) -> Iterator[tuple[int, str, int]]:
    """Head size, pairing, pairs of a head."""
    known = key_turn(identity, tensors) if identity is not None else None
    if known is not None:
        yield known.head_dim, known.pairing, len(known.inv_freq)
        return
    sizes = [size for size in _HEAD_SIZES if not n_channels % size]
    for size in sizes:
        yield size, NEIGHBOURS, size // 2
        for part in _ROTATED_PARTS:
            yield size, HALVES, size // part // 2


def _fit(
    new: Doubles, old: Doubles, pairing: str, n_pairs: int, worst: float
) -> tuple[Doubles, Doubles] | None:  # fmt: skip
    """Cosines and sines by least squares, frames of float64 ``[n, head_dim]`` weighing alike."""
    first, second = pair_slices(2 * n_pairs, pairing)
    a, b, x, y = old[:, first], old[:, second], new[:, first], new[:, second]
    energy = a * a + b * b
    # Rounding errors are relative: a pair weighs as its own size tells.
    weight = 1 / np.maximum(energy, np.finfo(np.float64).tiny)
    weight[energy == 0] = 0
    cos = ((a * x + b * y) * weight).sum(axis=0)
    sin = ((a * y - b * x) * weight).sum(axis=0)
    length = np.hypot(cos, sin)
    if not length.all():
        return None
    cos, sin = cos / length, sin / length
    left = (x - a * cos + b * sin) ** 2 + (y - a * sin - b * cos) ** 2
    rest = ((new - old)[:, 2 * n_pairs :] ** 2).sum()
    if left.sum() + rest > worst * (new * new).sum():
        return None
    return cos, sin
