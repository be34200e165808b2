"""What a book holds for the exact codec: weights, scales and frequencies, all integers.

``spec/book.md`` gives the arrays. Products of a weight and a regressor are below 2^34, so that sums
of up to `MOST_REGRESSORS` of them are whole numbers below 2^52: float64 holds every partial sum, and
a matrix product is exact in whatever order it is summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import exact
from tscfile_kernels.exact import GROUP, ExactGroup

from .errors import DamagedError
from .transforms.exact_frames import ExactOrder

PREFIX = "exact_"
CONSTANT = 1 << 13
"""The first regressor of every channel."""

MOST_REGRESSORS = 1 << 18
_MOST_UNIT, _MOST_SCALE, _MOST_WEIGHT = 40, 60, 40

_TYPES = {
    "sizes": "i4", "weights_low": "u1", "weights_high": "i1", "weight_bits": "i1",
    "scale_bits": "i1", "unit_bits": "i1", "sigmas": "u2", "frequencies": "u2",
}  # fmt: skip

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """Which regressors a channel has: ``window`` channels before its group, the token's vector of
    ``token_dims`` numbers for the first ``token_channels`` channels."""

    n_channels: int
    window: int
    token_dims: int
    token_channels: int

    def groups(self) -> list[tuple[int, int, int, int]]:
        """Of each group the first channel of its window, its own first and last, and how many of
        the token's numbers it sees."""
        return [
            (
                max(0, first - self.window), first, min(first + GROUP, self.n_channels),
                self.token_dims if first < self.token_channels else 0,
            )
            for first in range(0, self.n_channels, GROUP)
        ]  # fmt: skip

    def widths(self) -> list[int]:
        """Weights of a channel of each group: constant, token, window, and the group itself."""
        return [1 + dims + stop - low for low, _, stop, dims in self.groups()]


class ExactTables:
    """The arrays of a book that begin with `PREFIX`, checked and made ready."""

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], order: ExactOrder,
        vectors: NDArray[np.int8], vector_scales: NDArray[np.float32], where: str,
    ) -> None:  # fmt: skip
        """``vectors``, ``vector_scales``: the token vectors of the book. `DamagedError` unless the
        arrays fit each other and them."""
        self.order = order
        self._where = where
        found = {name: self._array(arrays, name) for name in _TYPES}
        sizes = found["sizes"].tolist()
        self._need(len(sizes) == 3 and not order.head_dim % 2, "sizes")
        window, token_channels, self.token_bits = sizes
        self._need(0 <= window <= order.n_channels and abs(self.token_bits) <= _MOST_SCALE, "sizes")
        self._need(0 <= token_channels <= order.n_channels, "sizes")
        self.layout = Layout(order.n_channels, window, vectors.shape[1], token_channels)
        widths = self.layout.widths()
        self._need(max(widths) <= MOST_REGRESSORS, "sizes")
        for name, most in (("weight_bits", _MOST_WEIGHT), ("scale_bits", _MOST_SCALE),
                           ("unit_bits", _MOST_UNIT)):  # fmt: skip
            bits = found[name]
            fits = len(bits) == order.n_channels and bool((np.abs(bits.astype(int)) <= most).all())
            self._need(fits, name)
        self.scale_bits = found["scale_bits"].astype(np.int64)
        self._weight_bits = found["weight_bits"].astype(np.int64)
        self._unit_bits = found["unit_bits"].astype(np.int64)
        self._sigmas = found["sigmas"].astype(np.int64)
        pairs = order.pairs()
        together = self.scale_bits[pairs >= 0].reshape(-1, 2)
        self._need((together[:, 0] == together[:, 1]).all(), "scale_bits")
        in_range = (self._sigmas >= 2048) & (self._sigmas < 4096)
        self._need(len(in_range) == order.n_channels and bool(in_range.all()), "sigmas")
        frequencies = found["frequencies"]
        self._need(frequencies.shape == FREQUENCIES and bool(frequencies.all()), "frequencies")
        totals = frequencies.sum(axis=1, dtype=np.int64)
        self._need(bool((totals == 1 << exact.TABLE_BITS).all()), "frequencies")
        self.cumulative = np.zeros((FREQUENCIES[0], FREQUENCIES[1] + 1), np.uint32)
        np.cumsum(frequencies, axis=1, out=self.cumulative[:, 1:])
        low, high = found["weights_low"], found["weights_high"]
        edges = [stop - first for _, first, stop, _ in self.layout.groups()]
        counts = [rows * width for rows, width in zip(edges, widths, strict=True)]
        self._need(len(low) == len(high) == sum(counts), "weights")
        weights = high.astype(np.int16) << 8 | low
        self._weights = [
            part.reshape(rows, -1)
            for part, rows in zip(np.split(weights, np.cumsum(counts)[:-1]), edges, strict=True)
        ]
        self._pairs = pairs
        self._vectors, self._vector_scales = vectors, vector_scales

    def _array(self, arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
        array = arrays.get(PREFIX + name)
        code = _TYPES[name]
        ndim = 2 if name == "frequencies" else 1
        fits = array is not None and f"{array.dtype.kind}{array.dtype.itemsize}" == code
        self._need(fits and array is not None and array.ndim == ndim, name)
        assert array is not None
        return array

    def _need(self, holds: object, name: str) -> None:
        if not holds:
            raise DamagedError(f"{self._where}: the book's array {PREFIX + name!r} does not fit")

    @cached_property
    def groups(self) -> list[tuple[Floats, ExactGroup]]:
        """Of each group the weights of what comes before it, float64 ``[b, width]``, and the rest."""
        found = []
        for weights, (_, first, stop, _) in zip(self._weights, self.layout.groups(), strict=True):
            own = slice(first, stop)
            before = weights.shape[1] - (stop - first)
            inside = np.tril(weights[:, before:].astype(np.int64), -1)
            pairs = self._pairs[own]
            # Both channels of a pair are predicted before either is known.
            seconds = np.flatnonzero(pairs >= 0)[1::2]
            inside[seconds, seconds - 1] = 0
            group = ExactGroup(
                np.ascontiguousarray(inside), self._weight_bits[own], self.scale_bits[own],
                self._unit_bits[own], self._sigmas[own], pairs,
            )  # fmt: skip
            found.append((np.ascontiguousarray(weights[:, :before], np.float64), group))
        return found

    def token_regressors(self, ids: NDArray[np.int32]) -> Floats:
        """Float64 ``[token_dims, n]`` of whole numbers; those of an unknown token are 0."""
        known = (ids >= 0) & (ids < len(self._vectors))
        rows = np.where(known, ids, 0)
        scales = np.where(known, self._vector_scales[rows], np.float32(0)).astype(np.float64)
        return whole_numbers(
            self._vectors[rows].astype(np.float64).T * scales, self.token_bits
        )


def whole_numbers(values: Floats, bits: int) -> Floats:
    """``values`` in units of ``2 ** -bits``, rounded to the nearest (half upwards) and kept to the
    range of regressors: every step exact or rounded once."""
    most = (1 << exact.REGRESSOR_BITS) - 1
    found: Floats = np.clip(np.floor(values * 2.0**bits + 0.5), -most, most)
    return found


FREQUENCIES = (exact.N_RATIOS * exact.N_PLACES, exact.N_SYMBOLS)
