"""A snapshot in another element type: dequantized, rotated where needed, quantized again.

llama.cpp rotates the rows of quantized caches (`tscfile.transforms.rotation`), those of float
caches not. So changing the type of a cache changes more than its numbers, and for quantized types
the head size has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES, DType, dtype_from_name
from .errors import UnsupportedError, UsageError
from .model import CellTable, ModelIdentity, Snapshot, TensorSpec, Track
from .sources.llama_state.target import head_size, resolved_rotation
from .transforms.rotation import rotate, rotation_block

_CHUNK_ELEMENTS = 1 << 20
_F16_MAX = np.float32(65504.0)
_BLOCK = 32

_IQ4_NL = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
_IQ4_NL_BOUNDS = (_IQ4_NL[1:] + _IQ4_NL[:-1]) / 2
_IQ4_NL_TRIALS = range(-7, 8)


def retype(
    snapshot: Snapshot,
    kv_type: str | tuple[str, str],
    *,
    head_dim: int | tuple[int, int] | None = None,
) -> Snapshot:
    """The snapshot with keys and values of another type; rows are converted when they are read.

    ``kv_type`` is one of `tscfile.dtypes.DTYPES` or a pair for keys and values. ``head_dim``
    (or a pair) is needed where the source or the new type is quantized, unless the identity has
    it (``head_dim_k``, ``head_dim_v``). Quantized types are rotated as llama.cpp expects them and
    quantized values are not transposed. Values beyond the range of f16 become its largest.

    llama-server's checkpoint appendix is dropped: its states are of the old type. Raises
    `UsageError` without a head size, `UnsupportedError` where the source does not say whether its
    quantized rows are rotated (versions before 10), or for types without a conversion.
    """
    names = (kv_type, kv_type) if isinstance(kv_type, str) else kv_type
    targets = dict(zip("kv", (dtype_from_name(name) for name in names), strict=True))
    for dtype in targets.values():
        _check_known(dtype)
    identity = _identity_with_head_size(snapshot, head_dim)
    base = replace(snapshot, identity=identity)
    tracks: list[Track] = [_retype_track(base, track, targets) for track in snapshot.tracks]
    opaque = {name: data for name, data in snapshot.opaque.items() if name != "appendix"}
    return replace(base, tracks=tracks, opaque=opaque)


def _identity_with_head_size(
    snapshot: Snapshot, head_dim: int | tuple[int, int] | None
) -> ModelIdentity:
    facts = dict(snapshot.identity.facts)
    if head_dim is not None:
        k, v = (head_dim, head_dim) if isinstance(head_dim, int) else head_dim
        if k < 1 or v < 1:
            raise UsageError(f"a head size of {min(k, v)} channels; give the model's head size")
        facts |= {"head_dim_k": k, "head_dim_v": v}
    return ModelIdentity(facts)


def _retype_track(snapshot: Snapshot, track: Track, targets: dict[str, DType]) -> RetypedTrack:
    tensors, steps = [], []
    for spec in track.tensors:
        step = _plan_step(snapshot, spec, targets[spec.role])
        steps.append(step)
        tensors.append(step.new)
    attributes = dict(track.attributes)
    if any(spec.role == "v" and spec.dtype.is_quantized for spec in tensors):
        attributes["v_trans"] = 0
    return RetypedTrack(
        track.cache, track.stream, track.cells, tensors, attributes, source=track, steps=steps
    )


@dataclass(frozen=True)
class _Step:
    """How one tensor is converted; ``unrotate`` and ``rotate`` are block sizes, 0 for none."""

    old: TensorSpec
    new: TensorSpec
    unrotate: int
    rotate: int

    @property
    def is_identity(self) -> bool:
        return self.old.dtype == self.new.dtype and self.unrotate == self.rotate

    def convert(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Rows uint8 ``[n, old row bytes]`` as uint8 ``[n, new row bytes]``."""
        if self.is_identity:
            return rows
        out = np.empty((len(rows), self.new.row_bytes), dtype=np.uint8)
        for start, stop in _chunks(len(rows), self.old.n_channels):
            values = dequantize(rows[start:stop], self.old.dtype)
            if self.unrotate != self.rotate:
                values = rotate(rotate(values, self.unrotate), self.rotate)
            out[start:stop] = quantize(values, self.new.dtype)
        return out


def _chunks(n_rows: int, n_channels: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // n_channels)
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def _plan_step(snapshot: Snapshot, spec: TensorSpec, target: DType) -> _Step:
    _check_known(spec.dtype)
    old_rotation = _source_rotation(snapshot, spec)
    n_channels = spec.n_channels
    new_rotation = _target_rotation(snapshot, spec, target)
    try:
        row_bytes = target.row_bytes(n_channels)
    except ValueError as error:
        raise UsageError(f"{error}; choose f16, bf16 or f32") from None
    new = TensorSpec(spec.layer, spec.role, target, row_bytes, new_rotation)
    for block in (old_rotation, new_rotation):
        if block and n_channels % block:
            raise UsageError(
                f"{spec.role.upper()} of layer {spec.layer} has {n_channels} channels, no whole "
                f"number of rotation blocks of {block}; check the head size"
            )
    return _Step(replace(spec, rotation=old_rotation), new, old_rotation, new_rotation)


def _source_rotation(snapshot: Snapshot, spec: TensorSpec) -> int:
    rotation = resolved_rotation(snapshot, spec)
    if rotation >= 0:
        return rotation
    if snapshot.source.get("generation") == "F":
        raise _head_size_needed(spec)
    raise UnsupportedError(
        f"{spec.role.upper()} of layer {spec.layer} is {spec.dtype.name} and the state does not "
        "say whether it is rotated; save it with a build of session version 10 or later"
    )


def _target_rotation(snapshot: Snapshot, spec: TensorSpec, target: DType) -> int:
    if not target.is_quantized:
        return 0
    head_dim = head_size(snapshot, spec.role)
    if head_dim is None:
        raise _head_size_needed(spec)
    if spec.n_channels % head_dim:
        raise UsageError(
            f"{spec.role.upper()} of layer {spec.layer} has {spec.n_channels} channels, no whole "
            f"number of heads of {head_dim}; check the head size"
        )
    return rotation_block(spec.role, head_dim)


def _head_size_needed(spec: TensorSpec) -> UsageError:
    return UsageError(
        f"converting {spec.role.upper()} from or to a quantized type needs the head size, which "
        "state files lack; give the head size (--head-dim), or pack with --model"
    )


def _check_known(dtype: DType) -> None:
    if dtype.name not in DTYPES:
        raise UnsupportedError(
            f"element type {dtype.name} cannot be converted; known are {', '.join(DTYPES)}"
        )


@dataclass
class RetypedTrack:
    """A track whose rows are converted as they are read from ``source``."""

    cache: int
    stream: int
    cells: CellTable
    tensors: Sequence[TensorSpec]
    attributes: dict[str, Any]
    source: Track
    steps: Sequence[_Step]

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Frames ``start`` to ``stop``, uint8 ``[stop - start, row_bytes]`` for each tensor."""
        chosen = list(range(len(self.tensors))) if tensors is None else list(tensors)
        rows = self.source.read(start, stop, chosen)
        return [self.steps[i].convert(data) for i, data in zip(chosen, rows, strict=True)]


# Element types -------------------------------------------------------------------------------


def dequantize(rows: NDArray[np.uint8], dtype: DType) -> NDArray[np.float32]:
    """Rows uint8 ``[n, row_bytes]`` of a known type as float32 ``[n, channels]``."""
    if dtype.name == "f32":
        return np.ascontiguousarray(rows).view("<f4")
    if dtype.name == "f16":
        return np.ascontiguousarray(rows).view("<f2").astype(np.float32)
    if dtype.name == "bf16":
        high = np.ascontiguousarray(rows).view("<u2").astype(np.uint32)
        return (high << np.uint32(16)).view(np.float32)
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(np.ascontiguousarray(rows), GGMLQuantizationType(dtype.ggml_id))


def quantize(values: NDArray[np.float32], dtype: DType) -> NDArray[np.uint8]:
    """Float32 ``[n, channels]`` as rows uint8 ``[n, row_bytes]`` of a known type.

    >>> quantize(np.array([[1.0, -2.0]], np.float32), DTYPES["bf16"]).tolist()
    [[128, 63, 0, 192]]
    """
    if dtype.name in _PLAIN:
        plain = np.ascontiguousarray(_PLAIN[dtype.name](values))
        return plain.view(np.uint8).reshape(len(values), -1)
    if dtype.name == "iq4_nl":
        return _quantize_iq4_nl(values)
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(np.ascontiguousarray(values), GGMLQuantizationType(dtype.ggml_id))


def _to_f32(values: NDArray[np.float32]) -> NDArray[Any]:
    return values.astype("<f4", copy=False)


def _to_f16(values: NDArray[np.float32]) -> NDArray[Any]:
    finite = np.isfinite(values)
    return np.where(finite, np.clip(values, -_F16_MAX, _F16_MAX), values).astype("<f2")


def _to_bf16(values: NDArray[np.float32]) -> NDArray[Any]:
    """The upper half of each float, rounded to nearest with ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> 16
    # Rounding would carry a NaN of low payload into infinity.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype("<u2")


_PLAIN: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "f32": _to_f32,
    "f16": _to_f16,
    "bf16": _to_bf16,
}


def _quantize_iq4_nl(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest table entries under the best of a few scales, by least squares per block."""
    blocks = values.reshape(-1, _BLOCK)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)[:, 0]
    best_gain = np.full(len(blocks), -1.0, dtype=np.float32)
    best_scale = np.zeros(len(blocks), dtype=np.float32)
    for trial in _IQ4_NL_TRIALS:
        levels = _IQ4_NL[_nearest_levels(blocks, peak / np.float32(_IQ4_NL[0] + trial))]
        product = (blocks * levels).sum(1)
        energy = (levels * levels).sum(1)
        gain = product * product / energy
        better = gain > best_gain
        best_gain[better] = gain[better]
        best_scale[better] = (product / energy)[better]
    scale = best_scale.astype("<f2")
    codes = _nearest_levels(blocks, scale.astype(np.float32)).astype(np.uint8)
    half = _BLOCK // 2
    packed = codes[:, :half] | (codes[:, half:] << 4)
    out: NDArray[np.uint8] = np.concatenate([scale[:, None].view(np.uint8), packed], axis=1)
    return out.reshape(len(values), -1)


def _nearest_levels(blocks: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.intp]:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    levels: NDArray[np.intp] = np.searchsorted(_IQ4_NL_BOUNDS, blocks * inverse[:, None])
    return levels
