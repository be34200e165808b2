"""The lossy tiers: stages alone, whole archives, and what they do to the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REGENERATED, SAMPLES, SESSION, SESSION_BF16, TURNS

import tscfile
from tscfile.archive import Archive, is_exact
from tscfile.books.book import Book, load
from tscfile.bytestream import ByteReader, ByteWriter
from tscfile.entropy import ladder, segments
from tscfile.errors import DamagedError, MismatchError, TscError, UsageError
from tscfile.identity import identity_from_gguf
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


@pytest.mark.parametrize("n_frames", [1, 7, 256])
def test_segments_come_back(book: Book, n_frames: int) -> None:
    rng = np.random.default_rng(n_frames)
    log_step = int(np.median(book.log_sigmas))
    classes = ladder.class_of(book.log_sigmas, log_step)
    spread = 2.0 ** ((book.log_sigmas - log_step) / 256)
    values = np.rint(rng.normal(0, spread, (n_frames, len(spread)))).astype(np.int32)
    values[:, classes < 0] = 0
    values[0, 0] = 100_000
    writer = ByteWriter()
    segments.encode(writer, values, log_step, classes, book.frequencies)
    reader = ByteReader(writer.bytes(), "test")
    step, found = segments.decode(
        reader, book.n_coefficients, book.log_sigmas, book.frequencies, n_frames
    )
    reader.end()
    assert step == log_step and (found == values).all()


def test_segments_are_near_the_ideal_length(book: Book) -> None:
    rng = np.random.default_rng(0)
    log_step = int(np.median(book.log_sigmas))
    classes = ladder.class_of(book.log_sigmas, log_step)
    used = np.flatnonzero(classes >= 0)
    chances = book.frequencies[classes[used]] / 4096
    draws = [rng.choice(31, 256, p=row[:31] / row[:31].sum()) for row in chances]
    symbols = np.stack(draws, axis=1).astype(np.uint8)
    values = np.zeros((256, len(classes)), np.int32)
    values[:, used] = ladder.from_symbols(symbols, np.zeros(0, np.int32))
    writer = ByteWriter()
    segments.encode(writer, values, log_step, classes, book.frequencies)
    ideal = -np.log2(chances[np.arange(len(used)), symbols]).sum() / 8
    assert len(writer) <= 1.02 * ideal + 16


def test_damaged_segments_are_refused_or_decoded(book: Book) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(-2, 3, (16, book.n_coefficients)).astype(np.int32)
    log_step = int(book.log_sigmas.min())
    classes = ladder.class_of(book.log_sigmas, log_step)
    writer = ByteWriter()
    segments.encode(writer, values, log_step, classes, book.frequencies)
    whole = writer.bytes()
    for at in range(0, len(whole), 5):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        for data in (bytes(broken), whole[:at]):
            try:
                segments.decode(
                    ByteReader(data, "test"), book.n_coefficients, book.log_sigmas,
                    book.frequencies, 16,
                )  # fmt: skip
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
    near, balanced, compact = (book.tiers[name] for name in ("near", "balanced", "compact"))
    assert near.log_step < balanced.log_step < compact.log_step
    assert near.kl <= 0.001 and balanced.kl <= 0.01 and compact.kl <= 0.05


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


def test_another_model_is_refused(tmp_path: Path) -> None:
    identity = identity_from_gguf(MODEL)
    identity.facts["weights_blake3"] = "0" * 64
    with pytest.raises(MismatchError, match="weights_blake3"):
        tscfile.pack(SESSION, tmp_path / "x.tsc", book=BOOK, identity=identity)
    assert not (tmp_path / "x.tsc").exists()


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
    with Archive(grown, book=BOOK) as one, Archive(at_once, book=BOOK) as other:
        for a, b in zip(
            one.snapshot().tracks[0].read(0, 410), other.snapshot().tracks[0].read(0, 410),
            strict=True,
        ):  # fmt: skip
            assert np.abs(a.view("<f2").astype(float) - b.view("<f2")).max() < 0.05
    report = tscfile.append(REGENERATED, grown, book=BOOK)
    assert report.plan == "truncate+append" and report.n_frames_kept == 228


def test_a_lossless_save_takes_nothing_from_a_lossy_one(tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    tscfile.pack(TURNS[0], path, book=BOOK, identity=identity_from_gguf(MODEL))
    report = tscfile.append(TURNS[1], path, tier="lossless", book=BOOK)
    assert report.n_frames_kept == 0 and report.n_frames_new == 170
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
    codecs = [TierCodec(name, BOOK) for name in ("near", "balanced", "compact")]
    report = evaluate(Engine(MODEL), text, codecs, Plan(frames=(768,), n_windows=8))
    found = {result.codec: result for result in report.results}
    for name, kl, ratio in (("near", 0.001, 45), ("balanced", 0.01, 140), ("compact", 0.05, 400)):
        assert found[name].continuation.kl_mean <= kl, name
        assert found[name].snapshot_ratio >= ratio, name


def test_a_resume_continues_from_a_lossy_archive(packed: Path) -> None:
    from tscfile.resume.llama_cpp import resume

    with Archive(packed, book=BOOK) as archive:
        result = resume(archive.snapshot(), MODEL, " We must", 16)
    assert result.n_reused == 399 and len(result.tokens) == 16
