"""Exact coding with a book: the coder's twins, archives, hostile bytes, the decoder of the page."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import REGENERATED, SAMPLES, SESSION, SESSION_BF16, TURNS, MemoryTrack, same_state
from tscfile_kernels import exact, ops
from tscfile_kernels.exact import ESCAPE, FORMATS, ExactGroup

import tscfile
from tscfile.archive import Archive
from tscfile.book_codec import BookCodec
from tscfile.books import book as books
from tscfile.books.checkpoint import Checkpoint
from tscfile.books.exact import learn_exact
from tscfile.books.learn import _StateFrames
from tscfile.bytestream import ByteReader
from tscfile.container.records import ChunkHeader
from tscfile.context import FrameContext
from tscfile.description import describe
from tscfile.dtypes import DTYPES
from tscfile.errors import DamagedError, MismatchError, TscError, UsageError
from tscfile.exact_codec import ExactCodec
from tscfile.exact_tables import PREFIX, ExactTables
from tscfile.identity import identity_from_gguf
from tscfile.model import ModelIdentity, Snapshot, TensorSpec
from tscfile.packing import identify
from tscfile.sources import open_source
from tscfile.transforms.exact_frames import angles

SPEC = Path(__file__).parent.parent / "spec"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"
START = exact.START_MEAN << exact.MEMORY


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SPEC / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decoder = _load("reference_decoder")


@pytest.fixture(scope="module")
def identity() -> ModelIdentity:
    return identity_from_gguf(MODEL)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory, identity: ModelIdentity) -> Path:
    """The sample book with tables for exact coding that were learnt from the samples."""
    snapshots = [open_source(path) for path in (SESSION, TURNS[-1])]
    for snapshot in snapshots:
        identify(snapshot, identity)
    old = books.load(BOOK).book
    arrays = {k: v for k, v in old.arrays.items() if not k.startswith(PREFIX)}
    plain = books.Book(old.facts, arrays, old.tiers)
    found = learn_exact(plain, _StateFrames(snapshots), Checkpoint(None, ""), lambda words: None)
    path = tmp_path_factory.mktemp("book") / "exact.tscbook"
    path.write_bytes(books.Book(old.facts, arrays | found, old.tiers).to_bytes())
    return path


def _codec(book: Path, pairing: str = "neox") -> ExactCodec:
    facts = ModelIdentity({"rope_pairing": pairing})
    found = BookCodec(books.load(book), facts, "test").exact
    assert found is not None
    return found


def _tensors(dtype: str = "f16") -> list[TensorSpec]:
    return [TensorSpec(i, role, DTYPES[dtype], 256) for role in "kv" for i in range(6)]


def _rows(patterns: np.ndarray) -> list[np.ndarray]:
    """uint16 ``[n, 1536]`` as the rows of twelve tensors."""
    return [np.ascontiguousarray(p).view(np.uint8) for p in np.split(patterns, 12, axis=1)]


def _context(n: int) -> FrameContext:
    return FrameContext(np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32) * 7)


def _codecs(path: Path) -> list[str]:
    with Archive(path) as archive:
        return describe(archive).codecs


def _payload(codec: ExactCodec, patterns: np.ndarray, dtype: str = "f16") -> bytes:
    chunk = codec.encode(_rows(patterns), _tensors(dtype), _context(len(patterns)))
    return chunk.header.write() + chunk.body


# The coder ---------------------------------------------------------------------------------------


def _group(rng: np.random.Generator, unit: int) -> ExactGroup:
    b = 6
    weights = np.tril(rng.integers(-3000, 3000, (b, b)), -1)
    weights[[3, 5], [2, 4]] = 0
    pairs = np.array([-1, -1, 0, 0, 1, 1])
    return ExactGroup(
        weights, np.full(b, 13), np.full(b, 10), np.full(b, unit), rng.integers(2048, 4096, b),
        pairs,
    )  # fmt: skip


def _cumulative(rng: np.random.Generator) -> np.ndarray:
    tables = np.ones((exact.N_RATIOS * exact.N_PLACES, exact.N_SYMBOLS), np.int64)
    for table in tables:
        odds = rng.dirichlet(np.full(exact.N_SYMBOLS, 0.5))
        table += rng.multinomial((1 << exact.TABLE_BITS) - exact.N_SYMBOLS, odds)
    sums = np.zeros((len(tables), exact.N_SYMBOLS + 1), np.uint32)
    np.cumsum(tables, axis=1, out=sums[:, 1:])
    return sums


def _bits(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("unit", [13, 2, 25, -5, 36])
def test_twins_agree_and_decode(dtype: str, unit: int) -> None:
    rng = np.random.default_rng(unit + 100)
    group, sums, n = _group(rng, unit), _cumulative(rng), 37
    base = rng.integers(-1 << 24, 1 << 24, (6, n))
    turns = angles(np.arange(n, dtype=np.int32) * 9, np.array([1.0, 0.3], np.float32))
    small = np.round(rng.normal(size=(6, n)) * 3) * 2.0**-12
    cases = [
        rng.integers(0, 1 << 16, (6, n)).astype(np.uint16),
        _bits(rng.normal(size=(6, n)) * 4, dtype),
        _bits(np.where(rng.random((6, n)) < 0.1, -0.0, small), dtype),
    ]
    for patterns in cases:
        means = [np.full(n, START) for _ in ops.BACKENDS]
        events = [
            ops.exact_events(group, base, turns, mean, patterns, FORMATS[dtype], sums, on=on)
            for mean, on in zip(means, ops.BACKENDS, strict=True)
        ]
        assert all(np.array_equal(a, b) for a, b in zip(*events, strict=True))
        assert np.array_equal(*means)
        for lanes in (1, 5, 32):
            coded = [ops.exact_encode(*events[0][:3], lanes, on=on) for on in ops.BACKENDS]
            assert all(np.array_equal(a, b) for a, b in zip(*coded, strict=True))
            for on in ops.BACKENDS:
                reader = ops.ExactDecoder(*coded[0], sums, on=on)
                found, regressors = reader.decode(
                    group, base, turns, np.full(n, START), FORMATS[dtype]
                )
                assert np.array_equal(found, patterns) and reader.ended()
                assert np.array_equal(regressors, events[0].regressors)


def test_length_is_that_of_the_ideal_code() -> None:
    rng = np.random.default_rng(0)
    sums, n = _cumulative(rng), 1000
    patterns = _bits(rng.normal(size=(6, n)), "f16")
    turns = angles(np.zeros(n, np.int32), np.ones(2, np.float32))
    zeros, means = np.zeros((6, n), np.int64), np.full(n, START)
    events = ops.exact_events(
        _group(rng, 11), zeros, turns, means, patterns, FORMATS["f16"], sums
    )
    used = events.bits > 0
    ideal = (events.bits[used] - np.log2(events.sizes[used])).sum()
    words, _ = ops.exact_encode(*events[:3], 8)
    # A lane ends with a state of 64 bits, of which 31 are information.
    assert ideal <= 32 * len(words) <= 1.001 * ideal + 8 * 64


def test_angles_are_those_of_the_cosine() -> None:
    positions = np.array([0, 1, 77, 4095, 131071, -5], np.int32)
    inv_freq = (10000.0 ** -(np.arange(32) / 32)).astype(np.float32)
    cos, sin = angles(positions, inv_freq)
    angle = (positions.astype(np.float32) * inv_freq[:, None]).astype(np.float64)
    assert np.abs(cos - np.cos(angle) * 32768).max() < 1
    assert np.abs(sin - np.sin(angle) * 32768).max() < 1


def test_angles_that_are_no_numbers() -> None:
    cos, sin = angles(np.array([2**30], np.int32), np.array([3e38, 1e20], np.float32))
    assert np.abs(cos).max() <= 32768 and np.abs(sin).max() <= 32768
    assert (cos[0, 0], sin[0, 0]) == (32768, 0)


# Rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("pairing", ["neox", "norm"])
def test_every_pattern_comes_back(book: Path, dtype: str, pairing: str) -> None:
    """Numbers of all sizes, subnormal ones, both zeros, infinities and all NaNs."""
    codec = _codec(book, pairing)
    rng = np.random.default_rng(1)
    patterns = rng.permutation(1 << 16).astype(np.uint16)[: 42 * 1536].reshape(42, 1536)
    rest = np.full((1, 1536), 0x7C00, np.uint16)
    rest[0, :1024] = np.setdiff1d(np.arange(1 << 16), patterns)
    for each in (patterns, rest, np.zeros((3, 1536), np.uint16), patterns[:1]):
        payload = memoryview(_payload(codec, each, dtype))
        found = codec.decode(payload, _tensors(dtype), "test")
        for a, b in zip(found, _rows(each), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("source", [SESSION, SESSION_BF16], ids=["f16", "bf16"])
def test_real_sessions(
    source: Path, book: Path, identity: ModelIdentity, tmp_path: Path
) -> None:
    path, plain, back = (tmp_path / name for name in ("a.tsc", "b.tsc", "back.kv"))
    report = tscfile.pack(source, path, tier="lossless", book=book, identity=identity)
    without = tscfile.pack(source, plain, tier="lossless", identity=identity)
    assert report.file_bytes < 0.9 * without.file_bytes
    assert _codecs(path) == ["book-exact"]
    assert not tscfile.verify(path, book=book).problems
    tscfile.unpack(path, back, book=book)
    assert back.read_bytes() == source.read_bytes()
    with Archive(path, book=book) as archive:
        snapshot = archive.snapshot()
        assert snapshot.exact and archive.record().coding == {
            "book": books.load(book).id, "rope_pairing": "norm",
        }  # fmt: skip
        whole = snapshot.tracks[0].read(0, 400)
        part = snapshot.tracks[0].read(250, 270, [0, 11])
        assert all(np.array_equal(p, whole[i][250:270]) for p, i in zip(part, (0, 11), strict=True))


def test_sample_book_meets_its_targets(identity: ModelIdentity, tmp_path: Path) -> None:
    if not any(name.startswith(PREFIX) for name in books.load(BOOK).book.arrays):
        pytest.skip("the sample book was made before exact coding")
    for source, least in ((SESSION, 1.9), (SESSION_BF16, 2.8)):
        path = tmp_path / "a.tsc"
        report = tscfile.pack(
            source, path, tier="lossless", book=BOOK, identity=identity, force=True
        )
        assert report.raw_bytes / report.file_bytes > least


def test_decoding_does_not_depend_on_threads(
    book: Path, identity: ModelIdentity, tmp_path: Path
) -> None:
    code = (
        "import sys, tscfile; from tscfile.identity import identity_from_gguf as i\n"
        "tscfile.pack(sys.argv[1], sys.argv[2], tier='lossless', book=sys.argv[3],"
        " identity=i(sys.argv[4]))"
    )
    found = set()
    for threads in ("1", "4"):
        path = tmp_path / f"{threads}.tsc"
        environment = os.environ | {
            f"{name}_NUM_THREADS": threads for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")
        }
        subprocess.run(
            [sys.executable, "-c", code, str(SESSION), str(path), str(book), str(MODEL)],
            check=True, env=environment, timeout=300,
        )  # fmt: skip
        found.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(found) == 1


# Archives ----------------------------------------------------------------------------------------


def test_series(book: Path, identity: ModelIdentity, tmp_path: Path) -> None:
    path = tmp_path / "series.tsc"
    tscfile.pack(TURNS[0], path, tier="lossless", book=book, identity=identity)
    saves = (*TURNS[1:], REGENERATED)
    reports = [tscfile.append(save, path, book=book) for save in saves]
    assert [report.tier for report in reports] == ["lossless"] * len(saves)
    assert [report.n_frames_new for report in reports[:4]] == [80, 80, 80, 80]
    assert reports[4].n_frames_new < 100
    assert _codecs(path) == ["book-exact"]
    for number, save in enumerate((TURNS[0], *saves)):
        back = tmp_path / "back.kv"
        tscfile.unpack(path, back, snapshot=number, book=book, force=True)
        assert back.read_bytes() == save.read_bytes()


def test_tiers_mix_in_one_file(
    book: Path, identity: ModelIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mixed.tsc"
    tscfile.pack(TURNS[0], path, tier="lossless", identity=identity)
    # Frames without a book serve a snapshot with one.
    assert tscfile.append(TURNS[1], path, book=book).n_frames_new == 80
    monkeypatch.setenv("TSC_BOOKS", str(book.parent))
    report = tscfile.append(TURNS[2], path, tier="lossless", book=book)
    assert report.n_frames_new == 80
    lossy = tscfile.append(TURNS[3], path, tier="balanced", book=book)
    assert lossy.n_frames_new == 80
    # What the lossy snapshot took from the exact ones serves again, what it stored does not.
    assert tscfile.append(TURNS[4], path, tier="lossless", book=book).n_frames_new == 160
    assert not tscfile.verify(path).problems
    codecs = _codecs(path)
    assert {"book-exact", "fields+classed-rans", "book-transform+segments"} == set(codecs)
    for number, save in ((0, TURNS[0]), (1, TURNS[1]), (2, TURNS[2]), (4, TURNS[4])):
        with Archive(path) as archive:
            assert same_state(archive.snapshot(number), _named(save, archive, number))


def _named(save: Path, archive: Archive, number: int) -> Snapshot:
    snapshot = open_source(save)
    snapshot.identity = ModelIdentity(dict(archive.record(number).identity))
    return snapshot


def test_frames_of_another_book_are_stored_again(
    book: Path, identity: ModelIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "a.tsc", tmp_path / "other.tscbook"
    opened = books.load(book).book
    facts = opened.facts | {"book.note": "another"}
    other.write_bytes(books.Book(facts, opened.arrays, opened.tiers).to_bytes())
    tscfile.pack(
        TURNS[0], path, tier="lossless", book=book, embed_book=True, identity=identity
    )
    # The first book is inside the file, so that only the second has to be found.
    assert tscfile.append(TURNS[1], path, book=other).n_frames_new == 170
    monkeypatch.setenv("TSC_BOOKS", str(tmp_path))
    assert not tscfile.verify(path).problems
    with Archive(path) as archive:
        for number, save in enumerate(TURNS[:2]):
            assert same_state(archive.snapshot(number), _named(save, archive, number))


def test_the_book_must_be_there(book: Path, identity: ModelIdentity, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(TURNS[0], path, tier="lossless", book=book, identity=identity)
    with pytest.raises(UsageError, match="needs book"), Archive(path) as archive:
        archive.snapshot().tracks[0].read(0, 1)
    with pytest.raises(UsageError, match="needs book"):
        tscfile.append(TURNS[1], path)
    with pytest.raises(UsageError, match="the archive needs"), Archive(path, book=BOOK) as archive:
        archive.snapshot().tracks[0].read(0, 1)
    inside = tmp_path / "inside.tsc"
    tscfile.pack(
        TURNS[0], inside, tier="lossless", book=book, embed_book=True, identity=identity
    )
    assert not tscfile.verify(inside).problems


def _snapshot(dtype: str, n: int, width: int, facts: dict[str, Any]) -> Snapshot:
    source = open_source(SESSION)
    (track,) = source.tracks
    size = DTYPES[dtype].block_bytes * width // DTYPES[dtype].block_elements
    tensors = [TensorSpec(i, role, DTYPES[dtype], size) for role in "kv" for i in range(6)]
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 60, (n, size)).astype(np.uint8) for _ in tensors]
    cells = track.cells
    part = type(cells)(cells.pos[:n], cells.seq_counts[:n], cells.seq_ids[:n], cells.ext[:n])
    return Snapshot(
        source.tokens[:n], [MemoryTrack(part, tensors, rows, {})], {"format": "test"},
        identity=ModelIdentity(facts),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_other_types_are_coded_without_the_book(
    dtype: str, book: Path, identity: ModelIdentity, tmp_path: Path
) -> None:
    path = tmp_path / "a.tsc"
    snapshot = _snapshot(dtype, 20, 128, dict(identity.facts))
    tscfile.pack(snapshot, path, tier="lossless", book=book)
    assert "book-exact" not in _codecs(path)
    with Archive(path) as archive:
        assert not archive.record().coding and same_state(archive.snapshot(), snapshot)


def test_a_book_without_tables_and_one_for_other_shapes(
    book: Path, identity: ModelIdentity, tmp_path: Path
) -> None:
    old = books.load(book).book
    arrays = {k: v for k, v in old.arrays.items() if not k.startswith(PREFIX)}
    plain = tmp_path / "plain.tscbook"
    plain.write_bytes(books.Book(old.facts, arrays, old.tiers).to_bytes())
    path = tmp_path / "a.tsc"
    tscfile.pack(TURNS[0], path, tier="lossless", book=plain, identity=identity)
    assert _codecs(path) == ["fields+classed-rans"]
    with pytest.raises(MismatchError, match="the book is for"):
        tscfile.pack(
            _snapshot("f16", 20, 64, dict(identity.facts)), tmp_path / "b.tsc",
            tier="lossless", book=book,
        )  # fmt: skip


def test_noise_takes_the_codec_that_is_shorter(
    book: Path, identity: ModelIdentity, tmp_path: Path
) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(_snapshot("f16", 40, 128, dict(identity.facts)), path, tier="lossless", book=book)
    assert "book-exact" not in _codecs(path)


# Hostile bytes -----------------------------------------------------------------------------------


def _session_payload(codec: ExactCodec, n: int = 40) -> tuple[bytes, list[np.ndarray]]:
    (track,) = open_source(SESSION).tracks
    rows = track.read(0, n)
    order = sorted(range(12), key=lambda i: (track.tensors[i].role, track.tensors[i].layer))
    rows = [np.ascontiguousarray(rows[i]) for i in order]
    tokens = open_source(SESSION).tokens
    chunk = codec.encode(rows, _tensors(), FrameContext(track.cells.pos[:n], tokens))
    return chunk.header.write() + chunk.body, rows


def test_damaged_payloads_raise_project_errors(book: Path) -> None:
    codec = _codec(book, "norm")
    payload, rows = _session_payload(codec)
    body = len(ChunkHeader.read(ByteReader(payload, "test")).write())
    rng = np.random.default_rng(0)
    n_refused = n_changed = 0
    places = [*range(body, body + 60), *rng.integers(body + 60, len(payload), 60).tolist()]
    for place in places:
        damaged = bytearray(payload)
        damaged[place] ^= 1 << int(rng.integers(8))
        try:
            found = codec.decode(memoryview(damaged), _tensors(), "test")
        except TscError:
            n_refused += 1
        else:
            n_changed += any(not np.array_equal(a, b) for a, b in zip(found, rows, strict=True))
    # A bit that was stored as it is only changes the rows, which the block's id tells.
    assert n_refused > 0.9 * len(places) and n_refused + n_changed >= len(places) - 2
    for length in (*range(body, body + 40), len(payload) - 4, len(payload) - 1):
        with pytest.raises(TscError):
            codec.decode(memoryview(payload[:length]), _tensors(), "test")
    with pytest.raises(DamagedError, match="left over"):
        codec.decode(memoryview(payload + b"\0"), _tensors(), "test")


def test_random_words_are_safe(book: Path) -> None:
    codec = _codec(book)
    payload, _ = _session_payload(codec, 12)
    rng = np.random.default_rng(3)
    for kind in range(6):
        damaged = bytearray(payload)
        noise = rng.integers(0, 256, len(payload) - 60).astype(np.uint8)
        damaged[60:] = (noise * (kind % 3 > 0) | 0xF0 * (kind % 3 > 1)).tobytes()
        with pytest.raises(TscError):
            codec.decode(memoryview(damaged), _tensors(), "test")


def test_claims_beyond_the_bytes_are_refused(book: Path) -> None:
    codec = _codec(book)
    header = ChunkHeader(5, 0, 12, 0, 1, (256,) * 12).write()
    positions = bytes([0, 3, 0, 2, 12])
    tokens = bytes([0, 3, 1, 0, 12])
    huge = bytes([1]) + b"\xff\xff\xff\xff\x07"
    tracemalloc.start()
    for body in (b"\0" + positions + tokens + huge, b"\0" + positions + tokens + b"\x21",
                 b"\0" + positions + tokens + b"\0", b"\x02" + positions,
                 b"\0" + positions + tokens + b"\x01\x01" + bytes(4)):  # fmt: skip
        with pytest.raises(TscError):
            codec.decode(memoryview(header + body), _tensors(), "test")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_flipped_bytes_of_an_archive_are_found(
    book: Path, identity: ModelIdentity, tmp_path: Path
) -> None:
    path, damaged = tmp_path / "a.tsc", tmp_path / "b.tsc"
    tscfile.pack(TURNS[0], path, tier="lossless", book=book, identity=identity)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(32, len(data), 12).tolist():
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(changed)
        try:
            assert tscfile.verify(damaged, book=book).problems
        except TscError:
            pass


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sizes", lambda a: a[:2]),
        ("sizes", lambda a: a + np.array([32, 0, 0], np.int32)),
        ("sizes", lambda a: a * np.array([-1, 1, 1], np.int32)),
        ("sizes", lambda a: a + np.array([0, 0, 100], np.int32)),
        ("weights_low", lambda a: a[:-1]),
        ("weights_high", lambda a: a.astype(np.uint8)),
        ("weight_bits", lambda a: -a),
        ("scale_bits", lambda a: a + np.arange(len(a), dtype=np.int8) % 2),
        ("unit_bits", lambda a: np.full_like(a, 41)),
        ("sigmas", lambda a: a - 2048),
        ("frequencies", lambda a: np.roll(a, 1, axis=0) + np.eye(*a.shape, dtype=np.uint16)),
        ("frequencies", lambda a: a[:, 1:].copy()),
        ("frequencies", None),
    ],
)
def test_tables_that_do_not_fit_are_damage(book: Path, name: str, change: Any) -> None:
    opened = books.load(book).book
    arrays = dict(opened.arrays)
    if change is None:
        del arrays[PREFIX + name]
    else:
        arrays[PREFIX + name] = np.ascontiguousarray(change(arrays[PREFIX + name]))
    with pytest.raises(DamagedError, match="exact_"):
        ExactTables(
            arrays, opened.exact_order, opened.token_vectors, opened.token_scales, "test"
        )


def test_sums_stay_whole_numbers(book: Path) -> None:
    """The largest sum that tables allow is one that float64 holds, with every partial sum."""
    from tscfile import exact_tables

    most = (1 << 15) * (1 << exact.REGRESSOR_BITS) * exact_tables.MOST_REGRESSORS
    assert most <= 1 << 52
    for weights, _ in _codec(book).tables.groups:
        assert np.array_equal(weights, np.rint(weights)) and np.abs(weights).max() <= 1 << 15


# The page ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("pairing", ["neox", "norm"])
def test_decoder_of_the_page(book: Path, dtype: str, pairing: str) -> None:
    codec = _codec(book, pairing)
    (track,) = open_source(SESSION if dtype == "f16" else SESSION_BF16).tracks
    order = sorted(range(12), key=lambda i: (track.tensors[i].role, track.tensors[i].layer))
    found = track.read(0, 7)
    patterns = np.concatenate(
        [np.ascontiguousarray(found[i]).view(np.uint16) for i in order], axis=1
    )
    # What is rare in caches: both zeros, subnormal and huge numbers, infinities, NaN.
    patterns[2, ::97] = 0x8000
    patterns[3, ::31] = np.resize([1, 0x8003, 0x7BFF, 0x7C00, 0xFF80, 0x7E01, 0xFFFF], 50)
    chunk = codec.encode(_rows(patterns), _tensors(dtype), _context(7))
    tables = decoder.Book(book.read_bytes()).exact_tables
    names = [(i // 6, i % 6) for i in range(12)]
    type_ = DTYPES[dtype].ggml_id
    rows = decoder.exact_rows(decoder.Cursor(chunk.body), 7, type_, names, tables)
    assert np.array_equal(np.concatenate([rows[name] for name in names], axis=1), patterns)
    damaged = bytearray(chunk.body)
    damaged[-5] ^= 64
    with pytest.raises(decoder.Damaged):
        decoder.exact_rows(decoder.Cursor(damaged), 7, type_, names, tables)


def test_example_of_the_page() -> None:
    group = ExactGroup(*(np.array(v, np.int64) for v in ([[0]], [8], [13], [13], [3000], [-1])))
    sums = np.cumsum(np.full((256, exact.N_SYMBOLS), 600), axis=1, dtype=np.uint32)
    sums = np.concatenate([np.zeros((256, 1), np.uint32), sums], axis=1)
    sums[:, -1] = 1 << 16
    turns = np.zeros((0, 1), np.int64), np.zeros((0, 1), np.int64)
    means = np.array([6144])
    events = ops.exact_events(
        group, np.array([[9000 << 8]]), turns, means, np.array([[0x3D64]], np.uint16),
        FORMATS["f16"], sums,
    )  # fmt: skip
    assert (events.tables[0, 0], events.symbols[0, 0], means[0]) == (225, 59, 6126)
    assert (events.starts[0, 0, 1], events.sizes[0, 0, 1], events.bits[0, 0, 1]) == (32, 8, 8)
    assert events.symbols[0, 0] != ESCAPE and events.bits[0, 0, 2] == 0
    text = (SPEC / "codecs" / "book-exact.md").read_text(encoding="utf-8")
    assert "symbol 59" in text and "row 225" in text and "6126" in text
