"""Product quantization: codebooks, archives with and without a book, hostile bytes, the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import REGENERATED, SAMPLES, SESSION, SESSION_BF16, TURNS
from tscfile_cli.main import tsc

import tscfile
from tscfile import registry
from tscfile.archive import Archive
from tscfile.archived_track import ArchivedTrack
from tscfile.books import product as book_product
from tscfile.books.book import Book, load
from tscfile.books.product import RATES, learn_product, read_product
from tscfile.bytestream import ByteReader, ByteWriter
from tscfile.container.records import CODEBOOKS, ChunkHeader, checksum
from tscfile.context import FrameContext
from tscfile.dtypes import DTYPES
from tscfile.errors import DamagedError, TscError, UsageError
from tscfile.identity import identity_from_gguf
from tscfile.model import TensorSpec
from tscfile.product_codec import ProductCodec, _write_forms
from tscfile.product_coding import ProductOptions
from tscfile.product_session import SessionCodes, plan
from tscfile.quantizers.product import ProductQuantizer, kmeans, learn_rotation, learn_stages
from tscfile.session_basis import KeyTurn
from tscfile.sources import open_source
from tscfile.transforms import channels
from tscfile.verification import verify

SPEC = Path(__file__).parent.parent / "spec"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
sys.path.insert(0, str(SPEC))

import reference_decoder as decoder  # noqa: E402


class SessionFrames:
    """Frames of the sample session in the place of those of calibration text."""

    def __init__(self, book: Book) -> None:
        snapshot = open_source(SESSION)
        (track,) = snapshot.tracks
        self._context = FrameContext(track.cells.pos, snapshot.tokens)
        self._frames = channels.to_frames(
            track.read(0, len(track.cells)), track.tensors, track.cells.pos, book.rope,
            int(book.facts["book.head_dim"]), "norm",
        )  # fmt: skip

    def __len__(self) -> int:
        return 1

    def frames(self, number: int) -> np.ndarray:
        return self._frames.copy()

    def context(self, number: int) -> FrameContext:
        return self._context


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample book with codebooks of 24 stages; they know the sample session by heart."""
    sample = load(SAMPLES / "model" / "reference-llama-6m.tscbook").book
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book_product, "_LEAST_FRAMES", 64)
        patch.setattr(book_product, "N_STAGES", 24)
        arrays = learn_product(sample, SessionFrames(sample))
    path = tmp_path_factory.mktemp("book") / "product.tscbook"
    path.write_bytes(Book(sample.facts, {**sample.arrays, **arrays}, sample.tiers).to_bytes())
    return path


@pytest.fixture(params=["book", "session"])
def options(request: pytest.FixtureRequest, book: Path) -> dict[str, Any]:
    """Of `tscfile.pack`: product quantization with and without a book."""
    known = {"identity": identity_from_gguf(MODEL)}
    if request.param == "book":
        return {"book": book, "product": ProductOptions(4)} | known
    return {"product": ProductOptions(192)} | known


def book_of(options: dict[str, Any]) -> dict[str, Any]:
    return {"book": options["book"]} if "book" in options else {}


def floats(rows: list[np.ndarray], dtype: str = "f16") -> np.ndarray:
    whole = np.concatenate(rows, axis=1)
    if dtype == "bf16":
        return (whole.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(whole).view("<f2").astype(np.float32)


# --- the quantizer ----------------------------------------------------------------------------


def test_stages_say_the_most_first_and_codes_come_back() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(3000, 24)) * np.geomspace(8, 0.3, 24)).astype(np.float32)
    learnt = list(learn_stages(vectors.copy(), 6, 8, 6, rng))
    quantizer = ProductQuantizer(
        np.stack([columns for columns, _ in learnt]), np.arange(6, dtype=np.int32),
        np.stack([centroids for _, centroids in learnt]),
    )  # fmt: skip
    errors = quantizer.errors(vectors[:500])
    assert (np.diff(errors.mean(axis=0)) < 0).all()
    assert errors[:, 6].mean() < 0.1 * errors[:, 0].mean()
    for beam in (1, 8):
        counts = rng.integers(0, 7, 500)
        codes = quantizer.encode_counts(vectors[:500], counts, beam)
        found = np.square(quantizer.decode(codes, counts, 24) - vectors[:500]).sum(axis=1)
        reached = quantizer.errors(vectors[:500], beam)[np.arange(500), counts]
        assert np.allclose(found, reached, rtol=1e-3, atol=1e-2)


def test_codes_end_where_a_byte_is_not_worth_it() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(600, 16)).astype(np.float32) * rng.uniform(0.1, 4, (600, 1))
    vectors = vectors.astype(np.float32)
    learnt = list(learn_stages(vectors.copy(), 10, 8, 4, rng))
    quantizer = ProductQuantizer(
        np.stack([columns for columns, _ in learnt]), np.arange(10, dtype=np.int32),
        np.stack([centroids for _, centroids in learnt]),
    )  # fmt: skip
    errors = quantizer.errors(vectors)
    for worth in (0.5, 4.0, 64.0, 1e9):
        codes, counts = quantizer.encode_worth(vectors, np.full(600, worth))
        best = (errors + worth * np.arange(11)).argmin(axis=1)
        assert (counts == best).mean() > 0.98 and len(codes) == counts.sum()
    assert not counts.any()


def test_a_rotation_serves_vectors_that_are_askew() -> None:
    rng = np.random.default_rng(2)
    turned, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    vectors = (rng.normal(size=(2000, 16)) * np.geomspace(10, 0.1, 16)) @ turned
    vectors = vectors.astype(np.float32)
    rotation = learn_rotation(vectors, 4, 4, np.random.default_rng(0))
    assert np.allclose(rotation @ rotation.T, np.eye(16), atol=1e-4)

    def error(values: np.ndarray) -> float:
        total = 0.0
        for i in range(0, 16, 4):
            part = np.ascontiguousarray(values[:, i : i + 4])
            centroids = kmeans(part, 256, 4, np.random.default_rng(0))
            distances = np.square(part[:, None] - centroids[None]).sum(axis=2)
            total += float(distances.min(axis=1).sum())
        return total

    assert error(vectors @ rotation) < 0.7 * error(vectors)


def test_learning_is_the_same_again(book: Path) -> None:
    arrays = load(book).book.arrays
    sample = load(SAMPLES / "model" / "reference-llama-6m.tscbook").book
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book_product, "_LEAST_FRAMES", 64)
        patch.setattr(book_product, "N_STAGES", 3)
        again = learn_product(sample, SessionFrames(sample))
    for name in ("product_columns", "product_centroids", "product_scales"):
        assert np.array_equal(again[name], arrays[name][:3])
    assert learn_product(sample, SessionFrames(sample)) == {}


# --- archives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [SESSION, SESSION_BF16], ids=["f16", "bf16"])
def test_round_trip(source: Path, options: dict[str, Any], tmp_path: Path) -> None:
    path, back = tmp_path / "a.tsc", tmp_path / "back.kv"
    report = tscfile.pack(source, path, **options)
    assert report.tier == "custom" and report.n_frames_exact is None
    assert not verify(path, **book_of(options)).problems
    tscfile.unpack(path, back, **book_of(options))
    dtype = "bf16" if source == SESSION_BF16 else "f16"
    true, found = (floats(list(_rows(file)), dtype) for file in (source, back))
    error = np.square(true - found).mean() / np.square(true - true.mean(axis=0)).mean()
    assert 0 < error < 0.35
    # Random access: any frames alone are those of the whole.
    with Archive(path, **book_of(options)) as archive:
        (track,) = archive.snapshot().tracks
        whole = track.read(0, 400)
        for start, stop in ((0, 1), (3, 5), (255, 257), (390, 400)):
            for part, rows in zip(track.read(start, stop), whole, strict=True):
                assert np.allclose(
                    floats([part], dtype), floats([rows[start:stop]], dtype), atol=2e-2
                )


def _rows(path: Path) -> list[np.ndarray]:
    (track,) = open_source(path).tracks
    return track.read(0, len(track.cells))


def test_more_bytes_are_nearer(book: Path, tmp_path: Path) -> None:
    true = floats(_rows(SESSION))
    sizes, errors = [], []
    for n in (0.5, 2, 8):
        report = tscfile.pack(
            SESSION, tmp_path / f"{n}.tsc", book=book, product=ProductOptions(n)
        )
        sizes.append(report.file_bytes)
        with Archive(tmp_path / f"{n}.tsc", book=book) as archive:
            (track,) = archive.snapshot().tracks
            errors.append(np.square(floats(track.read(0, 400)) - true).mean())
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert errors[2] < 0.5 * errors[0] and sizes[2] < 12000


@pytest.mark.parametrize("above", [0.0, 1.0, 2.5])
def test_no_frame_is_worse_than_the_threshold(
    above: float, options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.tsc"
    asked = ProductOptions(options["product"].code_bytes, above)
    report = tscfile.pack(SESSION, path, **(options | {"product": asked}))
    frame_bytes = sum(part.shape[1] for part in _rows(SESSION))
    assert report.exact_bytes == report.n_frames_exact * frame_bytes
    with Archive(path, **book_of(options)) as archive:
        coding = archive.record().coding
        assert coding["fallback_above"] == above
        assert coding["fallback_frames"] == report.n_frames_exact
        (track,) = archive.snapshot().tracks
        found, true = track.read(0, 400), _rows(SESSION)
        exact = np.concatenate([a != b for a, b in zip(found, true, strict=True)], axis=1)
        assert (~exact.any(axis=1)).sum() >= report.n_frames_exact
        assert report.n_frames_exact == 400 if not above else report.n_frames_exact < 300
        for track, start, stop in archive.blocks():
            (chunk,) = archive.block(track.runs[start // 256]).chunks
            _, (payload,) = track.lossy_payloads(start // 256, chunk)
            codec = track.product_codec(payload, "here")
            domain = codec.domain
            context = track.context(start, stop)
            vectors, left = domain.vectors(
                [part[start:stop] for part in true], track.tensors, context
            )
            stored = codec.read(payload, "here")
            restored = domain.quantizer.decode(stored.codes, stored.counts, domain.n_columns)
            errors = left + np.square(vectors - restored, dtype=float).sum(axis=1)
            coded = stored.forms > 0
            if isinstance(domain, SessionCodes):
                assert (errors[coded] <= above * domain.error * (1 + 1e-6)).all()
            else:
                # The newest frames are held to less.
                usual = domain.codes.error_of(np.array([domain.codes.worth_of(4)]))
                assert (errors[coded] <= above * usual * (1 + 1e-6)).all()


def test_series(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "series.tsc"
    first = tscfile.pack(TURNS[0], path, **_few(options))
    assert first.plan == "keyframe"
    plans = []
    for turn in (*TURNS[1:4], REGENERATED, TURNS[4]):
        report = tscfile.append(turn, path, **book_of(options))
        plans.append(report.plan)
        assert report.tier == "custom" and report.n_frames_new < 100
    assert plans[:3] == ["append"] * 3 and "truncate+append" in plans
    assert not verify(path, **book_of(options)).problems
    with Archive(path, **book_of(options)) as archive:
        assert len(archive) == 6
        if "book" not in options:
            assert len(archive.container.extras(CODEBOOKS)) == 1
        for number, turn in enumerate((*TURNS[:4], REGENERATED, TURNS[4])):
            (track,) = archive.snapshot(number).tracks
            true = floats(_rows(turn))
            found = floats(track.read(0, len(track.cells)))
            assert np.square(true - found).mean() < 0.35 * true.var()


def _few(options: dict[str, Any]) -> dict[str, Any]:
    """A first turn is short: what it takes to pay for codebooks."""
    if "book" in options:
        return options
    return options | {"product": ProductOptions(384)}


def test_a_file_needs_its_book(book: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(SESSION, path, book=book, product=ProductOptions(2))
    with Archive(path) as archive, pytest.raises(UsageError, match="needs book"):
        archive.snapshot()
    plain = SAMPLES / "model" / "reference-llama-6m.tscbook"
    with pytest.raises(UsageError, match="the archive needs"), Archive(path, book=plain) as archive:
        archive.snapshot()
    tscfile.pack(
        SESSION, tmp_path / "b.tsc", book=book, embed_book=True, product=ProductOptions(2)
    )
    with Archive(tmp_path / "b.tsc") as archive:
        archive.snapshot().tracks[0].read(0, 400)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantizer", "product"], "--code-bytes"),
        (["--code-bytes", "4"], "--quantizer"),
        (["--fallback-above", "2"], "--quantizer"),
        (["--quantizer", "product", "--code-bytes", "0"], "code-bytes"),
        (["--quantizer", "product", "--code-bytes", "4", "--tier", "near"], "give one of"),
        (["--quantizer", "product", "--code-bytes", "4"], "24 at least"),
        (["--quantizer", "product", "--code-bytes", "30"], "1366 are needed"),
        (["--quantizer", "product", "--code-bytes", "900", "--book", "BOOK"], "0.125 to 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_nonsense_is_refused(
    arguments: list[str], words: str, book: Path, tmp_path: Path
) -> None:
    named = [str(book) if argument == "BOOK" else argument for argument in arguments]
    path = tmp_path / "a.tsc"
    call = ["pack", str(SESSION), "-o", str(path), "--model", str(MODEL), *named]
    result = CliRunner().invoke(tsc, call)
    said = result.output + str(result.exception)
    assert result.exit_code and words in said and not path.exists()


def test_commands(book: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    arguments = ["pack", str(SESSION), "-o", str(path), "--quantizer", "product", "--code-bytes",
                 "4", "--fallback-above", "1.5", "--book", str(book)]  # fmt: skip
    result = CliRunner().invoke(tsc, arguments)
    assert result.exit_code == 0 and "of the new frames exact in" in result.output
    said = CliRunner().invoke(tsc, ["info", str(path)]).output
    assert re.search(r"code_bytes 4, fallback_above 1.5, fallback_frames \d+", said)
    assert "codecs     product" in said


# --- hostile bytes ----------------------------------------------------------------------------


def _payload(path: Path, options: dict[str, Any]) -> tuple[Archive, ArchivedTrack, bytes]:
    archive = Archive(path, **book_of(options))
    (part,) = archive.record().tracks
    track = ArchivedTrack(archive, part, archive.record())
    (chunk,) = archive.container.blocks[0].chunks
    assert chunk.codec == registry.PRODUCT
    return archive, track, bytes(archive.chunk_payload(0, chunk)[1])


def test_damaged_chunks(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    asked = ProductOptions(options["product"].code_bytes, 2.0)
    tscfile.pack(SESSION, path, **(options | {"product": asked}))
    archive, track, payload = _payload(path, options)
    rng = np.random.default_rng(3)
    with archive:
        codec = track.product_codec(memoryview(payload), "here")
        whole = codec.read(memoryview(payload), "here")
        assert len(whole.forms) == 256
        for cut in [*range(0, 60), *rng.integers(60, len(payload), 60)]:
            with pytest.raises(TscError):
                codec.read(memoryview(payload)[:cut], "here")
        with pytest.raises(DamagedError):
            codec.read(memoryview(payload + b"\0"), "here")
        for _ in range(400):
            damaged = bytearray(payload)
            at = int(rng.integers(0, min(len(payload), 120)))
            damaged[at] ^= 1 << int(rng.integers(0, 8))
            try:
                header = ChunkHeader.read(ByteReader(memoryview(damaged), "here"))
                if header.n_frames != 256 or sum(header.row_bytes) != whole.frame_bytes:
                    continue
                codec.decode(memoryview(damaged), track.tensors, 0, track.context(0, 256), "here")
            except TscError:
                pass


def test_damaged_codebooks(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(
        SESSION, path, product=ProductOptions(192), identity=identity_from_gguf(MODEL)
    )
    with Archive(path) as archive:
        (key, ref), = archive.container.by_checksum(CODEBOOKS).items()
        payload = bytes(archive.container.read(ref, CODEBOOKS, key))
    learnt = SessionCodes.read(memoryview(payload), "here")
    assert learnt.write() == payload and checksum(payload) == key
    rng = np.random.default_rng(4)
    for cut in [*range(0, 190), *rng.integers(190, len(payload), 20)]:
        with pytest.raises(DamagedError):
            SessionCodes.read(memoryview(payload)[:cut], "here")
    for _ in range(600):
        damaged = bytearray(payload)
        damaged[int(rng.integers(0, 190))] ^= 1 << int(rng.integers(0, 8))
        try:
            found = SessionCodes.read(memoryview(damaged), "here")
            assert found.quantizer.n_stages <= 1 << 16
        except DamagedError:
            pass


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("product_columns", lambda a: np.where(a == a[0, 0], 665, a).astype(np.uint32)),
        ("product_columns", lambda a: np.zeros_like(a)),
        ("product_columns", lambda a: a[:0]),
        ("product_columns", lambda a: a.astype(np.int32)),
        ("product_columns", lambda a: a[:, :-1]),
        ("product_centroids", lambda a: a[:, :255]),
        ("product_scales", lambda a: np.full_like(a, np.nan)),
        ("product_worth", lambda a: a[::-1].copy()),
        ("product_worth", lambda a: a * 0),
        ("product_errors", lambda a: a[:-1]),
        ("product_errors", lambda a: None),
    ],
)
def test_damaged_arrays_of_a_book(name: str, change: Any, book: Path) -> None:
    whole = load(book).book
    assert len(RATES) == len(read_product(whole, "here").worth)
    arrays = dict(whole.arrays) | {name: change(whole.arrays[name])}
    arrays = {key: value for key, value in arrays.items() if value is not None}
    with pytest.raises(DamagedError):
        read_product(Book(whole.facts, arrays, whole.tiers), "here")


# --- the page ---------------------------------------------------------------------------------


def test_decoder_of_the_page(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    asked = ProductOptions(options["product"].code_bytes, 1.5)
    tscfile.pack(SESSION, path, **(options | {"product": asked}))
    book = options["book"].read_bytes() if "book" in options else None
    file = decoder.File(path.read_bytes(), book)
    (read,), frames = file.snapshots[0]["tracks"], file.decoded[0, 0]["frames"]
    assert bool(file.decoded[0, 0]["codebooks"]) == (book is None)
    assert any(isinstance(frame, bytes) for frame in frames)
    with Archive(path, **book_of(options)) as archive:
        (track,) = archive.snapshot().tracks
        for mine, theirs in zip(track.read(0, 400), read["rows"], strict=True):
            a, b = floats([mine]), floats([theirs])
            assert np.abs(a - b).max() <= 2.0**-9 * np.abs(a).max()
            assert (a != b).mean() < 0.02


def _example() -> tuple[SessionCodes, bytes]:
    entries = np.zeros((1, 4, 256, 2), np.int8)
    for book, centroid, values in ((0, 7, (2, -1)), (1, 1, (0, 4)), (2, 255, (-4, 8)),
                                   (3, 2, (1, 1))):  # fmt: skip
        entries[0, book, centroid] = values
    learnt = SessionCodes(
        KeyTurn(4, "norm", np.array([1, 0.5], np.float32)), [4, 4], 1, 4, 2,
        np.array([1, 0, 0, 0, 0, 0, 0, 0.5], np.float32), np.array([2, 4], np.float32),
        np.array([[0.5, 0.5, 0.25, 0.25]], np.float32), entries, 0.25,
    )  # fmt: skip
    learnt.id = checksum(learnt.write())
    exact = np.arange(1, 9, dtype="<f2").tobytes()
    writer = ByteWriter().pack("Q", learnt.id)
    _write_forms(writer, np.array([5, 0, 3]))
    return learnt, writer.raw(bytes([7, 1, 255, 2])).raw(exact).raw(bytes([7, 1])).bytes()


def test_example_of_the_page() -> None:
    text = (SPEC / "codecs" / "product.md").read_text(encoding="utf-8")
    part = text[text.index("## Example") :]
    learnt, body = _example()
    assert f"`{learnt.id:016x}`" in part
    record, coded = part.split("The body of a chunk")
    said = "".join("".join(re.findall(r"`([0-9a-f ]+)`", row.split("|")[1]))
                   for row in record.splitlines() if row.startswith("| `"))  # fmt: skip
    head = bytes.fromhex(said)
    assert learnt.write().startswith(head)
    said = "".join("".join(re.findall(r"`([0-9a-f ]+)`", row.split("|")[1]))
                   for row in coded.split("Frame 0")[0].splitlines() if row.startswith("| `"))
    assert bytes.fromhex(said) == body
    cursor = decoder.Cursor(body[8:])
    frames = decoder.product_frames(cursor, 3, 4, 16)
    cursor.end()
    codebooks = decoder.read_codebooks(learnt.write())
    places = [(0, 0, 1, 8, 0), (0, 1, 1, 8, 0)]
    found = decoder.product_session_rows(frames, codebooks, places, np.arange(3))
    for row, data in zip(re.findall(r"^\| (?:keys|values) of layer 0 \| (.*) \|$", part, re.M),
                         found, strict=True):  # fmt: skip
        assert bytes.fromhex(row.replace("`", "")) == data[0].tobytes()
    assert found[0][1].tobytes() + found[1][1].tobytes() == frames[1]
    tensors = [TensorSpec(0, role, DTYPES["f16"], 8) for role in "kv"]
    header = ChunkHeader(registry.PRODUCT, 0, 3, 0, 1, (8, 8)).write()
    context = FrameContext(np.arange(3, dtype=np.int32), np.zeros(0, np.int32))
    mine = ProductCodec(learnt).decode(memoryview(header + body), tensors, 0, context, "here")
    for ours, theirs in zip(mine, found, strict=True):
        assert np.array_equal(ours, theirs)


def test_numbers_of_the_page() -> None:
    text = (SPEC / "codecs" / "product.md").read_text(encoding="utf-8")
    assert f"Of {book_product._MOST_FRAMES} frames at most, the " in text
    assert f"the {book_product._MOST_COLUMNS} widest" in text
    assert f"Each of {book_product.N_STAGES} stages is over the {book_product.WIDTH} col" in text
    assert f"| `product_worth` | f4 | {len(RATES)} |" in text and RATES[0] == 2**-3
    assert f"`S` is 1 to {book_product._MOST_STAGES}" in text
    assert plan(1536, 64, 96) == (16, 1) and plan(1536, 64, 800) == (4, 2)
