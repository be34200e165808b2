"""Rotated K4V2: Hadamard rotation, then symmetric uniform quantization, keys finer than values.

The configuration of the TSC reports (``solsticestudio.ai/tsc_part4``, ``tsc_paper``): every head's
vector is turned by an orthonormal Hadamard matrix; groups of 64 channels share one fp16 scale, the
largest magnitude a; the levels are 2^bits evenly spaced values from -a to a, so that the error is
at most a / (2^bits - 1). The reports give no group size; 64 makes 4.92 times smaller than fp16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedError
from ...transforms.rotation import rotate
from ..codec import ByteTaker
from . import packing
from .per_array import PerArrayCodec

GROUP = 64


class RotatedUniform(PerArrayCodec):
    """``key_bits`` and ``value_bits`` 1 to 8; head sizes that are multiples of 64."""

    family = "rotated K4V2"
    source = "TSC reports, part IV (Hadamard, symmetric)"

    def __init__(self, key_bits: int = 4, value_bits: int = 2) -> None:
        self.name = f"rotated-k{key_bits}v{value_bits}"
        super().__init__({"k": key_bits, "v": value_bits})

    def _quantize(self, x: NDArray[np.float32], bits: int) -> list[NDArray[np.generic]]:
        if x.shape[-1] % GROUP:
            raise UnsupportedError(
                f"{self.name} needs heads of a multiple of {GROUP} and this model has "
                f"{x.shape[-1]}; leave it out"
            )
        groups = rotate(x.reshape(-1, GROUP), GROUP)
        peak = np.abs(groups).max(axis=1).astype(np.float16)
        top = 2**bits - 1
        scaled = groups / np.where(peak == 0, 1, peak).astype(np.float32)[:, None]
        codes = np.clip(np.rint((scaled + 1) / 2 * top), 0, top)
        return [peak, packing.pack(codes, bits)]

    def _take(self, taker: ByteTaker, role: str, *shape: int) -> NDArray[np.float16]:
        bits, n_groups = self._bits[role], int(np.prod(shape)) // GROUP
        peak = taker.take("<f2", n_groups).astype(np.float32)
        codes = packing.take(taker, bits, n_groups, GROUP)
        groups = (codes * np.float32(2 / (2**bits - 1)) - 1) * peak[:, None]
        return rotate(groups, GROUP).reshape(shape).astype(np.float16)
