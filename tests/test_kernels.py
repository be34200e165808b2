"""Kernels: both backends make the same bits, and no damaged stream reads past its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tscfile_kernels import ops
from tscfile_kernels.ops import LANES, PROBABILITY_BITS

TOTAL = 1 << PROBABILITY_BITS
# Around the number of lanes, one row, one column, whole and broken rows of lanes.
SHAPES = [(1, 1), (1, 31), (1, 33), (33, 1), (3, 7), (5, 32), (2, 96), (17, 64), (40, 130)]
WORD_TYPES = (np.uint8, np.uint16, np.uint32)


def make_frequencies(
    rng: np.random.Generator, n_classes: int, n_symbols: int
) -> NDArray[np.uint16]:
    """Random tables, all symbols possible, some of them rare."""
    tables = np.ones((n_classes, n_symbols), np.int64)
    for table in tables:
        odds = rng.dirichlet(np.full(n_symbols, 0.3))
        table += rng.multinomial(TOTAL - n_symbols, odds)
    return tables.astype(np.uint16)


def make_symbols(
    rng: np.random.Generator,
    shape: tuple[int, int],
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
) -> NDArray[np.uint8]:
    columns = [
        rng.choice(frequencies.shape[1], shape[0], p=frequencies[k] / TOTAL)
        for k in class_of_column
    ]
    return np.ascontiguousarray(np.stack(columns, axis=1).astype(np.uint8))


def make_stream(seed: int, shape: tuple[int, int], n_classes: int = 3, n_symbols: int = 17):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    frequencies = make_frequencies(rng, n_classes, n_symbols)
    classes = rng.integers(0, n_classes, shape[1]).astype(np.uint8)
    symbols = make_symbols(rng, shape, classes, frequencies)
    return symbols, classes, frequencies


def decode(words, lengths, classes, frequencies, shape, on="cpu"):  # type: ignore[no-untyped-def]
    out = np.zeros(shape, np.uint8)
    values = np.arange(frequencies.shape[1], dtype=np.uint8)
    return ops.rans_decode(words, lengths, classes, frequencies, values, out, on=on), out


# rANS -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_symbols", [1, 2, 17, 256])
def test_rans_twins_agree_and_decode(shape: tuple[int, int], n_symbols: int) -> None:
    symbols, classes, frequencies = make_stream(len(SHAPES) * n_symbols, shape, 3, n_symbols)
    words, lengths = ops.rans_encode(symbols, classes, frequencies)
    slow_words, slow_lengths = ops.rans_encode(symbols, classes, frequencies, on="reference")
    assert words.dtype == slow_words.dtype and np.array_equal(words, slow_words)
    assert lengths.dtype == slow_lengths.dtype and np.array_equal(lengths, slow_lengths)
    for on in ops.BACKENDS:
        for dtype in WORD_TYPES:
            # Spread over the whole width, with low bits that are there already.
            shift = 8 * np.dtype(dtype).itemsize - 8
            values = np.arange(n_symbols, dtype=dtype) << dtype(shift)
            low = np.full(shape, 0 if shift == 0 else 0x5A, dtype)
            out = low.copy()
            assert ops.rans_decode(words, lengths, classes, frequencies, values, out, on=on)
            assert np.array_equal(out, low | values[symbols])


@pytest.mark.parametrize("table", [[4096], [4096, 0], [0, 4096], [4095, 1], [1, 4095]])
@pytest.mark.parametrize("shape", [(3, 5), (7, 64)])
def test_rans_at_the_limits_of_a_table(table: list[int], shape: tuple[int, int]) -> None:
    frequencies = np.array([table], np.uint16)
    classes = np.zeros(shape[1], np.uint8)
    for symbol in np.flatnonzero(frequencies[0]):
        symbols = np.full(shape, symbol, np.uint8)
        coded = [ops.rans_encode(symbols, classes, frequencies, on=on) for on in ops.BACKENDS]
        assert all(np.array_equal(a, b) for a, b in zip(*coded, strict=True))
        for on in ops.BACKENDS:
            ok, out = decode(*coded[0], classes, frequencies, shape, on=on)
            assert ok and (out == symbol).all()


def test_rans_length_is_that_of_the_ideal_code() -> None:
    symbols, classes, frequencies = make_stream(5, (2048, 64), 4, 40)
    words, _ = ops.rans_encode(symbols, classes, frequencies)
    odds = frequencies[classes[None, :].repeat(len(symbols), 0), symbols] / TOTAL
    ideal = -np.log2(odds).sum()
    # Each lane ends with a state of 32 bits, of which 16 are information.
    assert ideal <= 16 * len(words) - 16 * LANES <= 1.005 * ideal


def test_rans_of_nothing_is_states_alone() -> None:
    symbols = np.zeros((4, 64), np.uint8)
    words, lengths = ops.rans_encode(symbols, np.zeros(64, np.uint8), np.array([[4096]], np.uint16))
    assert lengths.tolist() == [2] * LANES and words.tolist() == [1, 0] * LANES


# Damage -----------------------------------------------------------------------------------------


def damaged_streams(rng, words, lengths):  # type: ignore[no-untyped-def]
    """Streams that add up, and so are decoded, but are not what was encoded."""
    for _ in range(20):
        changed = words.copy()
        changed[rng.integers(len(words))] ^= np.uint16(1 << rng.integers(16))
        yield changed, lengths
    yield rng.integers(0, 1 << 16, len(words)).astype(np.uint16), lengths
    yield np.zeros_like(words), lengths
    yield np.full_like(words, 0xFFFF), lengths
    for lane in (0, LANES - 2):
        moved = lengths.copy()
        moved[lane] += 1
        moved[lane + 1] -= 1
        if moved.min() >= 2:
            yield words, moved
    # Everything in the last lane: the longest way past its end.
    moved = np.full(LANES, 2, np.uint32)
    moved[-1] = len(words) - 2 * (LANES - 1)
    yield words, moved
    shortest = np.full(LANES, 2, np.uint32)
    yield np.full(2 * LANES, 1, np.uint16), shortest
    yield np.zeros(2 * LANES, np.uint16), shortest


@pytest.mark.parametrize("shape", [(60, 7), (30, 64), (9, 130)], ids=str)
def test_damaged_streams_are_noticed(shape: tuple[int, int]) -> None:
    symbols, classes, frequencies = make_stream(7, shape)
    words, lengths = ops.rans_encode(symbols, classes, frequencies)
    assert decode(words, lengths, classes, frequencies, shape)[0]
    for bad_words, bad_lengths in damaged_streams(np.random.default_rng(1), words, lengths):
        for on in ops.BACKENDS:
            assert not decode(bad_words, bad_lengths, classes, frequencies, shape, on=on)[0]


@pytest.mark.parametrize("shape", [(60, 7), (30, 64)], ids=str)
def test_wrong_tables_are_noticed(shape: tuple[int, int]) -> None:
    symbols, classes, frequencies = make_stream(9, shape)
    words, lengths = ops.rans_encode(symbols, classes, frequencies)
    for seed in range(10):
        rng = np.random.default_rng(100 + seed)
        others = make_frequencies(rng, 3, 17)
        shuffled = (classes + 1) % 3
        for on in ops.BACKENDS:
            assert not decode(words, lengths, classes, others, shape, on=on)[0]
            assert not decode(words, lengths, shuffled, frequencies, shape, on=on)[0]


def test_lengths_that_do_not_add_up_are_refused() -> None:
    symbols, classes, frequencies = make_stream(11, (20, 32))
    words, lengths = ops.rans_encode(symbols, classes, frequencies)
    huge = lengths.copy()
    huge[0] = 0xFFFFFFFF
    short = lengths.copy()
    short[1] += short[0] - 1
    short[0] = 1
    for bad in (lengths + np.uint32(1), lengths[:-1].copy(), huge, short):
        assert not decode(words, bad, classes, frequencies, (20, 32))[0]
    assert not decode(words[:-1].copy(), lengths, classes, frequencies, (20, 32))[0]
    none = np.zeros(LANES, np.uint32)
    assert not decode(words[:0].copy(), none, classes, frequencies, (20, 32))[0]


_BOUNDS_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import test_kernels as t
from tscfile_kernels import ops
for shape in [(1, 1), (33, 1), (60, 7), (30, 64)]:
    symbols, classes, frequencies = t.make_stream(7, shape)
    words, lengths = ops.rans_encode(symbols, classes, frequencies)
    assert t.decode(words, lengths, classes, frequencies, shape)[0]
    for bad in t.damaged_streams(np.random.default_rng(1), words, lengths):
        t.decode(*bad, classes, frequencies, shape)
for width in range(1, 8):
    for n in (1, 8, 9, 63):
        packed = np.full(ops.packed_bytes(n, width), 255, np.uint8)
        assert len(ops.unpack_bits(packed, width, n)) == n
try:
    ops.index_symbols(np.array([[9]], np.uint8), 0, np.zeros(9, np.uint8))
except IndexError:
    print("checked")
"""


def test_damaged_streams_stay_within_bounds(tmp_path: Path) -> None:
    """The compiled kernels once more, with every index checked."""
    environment = {
        **os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDS_SCRIPT, str(Path(__file__).parent)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    # The last line of the script proves that checking was on.
    assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr


# Bits and symbols -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(1, 8))
@pytest.mark.parametrize("n_values", [0, 1, 7, 8, 9, 64, 1000, 4099])
def test_bits_twins_agree_and_come_back(width: int, n_values: int) -> None:
    values = np.random.default_rng(n_values).integers(0, 1 << width, n_values).astype(np.uint8)
    packed = ops.pack_bits(values, width)
    assert len(packed) == ops.packed_bytes(n_values, width)
    assert np.array_equal(packed, ops.pack_bits(values, width, on="reference"))
    for on in ops.BACKENDS:
        assert np.array_equal(ops.unpack_bits(packed, width, n_values, on=on), values)


@pytest.mark.parametrize("width", range(1, 8))
def test_any_bytes_unpack_alike(width: int) -> None:
    packed = np.random.default_rng(width).integers(0, 256, 11 * width).astype(np.uint8)
    first, second = (ops.unpack_bits(packed, width, 85, on=on) for on in ops.BACKENDS)
    assert np.array_equal(first, second) and first.max() < 1 << width


@pytest.mark.parametrize("dtype", WORD_TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 33)], ids=str)
def test_symbol_twins_agree(dtype: type, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    bits = 8 * np.dtype(dtype).itemsize
    low_bits = max(bits - 16, 3)
    matrix = rng.integers(0, 1 << bits, shape, dtype=np.uint64).astype(dtype)
    n_symbols = 1 << (bits - low_bits)
    index_of = rng.integers(0, 40, n_symbols).astype(np.uint8)
    seen = [ops.seen_symbols(matrix, low_bits, n_symbols, on=on) for on in ops.BACKENDS]
    assert np.array_equal(*seen) and seen[0].dtype == bool
    assert np.flatnonzero(seen[0]).tolist() == sorted({int(x) >> low_bits for x in matrix.flat})
    indices = [ops.index_symbols(matrix, low_bits, index_of, on=on) for on in ops.BACKENDS]
    assert np.array_equal(*indices) and indices[0].dtype == np.uint8
    counts = [ops.count_symbols(indices[0], 40, on=on) for on in ops.BACKENDS]
    assert np.array_equal(*counts) and (counts[0].sum(axis=1) == shape[0]).all()


def test_class_twins_agree() -> None:
    rng = np.random.default_rng(4)
    counts = rng.integers(0, 500, (70, 33)).astype(np.uint32)
    lengths = rng.integers(1, 4096, (9, 33)).astype(np.int32)
    # Two classes alike: the first of equals is taken.
    lengths[5] = lengths[2]
    labels = [ops.nearest_class(counts, lengths, on=on) for on in ops.BACKENDS]
    assert np.array_equal(*labels) and 5 not in labels[0]
    totals = [ops.class_totals(counts, labels[0], 9, on=on) for on in ops.BACKENDS]
    assert np.array_equal(*totals) and totals[0].sum() == counts.sum()


# Token ids --------------------------------------------------------------------------------------


def make_token_tables(rng: np.random.Generator, n_leaves: int, n_pairs: int) -> ops.TokenTables:
    """Random tables; nothing of two tokens contradicts what is said of one."""
    cumulative, children = ops.token_tree(rng.zipf(1.3, n_leaves).clip(1, 1 << 27))

    def followers(n_contexts: int, n_entries: int):  # type: ignore[no-untyped-def]
        chosen = np.sort(rng.choice(n_contexts * (n_leaves - 1), n_entries, replace=False))
        firsts = np.searchsorted(chosen // (n_leaves - 1), np.arange(n_contexts + 1))
        totals = np.concatenate([[0], np.cumsum(rng.zipf(1.5, n_entries).clip(1, 1 << 23))])
        leaves = (chosen % (n_leaves - 1)).astype(np.int32)
        return firsts.astype(np.int64), leaves, totals.astype(np.int64)

    level1, level2 = followers(n_leaves - 1, n_pairs), followers(n_pairs, n_pairs // 2)
    return ops.TokenTables(cumulative, children, *level1, *level2)


def make_token_model(rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """Weights over the whole range, so that sums are clipped now and then."""
    weights = rng.integers(-(1 << 16), 1 << 16, ops.TOKEN_WEIGHTS).astype(np.int32)
    weights[:, :, ::5] *= 16
    return weights, rng.integers(64, (1 << 16) - 63, ops.MATCH_LENGTHS).astype(np.int32)


@pytest.mark.parametrize("n_leaves", [2, 3, 17, 300])
def test_token_trees_are_alike(n_leaves: int) -> None:
    rng = np.random.default_rng(n_leaves)
    doubling = np.int64(1) << np.minimum(np.arange(n_leaves, dtype=np.int64), 30)
    for weights in (np.ones(n_leaves, np.int64), rng.integers(1, 99, n_leaves), doubling):
        trees = [ops.token_tree(weights, on=on) for on in ops.BACKENDS]
        for a, b in zip(*trees, strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        # Every node but 0 hangs somewhere, once.
        children = trees[0][1]
        assert sorted(children[children > 0].tolist()) == list(range(1, n_leaves))


@pytest.mark.parametrize("n_leaves, n_pairs", [(2, 0), (2, 1), (30, 200), (700, 3000)])
@pytest.mark.parametrize("n_tokens, n_context", [(0, 0), (1, 0), (1, 1), (120, 0), (150, 50)])
def test_token_twins_agree(n_leaves: int, n_pairs: int, n_tokens: int, n_context: int) -> None:
    rng = np.random.default_rng(n_leaves + n_tokens)
    tables = make_token_tables(rng, n_leaves, n_pairs)
    weights, match = make_token_model(rng)
    leaves = rng.zipf(1.4, n_tokens).clip(1, n_leaves).astype(np.int32) - np.int32(1)
    # Passages that repeat, and every leaf at the edges.
    leaves[n_tokens // 2 :][:40] = leaves[: len(leaves[n_tokens // 2 :][:40])]
    leaves[-1:] = n_leaves - 1
    ids = rng.integers(-(1 << 31), 1 << 31, n_tokens).astype(np.int32)
    results = []
    for on in ops.BACKENDS:
        learnt = weights.copy(), match.copy()
        data = ops.encode_tokens(tables, *learnt, ids, leaves, n_context, on=on)
        results.append((data, *learnt))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    data = results[0][0]
    escapes = leaves == n_leaves - 1
    for bad in (data, data[:-1], np.append(data, np.uint8(0)), data ^ np.uint8(1)):
        seen = []
        for on in ops.BACKENDS:
            learnt = weights.copy(), match.copy()
            out = np.zeros_like(ids), np.where(np.arange(n_tokens) < n_context, leaves, 0)
            ok = ops.decode_tokens(tables, *learnt, bad.copy(), *out, n_context, on=on)
            seen.append((ok, *out, *learnt))
        for a, b in zip(*seen, strict=True):
            assert np.array_equal(a, b)
        if bad is data:
            ok, found_ids, found, *learnt = seen[0]
            assert ok and np.array_equal(found, leaves)
            coded = escapes & (np.arange(n_tokens) >= n_context)
            assert np.array_equal(found_ids[coded], ids[coded])
            assert all(map(np.array_equal, learnt, results[0][1:]))


# Arguments --------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused() -> None:
    symbols, classes, frequencies = make_stream(13, (4, 32))
    words, lengths = ops.rans_encode(symbols, classes, frequencies)
    values = np.arange(17, dtype=np.uint8)
    out = np.zeros((4, 32), np.uint8)

    def refused(function, *arguments):  # type: ignore[no-untyped-def]
        with pytest.raises(ValueError):
            function(*arguments)

    refused(ops.rans_encode, symbols[:, ::2], classes[:16].copy(), frequencies)
    refused(ops.rans_encode, symbols, classes[:-1].copy(), frequencies)
    refused(ops.rans_encode, symbols, classes, frequencies - np.uint16(1))
    refused(ops.rans_decode, words, lengths, classes, frequencies, values[:-1], out)
    refused(ops.rans_decode, words, lengths, classes, frequencies, values.astype(np.uint16), out)
    refused(ops.rans_decode, words, lengths, classes + np.uint8(3), frequencies, values, out)
    refused(ops.rans_decode, words, lengths, classes, frequencies, values, out[:, ::2])
    refused(ops.rans_decode, words, lengths, classes, frequencies[:0], values, out)
    refused(ops.pack_bits, np.zeros(4, np.uint8), 8)
    refused(ops.unpack_bits, np.zeros(7, np.uint8), 3, 9)
    refused(ops.count_symbols, symbols.astype(np.uint16), 4)
    for weights in ([], [1], [0, 1], [-1, 9], [1 << 47, 1 << 47], [(1 << 62) + 1] * 5):
        refused(ops.token_tree, np.array(weights, np.int64))
    refused(ops.token_tree, np.ones(4, np.int32))
    with pytest.raises(ValueError, match="no kernel backend"):
        ops.count_symbols(symbols, 17, on="abacus")


def test_wrong_arguments_of_tokens_are_refused() -> None:
    rng = np.random.default_rng(14)
    tables = make_token_tables(rng, 9, 20)
    weights, match = make_token_model(rng)
    leaves, data = np.arange(9, dtype=np.int32), np.zeros(5, np.uint8)
    ops.encode_tokens(tables, weights, match, leaves, leaves, 3)

    def refused(tables, weights, match, ids, leaves, n_context):  # type: ignore[no-untyped-def]
        with pytest.raises(ValueError):
            ops.encode_tokens(tables, weights, match, ids, leaves, n_context)
        with pytest.raises(ValueError):
            ops.decode_tokens(tables, weights, match, data, ids, leaves, n_context)

    for name in tables._fields:
        part = getattr(tables, name)
        for other in (part[:-1].copy(), part.astype(np.int16)):
            refused(tables._replace(**{name: other}), weights, match, leaves, leaves, 3)
    refused(tables, weights[:-1].copy(), match, leaves, leaves, 3)
    refused(tables, np.full_like(weights, (1 << 20) + 1), match, leaves, leaves, 3)
    refused(tables, weights, match[:-1].copy(), leaves, leaves, 3)
    refused(tables, weights, np.full_like(match, 63), leaves, leaves, 3)
    refused(tables, weights, match, leaves[:-1].copy(), leaves, 3)
    refused(tables, weights, match, leaves, leaves, 10)
    refused(tables, weights, match, leaves, leaves, -1)
    refused(tables, weights, match, leaves, leaves + np.int32(8), 3)
    refused(tables, weights, match, leaves, leaves - np.int32(1), 3)


# codebooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 1), (0, 5, 3), (5000, 256, 8), (33, 7, 64)])
def test_nearest_centroids(n: int, k: int, width: int) -> None:
    rng = np.random.default_rng(n + k)
    vectors = rng.normal(size=(n, width)).astype(np.float32)
    centroids = rng.normal(size=(k, width)).astype(np.float32)
    found = [ops.nearest_centroids(vectors, centroids, on=on) for on in ops.BACKENDS]
    distances = [np.square(vectors - centroids[each]).sum(axis=1) for each in found]
    assert np.allclose(*distances, rtol=1e-4, atol=1e-5)
    assert (found[0] == found[1]).mean() > 0.999 if n else not len(found[0])
    # Of equals the first, on integers that nothing rounds.
    whole = np.rint(centroids)
    twice = np.concatenate([whole, whole])[:256]
    for on in ops.BACKENDS:
        assert (ops.nearest_centroids(np.rint(vectors), twice, on=on) < max(k, 1)).all()


@pytest.mark.parametrize("n", [0, 1, 300])
def test_gather_centroids(n: int) -> None:
    rng = np.random.default_rng(n)
    centroids = rng.normal(size=(4, 50, 6)).astype(np.float32)
    columns = np.stack([rng.permutation(20)[:6] for _ in range(9)]).astype(np.int32)
    books = rng.integers(0, 4, 9).astype(np.int32)
    counts = rng.integers(0, 10, n)
    codes = rng.integers(0, 50, int(counts.sum())).astype(np.uint8)
    arguments = [codes, counts, books, columns, centroids]
    found = [ops.gather_centroids(*arguments, 20, on=on) for on in ops.BACKENDS]
    assert np.array_equal(*found) and found[0].shape == (n, 20)
    bad = [(codes + np.uint8(206), 0), (counts + 1, 1), (books + 4, 2), (columns - 20, 3),
           (columns + 15, 3), (centroids[:, :20], 4)]  # fmt: skip
    for on in ops.BACKENDS if n == 300 else ():
        for array, at in bad:
            wrong = [*arguments[:at], np.ascontiguousarray(array), *arguments[at + 1 :]]
            with pytest.raises(ValueError, match="not"):
                ops.gather_centroids(*wrong, 20, on=on)
