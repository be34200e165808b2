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

from tscfile import tokens
from tscfile.blocks import NO_ID, opaque_id
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
    RecordHeader,
    RecordRef,
    Trailer,
    checksum,
)
from tscfile.container.snapshots import (
    OpaqueEntry,
    SnapshotHead,
    SnapshotRecord,
    TrackRecord,
)
from tscfile.container.writer import EncodedChunk
from tscfile.entropy import zstd
from tscfile.model import CellTable, TensorSpec

Structure = Callable[[bytes], bytes]


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

    def block(
        self, chunks: Sequence[EncodedChunk], content_id: bytes = NO_ID,
        sources: Sequence[FrameRun] = (),
    ) -> int:  # fmt: skip
        """Store a block, as a rule one whose packed rows are known; its number."""
        entries = tuple(self.chunk(chunk) for chunk in chunks)
        n_frames = chunks[0].header.n_frames
        self.blocks.append(
            BlockEntry(n_frames, content_id, NO_ID, entries, tuple(sources))
        )
        return len(self.blocks) - 1

    def extra(self, type_: int, payload: bytes, flags: int = 0) -> int:
        """Store a record that belongs to no block; the checksum of its payload."""
        self.extras.append(ExtraEntry(type_, flags, self.record(type_, payload, flags)))
        return checksum(payload)

    def opaque(self, name: str, content: bytes) -> OpaqueEntry:
        ref = self.record(OPAQUE, zstd.compress(content))
        return OpaqueEntry(name, ref, len(content), opaque_id(content))

    def snapshot(
        self, record: SnapshotRecord, ids: NDArray[np.int32], like: bytes = b"",
        payload: Callable[[bytes], bytes] = bytes, edit: Structure = bytes,
    ) -> bytes:  # fmt: skip
        """Store a snapshot of the tokens ``ids``, whose dictionary is the structure ``like``; its
        structure. ``edit`` may change that, ``payload`` the whole record."""
        structure = edit(record.structure(ids))
        self.snapshots.append(self.record(SNAPSHOT, payload(record.write(structure, like))))
        return structure

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
    tensors: Sequence[TensorSpec], runs: Sequence[tuple[int, ...]], cells: CellTable,
    cache: int = 0,
) -> TrackRecord:  # fmt: skip
    """``runs``: block, first frame and count of each, and perhaps context and shift."""
    runs_ = tuple(FrameRun(*run) for run in runs)
    return TrackRecord(cache, 0, {}, tuple(tensors), runs_, cells)


def plain_cells(n: int) -> CellTable:
    """Positions 0, 1, 2, … of sequence 0."""
    pos, one = np.arange(n, dtype=np.int32), np.ones(n, np.int32)
    return CellTable(pos, one, 0 * one, np.zeros((n, 0), np.int32))


def snapshot_record(
    ids: NDArray[np.int32], tracks: list[TrackRecord], **facts: Any
) -> SnapshotRecord:
    """``facts``: fields of the record and of its head beside number 0 without a parent or with that
    as dictionary, and ``before``: the tokens of the parent."""
    before = facts.pop("before", ids[:0])
    parent = facts.pop("parent", None)
    head = SnapshotHead(
        facts.pop("number", 0), parent, facts.pop("dictionary", parent),
        facts.pop("ids", None) or tokens.encode(ids, before, None), facts.pop("contexts", ()),
    )  # fmt: skip
    usual: dict[str, Any] = {
        "plan": "keyframe", "tier": "lossless", "name": "", "source": {"format": "example"},
        "identity": {"architecture": "toy"}, "coding": {},
    }  # fmt: skip
    return SnapshotRecord(head, **(usual | {"tracks": tracks} | facts))
