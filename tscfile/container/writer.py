"""Write a container, or add a commit to one.

Order on disk is what makes a crash harmless: records first, synced, then the index and the trailer
that makes them count, synced. Until the new trailer is whole, the old one is the last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..bytestream import ByteWriter
from .reader import Container, IndexSegment
from .records import (
    BASIS,
    BOOK,
    CHUNK,
    CODEBOOKS,
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


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk ready to be stored."""

    header: ChunkHeader
    body: bytes


class ContainerWriter:
    """Adds records to an open file descriptor and seals them with `commit`.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     writer = ContainerWriter(file.fileno())
    ...     writer.commit()
    96
    """

    def __init__(self, fd: int, container: Container | None = None) -> None:
        """A new file, or behind the newest whole commit of ``container``, which is open at ``fd``.

        What lies behind that commit belongs to none and is cut off.
        """
        self._fd = fd
        # A new file counts from its rename on, and is synced once before that.
        self._durable = container is not None
        self._segments: list[IndexSegment] = []
        self._old_blocks: Sequence[BlockEntry] = ()
        self._old_snapshots: Sequence[RecordRef] = ()
        self._blocks: list[BlockEntry] = []
        self._snapshots: list[RecordRef] = []
        self._extras: tuple[ExtraEntry, ...] = ()
        if container is None:
            self._offset = 0
            self._write(Header().write())
        else:
            self._segments = list(container.segments)
            self._old_blocks = container.blocks
            self._old_snapshots = container.snapshots
            self._offset = container.whole_end
            os.ftruncate(fd, self._offset)

    @property
    def n_blocks(self) -> int:
        return len(self._old_blocks) + len(self._blocks)

    @property
    def n_snapshots(self) -> int:
        return len(self._old_snapshots) + len(self._snapshots)

    def add_block(
        self, n_frames: int, content_id: bytes, logical_id: bytes, chunks: Sequence[EncodedChunk],
        sources: Sequence[FrameRun] = (),
    ) -> int:  # fmt: skip
        """Store the chunks of one block; returns the block's number. ``sources``: of a block that
        is coded as a difference, the frames that it is one to."""
        entries = []
        for chunk in chunks:
            payload = chunk.header.write() + chunk.body
            ref = self._add_record(CHUNK, payload)
            entries.append(
                ChunkEntry(
                    ref, checksum(payload), chunk.header.codec, chunk.header.quality_layer,
                    chunk.header.first_tensor, len(chunk.header.row_bytes),
                    chunk.header.raw_length,
                )
            )  # fmt: skip
        self._blocks.append(
            BlockEntry(n_frames, content_id, logical_id, tuple(entries), tuple(sources))
        )
        return self.n_blocks - 1

    def add_opaque(self, body: bytes) -> RecordRef:
        return self._add_record(OPAQUE, body)

    def add_book(self, data: bytes) -> None:
        """Store a whole book. A reader may find it elsewhere, so it need not know the record."""
        self._add_extra(BOOK, data)

    def add_basis(self, payload: bytes) -> int:
        """Store a basis; returns its id, the checksum of its payload.

        Not critical: a reader that does not know it can still read what other codecs stored.
        """
        self._add_extra(BASIS, payload)
        return checksum(payload)

    def add_codebooks(self, payload: bytes) -> int:
        """Store codebooks; returns their id. Not critical, as a basis is not."""
        self._add_extra(CODEBOOKS, payload)
        return checksum(payload)

    def copy_extras(
        self, container: Container,
        wanted: Callable[[int, RecordRef, memoryview], bool] = lambda *extra: True,
    ) -> None:  # fmt: skip
        """Store what another file holds beside blocks and snapshots, of whatever type.

        ``wanted``: of a type, a record and its payload.
        """
        for extra in (each for segment in container.segments for each in segment.extras):
            payload = container.read(extra.ref, extra.type)
            if wanted(extra.type, extra.ref, payload):
                self._add_extra(extra.type, bytes(payload), extra.flags)

    def _add_extra(self, type_: int, payload: bytes, flags: int = 0) -> None:
        ref = self._add_record(type_, payload, flags)
        self._extras = (*self._extras, ExtraEntry(type_, flags, ref))

    def add_snapshot(self, payload: bytes) -> int:
        """Store a snapshot record; returns the snapshot's number."""
        self._snapshots.append(self._add_record(SNAPSHOT, payload))
        return self.n_snapshots - 1

    def commit(self) -> int:
        """Seal what was added; returns the size of the file.

        The new index takes in the indices before it that are no larger than itself, so that a file
        of n commits has a chain of log n indices and rewrites log n times its entries in all.
        """
        if self._durable:
            os.fsync(self._fd)
        n_blocks, n_snapshots = len(self._blocks), len(self._snapshots)
        extras = self._extras
        while self._segments:
            last = self._segments[-1]
            if last.n_blocks + last.n_snapshots > n_blocks + n_snapshots:
                break
            n_blocks, n_snapshots = n_blocks + last.n_blocks, n_snapshots + last.n_snapshots
            extras = last.extras + extras
            self._segments.pop()
        blocks = [*self._old_blocks, *self._blocks]
        snapshots = [*self._old_snapshots, *self._snapshots]
        first_block, first_snapshot = len(blocks) - n_blocks, len(snapshots) - n_snapshots
        previous = self._segments[-1].ref if self._segments else RecordRef(0, 0)
        index = Index(
            previous, first_block, blocks[first_block:], first_snapshot,
            snapshots[first_snapshot:], extras,
        )  # fmt: skip
        ref = self._add_record(INDEX, index.write())
        self._write(Trailer(ref.offset, ref.length).write(self._offset))
        if self._durable:
            os.fsync(self._fd)
        self._segments.append(IndexSegment(ref, n_blocks, n_snapshots, extras))
        self._old_blocks, self._old_snapshots = blocks, snapshots
        self._blocks, self._snapshots, self._extras = [], [], ()
        return self._offset

    def _add_record(self, type_: int, payload: bytes, flags: int = CRITICAL) -> RecordRef:
        offset = self._offset
        padding = RecordHeader.padding_at(offset, len(payload))
        header = RecordHeader(type_, flags, padding, len(payload), checksum(payload))
        length = RecordHeader.SIZE + padding + len(payload)
        writer = ByteWriter().raw(header.write()).raw(bytes(padding)).raw(payload)
        # The next record starts at a multiple of eight, which makes a lost one easy to look for.
        self._write(writer.raw(bytes(-(offset + length) % RECORD_ALIGNMENT)).bytes())
        return RecordRef(offset, length)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self._offset)
            self._offset += written
            view = view[written:]
