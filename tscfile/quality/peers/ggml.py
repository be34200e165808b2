"""llama.cpp's quantized caches (``--cache-type-k q8_0`` and so on).

Blocks of 32 channels share one fp16 scale: 8.5 and 4.5 bits a value. Since April 2026 rows are
turned by a Hadamard matrix before (`tscfile.transforms.rotation`). The quantizers are those of
gguf-py (``gguf/quants.py``), which give llama.cpp's bytes.
"""

from __future__ import annotations

import numpy as np

from ...dtypes import DTYPES
from ...retype import dequantize, quantize
from ...transforms.rotation import rotate, rotation_block
from ..arrays import CacheShape, KVArrays, heads, rows
from ..codec import ByteTaker, join


class GgmlCache:
    """Keys and values as ``q8_0``, ``q4_0`` or another of ggml's types."""

    family = "llama.cpp"
    source = "llama.cpp quantized KV cache with rotation; gguf-py quants.py"
    book_bytes = 0

    def __init__(self, type_name: str) -> None:
        self.name = type_name
        self._dtype = DTYPES[type_name]

    def encode(self, cache: KVArrays) -> bytes:
        parts = []
        for role, arrays in cache.roles():
            for each in arrays:
                turned = rotate(rows(each).astype(np.float32), rotation_block(role, each.shape[2]))
                parts.append(quantize(turned, self._dtype))
        return join(parts)

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        taker = ByteTaker(data)
        found: dict[str, list[np.ndarray]] = {"k": [], "v": []}
        for role in "kv":
            for one in shape.layers:
                dim = one.key_dim if role == "k" else one.value_dim
                row_bytes = self._dtype.row_bytes(one.n_kv_heads * dim)
                stored = taker.take(np.uint8, shape.n_tokens, row_bytes)
                turned = rotate(dequantize(stored, self._dtype), rotation_block(role, dim))
                found[role].append(heads(turned.astype(np.float16), one.n_kv_heads))
        return KVArrays(shape, found["k"], found["v"])
