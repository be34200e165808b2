"""What both backends of the exact operations of `tscfile_kernels.ops` share: constants of the
format (``spec/codecs/book-exact.md``) and the tables that follow from them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GROUP = 32
"""Channels that are predicted from all before them with one matrix product."""

REGRESSOR_BITS = 19
"""Regressors are integers of smaller magnitude than ``1 << REGRESSOR_BITS``."""

UNIT_BITS = 28
"""Values are coded in units of which they are fewer than ``1 << UNIT_BITS``; others escape."""

ANGLE_BITS = 15
"""Cosines and sines are integers, 1 is ``1 << ANGLE_BITS``."""

PREDICTION_BITS = 8
"""A prediction has so many more bits behind the point than a regressor."""

TABLE_BITS = 16
"""Frequencies of a table sum to ``1 << TABLE_BITS``."""

N_RATIOS, N_PLACES = 32, 8
"""A table for each ratio of the error's scale to the width of a bin, in quarter octaves, and each
place of the prediction in its bin, in eighths."""

RATIO_OFFSET = 16
"""Row of the tables where scale and width are equal."""

MEMORY = 5
"""The running mean of errors of a frame forgets ``1 / (1 << MEMORY)`` for each channel."""

STATE_BITS = 31
"""States of the coder stay in ``[1 << 31, 1 << 63)`` and are renormalised by 32-bit words."""

N_RAW, MAGNITUDE_BITS = 16, 15
"""Bits of an escaped value, and without its sign."""

_WIDTHS = [(0, 32), (2, 8), (4, 4), (5, 4), (8, 1), (9, 1), (10, 1)]
"""Binary logarithm of the width of bins, and how many there are, from the middle outwards."""

HALF_BINS = 2048
"""Narrowest bins that fit on either side of the middle."""


class Format(NamedTuple):
    """A 16-bit float type: bits of its fraction, and binary logarithm of its smallest number."""

    fraction_bits: int
    least: int


FORMATS = {"f16": Format(10, -24), "bf16": Format(7, -133)}


class ExactGroup(NamedTuple):
    """Channels that are coded one after another; all int64.

    ``weights``: ``[b, b]``, of each channel (row) those before it; ``weight_bits``,
    ``scale_bits``, ``unit_bits``, ``sigmas``: ``[b]``; ``pairs``: ``[b]``, -1 for a channel that is
    not turned, else the row of the angles, which the next or the one before it shares.
    """

    weights: NDArray[np.int64]
    weight_bits: NDArray[np.int64]
    scale_bits: NDArray[np.int64]
    unit_bits: NDArray[np.int64]
    sigmas: NDArray[np.int64]
    pairs: NDArray[np.int64]


def _bins() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    widths = [width for width, count in _WIDTHS for _ in range(count)]
    edges = np.concatenate([[0], np.cumsum(np.left_shift(1, widths))])
    first = np.concatenate([-edges[:0:-1], edges[:-1]])
    log_widths = np.array(widths[::-1] + widths)
    of = np.repeat(np.arange(len(first)), np.left_shift(1, log_widths))
    return first.astype(np.int64), log_widths.astype(np.int64), of.astype(np.int64)


BIN_FIRST, BIN_WIDTH, BIN_OF = _bins()
"""First narrowest bin of each bin, binary logarithm of its width in those, and the bin of each
narrowest one, counted from ``-HALF_BINS``."""

N_BINS = len(BIN_FIRST)
N_SYMBOLS = N_BINS + 1
ESCAPE = N_BINS

QUARTERS = (77936, 92682, 110218)
"""2 to the power of 1/4, 1/2 and 3/4, in units of ``1 / (1 << 16)``."""

LEAST_SCALE, MOST_SCALE = 16, 1 << 18
START_MEAN = 192
"""What the mean error of a frame is taken to be before its first channel, in 1/256 of the scale."""
