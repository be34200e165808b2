"""Stored keys turned by given angles, the same bits on every machine.

A cache whose positions were moved holds keys that were turned once more. A *turn* has the cosine
and sine of each channel pair as integers, so that turning takes no function that machines compute
differently; ``spec/codecs/difference.md`` gives the order of every rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bytestream import ByteReader, ByteWriter
from ..dtypes import DType
from ..errors import DamagedError
from ..model import TensorSpec
from .block_floats import BLOCK_FLOATS, pack, unpack
from .rope import HALVES, NEIGHBOURS, pair_slices

Rows = NDArray[np.uint8]
Doubles = NDArray[np.float64]

TURN_BITS = 28
"""Cosines and sines are stored in units of 2^-28: 24 bits of a f32 times 29 are exact in a f64."""
MOST_TURN = 2 << TURN_BITS
MAX_HEAD = 1 << 16
MAX_CHANNELS = 1 << 20
"""Channels of a tensor that is turned, and values that are turned at a time: memory is bounded."""

FLOATS = frozenset({"f16", "bf16", "f32"})
_PAIRINGS = (HALVES, NEIGHBOURS)
_NO_TURN = 0


@dataclass(frozen=True)
class Turn:
    """How the keys of every head are turned: pair ``(x, y)`` becomes ``(x·c − y·s, x·s + y·c)``.

    ``cos``, ``sin``: int32 ``[m]`` in units of 2^-28, of the ``m`` pairs of a head's first ``2m``
    channels; none beyond ±2^29. ``mixed``: channels that a Hadamard matrix mixed before they were
    stored (`tscfile.transforms.rotation`), a power of two; 1 where there was none.
    """

    head_dim: int
    pairing: str
    cos: NDArray[np.int32]
    sin: NDArray[np.int32]
    mixed: int = 1

    @classmethod
    def of(
        cls, head_dim: int, pairing: str, cos: Doubles, sin: Doubles, mixed: int = 1
    ) -> Turn:  # fmt: skip
        """Of real cosines and sines.

        >>> Turn.of(2, "norm", np.ones(1), np.zeros(1)).cos.tolist()
        [268435456]
        """
        stored = [np.rint(np.ldexp(part, TURN_BITS)).astype(np.int32) for part in (cos, sin)]
        return cls(head_dim, pairing, stored[0], stored[1], mixed)

    def takes(self, tensor: TensorSpec) -> bool:
        """Is this a tensor whose rows are turned: keys of a type that is, in whole heads?"""
        if tensor.role != "k" or tensor.dtype.name not in FLOATS | BLOCK_FLOATS:
            return False
        n = tensor.n_channels
        return n <= MAX_CHANNELS and not n % self.head_dim and not n % self.mixed


def write_turn(writer: ByteWriter, turn: Turn | None) -> None:
    if turn is None:
        writer.u8(_NO_TURN)
        return
    writer.u8(1 + _PAIRINGS.index(turn.pairing)).u8(turn.mixed.bit_length() - 1)
    writer.uvarint(turn.head_dim).uvarint(len(turn.cos))
    writer.raw(turn.cos.astype("<i4").tobytes()).raw(turn.sin.astype("<i4").tobytes())


def read_turn(reader: ByteReader) -> Turn | None:
    kind = reader.u8()
    if kind == _NO_TURN:
        return None
    if kind > len(_PAIRINGS):
        raise DamagedError(f"{reader.where}: keys are turned in an unknown way, {kind}; damaged")
    log_mixed = reader.u8()
    head_dim, n_pairs = reader.uvarint(limit=MAX_HEAD), reader.uvarint(limit=MAX_HEAD)
    if not head_dim or 2 * n_pairs > head_dim or MAX_HEAD >> log_mixed == 0:
        raise DamagedError(f"{reader.where}: {n_pairs} pairs in a head of {head_dim}; damaged")
    cos, sin = (np.frombuffer(reader.take(4 * n_pairs), "<i4").astype(np.int32) for _ in range(2))
    if any(np.abs(part.astype(np.int64)).max(initial=0) > MOST_TURN for part in (cos, sin)):
        raise DamagedError(f"{reader.where}: a cosine or sine is out of range; damaged")
    return Turn(head_dim, _PAIRINGS[kind - 1], cos, sin, 1 << log_mixed)


def turn_rows(rows: Rows, dtype: DType, turn: Turn) -> Rows:
    """Stored keys, uint8 ``[n_frames, row_bytes]`` of a type that ``turn`` takes, turned.

    Numbers, or blocks of them, whose turned values are not finite stay as they are.
    """
    out = np.empty(rows.shape, np.uint8)
    step = max(1, MAX_CHANNELS // dtype.n_channels(rows.shape[1]))
    for first in range(0, len(rows), step):
        out[first : first + step] = _turn_rows(rows[first : first + step], dtype, turn)
    return out


def _turn_rows(rows: Rows, dtype: DType, turn: Turn) -> Rows:
    with np.errstate(all="ignore"):
        values = mix(as_doubles(rows, dtype), turn.mixed)
        # At most 24 bits each from here on, so that products with a cosine are exact.
        values = values.astype(np.float32).astype(np.float64)
        heads = values.reshape(len(rows), -1, turn.head_dim)
        first, second = pair_slices(2 * len(turn.cos), turn.pairing)
        cos, sin = (np.ldexp(part.astype(np.float64), -TURN_BITS) for part in (turn.cos, turn.sin))
        a, b = heads[..., first].copy(), heads[..., second].copy()
        # A fused multiply-add gives the same sums.
        heads[..., first], heads[..., second] = a * cos - b * sin, a * sin + b * cos
        # The matrix is its own inverse but for this.
        values = mix(values, turn.mixed) / turn.mixed
        if dtype.is_quantized:
            return pack(values.astype(np.float32), dtype, rows)
        stored, finite = _as_stored(values, dtype)
    return np.where(finite, stored, _patterns(rows, dtype)).view(np.uint8)


def mix(values: Doubles, block: int) -> Doubles:
    """Every ``block`` channels of float64 ``[n, C]`` times the Hadamard matrix of ±1, in sums and
    differences of two in a fixed order: channels 1 apart first, then 2, 4, …

    >>> mix(np.array([[1.0, 2, 3, 4]]), 4).tolist()
    [[10.0, -2.0, -4.0, 0.0]]
    """
    apart = 1
    while apart < block:
        pairs = values.reshape(len(values), -1, 2, apart)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        values = np.stack([a + b, a - b], axis=2).reshape(values.shape)
        apart *= 2
    return values


def as_doubles(rows: Rows, dtype: DType) -> Doubles:
    """Values of stored rows of a type that is turned, float64 ``[n_frames, n_channels]``."""
    if dtype.is_quantized:
        return unpack(rows, dtype)
    patterns: NDArray[Any] = _patterns(rows, dtype)
    if dtype.name == "bf16":
        patterns = patterns.astype(np.uint32) << np.uint32(16)
    # Converting a signalling NaN may raise a flag.
    with np.errstate(invalid="ignore"):
        return patterns.view("<f2" if dtype.name == "f16" else "<f4").astype(np.float64)


def _patterns(rows: Rows, dtype: DType) -> NDArray[np.unsignedinteger]:
    return np.ascontiguousarray(rows).view(f"<u{dtype.block_bytes}")


def _as_stored(
    values: Doubles, dtype: DType
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]:
    """Patterns of the nearest numbers, ties to even, and where those are finite."""
    if dtype.name == "f16":
        halves = values.astype("<f2")
        return halves.view("<u2"), np.isfinite(halves)
    singles = values.astype("<f4")
    if dtype.name == "f32":
        return singles.view("<u4"), np.isfinite(singles)
    # Rounded to odd first, so that rounding twice gives what rounding once would.
    bits = singles.view("<u4")
    bits = (bits - (np.abs(singles) > np.abs(values))) | (singles != values)
    stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return stored, np.isfinite(values) & ((stored & 0x7F80) != 0x7F80)
