"""Copy parts of one archive into another, as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from . import blocks, tokens
from .archive import Archive
from .bytestream import ByteReader
from .container.records import (
    OPAQUE,
    ChunkHeader,
    FrameRun,
    RecordRef,
    SnapshotRecord,
    TokenIds,
)
from .container.writer import ContainerWriter, EncodedChunk

Progress = Callable[[int], None]


class Copier:
    """Copies blocks and snapshots of ``archive`` to ``writer``. ``progress`` is called with the
    bytes of each chunk that is copied."""

    def __init__(
        self, archive: Archive, writer: ContainerWriter, progress: Progress | None = None
    ) -> None:
        self._archive, self._writer = archive, writer
        self._progress = progress or (lambda n: None)
        self._opaque: dict[int, RecordRef] = {}
        self._structures: list[bytes] = []

    def block(self, number: int, n_layers: int | None = None) -> int:
        """Copy a block, or its first ``n_layers`` quality layers; returns its new number."""
        entry = self._archive.container.blocks[number]
        wanted = [
            chunk for chunk in entry.chunks
            if n_layers is None or chunk.quality_layer < n_layers
        ]  # fmt: skip
        chunks, payloads = [], []
        for chunk in wanted:
            where, payload = self._archive.chunk_payload(number, chunk)
            reader = ByteReader(payload, where)
            header = ChunkHeader.read(reader)
            chunks.append(EncodedChunk(header, bytes(reader.take(reader.remaining))))
            payloads.append(payload)
            self._progress(len(payload))
        content_id = entry.content_id
        if len(wanted) < len(entry.chunks):
            # Only the last layer can be exact, so what is left of a block with fewer is lossy.
            content_id = blocks.opaque_id(*payloads) if chunks else blocks.NO_ID
        return self._writer.add_block(entry.n_frames, content_id, entry.logical_id, chunks)

    def snapshot(self, record: SnapshotRecord, original: int) -> None:
        """Add ``record``, made of snapshot ``original``, whose opaque parts are copied. Its parent
        is one that was added before."""
        opaque = []
        for entry in record.opaque:
            offset = entry.ref.offset
            if offset not in self._opaque:
                body = bytes(self._archive.container.read(entry.ref, OPAQUE))
                self._opaque[offset] = self._writer.add_opaque(body)
            opaque.append(replace(entry, ref=self._opaque[offset]))
        record = replace(record, opaque=opaque)
        before = b"" if record.parent is None else self._structures[record.parent]
        # Tokens say something of a cell only where it has columns of its own.
        has_columns = any(track.cells.ext.shape[1] for track in record.tracks)
        ids = self._archive.tokens(original) if has_columns else np.zeros(0, np.int32)
        self._structures.append(record.structure(ids))
        self._writer.add_snapshot(record.write(ids, before))


def nearest_kept(
    archive: Archive, record: SnapshotRecord, new_numbers: Mapping[int, int]
) -> int | None:
    """The new number of the nearest ancestor that is kept; ``new_numbers``: of all that are."""
    ancestor = record.parent
    while ancestor is not None and ancestor not in new_numbers:
        ancestor = archive.record(ancestor).parent
    return None if ancestor is None else new_numbers[ancestor]


def token_ids(
    archive: Archive, record: SnapshotRecord, ids: NDArray[np.int32],
    parent: SnapshotRecord | None, tokens_of: Callable[[int], NDArray[np.int32]],
) -> TokenIds:  # fmt: skip
    """``ids`` int32 ``[n]`` as ``record`` stores them below another ``parent``. ``tokens_of``:
    those of a snapshot by the number that its record has."""
    before = np.zeros(0, np.int32)
    # As when it was appended: an exact snapshot needs no book for its parent's tokens.
    if parent is not None and (record.coding or not parent.coding):
        before = tokens_of(parent.number)
    coder = archive.token_coder(record) if "book" in record.coding else None
    return tokens.encode(ids, before, coder)


def cut_runs(runs: Sequence[FrameRun], start: int, stop: int) -> list[FrameRun]:
    """Frames ``start`` to ``stop`` of those that ``runs`` are together."""
    found, at = [], 0
    for run in runs:
        first, last = max(start - at, 0), min(stop - at, run.count)
        if first < last:
            found.append(FrameRun(run.block, run.first + first, last - first))
        at += run.count
    return found
