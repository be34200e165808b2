"""Quality layers: several tiers of the same frames in one file, and files cut down to a tier."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tscfile_cli.main import main

import tscfile
from tscfile.archive import Archive
from tscfile.books.book import load
from tscfile.bytestream import ByteReader, ByteWriter
from tscfile.container.records import CHUNK, ChunkHeader
from tscfile.demotion import demote
from tscfile.description import describe
from tscfile.entropy import ladder, refinement
from tscfile.errors import DamagedError, MismatchError, TscError, UsageError
from tscfile.identity import identity_from_gguf
from tscfile.sources import open_source
from tscfile.verification import verify

SAMPLES = Path(__file__).parent.parent / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"
SESSION = SAMPLES / "session.kv"
SERIES = sorted((SAMPLES / "series").glob("*.kv"))
LAYERS = ["archive", "balanced", "lossless"]


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layers") / "layered.tsc"
    tscfile.pack(SESSION, path, tier=LAYERS, book=BOOK)
    return path


def rows_of(path: Path, tier: str | None = None, number: int = -1) -> list[np.ndarray]:
    with Archive(path, book=BOOK) as archive:
        (track,) = archive.snapshot(number, tier).tracks
        return track.read(0, len(track.cells))


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(a, b, strict=True))


def single(folder: Path, tier: str, source: Path = SESSION) -> Path:
    path = folder / f"{tier}.tsc"
    tscfile.pack(source, path, tier=tier, book=None if tier == "lossless" else BOOK)
    return path


# --- what comes back --------------------------------------------------------------------------


def test_the_last_layer_gives_back_the_very_file(layered: Path, tmp_path: Path) -> None:
    tscfile.unpack(layered, tmp_path / "back.kv", book=BOOK)
    assert (tmp_path / "back.kv").read_bytes() == SESSION.read_bytes()
    with Archive(layered, book=BOOK) as archive:
        assert archive.snapshot().exact and not archive.snapshot(tier="balanced").exact


def test_the_base_is_what_a_file_of_its_tier_holds(layered: Path, tmp_path: Path) -> None:
    assert same(rows_of(layered, "archive"), rows_of(single(tmp_path, "archive")))


def test_a_refinement_is_as_near_as_a_file_of_its_tier(layered: Path, tmp_path: Path) -> None:
    """Rounding differs, as it leans to the layer below and not to zero; the error hardly does."""
    exact = rows_of(layered)
    alone = rows_of(single(tmp_path, "balanced"))

    def error(rows: list[np.ndarray]) -> float:
        pairs = zip(rows, exact, strict=True)
        apart = [a.view("<f2").astype(float) - b.view("<f2").astype(float) for a, b in pairs]
        return float(np.mean([np.square(each).mean() for each in apart]))

    refined = error(rows_of(layered, "balanced"))
    assert refined == pytest.approx(error(alone), rel=0.03)
    assert refined < 0.8 * error(rows_of(layered, "archive"))


def test_layers_without_a_book_end_in_the_exact_rows(tmp_path: Path) -> None:
    path = tmp_path / "layers.tsc"
    identity = identity_from_gguf(MODEL)
    tscfile.pack(SESSION, path, tier=["balanced", "lossless"], identity=identity)
    alone = tmp_path / "alone.tsc"
    tscfile.pack(SESSION, alone, tier="balanced", identity=identity)
    assert same(rows_of(path, "balanced"), rows_of(alone))
    demote(path, tmp_path / "cut.tsc", "balanced")
    assert (tmp_path / "cut.tsc").read_bytes() == alone.read_bytes()
    tscfile.unpack(path, tmp_path / "back.kv")
    assert (tmp_path / "back.kv").read_bytes() == SESSION.read_bytes()


def test_every_layer_of_a_later_save_without_a_book(tmp_path: Path) -> None:
    """What it shares with the first one needs the basis of that, a book or none given."""
    turns = sorted((SAMPLES / "series").glob("turn-?.kv"))[:3]
    path, cut = tmp_path / "layers.tsc", tmp_path / "cut.tsc"
    tscfile.pack(turns[0], path, tier=["near", "lossless"], identity=identity_from_gguf(MODEL))
    assert tscfile.append(turns[1], path).n_frames_kept
    shorter = tscfile.append(turns[0], path)
    assert shorter.n_frames_new == 0
    # The layers of a book are others.
    assert not tscfile.append(turns[2], path, book=BOOK).n_frames_kept
    tscfile.demote(path, cut, "near", book=BOOK)
    for number in range(4):
        for near in (rows_of(path, "near", number), rows_of(cut, None, number)):
            for mine, theirs in zip(near, rows_of(path, "lossless", number), strict=True):
                assert not np.array_equal(mine, theirs)
                a, b = (each.view("<f2").astype(float) for each in (mine, theirs))
                assert np.square(a - b).mean() < 0.1 * np.square(b).mean()


def test_the_one_tier_of_a_save_that_shares_layers(layered: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    shutil.copyfile(layered, path)
    assert not tscfile.append(SESSION, path, tier="lossless", book=BOOK).n_frames_new
    assert same(rows_of(path, "lossless"), rows_of(layered, "lossless"))


def test_layers_that_no_save_reads_any_more_are_no_damage(tmp_path: Path) -> None:
    """The basis of the coarser ones goes with the save that named it."""
    path = tmp_path / "a.tsc"
    tscfile.pack(SERIES[0], path, tier=["near", "lossless"], identity=identity_from_gguf(MODEL))
    assert not tscfile.append(SERIES[0], path, tier="lossless").n_frames_new
    tscfile.compact(path, drop=[0])
    assert not verify(path).problems
    tscfile.unpack(path, tmp_path / "back.kv")
    assert (tmp_path / "back.kv").read_bytes() == SERIES[0].read_bytes()


def test_part_of_a_layer_is_what_the_whole_says(layered: Path) -> None:
    whole = rows_of(layered, "balanced")
    with Archive(layered, book=BOOK) as archive:
        (track,) = archive.snapshot(tier="balanced").tracks
        part = track.read(250, 260, [3, 7])
    for mine, i in zip(part, (3, 7), strict=True):
        a, b = (each.view("<f2").astype(float) for each in (mine, whole[i][250:260]))
        # Sums of other lengths differ in their last bits.
        assert np.allclose(a, b, rtol=2e-3, atol=1e-4)


def test_layers_cost_less_than_a_tenth(layered: Path, tmp_path: Path) -> None:
    for tier in LAYERS:
        size = demote(layered, tmp_path / f"cut-{tier}.tsc", tier).file_bytes
        assert size <= 1.1 * single(tmp_path, tier).stat().st_size


def test_info_tells_what_each_layer_takes(layered: Path, tmp_path: Path) -> None:
    with Archive(layered) as archive:
        (snapshot,) = describe(archive).snapshots
    assert [layer.tier for layer in snapshot.layers] == LAYERS
    assert snapshot.tier == "lossless"
    sizes = [layer.restore_bytes for layer in snapshot.layers]
    assert sizes == sorted(sizes) and sizes[-1] == snapshot.restore_bytes
    report = demote(layered, tmp_path / "cut.tsc", "balanced")
    # Index and structure of the layers above are counted here and gone there.
    assert 0 <= sizes[1] - report.file_bytes < 300


# --- demoting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", LAYERS)
def test_a_demoted_file_gives_the_rows_of_the_layer(
    layered: Path, tmp_path: Path, tier: str
) -> None:
    cut = tmp_path / "cut.tsc"
    report = demote(layered, cut, tier)
    assert report.file_bytes == cut.stat().st_size <= report.bytes_before
    assert same(rows_of(cut), rows_of(layered, tier))
    assert not verify(cut, book=BOOK).problems
    with Archive(cut) as archive:
        assert archive.record().tier == tier
        assert archive.record().layers == LAYERS[: LAYERS.index(tier) + 1]


def test_demoted_to_the_base_it_is_a_file_of_that_tier(layered: Path, tmp_path: Path) -> None:
    demote(layered, tmp_path / "cut.tsc", "archive")
    alone = single(tmp_path, "archive")
    assert (tmp_path / "cut.tsc").read_bytes() == alone.read_bytes()


def test_demoting_in_steps_is_demoting_at_once(layered: Path, tmp_path: Path) -> None:
    demote(layered, tmp_path / "a.tsc", "balanced")
    demote(tmp_path / "a.tsc", tmp_path / "b.tsc", "archive")
    demote(layered, tmp_path / "c.tsc", "archive")
    assert (tmp_path / "b.tsc").read_bytes() == (tmp_path / "c.tsc").read_bytes()


def test_a_series_is_demoted_and_goes_on(tmp_path: Path) -> None:
    path, cut = tmp_path / "series.tsc", tmp_path / "cut.tsc"
    identity = identity_from_gguf(MODEL)
    tscfile.pack(SERIES[0], path, tier=LAYERS, book=BOOK, embed_book=True, identity=identity)
    for source in SERIES[1:4]:
        report = tscfile.append(source, path)
        assert report.tier == ",".join(LAYERS)
    with Archive(path) as archive:
        for number, source in enumerate(SERIES[:4]):
            (kept,), (given,) = archive.snapshot(number).tracks, open_source(source).tracks
            assert same(kept.read(0, len(kept.cells)), given.read(0, len(given.cells)))
    report = demote(path, cut, "balanced")
    assert (report.n_snapshots, report.n_demoted) == (4, 4)
    for number in range(4):
        assert same(rows_of(cut, None, number), rows_of(path, "balanced", number))
    assert not verify(cut).problems
    more = tscfile.append(SERIES[4], cut)
    assert more.n_frames_kept > 0 and not verify(cut).problems


def test_a_lossless_save_may_share_what_layers_hold(layered: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.tsc"
    shutil.copyfile(layered, path)
    report = tscfile.append(SESSION, path, tier="lossless", book=BOOK)
    assert report.n_frames_new == 0
    assert same(rows_of(path), rows_of(layered))
    with pytest.raises(UsageError, match="snapshot 1 has no layer archive, only lossless"):
        demote(path, tmp_path / "cut.tsc", "archive")
    assert not (tmp_path / "cut.tsc").exists()


def test_frames_of_other_layers_are_not_shared(layered: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.tsc"
    shutil.copyfile(layered, path)
    report = tscfile.append(SESSION, path, tier=["balanced", "lossless"], book=BOOK)
    assert report.n_frames_kept == 0
    with Archive(path, book=BOOK) as archive:
        with pytest.raises(UsageError, match="no tier archive; it has balanced, lossless"):
            archive.snapshot(tier="archive")


def test_demoted_to_tokens_nothing_but_ids_is_left(tmp_path: Path) -> None:
    path, cut = tmp_path / "layers.tsc", tmp_path / "cut.tsc"
    tscfile.pack(SESSION, path, tier=LAYERS, book=BOOK, identity=identity_from_gguf(MODEL))
    demote(path, cut, "tokens", book=BOOK)
    with Archive(cut, book=BOOK) as archive:
        snapshot = archive.snapshot()
        assert snapshot.n_absent == len(snapshot.tokens) == 400
        assert snapshot.tokens.tolist() == open_source(SESSION).tokens.tolist()
    assert not verify(cut, book=BOOK).problems
    assert cut.stat().st_size < 1200


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        (["balanced", "archive"], "from the coarsest tier to the finest"),
        (["lossless", "archive"], "lossless last"),
        (["archive", "archive"], "name each once"),
        (["archive", "tokens"], "tokens are in every file"),
        (["archive", "custom"], "layers hold frames at named tiers"),
        (["archive", "tall"], "tier 'tall' is unknown"),
    ],
)
def test_layers_that_make_no_sense_are_refused(
    tiers: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        tscfile.pack(SESSION, tmp_path / "x.tsc", tier=tiers, book=BOOK)
    assert not (tmp_path / "x.tsc").exists()


def test_refinements_need_a_book(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than one lossy tier needs a book"):
        tscfile.pack(SESSION, tmp_path / "x.tsc", tier=["compact", "near"])


def test_coarser_snapshots_stay_and_finer_ones_are_refused(tmp_path: Path) -> None:
    path, cut = single(tmp_path, "balanced"), tmp_path / "cut.tsc"
    assert demote(path, cut, "near").n_demoted == 0
    assert cut.read_bytes() == path.read_bytes()
    assert demote(path, cut, "lossless", force=True).n_demoted == 0
    with pytest.raises(UsageError, match="snapshot 0 has no layer compact, only balanced"):
        demote(path, tmp_path / "no.tsc", "compact")
    assert not (tmp_path / "no.tsc").exists()


def test_only_named_models_are_cut_to_tokens(layered: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not name its model"):
        demote(layered, tmp_path / "cut.tsc", "tokens", book=BOOK)


def test_lossy_saves_take_no_part_of_layers(layered: Path, tmp_path: Path) -> None:
    """Or demoting would have to keep what it is to drop."""
    path = tmp_path / "copy.tsc"
    shutil.copyfile(layered, path)
    report = tscfile.append(SESSION, path, tier="balanced", book=BOOK)
    assert report.n_frames_kept == 0
    demote(path, tmp_path / "cut.tsc", "balanced")
    with Archive(tmp_path / "cut.tsc", book=BOOK) as archive:
        assert not archive.snapshot(0).exact and not archive.snapshot(1).exact


def test_too_many_layers_are_damage(layered: Path, tmp_path: Path) -> None:
    from tscfile.container.records import MAX_LAYERS

    with Archive(layered) as archive:
        block = archive.container.blocks[0]
        chunk = block.chunks[1]
        chunks = [block.chunks[0], *(replace(chunk, quality_layer=n) for n in range(1, 17))]
        track = archive.record().tracks[0]
        archive._check_chunks(replace(block, chunks=tuple(chunks[:MAX_LAYERS])), track, "test")
        with pytest.raises(DamagedError, match="17 quality layers"):
            archive._check_chunks(replace(block, chunks=tuple(chunks)), track, "test")


def test_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, cut, back = tmp_path / "s.tsc", tmp_path / "cut.tsc", tmp_path / "back.kv"

    def run(code: int, *arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == code
        return "".join(capfd.readouterr())

    tiers = ["--tiers", ",".join(LAYERS)]
    run(2, "pack", SESSION, "-o", path, *tiers, "--tier", "near", "--book", BOOK)
    run(0, "pack", SESSION, "-o", path, *tiers, "--book", BOOK, "-q")
    rows = run(0, "info", path).splitlines()
    assert [row.split()[0] for row in rows if row.endswith("x")][:3] == LAYERS
    assert "needs" not in run(0, "demote", path, "--to", "balanced", "-o", cut)
    assert "exists" in run(2, "demote", path, "--to", "balanced", "-o", cut)
    assert "the source itself" in run(2, "demote", path, "--to", "balanced", "-o", path, "-f")
    for source in (path, cut):
        options = ["--tier", "balanced", "--book", BOOK, "-o", back, "-f", "-q"]
        assert run(0, "unpack", source, *options) == ""
        assert same(rows_of(cut), [*open_source(back).tracks[0].read(0, 400)])
    assert "has no tier lossless" in run(2, "unpack", cut, "--tier", "lossless", "--book", BOOK)
    text = run(0, "resume", path, "--model", MODEL, "--tier", "archive", "--book", BOOK, "-n", 4)
    assert "reused 399 tokens" in text


def test_a_torn_file_is_not_demoted(layered: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.tsc"
    torn.write_bytes(layered.read_bytes() + b"half")
    with pytest.raises(DamagedError, match="no whole commit"):
        demote(torn, tmp_path / "cut.tsc", "archive")


Change = Callable[[ChunkHeader, bytes], bytes]


def _empty(header: ChunkHeader, body: bytes) -> bytes:
    return header.write()


def _other_frames(header: ChunkHeader, body: bytes) -> bytes:
    return header.write() + bytes([body[0] + 1]) + body[1:]


def _coarser(header: ChunkHeader, body: bytes) -> bytes:
    return header.write() + body[:1] + b"\xff\x7f" + body[3:]


def _far_finer(header: ChunkHeader, body: bytes) -> bytes:
    return header.write() + body[:1] + b"\x00\x80" + body[3:]


def _longer(header: ChunkHeader, body: bytes) -> bytes:
    return header.write() + body + b"\0"


@pytest.mark.parametrize("change", [_empty, _other_frames, _coarser, _far_finer, _longer])
def test_refinements_that_are_none_are_damage(layered: Path, change: Change) -> None:
    with Archive(layered, book=BOOK) as archive:
        (track,) = archive.snapshot(tier="balanced").tracks
        run = track.runs[-1]
        where, (base, refined) = track.lossy_payloads(run.block, track.chunks(run)[0])
        reader = ByteReader(refined, where)
        header = ChunkHeader.read(reader)
        changed = change(header, bytes(reader.take(reader.remaining)))
        codec = track.codec()
        assert len(codec.read([base, refined], where)) > 1
        with pytest.raises(DamagedError):
            codec.read([base, memoryview(changed)], where)


def test_any_changed_byte_of_a_refinement_is_damage_or_other_integers(layered: Path) -> None:
    rng = np.random.default_rng(1)
    with Archive(layered, book=BOOK) as archive:
        (track,) = archive.snapshot(tier="balanced").tracks
        run = track.runs[-1]
        where, (base, refined) = track.lossy_payloads(run.block, track.chunks(run)[0])
        codec = track.codec()
        size = len(ChunkHeader.read(ByteReader(refined, where)).write())
        for _ in range(150):
            data = bytearray(refined)
            data[rng.integers(size, len(data))] ^= 1 << rng.integers(8)
            try:
                codec.read([base, memoryview(bytes(data))], where)
            except DamagedError:
                pass


def test_integers_that_refine_beyond_32_bits_are_damage(layered: Path) -> None:
    from tscfile.entropy import segments

    book = load(BOOK).book
    step = 1000
    with Archive(layered, book=BOOK) as archive:
        (track,) = archive.snapshot(tier="balanced").tracks
        codec = track.codec()
        counts = book.stored(step)
        values = np.zeros((1, sum(counts)), np.int32)
        values[0, 0] = 1 << 30
        classes = ladder.class_of(book.log_sigmas, step)[book.columns(counts)]
        (chunk,) = track.chunks(track.runs[0])
        header = replace(_header_of(archive, chunk), n_frames=1)
        base = ByteWriter().raw(replace(header, codec=2, quality_layer=0).write())
        segments.encode(base, values, step, classes, book.frequencies)
        refined = ByteWriter().raw(header.write())
        refined.uvarint(1).pack("h", step - refinement.MAX_RATIO)
        zeros = np.zeros((1, sum(book.stored(step - refinement.MAX_RATIO))), np.int32)
        below = np.zeros(zeros.shape, np.int32)
        _, classes = refinement.expect(
            below, np.ones(zeros.shape[1], bool), book.log_sigmas[: zeros.shape[1]], step,
            step - refinement.MAX_RATIO,
        )  # fmt: skip
        segments.write_values(refined, zeros, classes.reshape(-1), book.frequencies)
        with pytest.raises(DamagedError):
            codec.read([memoryview(base.bytes()), memoryview(refined.bytes())], "test")


def _header_of(archive: Archive, chunk: object) -> ChunkHeader:
    payload = archive.container.read(chunk.ref, CHUNK)  # type: ignore[attr-defined]
    return ChunkHeader.read(ByteReader(payload, "test"))


def test_no_ratio_of_steps_lies_near_a_half() -> None:
    """What lets every platform round it alike in f64 (spec/codecs/book-refinement.md)."""
    for units in range(1, refinement.MAX_RATIO + 1):
        # 2^(units / 256 + 16) against n + 1/2, by whole numbers: the 256th powers of 2^17 times.
        nearest = refinement._ratio(units)
        power = 1 << (units + 17 * 256)
        assert (2 * nearest - 1) ** 256 < power < (2 * nearest + 1) ** 256


def test_wrong_book_is_refused(layered: Path, tmp_path: Path) -> None:
    with pytest.raises((UsageError, MismatchError)):
        tscfile.unpack(layered, tmp_path / "x.kv", tier="archive")
    assert not (tmp_path / "x.kv").exists()
    with pytest.raises(TscError, match="has no tier compact; it has archive, balanced, lossless"):
        tscfile.unpack(layered, tmp_path / "x.kv", tier="compact", book=BOOK)
