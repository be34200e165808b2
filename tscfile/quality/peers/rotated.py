"""Rotated K4V2: Hadamard rotation, then symmetric uniform quantization, keys finer than values.

The configuration of the TSC reports (``solsticestudio.ai/tsc_part4``, ``tsc_paper``): every head's
vector is turned by an orthonormal Hadamard matrix and quantized in pages (`tscfile.quality.pages`)
of 64 channels. The reports give no page size; 64 makes 4.92 times smaller than fp16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedError
from ...transforms.rotation import rotate
from .. import pages
from ..codec import ByteTaker
from . import packing
from .per_array import PerArrayCodec

GROUP = pages.PAGE


class RotatedUniform(PerArrayCodec):
    """``key_bits`` and ``value_bits`` 1 to 8; head sizes that are multiples of ``group``.

    ``turned``: with the rotation, or the same quantizer without it.
    """

    family = "rotated K4V2"
    source = "TSC reports, part IV (Hadamard, symmetric)"

    def __init__(
        self, key_bits: int = 4, value_bits: int = 2, *, turned: bool = True, group: int = GROUP
    ) -> None:
        self.name = f"{'rotated' if turned else 'paged'}-k{key_bits}v{value_bits}"
        self._turn, self._group = group if turned else 0, group
        super().__init__({"k": key_bits, "v": value_bits})

    def quantize(self, x: NDArray[np.float32], bits: int) -> list[NDArray[np.generic]]:
        if x.shape[-1] % self._group:
            raise UnsupportedError(
                f"{self.name} needs heads of a multiple of {self._group} and this model has "
                f"{x.shape[-1]}; leave it out"
            )
        scales, codes = pages.quantize(rotate(x.reshape(-1, self._group), self._turn), bits)
        return [scales, packing.pack(codes, bits)]

    def take(self, taker: ByteTaker, role: str, *shape: int) -> NDArray[np.float16]:
        bits, n_groups = self.bits[role], int(np.prod(shape)) // self._group
        scales = taker.take("<f2", n_groups)
        codes = packing.take(taker, bits, n_groups, self._group)
        groups = pages.dequantize(scales, codes, bits)
        return rotate(groups, self._turn).reshape(shape).astype(np.float16)
