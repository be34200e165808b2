"""Gather columns of like distribution into classes that share one frequency table.

The encoder's choice alone: a decoder only sees the classes. The objective is the length of what is
stored, so that short blocks get few classes and long ones many: code length of the symbols under
their class's distribution plus about `_BITS_PER_ENTRY` bits for each table entry in use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels.ops import PROBABILITY_BITS

_BITS_PER_ENTRY = 6.5
_MAX_CLASSES = 32
_SYMBOLS_PER_CLASS = 4096
_ROUNDS = 8
_TOTAL = 1 << PROBABILITY_BITS


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
    real = counts.astype(np.float32)
    n_classes = int(min(_MAX_CLASSES, len(counts), 1 + real.sum() // _SYMBOLS_PER_CLASS))
    labels = _refine(real, _spread(real, n_classes))
    labels = _merge(real, labels)
    _, labels = np.unique(labels, return_inverse=True)
    totals = _class_counts(real, labels, int(labels.max()) + 1)
    return labels.astype(np.uint8), np.stack([_normalise(total) for total in totals])


def _spread(counts: NDArray[np.float32], n_classes: int) -> NDArray[np.int64]:
    """A first labelling: farthest columns in Hellinger distance are the centres."""
    points = np.sqrt(counts / counts.sum(axis=1, keepdims=True))
    centre = 0
    nearest = np.full(len(points), np.inf, np.float32)
    labels = np.zeros(len(points), np.int64)
    for label in range(n_classes):
        distance = 2 - 2 * points @ points[centre]
        closer = distance < nearest
        labels[closer] = label
        nearest = np.minimum(nearest, distance)
        centre = int(nearest.argmax())
    return labels


def _refine(counts: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """k-means with code length as the distance."""
    n_classes, n_symbols = int(labels.max()) + 1, counts.shape[1]
    for _ in range(_ROUNDS):
        totals = _class_counts(counts, labels, n_classes) + np.float32(0.02)
        # The sum first: a class without columns then has even odds, not none.
        lengths = -np.log2(totals / totals.sum(axis=1, keepdims=True))
        moved = (counts @ lengths.reshape(n_classes, n_symbols).T).argmin(axis=1)
        if (moved == labels).all():
            break
        labels = moved
    return labels


def _merge(counts: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join the pair of classes that saves most, as long as any pair saves bits."""
    _, labels = np.unique(labels, return_inverse=True)
    labels = labels.astype(np.int64)
    n_classes = int(labels.max()) + 1
    totals = _class_counts(counts, labels, n_classes)
    costs = _cost(totals)
    gains = np.full((n_classes, n_classes), -np.inf, np.float32)
    for a in range(n_classes - 1):
        gains[a, a + 1 :] = costs[a] + costs[a + 1 :] - _cost(totals[a] + totals[a + 1 :])
    while gains.max() > 0:
        a, b = (int(i) for i in np.unravel_index(gains.argmax(), gains.shape))
        labels[labels == b] = a
        totals[a] += totals[b]
        gains[b, :] = gains[:, b] = -np.inf
        costs[a] = _cost(totals[a : a + 1])[0]
        renewed = costs[a] + costs - _cost(totals[a] + totals)
        gains[a, a + 1 :] = np.where(np.isfinite(gains[a, a + 1 :]), renewed[a + 1 :], -np.inf)
        gains[:a, a] = np.where(np.isfinite(gains[:a, a]), renewed[:a], -np.inf)
    return labels


def _cost(totals: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bits of each class: its symbols at their own entropy, and its table."""
    sums = totals.sum(axis=1)
    own = (totals * np.log2(np.maximum(totals, 1))).sum(axis=1)
    entries: NDArray[np.intp] = np.count_nonzero(totals, axis=1)
    return sums * np.log2(np.maximum(sums, 1)) - own + np.float32(_BITS_PER_ENTRY) * entries


def _class_counts(
    counts: NDArray[np.float32], labels: NDArray[np.int64], n_classes: int
) -> NDArray[np.float32]:
    one_hot = (labels == np.arange(n_classes)[:, None]).astype(np.float32)
    return one_hot @ counts


def _normalise(total: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Frequencies that sum to 4096, at least 1 for every symbol in use."""
    exact = total.astype(np.float64) * (_TOTAL / float(total.sum()))
    frequencies = np.maximum(np.rint(exact), total > 0).astype(np.int64)
    # What rounding left over goes to the largest, where a unit changes the length least.
    surplus = int(frequencies.sum()) - _TOTAL
    while surplus:
        largest = int(frequencies.argmax())
        step = min(surplus, int(frequencies[largest]) // 2) if surplus > 0 else surplus
        frequencies[largest] -= step
        surplus -= step
    return frequencies.astype(np.uint16)
