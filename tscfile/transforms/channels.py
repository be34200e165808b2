"""Rows of a track to frames of real channels and back: element types, RoPE, order of tensors.

A frame is one float32 vector: keys of layer 0 before RoPE, of layer 1, …, then values of layer 0,
… Channels of a head are in the order of a model that pairs halves; sources that pair neighbours
are put into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..model import TensorSpec
from .rope import HALVES, Rope, pair_slices

Rows = NDArray[np.uint8]
Frames = NDArray[np.float32]

_FLOATS = ("f16", "bf16", "f32")


def check_floats(tensors: Sequence[TensorSpec]) -> None:
    """`UnsupportedError` unless every tensor is a plain float type."""
    for tensor in tensors:
        if tensor.dtype.name not in _FLOATS:
            raise UnsupportedError(
                f"keys or values of type {tensor.dtype.name} have no lossy tier; "
                "pack them with --tier lossless"
            )
        if tensor.rotation:
            raise UnsupportedError("rotated keys or values have no lossy tier; use --tier lossless")


def tensor_order(tensors: Sequence[TensorSpec]) -> list[int]:
    """Indices of ``tensors`` in the order of a frame's channels."""
    return sorted(range(len(tensors)), key=lambda i: (tensors[i].role != "k", tensors[i].layer))


def to_frames(
    rows: Sequence[Rows], tensors: Sequence[TensorSpec], pos: NDArray[np.int32],
    rope: Rope, head_dim: int, pairing: str,
) -> Frames:  # fmt: skip
    """Float32 ``[n_frames, n_channels]`` from one uint8 ``[n_frames, row_bytes]`` per tensor."""
    order = tensor_order(tensors)
    frames = np.concatenate([_as_float(rows[i], tensors[i].dtype.name) for i in order], axis=1)
    heads = _heads(_keys(frames, tensors), head_dim)
    if pairing != HALVES:
        heads = _reorder(heads, len(rope.inv_freq), pairing, HALVES)
    _keys(frames, tensors)[:] = _flat(rope.undo(heads, pos))
    return frames


def from_frames(
    frames: Frames, tensors: Sequence[TensorSpec], pos: NDArray[np.int32],
    rope: Rope, head_dim: int, pairing: str,
) -> list[Rows]:  # fmt: skip
    """Undo `to_frames`, rounding to the element type, which all tensors share.

    ``frames`` is overwritten.
    """
    heads = rope.apply(_heads(_keys(frames, tensors), head_dim), pos)
    if pairing != HALVES:
        heads = _reorder(heads, len(rope.inv_freq), HALVES, pairing)
    _keys(frames, tensors)[:] = _flat(heads)
    stored = _as_rows(frames, tensors[0].dtype.name)
    rows: list[Rows] = [stored[:0]] * len(tensors)
    at = 0
    for i in tensor_order(tensors):
        rows[i] = stored[:, at : at + tensors[i].row_bytes]
        at += tensors[i].row_bytes
    return rows


def _keys(frames: Frames, tensors: Sequence[TensorSpec]) -> Frames:
    """The part of ``frames`` that the keys of all layers are: the first channels."""
    return frames[:, : sum(tensor.n_channels for tensor in tensors if tensor.role == "k")]


def _heads(values: Frames, head_dim: int) -> Frames:
    return values.reshape(len(values), -1, head_dim).transpose(1, 0, 2)


def _flat(heads: Frames) -> Frames:
    return np.ascontiguousarray(heads.transpose(1, 0, 2)).reshape(heads.shape[1], -1)


def _reorder(heads: Frames, n_pairs: int, source: str, target: str) -> Frames:
    out = heads.copy()
    for to, of in zip(
        pair_slices(2 * n_pairs, target), pair_slices(2 * n_pairs, source), strict=True
    ):
        out[..., to] = heads[..., of]
    return out


def _as_float(rows: Rows, dtype: str) -> Frames:
    rows = np.ascontiguousarray(rows)
    if dtype == "f16":
        return rows.view("<f2").astype(np.float32)
    if dtype == "bf16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return rows.view("<f4").astype(np.float32)


def _as_rows(values: Frames, dtype: str) -> Rows:
    if dtype == "f16":
        with np.errstate(over="ignore"):
            stored = values.astype("<f2")
    elif dtype == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # To nearest, ties to even.
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    else:
        stored = values.astype("<f4")
    return np.ascontiguousarray(stored).view(np.uint8).reshape(len(values), -1)
