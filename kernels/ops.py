"""Every kernel operation: its contract, its checks, and the choice of a backend.

Backends hold functions of the same names and take arguments that were checked here. They are
imported when first used, because Numba takes half a second to import.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import exact
from .exact import ExactGroup, Format

PROBABILITY_BITS = 12
"""Frequencies of a class sum to ``1 << PROBABILITY_BITS``."""

LANES = 32
"""Independent rANS states unless told otherwise; symbol ``i`` of the row-major matrix belongs to
lane ``i % lanes``. More are faster, and each takes four to eight bytes."""

LOWER_BOUND = 1 << 16
"""A state stays in ``[LOWER_BOUND, 1 << 32)`` and is renormalised by 16-bit words."""

TOKEN_WEIGHTS = (18, 7, 32)
"""Sets of weights, inputs of the token-id model, and buckets of each input; 65536 is 1."""

MATCH_LENGTHS = 16
"""Match lengths that the token-id model tells apart: 0 to 14, and 15 or more."""

MOST_LEAVES = (1 << 20) + 1
"""A leaf for each token id of a vocabulary, and one for all others."""

BACKENDS = ("cpu", "reference")


class TokenTables(NamedTuple):
    """What the token-id model knows beforehand; tokens are leaves of a binary tree.

    ``cumulative``: int64 ``[L + 1]``, sums of the leaves' weights; ``children``: int32 ``[L, 2]``,
    see `token_tree`. Leaf ``L - 1`` is the escape. ``first1``: int64 ``[L]``: the leaves that are
    known to follow leaf ``w`` are ``next1[first1[w] : first1[w + 1]]`` (int32, rising), and
    ``total1`` (int64 ``[E1 + 1]``) are the sums of their counts. ``first2`` (int64 ``[E1 + 1]``),
    ``next2``, ``total2`` are the same for each pair ``e`` of ``next1``.
    """

    cumulative: NDArray[np.int64]
    children: NDArray[np.int32]
    first1: NDArray[np.int64]
    next1: NDArray[np.int32]
    total1: NDArray[np.int64]
    first2: NDArray[np.int64]
    next2: NDArray[np.int32]
    total2: NDArray[np.int64]


class ExactEvents(NamedTuple):
    """Up to three events a value, ``[b, n, 3]``: ``starts`` and ``sizes`` uint32, of a whole of
    ``1 << bits`` (uint8; 0 for no event). ``regressors``: int64 ``[b, n]``; ``tables``,
    ``symbols``: uint8 ``[b, n]``, what the first event was coded with and as."""

    starts: NDArray[np.uint32]
    sizes: NDArray[np.uint32]
    bits: NDArray[np.uint8]
    regressors: NDArray[np.int64]
    tables: NDArray[np.uint8]
    symbols: NDArray[np.uint8]


def backend(name: str, module: str) -> ModuleType:
    """A ``module`` ("rans", "bits", "symbols", "token_ids", "centroids", "exact") of a backend.

    `ValueError` for a backend that is not known.
    """
    if name not in BACKENDS:
        raise ValueError(f"no kernel backend {name!r}; there are {', '.join(BACKENDS)}")
    return importlib.import_module(f"tscfile_kernels.{name}.{module}")


def count_symbols(
    symbols: NDArray[np.uint8], n_symbols: int, on: str = "cpu"
) -> NDArray[np.uint32]:
    """How often each symbol occurs in each column.

    ``symbols``: uint8 ``[n_rows, n_columns]``, all below ``n_symbols`` (not checked).
    Returns uint32 ``[n_columns, n_symbols]``.
    """
    _check(symbols, np.uint8, 2, "symbols")
    counts: NDArray[np.uint32] = backend(on, "symbols").count_symbols(symbols, n_symbols)
    return counts


def seen_symbols(
    matrix: NDArray[np.unsignedinteger], low_bits: int, n_symbols: int, on: str = "cpu"
) -> NDArray[np.bool_]:
    """Which values ``matrix >> low_bits`` takes, all below ``n_symbols`` (not checked).

    ``matrix``: uint8, uint16 or uint32 ``[n_rows, n_columns]``. Returns bool ``[n_symbols]``.
    """
    _check_words(matrix, "matrix")
    seen: NDArray[np.bool_] = backend(on, "symbols").seen_symbols(matrix, low_bits, n_symbols)
    return seen


def index_symbols(
    matrix: NDArray[np.unsignedinteger], low_bits: int, index_of: NDArray[np.uint8], on: str = "cpu"
) -> NDArray[np.uint8]:
    """``index_of[matrix >> low_bits]``: uint8 of ``matrix``'s shape."""
    _check_words(matrix, "matrix")
    _check(index_of, np.uint8, 1, "index_of")
    symbols: NDArray[np.uint8] = backend(on, "symbols").index_symbols(matrix, low_bits, index_of)
    return symbols


def nearest_class(
    counts: NDArray[np.uint32], lengths: NDArray[np.int32], on: str = "cpu"
) -> NDArray[np.uint8]:
    """The class whose code is shortest for each column; the first of equals.

    ``counts``: uint32 ``[n_columns, n_symbols]``; ``lengths``: int32 ``[n_classes, n_symbols]``,
    code lengths in any unit. Their products must sum to less than ``1 << 31`` (not checked).
    Returns uint8 ``[n_columns]``.
    """
    _check(counts, np.uint32, 2, "counts")
    _check(lengths, np.int32, 2, "lengths")
    labels: NDArray[np.uint8] = backend(on, "symbols").nearest_class(counts, lengths)
    return labels


def class_totals(
    counts: NDArray[np.uint32], labels: NDArray[np.uint8], n_classes: int, on: str = "cpu"
) -> NDArray[np.int64]:
    """Counts of each class: int64 ``[n_classes, n_symbols]``, rows of ``counts`` added by label."""
    _check(counts, np.uint32, 2, "counts")
    _check(labels, np.uint8, 1, "labels")
    totals: NDArray[np.int64] = backend(on, "symbols").class_totals(counts, labels, n_classes)
    return totals


def rans_encode(
    symbols: NDArray[np.uint8],
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
    lanes: int = LANES,
    on: str = "cpu",
) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """Code a matrix of symbols with one static distribution per class of columns.

    ``symbols``: uint8 ``[n_rows, n_columns]``; ``class_of_column``: uint8 ``[n_columns]``;
    ``frequencies``: uint16 ``[n_classes, n_symbols]``, every row sums to ``1 << 12`` and is
    positive wherever the class uses the symbol (not checked: an unused symbol divides by zero).

    Returns the 16-bit words of all lanes, lane after lane, in the order the decoder reads them,
    and uint32 ``[lanes]``, the number of words of each lane. A lane starts with its final encoder
    state, high word first. Range asymmetric numeral systems as in Duda, arXiv:1311.2540.

    >>> import numpy as np
    >>> symbols = np.zeros((4, 16), np.uint8)
    >>> one_class = np.zeros(16, np.uint8)
    >>> words, lengths = rans_encode(symbols, one_class, np.array([[4095, 1]], np.uint16),
    ...                              on="reference")
    >>> len(words), int(lengths.sum())
    (64, 64)
    """
    _check(symbols, np.uint8, 2, "symbols")
    _check(class_of_column, np.uint8, 1, "class_of_column")
    _check_frequencies(frequencies)
    if len(class_of_column) != symbols.shape[1]:
        raise ValueError("class_of_column needs one entry for each column of symbols")
    if not 1 <= lanes <= LANES:
        raise ValueError(f"{lanes} lanes are not between 1 and {LANES}")
    words, lengths = backend(on, "rans").rans_encode(symbols, class_of_column, frequencies, lanes)
    return words, lengths


def rans_decode(
    words: NDArray[np.uint16],
    lengths: NDArray[np.uint32],
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
    values: NDArray[np.unsignedinteger],
    out: NDArray[np.unsignedinteger],
    on: str = "cpu",
) -> bool:
    """Undo `rans_encode` and merge: ``out |= values[symbol]``.

    ``values``: ``[n_symbols]``, same dtype as ``out`` (uint8, uint16 or uint32); ``out``:
    C-contiguous ``[n_rows, n_columns]``, holding the low bits already. Any ``words`` and
    ``lengths`` that add up are safe to decode; False is returned if the lanes did not end where
    and as a genuine stream ends, and ``out`` is then rubbish.
    """
    _check(words, np.uint16, 1, "words")
    _check(lengths, np.uint32, 1, "lengths")
    _check(class_of_column, np.uint8, 1, "class_of_column")
    _check_frequencies(frequencies)
    _check_words(out, "out")
    if values.dtype != out.dtype or len(values) != frequencies.shape[1]:
        raise ValueError("values needs one entry of out's dtype for each symbol")
    if len(class_of_column) != out.shape[1]:
        raise ValueError("class_of_column needs one entry for each column of out")
    if len(class_of_column) and int(class_of_column.max()) >= len(frequencies):
        raise ValueError("class_of_column names a class without frequencies")
    if not 1 <= len(lengths) <= LANES or int(lengths.sum(dtype=np.uint64)) != len(words):
        return False
    if int(lengths.min()) < 2:
        return False
    ok: bool = backend(on, "rans").rans_decode(
        words, lengths, class_of_column, frequencies, values, out
    )
    return ok


def pack_bits(values: NDArray[np.uint8], width: int, on: str = "cpu") -> NDArray[np.uint8]:
    """Store the low ``width`` (1 to 7) bits of each value in ``width`` bytes per eight values.

    ``values``: uint8 ``[n]``, below ``1 << width``. Value ``p * n8 + j`` (``n8 = ceil(n / 8)``,
    the tail taken as zeros) for ``p < width`` sits in the low bits of byte ``p * n8 + j`` of the
    result; bit ``i`` of value ``(width + q) * n8 + j`` is bit ``width + q`` of byte
    ``i * n8 + j``. Runs of eight planes, so that both directions are vector code.

    >>> import numpy as np
    >>> pack_bits(np.array([1, 2, 3], np.uint8), 7, on="reference").tolist()
    [1, 2, 3, 0, 0, 0, 0]
    """
    _check(values, np.uint8, 1, "values")
    _check_width(width)
    packed: NDArray[np.uint8] = backend(on, "bits").pack_bits(values, width)
    return packed


def unpack_bits(
    packed: NDArray[np.uint8], width: int, n_values: int, on: str = "cpu"
) -> NDArray[np.uint8]:
    """Undo `pack_bits`: uint8 ``[n_values]`` from ``width * ceil(n_values / 8)`` bytes."""
    _check(packed, np.uint8, 1, "packed")
    _check_width(width)
    if len(packed) != packed_bytes(n_values, width):
        raise ValueError(f"{n_values} values of {width} bits do not take {len(packed)} bytes")
    values: NDArray[np.uint8] = backend(on, "bits").unpack_bits(packed, width, n_values)
    return values


def packed_bytes(n_values: int, width: int) -> int:
    """Bytes that `pack_bits` makes of ``n_values`` values."""
    return width * (-(-n_values // 8))


def token_tree(
    weights: NDArray[np.int64], on: str = "cpu"
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Halve the leaves by weight until each is alone; `TokenTables` holds the result.

    ``weights``: int64 ``[L]``, positive, of sum below ``1 << 48``. A node is named by the first
    leaf of its upper half, which no two nodes share. Returns int64 ``[L + 1]``, the sums of the
    weights before each leaf, and int32 ``[L, 2]``: the lower and the upper child of each node, 0
    for a single leaf. There is no node 0; the upper entry of row 0 is the root.

    >>> token_tree(np.array([1, 1, 1, 3], np.int64), on="reference")[1].tolist()
    [[0, 3], [0, 2], [0, 0], [1, 0]]
    """
    _check(weights, np.int64, 1, "weights")
    if not 2 <= len(weights) <= MOST_LEAVES:
        raise ValueError(f"{len(weights)} leaves are not between 2 and {MOST_LEAVES}")
    # The sum of the quotients keeps the check itself from overflowing.
    if int(weights.min()) < 1 or int((weights >> 20).sum()) >> 27:
        raise ValueError("weights must be positive and sum to less than 1 << 48")
    cumulative, children = backend(on, "token_ids").token_tree(weights)
    return cumulative, children


def encode_tokens(
    tables: TokenTables,
    weights: NDArray[np.int32],
    match: NDArray[np.int32],
    ids: NDArray[np.int32],
    leaves: NDArray[np.int32],
    n_context: int,
    on: str = "cpu",
) -> NDArray[np.uint8]:
    """Code the tokens behind the first ``n_context``, which the decoder knows: uint8 ``[n]``.

    ``ids``, ``leaves``: int32 ``[n_tokens]``; ids count where the leaf is the escape. ``weights``:
    int32 `TOKEN_WEIGHTS`, within ±2^20; ``match``: int32 `MATCH_LENGTHS`, 64 to 65472: the
    probabilities that a match of each length goes on. Both are left as the model has learnt them.
    ``spec/codecs/token-ids.md`` gives every step.
    """
    _check_model(tables, weights, match)
    _check_tokens(tables, ids, leaves, n_context)
    if len(leaves) and not 0 <= int(leaves.min()) <= int(leaves.max()) < len(tables.children):
        raise ValueError("a leaf is not in the tree")
    data: NDArray[np.uint8] = backend(on, "token_ids").encode_tokens(
        tables, weights, match, ids, leaves, n_context
    )
    return data


def decode_tokens(
    tables: TokenTables,
    weights: NDArray[np.int32],
    match: NDArray[np.int32],
    data: NDArray[np.uint8],
    ids: NDArray[np.int32],
    leaves: NDArray[np.int32],
    n_context: int,
    on: str = "cpu",
) -> bool:
    """Undo `encode_tokens`: fill ``leaves`` behind the context, and ``ids`` where they escape.

    Any ``data`` is safe to decode; False is returned if they are not exactly the bytes that the
    decoded tokens are coded in, and the result is then rubbish.
    """
    _check_model(tables, weights, match)
    _check(data, np.uint8, 1, "data")
    _check_tokens(tables, ids, leaves, n_context)
    known = leaves[:n_context]
    if n_context and not 0 <= int(known.min()) <= int(known.max()) < len(tables.children):
        raise ValueError("a leaf is not in the tree")
    ok: bool = backend(on, "token_ids").decode_tokens(
        tables, weights, match, data, ids, leaves, n_context
    )
    return ok


def nearest_centroids(
    vectors: NDArray[np.float32], centroids: NDArray[np.float32], on: str = "cpu"
) -> NDArray[np.uint8]:
    """The centroid at the least distance from each vector, the first of equals: uint8 ``[n]``.

    ``vectors``: float32 ``[n, d]``; ``centroids``: float32 ``[k, d]``, 1 to 256 of them; all
    finite (not checked). Twins may differ where two squared distances are within 2^-16 of the
    larger of the squared lengths.

    >>> centroids = np.array([[0, 0], [4, 0]], np.float32)
    >>> vectors = np.array([[1, 2], [3, 1]], np.float32)
    >>> nearest_centroids(vectors, centroids, on="reference").tolist()
    [0, 1]
    """
    _check(vectors, np.float32, 2, "vectors")
    _check(centroids, np.float32, 2, "centroids")
    if vectors.shape[1] != centroids.shape[1] or not 1 <= len(centroids) <= 256:
        raise ValueError("there must be 1 to 256 centroids, as wide as the vectors")
    nearest: NDArray[np.uint8] = backend(on, "centroids").nearest_centroids(vectors, centroids)
    return nearest


def gather_centroids(
    codes: NDArray[np.uint8],
    counts: NDArray[np.int64],
    books: NDArray[np.int32],
    columns: NDArray[np.int32],
    centroids: NDArray[np.float32],
    n_columns: int,
    on: str = "cpu",
) -> NDArray[np.float32]:
    """What codes stand for: a sum of one centroid for each stage, float32 ``[n, n_columns]``.

    Row ``i`` has the next ``counts[i]`` (int64 ``[n]``) of ``codes`` (uint8 ``[sum(counts)]``), one
    for each of the first stages. Stage ``s`` adds ``centroids[books[s], code]`` (float32
    ``[B, k, d]``) to the columns ``columns[s]`` (int32 ``[S, d]``, each at most once in a stage,
    not checked), in the order of the stages. `ValueError` for an index that is not there.

    >>> centroids = np.array([[[1, 2], [3, 4]]], np.float32)
    >>> columns = np.array([[0, 2], [1, 2]], np.int32)
    >>> codes, counts = np.array([1, 0, 1], np.uint8), np.array([2, 1])
    >>> books = np.zeros(2, np.int32)
    >>> gather_centroids(codes, counts, books, columns, centroids, 3, on="reference").tolist()
    [[3.0, 1.0, 6.0], [3.0, 0.0, 4.0]]
    """
    _check(codes, np.uint8, 1, "codes")
    _check(counts, np.int64, 1, "counts")
    _check(books, np.int32, 1, "books")
    _check(columns, np.int32, 2, "columns")
    _check(centroids, np.float32, 3, "centroids")
    n_books, n_centroids, width = centroids.shape
    if len(books) != len(columns) or columns.shape[1] != width:
        raise ValueError("books, columns and centroids do not fit each other")
    for array, limit, what in (
        (codes, n_centroids, "code"), (books, n_books, "codebook"), (columns, n_columns, "column"),
        (counts, len(books) + 1, "count"),
    ):  # fmt: skip
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < limit:
            raise ValueError(f"a {what} is not below {limit}")
    if int(counts.sum()) != len(codes):
        raise ValueError(f"{len(codes)} codes are not as many as their counts say")
    values: NDArray[np.float32] = backend(on, "centroids").gather_centroids(
        codes, counts, books, columns, centroids, n_columns
    )
    return values


def exact_events(
    group: ExactGroup,
    base: NDArray[np.int64],
    angles: tuple[NDArray[np.int64], NDArray[np.int64]],
    means: NDArray[np.int64],
    patterns: NDArray[np.uint16],
    form: Format,
    cumulative: NDArray[np.uint32],
    on: str = "cpu",
) -> ExactEvents:
    """What the coder of exact values codes for ``b`` channels of ``n`` frames.

    ``base``: int64 ``[b, n]``, what channels before the group predict, in magnitude below
    ``1 << 52``; ``angles``: cosines and sines int64 ``[n_pairs, n]``, in magnitude at most
    ``1 << exact.ANGLE_BITS``; ``means``: int64 ``[n]``, the running mean of each frame's errors,
    which is left as it is behind the group; ``patterns``: uint16 ``[b, n]``; ``cumulative``: uint32
    ``[256, exact.N_SYMBOLS + 1]``, sums of frequencies, all positive. What ``group`` holds is for
    those who make it to see to. ``spec/codecs/book-exact.md`` gives every step.
    """
    _check_exact(group, base, angles, means, cumulative)
    _check(patterns, np.uint16, 2, "patterns")
    if patterns.shape != base.shape:
        raise ValueError("patterns and base are of two shapes")
    return ExactEvents(
        *backend(on, "exact").exact_events(group, base, angles, means, patterns, form, cumulative)
    )


def exact_encode(
    starts: NDArray[np.uint32],
    sizes: NDArray[np.uint32],
    bits: NDArray[np.uint8],
    lanes: int,
    on: str = "cpu",
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Code the events of `ExactEvents`, all ``[n_channels, n_frames, 3]``: 32-bit words, lane after
    lane, and how many each lane has. Frame ``t`` belongs to lane ``t % lanes``; a lane starts with
    its final state, high word first. `ValueError` for other than 1 to `LANES` lanes.
    """
    for array, dtype, name in ((starts, np.uint32, "starts"), (sizes, np.uint32, "sizes"),
                               (bits, np.uint8, "bits")):  # fmt: skip
        _check(array, dtype, 3, name)
    if not starts.shape == sizes.shape == bits.shape or bits.shape[2] != 3:
        raise ValueError("events do not have one shape")
    if not 1 <= lanes <= LANES:
        raise ValueError(f"{lanes} lanes are not between 1 and {LANES}")
    words, lengths = backend(on, "exact").exact_encode(starts, sizes, bits, lanes)
    return words, lengths


class ExactDecoder:
    """The coder of exact values read backwards: `decode` gives group after group.

    ``words``: uint32, ``lengths``: uint32 ``[lanes]``, as `exact_encode` made them. Any words are
    safe to decode.
    """

    def __init__(
        self, words: NDArray[np.uint32], lengths: NDArray[np.uint32],
        cumulative: NDArray[np.uint32], on: str = "cpu",
    ) -> None:  # fmt: skip
        """`ValueError` if there are not 1 to `LANES` lanes of two words or more."""
        _check(words, np.uint32, 1, "words")
        _check(lengths, np.uint32, 1, "lengths")
        if not 1 <= len(lengths) <= LANES or int(lengths.min()) < 2:
            raise ValueError("a lane has a state of two words")
        self._ends = np.cumsum(lengths, dtype=np.int64)
        if int(self._ends[-1]) != len(words):
            raise ValueError("lengths do not add up to the words")
        first = self._ends - lengths
        self._states = words[first].astype(np.uint64) << np.uint64(32) | words[first + 1]
        self._cursors = first + 2
        self._words, self._cumulative, self._on = words, cumulative, on
        self._genuine = bool((self._states >= 1 << exact.STATE_BITS).all()) and bool(
            (self._states < 1 << (exact.STATE_BITS + 32)).all()
        )
        self._lookup = backend(on, "exact").exact_lookup(cumulative)

    def decode(
        self, group: ExactGroup, base: NDArray[np.int64],
        angles: tuple[NDArray[np.int64], NDArray[np.int64]], means: NDArray[np.int64], form: Format,
    ) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:  # fmt: skip
        """Patterns uint16 and regressors int64 of the next group, both ``[b, n]``."""
        _check_exact(group, base, angles, means, self._cumulative)
        patterns, regressors, genuine = backend(self._on, "exact").exact_decode(
            group, base, angles, means, form, self._cumulative, self._lookup, self._words,
            self._states, self._cursors, self._ends,
        )  # fmt: skip
        self._genuine &= genuine
        return patterns, regressors

    def ended(self) -> bool:
        """Did all lanes end where and as a genuine stream ends?"""
        at_start = bool((self._states == 1 << exact.STATE_BITS).all())
        return self._genuine and at_start and bool((self._cursors == self._ends).all())


def _check_model(
    tables: TokenTables, weights: NDArray[np.int32], match: NDArray[np.int32]
) -> None:
    """Shapes and types; that the tables hang together is for those who make them to see to."""
    _check(tables.children, np.int32, 2, "children")
    for name in ("next1", "next2"):
        _check(getattr(tables, name), np.int32, 1, name)
    for name in ("cumulative", "first1", "total1", "first2", "total2"):
        _check(getattr(tables, name), np.int64, 1, name)
    n_leaves, n_pairs, n_triples = len(tables.children), len(tables.next1), len(tables.next2)
    lengths = [len(part) for part in tables]
    wanted = [n_leaves + 1, n_leaves, n_leaves, n_pairs, n_pairs + 1]
    if lengths != [*wanted, n_pairs + 1, n_triples, n_triples + 1]:
        raise ValueError("tables of tokens do not fit each other")
    _check(weights, np.int32, 3, "weights")
    _check(match, np.int32, 1, "match")
    if weights.shape != TOKEN_WEIGHTS or len(match) != MATCH_LENGTHS:
        raise ValueError("weights or match probabilities do not have their shape")
    if int(np.abs(weights).max()) > 1 << 20 or not 64 <= int(match.min()) <= int(match.max()) <= (
        1 << 16
    ) - 64:
        raise ValueError("weights or match probabilities are out of range")


def _check_tokens(
    tables: TokenTables, ids: NDArray[np.int32], leaves: NDArray[np.int32], n_context: int
) -> None:
    _check(ids, np.int32, 1, "ids")
    _check(leaves, np.int32, 1, "leaves")
    if len(ids) != len(leaves) or not 0 <= n_context <= len(leaves):
        raise ValueError("ids and leaves must be alike in length, and the context within them")


def _check_exact(
    group: ExactGroup, base: NDArray[np.int64],
    angles: tuple[NDArray[np.int64], NDArray[np.int64]], means: NDArray[np.int64],
    cumulative: NDArray[np.uint32],
) -> None:  # fmt: skip
    _check(base, np.int64, 2, "base")
    n_channels, n_frames = base.shape
    for name, array in zip(group._fields, group, strict=True):
        _check(array, np.int64, 2 if name == "weights" else 1, name)
        if array.shape != (n_channels,) * array.ndim:
            raise ValueError(f"{name} are not those of {n_channels} channels")
    _check(means, np.int64, 1, "means")
    for array in angles:
        _check(array, np.int64, 2, "angles")
    if len(means) != n_frames or any(array.shape[1] != n_frames for array in angles):
        raise ValueError(f"means or angles are not those of {n_frames} frames")
    turned = group.pairs[group.pairs >= 0]
    if (np.bincount(turned, minlength=1) % 2).any() or turned.max(initial=-1) >= len(angles[0]):
        raise ValueError("pairs do not come in twos or have no angles")
    _check(cumulative, np.uint32, 2, "cumulative")
    if cumulative.shape != (exact.N_RATIOS * exact.N_PLACES, exact.N_SYMBOLS + 1):
        raise ValueError("cumulative does not hold the frequencies of all tables")


def _check(array: NDArray[np.generic], dtype: type, ndim: int, name: str) -> None:
    if array.dtype != dtype or array.ndim != ndim or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be a C-contiguous {ndim}-d array of {dtype.__name__}")


def _check_words(array: NDArray[np.generic], name: str) -> None:
    if array.dtype not in (np.uint8, np.uint16, np.uint32) or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be a C-contiguous array of uint8, uint16 or uint32")


def _check_frequencies(frequencies: NDArray[np.uint16]) -> None:
    _check(frequencies, np.uint16, 2, "frequencies")
    n_classes, n_symbols = frequencies.shape
    if not 1 <= n_classes <= 256 or not 1 <= n_symbols <= 256:
        raise ValueError("there must be 1 to 256 classes of 1 to 256 symbols")
    if (frequencies.sum(axis=1, dtype=np.uint32) != 1 << PROBABILITY_BITS).any():
        raise ValueError(f"frequencies of a class must sum to {1 << PROBABILITY_BITS}")


def _check_width(width: int) -> None:
    if not 1 <= width <= 7:
        raise ValueError(f"a width of {width} bits is not between 1 and 7")
