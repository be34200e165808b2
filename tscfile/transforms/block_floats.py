"""Blocks of 32 numbers that share a scale: their values, and the blocks that values make.

llama.cpp turns quantized keys by unpacking, turning and packing them again. Steps are those of
``quantize_row_*_ref`` (``ggml/src/ggml-quants.c``), each rounded by itself to f32, so that every
machine makes the same block; ``spec/codecs/difference.md`` lists them. `tscfile.retype` converts
with the ``gguf`` package instead, whose bits no file format should hang on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType
from . import fields

Rows = NDArray[np.uint8]

_MIDDLES = {"q8_0": 0, "q4_0": 8, "q5_0": 16, "q4_1": 0, "q5_1": 0}
"""The code of zero, where it is fixed."""

BLOCK_FLOATS = frozenset(_MIDDLES)
"""Types that are packed here; the codes of iq4_nl are found by a search."""


def unpack(rows: Rows, dtype: DType) -> NDArray[np.float64]:
    """Values of uint8 ``[n, row_bytes]``, exact: float64 ``[n, n_channels]``."""
    *halves, codes = fields.split(rows, dtype)
    whole = codes.view(np.int8) if dtype.name == "q8_0" else codes
    values = whole.reshape(*halves[0].shape, dtype.block_elements).astype(np.float64)
    values -= _MIDDLES[dtype.name]
    scale, *minimum = (half.view("<f2").astype(np.float64)[..., None] for half in halves)
    with np.errstate(invalid="ignore"):
        values *= scale
        for each in minimum:
            values += each
    return values.reshape(len(rows), -1)


def pack(values: NDArray[np.float32], dtype: DType, instead: Rows) -> Rows:
    """Float32 ``[n, n_channels]`` as rows; where a block is not finite, that of ``instead``."""
    blocks = values.reshape(len(values), -1, dtype.block_elements)
    bits = fields.fields_of(dtype)[-1].bits
    low = np.zeros(blocks.shape[:2], np.float32)
    with np.errstate(all="ignore"):
        if dtype.name == "q8_0":
            scale = np.abs(blocks).max(axis=-1) / np.float32(127)
        elif dtype.name.endswith("_0"):
            largest = np.abs(blocks).argmax(axis=-1)[..., None]
            extreme = np.take_along_axis(blocks, largest, axis=-1)[..., 0]
            scale = extreme / np.float32(-_MIDDLES[dtype.name])
        else:
            # Which of two zeros is the smaller is not the same everywhere.
            low, high = (each(blocks, axis=-1) + np.float32(0) for each in (np.min, np.max))
            scale = (high - low) / np.float32((1 << bits) - 1)
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        halves = [scale.astype("<f2")] + ([low.astype("<f2")] if dtype.name.endswith("_1") else [])
        finite = np.asarray(np.isfinite(blocks).all(axis=-1))
        for half in halves:
            finite &= np.isfinite(half)
        codes = (blocks - low[..., None]) * inverse[..., None]
        if dtype.name == "q8_0":
            codes = np.clip(np.rint(codes), -127, 127)
        else:
            codes += np.float32(_MIDDLES[dtype.name] + 0.5)
            codes = np.clip(np.floor(codes), 0, (1 << bits) - 1)
    codes[~finite] = 0
    whole = codes.astype(np.int8).view(np.uint8).reshape(len(values), -1)
    packed = fields.join([*(half.view("<u2") for half in halves), whole], dtype)
    shape = (*finite.shape, dtype.block_bytes)
    kept = np.ascontiguousarray(instead).reshape(shape)
    return np.where(finite[..., None], packed.reshape(shape), kept).reshape(len(values), -1)
