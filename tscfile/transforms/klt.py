"""Components that the frames of one session share, as rows of integers of their own fineness.

Frames ``[n, C]`` in units of the step are close to ``A @ B``: coefficients, ``n`` to a component,
and rows, ``C`` to a component, and both are stored. An error of 1 in a coefficient weighs as much
as one of ``1 / S`` in an entry of its row, ``S`` the component's singular value; so both are
rounded to those units, and the widths of both fall together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ROUND_UP = 0.35
"""Entries of rows are rounded with a dead zone; coefficients are not: shrinking frames costs more
than the bits it saves, as their spread is what attention goes by."""

LEAST = 0.75
"""Root mean square of the coefficients, in steps, below which a component is left out."""


def components(frames: Floats) -> tuple[NDArray[np.float64], Floats]:
    """Singular values, most first, and orthonormal rows ``[R, C]`` of float32 ``[n, C]``."""
    n, n_channels = frames.shape
    wide = frames.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T if n <= n_channels else wide.T @ wide)
    order = np.argsort(values)[::-1]
    singular = np.sqrt(np.maximum(values[order], 0))
    kept = singular > 1e-6 * max(float(singular[0]), 1e-30)
    singular, vectors = singular[kept], vectors[:, order[kept]]
    rows = (vectors.T @ wide) / singular[:, None] if n <= n_channels else vectors.T
    return singular, rows.astype(np.float32)


def exponents_of(singular: NDArray[np.float64]) -> NDArray[np.int8]:
    """Quarter octaves of the fineness of each row: its unit is ``2 ** (-e / 4)``."""
    fineness = np.rint(4 * np.log2(np.maximum(singular, 1e-9)))
    exponents: NDArray[np.int8] = np.clip(fineness, -128, 127).astype(np.int8)
    return exponents


def round_rows(rows: Floats, exponents: NDArray[np.int8]) -> NDArray[np.int32]:
    """Integer entries int32 ``[R, C]`` of rows in the units of ``exponents``."""
    scaled = rows * (2.0 ** (exponents.astype(np.float64) / 4)).astype(np.float32)[:, None]
    size = np.floor(np.abs(scaled) + np.float32(ROUND_UP))
    entries: NDArray[np.int32] = np.copysign(np.minimum(size, 1 << 30), scaled).astype(np.int32)
    return entries


def refit(frames: Floats, coefficients: Floats) -> Floats:
    """Rows that make ``coefficients @ rows`` nearest to ``frames``: some of what rounding the
    coefficients lost comes back."""
    gram = coefficients.T @ coefficients + np.eye(coefficients.shape[1], dtype=np.float32) / 1024
    return np.linalg.solve(gram, coefficients.T @ frames)


def analysis(rows: Floats) -> Floats:
    """Float32 ``[C, R]``: frames times it are the coefficients nearest in squared error."""
    gram = rows @ rows.T
    # Rows of integers may come out the same; a little on the diagonal keeps that solvable.
    gram[np.diag_indices_from(gram)] *= np.float32(1 + 1e-5)
    gram[np.diag_indices_from(gram)] += np.float32(1e-9)
    return np.linalg.solve(gram.astype(np.float64), rows.astype(np.float64)).T.astype(np.float32)
