"""Write what a damaged archive still holds to a new one.

Blocks and whole snapshots are copied as they are, but for their numbers; the damaged file stays.
Of a snapshot that has lost frames the first ones are kept, up to the first that is lost, with their
tokens: a conversation can be resumed from there. That is possible where cell ``i`` is position
``i`` of one sequence in every track; the frames of a sliding window, and a recurrent state, say
nothing of an earlier moment, and such a snapshot is kept whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files, temporal
from .container.reader import IndexSegment
from .container.records import RecordRef
from .container.snapshots import SnapshotRecord, TrackRecord
from .container.writer import ContainerWriter
from .conversations import FILE_ID
from .diagnosis import Diagnosis, Loss
from .errors import DamagedError, TscError, UsageError
from .model import CellTable
from .recovery import recover
from .rewriting import Copier, all_tokens, nearest_kept, tokens_below
from .temporal import cut_runs
from .verification import VerifyReport, report_of

Progress = Callable[[int], None]

_DISPENSABLE = frozenset({"outputs", "appendix"})
"""Opaque parts of a llama.cpp state that it can be resumed without: the logits of the last token,
and a server's checkpoints."""

_FORMATS = ("llama.cpp", "transformers")
"""Sources whose facts are known to be right of a shorter state too, once `_facts` is done."""


@dataclass(frozen=True)
class Kept:
    """A snapshot of the new file: ``snapshot`` is its number there, ``original`` in the old one.

    ``n_cells`` of ``n_cells_before`` are left; ``parts``: names of opaque parts that are not.
    """

    snapshot: int
    original: int
    n_cells: int
    n_cells_before: int
    parts: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.n_cells == self.n_cells_before and not self.parts


@dataclass(frozen=True)
class LostSnapshot:
    """A snapshot that could not be kept, and why."""

    original: int
    reason: str


@dataclass(frozen=True)
class SalvageReport:
    """``found``: what is wrong with the old file. ``n_mended``: flipped bits that were put right.
    ``counted``: blocks whose numbers are not from an index but from their order in the file;
    ``undecoded``: blocks that were not decoded for want of a book, though their bytes have their
    checksums."""

    found: VerifyReport
    kept: list[Kept]
    lost: list[LostSnapshot]
    n_mended: int
    counted: list[int]
    undecoded: list[int]
    file_bytes: int

    @property
    def is_complete(self) -> bool:
        """Is every snapshot of the old file whole in the new one?"""
        return not self.lost and all(each.is_whole for each in self.kept)


def salvage(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    book: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> SalvageReport:
    """Write all that is undamaged of the archive ``path`` to the new archive ``out``.

    One flipped bit in a record of up to 64 KiB, or in a header or trailer, is put right, as the
    checksum tells when it is. ``book``: of a lossy snapshot; without it blocks are copied by their
    checksums alone. ``progress``: raw bytes of the blocks that are checked. `DamagedError` if no
    snapshot can be had, `UsageError` if ``out`` exists and ``force`` is not given, or is ``path``.

    >>> import tempfile, tscfile
    >>> folder = tempfile.mkdtemp()
    >>> report = tscfile.pack("samples/session.kv", folder + "/session.tsc")
    >>> with open(folder + "/session.tsc", "r+b") as file:
    ...     place = file.seek(-100000, 2)
    ...     done = file.write(b"sixteen bad bytes")
    >>> (kept,) = salvage(folder + "/session.tsc", folder + "/out.tsc").kept
    >>> kept.n_cells, kept.n_cells_before
    (256, 400)
    """
    if os.path.exists(out) and os.path.samefile(path, out):
        raise UsageError(f"{os.fspath(out)}: is the damaged file itself; name another output")
    with recover(path, book) as recovery:
        diagnosis = Diagnosis(recovery, needs_books=False)
        diagnosis.check_snapshots()
        diagnosis.check_blocks(progress)
        salvager = _Salvager(diagnosis)
        if not salvager.kept:
            reason = salvager.lost[-1].reason if salvager.lost else "there are none"
            raise DamagedError(
                f"{recovery.archive.path}: of no snapshot anything can be had: {reason}"
            )
        found, flaws = report_of(diagnosis), recovery.survey.flaws
        with files.new_file(out, force=force) as fd:
            size = salvager.write(ContainerWriter(fd))
        return SalvageReport(
            found, salvager.kept, salvager.lost,
            sum(flaw.flipped is not None for flaw in flaws), sorted(recovery.counted),
            sorted(diagnosis.undecoded), size,
        )  # fmt: skip


class _Salvager:
    """Decides what is kept, then writes it."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        self._diagnosis, self._archive = diagnosis, diagnosis.archive
        self._losses = diagnosis.losses()
        self.kept: list[Kept] = []
        self.lost: list[LostSnapshot] = []
        self._records: list[SnapshotRecord] = []
        self._numbers: dict[int, int] = {}
        # Tokens of those that were cut, by their new numbers.
        self._cut_tokens: dict[int, NDArray[np.int32]] = {}
        for number in range(len(self._archive)):
            try:
                self._keep(number)
            except TscError as error:
                self.lost.append(LostSnapshot(number, str(error)))

    def write(self, writer: ContainerWriter) -> int:
        """Write what is kept; returns the size of the file."""
        self._leave_out_extras()
        writer.copy_extras(self._archive.container)
        copier = Copier(self._archive, writer)
        used = {run.block for record in self._records for t in record.tracks for run in t.runs}
        new_number: dict[int, int] = {}
        for number in self._archive.with_sources(used):
            sources = self._archive.container.blocks[number].sources
            moved = [replace(run, block=new_number[run.block]) for run in sources]
            new_number[number] = copier.block(number, sources=moved)
        for record, kept in zip(self._records, self.kept, strict=True):
            tracks = [
                replace(t, runs=tuple(replace(r, block=new_number[r.block]) for r in t.runs))
                for t in record.tracks
            ]
            copier.snapshot(replace(record, tracks=tracks), kept.original)
        return writer.commit()

    def _leave_out_extras(self) -> None:
        """Bases, books and codebooks that cannot be read are not copied."""
        container = self._archive.container
        readable = []
        for extra in (each for segment in container.segments for each in segment.extras):
            try:
                container.read(extra.ref, extra.type)
                readable.append(extra)
            except DamagedError:
                continue
        container.segments[:] = [IndexSegment(RecordRef(0, 0), 0, 0, tuple(readable))]

    def _keep(self, number: int) -> None:
        """Take a snapshot, or what is left of it; `TscError` if it cannot be had."""
        loss = self._losses.get(number)
        if loss is not None and loss.everything:
            raise DamagedError("its record, or one that it is read with, is damaged")
        record = self._diagnosis.records[number]
        n_before = sum(len(track.cells) for track in record.tracks)
        new, is_cut = record, False
        if loss is not None:
            new = _without(record, loss)
            if loss.cells:
                n = min(cells.start for cells in loss.cells)
                new, is_cut = _cut(new, n), True
        parent = nearest_kept(self._archive, record, self._numbers)
        above = None if parent is None else self._records[parent]
        as_before = above is None or (
            self.kept[above.number].original == record.parent
            and above.number not in self._cut_tokens
        )
        ids, contexts = record.ids, record.head.contexts
        here = len(self._records)
        if is_cut or not as_before or (above is None and record.parent is not None):
            wanted = all_tokens(self._archive, record)
            if is_cut:
                self._cut_tokens[here] = wanted[0] = wanted[0][:n]
            ids, contexts = tokens_below(self._archive, new, wanted, above, self._new_tokens)
        plan = temporal.KEYFRAME if parent is None else new.plan
        head = replace(record.head, number=here, parent=parent, ids=ids, contexts=contexts)
        self._records.append(replace(new, head=head, plan=plan))
        self._numbers[number] = here
        n_cells = sum(len(track.cells) for track in new.tracks)
        parts = tuple(entry.name for entry in record.opaque if entry not in new.opaque)
        self.kept.append(Kept(here, number, n_cells, n_before, parts))

    def _new_tokens(self, number: int, context: int) -> NDArray[np.int32]:
        """Tokens of a snapshot of the new file, or of one of its contexts."""
        if number in self._cut_tokens and not context:
            return self._cut_tokens[number]
        return self._archive.tokens(self.kept[number].original, context)


def _without(record: SnapshotRecord, loss: Loss) -> SnapshotRecord:
    """Without the opaque parts that are lost."""
    needed = sorted(set(loss.parts) - _DISPENSABLE)
    if needed:
        raise DamagedError(f"its part {needed[0]!r} is damaged")
    return replace(record, opaque=[part for part in record.opaque if part.name not in loss.parts])


def _cut(record: SnapshotRecord, n: int) -> SnapshotRecord:
    """The first ``n`` cells of each track; `DamagedError` if they are no state by themselves."""
    if not n:
        raise DamagedError("its first frames are damaged")
    names = {part.name for part in record.opaque}
    if record.source.get("format") not in _FORMATS or names - _DISPENSABLE:
        raise DamagedError("frames are damaged, and its first ones alone are no state")
    if not all(_is_plain(track) for track in record.tracks):
        raise DamagedError("frames are damaged, and its cells cannot be cut: they are not in order")
    n_cells = max(len(track.cells) for track in record.tracks)
    tracks = [
        replace(track, runs=tuple(cut_runs(track.runs, 0, n)), cells=_first(track.cells, n))
        for track in record.tracks
    ]
    name = f"{record.name} (first {n} of {n_cells} frames)".strip()
    return replace(
        record, name=name, tracks=tracks, source=_facts(record.source, tracks),
        opaque=[part for part in record.opaque if part.name not in _DISPENSABLE],
    )  # fmt: skip


def _is_plain(track: TrackRecord) -> bool:
    cells = track.cells
    in_order = (cells.pos == np.arange(len(cells))).all() and (cells.seq_counts == 1).all()
    return bool(in_order and (cells.seq_ids == cells.seq_ids[:1]).all())


def _first(cells: CellTable, n: int) -> CellTable:
    """Cells of one sequence each."""
    return CellTable(cells.pos[:n], cells.seq_counts[:n], cells.seq_ids[:n], cells.ext[:n])


def _facts(source: dict[str, Any], tracks: list[TrackRecord]) -> dict[str, Any]:
    """What the source says of a state that was cut."""
    facts = {key: value for key, value in source.items() if key != FILE_ID}
    if "cell_counts" in facts and len(facts["cell_counts"]) == len(tracks):
        facts["cell_counts"] = [len(track.cells) for track in tracks]
    return facts
