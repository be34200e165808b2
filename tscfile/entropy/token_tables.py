"""Tables of the token-id model: as a book stores them, and as the kernels want them.

What is stored is small rather than handy: counts as steps of a ladder, successors as gaps, those
of a pair as ranks among the successors of its last token, and every array of integers as byte
planes. ``spec/codecs/token-ids.md`` gives every array.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import logistic, ops

from ..errors import DamagedError

MOST_ID_BITS = 20
"""Ids from ``1 << MOST_ID_BITS`` on are escapes whatever the vocabulary."""

WEIGHT_SHIFT = 4
"""Stored weights are in units of 16 / 65536."""

_MOST_ENTRIES = 1 << 24
_LAST_CODE = 47
_PLAIN_WEIGHT = 7 << 12
_PLAIN_MATCH = 15 << 12

_DIMENSIONS = {
    "ids_order": 2, "ids_unigram": 1, "ids_fan1": 2, "ids_next1": 2, "ids_count1": 1,
    "ids_fan2": 2, "ids_next2": 2, "ids_count2": 1, "ids_weights": 3, "ids_match": 1,
}  # fmt: skip
_TYPES = {"ids_weights": np.dtype("i2"), "ids_match": np.dtype("u2")}


class Model(NamedTuple):
    """The model before it has seen a token; ``id_of_leaf`` int32 ``[V]``, ``leaf_of_id`` alike."""

    id_of_leaf: NDArray[np.int32]
    leaf_of_id: NDArray[np.int32]
    tables: ops.TokenTables
    weights: NDArray[np.int32]
    match: NDArray[np.int32]

    def leaves(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Leaf of each id, int32; ``V`` for those that have none."""
        n_ids = len(self.leaf_of_id)
        known = (ids >= 0) & (ids < n_ids)
        leaves = self.leaf_of_id[np.where(known, ids, 0)]
        return np.where(known, leaves, np.int32(n_ids)).astype(np.int32)


@lru_cache(maxsize=2)
def plain(bits: int) -> Model:
    """The model that has learnt nothing, of ids below ``1 << bits``.

    Tokenizers number their tokens by and large from the frequent to the rare.
    """
    ids = np.arange(1 << bits, dtype=np.int32)
    weights = (1 << 24) // (ids.astype(np.int64) + 128)
    tables = _tables(weights, np.zeros_like(weights), *[np.zeros(0, np.int64)] * 5)
    return Model(ids, ids, tables, *untrained())


def untrained() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Weights and match probabilities to begin with."""
    weights = np.full(ops.TOKEN_WEIGHTS, _PLAIN_WEIGHT, np.int32)
    return weights, np.full(ops.MATCH_LENGTHS, _PLAIN_MATCH, np.int32)


def to_planes(values: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Bytes of integers from the lowest up, uint8 ``[planes, n]``; as many as the largest needs.

    >>> to_planes(np.array([1, 258])).tolist()
    [[1, 2], [0, 1]]
    """
    n_planes = max(1, -(-int(values.max(initial=0)).bit_length() // 8))
    return np.stack([(values >> 8 * i & 0xFF).astype(np.uint8) for i in range(n_planes)])


def to_codes(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The step of the ladder that is nearest to each count, the higher of two."""
    steps = logistic.ladder(np.arange(_LAST_CODE + 1))
    middles = (steps[1:] + steps[:-1] + 1) // 2
    return np.searchsorted(middles, counts, side="right").astype(np.uint8)


def to_gaps(values: NDArray[np.int64], firsts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Undo `_rising`: ``firsts`` are the indices at which a list starts."""
    gaps = np.diff(values, prepend=-1) - 1
    gaps[firsts] = values[firsts]
    return gaps


def expand(arrays: Mapping[str, NDArray[np.generic]], where: str) -> Model:
    """The model that stored arrays describe; `DamagedError` if they describe none."""

    def need(holds: bool | np.bool_, what: str) -> None:
        if not holds:
            raise DamagedError(f"{where}: token tables: {what}; damaged")

    parts: dict[str, NDArray[Any]] = {}
    for name, n_dimensions in _DIMENSIONS.items():
        part = arrays.get(name)
        need(part is not None, f"{name} is missing")
        assert part is not None
        dtype = _TYPES.get(name, np.dtype("u1"))
        need(part.dtype == dtype and part.ndim == n_dimensions, f"{name} has the wrong type")
        parts[name] = part
    # 1 to 4 planes of at most `_MOST_ENTRIES` each.
    for name, part in parts.items():
        need(part.shape[-1] <= _MOST_ENTRIES, f"{name} is too long")
        need(part.ndim != 2 or 1 <= len(part) <= 4, f"{name} has {len(part)} planes")
    n_ids, n_pairs = len(parts["ids_unigram"]), len(parts["ids_count1"])
    n_triples = len(parts["ids_count2"])
    need(1 <= n_ids <= 1 << MOST_ID_BITS, f"{n_ids} ids")
    for name, length in (
        ("ids_order", n_ids), ("ids_fan1", n_ids), ("ids_next1", n_pairs),
        ("ids_fan2", n_pairs), ("ids_next2", n_triples),
    ):  # fmt: skip
        need(parts[name].shape[1] == length, f"{name} has the wrong length")
    order = _from_planes(parts["ids_order"])
    need(np.array_equal(np.sort(order), np.arange(n_ids)), "ids_order is no order of the ids")
    counts = {}
    for name in ("ids_unigram", "ids_count1", "ids_count2"):
        need(parts[name].max(initial=0) <= _LAST_CODE, f"{name} leaves the ladder")
        counts[name] = logistic.ladder(parts[name])
    for name in ("ids_count1", "ids_count2"):
        need(counts[name].min(initial=1) > 0, f"{name} counts nothing")
    fan1, fan2 = _from_planes(parts["ids_fan1"]), _from_planes(parts["ids_fan2"])
    need(fan1.sum() == n_pairs, "ids_fan1 does not add up")
    need(fan2.sum() == n_triples, "ids_fan2 does not add up")
    next1 = _rising(_from_planes(parts["ids_next1"]), fan1)
    need(next1.max(initial=0) < n_ids, "ids_next1 leaves the ids")
    ranks = _rising(_from_planes(parts["ids_next2"]), fan2)
    last = np.repeat(next1, fan2)
    need((ranks < fan1[last]).all(), "ids_next2 leaves the followers")
    next2 = next1[_starts(fan1)[last] + ranks]
    weights, match = parts["ids_weights"], parts["ids_match"]
    need(weights.shape == ops.TOKEN_WEIGHTS, "ids_weights has the wrong shape")
    need(match.shape == (ops.MATCH_LENGTHS,), "ids_match has the wrong length")
    need(64 <= match.min() <= match.max() <= (1 << 16) - 64, "ids_match is out of range")
    leaf_of_id = np.empty(n_ids, np.int32)
    leaf_of_id[order] = np.arange(n_ids, dtype=np.int32)
    tables = _tables(
        4 * counts["ids_unigram"] + 1,
        fan1, next1, counts["ids_count1"], fan2, next2, counts["ids_count2"],
    )  # fmt: skip
    scaled = weights.astype(np.int32) << WEIGHT_SHIFT
    return Model(order.astype(np.int32), leaf_of_id, tables, scaled, match.astype(np.int32))


def _tables(
    weights: NDArray[np.int64],
    fan1: NDArray[np.int64],
    next1: NDArray[np.int64],
    counts1: NDArray[np.int64],
    fan2: NDArray[np.int64],
    next2: NDArray[np.int64],
    counts2: NDArray[np.int64],
) -> ops.TokenTables:
    """Tables from int64 arrays; the escape is added, with weight 1."""
    cumulative, children = ops.token_tree(np.append(weights, 1))
    return ops.TokenTables(
        cumulative, children,
        _sums(fan1), next1.astype(np.int32), _sums(counts1),
        _sums(fan2), next2.astype(np.int32), _sums(counts2),
    )  # fmt: skip


def _from_planes(planes: NDArray[np.generic]) -> NDArray[np.int64]:
    values = np.zeros(planes.shape[1], np.int64)
    for i, plane in enumerate(planes):
        values |= plane.astype(np.int64) << 8 * i
    return values


def _sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of the values before each, and of all: int64 ``[n + 1]``."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])


def _starts(fan: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(fan) - fan


def _rising(gaps: NDArray[np.int64], fan: NDArray[np.int64]) -> NDArray[np.int64]:
    """Values of lists of ``fan`` values each: the first is its gap, each next one more than the
    one before plus its gap."""
    running = _sums(gaps + 1)
    return running[1:] - 1 - np.repeat(running[_starts(fan)], fan)
