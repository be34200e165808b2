"""The lossy tiers: stages alone, whole archives, and what they do to the model."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import REGENERATED, SAMPLES, SESSION, SESSION_BF16, TURNS

import tscfile
from tscfile.archive import Archive
from tscfile.archived_track import is_exact
from tscfile.books.book import Book, load
from tscfile.books.learn import learn
from tscfile.books.measure import TARGETS
from tscfile.bytestream import ByteReader, ByteWriter
from tscfile.context import FrameContext
from tscfile.entropy import ladder, segments
from tscfile.errors import DamagedError, MismatchError, TscError, UnsupportedError, UsageError
from tscfile.identity import identity_from_gguf
from tscfile.model import Snapshot
from tscfile.quantizers import uniform
from tscfile.sources import open_source
from tscfile.transforms import channels
from tscfile.transforms.rope import HALVES, NEIGHBOURS, Rope

MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"


@pytest.fixture(scope="module")
def book() -> Book:
    return load(BOOK).book


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lossy") / "session.tsc"
    tscfile.pack(SESSION, path, book=BOOK, identity=identity_from_gguf(MODEL))
    return path


# --- stages -----------------------------------------------------------------------------------


def test_symbols_come_back() -> None:
    values = np.array([[0, 1, -1, 15, -15, 16, -16, 1 << 20, -(1 << 20)]], np.int32)
    symbols, escaped = ladder.to_symbols(values)
    assert symbols.max() < ladder.N_SYMBOLS and len(escaped) == 4
    assert (ladder.from_symbols(symbols, escaped) == values).all()


def test_classes_rise_with_the_scale_and_drop_the_narrow() -> None:
    log_sigmas = np.arange(-2000, 4000, 50, dtype=np.int16)
    classes = ladder.class_of(log_sigmas, 0)
    assert (np.diff(classes) >= 0).all()
    assert (classes[log_sigmas < ladder.LOWEST] == -1).all()
    assert classes.max() == ladder.N_CLASSES - 1


def _drawn(book: Book, n_frames: int, log_step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers as wide as the book says, and the classes of their coefficients."""
    rng = np.random.default_rng(seed)
    classes = ladder.class_of(book.log_sigmas, log_step)
    spread = 2.0 ** ((book.log_sigmas[classes >= 0].astype(float) - log_step) / 256)
    values = np.rint(rng.normal(0, spread, (n_frames, len(spread)))).astype(np.int32)
    return values, classes[classes >= 0]


@pytest.mark.parametrize("n_frames", [1, 7, 256])
def test_segments_come_back(book: Book, n_frames: int) -> None:
    log_step = int(np.median(book.log_sigmas))
    values, classes = _drawn(book, n_frames, log_step, n_frames)
    values[0, 0] = 100_000
    writer = ByteWriter()
    segments.encode(writer, values, log_step, classes, book.frequencies)
    reader = ByteReader(writer.bytes(), "test")
    step, found = segments.decode(reader, book.log_sigmas, book.frequencies, n_frames)
    reader.end()
    assert step == log_step and (found == values).all()


def test_segments_are_near_the_ideal_length(book: Book) -> None:
    """Within 2 % of the code length, and of what another rANS coder makes of the same symbols."""
    constriction = pytest.importorskip("constriction")
    log_step = int(np.median(book.log_sigmas)) + 256
    values, classes = _drawn(book, 256, log_step, 0)
    values = values.clip(-15, 15)
    writer = ByteWriter()
    segments.encode(writer, values, log_step, classes, book.frequencies)
    symbols, _ = ladder.to_symbols(values)
    chances = book.frequencies / 4096
    ideal = -np.log2(chances[classes[None], symbols]).sum() / 8
    coder = constriction.stream.stack.AnsCoder()
    for k in np.unique(classes):
        model = constriction.stream.model.Categorical(chances[k], perfect=False)
        coder.encode_reverse(symbols[:, classes == k].astype(np.int32).ravel(), model)
    oracle = 4 * len(coder.get_compressed())
    assert len(writer) <= 1.02 * ideal + 16 and len(writer) <= 1.02 * oracle + 16
    assert abs(oracle - ideal) <= 0.005 * ideal + 16


def test_damaged_segments_are_refused_or_decoded(book: Book) -> None:
    rng = np.random.default_rng(1)
    log_step = int(book.log_sigmas.min())
    values, classes = _drawn(book, 16, log_step, 1)
    values = values.clip(-2, 2)
    writer = ByteWriter()
    segments.encode(writer, values, log_step, classes, book.frequencies)
    whole = writer.bytes()
    for at in range(0, len(whole), 5):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        for data in (bytes(broken), whole[:at]):
            try:
                segments.decode(
                    ByteReader(data, "test"), book.log_sigmas, book.frequencies, 16
                )
            except TscError:
                pass


def test_quantizer_stays_near_and_prefers_zero() -> None:
    lengths = np.array([[0.1] + [3.0 + s for s in range(1, 17)]], np.float32)
    scaled = np.linspace(-20, 20, 4001, dtype=np.float32)[:, None]
    values = uniform.quantize(scaled, lengths, np.zeros(1, np.int64))
    assert np.abs(values - scaled).max() < 2
    assert values[np.abs(scaled) < 0.6].max() == 0
    assert (np.sign(values) * np.sign(scaled) >= 0).all()


@pytest.mark.parametrize("pairing", [HALVES, NEIGHBOURS])
def test_channels_come_back(pairing: str) -> None:
    track = open_source(SESSION).tracks[0]
    rows = track.read(100, 164)
    rope = Rope((10000.0 ** (-np.arange(32) / 32)).astype(np.float32))
    pos = track.cells.pos[100:164]
    frames = channels.to_frames(rows, track.tensors, pos, rope, 64, pairing)
    back = channels.from_frames(frames, track.tensors, pos, rope, 64, pairing)
    for old, new, tensor in zip(rows, back, track.tensors, strict=True):
        error = np.abs(old.view("<f2").astype(float) - new.view("<f2")).max()
        assert error == 0 if tensor.role == "v" else error < 0.01


# --- books ------------------------------------------------------------------------------------


def test_a_book_survives_its_bytes(book: Book) -> None:
    again = Book.from_bytes(book.to_bytes(), "test")
    assert again.facts == book.facts and again.tiers == book.tiers
    assert all((again.arrays[name] == array).all() for name, array in book.arrays.items())


def test_a_damaged_book_is_refused(tmp_path: Path) -> None:
    data = BOOK.read_bytes()
    for at in (0, 20, len(data) // 2, len(data) - 1):
        broken = bytearray(data)
        broken[at] ^= 4
        with pytest.raises(DamagedError):
            Book.from_bytes(bytes(broken), "test")
    for length in (0, 5, 40, len(data) - 1):
        with pytest.raises(DamagedError):
            Book.from_bytes(data[:length], "test")


def test_book_tiers_are_in_order(book: Book) -> None:
    for finer, coarser in pairwise(TARGETS):
        assert book.tiers[finer].log_step < book.tiers[coarser].log_step
        assert book.tiers[finer].ratio < book.tiers[coarser].ratio
    assert all(book.tiers[name].kl <= target for name, target in TARGETS.items())


def test_the_expected_kl_goes_through_what_was_measured(book: Book) -> None:
    for tier in book.tiers.values():
        assert book.kl_of_step(tier.log_step) == pytest.approx(tier.kl)
        assert abs(book.step_of_kl(tier.kl) - tier.log_step) <= 1
    between = book.step_of_kl(0.5 * (book.tiers["near"].kl + book.tiers["balanced"].kl))
    assert book.tiers["near"].log_step < between < book.tiers["balanced"].log_step
    with pytest.raises(UsageError, match="too far"):
        book.step_of_kl(1e-9)


def test_prediction_is_what_its_definition_says(book: Book) -> None:
    """Every feature added up one by one, at positions with gaps and without tokens."""
    tokens = open_source(SESSION).tokens
    pos = np.array([0, 1, 2, 399, 400, 700, -3, 150, 151, 152], np.int32)
    features = book.network.features
    dense = features.dense(FrameContext(pos, tokens))
    for i, p in enumerate(pos.tolist()):
        parts = []
        for decay in features.decays:
            weights = decay ** np.arange(max(p, 0) + 1.0)
            seen = [t for t in range(max(p, 0) + 1) if p >= 0 and t < len(tokens)]
            vectors = features.vectors[tokens[seen]][:, : features.decay_dims]
            parts.append(weights[[p - t for t in seen]] @ vectors / weights.sum())
        at = max(p, 0)
        parts.append([np.log2(at + 1) / 16, 1 / (at + 1)])
        assert np.abs(dense[i] - np.concatenate(parts)).max() < 1e-5, p
    together = book.network(FrameContext(np.arange(300, dtype=np.int32), tokens))
    alone = book.network(FrameContext(np.array([299], np.int32), tokens))
    assert np.abs(together[299] - alone[0]).max() < 1e-3 * np.abs(alone).max()


def test_layers_in_groups_code_as_well_as_their_bases_say(tmp_path: Path) -> None:
    """A book of two groups: each has its own basis, and frames come back through both."""
    snapshots = [_identified(path) for path in (SESSION, TURNS[-1])]
    whole, halves = learn(snapshots), learn(snapshots, group_channels=768)
    assert halves.groups.n_groups == 2 and len(halves.facts["book.group_coefficients"]) == 2
    sizes = []
    for i, made in enumerate((whole, halves)):
        path = tmp_path / f"{i}.tscbook"
        path.write_bytes(made.to_bytes())
        report = tscfile.pack(snapshots[0], tmp_path / f"{i}.tsc", book=path, tier="balanced")
        sizes.append(report.file_bytes)
        with Archive(tmp_path / f"{i}.tsc", book=path) as archive:
            (keys, *_) = archive.read(frames=(0, 400), layers=[5])
        true = snapshots[0].tracks[0].read(0, 400)[keys.tensor.layer].view("<f2").astype(float)
        assert np.square(keys.values - true).mean() < 0.1 * true.var()
    # Two small transforms find less in common than a large one.
    assert sizes[0] < sizes[1] < 2 * sizes[0]


def test_a_plain_book_is_learnt_from_states(tmp_path: Path) -> None:
    path = tmp_path / "plain.tscbook"
    path.write_bytes(learn([_identified(path) for path in TURNS]).to_bytes())
    report = tscfile.pack(
        SESSION, tmp_path / "x.tsc", book=path, tier="balanced", identity=identity_from_gguf(MODEL)
    )
    assert report.raw_bytes / report.file_bytes > 8
    with pytest.raises(UsageError, match="no KL is known"):
        tscfile.pack(SESSION, tmp_path / "y.tsc", book=path, target_kl=0.01,
                     identity=identity_from_gguf(MODEL))  # fmt: skip
    with pytest.raises(UnsupportedError, match="--model"):
        learn([open_source(SESSION)])


def _identified(path: Path) -> Snapshot:
    snapshot = open_source(path)
    snapshot.identity = identity_from_gguf(MODEL)
    return snapshot


# --- archives ---------------------------------------------------------------------------------


def test_a_session_in_a_hundredth(packed: Path) -> None:
    raw = open_source(SESSION).raw_bytes
    assert raw / packed.stat().st_size > 100
    assert not tscfile.verify(packed, book=BOOK).problems


def test_a_missing_or_wrong_book_is_named(packed: Path, tmp_path: Path, book: Book) -> None:
    with Archive(packed) as archive, pytest.raises(UsageError, match="needs book"):
        archive.read()
    other = tmp_path / "other.tscbook"
    other.write_bytes(Book(book.facts | {"book.note": "other"}, book.arrays, book.tiers).to_bytes())
    with Archive(packed, book=other) as archive, pytest.raises(UsageError, match="archive needs"):
        archive.read()
    shutil.copy(BOOK, packed.parent / "found.tscbook")
    with Archive(packed) as archive:
        assert archive.read(frames=(0, 1))
    (packed.parent / "found.tscbook").unlink()


def test_an_embedded_book_is_found(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "alone.tsc"
    identity = identity_from_gguf(MODEL)
    tscfile.pack(SESSION, path, book=BOOK, embed_book=True, identity=identity)
    assert path.stat().st_size > BOOK.stat().st_size
    with Archive(path) as archive, Archive(packed, book=BOOK) as other:
        inside, outside = archive.read(frames=(0, 9)), other.read(frames=(0, 9))
    assert all((a.values == b.values).all() for a, b in zip(inside, outside, strict=True))
    assert not tscfile.verify(path).problems
    tscfile.pack(TURNS[0], tmp_path / "s.tsc", book=BOOK, embed_book=True, identity=identity)
    for turn in TURNS[1:]:
        assert tscfile.append(turn, tmp_path / "s.tsc").plan == "append"


@pytest.mark.parametrize("ratio", [60, 300])
def test_a_target_ratio_is_met(ratio: float, tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    identity = identity_from_gguf(MODEL)
    report = tscfile.pack(SESSION, path, book=BOOK, target_ratio=ratio, identity=identity)
    assert 0.97 * ratio < report.raw_bytes / report.file_bytes < 1.2 * ratio
    assert report.tier == "custom"
    with pytest.raises(UsageError, match="out of reach"):
        tscfile.pack(SESSION, path, book=BOOK, target_ratio=1e5, force=True, identity=identity)


def test_a_target_kl_chooses_the_step(tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    identity = identity_from_gguf(MODEL)
    tscfile.pack(TURNS[0], path, book=BOOK, target_kl=0.003, identity=identity)
    tscfile.append(TURNS[1], path, book=BOOK)
    with Archive(path, book=BOOK) as archive:
        first, second = archive.record(0), archive.record(1)
    assert first.coding["expected_kl"] == pytest.approx(0.003, rel=0.02)
    assert second.tier == "custom" and second.coding == first.coding
    with pytest.raises(UsageError, match="one of"):
        tscfile.pack(SESSION, path, book=BOOK, tier="near", target_kl=0.01, force=True)


def test_another_model_is_refused(tmp_path: Path) -> None:
    identity = identity_from_gguf(MODEL)
    identity.facts["weights_blake3"] = "0" * 64
    with pytest.raises(MismatchError, match="weights_blake3"):
        tscfile.pack(SESSION, tmp_path / "x.tsc", book=BOOK, identity=identity)
    assert not (tmp_path / "x.tsc").exists()


def test_a_tier_needs_its_book(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a book"):
        tscfile.pack(SESSION, tmp_path / "x.tsc", tier="archive")
    with pytest.raises(UsageError, match="needs a book"):
        tscfile.pack(SESSION, tmp_path / "x.tsc", target_ratio=9)


def test_types_share_a_book(tmp_path: Path) -> None:
    """The same tokens as f16 and as bf16: nearly the same coefficients."""
    sizes = []
    for source in (SESSION, SESSION_BF16):
        path = tmp_path / "x.tsc"
        tscfile.pack(source, path, book=BOOK, identity=identity_from_gguf(MODEL), force=True)
        sizes.append(path.stat().st_size)
        with Archive(path, book=BOOK) as archive:
            for found, true in zip(
                archive.snapshot().tracks[0].read(0, 64),
                open_source(source).tracks[0].read(0, 64), strict=True,
            ):  # fmt: skip
                assert found.shape == true.shape and (found != true).any()
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]


def test_frames_read_alone_are_the_same(packed: Path) -> None:
    with Archive(packed, book=BOOK) as archive:
        track = archive.snapshot().tracks[0]
        whole, part = track.read(0, 400), track.read(250, 270)
    for a, b in zip(whole, part, strict=True):
        difference = a[250:270].view("<f2").astype(float) - b.view("<f2")
        # Sums of another order: the last bit of a half may differ.
        assert np.abs(difference).max() < 0.01


def test_appended_turns_are_what_one_encoding_gives(tmp_path: Path) -> None:
    identity = identity_from_gguf(MODEL)
    grown, at_once = tmp_path / "grown.tsc", tmp_path / "once.tsc"
    tscfile.pack(TURNS[0], grown, book=BOOK, identity=identity)
    for turn in TURNS[1:]:
        report = tscfile.append(turn, grown, book=BOOK)
        assert report.plan == "append" and report.n_frames_new == 80
        assert report.bytes_added < 8_000
    tscfile.pack(TURNS[-1], at_once, book=BOOK, identity=identity)
    true = open_source(TURNS[-1]).tracks[0].read(0, 410)
    with Archive(grown, book=BOOK) as one, Archive(at_once, book=BOOK) as other:
        for a, b, c in zip(
            one.snapshot().tracks[0].read(0, 410), other.snapshot().tracks[0].read(0, 410), true,
            strict=True,
        ):  # fmt: skip
            once, appended, exact = (each.view("<f2").astype(float) for each in (b, a, c))
            # Frames that were the newest of a save took a finer step then and keep it; the others
            # are the same to the rounding of sums.
            assert np.square(appended - exact).mean() <= 1.02 * np.square(once - exact).mean()
            apart = np.abs(appended[:50] - once[:50]).max()
            assert apart < 0.05
    report = tscfile.append(REGENERATED, grown, book=BOOK)
    assert report.plan == "truncate+append" and report.n_frames_kept == 228


def test_a_lossless_save_takes_nothing_from_a_lossy_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tsc"
    tscfile.pack(TURNS[0], path, book=BOOK, identity=identity_from_gguf(MODEL))
    monkeypatch.setenv("TSC_BOOKS", str(BOOK.parent))
    report = tscfile.append(TURNS[1], path, tier="lossless")
    assert report.n_frames_kept == 0 and report.n_frames_new == 170
    monkeypatch.delenv("TSC_BOOKS")
    tscfile.unpack(path, tmp_path / "back.kv")
    assert (tmp_path / "back.kv").read_bytes() == TURNS[1].read_bytes()
    with Archive(path) as archive:
        assert [is_exact(block) for block in archive.container.blocks] == [False, True]


def test_lossy_bytes_that_flip_are_found(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    rng = np.random.default_rng(3)
    broken_path = tmp_path / "broken.tsc"
    for at in rng.choice(len(data), 60, replace=False).tolist():
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        broken_path.write_bytes(broken)
        try:
            assert tscfile.verify(broken_path, book=BOOK).problems
        except TscError as error:
            assert error.exit_code in (3, 5)


# --- the model --------------------------------------------------------------------------------


@pytest.mark.slow
def test_tiers_keep_their_promise_on_held_out_text() -> None:
    from tscfile.quality.codec import TierCodec
    from tscfile.quality.engine import Engine
    from tscfile.quality.protocol import Plan, evaluate
    from tscfile.quality.windows import read_text

    text = read_text(SAMPLES / "texts" / "heldout.txt")
    codecs = [TierCodec(name, BOOK) for name in TARGETS]
    report = evaluate(Engine(MODEL), text, codecs, Plan(frames=(768,), n_windows=8))
    found = {result.codec: result for result in report.results}
    for name, ratio in (("near", 50), ("balanced", 180), ("compact", 500), ("archive", 900)):
        assert found[name].continuation.kl_mean <= TARGETS[name], name
        assert found[name].snapshot_ratio >= ratio, name


def test_a_resume_continues_from_a_lossy_archive(packed: Path) -> None:
    from tscfile.resume.llama_cpp import resume

    with Archive(packed, book=BOOK) as archive:
        result = resume(archive.snapshot(), MODEL, " We must", 16)
    assert result.n_reused == 399 and len(result.tokens) == 16


def test_every_integer_of_32_bits_has_a_symbol() -> None:
    bounds = np.iinfo(np.int32)
    values = np.array([[bounds.min, bounds.max, -16, 15, 0, -1]], np.int32)
    symbols, escaped = ladder.to_symbols(values)
    assert escaped.tolist() == [bounds.min, bounds.max, -16]
    assert np.array_equal(ladder.from_symbols(symbols, escaped), values)
