"""Gather columns of like distribution into classes that share one frequency table.

The encoder's choice alone: a decoder only sees the classes. The objective is the length of what is
stored, so that short blocks get few classes and long ones many: code length of the symbols under
their class's distribution plus about `_BITS_PER_ENTRY` bits for each table entry in use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import ops
from tscfile_kernels.ops import PROBABILITY_BITS

_BITS_PER_ENTRY = 6.5
_MAX_CLASSES = 32
_SYMBOLS_PER_CLASS = 4096
_SAMPLED_COLUMNS = 256
_ROUNDS = 4
_FINAL_ROUNDS = 1
_TOTAL = 1 << PROBABILITY_BITS

# Code lengths in 1/256 bit: a column of 65536 symbols, the longest there is, of 16 bits each then
# stays below 1 << 31, as `ops.nearest_class` wants it.
_UNITS_PER_BIT = 256
_LONGEST = 16 * _UNITS_PER_BIT


def choose(counts: NDArray[np.uint32]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Classes for columns with these symbol counts.

    ``counts``: uint32 ``[n_columns, n_symbols]``. Returns the class of each column, uint8
    ``[n_columns]``, and frequencies, uint16 ``[n_classes, n_symbols]``, whose rows sum to 4096 and
    are positive wherever a column of the class uses the symbol.

    >>> import numpy as np
    >>> counts = np.array([[90, 10], [11, 89]] * 200, np.uint32)
    >>> class_of_column, frequencies = choose(counts)
    >>> frequencies.tolist(), class_of_column[:4].tolist()
    ([[3686, 410], [451, 3645]], [0, 1, 0, 1])
    """
    n_classes = int(min(_MAX_CLASSES, len(counts), 1 + counts.sum() // _SYMBOLS_PER_CLASS))
    # Classes are found on some of the columns: they are alike, and the search is the slow part.
    sample = counts
    if len(counts) > _SAMPLED_COLUMNS:
        # A scattered choice (Knuth's multiplicative hash), the same on every platform.
        hashed = np.arange(len(counts), dtype=np.uint32) * np.uint32(2654435761)
        sample = counts[np.argsort(hashed)[:_SAMPLED_COLUMNS]]
    labels = _refine(sample, _spread(sample, n_classes), _ROUNDS)
    totals = _merge(ops.class_totals(sample, labels, n_classes).astype(np.float32))
    labels = _refine(counts, _assign(counts, totals), _FINAL_ROUNDS)
    used, found = np.unique(labels, return_inverse=True)
    labels = found.astype(np.uint8)
    final = ops.class_totals(counts, labels, len(used))
    return labels, np.stack([_normalise(total) for total in final])


def _spread(counts: NDArray[np.uint32], n_classes: int) -> NDArray[np.uint8]:
    """A first labelling: farthest columns in Hellinger distance are the centres."""
    points = np.sqrt(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    centre = 0
    nearest = np.full(len(points), np.inf, np.float32)
    labels = np.zeros(len(points), np.uint8)
    for label in range(n_classes):
        distance = 2 - 2 * np.einsum("cs,s->c", points, points[centre])
        closer = distance < nearest
        labels[closer] = label
        nearest = np.minimum(nearest, distance)
        centre = int(nearest.argmax())
    return labels


def _refine(
    counts: NDArray[np.uint32], labels: NDArray[np.uint8], rounds: int
) -> NDArray[np.uint8]:
    """k-means with code length as the distance."""
    n_classes = int(labels.max()) + 1
    for _ in range(rounds):
        moved = _assign(counts, ops.class_totals(counts, labels, n_classes).astype(np.float32))
        if (moved == labels).all():
            break
        labels = moved
    return labels


def _assign(counts: NDArray[np.uint32], totals: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The best class for each column, given what each class holds now."""
    # A little for symbols that a class has not seen; a class without columns has even odds.
    smoothed = totals + np.float32(0.02)
    bits = -np.log2(smoothed / smoothed.sum(axis=1, keepdims=True))
    lengths = np.minimum(np.rint(bits * _UNITS_PER_BIT), _LONGEST).astype(np.int32)
    return ops.nearest_class(counts, lengths)


def _merge(totals: NDArray[np.float32]) -> NDArray[np.float32]:
    """Join the pair of classes that saves most, as long as any pair saves bits.

    ``totals``: symbol counts ``[n_classes, n_symbols]``; returns those of the classes left.
    """
    totals = totals[totals.sum(axis=1) > 0]
    n_classes = len(totals)
    costs = _cost(totals)
    gains = np.full((n_classes, n_classes), -np.inf, np.float32)
    for a in range(n_classes - 1):
        gains[a, a + 1 :] = costs[a] + costs[a + 1 :] - _cost(totals[a] + totals[a + 1 :])
    alive = np.ones(n_classes, bool)
    while gains.max() > 0:
        a, b = (int(i) for i in np.unravel_index(gains.argmax(), gains.shape))
        alive[b] = False
        totals[a] += totals[b]
        gains[b, :] = gains[:, b] = -np.inf
        costs[a] = _cost(totals[a : a + 1])[0]
        renewed = costs[a] + costs - _cost(totals[a] + totals)
        gains[a, a + 1 :] = np.where(alive[a + 1 :], renewed[a + 1 :], -np.inf)
        gains[:a, a] = np.where(alive[:a], renewed[:a], -np.inf)
    left: NDArray[np.float32] = totals[alive]
    return left


def _cost(totals: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bits of each class: its symbols at their own entropy, and its table."""
    sums = totals.sum(axis=1)
    own = (totals * np.log2(np.maximum(totals, 1))).sum(axis=1)
    entries: NDArray[np.intp] = np.count_nonzero(totals, axis=1)
    tables = np.float32(_BITS_PER_ENTRY) * entries
    bits: NDArray[np.float32] = sums * np.log2(np.maximum(sums, 1)) - own + tables
    return bits


def _normalise(total: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Frequencies that sum to 4096, at least 1 for every symbol in use."""
    exact = total * (_TOTAL / float(total.sum()))
    frequencies: NDArray[np.int64] = np.maximum(np.rint(exact), total > 0).astype(np.int64)
    # What rounding left over goes to the largest, where a unit changes the length least.
    surplus = int(frequencies.sum()) - _TOTAL
    while surplus:
        largest = int(frequencies.argmax())
        step = min(surplus, int(frequencies[largest]) // 2) if surplus > 0 else surplus
        frequencies[largest] -= step
        surplus -= step
    return frequencies.astype(np.uint16)
