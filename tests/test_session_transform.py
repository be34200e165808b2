"""Lossy tiers without a book: stages, archives, hostile bytes, and the decoder of the page."""

from __future__ import annotations

import importlib.util
import re
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import REGENERATED, SAMPLES, SESSION, SESSION_BF16, TURNS, MemoryTrack

import tscfile
from tscfile import blocks, session_learning
from tscfile.archive import Archive
from tscfile.archived_track import is_exact
from tscfile.bytestream import ByteReader, ByteWriter
from tscfile.container.records import BASIS, ChunkHeader, checksum
from tscfile.dtypes import DTYPES
from tscfile.entropy import width_tables, widths
from tscfile.errors import DamagedError, TscError, UnsupportedError
from tscfile.identity import identity_from_gguf
from tscfile.model import CellTable, ModelIdentity, Snapshot, TensorSpec
from tscfile.session_basis import Basis, key_turn
from tscfile.session_codec import SessionCodec
from tscfile.sources import open_source
from tscfile.transforms import klt

SPEC = Path(__file__).parent.parent / "spec"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"
ROPE = {"rope_base": 10000.0, "rope_dim": 8, "rope_scaling": "none", "head_dim_k": 8}


def _load_decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decoder", SPEC / "reference_decoder.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decoder = _load_decoder()


def _snapshot(
    values: np.ndarray, dtype: str = "f16", facts: dict[str, Any] | None = None, first: int = 0
) -> Snapshot:
    """A track of two layers of ``[n, 64]``: 16 channels for each of two keys and two values."""
    n = len(values)
    parts = np.split(values.astype(np.float32), 4, axis=1)
    if dtype == "bf16":
        stored = [(part.view(np.uint32) >> 16).astype("<u2") for part in parts]
    else:
        stored = [part.astype({"f16": "<f2", "f32": "<f4"}[dtype]) for part in parts]
    rows = [np.ascontiguousarray(part).view(np.uint8) for part in stored]
    tensors = [
        TensorSpec(layer, role, DTYPES[dtype], rows[0].shape[1])
        for role in "kv" for layer in range(2)
    ]  # fmt: skip
    pos = np.arange(first, first + n, dtype=np.int32)
    zeros = np.zeros(n, np.int32)
    cells = CellTable(pos, zeros + 1, zeros, np.zeros((n, 0), np.int32))
    return Snapshot(
        np.arange(n, dtype=np.int32), [MemoryTrack(cells, tensors, rows, {})],
        {"format": "test"}, identity=ModelIdentity(facts or {}),
    )  # fmt: skip


def _values(n: int, rank: int = 6, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.random.default_rng(99).normal(size=(rank, 64))
    return rng.normal(size=(n, rank)) @ rows + noise * rng.normal(size=(n, 64)) + 1


def _floats(snapshot: Snapshot) -> np.ndarray:
    (track,) = snapshot.tracks
    parts = []
    for rows, tensor in zip(track.read(0, len(track.cells)), track.tensors, strict=True):
        rows = np.ascontiguousarray(rows)
        if tensor.dtype.name == "bf16":
            parts.append((rows.view("<u2").astype(np.uint32) << 16).view(np.float32))
        else:
            parts.append(rows.view({"f16": "<f2", "f32": "<f4"}[tensor.dtype.name]))
    return np.concatenate(parts, axis=1).astype(np.float64)


def _error(path: Path, source: Snapshot, number: int = -1) -> tuple[float, float]:
    """Mean squared error of keys and of values in units of their variances."""
    with Archive(path) as archive:
        found = _floats(archive.snapshot(number))
    true = _floats(source)
    square = np.square(found - true)
    spread = np.square(true - true.mean(axis=0))
    half = true.shape[1] // 2
    k, v = slice(0, half), slice(half, None)
    return (
        float(square[:, k].mean() / max(spread[:, k].mean(), 1e-30)),
        float(square[:, v].mean() / max(spread[:, v].mean(), 1e-30)),
    )


def _basis_and_chunk(archive: Archive) -> tuple[bytes, bytes]:
    """Payloads of the first basis and of the first block's chunk."""
    key, ref = next(iter(archive.container.by_checksum(BASIS).items()))
    basis = bytes(archive.container.read(ref, BASIS, key))
    return basis, bytes(archive.chunk_payload(0, archive.container.blocks[0].chunks[0])[1])


# --- stages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 256])
def test_integers_come_back(n: int) -> None:
    rng = np.random.default_rng(n)
    spread = 2.0 ** rng.uniform(-4, 22, 200)
    values = np.rint(rng.standard_t(3, (n, 200)) * spread).clip(-(1 << 30), 1 << 30)
    values = values.astype(np.int32)
    chosen, bits = widths.choose(values)
    for extra in (0, 4):
        writer = ByteWriter()
        widths.write_widths(writer, chosen)
        before = len(writer)
        widths.encode(writer, values, widths.finer(chosen, extra))
        assert extra or len(writer) - before < 1.05 * bits.sum() / 8 + 200
        reader = ByteReader(writer.bytes(), "test")
        again = widths.finer(widths.read_widths(reader, 200), extra)
        assert (widths.decode(reader, n, again) == values).all()
        reader.end()


def test_tables_cover_every_symbol() -> None:
    assert (width_tables.FREQUENCIES >= 1).all()
    assert (width_tables.FREQUENCIES.sum(axis=1) == 4096).all()
    assert (decoder.width_frequencies() == width_tables.FREQUENCIES).all()


def test_components_and_rows_rebuild_frames() -> None:
    frames = _values(50, noise=0).astype(np.float32) * 20
    frames -= frames.mean(axis=0)
    singular, rows = klt.components(frames)
    assert (singular[:-1] >= singular[1:]).all()
    exponents = klt.exponents_of(singular[:6])
    entries = klt.round_rows(rows[:6], exponents)
    near = entries * 2.0 ** (-exponents[:, None] / 4.0)
    coefficients = frames @ klt.analysis(near.astype(np.float32))
    # A unit of a row weighs as much as one of a coefficient.
    assert np.square(coefficients @ near - frames).mean() < 0.1


def test_keys_are_turned_back_only_where_all_is_known() -> None:
    facts = ROPE | {"rope_pairing": "norm"}
    turn = key_turn(ModelIdentity(facts), [])
    assert turn is not None and turn.inv_freq[0] == 1
    linear = facts | {"rope_scaling": "linear", "rope_scaling_factor": 4.0}
    scaled = key_turn(ModelIdentity(linear), [])
    assert scaled is not None and np.allclose(scaled.inv_freq * 4, turn.inv_freq)
    for key in facts:
        assert key_turn(ModelIdentity({k: v for k, v in facts.items() if k != key}), []) is None
    assert key_turn(ModelIdentity(facts | {"rope_scaling": "yarn"}), []) is None
    assert key_turn(ModelIdentity(facts | {"head_dim_k": [8, 16]}), []) is None


def test_a_basis_survives_its_bytes() -> None:
    snapshot = _snapshot(_values(300), facts=ROPE | {"rope_pairing": "neox"})
    (track,) = snapshot.tracks
    turn = key_turn(snapshot.identity, track.tensors)
    sample = session_learning.Sample(track, np.arange(300), turn)
    scales = session_learning.measure_scales(sample, track.tensors)
    shifts = np.zeros(300, np.int64)
    basis, _ = session_learning.learn(sample, track.tensors, turn, scales, 0.05, shifts, 300)
    again = Basis.read(memoryview(basis.write()), "test")
    assert again.fits(track.tensors) and again.rank == basis.rank > 0
    for a, b in zip(basis.groups, again.groups, strict=True):
        assert (a.entries == b.entries).all() and (a.exponents == b.exponents).all()
        assert (a.steps == b.steps).all()
    other = _snapshot(_values(300, seed=1) ** 2)
    frames = again.frames(other.tracks[0].read(0, 300), track.tensors, track.cells.pos)
    more, _ = session_learning.extend(again, frames, shifts, 300)
    assert more.parent == again.id and more.rank > again.rank
    written = memoryview(more.write(again))
    found = Basis.read(written, "test", again)
    assert (found.groups[0].entries == more.groups[0].entries).all() and found.depth == 2


# --- archives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["near", "balanced", "compact"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_a_tier_keeps_its_tolerance(tier: str, dtype: str, tmp_path: Path) -> None:
    from tscfile.tiers import TIERS

    source = _snapshot(_values(400, noise=0.3), dtype, ROPE | {"rope_pairing": "neox"})
    path = tmp_path / "x.tsc"
    report = tscfile.pack(source, path, tier=tier)
    k, v = _error(path, source)
    share = k / session_learning.KEY_SHARE**2 + v / session_learning.VALUE_SHARE**2
    assert share / 2 <= 1.15 * TIERS[tier].tolerance + (1e-4 if dtype == "bf16" else 0)
    assert report.raw_bytes > 2 * report.file_bytes
    assert not tscfile.verify(path).problems


@pytest.mark.parametrize("pairing", ["norm", "neox"])
def test_both_pairings(pairing: str, tmp_path: Path) -> None:
    """Keys that are simple before RoPE take fewer bytes where RoPE is known."""
    facts = ROPE | {"rope_pairing": pairing}
    plain = _snapshot(_values(500, rank=2), "f32")
    turn = key_turn(ModelIdentity(facts), plain.tracks[0].tensors)
    assert turn is not None
    rows = plain.tracks[0].read(0, 500)
    pos = plain.tracks[0].cells.pos
    from tscfile.transforms import channels

    frames = np.concatenate([row.view("<f4") for row in rows], axis=1)
    rows = channels.from_frames(frames, plain.tracks[0].tensors, pos, turn.rope, 8, pairing)
    turned = _snapshot(np.concatenate([row.view("<f4") for row in rows], axis=1), "f32", facts)
    sizes = []
    for identity in (facts, {}):
        turned.identity = ModelIdentity(identity)
        path = tmp_path / "x.tsc"
        sizes.append(tscfile.pack(turned, path, tier="balanced", force=True).file_bytes)
        assert max(_error(path, turned)) < 0.3
        with Archive(path) as archive:
            coding = archive.record().coding
        assert (coding["keys"] == "as they stand") == (not identity)
    assert sizes[0] < 0.7 * sizes[1]


def test_a_session_without_book_or_model(tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    report = tscfile.pack(SESSION, path, tier="balanced")
    assert report.raw_bytes > 8 * report.file_bytes
    known = tscfile.pack(SESSION, path, tier="balanced", force=True,
                         identity=identity_from_gguf(MODEL))  # fmt: skip
    assert known.raw_bytes > 15 * known.file_bytes
    info = _describe(path)
    assert info.codecs == ["session-transform"]
    assert info.snapshots[0].coding["keys"] == "turned back to position 0"
    assert "expected_kl" not in info.snapshots[0].coding
    assert info.snapshots[0].restore_bytes > 0.95 * known.file_bytes
    tscfile.unpack(path, tmp_path / "back.kv")
    assert tscfile.pack(tmp_path / "back.kv", tmp_path / "y.tsc").n_frames_new == 400


def _describe(path: Path) -> Any:
    from tscfile.description import describe

    with Archive(path) as archive:
        return describe(archive)


def test_frames_read_alone_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    tscfile.pack(SESSION, path, tier="balanced", identity=identity_from_gguf(MODEL))
    with Archive(path) as archive:
        track = archive.snapshot().tracks[0]
        whole, part = track.read(0, 400), track.read(250, 270)
        (last,) = track.read(399, 400, [3])
    for a, b in zip(whole, part, strict=True):
        assert np.abs(a[250:270].view("<f2").astype(float) - b.view("<f2")).max() < 0.01
    assert np.abs(whole[3][399:].view("<f2").astype(float) - last.view("<f2")).max() < 0.01


@pytest.mark.parametrize("n", [1, 2, 17])
def test_few_frames(n: int, tmp_path: Path) -> None:
    source = _snapshot(_values(n))
    path = tmp_path / "x.tsc"
    tscfile.pack(source, path, tier="balanced")
    with Archive(path) as archive:
        found = _floats(archive.snapshot())
    # The values' tolerance is 0.42 of their standard deviation, in the mean.
    assert np.sqrt(np.square(found - _floats(source)).mean()) < 1.2


@pytest.mark.parametrize("constant", [0.0, 3.0, -1000.0])
def test_no_variance(constant: float, tmp_path: Path) -> None:
    source = _snapshot(np.full((40, 64), constant))
    path = tmp_path / "x.tsc"
    tscfile.pack(source, path, tier="balanced")
    with Archive(path) as archive:
        assert np.abs(_floats(archive.snapshot()) - constant).max() <= 0.01 * abs(constant)


def test_constant_and_outlier_channels(tmp_path: Path) -> None:
    values = _values(300)
    values[:, 5] = 7
    values[:, 40] = 0
    values[100, 20] = 500
    source = _snapshot(values, "f32")
    path = tmp_path / "x.tsc"
    tscfile.pack(source, path, tier="near")
    assert max(_error(path, source)) < 0.05


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    for bad in (np.nan, np.inf):
        values = _values(20)
        values[3, 3] = bad
        with pytest.raises(UnsupportedError, match="not finite"):
            tscfile.pack(_snapshot(values), path, tier="near")
    source = open_source(SAMPLES.parent / "tests/golden/llama/0.1.10_llama_q8_0_session.kv")
    with pytest.raises(UnsupportedError, match="q8_0"):
        tscfile.pack(source, path, tier="near")
    assert not path.exists()


def test_groups_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_learning, "MAX_GROUP_CHANNELS", 40)
    monkeypatch.setattr(session_learning, "SAMPLE_FRAMES", 512)
    source = _snapshot(_values(900), facts=ROPE | {"rope_pairing": "norm"})
    path = tmp_path / "x.tsc"
    tscfile.pack(source, path, tier="balanced")
    assert max(_error(path, source)) < 0.25
    with Archive(path) as archive:
        basis, _ = _basis_and_chunk(archive)
    assert len(Basis.read(memoryview(basis), "test").groups) == 2


# --- appending --------------------------------------------------------------------------------


def test_appended_turns_keep_frames_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "grown.tsc"
    tscfile.pack(TURNS[0], path, tier="balanced", identity=identity_from_gguf(MODEL))
    with Archive(path) as archive:
        before = archive.snapshot().tracks[0].read(0, 90)
    for turn in TURNS[1:]:
        report = tscfile.append(turn, path)
        assert report.plan == "append" and report.n_frames_new == 80
        assert report.tier == "balanced"
    with Archive(path) as archive:
        after = archive.snapshot().tracks[0].read(0, 90)
        assert all((a == b).all() for a, b in zip(before, after, strict=True))
        first = archive.record(0).coding["bases"]
        assert archive.record(4).coding["bases"][0] == first[0]
        assert archive.restore_bytes(4) < archive.size
    assert max(_error(path, open_source(TURNS[-1]))) < 0.2
    again = tscfile.append(TURNS[-1], path)
    assert again.n_frames_new == 0 and again.bytes_added < 2000
    report = tscfile.append(REGENERATED, path)
    assert report.plan == "truncate+append" and report.n_frames_kept == 228
    assert not tscfile.verify(path).problems
    with Archive(path) as archive:
        assert len(archive.container.by_checksum(BASIS)) >= 2


def test_a_recomputed_prefix_is_kept_and_another_is_not(tmp_path: Path) -> None:
    values = _values(200)
    path = tmp_path / "x.tsc"
    tscfile.pack(_snapshot(values[:100]), path, tier="balanced")
    noise = np.random.default_rng(5).normal(size=values.shape) * 1e-3
    report = tscfile.append(_snapshot(values + noise), path)
    assert report.n_frames_kept == 100
    other = _values(200, seed=7)
    other[:40] = values[:40]
    report = tscfile.append(_snapshot(other), path)
    assert 40 <= report.n_frames_kept < 50
    for number, source in enumerate((_snapshot(values[:100]), _snapshot(values), _snapshot(other))):
        assert max(_error(path, source, number)) < 0.25


def test_error_does_not_grow_over_many_saves(tmp_path: Path) -> None:
    values = _values(300, noise=0.2)
    path = tmp_path / "x.tsc"
    tscfile.pack(_snapshot(values[:20]), path, tier="balanced")
    for n in range(40, 301, 20):
        assert tscfile.append(_snapshot(values[:n]), path).n_frames_new == 20
    assert max(_error(path, _snapshot(values))) < 0.25


def test_new_turns_that_are_nothing_like_the_old(tmp_path: Path) -> None:
    values = np.concatenate([_values(150), 3 * np.random.default_rng(4).normal(size=(150, 64))])
    path = tmp_path / "x.tsc"
    tscfile.pack(_snapshot(values[:150]), path, tier="near")
    tscfile.append(_snapshot(values), path)
    assert max(_error(path, _snapshot(values))) < 0.05


def test_tiers_and_books_mix_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    tscfile.pack(TURNS[0], path, tier="balanced", identity=identity_from_gguf(MODEL))
    report = tscfile.append(TURNS[1], path, tier="lossless")
    assert report.n_frames_kept == 0
    report = tscfile.append(TURNS[2], path, tier="balanced")
    assert report.n_frames_kept == 170
    report = tscfile.append(TURNS[2], path, tier="near", book=BOOK)
    with Archive(path, book=BOOK) as archive:
        kinds = [is_exact(block) for block in archive.container.blocks]
        assert True in kinds and False in kinds
        for number in range(len(archive)):
            archive.snapshot(number).tracks[0].read(0, 90)
    assert not tscfile.verify(path, book=BOOK).problems


# --- hostile bytes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "small.tsc"
    tscfile.pack(_snapshot(_values(60), facts=ROPE | {"rope_pairing": "norm"}), path,
                 tier="balanced")  # fmt: skip
    return path


def test_bytes_that_flip_are_found(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    rng = np.random.default_rng(3)
    broken_path = tmp_path / "broken.tsc"
    for at in rng.choice(len(data), 100, replace=False).tolist():
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        broken_path.write_bytes(broken)
        try:
            assert tscfile.verify(broken_path).problems
        except TscError as error:
            assert error.exit_code in (3, 5)


def test_damaged_payloads_raise_project_errors(small: Path) -> None:
    """Checksums out of the way: what the decoders themselves make of nonsense."""
    with Archive(small) as archive:
        basis_bytes, chunk = _basis_and_chunk(archive)
        track = archive.snapshot().tracks[0]
        pos, tensors = track.cells.pos, track.tensors
        codec = archive.session_codec(checksum(basis_bytes), "test")
    rng = np.random.default_rng(4)
    tracemalloc.start()
    for data, is_basis in ((basis_bytes, True), (chunk, False)):
        for at in range(len(data)):
            broken = bytearray(data)
            broken[at] ^= 1 << int(rng.integers(8))
            for attempt in (bytes(broken), data[:at]):
                try:
                    if is_basis:
                        damaged = SessionCodec(Basis.read(memoryview(attempt), "test"))
                        damaged.check(tensors, "test")
                        damaged.decode(memoryview(chunk), tensors, 0, pos, "test")
                    else:
                        header = ChunkHeader.read(ByteReader(attempt, "test"))
                        if header.n_frames == len(pos):
                            codec.decode(memoryview(attempt), tensors, 0, pos, "test")
                except TscError:
                    pass
    assert tracemalloc.get_traced_memory()[1] < 300 << 20
    tracemalloc.stop()


def test_claims_beyond_the_bytes_are_refused() -> None:
    huge = ByteWriter().pack("Q", 0).u8(0).uvarint(1).uvarint(1).uvarint(0).uvarint(1 << 29)
    huge.pack("f", 1.0).uvarint(0).raw(b"\0")
    with pytest.raises(DamagedError, match="more entries"):
        Basis.read(memoryview(huge.bytes()), "test")
    for bad in (0.0, -1.0, np.nan, np.inf):
        writer = ByteWriter().pack("Q", 0).u8(0).uvarint(1).uvarint(1).uvarint(0).uvarint(4)
        with pytest.raises(DamagedError, match="step"):
            Basis.read(memoryview(writer.pack("f", bad).uvarint(0).bytes()), "test")
    too_long = [TensorSpec(0, "k", DTYPES["f32"], blocks.MOST_LOSSY_BYTES + 4)]
    with pytest.raises(UnsupportedError):
        blocks.block_frames(too_long, lossy=True)


# --- the page ---------------------------------------------------------------------------------


def _decoded(path: Path) -> list[tuple[list[np.ndarray], list[np.ndarray], list[str]]]:
    """Of every block: rows by the page's decoder, by tscfile, and the element types."""
    found, file = [], decoder.File(path.read_bytes())
    (read,) = file.snapshots[-1]["tracks"]
    with Archive(path) as archive:
        track = archive.snapshot().tracks[0]
        types = [tensor.dtype.name for tensor in track.tensors]
        at = 0
        for run in track.runs:
            (chunk,) = archive.block(run).chunks
            where, payload = archive.chunk_payload(run.block, chunk)
            held = file.decoded[run.block, 0]
            ours, our_shifts, _ = track.session_codec(payload, where).integers(payload, where)
            assert (ours == held["integers"]).all() and (our_shifts == held["shifts"]).all()
            mine = [rows[at : at + run.count] for rows in read["rows"]]
            found.append((mine, track.read(at, at + run.count), types))
            at += run.count
    return found


@pytest.mark.parametrize("source", [SESSION, SESSION_BF16], ids=lambda path: path.name)
def test_decoder_reads_packed_sessions(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    tscfile.pack(source, path, tier="balanced", identity=identity_from_gguf(MODEL))
    _assert_near(path)


def test_decoder_reads_a_series(tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    tscfile.pack(TURNS[0], path, tier="compact")
    for turn in TURNS[1:3]:
        tscfile.append(turn, path)
    _assert_near(path)


def _assert_near(path: Path) -> None:
    """Within the tolerance of book-transform.md: 2^-15 of the frame's largest and one place."""
    for mine, theirs, types in _decoded(path):
        a, b = (
            np.concatenate([_numbers(*pair) for pair in zip(rows, types, strict=True)], axis=1)
            for rows in (mine, theirs)
        )
        largest = np.abs(a).max(axis=1, keepdims=True)
        bits = 8 if types[0] == "bf16" else 11
        place = 2.0 ** (np.frexp(np.maximum(np.abs(a), np.abs(b)))[1] - bits)
        assert (np.abs(a - b) <= largest * 2.0**-15 + place).all()


def _numbers(rows: np.ndarray, type_: str) -> np.ndarray:
    rows = np.ascontiguousarray(rows)
    if type_ == "bf16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(float)
    return rows.view("<f2").astype(float)


def test_example_of_the_page() -> None:
    text = (SPEC / "codecs" / "session-transform.md").read_text(encoding="utf-8")
    example = text[text.index("## Example") :].replace("−", "-")
    first, second = example.split("The body of the chunk:")
    payload, body = (
        bytes.fromhex("".join("".join(re.findall("`([0-9a-f ]+)`", line.split("|")[1]))
                              for line in part.splitlines() if line.startswith("| `")))
        for part in (first, second.split("Integers,")[0])
    )  # fmt: skip
    assert f"`{checksum(payload):016x}`" in first
    assert int.from_bytes(body[:8], "little") == checksum(payload)
    learnt = decoder.read_basis(payload)
    cursor = decoder.Cursor(body[8:])
    values, shifts = decoder.session_integers(cursor, 6, learnt)
    cursor.end()
    shown = re.findall(r"^\| \d \| (-?\d+) \| ([-\d ]+) \|$", second, re.M)
    assert [[int(q), *map(int, more.split())] for q, more in shown] == values[:, :4].tolist()
    assert not values[:, 4:].any()
    basis = Basis.read(memoryview(payload), "test")
    assert np.array_equal(basis.groups[0].entries[1], [-1, 0, 0, 2, 1, -1, 0, 1])
    tensors = [(0, 0, 1, 8, 0), (0, 1, 1, 8, 0)]
    rows = decoder.session_rows(values, shifts, learnt, tensors, np.arange(6))
    for row in (rows[0][3], rows[1][3]):
        hexed = row.tobytes().hex()
        assert " ".join(f"`{hexed[i : i + 4]}`" for i in range(0, 16, 4)) in example


# --- the model --------------------------------------------------------------------------------


@pytest.mark.slow
def test_tiers_keep_their_promise_on_held_out_text() -> None:
    from tscfile.quality.engine import Engine
    from tscfile.quality.protocol import Plan, evaluate
    from tscfile.quality.registry import make_codecs
    from tscfile.quality.windows import read_text

    text = read_text(SAMPLES / "texts" / "heldout.txt")
    codecs = make_codecs(["near", "balanced", "compact"])
    assert {codec.family for codec in codecs} == {"tscfile, no book"}
    report = evaluate(Engine(MODEL), text, codecs, Plan(frames=(768,), n_windows=8))
    found = {result.codec: result for result in report.results}
    for name, kl, ratio in (("near", 0.001, 9), ("balanced", 0.01, 25), ("compact", 0.05, 60)):
        assert found[name].continuation.kl_mean <= kl, name
        assert found[name].snapshot_ratio >= ratio, name
