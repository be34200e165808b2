"""Open what is left of a damaged archive.

Flipped bits that `tscfile.container.survey` has found are put right on the way from the file.
Where the newest index cannot be reached all the same, the lists of blocks and snapshots are made
anew:

- from every index record that is whole, of use or merged away: each says which numbers it lists;
- snapshots beyond them from their records, which begin with their numbers;
- blocks beyond them from chunk records, as far as their numbers are certain. Chunks do not say
  which block they belong to; the first writer stores the blocks of a commit in the order of their
  numbers, chunk after chunk, and snapshots behind them. So numbers are counted, up to the first
  place where a chunk may be missing, or, between snapshots that say how many there must be, if so
  many are there; and all of a stretch are given up if a frame run of a snapshot does not fit the
  block that it would get. Ids are made from what the chunks decode to;
- blocks that snapshots of tier ``tokens`` alone refer to, which have no chunks, from frame runs.

What cannot be had: blocks that are coded with the help of what only an index says of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import blocks, registry
from .archive import Archive
from .archived_track import ArchivedTrack, is_exact
from .bytestream import ByteReader
from .container.reader import Container, IndexSegment
from .container.records import (
    BASIS,
    BOOK,
    CHUNK,
    CODEBOOKS,
    INDEX,
    MAX_BLOCK_FRAMES,
    SNAPSHOT,
    BlockEntry,
    ChunkEntry,
    ChunkHeader,
    ExtraEntry,
    FrameRun,
    Header,
    Index,
    RecordHeader,
    RecordRef,
)
from .container.snapshots import SnapshotRecord, logical_seed
from .container.survey import UNREADABLE, FoundRecord, Survey, patched, survey
from .errors import DamagedError, TscError
from .tiers import TOKENS

if TYPE_CHECKING:
    from .books.book import OpenBook

_NONE = RecordRef(0, 0)
_MISSING = BlockEntry(MAX_BLOCK_FRAMES, blocks.NO_ID, blocks.NO_ID, ())
"""In place of a block that is not known; `Recovery.lost` says where it stands."""

_SELF_CONTAINED = (
    registry.RAW, registry.FIELDS_CLASSED_RANS, registry.BOOK_TRANSFORM,
    registry.SESSION_TRANSFORM, registry.BOOK_REFINEMENT, registry.BOOK_EXACT, registry.PRODUCT,
)  # fmt: skip
"""Codecs of whose chunks the index says nothing that they do not say themselves."""


class MendedContainer(Container):
    """A container whose flipped bits are put right while it is read."""

    def __init__(self, path: str | os.PathLike[str], patches: dict[int, int]) -> None:
        self._patches = patches
        super().__init__(path)

    def _bytes(self, offset: int, length: int) -> bytes:
        return patched(super()._bytes(offset, length), offset, self._patches)


class ListedContainer(MendedContainer):
    """A container whose blocks and snapshots are said by who opens it and not by an index."""

    def __init__(self, path: str | os.PathLike[str], patches: dict[int, int]) -> None:
        self._patches = patches
        self.path = os.fspath(path)
        self._fd = os.open(self.path, os.O_RDONLY)
        self.size = self.whole_end = os.fstat(self._fd).st_size
        self.torn_bytes = 0
        self.header = Header.read(self._bytes(0, Header.SIZE), self.path)
        self.blocks: list[BlockEntry] = []
        self.snapshots: list[RecordRef] = []
        self.segments: list[IndexSegment] = []


class LenientArchive(Archive):
    """Reads a snapshot's record though frame runs of it may lead nowhere: whoever reads frames
    asks `check_run` first.
    """

    def __init__(self, container: Container, book: str | os.PathLike[str] | None) -> None:
        super().__init__(container.path, book=book, container=container)
        # Runs may speak of blocks that are not known; memory is bounded by the allowance.
        self._history.max_cells = 1 << 40

    def _check_runs(self, record: SnapshotRecord, where: str) -> None:
        pass

    def embedded_book(self, wanted: str) -> OpenBook | None:
        """None for a damaged one too: the book may be found elsewhere."""
        try:
            return super().embedded_book(wanted)
        except DamagedError:
            return None


@dataclass
class Recovery:
    """A file that was opened as well as can be; close it, or use it as a context manager.

    ``archive`` reads it with flipped bits put right. ``error``: why it cannot be opened without
    that, None if it can. ``torn_bytes``, ``n_reachable``: bytes behind the last whole commit, and
    snapshots, that an ordinary reader finds. ``lost``: numbers of blocks of which nothing is known.
    ``counted``: those whose number and ids are not from an index. ``is_rebuilt``: the lists of
    blocks and snapshots are not those of the chain of indices.
    """

    survey: Survey
    archive: LenientArchive
    error: str | None
    torn_bytes: int
    n_reachable: int
    lost: set[int] = field(default_factory=set)
    counted: set[int] = field(default_factory=set)
    is_rebuilt: bool = False

    def __enter__(self) -> Recovery:
        return self

    def __exit__(self, *exc: object) -> None:
        self.archive.close()


def recover(
    path: str | os.PathLike[str], book: str | os.PathLike[str] | None = None
) -> Recovery:
    """Open the archive ``path``, whole or damaged.

    `DamagedError` if it is no archive or nothing of one is left, `UnsupportedError` for another
    version, `UsageError` for what is no file.
    """
    error, torn_bytes, n_reachable = None, 0, 0
    try:
        with Container(path) as ordinary:
            torn_bytes, n_reachable = ordinary.torn_bytes, len(ordinary.snapshots)
    except DamagedError as damaged:
        error = damaged
    found = survey(path)
    if error is not None and not found.records:
        raise error
    container: Container | None = None
    try:
        container = MendedContainer(path, found.patches)
    except DamagedError:
        pass
    text = None if error is None else str(error)
    if container is not None and not container.torn_bytes:
        archive = LenientArchive(container, book)
        return Recovery(found, archive, text, torn_bytes, n_reachable)
    rebuilt = _Rebuilder(path, found, book).run(text, torn_bytes, n_reachable)
    n_snapshots = len(rebuilt.archive)
    if error is not None and container is None and not n_snapshots:
        rebuilt.archive.close()
        raise error
    if container is None or n_snapshots > len(container.snapshots):
        if container is not None:
            container.close()
        return rebuilt
    # The end is an append that did not come far enough to be of use.
    rebuilt.archive.close()
    return Recovery(found, LenientArchive(container, book), text, torn_bytes, n_reachable)


class _Rebuilder:
    def __init__(
        self, path: str | os.PathLike[str], found: Survey, book: str | os.PathLike[str] | None
    ) -> None:
        self._found = found
        self._container = ListedContainer(path, found.patches)
        self._archive = LenientArchive(self._container, book)
        self._blocks: dict[int, BlockEntry] = {}
        self._snapshots: dict[int, RecordRef] = {}
        self._extras: dict[int, ExtraEntry] = {}
        self._records: list[SnapshotRecord] = []
        # Of each block and snapshot there is a record or a longer entry of an index.
        self._most = found.size // RecordHeader.SIZE
        self._counted: set[int] = set()
        # Blocks that no snapshot of another tier than ``tokens`` refers to: they have no chunks.
        self._absent: set[int] = set()

    def run(self, error: str | None, torn_bytes: int, n_reachable: int) -> Recovery:
        self._take_indices()
        self._take_extras()
        self._take_snapshots()
        n_blocks = self._count_blocks()
        listed = range(n_blocks)
        self._container.blocks[:] = [self._blocks.get(number, _MISSING) for number in listed]
        self._give_ids()
        lost = set(listed) - self._blocks.keys()
        return Recovery(
            self._found, self._archive, error, torn_bytes, n_reachable, lost, self._counted, True
        )

    # --- what says its number itself ----------------------------------------------------------

    def _take_indices(self) -> None:
        for record in self._of_type(INDEX):
            where = f"{self._container.path}: index at offset {record.offset}"
            payload = self._container.read(record.ref, INDEX)
            try:
                index = Index.read(payload, where, self._container.allowance())
            except DamagedError:
                continue
            # An index lists what stands before it; that of an archive within this one may not.
            n_listed = max(
                index.first_block + len(index.blocks), index.first_snapshot + len(index.snapshots)
            )
            if n_listed > self._most or any(
                ref.offset + ref.length > record.offset for ref in _refs(index)
            ):
                continue
            self._blocks |= dict(enumerate(index.blocks, index.first_block))
            self._snapshots |= dict(enumerate(index.snapshots, index.first_snapshot))
            self._extras |= {extra.ref.offset: extra for extra in index.extras}

    def _take_extras(self) -> None:
        for record in self._of_type(BASIS, BOOK, CODEBOOKS):
            extra = ExtraEntry(record.header.type, record.header.flags, record.ref)
            self._extras.setdefault(record.offset, extra)
        extras = tuple(self._extras[offset] for offset in sorted(self._extras))
        self._container.segments[:] = [IndexSegment(_NONE, 0, 0, extras)]

    def _take_snapshots(self) -> None:
        for record in self._of_type(SNAPSHOT):
            payload = self._container.read(record.ref, SNAPSHOT)
            number = ByteReader(payload, self._container.path).uvarint()
            if number < self._most:
                self._snapshots.setdefault(number, record.ref)
        n = 1 + max(self._snapshots, default=-1)
        listed = [self._snapshots.get(number, _NONE) for number in range(n)]
        self._container.snapshots[:] = listed
        for number in range(n):
            try:
                self._records.append(self._archive.record(number))
            except TscError:
                continue

    def _of_type(self, *types: int) -> Iterator[FoundRecord]:
        return (r for r in self._found.records if r.is_right and r.header.type in types)

    # --- blocks -------------------------------------------------------------------------------

    def _count_blocks(self) -> int:
        """Find the blocks that no index lists; returns how many blocks there are."""
        runs = [run for record in self._records for track in record.tracks for run in track.runs]
        known = 1 + max(self._blocks, default=-1)
        used: dict[int, int] = {}
        for run in runs:
            if run.block < self._most:
                used[run.block] = max(used.get(run.block, 0), run.first + run.count)
        n_blocks = max(known, 1 + max(used, default=-1))
        self._absent = self._numbers_of(TOKENS) - self._numbers_of(None)
        for stretch in self._stretches():
            found = stretch.numbered()
            found = {number: entry for number, entry in found.items() if number in used}
            if all(used[number] == entry.n_frames for number, entry in found.items()):
                self._blocks |= found
                self._counted |= found.keys()
        for number in self._absent - self._blocks.keys():
            if number in used:
                self._blocks[number] = BlockEntry(used[number], blocks.NO_ID, blocks.NO_ID, ())
                self._counted.add(number)
        return n_blocks

    def _numbers_of(self, tier: str | None) -> set[int]:
        """Blocks that snapshots of tier ``tokens`` refer to, or with None those of other tiers."""
        return {
            run.block
            for record in self._records if (record.tier == TOKENS) == (tier == TOKENS)
            for track in record.tracks for run in track.runs
        }  # fmt: skip

    def _stretches(self) -> Iterator[_Stretch]:
        """Chunks that no index lists, each stretch with the numbers that its blocks have.

        A stretch ends where one that is listed comes, or behind the snapshots of a commit, whose
        frame runs say how many blocks there are so far. Nothing is said of one whose snapshots do
        not follow those before it or cannot be read: others may have been between them.
        """
        listed = {c.ref.offset: n for n, entry in self._blocks.items() for c in entry.chunks}
        snapshots = {ref.offset: number for number, ref in self._snapshots.items()}
        highest = {
            record.number: max((run.block for t in record.tracks for run in t.runs), default=-1)
            for record in self._records
        }
        layered = any(len(record.layers) > 1 for record in self._records)
        stretch, last, reached = _Stretch(layered, first=True), -1, -1
        due: int | None = 0
        is_certain, is_behind, has_gap = True, False, False
        for offset, record in self._places():
            if offset in listed:
                if is_certain:
                    yield stretch.of(self._unknown(last + 1, listed[offset]))
                stretch, last = _Stretch(layered), listed[offset]
                reached, due = max(reached, last), None
                is_certain, is_behind, has_gap = True, False, False
            elif record is not None and record.header.type == SNAPSHOT:
                number = snapshots.get(offset, -1)
                is_certain &= number in highest and due in (None, number)
                reached, due = max(reached, highest.get(number, -1)), number + 1
                stretch.seal()
                if has_gap:
                    stretch.gap()
                is_behind, has_gap = True, False
            elif record is None and is_behind:
                has_gap = True
            elif record is None:
                stretch.gap()
            elif record.header.type != CHUNK:
                stretch.seal()
            else:
                if is_behind:
                    if is_certain:
                        yield stretch.of(self._unknown(last + 1, reached + 1))
                    stretch, last = _Stretch(layered), reached
                if has_gap:
                    stretch.gap()
                is_behind, has_gap = False, False
                stretch.add(self._chunk(record) if record.is_right else None)
        if is_certain and is_behind:
            yield stretch.of(self._unknown(last + 1, reached + 1))

    def _places(self) -> list[tuple[int, FoundRecord | None]]:
        """Records in the order of the file, None for bytes that are none."""
        places: dict[int, FoundRecord | None] = {r.offset: r for r in self._found.records}
        places |= {flaw.offset: None for flaw in self._found.flaws if flaw.kind == UNREADABLE}
        return sorted(places.items())

    def _unknown(self, start: int, stop: int) -> list[int]:
        known = self._blocks.keys() | self._absent
        return [number for number in range(start, stop) if number not in known]

    def _chunk(self, record: FoundRecord) -> tuple[ChunkHeader, ChunkEntry] | None:
        where = f"{self._container.path}: chunk at offset {record.offset}"
        try:
            header = ChunkHeader.read(ByteReader(self._container.read(record.ref, CHUNK), where))
        except DamagedError:
            return None
        entry = ChunkEntry(
            record.ref, record.header.payload_checksum, header.codec, header.quality_layer,
            header.first_tensor, len(header.row_bytes), header.raw_length,
        )  # fmt: skip
        return header, entry

    def _give_ids(self) -> None:
        """Ids of the blocks that were counted, and whether they are what snapshots say. That of a
        lossy block is of rows that nobody has: it stays zero."""
        waiting = set(self._counted)
        for record in self._records:
            where = f"{self._container.path}: snapshot {record.number}"
            for part in record.tracks:
                track, at = ArchivedTrack(self._archive, part, record), 0
                for run in part.runs:
                    if run.block in waiting:
                        try:
                            self._archive.check_run(run, at, part, record, where)
                            self._give_id(track, record, run, at)
                            waiting.discard(run.block)
                        except TscError:
                            pass
                    at += run.count
        for number in waiting:
            del self._blocks[number]
            self._counted.discard(number)
            self._container.blocks[number] = _MISSING

    def _give_id(
        self, track: ArchivedTrack, record: SnapshotRecord, run: FrameRun, start: int
    ) -> None:
        entry = self._blocks[run.block]
        content = entry.content_id
        if is_exact(entry):
            decoded = (track.exact_rows(run.block, chunk) for chunk in entry.layer(-1))
            content = blocks.content_id([part for rows in decoded for part in rows])
        logical = blocks.NO_ID
        if (run.first, run.count) == (0, entry.n_frames):
            seed = logical_seed(record.identity, track)
            span = (start, start + run.count)
            (logical,) = blocks.logical_ids(track.cells, track.tokens, seed, [span])
        made = BlockEntry(entry.n_frames, content, logical, entry.chunks)
        self._blocks[run.block] = self._container.blocks[run.block] = made


class _Stretch:
    """Blocks that follow one another in the file, with gaps where any number may be missing."""

    def __init__(self, layered: bool, *, first: bool = False) -> None:
        """``layered``: blocks may have several layers. ``first``: it is of the first commit, which
        alone may hold several snapshots."""
        self._is_layered, self._is_first = layered, first
        self._parts: list[list[list[tuple[ChunkHeader, ChunkEntry]]]] = [[]]
        self._numbers: Sequence[int] = ()
        self._is_sealed = True

    def seal(self) -> None:
        """Another record comes: the last block has no more chunks."""
        self._is_sealed = True

    def gap(self) -> None:
        if self._is_layered and not self._is_sealed:
            # Its finer layers may have been here. Tensors that are missing show by themselves.
            del self._parts[-1][-1:]
        self._parts.append([])
        self._is_sealed = True

    def add(self, chunk: tuple[ChunkHeader, ChunkEntry] | None) -> None:
        """The next chunk, None if it cannot be read."""
        self._is_sealed = False
        if chunk is None:
            self.gap()
        elif (chunk[0].quality_layer, chunk[0].first_tensor) == (0, 0):
            self._parts[-1].append([chunk])
        elif self._parts[-1]:
            self._parts[-1][-1].append(chunk)
        # Else its block began in a gap.

    def of(self, numbers: Sequence[int]) -> _Stretch:
        """``numbers``: those that the blocks of the stretch have, in order."""
        self._numbers = numbers
        return self

    def numbered(self) -> dict[int, BlockEntry]:
        """Blocks whose numbers are certain."""
        found = [block for part in self._parts for block in part]
        if len(found) != len(self._numbers) or (self._is_first and len(self._parts) > 1):
            # Snapshots of the first commit may have been lost, and what they alone say of.
            no_gaps = len(self._parts) == 1
            found = [] if no_gaps and len(found) < len(self._numbers) else self._parts[0]
        pairs = zip(self._numbers, found, strict=False)
        return {number: _entry(chunks) for number, chunks in pairs if _is_known(chunks)}


def _entry(chunks: Sequence[tuple[ChunkHeader, ChunkEntry]]) -> BlockEntry:
    entries = tuple(entry for _, entry in chunks)
    return BlockEntry(chunks[0][0].n_frames, blocks.NO_ID, blocks.NO_ID, entries)


def _is_known(chunks: Sequence[tuple[ChunkHeader, ChunkEntry]]) -> bool:
    return all(header.codec in _SELF_CONTAINED for header, _ in chunks)


def _refs(index: Index) -> Iterator[Any]:
    yield from (chunk.ref for block in index.blocks for chunk in block.chunks)
    yield from index.snapshots
    yield from (extra.ref for extra in index.extras)
