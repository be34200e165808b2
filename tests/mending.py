"""Files with something wrong in them and every checksum, length and reference right."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import zstandard
from blake3 import blake3

from tscfile.books import book as books
from tscfile.bytestream import Allowance, ByteReader, ByteWriter
from tscfile.container.metadata import dictionary_of
from tscfile.container.reader import Container
from tscfile.container.records import (
    CHUNK,
    INDEX,
    RECORD_ALIGNMENT,
    SNAPSHOT,
    BlockEntry,
    ExtraEntry,
    Header,
    Index,
    RecordHeader,
    RecordRef,
    Trailer,
    checksum,
)
from tscfile.container.snapshots import SnapshotHead
from tscfile.entropy import zstd
from tscfile.errors import TscError

Edit = Callable[[int, bytes], bytes]
"""What becomes of a payload, given its record's type."""

_PLENTY = 1 << 40


# --- parts of a snapshot's payload ---------------------------------------------------------------


def ids_of(payload: bytes) -> bytes:
    """The head, which stands before the structure."""
    reader = ByteReader(payload, "test", Allowance(_PLENTY))
    SnapshotHead.read(reader)
    return payload[: len(payload) - reader.remaining]


def structure_of(payload: bytes, like: bytes = b"") -> bytes:
    """``like``: the structure of the dictionary, empty without one."""
    reader = ByteReader(payload[len(ids_of(payload)) :], "test")
    length = reader.uvarint()
    return zstd.decompress(reader.take(reader.remaining), length, "test", dictionary_of(like))


def packed(structure: bytes, like: bytes = b"") -> bytes:
    """A structure as the payload of a snapshot ends with it."""
    frame = zstd.compress(structure, 19, dictionary_of(like))
    return ByteWriter().uvarint(len(structure)).raw(frame).bytes()


# --- archives ------------------------------------------------------------------------------------


def rewritten(source: Path, path: Path, edit: Edit) -> None:
    """The archive with the payloads of chunks and snapshots changed to others of their length."""
    data = bytearray(source.read_bytes())
    with Container(source) as container:
        index = container.segments[-1].ref
        places = [(SNAPSHOT, ref) for ref in container.snapshots]
        places += [(CHUNK, chunk.ref) for block in container.blocks for chunk in block.chunks]
        sums = {}
        for type_, ref in places:
            before = bytes(container.read(ref, type_))
            payload = edit(type_, before)
            assert len(payload) == len(before)
            sums[checksum(before)] = _put(data, ref.offset, payload)
        payload = bytes(data[index.offset + RecordHeader.SIZE : index.offset + index.length])
    for before, after in sums.items():
        payload = payload.replace(before.to_bytes(8, "little"), after.to_bytes(8, "little"))
    _put(data, index.offset, payload)
    path.write_bytes(data)


def _put(data: bytearray, offset: int, payload: bytes) -> int:
    header = RecordHeader.read(bytes(data[offset : offset + RecordHeader.SIZE]), "here")
    found = replace(header, payload_checksum=checksum(payload))
    data[offset : offset + RecordHeader.SIZE] = found.write()
    start = offset + RecordHeader.SIZE + header.padding
    data[start : start + len(payload)] = payload
    return found.payload_checksum


@dataclass
class Rebuilt:
    """An archive put together anew, record by record, while some payloads change, also in length.

    What refers to a record by place or checksum is made to refer to what it became. Bytes that are
    no record, and an index or a structure that cannot be read, stay as they are.
    """

    data: bytes
    out: bytearray = field(default_factory=bytearray)
    refs: dict[RecordRef, RecordRef] = field(default_factory=dict)
    sums: dict[bytes, bytes] = field(default_factory=dict)
    structures: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)

    def types(self) -> list[int]:
        """Types of the records, in order."""
        return [header.type for _, header in self._records()]

    def write(self, edit: Callable[[int, int, bytes], bytes]) -> bytes:
        """``edit(number, type, payload)``: the new payload of the record with this number. A
        snapshot's is its ids and its structure, not compressed."""
        self.out = bytearray(self.data[: Header.SIZE])
        stop = Header.SIZE
        for number, (at, header) in enumerate(self._records()):
            self._copy_trailer(stop, at)
            start = at + RecordHeader.SIZE + header.padding
            stop = start + header.length
            ref, payload = RecordRef(at, stop - at), self.data[start:stop]
            made = self._changed(payload, header.type, lambda each, n=number, t=header.type: edit(
                n, t, each))  # fmt: skip
            self.refs[ref] = self._add(header, made)
            self.sums[_sum(payload)] = _sum(made)
        self._copy_trailer(stop, len(self.data))
        return bytes(self.out)

    def _records(self) -> Iterator[tuple[int, RecordHeader]]:
        at = Header.SIZE
        while at < len(self.data):
            if Trailer.read(self.data[at : at + Trailer.SIZE], at):
                at += Trailer.SIZE
                continue
            try:
                header = RecordHeader.read(self.data[at : at + RecordHeader.SIZE], "test")
            except TscError:
                return
            yield at, header
            at += RecordHeader.SIZE + header.padding + header.length
            at += -at % RECORD_ALIGNMENT

    def _copy_trailer(self, start: int, stop: int) -> None:
        start += -start % RECORD_ALIGNMENT
        trailer = Trailer.read(self.data[start : start + Trailer.SIZE], start)
        if trailer is None:
            self.out += self.data[start:stop]
            return
        ref = self._moved(RecordRef(trailer.index_offset, trailer.index_length))
        self.out += Trailer(ref.offset, ref.length).write(len(self.out))
        self.out += self.data[start + Trailer.SIZE : stop]

    def _add(self, header: RecordHeader, payload: bytes) -> RecordRef:
        offset = len(self.out)
        padding = RecordHeader.padding_at(offset, len(payload))
        made = replace(
            header, padding=padding, length=len(payload), payload_checksum=checksum(payload)
        )
        self.out += made.write() + bytes(padding) + payload
        length = len(self.out) - offset
        self.out += bytes(-len(self.out) % RECORD_ALIGNMENT)
        return RecordRef(offset, length)

    def _changed(self, payload: bytes, type_: int, edit: Callable[[bytes], bytes]) -> bytes:
        try:
            if type_ == INDEX:
                return edit(self._index(payload))
            if type_ == SNAPSHOT:
                return self._snapshot(payload, edit)
        except (TscError, struct.error):
            pass
        for before, after in self.sums.items():
            payload = payload.replace(before, after)
        return edit(payload)

    def _moved(self, ref: RecordRef) -> RecordRef:
        return self.refs.get(ref, ref)

    def _index(self, payload: bytes) -> bytes:
        index = Index.read(memoryview(payload), "test", Allowance(_PLENTY))
        return replace(
            index,
            previous=self._moved(index.previous),
            blocks=[self._block(block) for block in index.blocks],
            snapshots=[self._moved(ref) for ref in index.snapshots],
            extras=[ExtraEntry(e.type, e.flags, self._moved(e.ref)) for e in index.extras],
        ).write()

    def _block(self, block: BlockEntry) -> BlockEntry:
        chunks = []
        for chunk in block.chunks:
            before = chunk.payload_checksum.to_bytes(8, "little")
            after = int.from_bytes(self.sums.get(before, before), "little")
            chunks.append(replace(chunk, ref=self._moved(chunk.ref), payload_checksum=after))
        return replace(block, chunks=tuple(chunks))

    def _snapshot(self, payload: bytes, edit: Callable[[bytes], bytes]) -> bytes:
        head = SnapshotHead.read(ByteReader(payload, "test", Allowance(_PLENTY)))
        like = -1 if head.dictionary is None else head.dictionary
        old_like, new_like = self.structures.get(like, (b"", b""))
        ids, structure = ids_of(payload), structure_of(payload, old_like)
        made = structure
        for before, after in self.refs.items():
            made = made.replace(_ref(before), _ref(after))
        for sum_before, sum_after in self.sums.items():
            # Bases and codebooks are named in a snapshot's coding.
            made = made.replace(_name(sum_before), _name(sum_after))
        changed = edit(ids + made)
        ids, made = changed[: len(ids)], changed[len(ids) :]
        self.structures[head.number] = (structure, made)
        return ids + packed(made, new_like)


def _sum(payload: bytes) -> bytes:
    return checksum(payload).to_bytes(8, "little")


def _name(sum_: bytes) -> bytes:
    return b"%016x" % int.from_bytes(sum_, "little")


def _ref(ref: RecordRef) -> bytes:
    writer = ByteWriter()
    ref.write(writer)
    return writer.bytes()


# --- compressed parts ----------------------------------------------------------------------------


def with_frame(data: bytes, at: int, edit: Callable[[bytes], bytes]) -> bytes:
    """``data`` with other content in the zstd frame at ``at``, and its length before it, if that
    stands there, changed to what it is then. As it is where there is no whole frame."""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        content = decompressor.decompress(data[at:])
    except zstandard.ZstdError:
        return data
    stop = len(data) - len(decompressor.unused_data)
    before = ByteWriter().uvarint(stop - at).bytes()
    frame = zstd.compress(edit(content), 3)
    start = at
    if data[:at].endswith(before):
        start, frame = at - len(before), ByteWriter().uvarint(len(frame)).raw(frame).bytes()
    return data[:start] + frame + data[stop:]


def frames_in(data: bytes) -> list[int]:
    """Where zstd frames may start."""
    magic, found, at = struct.pack("<I", zstandard.MAGIC_NUMBER), [], -1
    while (at := data.find(magic, at + 1)) >= 0:
        found.append(at)
    return found


# --- books ---------------------------------------------------------------------------------------


def whole_book(body: bytes) -> bytes:
    """A book of what stands between its magic and its id."""
    data = books.MAGIC + body
    return data + blake3(data).digest()
