"""Integers at a finer step, told from those of the same coefficients at a coarser one.

What the coarser layer says of a coefficient gives it a *centre*, the coarse value in fine steps,
and narrows its distribution: what is stored is the difference from the centre, in the class of what
uncertainty is left. Nothing of the coarser layer is coded again.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from . import ladder

WITHIN_ZERO, WITHIN_STEP = -362, -459
"""Widths in 1/256 octaves over the coarse step: a coefficient that was rounded to zero lies within
about 0.65 steps of it, another one within half a step of its value; what is uniform there has a
standard deviation of 0.375 and of 0.289 steps."""

MAX_RATIO = 12 * ladder.UNITS_PER_OCTAVE
_RATIO_BITS = 16


def expect(
    below: NDArray[np.int32], is_stored: NDArray[np.bool_], log_sigmas: NDArray[np.int16],
    coarse: int, fine: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Centres and classes, int64 ``[n, U]``, of coefficients at the step ``fine``.

    ``below``: int32 ``[n, U]``, their values at the step ``coarse``, of those that ``is_stored``
    there, bool ``[U]``. ``log_sigmas``: int16 ``[U]``. Steps and sigmas in 1/256 octaves, and
    ``0 < coarse - fine <= MAX_RATIO``.

    >>> below = np.array([[0, 0, 3]], np.int32)
    >>> expect(below, np.array([False, True, True]), np.zeros(3, np.int16), 512, 256)
    (array([[0, 0, 6]]), array([[8, 8, 8]]))
    """
    ratio = _ratio(coarse - fine)
    size = np.abs(below.astype(np.int64))
    half = 1 << (_RATIO_BITS - 1)
    centres: NDArray[np.int64] = np.sign(below) * ((size * ratio + half) >> _RATIO_BITS)
    sigmas = log_sigmas.astype(np.int64)
    zero = np.where(is_stored, np.minimum(sigmas, coarse + WITHIN_ZERO), sigmas)
    other = np.minimum(sigmas, coarse + WITHIN_STEP)
    # What is stored at the coarse step has a class at the finer one, however narrow it became.
    classes: list[NDArray[np.int64]] = [
        np.maximum(ladder.class_of(each, fine), 0) for each in (zero, other)
    ]
    return centres, np.where(below == 0, classes[0], classes[1])


@lru_cache(maxsize=64)
def _ratio(units: int) -> int:
    """``2 ** (units / 256)`` in 1/65536, the nearest integer."""
    octaves, rest = divmod(units, ladder.UNITS_PER_OCTAVE)
    # No power of 2 with such an exponent comes so near a half that a float would round it wrongly.
    scaled = 2.0 ** (rest / ladder.UNITS_PER_OCTAVE + _RATIO_BITS + octaves)
    return int(np.floor(scaled + 0.5))
