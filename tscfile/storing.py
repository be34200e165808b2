"""Store a planned snapshot: its new frames, its opaque parts and its record."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import blocks, temporal, tokens, workers
from .archive import Archive
from .coding import Coding
from .container.records import (
    MAX_BLOCK_FRAMES,
    OpaqueEntry,
    SnapshotRecord,
    TrackRecord,
    logical_seed,
)
from .container.writer import ContainerWriter, EncodedChunk
from .entropy import zstd
from .exact_coding import encode_exact
from .model import Snapshot, Track
from .planning import Planned

Progress = Callable[[int], None]

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
    parent, before, structure = None, np.zeros(0, np.int32), b""
    if archive and planned.parent is not None:
        parent, structure = archive.record(planned.parent), archive.structure(planned.parent)
        if coding.facts() or not parent.coding:
            # An exact snapshot must not need the book that its parent's tokens are coded with.
            before = archive.tokens(planned.parent)
    for track, plan in zip(snapshot.tracks, planned.tracks, strict=True):
        _store_frames(writer, snapshot, track, plan, coding, progress)
    record = SnapshotRecord(
        number=writer.n_snapshots,
        parent=planned.parent,
        plan=planned.name,
        tier=coding.finest.name,
        name=name,
        source=snapshot.source,
        identity=snapshot.identity.facts,
        coding=coding.facts(),
        ids=tokens.encode(snapshot.tokens, before, coding.token_coder),
        tracks=[
            TrackRecord(
                track.cache, track.stream, track.attributes, tuple(track.tensors), plan.runs(),
                track.cells,
            )
            for track, plan in zip(snapshot.tracks, planned.tracks, strict=True)
        ],
        opaque=[
            _store_opaque(writer, key, content, parent) for key, content in snapshot.opaque.items()
        ],
    )  # fmt: skip
    ids = np.ascontiguousarray(snapshot.tokens, np.int32)
    return writer.add_snapshot(record.write(ids, structure))


def _store_frames(
    writer: ContainerWriter,
    snapshot: Snapshot,
    track: Track,
    plan: temporal.TrackPlan,
    coding: Coding,
    progress: Progress | None,
) -> None:
    finest, lossy = coding.finest, coding.lossy
    frame_bytes = sum(tensor.row_bytes for tensor in track.tensors)
    encode_whole = coding.exact.begin(snapshot, track) if coding.exact else None
    n_frames = MAX_BLOCK_FRAMES
    if encode_whole is not None or (lossy is not None and finest.codec is not None):
        n_frames = blocks.block_frames(track.tensors, lossy=True)
    if finest.exact:
        n_frames = min(n_frames, blocks.block_frames(track.tensors))
    if encode_whole is not None:
        # What is coded takes some ten times a block's size before it is coded.
        n_frames = max(1, min(n_frames, blocks.MOST_CHUNK_BYTES // frame_bytes))
    ranges = [part for span in plan.new_ranges() for part in blocks.block_ranges(*span, n_frames)]
    ids = blocks.logical_ids(
        track.cells, snapshot.tokens, logical_seed(snapshot.identity.facts, track), ranges
    )
    encode_lossy = lossy.begin(writer, snapshot, track, ranges) if lossy else None

    def encode(span: tuple[int, int]) -> tuple[bytes, list[EncodedChunk]]:
        if finest.codec is None:
            return blocks.NO_ID, []
        chunks = encode_lossy(span) if encode_lossy else []
        if not finest.exact:
            return blocks.opaque_id(*(c.header.write() + c.body for c in chunks)), chunks
        rows = track.read(*span)
        whole = encode_whole(span, rows) if encode_whole else None
        chunks += encode_exact(rows, track.tensors, whole, len(chunks))
        return blocks.content_id(rows), chunks

    encoded = workers.in_order(encode, ranges)
    for (start, stop), logical, (content, chunks) in zip(ranges, ids, encoded, strict=True):
        plan.store(start, stop, writer.add_block(stop - start, content, logical, chunks))
        if progress:
            progress((stop - start) * frame_bytes)


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
