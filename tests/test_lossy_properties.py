"""Every lossy way keeps what it promises: steps of a book, the tolerance without one, exact frames
where product quantization falls back, and the largest error that a snapshot records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import strategies as own
from checks import BOOK, ROUNDING, check_bounds, check_steps, sample_identity, track_of
from conftest import SESSION, MemoryTrack
from hypothesis import given
from hypothesis import strategies as st

import tscfile
from tscfile import blocks
from tscfile.archive import Archive
from tscfile.archived_track import ArchivedTrack
from tscfile.book_codec import MAX_DELTA
from tscfile.container.records import FrameRun
from tscfile.context import FrameContext
from tscfile.dtypes import DTYPES
from tscfile.model import CellTable, ModelIdentity, Snapshot, Track
from tscfile.product_coding import ProductOptions
from tscfile.product_session import SessionCodes
from tscfile.retype import dequantize, quantize
from tscfile.session_codec import _ALLOWED as ALLOWED
from tscfile.session_learning import Scales
from tscfile.sources import open_source
from tscfile.tiers import TIERS

BOOK_TIERS = ("near", "balanced", "compact", "archive")
MOST_STEPS = 1.5
"""What rounding for rate moves a coefficient by at most; see `tscfile.book_codec.MAX_DELTA`."""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of files that each example overwrites."""
    return tmp_path_factory.mktemp("lossy")


@cache
def session() -> tuple[Snapshot, list[np.ndarray]]:
    """The sample session and its values, float32 ``[400, 128]`` a tensor."""
    snapshot = open_source(SESSION)
    rows = snapshot.tracks[0].read(0, 400)
    return snapshot, [dequantize(part, DTYPES["f16"]) for part in rows]


def save_of(
    values: Sequence[np.ndarray], pos: np.ndarray, tokens: np.ndarray, dtype: str
) -> Snapshot:
    """A save of the sample model with these values at these positions."""
    sample, kind = session()[0], DTYPES[dtype]
    specs = [replace(tensor, dtype=kind, row_bytes=kind.row_bytes(128))
             for tensor in sample.tracks[0].tensors]  # fmt: skip
    ones = np.ones(len(pos), np.int32)
    cells = CellTable(pos.astype(np.int32), ones, 0 * ones, np.zeros((len(pos), 0), np.int32))
    rows = [quantize(np.ascontiguousarray(part, np.float32), kind) for part in values]
    source = {**sample.source, "cell_counts": [len(pos)]}
    return Snapshot(tokens, [MemoryTrack(cells, specs, rows, {"v_trans": 0})], source)


def part_of(save: Snapshot, n: int) -> Snapshot:
    """The first ``n`` cells."""
    [track] = save.tracks
    assert isinstance(track, MemoryTrack)
    cells = own.taken(track.cells, np.arange(n))
    part = replace(track, cells=cells, rows=[rows[:n] for rows in track.rows])
    return replace(save, tracks=[part], identity=ModelIdentity())


@st.composite
def saves(draw: own.Draw, most: int = 40, fewest: int = 1) -> Snapshot:
    """Frames of the sample session, scaled and disturbed."""
    sample, values = session()
    n = draw(st.integers(fewest, most))
    start = draw(st.integers(0, 400 - n))
    rng = np.random.default_rng(draw(own.SEEDS))
    scale = draw(st.sampled_from([1.0, 1.0, 0.0, 1e-3, 0.5, 3.0, 50.0]))
    noise = draw(st.sampled_from([0.0, 0.01, 0.3, 2.0]))
    found = []
    for part in values:
        frames = part[start : start + n] * np.float32(scale)
        found.append(frames + noise * rng.normal(0, part.std(), frames.shape))
    kind = draw(st.sampled_from(["as they were", "from 0", "gaps"]))
    pos = np.arange(start, start + n)
    if kind == "from 0":
        pos -= start
    elif kind == "gaps":
        pos = np.sort(rng.choice(1000, n, replace=False))
    tokens = sample.tokens if draw(st.booleans()) else rng.integers(0, 4096, 420)
    return save_of(found, pos, tokens.astype(np.int32), draw(st.sampled_from(list(ROUNDING))))


def values_of(track: Track) -> np.ndarray:
    """Channels of all tensors, float64 ``[n, C]``."""
    rows = track.read(0, len(track.cells))
    parts = [dequantize(r, t.dtype) for r, t in zip(rows, track.tensors, strict=True)]
    return np.concatenate(parts, axis=1).astype(np.float64)


# --- books ------------------------------------------------------------------------------------


@own.examples(40)
@given(saves(), st.sampled_from(BOOK_TIERS))
def test_a_book_keeps_to_its_steps(folder: Path, save: Snapshot, tier: str) -> None:
    path = folder / "a.tsc"
    report = tscfile.pack(save, path, tier=tier, book=BOOK, identity=sample_identity(), force=True)
    assert report.n_frames_new == len(save.tracks[0].cells)
    with tscfile.open(path, book=BOOK) as archive:
        check_steps(track_of(archive), save.tracks[0], MOST_STEPS)


@own.examples(12)
@given(saves(), st.sets(st.sampled_from(BOOK_TIERS), min_size=2))
def test_layers_keep_to_their_steps(folder: Path, save: Snapshot, tiers: set[str]) -> None:
    """Each of them, and the last gives back the very rows."""
    path = folder / "a.tsc"
    layers = [tier for tier in reversed(BOOK_TIERS) if tier in tiers]
    tscfile.pack(
        save, path, tier=[*layers, "lossless"], book=BOOK, identity=sample_identity(), force=True
    )
    with tscfile.open(path, book=BOOK) as archive:
        for tier in layers:
            check_steps(track_of(archive, tier=tier), save.tracks[0], MOST_STEPS)
        exact = track_of(archive)
        assert exact.is_exact()
        n = len(exact.cells)
        for mine, theirs in zip(exact.read(0, n), save.tracks[0].read(0, n), strict=True):
            assert np.array_equal(mine, theirs)


# --- without a book ---------------------------------------------------------------------------


def check_tolerance(archive: Archive, number: int, track: Track, first_block: int) -> None:
    """The frames of blocks from ``first_block`` on, which were packed for this snapshot, are on
    average as near as the tier says, in units of the scales that the snapshot records."""
    coding, old = archive.record(number).coding, track_of(archive, number)
    scales = np.repeat(Scales(*coding["scales"]).of(old.tensors), 128)
    decoded, saved = values_of(old), values_of(track)
    rounded = ROUNDING[old.tensors[0].dtype.name] * np.abs(saved) + 2.0**-25
    rounded += 2e-6 * np.abs(saved)
    new = np.repeat([r.block >= first_block for r in old.runs], [r.count for r in old.runs])
    if not new.any():
        return
    # Rounding is added to an error as large as the tolerance.
    root = np.sqrt(np.square(((decoded - saved) / scales)[new]).mean())
    allowed = np.sqrt(coding["tolerance"]) + np.sqrt(
        np.square((rounded / scales)[new]).mean())  # fmt: skip
    assert root <= 1.001 * allowed
    assert coding["tolerance"] == TIERS[archive.record(number).tier].tolerance


@own.examples(40)
@given(saves(60), st.sampled_from(["near", "balanced", "compact"]), st.booleans())
def test_a_tier_without_a_book_keeps_its_tolerance(
    folder: Path, save: Snapshot, tier: str, known: bool
) -> None:
    """Of the first frames, and of those that a later save adds to them."""
    path, track = folder / "a.tsc", save.tracks[0]
    n = len(track.cells) // 2
    facts = sample_identity() if known else None
    first = part_of(save, n)
    tscfile.pack(first, path, tier=tier, identity=facts, force=True)
    tscfile.append(save, path)
    with tscfile.open(path) as archive:
        check_tolerance(archive, 0, first.tracks[0], 0)
        n_blocks = len(archive.record(0).tracks[0].runs)
        check_tolerance(archive, 1, track, n_blocks)
        check_bounds(track_of(archive, 1), track)


# --- product quantization ---------------------------------------------------------------------


@own.examples(6)
@given(saves(400, 200), st.sampled_from([0.0, 0.5, 1.0, 2.0, None]))
def test_product_falls_back_to_exact_frames(
    folder: Path, save: Snapshot, above: float | None
) -> None:
    """Frames beyond the threshold are the very rows, all others are within it."""
    path, track = folder / "a.tsc", save.tracks[0]
    options = ProductOptions(200, above)
    report = tscfile.pack(save, path, product=options, identity=sample_identity(), force=True)
    n_exact = 0
    with tscfile.open(path) as archive:
        old, at = track_of(archive), 0
        decoded, rows = (each.read(0, len(track.cells)) for each in (old, track))
        for run in old.runs:
            cells = slice(at, at + run.count)
            [chunk] = old.chunks(run)
            where, [payload] = old.lossy_payloads(run.block, chunk)
            codec = old.product_codec(payload, where)
            forms = codec.read(payload, where).forms[run.first : run.first + run.count]
            exact = forms == 0
            for mine, theirs in zip(decoded, rows, strict=True):
                assert np.array_equal(mine[cells][exact], theirs[cells][exact])
            context = FrameContext(track.cells.pos[cells], save.tokens)
            (mine, _), (theirs, left) = (
                codec.domain.vectors([part[cells] for part in each], old.tensors, context)
                for each in (decoded, rows)
            )
            errors = left + np.square(mine - theirs, dtype=np.float64).sum(axis=1)
            assert isinstance(codec.domain, SessionCodes)
            if above is not None:
                # Decoded rows were rounded once more, and sums are float32.
                size = ROUNDING[old.tensors[0].dtype.name] * np.linalg.norm(theirs, axis=1)
                most = np.sqrt(above * codec.domain.error) + size + 1e-4
                assert (np.sqrt(errors[~exact]) <= (1.001 * most)[~exact]).all()
            n_exact += int(exact.sum())
            at += run.count
    assert report.n_frames_exact == (None if above is None else n_exact)
    assert above is not None or not n_exact


# --- what later saves take --------------------------------------------------------------------


def disturbed(save: Snapshot, draw: own.Draw) -> Snapshot:
    """The same frames as a computer with other rounding has them, some of them clearly others."""
    [track] = save.tracks
    assert isinstance(track, MemoryTrack)
    rng = np.random.default_rng(draw(own.SEEDS))
    share = draw(st.sampled_from([0.0, 1e-4, 1e-3, 0.02, 0.1]))
    which = rng.random(len(track.cells)) < draw(st.sampled_from([0.1, 0.6, 1.0]))
    rows = []
    for tensor, part in zip(track.tensors, track.rows, strict=True):
        values = dequantize(part, tensor.dtype)
        noise = share * rng.normal(0, values.std(), values.shape) * which[:, None]
        rows.append(quantize((values + noise).astype(np.float32), tensor.dtype))
    return replace(save, tracks=[replace(track, rows=rows)], identity=ModelIdentity())


@own.examples(40)
@given(st.data(), saves(60), st.sampled_from([*BOOK_TIERS, "near without a book"]))
def test_the_recorded_error_bounds_what_was_taken(
    folder: Path, data: st.DataObject, save: Snapshot, tier: str
) -> None:
    """``max_delta_error``: how far the frames of a save are from the stored ones that stand for
    them, except those of blocks that are stored as they are in the save."""
    path = folder / "a.tsc"
    book = None if tier.endswith("book") else BOOK
    n, m = sorted(data.draw(st.integers(1, len(save.tracks[0].cells))) for _ in range(2))
    first = part_of(save, n)
    options = {"tier": tier.split()[0], "book": book, "identity": sample_identity()}
    tscfile.pack(first, path, force=True, **options)  # type: ignore[arg-type]
    tscfile.append(part_of(save, m), path, book=book)
    later = disturbed(save, data.draw)
    tscfile.append(later, path, book=book)
    with tscfile.open(path, book=BOOK) as archive:
        old, track, before = track_of(archive), later.tracks[0], track_of(archive, 1)
        n_before = max(run.block for run in before.runs) + 1
        said = archive.record().coding.get("max_delta_error")
        if book:
            check_steps(old, track, MAX_DELTA)
        else:
            check_bounds(old, track, ALLOWED)
        found = [
            far for run, at in runs_of(old) if run.block < n_before
            for far in distances(old, run, at, track)
        ]  # fmt: skip
        if said is not None:
            # It is rounded to four places.
            assert found and max(found) <= said + 5.1e-5


def runs_of(track: ArchivedTrack) -> list[tuple[FrameRun, int]]:
    """Runs, and the first cell of each."""
    starts = np.cumsum([0, *(run.count for run in track.runs)])
    return list(zip(track.runs, starts.tolist(), strict=False))


def distances(old: ArchivedTrack, run: FrameRun, at: int, track: Track) -> np.ndarray:
    """How far the save's frames are from those of ``run``: nothing where the whole block is as it
    was packed."""
    rows, entry = track.read(at, at + run.count), old.archive.block(run)
    if run.count == entry.n_frames and blocks.content_id(rows) == entry.content_id:
        return np.zeros(run.count)
    [chunk] = old.chunks(run)
    where, payloads = old.lossy_payloads(run.block, chunk)
    context = old.context_in(run, old.cells.pos[at : at + run.count])
    if "bases" in old.coding:
        codec = old.session_codec(payloads[0], where)
        return codec.distance(payloads[0], run.first, rows, old.tensors, context.key_pos, where)
    return old.codec().distance(payloads, run.first, rows, old.tensors, context, where)
