"""KVTC: un-RoPE, principal components across layers, bits by dynamic programming, DEFLATE.

Staniszewski and Łańcucki, "KV Cache Transform Coding for Compact Storage in LLM Inference", arXiv
2511.01815. The first 4 tokens and a recent window (128 in the paper) stay in fp16. Keys and values
have a basis (`basis`) and a plan (`allocation`) each, and the same budget: 16 bits divided by the
nominal ratio, as the paper's 8x to 64x are meant, before DEFLATE. Two things are ours: 8 bits are
uniform where the paper has FP8, and DEFLATE gets the codes packed or as a byte each, whichever
comes out smaller.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..arrays import CacheShape, KVArrays
from ..calibration import Calibration
from ..codec import ByteTaker, join
from . import packing
from .allocation import Allocation, Group, dequantize, quantize
from .basis import N_SINKS, Basis, Rows, cache_from_rows, learn_bases, rows_of

RATIOS = (8, 16, 24, 32, 48, 64)
"""Nominal ratios: the paper's settings and two between them."""
WINDOWS = (128, 16)
"""The paper's window, and one that does not outweigh the rest of a short context."""

Coded = tuple[list[NDArray[np.float16]], list[tuple[Group, NDArray[np.uint8]]]]
"""Shifts and scales of the groups, and the codes of each."""


class Kvtc:
    """``ratio``: nominal, of the coded tokens; ``window``: newest tokens kept in fp16."""

    source = "arXiv 2511.01815"

    def __init__(self, ratio: int, calibration: Calibration, window: int = WINDOWS[0]) -> None:
        self.name = f"kvtc-{ratio}x" if window == WINDOWS[0] else f"kvtc-w{window}-{ratio}x"
        self.family = f"KVTC, window {window}"
        self.window = window
        self._bases = calibration.learn("pca", learn_bases)
        allocations = calibration.learn("kvtc allocation", _allocations)
        budget = {role: 16 * len(self._bases[role].mean) // ratio for role in "kv"}
        self.plans = {role: allocations[role].plan(budget[role]) for role in "kv"}
        self._rank = {role: _rank(plan) for role, plan in self.plans.items()}
        self.book_bytes = sum(
            2 * len(basis.mean) * (1 + self._rank[role]) + 4 * len(self.plans[role])
            for role, basis in self._bases.items()
        )

    def encode(self, cache: KVArrays) -> bytes:
        exact = self._exact(cache.shape.n_tokens)
        rows = rows_of(cache)
        parts = [each[:, exact] for _, arrays in cache.roles() for each in arrays]
        coded = [self._encode(role, rows[role][~exact]) for role in "kv"]
        return join([*parts, *(np.frombuffer(each, np.uint8) for each in _deflate(coded))])

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        exact = self._exact(shape.n_tokens)
        taker, n = ByteTaker(data), int(exact.sum())
        kept = {
            role: [
                taker.take("<f2", one.n_kv_heads, n, one.key_dim if role == "k" else one.value_dim)
                for one in shape.layers
            ]
            for role in "kv"
        }
        rows = {}
        coded = _inflate(data, sum(each.nbytes for parts in kept.values() for each in parts))
        for role, stream in zip("kv", coded, strict=True):
            rows[role] = np.zeros((shape.n_tokens, len(self._bases[role].mean)), np.float32)
            rows[role][~exact] = self._decode(role, stream, int((~exact).sum()))
        restored = cache_from_rows(rows, shape)
        for role, arrays in restored.roles():
            for whole, part in zip(arrays, kept[role], strict=True):
                whole[:, exact] = part
        return restored

    def _exact(self, n_tokens: int) -> NDArray[np.bool_]:
        """Which tokens stay in fp16."""
        number = np.arange(n_tokens)
        return (number < N_SINKS) | (number >= n_tokens - self.window)

    def _encode(self, role: str, rows: Rows) -> Coded:
        """Shifts and scales, and the codes of each group."""
        coefficients = self._bases[role].project(rows, self._rank[role])
        side, codes = [], []
        for group in self.plans[role]:
            block = coefficients[:, group.start : group.start + group.size]
            shift, scale, found = quantize(block, group.bits)
            side += [shift, scale]
            codes.append((group, found))
        return side, codes

    def _decode(self, role: str, stream: tuple[bool, bytes], n: int) -> Rows:
        packed, data = stream
        taker = ByteTaker(data)
        plan = self.plans[role]
        side = [(taker.take("<f2", n), taker.take("<f2", n)) for _ in plan]
        coefficients = np.zeros((n, self._rank[role]), np.float32)
        for group, (shift, scale) in zip(plan, side, strict=True):
            codes = packing.take(taker, group.bits if packed else 8, n, group.size)
            part = dequantize(shift, scale, codes)
            coefficients[:, group.start : group.start + group.size] = part
        return self._bases[role].expand(coefficients)


def _deflate(coded: Sequence[Coded]) -> list[bytes]:
    """For each role: u8 whether codes are packed, u32 length, DEFLATE stream."""
    streams = []
    for side, codes in coded:
        best = min(
            (
                (zlib.compress(
                    join([*side, *(packing.pack(c, g.bits if packed else 8) for g, c in codes)]), 9
                ), packed)
                for packed in (False, True)
            ),
            key=lambda pair: len(pair[0]),
        )  # fmt: skip
        streams += [bytes([best[1]]), len(best[0]).to_bytes(4, "little"), best[0]]
    return streams


def _inflate(data: bytes, at: int) -> list[tuple[bool, bytes]]:
    """Undo `_deflate` for the bytes from ``at`` on."""
    streams = []
    while at < len(data):
        length = int.from_bytes(data[at + 1 : at + 5], "little")
        streams.append((bool(data[at]), zlib.decompress(data[at + 5 : at + 5 + length])))
        at += 5 + length
    return streams


def _rank(plan: Sequence[Group]) -> int:
    """Components that the plan uses."""
    return max((group.start + group.size for group in plan), default=0)


def _allocations(calibration: Calibration) -> dict[str, Allocation]:
    bases: dict[str, Basis] = calibration.learn("pca", learn_bases)
    return {
        role: Allocation(basis.samples, 16 * len(basis.mean) // min(RATIOS))
        for role, basis in bases.items()
    }
