"""Codebooks of a book for product quantization: learnt from what the prediction leaves, and read.

Vectors are a frame's coefficients in the book's basis, where errors of one length cost the model
the same whatever their direction. One sequence of stages serves all rates: a frame is coded with as
many of the first ones as are worth a byte each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..entropy import ladder
from ..errors import DamagedError, UsageError
from ..quantizers.product import CENTROIDS, ProductQuantizer, learn_stages
from .basis import FrameSource, Progress
from .book import Book

PREFIX = "product_"
N_STAGES, WIDTH = 96, 32
"""Stages that are learnt, and columns of each: 0.8 MB."""

_ITERATIONS = 12
_MOST_FRAMES, _LEAST_FRAMES = 1 << 17, 1 << 13
_MOST_COLUMNS = 512
_MEASURED = 1 << 11
_MOST_STAGES = 1 << 12
_ARRAYS = {
    "product_columns": ("u4", "SW"), "product_centroids": ("i1", "SKW"),
    "product_scales": ("f4", "S"), "product_worth": ("f4", "G"), "product_errors": ("f4", "G"),
}  # fmt: skip


RATES = tuple(2.0 ** (i / 2 - 3) for i in range(19))
"""Bytes of a frame, 1/8 to 64, that worth and errors are measured at."""


@dataclass(frozen=True)
class BookCodes:
    """``counts``: how many of the coefficients of each group the quantizer's columns are.

    ``worth``, ``errors``: float64 ``[19]``, for each of `RATES` the squared error that a byte must
    save for frames to take so many in the mean, and the mean squared error they then have, both in
    the metric and on calibration text.
    """

    quantizer: ProductQuantizer
    counts: list[int]
    worth: NDArray[np.float64]
    errors: NDArray[np.float64]

    @property
    def n_columns(self) -> int:
        return sum(self.counts)

    def worth_of(self, code_bytes: float) -> float:
        """What a byte must save where frames are to take ``code_bytes`` of them."""
        return float(np.exp2(np.interp(
            np.log2(code_bytes), np.log2(RATES), np.log2(self.worth)
        )))  # fmt: skip

    def error_of(self, worth: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean squared error of frames whose bytes are worth so much."""
        falling = np.log2(self.worth[::-1]), np.log2(self.errors[::-1])
        errors: NDArray[np.float64] = np.exp2(np.interp(np.log2(worth), *falling))
        return errors


# --- learning ---------------------------------------------------------------------------------


def learn_product(
    book: Book, source: FrameSource, progress: Progress = lambda words: None, *, seed: int = 0
) -> dict[str, NDArray[Any]]:
    """The ``product_`` arrays for a book that has all others; none where ``source`` has too few
    frames. The same book, frames and seed give the same arrays."""
    rng = np.random.default_rng(seed)
    counts = _leading(book)
    columns = book.columns(counts)
    vectors = _vectors(book, source, counts, progress)
    if len(vectors) < _LEAST_FRAMES or not len(columns):
        return {}
    measured = vectors[:: -(-len(vectors) // _MEASURED)].copy()
    found = []
    stages = learn_stages(vectors, N_STAGES, min(WIDTH, len(columns)), _ITERATIONS, rng)
    for number, (chosen, centroids) in enumerate(stages):
        progress(f"product: stage {number + 1} of {N_STAGES}")
        scale = np.float32(max(float(np.abs(centroids).max()) / 127, 1e-12))
        stored = np.rint(centroids / scale).astype(np.int8)
        # The next stage sees what the stored centroids leave.
        centroids[:] = stored.astype(np.float32) * scale
        found.append((chosen, stored, scale))
    arrays: dict[str, NDArray[Any]] = {
        "product_columns": columns[np.stack([each[0] for each in found])].astype(np.uint32),
        "product_centroids": np.stack([each[1] for each in found]),
        "product_scales": np.array([each[2] for each in found], np.float32),
    }
    progress("product: measuring")
    local = np.stack([each[0] for each in found]).astype(np.int32)
    errors = _quantizer(arrays, local).errors(measured)
    points = [_at_rate(errors, rate) for rate in RATES]
    worth, mean = np.array(points).T
    arrays["product_worth"] = worth.astype(np.float32)
    arrays["product_errors"] = (mean + _power(book, columns)).astype(np.float32)
    return arrays


def _at_rate(errors: NDArray[np.float64], rate: float) -> tuple[float, float]:
    """The worth of a byte at which frames take ``rate`` of them, and their mean squared error."""
    n_bytes = np.arange(errors.shape[1])
    low, high = -30.0, 40.0
    for _ in range(40):
        middle = (low + high) / 2
        chosen = (errors + 2.0**middle * n_bytes).argmin(axis=1)
        low, high = (middle, high) if chosen.mean() > rate else (low, middle)
    chosen = (errors + 2.0**high * n_bytes).argmin(axis=1)
    return 2.0**high, float(np.take_along_axis(errors, chosen[:, None], axis=1).mean())


def _leading(book: Book) -> list[int]:
    """How many coefficients of each group are among the widest."""
    sigmas = book.arrays["log_sigmas"]
    least = np.sort(sigmas)[::-1][: _MOST_COLUMNS][-1:]
    return [int((sigmas[span] >= least).sum()) for span in book.basis.spans()]


def _vectors(
    book: Book, source: FrameSource, counts: list[int], progress: Progress
) -> NDArray[np.float32]:
    """Leading coefficients of frames from all windows, float32 ``[n, sum(counts)]``."""
    lengths = [len(source.context(number).pos) for number in range(len(source))]
    every = max(1, -(-sum(lengths) // _MOST_FRAMES))
    parts = [np.zeros((0, sum(counts)), np.float32)]
    for number in range(len(source)):
        progress(f"product: window {number + 1} of {len(source)}")
        residual = source.frames(number) - book.predict(source.context(number))
        # Not always the first frame of a window, which is like no other.
        parts.append(book.analyse(residual[number % every :: every], counts))
    return np.concatenate(parts)


def _power(book: Book, columns: NDArray[np.int64]) -> float:
    """Mean square of the coefficients beside ``columns``."""
    left = np.delete(book.arrays["log_sigmas"].astype(np.float64), columns)
    return float(np.exp2(2 * left / ladder.UNITS_PER_OCTAVE).sum())


# --- reading ----------------------------------------------------------------------------------


def read_product(book: Book, where: str) -> BookCodes:
    """The codebooks of a book; `UsageError` if it has none, `DamagedError` if they are unfit."""
    arrays = {name: book.arrays[name] for name in _ARRAYS if name in book.arrays}
    if not arrays:
        raise UsageError(f"{where}: the book has no codebooks; train one with this version")
    sizes = {"K": CENTROIDS, "G": len(RATES)}
    for name, (code, axes) in _ARRAYS.items():
        array = arrays.get(name)
        fits = array is not None and array.dtype == np.dtype(code) and array.ndim == len(axes)
        if not fits or any(sizes.setdefault(a, n) != n for a, n in zip(axes, array.shape)):  # type: ignore[union-attr] # noqa: B905
            raise DamagedError(f"{where}: the book's array {name!r} is missing or does not fit")
    columns = arrays["product_columns"]
    curves = [arrays[name].astype(np.float64) for name in ("product_worth", "product_errors")]
    apart = np.diff(np.sort(columns, axis=1).astype(np.int64), axis=1)
    if not (
        0 < len(columns) <= _MOST_STAGES and columns.shape[1]
        and int(columns.max()) < book.n_coefficients and apart.all()
        and all(np.isfinite(c).all() and (c > 0).all() and (np.diff(c) <= 0).all() for c in curves)
        and np.isfinite(arrays["product_scales"]).all()
    ):  # fmt: skip
        raise DamagedError(f"{where}: the book's codebooks contradict each other; damaged")
    counts = []
    for span in book.basis.spans():
        inside = columns[(columns >= span.start) & (columns < span.stop)]
        counts.append(int(inside.max()) + 1 - span.start if inside.size else 0)
    local = np.searchsorted(book.columns(counts), columns).astype(np.int32)
    return BookCodes(_quantizer(arrays, local), counts, *curves)


def _quantizer(arrays: dict[str, NDArray[Any]], columns: NDArray[np.int32]) -> ProductQuantizer:
    centroids = arrays["product_centroids"].astype(np.float32)
    centroids *= arrays["product_scales"][:, None, None]
    return ProductQuantizer(columns, np.arange(len(columns), dtype=np.int32), centroids)
