"""The bytes of a ``.tsc`` file: one class per structure, ``write`` beside ``read``.

``spec/tsc.md`` is the definition; this follows it field by field. Nothing here opens files. The
snapshot record has a module of its own, `snapshots`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import xxhash

from ..bytestream import Allowance, ByteReader, ByteWriter
from ..errors import DamagedError, TruncatedError, UnsupportedError
from ..registry import DIFFERENCE

VERSION = (1, 0)
KNOWN_FEATURES = 0
"""Required-feature bits that this build understands."""

CHUNK, OPAQUE, SNAPSHOT, INDEX, BASIS, BOOK, CODEBOOKS = 1, 2, 3, 4, 5, 6, 7
RECORD_NAMES = {
    CHUNK: "chunk", OPAQUE: "opaque", SNAPSHOT: "snapshot", INDEX: "index", BASIS: "basis",
    BOOK: "book", CODEBOOKS: "codebooks",
}  # fmt: skip
CRITICAL = 1

RECORD_ALIGNMENT = 8
PAYLOAD_ALIGNMENT = 64
ALIGNED_FROM = 4096
"""Payloads at least this long start at a multiple of `PAYLOAD_ALIGNMENT`."""

MAX_BLOCK_FRAMES = 1 << 16
MAX_CHUNK_BYTES = 1 << 30
MAX_CHUNK_TENSORS = 0xFFFF
MAX_LAYERS = 16
"""Quality layers of a block."""
MAX_CONTEXTS = 64
"""Contexts of a snapshot."""
ID_BYTES = 16

# About what an item takes in memory once it is read; claimed before, see `Allowance`.
_REF_MEMORY, _CHUNK_MEMORY, _BLOCK_MEMORY, _EXTRA_MEMORY = 128, 320, 320, 192
_RUN_MEMORY = 192

_MOST_SHIFT = 0xFFFFFFFF
"""Positions are integers of 32 bits."""


def checksum(data: bytes | memoryview | bytearray) -> int:
    """XXH3-64, seed 0."""
    return xxhash.xxh3_64_intdigest(data)


@dataclass(frozen=True)
class Header:
    """The first bytes of a file."""

    major: int = VERSION[0]
    minor: int = VERSION[1]
    required_features: int = 0
    optional_features: int = 0

    # A first byte outside ASCII, both line ends and an end-of-file mark: text-mode transfer
    # breaks at least one of them (the reasoning of PNG, RFC 2083 section 12.11).
    MAGIC: ClassVar[bytes] = b"\x89TSC\r\n\x1a\n"
    SIZE: ClassVar[int] = 32

    def write(self) -> bytes:
        start = self.MAGIC + struct.pack(
            "<HHIII", self.major, self.minor, self.required_features, self.optional_features, 0
        )
        return start + struct.pack("<Q", checksum(start))

    @classmethod
    def read(cls, data: bytes, where: str) -> Header:
        """Errors: not a tsc file, cut short, damaged, or a version or feature not known here."""
        if data[: len(cls.MAGIC)] != cls.MAGIC[: len(data)] or not data:
            raise DamagedError(f"{where}: not a tsc file: the first bytes are not its magic")
        if len(data) < cls.SIZE:
            raise TruncatedError(f"{where}: {len(data)} bytes are too few for a tsc header")
        major, minor, required, optional, _ = struct.unpack("<HHIII", data[8:24])
        if checksum(data[:24]) != struct.unpack("<Q", data[24:32])[0]:
            raise DamagedError(f"{where}: the header's checksum is wrong at offset 0")
        if major != VERSION[0]:
            raise UnsupportedError(
                f"{where}: format version {major}.{minor}; this build reads {VERSION[0]}.x"
            )
        if required & ~KNOWN_FEATURES:
            raise UnsupportedError(
                f"{where}: needs features {required & ~KNOWN_FEATURES:#x} that this build lacks"
            )
        return cls(major, minor, required, optional)


@dataclass(frozen=True)
class RecordHeader:
    """What stands before every payload."""

    type: int
    flags: int
    padding: int
    length: int
    payload_checksum: int

    SIZE: ClassVar[int] = 24

    def write(self) -> bytes:
        start = struct.pack("<BBH", self.type, self.flags, self.padding)
        end = struct.pack("<QQ", self.length, self.payload_checksum)
        return start + struct.pack("<I", checksum(start + end) & 0xFFFFFFFF) + end

    @classmethod
    def read(cls, data: bytes | memoryview, where: str) -> RecordHeader:
        if len(data) < cls.SIZE:
            raise TruncatedError(f"{where}: a record header is cut short")
        type_, flags, padding, check, length, payload = struct.unpack("<BBHIQQ", data[: cls.SIZE])
        if check != checksum(bytes(data[:4]) + bytes(data[8:24])) & 0xFFFFFFFF:
            raise DamagedError(f"{where}: a record header's checksum is wrong")
        return cls(type_, flags, padding, length, payload)

    @classmethod
    def padding_at(cls, offset: int, length: int) -> int:
        """Zero bytes between the header at ``offset`` and a payload of ``length`` bytes."""
        if length < ALIGNED_FROM:
            return 0
        return -(offset + cls.SIZE) % PAYLOAD_ALIGNMENT


@dataclass(frozen=True)
class Trailer:
    """The last bytes of a whole file: where the newest index is."""

    index_offset: int
    index_length: int

    MAGIC: ClassVar[bytes] = b"\x89TSCEND\n"
    SIZE: ClassVar[int] = 32

    def write(self, offset: int) -> bytes:
        start = struct.pack("<QQ", self.index_offset, self.index_length)
        # The trailer's own offset goes into its checksum, so that a trailer inside a payload
        # (an archive within an archive) is never taken for this file's.
        return start + struct.pack("<Q", checksum(start + struct.pack("<Q", offset))) + self.MAGIC

    @classmethod
    def read(cls, data: bytes | memoryview, offset: int) -> Trailer | None:
        """The trailer in these 32 bytes at ``offset`` of the file; None if they are not one."""
        if len(data) < cls.SIZE or bytes(data[24:32]) != cls.MAGIC:
            return None
        index_offset, index_length, check = struct.unpack("<QQQ", data[:24])
        if check != checksum(bytes(data[:16]) + struct.pack("<Q", offset)):
            return None
        return cls(index_offset, index_length)


@dataclass(frozen=True, slots=True)
class RecordRef:
    """Where a record starts and how many bytes it takes, header to end of payload."""

    offset: int
    length: int

    def write(self, writer: ByteWriter) -> None:
        writer.uvarint(self.offset).uvarint(self.length)

    @classmethod
    def read(cls, reader: ByteReader) -> RecordRef:
        return cls(reader.uvarint(), reader.uvarint())


@dataclass(frozen=True)
class ChunkHeader:
    """The first bytes of a chunk's payload: enough to decode it without any index.

    ``tensors`` are those of the track from ``first_tensor`` on, all of one element type.
    """

    codec: int
    quality_layer: int
    n_frames: int
    first_tensor: int
    dtype_id: int
    row_bytes: tuple[int, ...]

    @property
    def raw_length(self) -> int:
        return self.n_frames * sum(self.row_bytes)

    def write(self) -> bytes:
        writer = ByteWriter().u8(self.codec).u8(self.quality_layer).uvarint(self.n_frames)
        writer.uvarint(self.first_tensor).uvarint(self.dtype_id)
        runs = [(n, len(list(equal))) for n, equal in groupby(self.row_bytes)]
        writer.uvarint(len(runs))
        for row_bytes, count in runs:
            writer.uvarint(count).uvarint(row_bytes)
        return writer.bytes()

    @classmethod
    def read(cls, reader: ByteReader) -> ChunkHeader:
        codec, quality_layer = reader.u8(), reader.u8()
        n_frames = reader.uvarint(limit=MAX_BLOCK_FRAMES)
        first_tensor, dtype_id = reader.uvarint(), reader.uvarint(limit=0xFFFF)
        row_bytes: tuple[int, ...] = ()
        for _ in range(reader.count(item_bytes=2)):
            count = reader.uvarint(limit=MAX_CHUNK_TENSORS - len(row_bytes))
            row_bytes += count * (reader.uvarint(limit=MAX_CHUNK_BYTES),)
        header = cls(codec, quality_layer, n_frames, first_tensor, dtype_id, row_bytes)
        if not header.raw_length or header.raw_length > MAX_CHUNK_BYTES:
            raise DamagedError(f"{reader.where}: a chunk of {header.raw_length} raw bytes; damaged")
        return header


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """A chunk as the index names it."""

    ref: RecordRef
    payload_checksum: int
    codec: int
    quality_layer: int
    first_tensor: int
    n_tensors: int
    raw_length: int

    def write(self, writer: ByteWriter) -> None:
        self.ref.write(writer)
        writer.pack("Q", self.payload_checksum).u8(self.codec).u8(self.quality_layer)
        writer.uvarint(self.first_tensor).uvarint(self.n_tensors).uvarint(self.raw_length)

    @classmethod
    def read(cls, reader: ByteReader) -> ChunkEntry:
        ref = RecordRef.read(reader)
        (check,) = reader.unpack("Q")
        return cls(
            ref, check, reader.u8(), reader.u8(), reader.uvarint(), reader.uvarint(),
            reader.uvarint(limit=MAX_CHUNK_BYTES),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FrameRun:
    """Frames ``first`` to ``first + count`` of a block, in this order.

    ``context``: 0 if they are decoded at the positions of their cells from the snapshot's own
    tokens; else one of its contexts, counted from 1: they are decoded from its tokens, at positions
    less by ``shift``, and their keys then turned to those of the cells.
    """

    block: int
    first: int
    count: int
    context: int = 0
    shift: int = 0


def write_runs(writer: ByteWriter, runs: Sequence[FrameRun], contexts: bool = True) -> None:
    """A list of runs; without ``contexts`` all are of context 0."""
    writer.uvarint(len(runs))
    expected = 0
    for run in runs:
        writer.svarint(run.block - expected).uvarint(run.first).uvarint(run.count)
        expected = run.block + 1
        if contexts:
            writer.uvarint(run.context)
            if run.context:
                writer.svarint(run.shift)


def read_runs(reader: ByteReader, contexts: bool = True) -> tuple[FrameRun, ...]:
    """Undo `write_runs`."""
    runs: list[FrameRun] = []
    expected = 0
    for _ in range(reader.count(item_bytes=3 + contexts, item_memory=_RUN_MEMORY)):
        block = expected + reader.svarint()
        first, count = (reader.uvarint(limit=MAX_BLOCK_FRAMES) for _ in range(2))
        context = reader.uvarint(limit=MAX_CONTEXTS) if contexts else 0
        shift = reader.svarint() if context else 0
        if block < 0 or abs(shift) > _MOST_SHIFT:
            raise DamagedError(f"{reader.where}: a run of frames that cannot be; damaged")
        runs.append(FrameRun(block, first, count, context, shift))
        expected = block + 1
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """A sealed run of frames: what identifies it and the chunks that hold it.

    ``content_id``: first 16 bytes of the BLAKE3 of the rows that were packed, tensor after tensor,
    or zeros; ``logical_id``: of its tokens and all before them (`tscfile.blocks.logical_ids`), or
    zeros. ``chunks``: layer after layer. ``sources``: frames of earlier blocks, as many as there
    are here, that a chunk of codec 7 is the difference to.
    """

    n_frames: int
    content_id: bytes
    logical_id: bytes
    chunks: tuple[ChunkEntry, ...]
    sources: tuple[FrameRun, ...] = ()

    @property
    def n_layers(self) -> int:
        """How many quality layers there are."""
        return self.chunks[-1].quality_layer + 1 if self.chunks else 0

    def layer(self, number: int) -> tuple[ChunkEntry, ...]:
        """The chunks of one quality layer; negative numbers count from the last."""
        wanted = number % max(self.n_layers, 1)
        return tuple(chunk for chunk in self.chunks if chunk.quality_layer == wanted)

    def write(self, writer: ByteWriter) -> None:
        writer.uvarint(self.n_frames).raw(self.content_id).raw(self.logical_id)
        writer.uvarint(len(self.chunks))
        for chunk in self.chunks:
            chunk.write(writer)
        if _has_sources(self.chunks):
            write_runs(writer, self.sources, contexts=False)

    @classmethod
    def read(cls, reader: ByteReader, number: int) -> BlockEntry:
        """``number``: that of the block, all of whose sources come before it."""
        n_frames = reader.uvarint(limit=MAX_BLOCK_FRAMES)
        if not n_frames:
            raise DamagedError(f"{reader.where}: a block without frames; damaged")
        content_id, logical_id = bytes(reader.take(ID_BYTES)), bytes(reader.take(ID_BYTES))
        n_chunks = reader.count(item_bytes=15, item_memory=_CHUNK_MEMORY)
        chunks = tuple(ChunkEntry.read(reader) for _ in range(n_chunks))
        sources = read_runs(reader, contexts=False) if _has_sources(chunks) else ()
        fits = sum(run.count for run in sources) == n_frames or not _has_sources(chunks)
        if not fits or any(run.block >= number for run in sources):
            raise DamagedError(f"{reader.where}: block {number} has other sources; damaged")
        return cls(n_frames, content_id, logical_id, chunks, sources)


def _has_sources(chunks: Sequence[ChunkEntry]) -> bool:
    return any(chunk.codec == DIFFERENCE for chunk in chunks)


@dataclass(frozen=True, slots=True)
class ExtraEntry:
    """A record that belongs to no block or snapshot: a book, or one of a kind that this build does
    not know; `Index.read` says what becomes of those."""

    type: int
    flags: int
    ref: RecordRef

    def write(self, writer: ByteWriter) -> None:
        self.ref.write(writer.u8(self.type).u8(self.flags))

    @classmethod
    def read(cls, reader: ByteReader) -> ExtraEntry:
        return cls(reader.u8(), reader.u8(), RecordRef.read(reader))


@dataclass(frozen=True)
class Index:
    """What one commit added: its blocks and snapshots, and where the index before it is."""

    previous: RecordRef
    first_block: int
    blocks: Sequence[BlockEntry]
    first_snapshot: int
    snapshots: Sequence[RecordRef]
    extras: Sequence[ExtraEntry] = ()

    def write(self) -> bytes:
        writer = ByteWriter()
        self.previous.write(writer)
        writer.uvarint(self.first_block).uvarint(len(self.blocks))
        for block in self.blocks:
            block.write(writer)
        writer.uvarint(self.first_snapshot).uvarint(len(self.snapshots))
        for snapshot in self.snapshots:
            snapshot.write(writer)
        writer.uvarint(len(self.extras))
        for extra in self.extras:
            extra.write(writer)
        return writer.bytes()

    @classmethod
    def read(cls, data: memoryview, where: str, allowance: Allowance) -> Index:
        """`UnsupportedError` if the index names a record that must not be ignored and is not known
        here; one that may be ignored is kept among the extras, for a writer to carry on."""
        reader = ByteReader(data, where, allowance)
        previous = RecordRef.read(reader)
        first_block = reader.uvarint()
        n_blocks = reader.count(item_bytes=34, item_memory=_BLOCK_MEMORY)
        blocks = [BlockEntry.read(reader, first_block + i) for i in range(n_blocks)]
        first_snapshot = reader.uvarint()
        n_snapshots = reader.count(item_bytes=2, item_memory=_REF_MEMORY)
        snapshots = [RecordRef.read(reader) for _ in range(n_snapshots)]
        n_extras = reader.count(item_bytes=4, item_memory=_EXTRA_MEMORY)
        extras = [ExtraEntry.read(reader) for _ in range(n_extras)]
        reader.end()
        for extra in extras:
            if extra.flags & CRITICAL and extra.type not in RECORD_NAMES:
                raise UnsupportedError(
                    f"{where}: record type {extra.type} must be understood and this build does "
                    "not; a newer tscfile may"
                )
        return cls(previous, first_block, blocks, first_snapshot, snapshots, extras)
