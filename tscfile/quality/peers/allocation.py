"""KVTC's bit allocation: which runs of principal components get how many bits.

Staniszewski and Łańcucki, "KV Cache Transform Coding for Compact Storage in LLM Inference", arXiv
2511.01815. Components, sorted by variance, are cut into groups of a few allowed sizes; the values
of a token in one group share a shift and a scale of 16 bits each and get 0, 2, 4 or 8 bits.
Dynamic programming over components and budget finds the cut with the least squared error on
calibration rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

SIZES = (1, 16, 64, 256, 1024)
BITS = (0, 2, 4, 8)
SIDE_BITS = 32
"""Shift and scale of a group that has bits."""


@dataclass(frozen=True)
class Group:
    """Components ``start`` to ``start + size`` of every token."""

    start: int
    size: int
    bits: int

    @property
    def cost(self) -> int:
        """Bits a token."""
        return self.size * self.bits + SIDE_BITS if self.bits else 0


def quantize(
    block: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.uint8]]:
    """Each row of ``[n, size]`` uniformly from its minimum to its maximum: shift, scale, codes."""
    low, high = block.min(axis=1), block.max(axis=1)
    shift = low.astype(np.float16)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    wide = np.where(scale == 0, 1, scale).astype(np.float32)[:, None]
    codes = np.clip(np.rint((block - shift[:, None]) / wide), 0, 2**bits - 1)
    return shift, scale, codes.astype(np.uint8)


def dequantize(
    shift: NDArray[np.float16], scale: NDArray[np.float16], codes: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Undo `quantize`."""
    return codes * scale.astype(np.float32)[:, None] + shift.astype(np.float32)[:, None]


def squared_error(block: NDArray[np.float32], bits: int) -> float:
    """Squared error of a group on the sample rows; its energy if it gets no bits."""
    restored = dequantize(*quantize(block, bits)) if bits else np.float32(0)
    return float(np.square(block - restored, dtype=np.float64).sum())


class Allocation:
    """All best plans up to a budget, for sample coefficients float32 ``[n, p]``.

    ``max_budget`` is in bits a token. Error of a plan: its squared error summed over the samples.
    """

    def __init__(
        self, samples: NDArray[np.float32], max_budget: int, sizes: Sequence[int] = SIZES
    ) -> None:
        self._samples = samples
        self._budget = max_budget
        # Components without bits are groups of one: they cost nothing, however they are cut.
        self._options = [(1, 0)] + [(size, bits) for size in sizes for bits in BITS if bits]

    @cached_property
    def _tables(self) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """Least error and the last group's option, ``[p + 1, max_budget + 1]``."""
        p = self._samples.shape[1]
        error = np.full((p + 1, self._budget + 1), np.inf)
        choice = np.zeros((p + 1, self._budget + 1), np.int8)
        error[0] = 0
        for stop in range(1, p + 1):
            for number, (size, bits) in enumerate(self._options):
                cost = Group(0, size, bits).cost
                if size > stop or cost > self._budget:
                    continue
                added = squared_error(self._samples[:, stop - size : stop], bits)
                found = error[stop - size, : self._budget + 1 - cost] + added
                better = found < error[stop, cost:]
                error[stop, cost:][better] = found[better]
                choice[stop, cost:][better] = number
        return error, choice

    def error(self, budget: int) -> float:
        """Squared error of `plan` on the samples."""
        return float(self._tables[0][-1, budget])

    def plan(self, budget: int) -> list[Group]:
        """The groups with bits, of least error among all that cost at most ``budget``."""
        groups, stop = [], self._samples.shape[1]
        while stop:
            size, bits = self._options[self._tables[1][stop, budget]]
            stop -= size
            if bits:
                groups.append(Group(stop, size, bits))
                budget -= groups[-1].cost
        return groups[::-1]
