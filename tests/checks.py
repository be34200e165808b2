"""Checks that several property tests share: what an archive holds, and how near it is to a save."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from conftest import SAMPLES, same_state

import tscfile
from tscfile.archive import Archive
from tscfile.archived_track import ArchivedTrack
from tscfile.book_codec import BookCodec
from tscfile.explanation import explain
from tscfile.identity import identity_from_gguf
from tscfile.model import ModelIdentity, Snapshot, Track
from tscfile.retype import dequantize

MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"
ROUNDING = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
"""Relative error of a value that is rounded to a type."""


@cache
def sample_identity() -> ModelIdentity:
    return identity_from_gguf(MODEL)


def check_holds(path: Path, wanted: list[Snapshot], book: Path | None = None) -> None:
    """The archive is whole and has these snapshots, bit for bit, in sound runs of frames."""
    problems = tscfile.verify(path, book=book).problems
    assert not problems
    with tscfile.open(path, book=book) as archive:
        assert len(archive) == len(wanted)
        for number, snapshot in enumerate(wanted):
            found = archive.snapshot(number)
            assert found.exact and same_state(found, snapshot), number
            for track in archive.record(number).tracks:
                places = [
                    (run.block, run.first + i) for run in track.runs for i in range(run.count)
                ]
                assert len(set(places)) == len(places), "a frame is used twice"
                assert all(archive.block(run).n_frames >= run.first + run.count
                           for run in track.runs)  # fmt: skip
        for info, snapshot in zip(explain(archive), wanted, strict=True):
            n_cells = sum(len(track.cells) for track in snapshot.tracks)
            assert sum(part.n_frames for part in info.parts) == n_cells


def track_of(archive: Archive, number: int = -1, tier: str | None = None) -> ArchivedTrack:
    [track] = archive.snapshot(number, tier).tracks
    assert isinstance(track, ArchivedTrack)
    return track


@dataclass
class Coefficients:
    """Of the frames of a run: those that a save has, those that were decoded, the step, and by how
    much rounding to the element type may have moved the decoded ones, ``[n, R]`` or ``[n]``."""

    saved: np.ndarray
    decoded: np.ndarray
    step: float
    rounding: np.ndarray


@cache
def row_norms(codec: BookCodec) -> np.ndarray:
    """By how much a coefficient changes at most where channels change by 1 in all, ``[R]``."""
    counts = codec.book.facts["book.group_coefficients"]
    unit = codec.book.analyse(np.eye(codec.book.n_channels, dtype=np.float32), counts)
    return np.sqrt(np.square(unit, dtype=np.float64).sum(axis=0))


def coefficients(old: ArchivedTrack, track: Track) -> list[Coefficients]:
    """Of all frames of an archived track, whose save is ``track``."""
    codec, found, at = old.codec(), [], 0
    rows, decoded = (each.read(0, len(each.cells)) for each in (track, old))
    for run in old.runs:
        [chunk] = old.chunks(run)
        where, payloads = old.lossy_payloads(run.block, chunk)
        for segment in codec.read(payloads, where):
            first = max(segment.start, run.first)
            stop = min(segment.stop, run.first + run.count)
            if first >= stop:
                continue
            cells = slice(at + first - run.first, at + stop - run.first)
            context = old.context_in(run, old.cells.pos[cells])
            both = [
                codec.book.analyse(
                    codec.residual([part[cells] for part in each], old.tensors, context),
                    segment.counts,
                )
                for each in (rows, decoded)
            ]
            values = np.concatenate(
                [dequantize(part[cells], t.dtype) for part, t in
                 zip(decoded, old.tensors, strict=True)], axis=1
            )  # fmt: skip
            norms = row_norms(codec)[codec.book.columns(segment.counts)]
            length = np.sqrt(np.square(values, dtype=np.float64).sum(axis=1))
            share = ROUNDING[old.tensors[0].dtype.name]
            # What is below the least normal number of f16 is rounded to its step.
            tiny = 2.0**-25 * np.sqrt(values.shape[1])
            rounding = (share * length + tiny)[:, None] * norms
            found.append(Coefficients(*both, segment.step, rounding))
        at += run.count
    return found


def check_steps(old: ArchivedTrack, track: Track, most: float) -> None:
    """Decoded frames are within so many steps of those of the save, in all coefficients."""
    checked = 0
    for each in coefficients(old, track):
        # The analysis itself is float32.
        slack = 2e-3 + 2 * each.rounding / each.step
        slack = slack + 1e-5 * np.abs(each.saved) / each.step
        apart = np.abs(each.saved - each.decoded) / each.step
        assert (apart <= most + slack).all()
        checked += len(apart)
    assert checked == len(track.cells)


def check_bounds(old: ArchivedTrack, track: Track, share: float = 1.0) -> None:
    """No frame of the save is farther from the stored one than ``share`` of what its segment
    says."""
    at, rows = 0, track.read(0, len(track.cells))
    for run in old.runs:
        cells = slice(at, at + run.count)
        [chunk] = old.chunks(run)
        where, [payload] = old.lossy_payloads(run.block, chunk)
        codec = old.session_codec(payload, where)
        part = slice(run.first, run.first + run.count)
        stored, bounds = codec.restored(payload, part, where)
        frames = codec.basis.frames([r[cells] for r in rows], old.tensors, old.cells.pos[cells])
        total, size = np.zeros(run.count), np.zeros(run.count)
        for mine, theirs in zip(frames, stored, strict=True):
            total += np.square(mine - theirs, dtype=np.float64).sum(axis=1)
            size += np.square(mine, dtype=np.float64).sum(axis=1)
        # Sums in float32, and a bound in float32.
        allowed = (share + 1e-4) * bounds * codec.basis.n_channels + 1e-10 * size + 1e-6
        assert (total <= allowed).all()
        at += run.count
    assert at == len(track.cells)
