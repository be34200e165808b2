"""Store a planned snapshot: its new frames, its opaque parts and its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import blocks, tokens, workers
from .archive import MAX_SOURCE_WAYS, Archive
from .archived_track import ArchivedTrack
from .coding import Coding
from .container.records import MAX_BLOCK_FRAMES, FrameRun
from .container.snapshots import (
    Context,
    OpaqueEntry,
    SnapshotHead,
    SnapshotRecord,
    TrackRecord,
    dictionary_for,
    logical_seed,
)
from .container.writer import ContainerWriter, EncodedChunk
from .entropy import zstd
from .exact_coding import encode_difference, encode_exact
from .model import Snapshot, Track
from .planning import Planned
from .temporal import TrackPlan, cut_runs

Progress = Callable[[int], None]
Rows = NDArray[np.uint8]
Span = tuple[int, int]

_MOST_DENSE = 4 << 20
"""Opaque bytes that may be packed to less than half."""


def store(
    writer: ContainerWriter,
    snapshot: Snapshot,
    planned: Planned,
    coding: Coding,
    name: str,
    archive: Archive | None,
    progress: Progress | None,
) -> int:
    """Add the missing blocks and the snapshot record; returns the snapshot's number."""
    parent, before, dictionary, like = None, np.zeros(0, np.int32), None, b""
    contexts: tuple[Context, ...] = ()
    if archive and planned.parent is not None:
        parent = archive.record(planned.parent)
        if coding.facts() or not parent.coding:
            # An exact snapshot must not need the book that its parent's tokens are coded with.
            before = archive.tokens(planned.parent)
        dictionary = dictionary_for(planned.parent, lambda number: archive.head(number).parent)
        like = b"" if dictionary is None else archive.structure(dictionary)
        contexts = _contexts(archive, snapshot, planned)
    for track, plan, old in zip(snapshot.tracks, planned.tracks, planned.old, strict=True):
        _FrameStore(writer, snapshot, track, plan, old, coding).run(progress)
    ids = tokens.encode(snapshot.tokens, before, coding.token_coder)
    facts = coding.facts()
    if planned.max_delta_error is not None:
        # Its last places differ from machine to machine.
        facts["max_delta_error"] = round(planned.max_delta_error, 4)
    record = SnapshotRecord(
        head=SnapshotHead(writer.n_snapshots, planned.parent, dictionary, ids, contexts),
        plan=planned.name,
        tier=coding.finest.name,
        name=name,
        source=snapshot.source,
        identity=snapshot.identity.facts,
        coding=facts,
        tracks=[
            TrackRecord(
                track.cache, track.stream, track.attributes, tuple(track.tensors),
                plan.runs(planned.contexts), track.cells,
            )
            for track, plan in zip(snapshot.tracks, planned.tracks, strict=True)
        ],
        opaque=[
            _store_opaque(writer, key, content, parent) for key, content in snapshot.opaque.items()
        ],
    )  # fmt: skip
    structure = record.structure(np.ascontiguousarray(snapshot.tokens, np.int32))
    return writer.add_snapshot(record.write(structure, like))


def _contexts(archive: Archive, snapshot: Snapshot, planned: Planned) -> tuple[Context, ...]:
    """The parent's contexts that frames are decoded from, as far as they are."""
    assert planned.parent is not None
    found = []
    for number in planned.contexts:
        known = archive.tokens(planned.parent, number)
        last = max(
            int((track.cells.pos - plan.shift)[plan.context == number].max(initial=-1))
            for track, plan in zip(snapshot.tracks, planned.tracks, strict=True)
        )
        found.append(Context(number, tokens.encode(known[: last + 1], known, None)))
    return tuple(found)


@dataclass
class _FrameStore:
    """Stores the frames of a track that its plan takes from nowhere. ``old``: the track of the
    parent that they may be differences to."""

    writer: ContainerWriter
    snapshot: Snapshot
    track: Track
    plan: TrackPlan
    old: ArchivedTrack | None
    coding: Coding

    def __post_init__(self) -> None:
        exact, self._lossy = self.coding.exact, self.coding.lossy
        self._whole = exact.begin(self.snapshot, self.track) if exact else None
        self._frame_bytes = sum(tensor.row_bytes for tensor in self.track.tensors)

    def run(self, progress: Progress | None) -> None:
        track, plan = self.track, self.plan
        ranges = list(self._ranges())
        seed = logical_seed(self.snapshot.identity.facts, track)
        ids = blocks.logical_ids(track.cells, self.snapshot.tokens, seed, ranges)
        encode_lossy = None
        if self._lossy:
            encode_lossy = self._lossy.begin(self.writer, self.snapshot, track, ranges)

        def encode(span: Span) -> tuple[bytes, list[EncodedChunk], Sequence[FrameRun]]:
            if self.coding.finest.codec is None:
                return blocks.NO_ID, [], ()
            rows = track.read(*span)
            chunks = encode_lossy(span) if encode_lossy else []
            sources: Sequence[FrameRun] = ()
            if self.coding.finest.exact:
                whole = self._whole(span, rows) if self._whole else None
                exact = encode_exact(rows, track.tensors, whole, len(chunks))
                exact, sources = self._or_difference(span, rows, exact)
                chunks += exact
            return blocks.content_id(rows), chunks, sources

        encoded = workers.in_order(encode, ranges)
        for (start, stop), logical, (content, chunks, sources) in zip(
            ranges, ids, encoded, strict=True
        ):
            number = self.writer.add_block(stop - start, content, logical, chunks, sources)
            plan.store(start, stop, number)
            if progress:
                progress((stop - start) * self._frame_bytes)

    def _ranges(self) -> list[Span]:
        """Blocks to be stored."""
        tensors, finest = self.track.tensors, self.coding.finest
        n_frames = MAX_BLOCK_FRAMES
        if self._whole is not None or (self._lossy is not None and finest.codec is not None):
            n_frames = blocks.block_frames(tensors, lossy=True)
        if finest.exact:
            n_frames = min(n_frames, blocks.block_frames(tensors))
        # What is coded takes some ten times a block's size before it is coded.
        n_whole = max(1, min(n_frames, blocks.MOST_CHUNK_BYTES // max(self._frame_bytes, 1)))
        return [
            part for start, stop in self.plan.new_ranges()
            for part in blocks.block_ranges(
                start, stop,
                n_whole if self._whole or self.plan.base[start] >= 0 else n_frames,
            )
        ]  # fmt: skip

    def _or_difference(
        self, span: Span, rows: Sequence[Rows], chunks: list[EncodedChunk]
    ) -> tuple[list[EncodedChunk], Sequence[FrameRun]]:
        """The chunks, or if that is smaller the difference to frames of the parent, and which."""
        start, stop = span
        first = int(self.plan.base[start])
        if first < 0 or self.old is None:
            return chunks, ()
        sources = cut_runs(self.old.runs, first, first + stop - start)
        if self.old.archive.source_ways(sources) > MAX_SOURCE_WAYS:
            return chunks, ()
        base = self.old.read(first, first + stop - start)
        shift = int(self.plan.moved[start])
        made = encode_difference(
            rows, base, self.track.tensors, self.snapshot.identity, shift, chunks
        )
        if made is None:
            return chunks, ()
        return [made], sources


def _store_opaque(
    writer: ContainerWriter, name: str, content: bytes, parent: SnapshotRecord | None
) -> OpaqueEntry:
    """Bytes that the parent has too are not stored again."""
    content_id = blocks.opaque_id(content)
    for entry in parent.opaque if parent else ():
        if (entry.content_id, entry.raw_length) == (content_id, len(content)):
            return OpaqueEntry(name, entry.ref, entry.raw_length, content_id)
    body = zstd.compress(content)
    if len(content) > _MOST_DENSE and len(content) > 2 * len(body):
        # Readers do not unpack a large part from a small record.
        body = zstd.store(content)
    ref = writer.add_opaque(body)
    return OpaqueEntry(name, ref, len(content), content_id)
