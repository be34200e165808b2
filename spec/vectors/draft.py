"""A .tsc file made record by record, with the classes that tscfile writes records with.

`Draft` adds what it is given and checks nothing, so that it can make files that no writer makes;
checksums are always right for what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tscfile import blocks, tokens
from tscfile.container.records import (
    CHUNK,
    CRITICAL,
    INDEX,
    OPAQUE,
    RECORD_ALIGNMENT,
    SNAPSHOT,
    BlockEntry,
    ChunkEntry,
    ChunkHeader,
    ExtraEntry,
    FrameRun,
    Header,
    Index,
    OpaqueEntry,
    RecordHeader,
    RecordRef,
    SnapshotRecord,
    TrackRecord,
    Trailer,
    checksum,
)
from tscfile.container.writer import EncodedChunk
from tscfile.entropy import zstd
from tscfile.model import CellTable, TensorSpec

Structure = Callable[[bytes], bytes]


class EditedSnapshot(SnapshotRecord):
    """A snapshot record whose structure is changed before it is compressed."""

    edit: Structure

    def structure(self, tokens: NDArray[np.int32]) -> bytes:
        return self.edit(super().structure(tokens))


@dataclass
class Draft:
    """``data`` is the file so far; `commit` puts an index and a trailer behind it."""

    header: Header = field(default_factory=Header)
    blocks: list[BlockEntry] = field(default_factory=list)
    snapshots: list[RecordRef] = field(default_factory=list)
    extras: list[ExtraEntry] = field(default_factory=list)
    previous: RecordRef = field(default_factory=lambda: RecordRef(0, 0))
    n_listed: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        self.data = bytearray(self.header.write())

    def record(self, type_: int, payload: bytes, flags: int = CRITICAL) -> RecordRef:
        offset = len(self.data)
        padding = RecordHeader.padding_at(offset, len(payload))
        header = RecordHeader(type_, flags, padding, len(payload), checksum(payload))
        self.data += header.write() + bytes(padding) + payload
        length = len(self.data) - offset
        self.data += bytes(-len(self.data) % RECORD_ALIGNMENT)
        return RecordRef(offset, length)

    def chunk(self, chunk: EncodedChunk) -> ChunkEntry:
        """Store a chunk; what the index says of it."""
        head, payload = chunk.header, chunk.header.write() + chunk.body
        return ChunkEntry(
            self.record(CHUNK, payload), checksum(payload), head.codec, head.quality_layer,
            head.first_tensor, len(head.row_bytes), head.raw_length,
        )  # fmt: skip

    def block(self, chunks: Sequence[EncodedChunk], content_id: bytes) -> int:
        """Store a block; its number."""
        entries = tuple(self.chunk(chunk) for chunk in chunks)
        n_frames = chunks[0].header.n_frames
        self.blocks.append(
            BlockEntry(
                n_frames=n_frames, content_id=content_id, logical_id=blocks.NO_ID, chunks=entries
            )
        )
        return len(self.blocks) - 1

    def lossy_block(self, chunks: Sequence[EncodedChunk]) -> int:
        """A block without exact rows: named by its payloads."""
        payloads = [chunk.header.write() + chunk.body for chunk in chunks]
        return self.block(chunks, blocks.opaque_id(*payloads))

    def extra(self, type_: int, payload: bytes, flags: int = 0) -> int:
        """Store a record that belongs to no block; the checksum of its payload."""
        self.extras.append(ExtraEntry(type_, flags, self.record(type_, payload, flags)))
        return checksum(payload)

    def opaque(self, name: str, content: bytes) -> OpaqueEntry:
        ref = self.record(OPAQUE, zstd.compress(content))
        return OpaqueEntry(name, ref, len(content), blocks.opaque_id(content))

    def snapshot(
        self, record: SnapshotRecord, ids: NDArray[np.int32], parent_structure: bytes = b"",
        payload: Callable[[bytes], bytes] = bytes,
    ) -> bytes:  # fmt: skip
        """Store a snapshot of the tokens ``ids``; its structure. ``payload`` may change it."""
        written = payload(record.write(ids, parent_structure))
        self.snapshots.append(self.record(SNAPSHOT, written))
        return record.structure(ids)

    def commit(
        self, index: Callable[[Index, RecordRef], Index] = lambda index, own: index,
        payload: Callable[[bytes], bytes] = bytes,
    ) -> bytes:  # fmt: skip
        """The whole file; ``index`` and ``payload`` may change what is written of the index."""
        n_blocks, n_snapshots, n_extras = self.n_listed
        listed = Index(
            self.previous, n_blocks, self.blocks[n_blocks:], n_snapshots,
            self.snapshots[n_snapshots:], self.extras[n_extras:],
        )  # fmt: skip
        own = RecordRef(len(self.data), RecordHeader.SIZE)
        ref = self.record(INDEX, payload(index(listed, own).write()))
        self.data += Trailer(ref.offset, ref.length).write(len(self.data))
        self.previous = ref
        self.n_listed = len(self.blocks), len(self.snapshots), len(self.extras)
        return bytes(self.data)


def raw_chunk(rows: Sequence[NDArray[np.uint8]], dtype_id: int) -> EncodedChunk:
    """Rows of all tensors, uint8 ``[n, row_bytes]`` each, as they are."""
    header = ChunkHeader(0, 0, len(rows[0]), 0, dtype_id, tuple(part.shape[1] for part in rows))
    return EncodedChunk(header, b"".join(part.tobytes() for part in rows))


def track_record(
    tensors: Sequence[TensorSpec], runs: Sequence[tuple[int, int, int]], cells: CellTable,
    cache: int = 0,
) -> TrackRecord:  # fmt: skip
    """``runs``: block, first frame and count of each."""
    runs_ = tuple(FrameRun(*run) for run in runs)
    return TrackRecord(cache, 0, {}, tuple(tensors), runs_, cells)


def plain_cells(n: int) -> CellTable:
    """Positions 0, 1, 2, … of sequence 0."""
    pos, one = np.arange(n, dtype=np.int32), np.ones(n, np.int32)
    return CellTable(pos, one, 0 * one, np.zeros((n, 0), np.int32))


def snapshot_record(
    ids: NDArray[np.int32], tracks: list[TrackRecord], **facts: Any
) -> SnapshotRecord:
    """``facts``: fields of the record beside number 0 without a parent, and ``before``: the tokens
    of the parent."""
    before = facts.pop("before", ids[:0])
    usual: dict[str, Any] = {
        "number": 0, "parent": None, "plan": "keyframe", "tier": "lossless", "name": "",
        "source": {"format": "example"}, "identity": {"architecture": "toy"}, "coding": {},
        "ids": tokens.encode(ids, before, None),
    }  # fmt: skip
    return SnapshotRecord(**(usual | {"tracks": tracks} | facts))
