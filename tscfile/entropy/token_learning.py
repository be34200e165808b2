"""Learn the tables of the token-id model from documents.

Floating point is free here: what is learnt is stored, and coding uses what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import ops

from . import token_tables

Tables = dict[str, NDArray[np.generic]]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_PAIRS, MOST_TRIPLES = 1 << 18, 1 << 19
"""Entries kept; those that occur least go first."""

_FOLDS = 4
_SESSION_TOKENS = 2048
_TRAINING_TOKENS = 1 << 21
_DIMENSIONS = 16
_SPARE = 8
_ROUNDS = 3


def learn(documents: Sequence[NDArray[np.int32]], n_tokens: int) -> Tables:
    """Tables for ids below ``n_tokens``, for `token_ids.TokenCoder` and to be stored in a book.

    ``documents``: int32 ids of each; ids out of range are passed over. The arrays are stored in
    at most ``7 n_tokens + 7 MOST_PAIRS + 4 MOST_TRIPLES + 8096`` bytes before zstd: 4.9 MB for
    131072 ids, of which zstd leaves less than half.
    """
    if not 1 <= n_tokens <= 1 << token_tables.MOST_ID_BITS:
        raise ValueError(f"{n_tokens} tokens are not between 1 and 2^{token_tables.MOST_ID_BITS}")
    runs = [run for document in documents for run in _known_runs(document, n_tokens)]
    if len(runs) < _FOLDS:
        runs = [part for run in runs for part in np.array_split(run, _FOLDS)]
    counts = np.bincount(_joined(runs, None), minlength=n_tokens)
    order = _order(_joined(runs, -1), counts)
    leaf_of_id = np.empty(n_tokens, np.int64)
    leaf_of_id[order] = np.arange(n_tokens)
    runs = [leaf_of_id[run] for run in runs]
    fixed: Tables = {
        "ids_order": token_tables.to_planes(order),
        "ids_unigram": token_tables.to_codes(counts[order]),
    }
    weights, match = _train(runs, fixed)
    return fixed | _followers(_joined(runs, -1), n_tokens) | _stored(weights, match)


def _known_runs(document: NDArray[np.int32], n_tokens: int) -> Iterator[Ints]:
    ids = document.astype(np.int64)
    unknown = (ids < 0) | (ids >= n_tokens)
    for part in np.split(ids, np.flatnonzero(unknown)):
        part = part[(part >= 0) & (part < n_tokens)]
        if len(part):
            yield part


def _joined(runs: Sequence[Ints], separator: int | None) -> Ints:
    parts = [np.zeros(0, np.int64)]
    for run in runs:
        parts.append(run)
        if separator is not None:
            parts.append(np.array([separator]))
    return np.concatenate(parts)


# --- order of the leaves ----------------------------------------------------------------------


def _order(stream: Ints, counts: Ints) -> Ints:
    """Ids in an order that has those of like neighbours close together.

    Halving the vocabulary by weight then makes nodes that are classes of tokens, and what is known
    of a class serves its rare members. ``stream``: ids, -1 between documents.
    """
    n_ids = len(counts)
    keys, times = _counted(stream, n_ids)
    share = (counts + 1) / (counts.sum() + n_ids)
    before, after = keys // n_ids, keys % n_ids
    places = np.concatenate(
        [_places(before, after, times, share, 0), _places(after, before, times, share, 1)], axis=1
    )
    order: list[int] = []
    waiting = [np.arange(n_ids)]
    while waiting:
        ids = waiting.pop()
        if len(ids) <= 2:
            order += ids.tolist()
            continue
        weight = share[ids]
        # By the coordinate that spreads most.
        around = places[ids] - np.average(places[ids], axis=0, weights=weight)
        axis = int(np.average(around * around, axis=0, weights=weight).argmax())
        ids = ids[np.argsort(around[:, axis], kind="stable")]
        reached = np.cumsum(share[ids])
        cut = int(np.clip(np.searchsorted(reached, reached[-1] / 2), 1, len(ids) - 1))
        waiting += [ids[cut:], ids[:cut]]
    return np.array(order, np.int64)


def _places(rows: Ints, columns: Ints, times: Ints, share: Floats, seed: int) -> Floats:
    """A point for each id so that those whose neighbours are distributed alike are close.

    Principal components of the square roots of the neighbours' distributions (Hellinger distance),
    each id weighted by its share: a randomised singular value decomposition of a sparse matrix.
    """
    n_ids = len(share)
    totals = np.maximum(np.bincount(rows, times, n_ids), 1)
    roots = np.sqrt(share)
    values = np.sqrt(times / totals[rows]) * roots[rows]
    mean = np.bincount(columns, values * roots[rows], n_ids)

    def times_columns(x: Floats) -> Floats:
        return _multiply(rows, columns, values, x) - roots[:, None] * (mean @ x)

    width = min(_DIMENSIONS + _SPARE, n_ids)
    x = np.random.default_rng(seed).normal(size=(n_ids, width))
    for _ in range(_ROUNDS):
        y = np.linalg.qr(times_columns(x))[0]
        x = np.linalg.qr(_multiply(columns, rows, values, y) - mean[:, None] * (roots @ y))[0]
    vectors: Floats = times_columns(x) / roots[:, None]
    return vectors


def _multiply(rows: Ints, columns: Ints, values: Floats, x: Floats) -> Floats:
    """A sparse matrix times ``x``, a column at a time."""
    parts = [np.bincount(rows, values * column[columns], len(x)) for column in x.T]
    return np.stack(parts, axis=1)


# --- counts -----------------------------------------------------------------------------------


def _counted(stream: Ints, n_ids: int) -> tuple[Ints, Ints]:
    """Pairs that occur, as ``before * n_ids + after`` and rising, and how often."""
    before, after = stream[:-1], stream[1:]
    known = (before >= 0) & (after >= 0)
    keys, times = np.unique(before[known] * n_ids + after[known], return_counts=True)
    return keys, times


def _followers(stream: Ints, n_ids: int) -> Tables:
    """Tables of what follows one token and two; ``stream``: leaves, -1 between documents."""
    pairs, times1 = _most(*_counted(stream, n_ids), MOST_PAIRS)
    before, after = pairs // n_ids, pairs % n_ids
    fan1 = np.bincount(before, minlength=n_ids)
    start1 = np.cumsum(fan1) - fan1
    # Triples as pair * n_ids + leaf. Both pairs in one must be known: the last names the leaf.
    pair_at = np.where((stream[:-1] >= 0) & (stream[1:] >= 0), stream[:-1] * n_ids + stream[1:], -1)
    pair_at = _find(pairs, pair_at)
    known = (pair_at[:-1] >= 0) & (pair_at[1:] >= 0)
    triples, times2 = np.unique(
        pair_at[:-1][known] * n_ids + stream[2:][known], return_counts=True
    )
    # A pair that was seen once says less than its place costs.
    often = np.bincount(triples // n_ids, times2, len(pairs))[triples // n_ids] >= 2
    triples, times2 = _most(triples[often], times2[often], MOST_TRIPLES)
    pair, leaf = triples // n_ids, triples % n_ids
    last = after[pair]
    ranks = np.searchsorted(pairs, last * n_ids + leaf) - start1[last]
    fan2 = np.bincount(pair, minlength=len(pairs))
    return {
        "ids_fan1": token_tables.to_planes(fan1),
        "ids_next1": token_tables.to_planes(token_tables.to_gaps(after, start1[fan1 > 0])),
        "ids_count1": token_tables.to_codes(times1),
        "ids_fan2": token_tables.to_planes(fan2),
        "ids_next2": token_tables.to_planes(
            token_tables.to_gaps(ranks, (np.cumsum(fan2) - fan2)[fan2 > 0])
        ),
        "ids_count2": token_tables.to_codes(times2),
    }


def _most(keys: Ints, times: Ints, limit: int) -> tuple[Ints, Ints]:
    """The most frequent, at most ``limit`` of them, still in order."""
    if len(keys) <= limit:
        return keys, times
    kept = np.sort(np.argsort(-times, kind="stable")[:limit])
    return keys[kept], times[kept]


def _find(keys: Ints, wanted: Ints) -> Ints:
    """Index of each in the rising ``keys``, -1 for those that are not there."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)


# --- weights ----------------------------------------------------------------------------------


def _train(runs: Sequence[Ints], fixed: Tables) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Weights that coding has come to, of documents that the tables have not seen.

    A quarter of the documents is coded with tables of the others, and so on in turn.
    """
    weights, match = token_tables.untrained()
    left = _TRAINING_TOKENS
    for fold in range(_FOLDS):
        others = [run for i, run in enumerate(runs) if i % _FOLDS != fold]
        n_ids = len(fixed["ids_unigram"])
        arrays = fixed | _followers(_joined(others, -1), n_ids) | _stored(weights, match)
        model = token_tables.expand(arrays, "learning")
        fold_left = left // (_FOLDS - fold)
        for run in runs[fold::_FOLDS]:
            for start in range(0, len(run), _SESSION_TOKENS):
                leaves = run[start : start + _SESSION_TOKENS].astype(np.int32)
                if len(leaves) <= fold_left:
                    ops.encode_tokens(model.tables, weights, match, leaves, leaves, 0)
                    fold_left -= len(leaves)
                    left -= len(leaves)
    return weights, match


def _stored(weights: NDArray[np.int32], match: NDArray[np.int32]) -> Tables:
    shift = token_tables.WEIGHT_SHIFT
    rounded = (weights + (1 << shift - 1)) >> shift
    return {
        "ids_weights": np.clip(rounded, -(1 << 15), (1 << 15) - 1).astype(np.int16),
        "ids_match": match.astype(np.uint16),
    }
