"""What is wrong with an archive, and which snapshots lose what by it.

A `Diagnosis` checks everything that can be read (`check_snapshots`, `check_blocks`) and lays what
the walk over the file has found (`tscfile.container.survey`) against what uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from . import workers
from .archived_track import ArchivedTrack
from .bytestream import ByteReader
from .container.records import (
    BASIS,
    BOOK,
    CHUNK,
    CODEBOOKS,
    RECORD_NAMES,
    SNAPSHOT,
    BlockEntry,
    FrameRun,
    RecordRef,
)
from .container.snapshots import SnapshotHead, SnapshotRecord
from .container.survey import UNREADABLE, Flaw
from .errors import DamagedError, TscError, UsageError
from .recovery import Recovery
from .registry import OF_BOOK, PRODUCT, SESSION_TRANSFORM

Progress = Callable[[int], None]

_UNKNOWN = -1
"""Offset of a record that is not found."""

_MOST_GROUPS = 4
"""Losses that are told one by one in a line of text."""


@dataclass(frozen=True, order=True)
class Cells:
    """Cells ``start`` to ``stop`` (not included) of a track; ``first_position`` and
    ``last_position``: the least and the greatest of theirs."""

    cache: int
    stream: int
    start: int
    stop: int
    first_position: int
    last_position: int

    def __str__(self) -> str:
        text = numbered("cell", range(self.start, self.stop))
        if (self.first_position, self.last_position) != (self.start, self.stop - 1):
            text += f" (positions {self.first_position} to {self.last_position})"
        if self.cache or self.stream:
            text += f" of cache {self.cache}, stream {self.stream}"
        return text


@dataclass(frozen=True)
class Loss:
    """What a snapshot loses: ``everything``, or some ``cells`` and opaque ``parts``."""

    snapshot: int
    everything: bool = False
    cells: tuple[Cells, ...] = ()
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.everything:
            return "all"
        return ", ".join([*map(str, self.cells), *(f"part {part!r}" for part in self.parts)])


@dataclass(frozen=True)
class Damage:
    """``kind``: what is hit (`tscfile.container.survey.Flaw`), at ``offset``. ``block``: whose
    chunk it is. ``flipped``: the byte in which one bit was flipped, where that is all; salvage puts
    it right. ``problem``: all of this in a line. ``exit_code``: that of `DamagedError`, or of the
    error that keeps from decoding here what is whole for all that is known."""

    kind: str
    offset: int
    length: int
    block: int | None
    losses: list[Loss]
    flipped: int | None
    problem: str
    exit_code: int = DamagedError.exit_code


@dataclass(frozen=True)
class SnapshotState:
    """What is left of a snapshot: ``loss`` is None if it is whole. ``n_cells``: of all tracks, None
    where its record cannot be read."""

    number: int
    n_cells: int | None
    loss: Loss | None


@dataclass
class _Hits:
    """Numbers of blocks and snapshots, and opaque parts by snapshot."""

    blocks: set[int] = field(default_factory=set)
    snapshots: set[int] = field(default_factory=set)
    parts: set[tuple[int, str]] = field(default_factory=set)

    def add(self, other: _Hits) -> None:
        self.blocks |= other.blocks
        self.snapshots |= other.snapshots
        self.parts |= other.parts


@dataclass(frozen=True)
class _Use:
    """A frame run of a snapshot: cells ``start`` to ``stop`` of the track at ``place`` in it."""

    snapshot: int
    place: int
    start: int
    stop: int


class Diagnosis:
    """``readable``: the snapshots whose records are. ``bad``: what cannot be had whole, and
    ``undecoded`` the blocks that could not be decoded here, for want of a book for instance, though
    their chunks have their checksums; both are complete once everything was checked.

    Records are read one after another and not kept: each may take as much memory as a file of this
    size may."""

    def __init__(self, recovery: Recovery, *, needs_books: bool = True) -> None:
        """``needs_books``: raise `UsageError` where a book is not at hand, and call a block bad
        that cannot be decoded here."""
        self.recovery, self.archive = recovery, recovery.archive
        self.readable: set[int] = set()
        self.bad = _Hits()
        self.undecoded: set[int] = set()
        self._n_frames = sum(entry.n_frames for entry in self.archive.container.blocks)
        # Where the book in the file is damaged, that is what there is to say.
        self._needs_books = needs_books and all(map(self._is_readable, self._books()))
        self._errors: dict[object, TscError] = {}
        # Of each block how many layers the snapshot has that reads most of them, which one it is,
        # and which of its tracks.
        self._readers: dict[int, tuple[int, int, int]] = {}
        self._misfits: list[tuple[_Use, str]] = []
        self._leads: dict[int, set[int]] = {}

    def _books(self) -> list[RecordRef]:
        return self.archive.container.extras(BOOK)

    def _is_readable(self, book: RecordRef) -> bool:
        try:
            self.archive.container.read(book, BOOK)
        except DamagedError:
            return False
        return True

    # --- checks -------------------------------------------------------------------------------

    def check_snapshots(self, *, quick: bool = False) -> None:
        """Read every snapshot record and, unless ``quick``, tokens and opaque parts."""
        for number in range(len(self.archive)):
            self._leads[number] = self._read_leads(number)
            try:
                record = self.archive.record(number)
                self._check_cells(record)
                if not quick:
                    self._check_tokens(record)
            except TscError as error:
                # A book that is not at hand is no damage of the file.
                if isinstance(error, UsageError) and self._needs_books:
                    raise
                self.bad.snapshots.add(number)
                self._errors[number] = _alone(error)
                continue
            self.readable.add(number)
            self._note_readers(record)
            if not quick:
                self._check_parts(record)

    def check_blocks(self, progress: Progress | None = None) -> None:
        """Decode every block that a snapshot uses; ``progress``: raw bytes of each."""
        if self._needs_books:
            # Found out before the blocks are decoded.
            for block in {reader: block for block, reader in self._readers.items()}.values():
                if track := self._track(block):
                    track.find_book()
        entries = self.archive.container.blocks
        for (number, entry), error in zip(
            enumerate(entries), workers.in_order(self._check_block, range(len(entries))),
            strict=True,
        ):  # fmt: skip
            if error is not None:
                self.bad.blocks.add(number)
                self._errors[f"block {number}"] = _alone(error)
            if progress:
                progress(sum(chunk.raw_length for chunk in entry.chunks))

    def _read_leads(self, number: int) -> set[int]:
        """Snapshots whose records one is read with, as it says itself."""
        ref = self.archive.container.snapshots[number]
        try:
            payload = self.archive.container.read(ref, SNAPSHOT)
            head = SnapshotHead.read(ByteReader(payload, self.archive.path))
        except DamagedError:
            return set()
        return {other for other in (head.parent, head.dictionary) if other is not None}

    def _check_cells(self, record: SnapshotRecord) -> None:
        if self.recovery.is_rebuilt:
            # Runs may speak of blocks that are not known.
            return
        if any(len(track.cells) > self._n_frames for track in record.tracks):
            raise DamagedError(
                f"{self._where(record)}: a track of more cells than the file has frames; damaged"
            )

    def _check_tokens(self, record: SnapshotRecord) -> None:
        """Tokens can be had, and frames that are not stored have all that they are made from."""
        try:
            # One at a time: together they may be many times what is in the file.
            for context in range(len(record.head.contexts), -1, -1):
                tokens = self.archive.tokens(record.number, context)
        except UsageError:
            if self._needs_books:
                raise
            return
        for part in record.tracks:
            track, lost = ArchivedTrack(self.archive, part, record), self.recovery.lost
            if any(run.block in lost for run in part.runs) or not self._fits(record):
                continue
            pos = track.absent_positions()
            last = int(pos.max(initial=-1))
            known = len(tokens) > last and (tokens[: last + 1] >= 0).all()
            if (pos < 0).any() or not known:
                raise DamagedError(
                    f"{self._where(record)}: lacks tokens of frames that are not stored; damaged"
                )

    def _fits(self, record: SnapshotRecord) -> bool:
        try:
            for track in record.tracks:
                for run in track.runs:
                    self.archive.block(run)
        except DamagedError:
            return False
        return True

    def _check_parts(self, record: SnapshotRecord) -> None:
        allowance = self.archive.container.allowance()
        for entry in record.opaque:
            try:
                self.archive.opaque_part(entry, allowance)
            except DamagedError as error:
                self.bad.parts.add((record.number, entry.name))
                self._errors[record.number, entry.name] = _alone(error)

    def _note_readers(self, record: SnapshotRecord) -> None:
        where = self._where(record)
        for run, use in self._runs_of(record):
            try:
                if run.block not in self.recovery.lost:
                    part = record.tracks[use.place]
                    self.archive.check_run(run, use.start, part, record, where)
            except DamagedError as error:
                self._misfits.append((use, str(error)))
                continue
            n_layers, *_ = self._readers.get(run.block, (0,))
            if len(record.layers) > n_layers:
                self._readers[run.block] = len(record.layers), record.number, use.place

    def _runs_of(self, record: SnapshotRecord) -> Iterator[tuple[FrameRun, _Use]]:
        for place, part in enumerate(record.tracks):
            at = 0
            for run in part.runs:
                if run.count:
                    yield run, _Use(record.number, place, at, at + run.count)
                at += run.count

    @cached_property
    def _uses(self) -> dict[int, list[_Use]]:
        """Of each block the runs that name it; only damaged files need to know."""
        misfits, found = {use for use, _ in self._misfits}, dict[int, list[_Use]]()
        for number in sorted(self.readable):
            for run, use in self._runs_of(self.archive.record(number)):
                if use not in misfits:
                    found.setdefault(run.block, []).append(use)
        return found

    def _track(self, block: int) -> ArchivedTrack | None:
        """One that a block is read by, with all of its layers if there is one."""
        if block not in self._readers:
            return None
        _, number, place = self._readers[block]
        record = self.archive.record(number)
        return ArchivedTrack(self.archive, record.tracks[place], record)

    def _check_block(self, number: int) -> TscError | None:
        if number in self.recovery.lost:
            where = f"{self.archive.path}: block {number}"
            return DamagedError(f"{where}: nothing that is left tells of it; damaged")
        entry = self.archive.container.blocks[number]
        track = self._track(number)
        if track is not None:
            try:
                track.check_block(number)
            except DamagedError as error:
                return error
            except TscError as error:
                # No book, or a codec that is not known here.
                if self._needs_books:
                    return error
                return self._check_chunks(number, entry)
        return None

    def _check_chunks(self, number: int, entry: BlockEntry) -> DamagedError | None:
        try:
            for chunk in entry.chunks:
                self.archive.chunk_payload(number, chunk)
        except DamagedError as error:
            return error
        self.undecoded.add(number)
        return None

    def _where(self, record: SnapshotRecord) -> str:
        return f"{self.archive.path}: snapshot {record.number}"

    # --- what is lost -------------------------------------------------------------------------

    def losses(self) -> dict[int, Loss]:
        """What snapshots lose once all flipped bits are put right; by number."""
        return {loss.snapshot: loss for loss in self._losses(self.bad, self._misfits)}

    def _losses(self, hits: _Hits, misfits: Iterable[tuple[_Use, str]] = ()) -> list[Loss]:
        cells: dict[int, list[Cells]] = {}
        parts: dict[int, list[str]] = {}
        uses = [use for block in sorted(hits.blocks) for use in self._uses.get(block, ())]
        for use in (*uses, *(use for use, _ in misfits)):
            cells.setdefault(use.snapshot, []).append(self._cells(use))
        for number, name in sorted(hits.parts):
            parts.setdefault(number, []).append(name)
        numbers = sorted(hits.snapshots | cells.keys() | parts.keys())
        return [
            Loss(number, True) if number in hits.snapshots else
            Loss(number, False, _joined(cells.get(number, ())), tuple(parts.get(number, ())))
            for number in numbers
        ]  # fmt: skip

    def _cells(self, use: _Use) -> Cells:
        track = self.archive.record(use.snapshot).tracks[use.place]
        pos = track.cells.pos[use.start : use.stop]
        return Cells(
            track.cache, track.stream, use.start, use.stop, int(pos.min()), int(pos.max())
        )

    def states(self) -> list[SnapshotState]:
        """Of every snapshot, as the file is: flipped bits that salvage puts right are not."""
        hits = _Hits()
        hits.add(self.bad)
        for flaw in self.recovery.survey.flaws:
            hits.add(self._hits(flaw)[1])
        losses = {loss.snapshot: loss for loss in self._losses(hits, self._misfits)}
        return [
            SnapshotState(number, self._n_cells(number), losses.get(number))
            for number in range(len(self.archive))
        ]

    def _n_cells(self, number: int) -> int | None:
        if number not in self.readable:
            return None
        return sum(len(track.cells) for track in self.archive.record(number).tracks)

    # --- what does it -------------------------------------------------------------------------

    def damages(self) -> list[Damage]:
        """Every damage once: flaws of the file's bytes first, then what those do not explain."""
        found, explained = [], _Hits()
        for flaw in self.recovery.survey.flaws:
            what, hits = self._hits(flaw)
            explained.add(hits)
            found.append(self._of_flaw(flaw, what, hits))
        for number in sorted(self.bad.snapshots - explained.snapshots):
            found.append(self._of_check(self._errors[number], _Hits(snapshots={number})))
        for number in sorted(self.bad.blocks - explained.blocks):
            error = self._errors[f"block {number}"]
            found.append(self._of_check(error, _Hits(blocks={number}), number))
        for number, name in sorted(self.bad.parts - explained.parts):
            hits = _Hits(parts={(number, name)})
            found.append(self._of_check(self._errors[number, name], hits))
        for use, message in self._misfits:
            loss = Loss(use.snapshot, False, (self._cells(use),))
            found.append(Damage("frame run", 0, 0, None, [loss], None, _line(message, [loss])))
        return found

    def _of_check(self, error: TscError, hits: _Hits, block: int | None = None) -> Damage:
        losses = self._losses(hits)
        kind = "block" if block is not None else "snapshot"
        line = _line(str(error), losses)
        return Damage(kind, 0, 0, block, losses, None, line, error.exit_code)

    def _of_flaw(self, flaw: Flaw, what: str, hits: _Hits) -> Damage:
        losses = self._losses(hits)
        where = f"{self.archive.path}: {flaw.kind} at offset {flaw.offset}"
        if flaw.kind == UNREADABLE:
            where = f"{self.archive.path}: {flaw.length} bytes at offset {flaw.offset}"
        text = f"{where}: {flaw.problem}; damaged{what}"
        if flaw.flipped is not None:
            text += f"; a flipped bit in byte {flaw.flipped}, which --salvage puts right"
        is_chunk = flaw.kind == RECORD_NAMES[CHUNK] and hits.blocks
        block = min(hits.blocks) if is_chunk else None
        line = text + self._unreachable(flaw) if not losses else _line(text, losses)
        return Damage(flaw.kind, flaw.offset, flaw.length, block, losses, flaw.flipped, line)

    def _unreachable(self, flaw: Flaw) -> str:
        """What a reader loses by a damage that hits no frame and no snapshot."""
        recovery = self.recovery
        leads = flaw.leads and (flaw.kind != UNREADABLE or recovery.is_rebuilt)
        if leads and recovery.error is not None:
            return "; the file cannot be opened without --salvage"
        if leads and recovery.torn_bytes and len(self.archive) > recovery.n_reachable:
            beyond = range(recovery.n_reachable, len(self.archive))
            return f"; {numbered('snapshot', beyond)} cannot be reached without --salvage"
        return "; nothing is lost by it"

    def _hits(self, flaw: Flaw) -> tuple[str, _Hits]:
        """What a flaw hits, in words where its kind does not say it."""
        hits, words = _Hits(), []
        if flaw.is_harmless:
            return "", hits
        span = range(flaw.offset, flaw.offset + flaw.length)
        single = flaw.kind != UNREADABLE
        for offset, kind, owner in self._owners():
            if offset != flaw.offset if single else offset not in span:
                continue
            if kind == "chunk":
                hits.blocks |= self._dependents(owner)
                words.append(f"block {owner}")
            elif kind == "snapshot":
                hits.snapshots |= {n for n in self._leads if owner in self._chain(n)}
                words.append(f"snapshot {owner}")
            elif kind == "opaque":
                hits.parts.add(owner)
            elif kind == "extra":
                # Bases and codebooks are found by what their headers say.
                known = single or owner == BOOK
                needing = self._blocks_that_need(offset if known else _UNKNOWN, owner)
                if owner == BOOK and flaw.flipped is None:
                    # Others were decoded with a book from elsewhere.
                    needing &= self.undecoded
                hits.blocks |= needing
                words += [] if single else [RECORD_NAMES[owner]]
            elif not single:
                words.append(kind)
        what = ", ".join(dict.fromkeys(words))
        return (f"; {what}" if what else ""), hits

    def _owners(self) -> Iterator[tuple[int, str, Any]]:
        """Offsets of records that are in use, and of what."""
        container = self.archive.container
        for number, entry in enumerate(container.blocks):
            yield from ((chunk.ref.offset, "chunk", number) for chunk in entry.chunks)
        for number, ref in enumerate(container.snapshots):
            if ref.length:
                yield ref.offset, "snapshot", number
        for number in sorted(self.readable):
            for part in self.archive.record(number).opaque:
                yield part.ref.offset, "opaque", (number, part.name)
        yield from ((segment.ref.offset, "index", None) for segment in container.segments)
        for type_ in (BASIS, BOOK, CODEBOOKS):
            yield from ((ref.offset, "extra", type_) for ref in container.extras(type_))

    def _chain(self, number: int) -> set[int]:
        """A snapshot and all whose records it is read with."""
        chain, pending = set(), {number}
        while pending:
            chain |= pending
            pending = set().union(*(self._leads.get(n, set()) for n in pending)) - chain
        return chain

    def _dependents(self, number: int) -> set[int]:
        """A block and all that are differences to it."""
        found = {number}
        for other, entry in enumerate(self.archive.container.blocks):
            # Sources come before what is a difference to them.
            if any(run.block in found for run in entry.sources):
                found.add(other)
        return found

    def _blocks_that_need(self, offset: int, type_: int) -> set[int]:
        """Blocks that are decoded with a basis, book or codebooks record."""
        return {
            number for number in self._readers
            if (track := self._track(number)) and offset in self._needs(number, track, type_)
        }  # fmt: skip

    def _needs(self, number: int, track: ArchivedTrack, type_: int) -> set[int]:
        """Offsets of records of a type without which a block is not decoded."""
        entry, container = self.archive.container.blocks[number], self.archive.container
        needing, found = {*OF_BOOK, PRODUCT}, set[int]()
        for chunk in entry.chunks:
            try:
                where, payload = self.archive.chunk_payload(number, chunk)
                if type_ == BASIS and chunk.codec == SESSION_TRANSFORM:
                    from .session_codec import basis_of

                    for _, ref in self.archive.basis_chain(basis_of(payload, where), where):
                        found.add(ref.offset)
                        self.archive.container.read(ref, BASIS)
                elif type_ == CODEBOOKS and chunk.codec == PRODUCT:
                    from .product_codec import OF_BOOK as CODES_OF_BOOK
                    from .product_codec import codebook_of

                    codebook = codebook_of(payload, where)
                    held = container.by_checksum(CODEBOOKS).get(codebook)
                    if codebook != CODES_OF_BOOK:
                        found.add(held.offset if held else _UNKNOWN)
                elif type_ == BOOK and chunk.codec in needing and "book" in track.coding:
                    # Of several, which one is hit is not known; it is said of all.
                    found |= {ref.offset for ref in self._books()}
            except DamagedError:
                # A basis whose header cannot be read is not found.
                found.add(_UNKNOWN)
        return found


def _alone(error: TscError) -> TscError:
    """An error that is kept: without the frames it came from, which hold the record that was being
    read."""
    error.__traceback__ = error.__context__ = None
    return error


def _line(text: str, losses: Sequence[Loss]) -> str:
    """One line for a damage and what is lost by it."""
    if not losses:
        return f"{text}; nothing is lost by it"
    alike: dict[str, list[int]] = {}
    for loss in losses:
        alike.setdefault(str(loss), []).append(loss.snapshot)
    told = [f"{what} of {numbered('snapshot', numbers)}" for what, numbers in alike.items()]
    more = len(told) - _MOST_GROUPS
    if more > 0:
        told[_MOST_GROUPS:] = [f"and parts of {more} more"]
    return f"{text}; lost: {'; '.join(told)}"


def numbered(noun: str, numbers: Iterable[int]) -> str:
    """Numbers in words.

    >>> numbered("snapshot", [0]), numbered("snapshot", [0, 1, 2, 5])
    ('snapshot 0', 'snapshots 0 to 2, 5')
    """
    ordered = sorted(numbers)
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])
    ]
    told = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{noun}{'s' if len(ordered) > 1 else ''} {', '.join(told)}"


def _joined(cells: Iterable[Cells]) -> tuple[Cells, ...]:
    """The same cells in as few ranges as can be."""
    joined: list[Cells] = []
    for each in sorted(cells):
        last = joined[-1] if joined else None
        if last and (last.cache, last.stream, last.stop) == (each.cache, each.stream, each.start):
            joined[-1] = Cells(
                last.cache, last.stream, last.start, each.stop,
                min(last.first_position, each.first_position),
                max(last.last_position, each.last_position),
            )  # fmt: skip
        else:
            joined.append(each)
    return tuple(joined)
