"""The bytes of a ``.tsc`` file: one class per structure, ``write`` beside ``read``.

``spec/tsc.md`` is the definition; this follows it field by field. Nothing here opens files.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..bytestream import Allowance, ByteReader, ByteWriter
from ..dtypes import dtype_from_ggml
from ..entropy import ints, zstd
from ..errors import DamagedError, TruncatedError, UnsupportedError
from ..model import CellTable, TensorSpec, tensor_runs
from .metadata import dictionary_of, read_metadata, write_metadata

Tokens = Callable[[], NDArray[np.int32]]

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
ID_BYTES = 16

# About what an item takes in memory once it is read; claimed before, see `Allowance`.
_REF_MEMORY, _CHUNK_MEMORY, _BLOCK_MEMORY, _EXTRA_MEMORY = 128, 320, 320, 192
_TENSOR_MEMORY = 192
_RUN_MEMORY, _TRACK_MEMORY, _OPAQUE_MEMORY = 160, 2048, 384
_TOKEN_MEMORY = 40

_STRUCTURE_LEVEL = 19


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
class BlockEntry:
    """A sealed run of frames: what identifies it and the chunks that hold it.

    ``content_id``: first 16 bytes of the BLAKE3 of all its rows, tensor after tensor, or, if no
    layer gives back the very rows, of its payloads; ``logical_id``: of its tokens and all before
    them (`tscfile.blocks.logical_ids`), or zeros. ``chunks``: layer after layer.
    """

    n_frames: int
    content_id: bytes
    logical_id: bytes
    chunks: tuple[ChunkEntry, ...]

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

    @classmethod
    def read(cls, reader: ByteReader) -> BlockEntry:
        n_frames = reader.uvarint(limit=MAX_BLOCK_FRAMES)
        if not n_frames:
            raise DamagedError(f"{reader.where}: a block without frames; damaged")
        content_id, logical_id = bytes(reader.take(ID_BYTES)), bytes(reader.take(ID_BYTES))
        n_chunks = reader.count(item_bytes=15, item_memory=_CHUNK_MEMORY)
        chunks = tuple(ChunkEntry.read(reader) for _ in range(n_chunks))
        return cls(n_frames, content_id, logical_id, chunks)


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
        blocks = [BlockEntry.read(reader) for _ in range(n_blocks)]
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


# --- snapshots --------------------------------------------------------------------------------


_ROLES = ("k", "v")
_EXT_CODED, _EXT_POSITION, _EXT_TOKEN = range(3)


@dataclass(frozen=True, slots=True)
class FrameRun:
    """Frames ``first`` to ``first + count`` of a block, in this order."""

    block: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids as a snapshot stores them: the first ``kept`` of its parent's, then ``count`` in
    ``data``; ``coding`` is one of `entropy.ints` or of `tscfile.tokens`."""

    kept: int
    count: int
    coding: int
    data: bytes

    def __len__(self) -> int:
        return self.kept + self.count

    def write(self, writer: ByteWriter) -> None:
        writer.uvarint(self.kept).uvarint(self.count)
        writer.u8(self.coding).uvarint(len(self.data)).raw(self.data)

    @classmethod
    def read(cls, reader: ByteReader, n_parent: int) -> TokenIds:
        """``n_parent``: how many tokens the parent has."""
        kept, count = reader.uvarint(limit=n_parent), reader.uvarint(limit=0x7FFFFFFF)
        reader.claim(_TOKEN_MEMORY * (kept + count))
        return cls(kept, count, reader.u8(), bytes(reader.take(reader.uvarint())))


@dataclass
class TrackRecord:
    """One track of a snapshot: its tensors, where its frames are, and who sits in its cells."""

    cache: int
    stream: int
    attributes: dict[str, Any]
    tensors: tuple[TensorSpec, ...]
    runs: tuple[FrameRun, ...]
    cells: CellTable

    def write(self, writer: ByteWriter, tokens: NDArray[np.int32]) -> None:
        writer.uvarint(self.cache).uvarint(self.stream)
        write_metadata(writer, self.attributes)
        _write_tensors(writer, self.tensors)
        writer.uvarint(len(self.runs))
        for run in self.runs:
            writer.uvarint(run.block).uvarint(run.first).uvarint(run.count)
        _write_cells(writer, self.cells, tokens)

    @classmethod
    def read(cls, reader: ByteReader, tokens: Tokens, max_cells: int) -> TrackRecord:
        cache, stream = reader.uvarint(limit=0xFFFF), reader.uvarint(limit=0xFFFF)
        attributes = read_metadata(reader)
        tensors = _read_tensors(reader)
        runs = []
        for _ in range(reader.count(item_bytes=3, item_memory=_RUN_MEMORY)):
            block, first = reader.uvarint(), reader.uvarint(limit=MAX_BLOCK_FRAMES)
            runs.append(FrameRun(block, first, reader.uvarint(limit=MAX_BLOCK_FRAMES)))
        n_cells = sum(run.count for run in runs)
        if n_cells > max_cells:
            raise DamagedError(f"{reader.where}: a track of more cells than the file has frames")
        cells = _read_cells(reader, n_cells, tokens)
        return cls(cache, stream, attributes, tensors, tuple(runs), cells)


def logical_seed(facts: dict[str, Any], track: Any) -> bytes:
    """What the logical ids of a track's blocks start from: model, cache, stream and tensors.

    ``facts``: the snapshot's identity, of which the label ``name`` says nothing about the state.
    """
    writer = ByteWriter()
    write_metadata(writer, {key: facts[key] for key in sorted(facts) if key != "name"})
    writer.uvarint(track.cache).uvarint(track.stream)
    _write_tensors(writer, track.tensors)
    return writer.bytes()


@dataclass(frozen=True, slots=True)
class OpaqueEntry:
    """Bytes of the source kept as they are, in a record of their own."""

    name: str
    ref: RecordRef
    raw_length: int
    content_id: bytes

    def write(self, writer: ByteWriter) -> None:
        writer.string(self.name)
        self.ref.write(writer)
        writer.uvarint(self.raw_length).raw(self.content_id)

    @classmethod
    def read(cls, reader: ByteReader) -> OpaqueEntry:
        name, ref, raw_length = reader.string(), RecordRef.read(reader), reader.uvarint()
        return cls(name, ref, raw_length, bytes(reader.take(ID_BYTES)))


@dataclass
class SnapshotRecord:
    """One save of the conversation. ``parent`` is the snapshot it was planned against, or None.

    ``coding``: what decoding needs beyond the file (``book``, its id) and what was promised.
    """

    number: int
    parent: int | None
    plan: str
    tier: str
    name: str
    source: dict[str, Any]
    identity: dict[str, Any]
    coding: dict[str, Any]
    ids: TokenIds
    tracks: list[TrackRecord]
    opaque: list[OpaqueEntry] = field(default_factory=list)

    @property
    def layers(self) -> list[str]:
        """Tiers of the quality layers, the base first; without layers the one tier there is."""
        names = self.coding.get("layers")
        known = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return list(names) if known and names else [self.tier]

    def structure(self, tokens: NDArray[np.int32]) -> bytes:
        """All but number, parent and ids, before it is compressed. ``tokens``: int32 ``[n]``, what
        ``ids`` stand for."""
        writer = ByteWriter().string(self.plan).string(self.tier).string(self.name)
        write_metadata(writer, self.source)
        write_metadata(writer, self.identity)
        write_metadata(writer, self.coding)
        writer.uvarint(len(self.tracks))
        for track in self.tracks:
            track.write(writer, tokens)
        writer.uvarint(len(self.opaque))
        for entry in self.opaque:
            entry.write(writer)
        return writer.bytes()

    def write(self, tokens: NDArray[np.int32], parent_structure: bytes) -> bytes:
        """``parent_structure``: what the parent's `structure` is, empty without one. Most of it
        holds for this snapshot too."""
        structure = self.structure(tokens)
        writer = ByteWriter().uvarint(self.number)
        writer.uvarint(0 if self.parent is None else self.parent + 1)
        self.ids.write(writer)
        dictionary = dictionary_of(parent_structure)
        packed = zstd.compress(structure, _STRUCTURE_LEVEL, dictionary)
        return writer.uvarint(len(structure)).raw(packed).bytes()

    @staticmethod
    def read_parent(data: memoryview, where: str) -> int | None:
        """The parent's number alone: it must be read first, for its structure."""
        reader = ByteReader(data, where)
        number, parent = reader.uvarint(), reader.uvarint()
        if parent > number:
            raise DamagedError(f"{where}: snapshot {number} names a parent that comes later")
        return parent - 1 if parent else None

    @classmethod
    def read(
        cls,
        data: memoryview,
        parent: SnapshotRecord | None,
        parent_structure: bytes,
        tokens_of: Callable[[TokenIds, dict[str, Any]], NDArray[np.int32]],
        max_cells: int,
        where: str,
        allowance: Allowance,
    ) -> tuple[SnapshotRecord, bytes]:
        """The record and its structure. ``tokens_of``: decodes ids, given the coding; called only
        if cells refer to them. ``max_cells``: the number of frames in all blocks."""
        start = ByteReader(data, where, allowance)
        number = start.uvarint()
        start.uvarint()
        ids = TokenIds.read(start, 0 if parent is None else len(parent.ids))
        length = start.uvarint(limit=MAX_CHUNK_BYTES)
        start.claim(2 * length)
        dictionary = dictionary_of(parent_structure)
        structure = zstd.decompress(start.take(start.remaining), length, where, dictionary)
        if len(structure) != length:
            raise DamagedError(f"{where}: its structure has the wrong size; damaged")
        reader = ByteReader(structure, where, allowance)
        plan, tier, name = reader.string(), reader.string(), reader.string()
        source, identity, coding = (read_metadata(reader) for _ in range(3))
        tokens = cache(lambda: tokens_of(ids, coding))
        n_tracks = reader.count(item_bytes=8, item_memory=_TRACK_MEMORY)
        tracks = [TrackRecord.read(reader, tokens, max_cells) for _ in range(n_tracks)]
        n_opaque = reader.count(item_bytes=20, item_memory=_OPAQUE_MEMORY)
        opaque = [OpaqueEntry.read(reader) for _ in range(n_opaque)]
        reader.end()
        if len({(track.cache, track.stream) for track in tracks}) < len(tracks):
            raise DamagedError(f"{where}: two tracks are the same cache and stream; damaged")
        if len({entry.name for entry in opaque}) < len(opaque):
            raise DamagedError(f"{where}: two opaque parts have the same name; damaged")
        record = cls(
            number, None if parent is None else parent.number, plan, tier, name, source, identity,
            coding, ids, tracks, opaque,
        )  # fmt: skip
        return record, structure


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many leading elements are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _write_tensors(writer: ByteWriter, tensors: Sequence[TensorSpec]) -> None:
    runs = tensor_runs(tensors)
    writer.uvarint(len(runs))
    for run in runs:
        first = run[0]
        writer.uvarint(first.layer).uvarint(len(run)).u8(_ROLES.index(first.role))
        writer.uvarint(first.dtype.ggml_id).uvarint(first.row_bytes).uvarint(first.rotation + 1)


def _read_tensors(reader: ByteReader) -> tuple[TensorSpec, ...]:
    tensors: list[TensorSpec] = []
    for _ in range(reader.count(item_bytes=6)):
        layer, count = reader.uvarint(limit=0xFFFF), reader.uvarint(limit=0xFFFF)
        role = reader.u8()
        dtype = dtype_from_ggml(reader.uvarint(limit=0xFFFF))
        row_bytes, rotation = reader.uvarint(limit=MAX_CHUNK_BYTES), reader.uvarint(limit=1 << 32)
        if role >= len(_ROLES) or row_bytes % dtype.block_bytes or not row_bytes:
            raise DamagedError(f"{reader.where}: a tensor's role or row length is wrong; damaged")
        reader.claim(count * _TENSOR_MEMORY)
        tensors += [
            TensorSpec(layer + i, _ROLES[role], dtype, row_bytes, rotation - 1)
            for i in range(count)
        ]
    return tuple(tensors)


def _write_cells(writer: ByteWriter, cells: CellTable, tokens: NDArray[np.int32]) -> None:
    ints.write(writer, cells.pos)
    ints.write(writer, cells.seq_counts)
    ints.write(writer, cells.seq_ids)
    writer.uvarint(cells.ext.shape[1])
    for column in cells.ext.T:
        if (column == cells.pos).all():
            writer.u8(_EXT_POSITION)
        elif (column == _token_at(cells.pos, tokens)).all():
            writer.u8(_EXT_TOKEN)
        else:
            writer.u8(_EXT_CODED)
            ints.write(writer, column)


def _read_cells(reader: ByteReader, n_cells: int, tokens: Tokens) -> CellTable:
    pos, seq_counts = ints.read(reader, n_cells), ints.read(reader, n_cells)
    n_ids = int(seq_counts.sum(dtype=np.int64))
    # A cell is shared by a handful of sequences; llama.cpp allows 256.
    if (seq_counts < 0).any() or n_ids > 256 * max(n_cells, 1):
        raise DamagedError(f"{reader.where}: {n_ids} sequence ids for {n_cells} cells; damaged")
    seq_ids = ints.read(reader, n_ids)
    n_columns = reader.uvarint(limit=16)
    reader.claim(4 * n_cells * n_columns)
    ext = np.empty((n_cells, n_columns), np.int32)
    for column in range(ext.shape[1]):
        coding = reader.u8()
        if coding == _EXT_POSITION:
            ext[:, column] = pos
        elif coding == _EXT_TOKEN:
            ext[:, column] = _token_at(pos, tokens())
        elif coding == _EXT_CODED:
            ext[:, column] = ints.read(reader, n_cells)
        else:
            raise DamagedError(f"{reader.where}: a cell column has unknown coding {coding}")
    return CellTable(pos, seq_counts, seq_ids, ext)


def _token_at(pos: NDArray[np.int32], tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """The token whose index is the cell's position, -1 where there is none."""
    found = np.full(len(pos), -1, np.int32)
    inside = (pos >= 0) & (pos < len(tokens))
    found[inside] = tokens[pos[inside]]
    return found
