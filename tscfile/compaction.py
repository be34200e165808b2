"""Write a long-lived archive again: without some snapshots, small blocks joined to full ones.

Nothing that is stored of what is kept changes: rows of exact layers are coded again from the very
rows, integers of a book's layers are carried over as they are, blocks of other codecs are copied.
Rows of lossy tiers are sums in floating point, whose last bits may differ in longer blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blocks, files, registry, temporal
from .archive import MAX_SOURCE_WAYS, Archive
from .archived_track import ArchivedTrack, is_absent
from .container.records import BASIS, BOOK, CODEBOOKS, BlockEntry, FrameRun, checksum
from .container.snapshots import (
    Context,
    SnapshotRecord,
    TokenIds,
    logical_seed,
)
from .container.writer import ContainerWriter, EncodedChunk
from .errors import DamagedError, UsageError
from .exact_coding import encode_exact
from .locking import locked
from .model import BLOCK_FRAMES
from .rewriting import Copier, all_tokens, nearest_kept, tokens_below

Progress = Callable[[int], None]


@dataclass(frozen=True)
class CompactReport:
    """What there was and what there is."""

    snapshots_before: int
    n_snapshots: int
    blocks_before: int
    n_blocks: int
    bytes_before: int
    file_bytes: int


def compact(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    drop: Collection[int] = (),
    tier: str | Sequence[str] | None = None,
    book: str | os.PathLike[str] | None = None,
    force: bool = False,
    wait: bool = True,
    progress: Progress | None = None,
) -> CompactReport:
    """Write the archive ``path`` again, to ``out`` or in its own place.

    ``drop``: numbers of snapshots to leave out, negative ones counted from the last; their frames
    go, as far as no other snapshot has them. Those that are left keep their order and are numbered
    anew. ``tier``: the one to put them into; all must be exact then. Otherwise none changes its
    tier. In its own place the new file takes the name once it is whole and synced; until then, and
    if anything is raised, the old one is there unchanged. Another writer is waited for, or with
    ``wait`` False refused with `TscError`. ``progress``: raw bytes of the frames that are done.

    >>> import tempfile, tscfile
    >>> path = tempfile.mkdtemp() + "/series.tsc"
    >>> saves = [f"samples/series/turn-{n}.kv" for n in range(1, 4)]
    >>> report = tscfile.pack(saves[0], path)
    >>> reports = [tscfile.append(save, path) for save in saves[1:]]
    >>> report = compact(path, drop=[0])
    >>> report.n_snapshots, report.n_blocks < report.blocks_before
    (2, True)
    """
    with locked(path, wait), Archive(path, book=book) as archive:
        if archive.torn_bytes:
            raise DamagedError(
                f"{archive.path}: the last {archive.torn_bytes} bytes are no whole commit; "
                "see tsc verify"
            )
        kept = _kept(archive, drop)
        # Where ``path`` is a link, the file that it leads to is written again, and the link stays.
        target, replaces = (os.path.realpath(path), True) if out is None else (out, force)
        if tier is not None:
            from .recoding import recode

            recode(
                archive, kept, Path(target), tier, book=book, force=replaces, progress=progress
            )
            with Archive(target, book=book) as made:
                return _report(archive, len(kept), len(made.container.blocks), made.size)
        with files.new_file(target, force=replaces) as fd:
            writer = ContainerWriter(fd)
            _Compactor(archive, writer, kept, progress).run()
            n_blocks = writer.n_blocks
            size = writer.commit()
        return _report(archive, len(kept), n_blocks, size)


def _report(archive: Archive, n_snapshots: int, n_blocks: int, size: int) -> CompactReport:
    return CompactReport(
        len(archive), n_snapshots, len(archive.container.blocks), n_blocks, archive.size, size
    )


def _kept(archive: Archive, drop: Collection[int]) -> list[int]:
    n = len(archive)
    for number in drop:
        if not -n <= number < n:
            raise UsageError(f"{archive.path}: no snapshot {number}; there are {n}, 0 to {n - 1}")
    dropped = {number % n for number in drop}
    kept = [number for number in range(n) if number not in dropped]
    if not kept:
        raise UsageError(f"{archive.path}: all snapshots are to be dropped; remove the file")
    return kept


class _Compactor:
    def __init__(
        self, archive: Archive, writer: ContainerWriter, kept: Sequence[int],
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self._archive, self._writer = archive, writer
        self._records = [archive.record(number) for number in kept]
        self._new_number = {number: i for i, number in enumerate(kept)}
        self._progress = progress or (lambda n: None)
        self._copier = Copier(archive, writer)
        # Of each old block the books that those name who read it, be it as a difference's source.
        self._users: dict[int, set[object]] = {}
        for record in self._records:
            used = [run.block for track in record.tracks for run in track.runs]
            for number in archive.with_sources(used):
                self._users.setdefault(number, set()).add(record.coding.get("book"))
        # Of each old block the new block and frame of each of its frames; -1: not placed yet.
        self._places: dict[int, NDArray[np.int64]] = {}
        # Of each new block that is a difference, `Archive.source_ways` of its sources.
        self._ways: dict[int, int] = {}

    def run(self) -> None:
        self._copy_extras()
        # The newest snapshots have the longest stretches of frames; older ones find theirs in them.
        tracks = [
            (ArchivedTrack(self._archive, part, record), record)
            for record in reversed(self._records) for part in record.tracks
        ]  # fmt: skip
        for track, record in tracks:
            self._place(track, record)
        # What is a difference comes behind what it is one to, as it did before.
        differences = {
            run.block: track for track, _ in tracks for run in track.runs
            if self._archive.block(run).sources
        }  # fmt: skip
        for number in sorted(differences):
            self._place_difference(differences[number], number)
        places: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []
        for record in self._records:
            parent = nearest_kept(self._archive, record, self._new_number)
            plans = [self._plan(part.runs) for part in record.tracks]
            places.append((_keys(plans), _positions(record)))
            plan = record.plan
            if record.parent is not None and record.parent not in self._new_number:
                plan = temporal.KEYFRAME
                if parent is not None:
                    plan = _name(*places[-1], *places[parent])
            ids, contexts = self._ids(record, parent)
            new = replace(
                record,
                head=replace(record.head, parent=parent, ids=ids, contexts=contexts),
                plan=plan,
                tracks=[
                    replace(part, runs=plan.runs(range(1, len(contexts) + 1)))
                    for part, plan in zip(record.tracks, plans, strict=True)
                ],
            )
            self._copier.snapshot(new, record.number)

    # --- snapshots ----------------------------------------------------------------------------

    def _ids(
        self, record: SnapshotRecord, parent: int | None
    ) -> tuple[TokenIds, tuple[Context, ...]]:
        """Tokens and contexts of a snapshot whose parent, in the new file, is ``parent``."""
        if record.parent is None or record.parent in self._new_number:
            return record.ids, record.head.contexts
        above = None if parent is None else self._records[parent]
        wanted = all_tokens(self._archive, record)
        return tokens_below(self._archive, record, wanted, above, self._archive.tokens)

    def _copy_extras(self) -> None:
        """Books and bases that what is kept needs, and whatever is not known here."""
        container = self._archive.container
        books = {record.coding.get("book") for record in self._records}
        bases = {ref for record in self._records for ref in self._archive.basis_records(record)}
        codebooks = {key for record in self._records for key in self._archive.codebooks(record)}

        def wanted(type_: int, ref: Any, payload: memoryview) -> bool:
            if type_ == BASIS:
                return ref in bases
            if type_ == CODEBOOKS:
                return checksum(payload) in codebooks
            return type_ != BOOK or bytes(payload[-32:]).hex() in books

        self._writer.copy_extras(container, wanted)

    # --- frames -------------------------------------------------------------------------------

    def _place(self, track: ArchivedTrack, record: SnapshotRecord) -> None:
        """Store the frames of a track that are not in the new file yet, but for differences."""
        new = self._plan(track.runs).block < 0
        at = 0
        for run in track.runs:
            if self._archive.block(run).sources:
                new[at : at + run.count] = False
            at += run.count
        for start, stop, runs in _pieces(track.runs, new, self._joins):
            self._store(track, record, start, stop, runs)

    def _place_difference(self, track: ArchivedTrack, number: int) -> None:
        """Store a block that is coded as a difference: as one if what it is one to is kept, or
        takes less than the block would by itself."""
        entry = self._archive.container.blocks[number]
        if self._is_placed(entry.sources):
            self._copy(track, number)
        else:
            chunks = encode_exact(track.block_rows(number), track.tensors, None, 0)
            for each in self._sources_to_keep(number, sum(len(chunk.body) for chunk in chunks)):
                self._copy(track, each)
            if self._is_placed(entry.sources):
                self._copy(track, number)
            else:
                self._put_alone(number, chunks)
        self._advance(track, entry.n_frames)

    def _sources_to_keep(self, number: int, n_bytes: int) -> list[int]:
        """Blocks that are not in the new file yet and that block ``number`` is a difference to, in
        order; none if they, with it, take ``n_bytes`` or more, or are there in part."""
        entries, found, level = self._archive.container.blocks, set[int](), {number}
        while level:
            runs = [run for each in level for run in entries[each].sources]
            level = {run.block for run in runs if not self._is_placed([run])} - found
            found |= level
        if any((self._places_of(each)[:, 0] >= 0).any() for each in found):
            return []
        taken = (chunk.ref.length for each in (*found, number) for chunk in entries[each].chunks)
        return sorted(found) if sum(taken) < n_bytes else []

    def _is_placed(self, runs: Sequence[FrameRun]) -> bool:
        return bool((self._plan(runs).block >= 0).all())

    def _copy(self, track: ArchivedTrack, number: int) -> None:
        """Copy a whole block behind what it is a difference to."""
        sources = self._plan(self._archive.container.blocks[number].sources)
        # The sources may be in more blocks than they were.
        ways = sum(1 + self._ways.get(each, 0) for each in set(sources.block.tolist()))
        if ways > MAX_SOURCE_WAYS:
            rows = track.block_rows(number)
            self._put_alone(number, encode_exact(rows, track.tensors, None, 0))
            return
        new = self._copier.block(number, sources=sources.runs())
        self._ways[new] = ways
        self._put(number, new)

    def _put_alone(self, number: int, chunks: Sequence[EncodedChunk]) -> None:
        """Store a block whose rows ``chunks`` hold by themselves."""
        entry = self._archive.container.blocks[number]
        self._put(number, self._writer.add_block(
            entry.n_frames, entry.content_id, entry.logical_id, chunks
        ))  # fmt: skip

    def _put(self, number: int, new: int) -> None:
        """The frames of a whole old block are those of block ``new``."""
        places = self._places_of(number)
        places[:, 0], places[:, 1] = new, np.arange(len(places))

    def _plan(self, runs: Sequence[FrameRun]) -> temporal.TrackPlan:
        """Where frames of the old file are in the new one, contexts as they are."""
        parts = [self._places_of(run.block)[run.first : run.first + run.count] for run in runs]
        places = np.concatenate([np.zeros((0, 2), np.int64), *parts])
        counts = [run.count for run in runs]
        columns = np.array([(run.context or temporal.OWN, run.shift) for run in runs], np.int64)
        context, shift = np.repeat(columns.reshape(-1, 2), counts, axis=0).T
        return temporal.TrackPlan(places[:, 0].copy(), places[:, 1].copy(), context, shift)

    def _places_of(self, number: int) -> NDArray[np.int64]:
        if number not in self._places:
            n = self._archive.container.blocks[number].n_frames
            self._places[number] = np.full((n, 2), -1, np.int64)
        return self._places[number]

    def _joins(self, run: FrameRun) -> object | None:
        """What the blocks that can be joined with that of ``run`` have in common; None if it is
        full already or of a codec whose blocks are copied."""
        entry = self._archive.block(run)
        codecs = tuple(
            tuple(sorted({chunk.codec for chunk in entry.layer(n)})) for n in range(entry.n_layers)
        )
        exact = {registry.RAW, registry.FIELDS_CLASSED_RANS, registry.BOOK_EXACT}
        joinable = exact | registry.BOOK_LOSSY
        if is_absent(entry) or any(codec not in joinable for each in codecs for codec in each):
            return None
        whole = (run.first, run.count) == (0, entry.n_frames)
        if whole and entry.n_frames >= BLOCK_FRAMES:
            return None
        users = frozenset(self._users[run.block])
        return users, *("exact" if set(each) <= exact else each for each in codecs)

    def _store(
        self, track: ArchivedTrack, record: SnapshotRecord, start: int, stop: int,
        runs: Sequence[FrameRun],
    ) -> None:  # fmt: skip
        """Put the cells ``start`` to ``stop``, which are ``runs``, into blocks."""
        first = runs[0]
        entry = self._archive.block(first)
        whole = len(runs) == 1 and (first.first, first.count) == (0, entry.n_frames)
        if whole or self._joins(first) is None:
            for number in dict.fromkeys(run.block for run in runs):
                if (self._places_of(number)[:, 0] < 0).all():
                    self._put(number, self._copier.block(number))
            self._advance(track, stop - start)
            return
        frame_bytes = max(sum(tensor.row_bytes for tensor in track.tensors), 1)
        n_frames = min(
            blocks.block_frames(track.tensors), max(blocks.MOST_CHUNK_BYTES // frame_bytes, 1)
        )
        ranges = list(blocks.block_ranges(start, stop, n_frames))
        seed = logical_seed(record.identity, track)
        ids = blocks.logical_ids(track.cells, track.tokens, seed, ranges)
        for (a, b), logical in zip(ranges, ids, strict=True):
            part = temporal.cut_runs(runs, a - start, b - start)
            content, chunks = self._join(track, entry, a, b, part)
            number = self._writer.add_block(b - a, content, logical, chunks)
            at = 0
            for run in part:
                places = self._places_of(run.block)[run.first : run.first + run.count]
                places[:, 0] = number
                places[:, 1] = np.arange(at, at + run.count)
                at += run.count
            self._advance(track, b - a)

    def _join(
        self, track: ArchivedTrack, like: BlockEntry, start: int, stop: int,
        runs: Sequence[FrameRun],
    ) -> tuple[bytes, list[EncodedChunk]]:  # fmt: skip
        """Content id and chunks of a block of the cells ``start`` to ``stop``."""
        chunks: list[EncodedChunk] = []
        n_lossy = sum(chunk.codec in registry.LOSSY for chunk in like.chunks)
        if n_lossy:
            parts = []
            for run in runs:
                lossy = self._archive.block(run).layer(n_lossy - 1)[0]
                where, payloads = track.lossy_payloads(run.block, lossy)
                parts.append((payloads, run.first, run.count))
            chunks = track.codec().join(parts, track.tensors, where)
        if n_lossy and n_lossy == like.n_layers:
            # The rows that these were made of are not known.
            return blocks.NO_ID, chunks
        rows, whole = track.read(start, stop), None
        entries = [self._archive.block(run) for run in runs]
        has_book = len(self._users[runs[0].block]) == 1 and "book" in track.coding
        if has_book and any(
            chunk.codec == registry.BOOK_EXACT for entry in entries for chunk in entry.chunks
        ):
            coder = track.codec().exact
            assert coder is not None
            whole = coder.encode(rows, track.tensors, track.context(start, stop))
        chunks += encode_exact(rows, track.tensors, whole, n_lossy)
        return blocks.content_id(rows), chunks

    def _advance(self, track: ArchivedTrack, n_frames: int) -> None:
        self._progress(n_frames * sum(tensor.row_bytes for tensor in track.tensors))


def _keys(plans: Sequence[temporal.TrackPlan]) -> NDArray[np.int64]:
    """A number for each frame of a snapshot, the same for one stored frame."""
    keys = [plan.block << 16 | plan.frame for plan in plans]
    return np.concatenate([np.zeros(0, np.int64), *keys])


def _positions(record: SnapshotRecord) -> NDArray[np.int32]:
    """Where those frames are."""
    parts = [track.cells.pos for track in record.tracks]
    return np.concatenate([np.zeros(0, np.int32), *parts])


def _name(
    keys: NDArray[np.int64], pos: NDArray[np.int32], old_keys: NDArray[np.int64],
    old_pos: NDArray[np.int32],
) -> str:  # fmt: skip
    """The word for a snapshot, given the frames of its parent."""
    shared, here, there = np.intersect1d(keys, old_keys, return_indices=True)
    n_moved = int((pos[here] != old_pos[there]).sum())
    return temporal.name_plan(len(shared) - n_moved, len(old_keys), n_moved)


def _pieces(
    runs: Sequence[FrameRun], new: NDArray[np.bool_], joins: Callable[[FrameRun], object | None]
) -> Iterator[tuple[int, int, list[FrameRun]]]:
    """Stretches of new cells to be stored together: start, stop and what they are."""
    at, start = 0, 0
    pending: list[FrameRun] = []
    kind: object | None = None
    for run in runs:
        for first, last in _true_ranges(new[at : at + run.count]):
            part = FrameRun(run.block, run.first + first, last - first)
            found = joins(part)
            adjoins = pending and start + sum(each.count for each in pending) == at + first
            if pending and (found is None or found != kind or not adjoins):
                yield start, start + sum(each.count for each in pending), pending
                pending = []
            if not pending:
                start, kind = at + first, found
            pending.append(part)
            if found is None:
                yield start, start + part.count, pending
                pending = []
        at += run.count
    if pending:
        yield start, start + sum(each.count for each in pending), pending


def _true_ranges(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
