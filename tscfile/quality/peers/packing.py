"""Codes of a few bits as bytes: what the peers' quantizers store."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import ops

from ..codec import ByteTaker


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Codes below ``1 << bits`` (1 to 8), any shape, ``bits`` bits each."""
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    return flat if bits == 8 else ops.pack_bits(flat, bits)


def take(taker: ByteTaker, bits: int, *shape: int) -> NDArray[np.uint8]:
    """Undo `pack`: uint8 codes of this shape, cut off ``taker``."""
    count = int(np.prod(shape, dtype=np.int64))
    if bits == 8:
        return taker.take(np.uint8, *shape)
    stored = taker.take(np.uint8, ops.packed_bytes(count, bits))
    return ops.unpack_bits(stored, bits, count).reshape(shape)
