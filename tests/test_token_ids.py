"""Coding of token ids: every id comes back, damage is noticed, and text takes few bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tscfile.entropy import ints, token_ids, token_learning, token_tables
from tscfile.entropy.token_ids import TokenCoder, learn
from tscfile.errors import DamagedError
from tscfile.quality.windows import choose_windows, read_text

Ids = NDArray[np.int32]
NOTHING = np.zeros(0, np.int32)
EXTREMES = (-(1 << 31), -1, 0, 1, 39, 40, 1 << 20, (1 << 31) - 1)
few = settings(max_examples=60, deadline=None, derandomize=True)
any_ids = st.lists(
    st.one_of(st.integers(0, 45), st.sampled_from(EXTREMES), st.integers(-(1 << 31), (1 << 31) - 1))
)
either = pytest.mark.parametrize("learnt", [True, False], ids=["tables", "plain"])


def make_documents(seed: int, n_documents: int = 12, n_ids: int = 40) -> list[Ids]:
    """Documents of a little language: each id is followed by one of three, mostly the first."""
    rng = np.random.default_rng(7)
    followers = rng.integers(0, n_ids, (n_ids, 3))
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(n_documents):
        ids = [int(rng.integers(n_ids))]
        for choice in rng.choice(3, 200, p=[0.7, 0.2, 0.1]):
            ids.append(int(followers[ids[-1], choice]))
        documents.append(np.array(ids, np.int32))
    return documents


@cache
def small_tables() -> dict[str, NDArray[np.generic]]:
    return learn(make_documents(1), 40)


@cache
def coder(learnt: bool) -> TokenCoder:
    return TokenCoder(small_tables() if learnt else None, "test")


def as_ids(values: list[int] | range) -> Ids:
    return np.array(values, np.int32)


def decode(coder: TokenCoder, data: bytes, n: int, context: Ids = NOTHING) -> Ids:
    return coder.decode(data, n, context, "test")


def decode_any(coder: TokenCoder, data: bytes, n: int, context: Ids = NOTHING) -> Ids | None:
    """None for damage; tokens that are taken are those that are coded in just these bytes."""
    try:
        found = decode(coder, data, n, context)
    except DamagedError:
        return None
    assert found.dtype == np.int32 and found.shape == (n,)
    assert coder.encode(found, context) == data
    return found


# Round trips ------------------------------------------------------------------------------------


@either
@given(tokens=any_ids, context=any_ids)
@few
def test_any_ids_come_back(learnt: bool, tokens: list[int], context: list[int]) -> None:
    ours, before = as_ids(tokens), as_ids(context)
    data = coder(learnt).encode(ours, before)
    assert np.array_equal(decode(coder(learnt), data, len(ours), before), ours)
    # 32 bits and at most 11 for each turn of a tree of 41 leaves or of 1 << 20.
    assert len(data) <= 5 + len(ours) * 32


@either
def test_short_sequences(learnt: bool) -> None:
    assert coder(learnt).encode(NOTHING, NOTHING) == b""
    assert coder(learnt).encode(NOTHING, as_ids([1, 2])) == b""
    assert len(decode(coder(learnt), b"", 0)) == 0
    for value in EXTREMES:
        data = coder(learnt).encode(as_ids([value]), NOTHING)
        assert decode(coder(learnt), data, 1).tolist() == [value]


@either
def test_arrays_that_cannot_be_written_to(learnt: bool) -> None:
    tokens, context = make_documents(2)[:2]
    tokens.flags.writeable = context.flags.writeable = False
    data = coder(learnt).encode(tokens, context)
    assert np.array_equal(decode(coder(learnt), memoryview(data), len(tokens), context), tokens)  # type: ignore[arg-type]


@either
def test_one_coder_codes_every_session_alike(learnt: bool) -> None:
    first, second = make_documents(3)[:2]
    data = coder(learnt).encode(first, NOTHING)
    coder(learnt).encode(second, NOTHING)
    assert coder(learnt).encode(first, NOTHING) == data


@either
def test_context_helps(learnt: bool) -> None:
    passage = np.random.default_rng(5).integers(0, 40, 300).astype(np.int32)
    alone = len(coder(learnt).encode(passage, NOTHING))
    again = len(coder(learnt).encode(passage, passage))
    assert again * 5 < alone


def test_only_the_end_of_a_long_context_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ids, "MOST_CONTEXT", 100)
    tokens, context, other = make_documents(4)[:3]
    data = coder(True).encode(tokens, context)
    assert coder(True).encode(tokens, np.concatenate([other, context])) == data
    assert np.array_equal(decode(coder(True), data, len(tokens), context[-100:]), tokens)


def test_runs_take_next_to_nothing() -> None:
    assert len(coder(False).encode(np.full(10_000, 7, np.int32), NOTHING)) < 100


def test_ids_of_a_large_vocabulary() -> None:
    rng = np.random.default_rng(6)
    tokens = rng.zipf(1.3, 2000).clip(0, 262_143).astype(np.int32)
    data = coder(False).encode(tokens, NOTHING)
    assert np.array_equal(decode(coder(False), data, len(tokens)), tokens)


# Learning ---------------------------------------------------------------------------------------


def test_tables_help() -> None:
    tokens = np.concatenate(make_documents(8)[:2])
    learnt, plain = (len(coder(learnt).encode(tokens, NOTHING)) for learnt in (True, False))
    # The entropy of the little language is 1.16 bits a token.
    assert learnt < 0.21 * len(tokens) and learnt < 0.7 * plain


def test_learning_is_repeatable() -> None:
    again = learn(make_documents(1), 40)
    assert list(again) == list(small_tables())
    for name, array in small_tables().items():
        assert name.startswith("ids_") and array.dtype.str[1:] in ("i1", "u1", "i2", "u2")
        assert np.array_equal(array, again[name])


@pytest.mark.parametrize(
    "documents",
    [[], [[]], [[3]], [[3, 4]], [[-1, 99, 5]], [[1, 2, 3, -7, 1, 2, 3]] * 2],
    ids=str,
)
@pytest.mark.parametrize("n_tokens", [1, 2, 10, 300])
def test_learning_from_little(documents: list[list[int]], n_tokens: int) -> None:
    tables = learn([as_ids(document) for document in documents], n_tokens)
    tokens = as_ids([*range(12), -1, 3, 4])
    coder = TokenCoder(tables, "test")
    assert np.array_equal(decode(coder, coder.encode(tokens, tokens), 15, tokens), tokens)


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_learning, "MOST_PAIRS", 30)
    monkeypatch.setattr(token_learning, "MOST_TRIPLES", 50)
    tables = learn(make_documents(1), 40)
    assert len(tables["ids_count1"]) == 30 and 0 < len(tables["ids_count2"]) <= 50
    assert sum(array.nbytes for array in tables.values()) <= 7 * 40 + 7 * 30 + 4 * 50 + 8096
    tokens = make_documents(9)[0]
    coder = TokenCoder(tables, "test")
    assert np.array_equal(decode(coder, coder.encode(tokens, NOTHING), len(tokens)), tokens)


@pytest.mark.parametrize("n_tokens", [0, -1, (1 << 20) + 1])
def test_vocabularies_out_of_range(n_tokens: int) -> None:
    with pytest.raises(ValueError):
        learn([], n_tokens)


def tokenizer():  # type: ignore[no-untyped-def]
    """The byte-level BPE of the reference model, from its GGUF file."""
    tokenizers = pytest.importorskip("tokenizers")
    from gguf import GGUFReader

    fields = GGUFReader(SAMPLES / "model" / "reference-llama-6m-f16.gguf").fields
    words, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    vocabulary = {word: i for i, word in enumerate(words)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def test_text_takes_few_bytes() -> None:
    """Everything counted but the tables; a session of 768 tokens by its bytes for one token."""
    encoder = tokenizer()
    calibration, heldout = (
        [as_ids(part.ids) for part in encoder.encode_batch(read_text(path).documents)]
        for path in (SAMPLES / "texts" / "calibration.txt", SAMPLES / "texts" / "heldout.txt")
    )
    sessions = [window.tokens for window in choose_windows(heldout, 768, 24, 0)]

    def bytes_per_token(coder: TokenCoder) -> float:
        coded = [coder.encode(session, NOTHING) for session in sessions]
        for session, data in zip(sessions, coded, strict=True):
            assert np.array_equal(decode(coder, data, 768), session)
        return sum(map(len, coded)) / 768 / len(sessions)

    planes = sum(len(ints._encode_planes(session)) for session in sessions) / 768 / len(sessions)
    assert 1.3 < planes
    assert bytes_per_token(TokenCoder(None, "test")) < 0.8 * planes
    assert bytes_per_token(TokenCoder(learn(calibration, 4096), "test")) < 0.6 * planes


# Damage -----------------------------------------------------------------------------------------


def damaged(data: bytes, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    flipped = [
        data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :]
        for i in range(len(data))
        for flip in (1, 0x80, 0xFF)
    ]
    cut = [data[:i] for i in range(len(data))]
    longer = [data + extra for extra in (b"\0", b"\1", b"\xff", bytes(9))]
    noise = [rng.bytes(n) for n in (1, 2, 5, 30, 300)]
    return flipped + cut + longer + noise + [b"", bytes(40), b"\xff" * 40]


@either
def test_damage_is_noticed_or_decodes_to_something(learnt: bool) -> None:
    """A code that wastes little makes sense of much: it takes a checksum to tell the rest."""
    tokens, context = make_documents(10)[0][:150], as_ids([1, 2, -9, 3])
    data = coder(learnt).encode(tokens, context)
    started = time.perf_counter()
    cases = damaged(data, 1)
    found = [decode_any(coder(learnt), case, len(tokens), context) for case in cases]
    assert sum(each is None for each in found) > len(cases) // 2
    assert time.perf_counter() - started < 60


@either
def test_wrong_counts(learnt: bool) -> None:
    data = coder(learnt).encode(make_documents(12)[0], NOTHING)
    for n in (0, 1, 100, 300):
        assert decode_any(coder(learnt), data, n) is None
    for n in (199, 200, 202, 203):
        decode_any(coder(learnt), data, n)
    for n in (1 << 31, 1 << 40):
        started = time.perf_counter()
        assert decode_any(coder(learnt), data, n) is None
        assert time.perf_counter() - started < 1


def test_the_size_of_ids_is_checked() -> None:
    for bits in (21, 31, 255):
        assert decode_any(coder(False), bytes([bits, 1, 2, 3]), 4) is None
    assert decode_any(coder(False), b"", 4) is None
    # Larger than any id, of which the first is 3.
    data = coder(False).encode(as_ids([3, 3, 3]), NOTHING)
    assert data[0] == 2 and decode_any(coder(False), bytes([3]) + data[1:], 3) is None


def broken_tables() -> list[tuple[str, dict[str, NDArray[np.generic]]]]:
    good = small_tables()
    cases: list[tuple[str, dict[str, NDArray[np.generic]]]] = [("empty", {})]
    for name, array in good.items():
        cases.append((f"no {name}", {k: v for k, v in good.items() if k != name}))
        for what, other in {
            "short": array[..., :-1], "none": array[..., :0], "long": np.repeat(array, 2, -1),
            "wide": array.astype(np.int32), "deep": array[None], "flat": array.ravel()[:, None],
            "twice": np.concatenate([array] * 5), "float": array.astype(np.float32),
        }.items():  # fmt: skip
            cases.append((f"{what} {name}", good | {name: np.ascontiguousarray(other)}))
    for name, value in (
        ("ids_unigram", 48), ("ids_count1", 0), ("ids_count1", 48), ("ids_count2", 0),
        ("ids_order", 40), ("ids_order", 0), ("ids_fan1", 255), ("ids_next1", 255),
        ("ids_fan2", 255), ("ids_next2", 255), ("ids_match", 63), ("ids_match", 65473),
    ):  # fmt: skip
        array = good[name].copy()
        array.reshape(-1)[array.size // 2] = value
        array.reshape(-1)[-1] = value
        cases.append((f"{value} in {name}", good | {name: array}))
    return cases


def test_broken_tables_are_refused() -> None:
    for what, tables in broken_tables():
        if not what.startswith(("none ids_next", "twice")):
            with pytest.raises(DamagedError):
                TokenCoder(tables, "test")
                pytest.fail(what)


def mutated_tables(seed: int) -> dict[str, NDArray[np.generic]]:
    """The small tables with a few bytes changed."""
    rng = np.random.default_rng(seed)
    tables = {name: array.copy() for name, array in small_tables().items()}
    for name in rng.choice(list(tables), 2):
        array = tables[str(name)].reshape(-1).view(np.uint8)
        array[rng.integers(len(array))] ^= np.uint8(1 << rng.integers(8))
    return tables


def try_mutated_tables(seeds: range) -> int:
    """How many were taken; those that are must work."""
    tokens, taken = make_documents(13)[0], 0
    data = coder(True).encode(tokens, NOTHING)
    for seed in seeds:
        try:
            mutated = TokenCoder(mutated_tables(seed), "test")
        except DamagedError:
            continue
        taken += 1
        decode_any(mutated, data, len(tokens))
        own = mutated.encode(tokens, tokens)
        assert np.array_equal(decode(mutated, own, len(tokens), tokens), tokens)
    return taken


def test_changed_tables_are_refused_or_work() -> None:
    assert 0 < try_mutated_tables(range(200)) < 200


_BOUNDS_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import test_token_ids as t
t.try_mutated_tables(range(30))
for learnt in (True, False):
    tokens = t.make_documents(10)[0]
    data = t.coder(learnt).encode(tokens, tokens)
    for case in t.damaged(data, 3):
        t.decode_any(t.coder(learnt), case, len(tokens), tokens)
from tscfile_kernels import ops
try:
    ops.index_symbols(np.array([[9]], np.uint8), 0, np.zeros(9, np.uint8))
except IndexError:
    print("checked")
"""


def test_damage_stays_within_bounds(tmp_path: Path) -> None:
    """Once more, with every index of the compiled kernels checked."""
    environment = {
        **os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDS_SCRIPT, str(Path(__file__).parent)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    # The last line of the script proves that checking was on.
    assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr


def test_heaviest_tables_make_a_tree() -> None:
    """Weights that double from leaf to leaf make the deepest tree there is."""
    tables = dict(small_tables())
    tables["ids_unigram"] = np.arange(40, dtype=np.uint8) + np.uint8(8)
    tokens = as_ids(range(40))
    coder = TokenCoder(tables, "test")
    assert np.array_equal(decode(coder, coder.encode(tokens, NOTHING), 40), tokens)


# The specification ------------------------------------------------------------------------------


def _load_reference():  # type: ignore[no-untyped-def]
    import importlib.util

    path = ROOT / "spec" / "reference_decoder.py"
    spec = importlib.util.spec_from_file_location("decoder", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@either
def test_decoder_of_the_specification_agrees(learnt: bool) -> None:
    reference = _load_reference()
    tables = reference.TokenTables(small_tables()) if learnt else None
    for context in (NOTHING, as_ids([4, 4, -3, 1 << 22])):
        tokens = np.concatenate([make_documents(14)[0], as_ids([-1, 7, 1 << 30]), as_ids(range(9))])
        data = coder(learnt).encode(tokens, context)
        found = reference.decode_token_ids(data, len(tokens), tables, context.tolist())
        assert found.dtype == np.int32 and np.array_equal(found, tokens)
        for bad in (data[:-1], data + b"\0", data[:-1] + bytes([data[-1] ^ 1]), data[:40]):
            expected = decode_any(coder(learnt), bad, len(tokens), context)
            try:
                found = reference.decode_token_ids(bad, len(tokens), tables, context.tolist())
            except reference.Damaged:
                found = None
            assert np.array_equal(found, expected)


def test_example_of_the_specification() -> None:
    page = (ROOT / "spec" / "codecs" / "token-ids.md").read_text()
    example = page.split("\n## Example\n")[1]
    tokens, data = (example.split("`")[i] for i in (1, 3))
    tokens, data = as_ids([int(word) for word in tokens.split()]), bytes.fromhex(data)
    assert coder(False).encode(tokens, NOTHING) == data
    decisions, inputs = (
        [[word.strip() for word in line.split("|")[1:-1]] for line in part.splitlines()
         if re.match(r"\| \d", line)]
        for part in example.split("in detail")
    )  # fmt: skip
    steps = list(_load_reference().trace(data, len(tokens)))
    assert decisions == [[str(part) for part in step[:-1]] for step in steps]
    assert [[int(word.replace("−", "-")) for word in row[2:]] for row in inputs] == [
        list(part) for part in steps[9][-1]
    ]
    weighed = sum(odds * weight for odds, _, weight in steps[9][-1])
    assert f"−{-weighed} and `x` = −{-(weighed >> 16)}, so `p` = {steps[9][4]}" in example


def test_tables_of_the_page_are_those_of_the_code() -> None:
    from tscfile_kernels import logistic

    # log2 cut off at 1/256 octaves: exact up to the rounding of the eighth square.
    exact = np.floor(256 * np.log2(np.arange(1, 4096))).astype(np.int64)
    assert (np.abs(logistic.LOG2[1:] - exact) <= 1).all()
    reference = _load_reference()
    assert [reference.log2(v) for v in (*range(1, 5000), 1 << 30)] == [
        int(logistic.log2(np.array(v))) for v in (*range(1, 5000), 1 << 30)
    ]
    assert reference.PROBABILITY == logistic.PROBABILITY.tolist()
    assert [reference.bucket(n) for n in range(300)] == [
        int(logistic.BUCKET[min(n, 192)]) for n in range(300)
    ]
    assert token_tables.to_codes(np.arange(8)).tolist() == [0, 1, 2, 3, 4, 5, 5, 6]
