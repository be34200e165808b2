"""Tier ``tokens``: what an archive without frames holds, refuses, shares and is damaged by."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REGENERATED, ROOT, SAMPLES, TURNS, make_snapshot, same_state
from tscfile_cli.main import main

import tscfile
from tscfile.archive import Archive
from tscfile.archived_track import is_absent
from tscfile.container.records import BlockEntry
from tscfile.errors import DamagedError, MismatchError, TscError, UnsupportedError, UsageError
from tscfile.identity import identity_from_gguf
from tscfile.model import CellTable, ModelIdentity, Snapshot
from tscfile.sources import open_source

MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"
MADE = {"identity": {"weights_blake3": "0" * 64}}
"""Of saves that no model made."""


@pytest.fixture(scope="module")
def identity() -> ModelIdentity:
    return identity_from_gguf(MODEL)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, identity: ModelIdentity) -> Path:
    """All saves of ``samples/series``; not to be changed."""
    path = tmp_path_factory.mktemp("tokens") / "series.tsc"
    tscfile.pack(TURNS[0], path, tier="tokens", identity=identity)
    for save in (*TURNS[1:], REGENERATED):
        tscfile.append(save, path)
    return path


def decoder_file(path: Path, book: Path | None = None) -> Any:
    spec = importlib.util.spec_from_file_location("decoder", ROOT / "spec/reference_decoder.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.File(path.read_bytes(), book and book.read_bytes())


# --- what is kept -------------------------------------------------------------------------------


def test_a_session_without_frames(tmp_path: Path, identity: ModelIdentity) -> None:
    plain, with_book = tmp_path / "plain.tsc", tmp_path / "book.tsc"
    source = open_source(SAMPLES / "session.kv")
    report = tscfile.pack(SAMPLES / "session.kv", plain, tier="tokens", identity=identity)
    smaller = tscfile.pack(
        SAMPLES / "session.kv", with_book, tier="tokens", identity=identity, book=BOOK
    )
    assert smaller.file_bytes < report.file_bytes < 1000
    for path, book in ((plain, None), (with_book, BOOK)):
        with tscfile.open(path, book=book) as archive:
            kept = archive.snapshot()
            assert kept.tokens.tolist() == source.tokens.tolist()
            assert (kept.source, kept.opaque) == (source.source, source.opaque)
            assert kept.identity == identity and kept.n_absent == 400
            (track,) = kept.tracks
            assert np.array_equal(track.cells.pos, source.tracks[0].cells.pos)
            assert list(track.tensors) == list(source.tracks[0].tensors)
            assert not archive.container.blocks[0].chunks
            for read in (archive.read, kept.need_frames):
                with pytest.raises(UsageError, match="recompute them with --recompute"):
                    read()
            with pytest.raises(UsageError, match="recompute them with --recompute"):
                track.read(0, 1)
            assert track.read(7, 7)[0].shape == (0, 256)
        assert not tscfile.verify(path, book=book).problems
        (found,) = decoder_file(path, book).snapshots
        assert found["tokens"].tolist() == source.tokens.tolist()
        assert found["tracks"][0]["absent"] == list(range(400))


def test_a_book_that_is_not_there_is_no_damage(tmp_path: Path, identity: ModelIdentity) -> None:
    path = tmp_path / "book.tsc"
    tscfile.pack(SAMPLES / "session.kv", path, tier="tokens", identity=identity, book=BOOK)
    with pytest.raises(UsageError, match="needs book"):
        tscfile.verify(path)


def test_a_series_shares_what_has_the_same_tokens(series: Path) -> None:
    with tscfile.open(series) as archive:
        assert [info.plan for info in map(archive.record, range(6))] == [
            "keyframe", *["append"] * 4, "truncate+append"
        ]  # fmt: skip
        found = archive.snapshot()
        assert found.tokens.tolist() == open_source(REGENERATED).tokens.tolist()
        n_new = [block.n_frames for block in archive.container.blocks]
        assert len(n_new) == 6 and all(map(is_absent, archive.container.blocks))
        # The last one answers anew behind the tokens that it shares with turn 4.
        n_common = archive.record().ids.kept
        (track,) = archive.record().tracks
        assert sum(run.count for run in track.runs if run.block < 5) == n_common
    report = tscfile.verify(series)
    assert (report.problems, report.n_absent) == ([], sum(n_new))
    assert [each["tokens"].tolist() for each in decoder_file(series).snapshots] == [
        open_source(path).tokens.tolist() for path in (*TURNS, REGENERATED)
    ]


def test_tiers_mix_in_one_file(tmp_path: Path, identity: ModelIdentity) -> None:
    """Frames stored exactly are taken; lossy ones and absent ones never give an exact save."""
    path = tmp_path / "mixed.tsc"
    tscfile.pack(TURNS[0], path, tier="lossless", identity=identity)
    first = tscfile.append(TURNS[1], path, tier="tokens")
    assert first.n_frames_kept and first.n_frames_new
    exact = tscfile.append(TURNS[2], path, tier="lossless")
    assert exact.n_frames_kept == first.n_frames_kept
    lossy = tscfile.append(TURNS[3], path, tier="archive", book=BOOK)
    assert lossy.n_frames_kept == exact.n_frames_kept + exact.n_frames_new
    tokens = tscfile.append(TURNS[4], path, tier="tokens", book=BOOK)
    assert tokens.n_frames_kept == lossy.n_frames_kept
    assert not tscfile.verify(path, book=BOOK).problems
    with tscfile.open(path, book=BOOK) as archive:
        assert same_state(archive.snapshot(2), identified(open_source(TURNS[2]), identity))
        half = archive.snapshot(1)
        assert half.n_absent == first.n_frames_new
        rows = half.tracks[0].read(0, first.n_frames_kept)
        wanted = open_source(TURNS[1]).tracks[0].read(0, first.n_frames_kept)
        assert all(np.array_equal(a, b) for a, b in zip(rows, wanted, strict=True))
        with pytest.raises(UsageError, match="not stored"):
            half.tracks[0].read(0, first.n_frames_kept + 1)
    found = decoder_file(path, BOOK).snapshots[1]
    assert len(found["tracks"][0]["absent"]) == first.n_frames_new


def identified(snapshot: Snapshot, identity: ModelIdentity) -> Snapshot:
    snapshot.identity = identity
    return snapshot


def test_long_sessions_take_few_blocks(tmp_path: Path) -> None:
    n = 70_000
    cells = CellTable(
        np.arange(n, dtype=np.int32), np.ones(n, np.int32), np.zeros(n, np.int32),
        np.zeros((n, 0), np.int32),
    )  # fmt: skip
    made = make_snapshot(4, **MADE)
    made.tracks[0].cells = cells
    made.tokens = (np.arange(n) % 30_000).astype(np.int32)
    tscfile.pack(made, tmp_path / "long.tsc", tier="tokens")
    with tscfile.open(tmp_path / "long.tsc") as archive:
        assert [block.n_frames for block in archive.container.blocks] == [65536, n - 65536]
        assert archive.snapshot().n_absent == n
    assert not tscfile.verify(tmp_path / "long.tsc").problems


# --- what is refused ----------------------------------------------------------------------------


def _shifted(snapshot: Snapshot) -> None:
    snapshot.tracks[0].cells.pos[3:] += 1
    snapshot.tokens = np.append(snapshot.tokens, np.int32(5))


def _media(snapshot: Snapshot) -> None:
    snapshot.tokens = snapshot.tokens.copy()
    snapshot.tokens[2] = -1


def _two_sequences(snapshot: Snapshot) -> None:
    snapshot.tracks[0].cells.seq_ids = np.array([0, 0, 0, 0, 1, 1], np.int32)


def _no_tokens(snapshot: Snapshot) -> None:
    snapshot.tokens = snapshot.tokens[:0]


def _few_tokens(snapshot: Snapshot) -> None:
    snapshot.tokens = snapshot.tokens[:4]


def _unknown_model(snapshot: Snapshot) -> None:
    snapshot.identity = ModelIdentity({"architecture": "llama"})


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (_shifted, UnsupportedError, "lacks positions before 6"),
        (_media, UnsupportedError, "images or sound"),
        (_two_sequences, UnsupportedError, "several sequences"),
        (_no_tokens, UsageError, "no token list"),
        (_few_tokens, UnsupportedError, "without a token of their own"),
        (_unknown_model, UsageError, "--model"),
    ],
)
def test_saves_that_no_prefill_gives_again(
    spoil: Any, kind: type[TscError], said: str, tmp_path: Path
) -> None:
    snapshot = make_snapshot(6, **MADE)
    snapshot.tracks[0].cells = replace(
        snapshot.tracks[0].cells, pos=np.arange(6, dtype=np.int32), seq_ids=np.zeros(6, np.int32)
    )
    tscfile.pack(snapshot, tmp_path / "good.tsc", tier="tokens")
    spoil(snapshot)
    with pytest.raises(kind, match=said) as caught:
        tscfile.pack(snapshot, tmp_path / "bad.tsc", tier="tokens")
    assert "\n" not in str(caught.value) and not (tmp_path / "bad.tsc").exists()


def test_a_model_of_another_shape(tmp_path: Path, identity: ModelIdentity) -> None:
    for facts, said in (({"n_layers": 1}, "2 layers"), ({"head_dim_k": 64}, "a row of k"),
                        ({"vocab_size": 20}, "outside the model's")):
        snapshot = make_snapshot(6, identity={"n_kv_heads": 1, **MADE["identity"], **facts})
        with pytest.raises(MismatchError, match=said):
            tscfile.pack(snapshot, tmp_path / "bad.tsc", tier="tokens")
    with pytest.raises(MismatchError, match="the state has|the model's"):
        small = make_snapshot(6, n_layers=8)
        tscfile.pack(small, tmp_path / "bad.tsc", tier="tokens", identity=identity)
    assert not (tmp_path / "bad.tsc").exists()


def test_refusals_on_the_command_line(
    tmp_path: Path, series: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tsc"
    session = str(SAMPLES / "session.kv")
    assert main(["pack", session, "-o", str(path), "--tier", "tokens"]) == 2
    assert capfd.readouterr().err.count("\n") == 1 and not path.exists()
    for command in (["unpack", str(series), "-o", str(tmp_path / "a.kv")],
                    ["unpack", str(series), "--as", "gguf", "-o", str(tmp_path / "a.gguf")]):
        assert main(command) == 2
        err = capfd.readouterr().err
        assert "--recompute" in err and err.count("\n") == 1
    assert main(["info", str(series)]) == 0
    out = capfd.readouterr().out
    assert "frames of snapshot 5 are not stored" in out and "tokens" in out
    assert main(["verify", str(series)]) == 0
    assert "recomputed" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.tsc"
    options: dict[str, Any] = {"n_layers": 1, "n_channels": 8, **MADE}
    tscfile.pack(make_snapshot(6, **options), path, tier="tokens")
    tscfile.append(make_snapshot(9, **options), path)
    return path


def read_all(path: Path) -> bool:
    """Whether `verify` finds something; whatever is read is right or a `DamagedError`."""
    try:
        with tscfile.open(path) as archive:
            for number in range(len(archive)):
                try:
                    snapshot = archive.snapshot(number)
                except DamagedError:
                    continue
                made = make_snapshot((6, 9)[number])
                assert snapshot.tokens.tolist() == made.tokens.tolist()
                with pytest.raises((UsageError, DamagedError)):
                    snapshot.tracks[0].read(0, 6)
        return bool(tscfile.verify(path).problems)
    except DamagedError:
        return True


def test_cut_at_every_length(small: Path, tmp_path: Path) -> None:
    whole, path, n_whole = small.read_bytes(), tmp_path / "cut.tsc", 0
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        n_whole += not read_all(path)
    assert n_whole == 1  # the end of the first commit


def test_every_flipped_byte_is_noticed(small: Path, tmp_path: Path) -> None:
    whole, path = small.read_bytes(), tmp_path / "flipped.tsc"
    rng = np.random.default_rng(0)
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        assert read_all(path), at


def forge(path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """An archive whose writer does something wrong to its one absent block."""
    write = BlockEntry.write

    def wrong(self: BlockEntry, writer: Any) -> None:
        write(replace(self, **changes), writer)

    with monkeypatch.context() as patched:
        patched.setattr(BlockEntry, "write", wrong)
        tscfile.pack(make_snapshot(6, **MADE), path, tier="tokens")
    return path


def test_a_block_without_chunks_that_names_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = forge(tmp_path / "a.tsc", monkeypatch, content_id=b"x" * 16)
    with pytest.raises(DamagedError, match="does not hold the tensors"), Archive(path) as archive:
        archive.record()
    assert tscfile.verify(path).problems


def test_absent_frames_without_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that was never to be taken: `verify` finds it out."""
    from tscfile import coding

    monkeypatch.setattr(coding, "check_recomputable", lambda snapshot: None)
    for n, spoil in enumerate((_few_tokens, _media)):
        snapshot = make_snapshot(6, **MADE)
        spoil(snapshot)
        tscfile.pack(snapshot, tmp_path / f"{n}.tsc", tier="tokens")
        (problem,) = tscfile.verify(tmp_path / f"{n}.tsc").problems
        assert "lacks tokens of frames that are not stored; damaged" in problem
        with pytest.raises(Exception, match="tokens of absent frames"):
            decoder_file(tmp_path / f"{n}.tsc")


def test_huge_claims_of_absent_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """65536 frames cost 35 bytes here; nothing is allocated for them."""
    snapshot = make_snapshot(6, **MADE)
    track = snapshot.tracks[0]
    track.tensors = [replace(each, row_bytes=1 << 30) for each in track.tensors]
    path = tmp_path / "huge.tsc"
    tscfile.pack(snapshot, path, tier="tokens")
    with tscfile.open(path) as archive:
        with pytest.raises(UsageError, match="not stored"):
            archive.read()
        with pytest.raises(UsageError, match="not stored"):
            tscfile.unpack(path, tmp_path / "out.kv")
    assert not (tmp_path / "out.kv").exists() and not tscfile.verify(path).problems


# --- the vector ---------------------------------------------------------------------------------


def test_vector() -> None:
    """The file that the specification keeps: read by its decoder and by tscfile."""
    path = ROOT / "spec" / "vectors" / "valid" / "tokens.tsc"
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert path.stat().st_size == expected["file_bytes"] and not tscfile.verify(path).problems
    file = decoder_file(path)
    n_rows = []
    with tscfile.open(path) as archive:
        for number, wanted in enumerate(expected["snapshots"]):
            found, snapshot = file.snapshots[number], archive.snapshot(number)
            assert (found["tier"], found["plan"]) == (wanted["tier"], wanted["plan"])
            assert snapshot.tokens.tolist() == found["tokens"].tolist() == wanted["tokens"]
            (track,), (mine,), (kept,) = snapshot.tracks, found["tracks"], wanted["tracks"]
            rows = [tensor["rows"] for tensor in kept["tensors"]]
            absent = [cell for cell, row in enumerate(rows[0]) if row is None]
            assert snapshot.n_absent == len(absent) and mine["absent"] == absent
            n_rows.append(len(rows[0]) - len(absent))
            for cell in range(len(rows[0])):
                if cell not in absent:
                    parts = [part.tobytes().hex() for part in track.read(cell, cell + 1)]
                    assert parts == [each[cell] for each in rows]
    assert [each["tier"] for each in expected["snapshots"]] == [
        "tokens", "tokens", "lossless", "tokens"
    ]  # fmt: skip
    assert n_rows == [0, 0, 16, 12]
