"""Make the files of invalid/: each breaks one rule of tsc.md, section 15, and no other.

`small` makes a valid file of two frames out of parts, each of which may be changed on its way into
the file, before what depends on it (lengths, checksums, references) is written. A rule is a row of
`RULES`: what is changed, the words of the rule, and what readers must say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from blake3 import blake3
from draft import Draft, plain_cells, raw_chunk, snapshot_record, track_record
from toy import as_ids, exact_book, small_book, tensors_of

from tscfile import blocks, registry, tokens
from tscfile.books.book import MAGIC, Book
from tscfile.bytestream import ByteWriter
from tscfile.container.records import (
    BASIS,
    BOOK,
    CODEBOOKS,
    CRITICAL,
    BlockEntry,
    FrameRun,
    Header,
    Index,
    RecordRef,
    checksum,
)
from tscfile.container.snapshots import Context, SnapshotRecord, TokenIds, TrackRecord
from tscfile.container.writer import EncodedChunk
from tscfile.entropy import ints, widths
from tscfile.model import CellTable
from tscfile.product_session import SessionCodes
from tscfile.session_basis import Basis, Group

DAMAGED, UNSUPPORTED, UNDECODABLE = (
    "damaged", "unsupported", "cannot be decoded with what is given"
)  # fmt: skip
IDS = as_ids([2, 1])
NO_DIFFERENCE = b"\0\2\0"
"""Body of codec 7: no turn, two tensors that are as predicted."""
ROWS = [np.arange(i, i + 16, dtype=np.uint8).reshape(2, 8) for i in (1, 65)]


HEAD = ("number", "parent", "dictionary", "ids", "contexts")


def same(value: Any) -> Any:
    return value


@dataclass
class Parts:
    """What a small file is made of; functions change what they are given."""

    n_layers: int = 1
    header: Header = field(default_factory=Header)
    chunks: Callable[[EncodedChunk], list[EncodedChunk]] = lambda chunk: [chunk]
    content_id: Callable[[bytes], bytes] = same
    blocks: Callable[[list[BlockEntry]], list[BlockEntry]] = same
    extras: Callable[[Draft], Any] = same
    before: Callable[[Draft], Any] = same
    sources: tuple[FrameRun, ...] = ()
    cells: CellTable = field(default_factory=lambda: plain_cells(2))
    runs: tuple[tuple[int, ...], ...] = ((0, 0, 2),)
    track: Callable[[TrackRecord], list[TrackRecord]] = lambda track: [track]
    record: Callable[[SnapshotRecord], SnapshotRecord] = same
    structure: Callable[[bytes], bytes] = same
    snapshot: Callable[[bytes], bytes] = same
    earlier: Callable[[SnapshotRecord], SnapshotRecord] | None = None
    refs: Callable[[Draft], list[RecordRef]] = lambda draft: draft.snapshots
    index: Callable[[Index, RecordRef], Index] = lambda index, own: index
    index_payload: Callable[[bytes], bytes] = same
    data: Callable[[Draft], bytes] = lambda draft: bytes(draft.data)


def small(**changes: Any) -> bytes:
    """A file of one snapshot with an opaque part and one block of raw rows, but for the changes.

    ``before`` may add blocks in front of that block; ``earlier``: what makes another
    snapshot of the same, which is its parent.
    """
    parts = Parts(**changes)
    tensors = tensors_of(parts.n_layers)
    draft = Draft(parts.header)
    parts.extras(draft)
    rows = ROWS * parts.n_layers
    parts.before(draft)
    chunks = parts.chunks(raw_chunk(rows, 1))
    draft.block(chunks, parts.content_id(blocks.content_id(rows)), parts.sources)
    draft.blocks = parts.blocks(draft.blocks)
    track = track_record(tensors, parts.runs, parts.cells)
    opaque = [draft.opaque("note", b"hello")]
    plain = snapshot_record(IDS, parts.track(track), name="small", opaque=opaque)
    record, like = parts.record(plain), b""
    if parts.earlier:
        like = draft.snapshot(parts.earlier(plain), IDS)
        record = of_record(number=1, parent=0, dictionary=0)(record)
    draft.snapshot(record, IDS, like, parts.snapshot, parts.structure)
    draft.snapshots = parts.refs(draft)
    draft.commit(parts.index, parts.index_payload)
    return parts.data(draft)


# --- changes ----------------------------------------------------------------------------------


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Put ``new`` in the place of ``old``, which must be there once."""

    def changed(data: bytes) -> bytes:
        if data.count(old) != 1:
            raise AssertionError(f"{old!r} is there {data.count(old)} times")
        return data.replace(old, new)

    return changed


def flip(at: Callable[[Draft], int]) -> Callable[[Draft], bytes]:
    """Change a byte of the finished file, and no checksum."""

    def changed(draft: Draft) -> bytes:
        draft.data[at(draft)] ^= 1
        return bytes(draft.data)

    return changed


def chunk_ref(draft: Draft) -> RecordRef:
    return draft.blocks[0].chunks[0].ref


def last_byte(ref: RecordRef) -> int:
    return ref.offset + ref.length - 1


def shorter(ref: RecordRef) -> RecordRef:
    return RecordRef(ref.offset, ref.length - 1)


def other_checksum(block: BlockEntry) -> BlockEntry:
    (chunk,) = block.chunks
    return replace(block, chunks=(replace(chunk, payload_checksum=chunk.payload_checksum ^ 1),))


def of_block(**changes: Any) -> Callable[[list[BlockEntry]], list[BlockEntry]]:
    return lambda listed: [replace(each, **changes) for each in listed]


def of_record(**changes: Any) -> Callable[[SnapshotRecord], SnapshotRecord]:
    """``changes`` of the record and of its head."""
    head = {key: changes.pop(key) for key in HEAD if key in changes}
    return lambda record: replace(record, head=replace(record.head, **head), **changes)


def of_header(**changes: Any) -> Callable[[EncodedChunk], list[EncodedChunk]]:
    return lambda chunk: [EncodedChunk(replace(chunk.header, **changes), chunk.body)]


def coded(codec: int, body: bytes) -> Callable[[EncodedChunk], list[EncodedChunk]]:
    return lambda chunk: [EncodedChunk(replace(chunk.header, codec=codec), body)]


def ints_of(values: Any) -> bytes:
    writer = ByteWriter()
    ints.write(writer, np.asarray(values, np.int32))
    return writer.bytes()


class Longer(list):  # type: ignore[type-arg]
    """Claims more items than it has."""

    def __len__(self) -> int:
        return 1 << 20


def wrong_structure_length(payload: bytes) -> bytes:
    """Seven more than the frame holds."""
    at = payload.index(b"\x28\xb5\x2f\xfd")
    stated = payload[at + 5]  # a content size in one byte stands behind the descriptor
    length = ByteWriter().uvarint(stated).bytes()
    assert payload[at - len(length) : at] == length and payload[at + 4] == 0x20
    return payload[: at - len(length)] + ByteWriter().uvarint(stated + 7).bytes() + payload[at:]


def with_column(cells: CellTable) -> CellTable:
    return CellTable(cells.pos, cells.seq_counts, cells.seq_ids, np.array([[7], [9]], np.int32))


def with_codec_1(plane_coding: int) -> Callable[[EncodedChunk], list[EncodedChunk]]:
    """All 16 bits of the values in two raw planes."""
    values = np.concatenate([part.view("<u2") for part in ROWS], axis=1)
    low, high = (values & 255).astype(np.uint8).tobytes(), (values >> 8).astype(np.uint8).tobytes()
    stream = bytes([16, plane_coding]) + low + b"\0" + high
    body = ByteWriter().uvarint(len(stream)).raw(stream).bytes()
    return coded(registry.FIELDS_CLASSED_RANS, body)


def absent(listed: list[BlockEntry]) -> list[BlockEntry]:
    return [replace(each, chunks=(), content_id=blocks.NO_ID) for each in listed]


def with_book(book: bytes, codec: int = registry.BOOK_TRANSFORM, **changes: Any) -> dict[str, Any]:
    """Frames of codec 2 without any coefficient, the book inside; of two layers."""
    step = ByteWriter().uvarint(2).pack("h", 5000).bytes()
    coding = {"book": book[-32:].hex(), "rope_pairing": "norm"}
    parts: dict[str, Any] = {
        "n_layers": 2, "extras": lambda draft: draft.extra(BOOK, book),
        "chunks": coded(codec, step), "record": of_record(tier="near", coding=coding),
    }  # fmt: skip
    return parts | changes


def book_bytes(**facts: Any) -> bytes:
    return small_book(**facts).to_bytes()


def rehashed(data: bytes) -> bytes:
    return data + blake3(data).digest()


def next_version(book: Book) -> bytes:
    data = book.to_bytes()[:-32]
    return rehashed(data[: len(MAGIC)] + b"\x03" + data[len(MAGIC) + 1 :])


def session_basis() -> Basis:
    """Means of 0 and no rows, keys as they stand."""
    zero = np.zeros((1, 8), np.int32)
    group = Group([0, 1], [4, 4], np.ones(2, np.float32), np.zeros(1, np.int8), zero)
    basis = Basis(None, [group])
    basis.id = checksum(basis.write())
    return basis


def exact_block(draft: Draft) -> int:
    return draft.block([raw_chunk(ROWS, 1)], blocks.content_id(ROWS))


def with_difference(
    sources: tuple[tuple[int, int, int], ...] = ((0, 0, 2),),
    before: Callable[[Draft], Any] = exact_block, number: int = 1, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Block ``number`` is the same as frames of those that ``before`` adds."""
    return {
        "before": before, "sources": tuple(FrameRun(*run) for run in sources),
        "chunks": coded(registry.DIFFERENCE, NO_DIFFERENCE), "runs": ((number, 0, 2),),
    } | changes  # fmt: skip


def chain_of(length: int) -> dict[str, Any]:
    """A difference to a difference, and so on."""

    def before(draft: Draft) -> None:
        exact_block(draft)
        for number in range(length - 1):
            chunks = coded(registry.DIFFERENCE, NO_DIFFERENCE)(raw_chunk(ROWS, 1))
            draft.block(chunks, blocks.content_id(ROWS), (FrameRun(number, 0, 2),))

    return with_difference(((length - 1, 0, 2),), before, length)


def web_of(levels: int) -> dict[str, Any]:
    """A difference to two blocks, which are differences to two others, and so on."""

    def before(draft: Draft) -> None:
        pairs = [(exact_block(draft), exact_block(draft))]
        for _ in range(levels - 1):
            chunks, (a, b) = coded(registry.DIFFERENCE, NO_DIFFERENCE), pairs[-1]
            runs = FrameRun(a, 0, 1), FrameRun(b, 1, 1)
            made = [
                draft.block(chunks(raw_chunk(ROWS, 1)), blocks.content_id(ROWS), runs)
                for _ in range(2)
            ]
            pairs.append((made[0], made[1]))

    last = 2 * levels
    return with_difference(((last - 2, 0, 1), (last - 1, 1, 1)), before, last)


def coded_block(codec: int, body: bytes = b"", n_layers: int = 1) -> Callable[[Draft], int]:
    return lambda draft: draft.block(coded(codec, body)(raw_chunk(ROWS * n_layers, 1)))


def in_context(*runs: tuple[int, int, int, int, int], n: int = 1, **changes: Any) -> dict[str, Any]:
    """``n`` contexts of the snapshot's tokens, and frame runs that may refer to them."""
    context = Context(0, tokens.encode(IDS, IDS[:0], None))
    return {"runs": runs, "record": of_record(contexts=n * (context,))} | changes


def with_basis(
    named: bool = True, stored: bool = True, damage: Callable[[bytes], bytes] = same
) -> dict[str, Any]:
    """Frames of codec 3: one channel in one lane, all values 0."""
    basis = session_basis()
    wide = np.array([1, 0, 0, 0, 0, 0, 0, 0], np.uint8)
    writer = ByteWriter().pack("Q", basis.id).u8(0)
    widths.write_widths(writer, wide)
    widths.encode(writer.uvarint(2).u8(0).pack("f", 0.5), np.zeros((2, 8), np.int32), wide)
    coding = {"bases": [f"{basis.id:016x}"] if named else []}
    return {
        "extras": (lambda draft: draft.extra(BASIS, basis.write())) if stored else same,
        "chunks": coded(registry.SESSION_TRANSFORM, damage(writer.bytes())),
        "record": of_record(tier="near", coding=coding),
    }


def with_codebooks(named: bool = True) -> dict[str, Any]:
    """Frames of codec 6 without codes, of codebooks in the file."""
    learnt = SessionCodes(
        None, [4, 4], 1, 4, 4, np.zeros(8, np.float32), np.ones(2, np.float32),
        np.ones((1, 2), np.float32), np.zeros((1, 2, 256, 4), np.int8), 0.0,
    )  # fmt: skip
    payload = learnt.write()
    body = ByteWriter().pack("Q", checksum(payload)).raw(b"\x02\x01\x00").bytes()
    names = [f"{checksum(payload):016x}"] if named else []
    return {
        "extras": lambda draft: draft.extra(CODEBOOKS, payload),
        "chunks": coded(registry.PRODUCT, body),
        "record": of_record(tier="custom", coding={"codebooks": names}),
    }


def two_layers(first: int, second: int) -> Callable[[EncodedChunk], list[EncodedChunk]]:
    """The same raw chunk as two quality layers."""
    return lambda chunk: [
        EncodedChunk(replace(chunk.header, quality_layer=n), chunk.body) for n in (first, second)
    ]


def half_the_tensors(chunk: EncodedChunk) -> list[EncodedChunk]:
    return [EncodedChunk(replace(chunk.header, row_bytes=(8,)), ROWS[0].tobytes())]


def tables_of_token_ids_too_long(record: SnapshotRecord) -> SnapshotRecord:
    """The code of the tokens and a byte more."""
    code = tokens.adaptive().encode(IDS, IDS[:0])
    return of_record(ids=TokenIds(0, 2, tokens.ADAPTIVE, code + b"\0"))(record)


# --- rules ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """``rule``: row of section 15 of tsc.md; ``breaks``: what is wrong with this file; ``info``:
    exit code of ``tsc info``, which decodes no frames; that of ``tsc verify`` is ``verify``."""

    name: str
    rule: str
    breaks: str
    changes: dict[str, Any]
    kind: str = DAMAGED
    info: int = 3
    verify: int = 3


CHECKSUMS = (
    "a wrong magic or checksum, a reference that is not valid (section 4), no whole index"
)
COUNTS = "lengths and counts that do not fit the bytes that are there, bytes left over in a payload"
TEXTS = (
    "an uvarint that is too long, not shortest, or beyond its limit; a string that is not UTF-8"
)
METADATA = "a metadata key that occurs twice; an unknown metadata value type"
TWICE = "two tracks of a snapshot with one (cache, stream); two opaque parts with one name"
LAYERS = "layers of a block that are not as section 13 says"
CHAIN = "a chain of indices that does not descend or does not number on (section 8)"
NUMBERS = (
    "a snapshot whose number is not its place, or whose parent or dictionary is not an earlier one"
)
KEPT = (
    "tokens kept of a list that the parent does not have, or more of them than are in it; more "
    "than 64 contexts"
)
CONTEXTS = (
    "a frame run of a context that the snapshot does not have, with a shift beyond its limit, at a "
    "position in the context that is no i32, or of an absent block"
)
SOURCES = (
    "sources of a block that are not all in blocks before it, are not as many frames as it has, or "
    "whose last layer is not exact; more than 8 steps or 256 ways from a block over sources"
)
CODINGS = "an unknown role, cell column coding, ints coding, token coding or plane coding"
STRUCTURE = (
    "a structure whose content has not exactly its stated length, or whose frame states a "
    "dictionary id"
)
TOKEN_IDS = (
    "token ids that are no code of *new tokens* tokens; coding 4 where no book is named or the "
    "book has no tables"
)
RUNS = "a frame run outside its block, more cells in a track than frames in the file"
MISSING = (
    "a frame of codec 2 or 5, or the difference to one, in a snapshot that names no book, one of "
    "codec 5 whose book lacks the `exact_` arrays, one of codec 3 whose basis, or of codec 6 whose "
    "codebooks, the snapshot does not name or the file does not have"
)
NEWER = "another major version, an unknown required feature, a critical extra of unknown type"
BOOKS = "a book of another version, an unknown pairing"
OTHER_BOOK = (
    "a book that is not there or has another id than the one named; an identity that conflicts "
    "with the book's facts"
)

RULES = (
    Rule("magic", CHECKSUMS, "the first byte of the file is 0x88",
         {"data": flip(lambda draft: 0)}),
    Rule("header-checksum", CHECKSUMS, "a bit of the optional features is set, the checksum is not "
         "that of the header then", {"data": flip(lambda draft: 16)}),
    Rule("record-checksum", CHECKSUMS, "a flag in the header of the snapshot record is changed",
         {"data": flip(lambda draft: draft.snapshots[0].offset + 1)}),
    Rule("payload-checksum", CHECKSUMS, "the last byte of the chunk is changed",
         {"data": flip(lambda draft: last_byte(chunk_ref(draft)))}, info=0),
    Rule("reference-outside", CHECKSUMS, "the snapshot's record ends behind the file",
         {"refs": lambda draft: [RecordRef(draft.snapshots[0].offset, 1 << 20)]}),
    Rule("reference-length", CHECKSUMS, "the snapshot's record is a byte shorter than its header "
         "says", {"refs": lambda draft: [shorter(draft.snapshots[0])]}),
    Rule("reference-type", CHECKSUMS, "where a snapshot should be is a chunk",
         {"refs": lambda draft: [chunk_ref(draft)]}),
    Rule("chunk-checksum", CHECKSUMS, "the index has another payload checksum than the chunk",
         {"blocks": lambda listed: [other_checksum(each) for each in listed]}, info=0),
    Rule("no-index", CHECKSUMS, "the file ends before its only trailer",
         {"data": lambda draft: bytes(draft.data[:-32])}),
    Rule("count-beyond-bytes", COUNTS, "the index lists 2^20 blocks and holds one",
         {"index": lambda index, own: replace(index, blocks=Longer(index.blocks))}),
    Rule("bytes-left-over", COUNTS, "a byte follows the last field of the index",
         {"index_payload": lambda payload: payload + b"\0"}),
    Rule("body-left-over", COUNTS, "a byte follows the rows of a raw chunk",
         {"chunks": lambda chunk: [EncodedChunk(chunk.header, chunk.body + b"\0")]}, info=0),
    Rule("body-short", COUNTS, "the rows of a raw chunk lack a byte",
         {"chunks": lambda chunk: [EncodedChunk(chunk.header, chunk.body[:-1])]}, info=0),
    Rule("uvarint-too-long", TEXTS, "the snapshot's number takes 11 bytes",
         {"snapshot": lambda payload: b"\x80" * 10 + payload}),
    Rule("uvarint-not-shortest", TEXTS, "the snapshot's number, 0, takes 2 bytes",
         {"snapshot": lambda payload: b"\x80" + payload}),
    Rule("uvarint-beyond-limit", TEXTS, "a block of 65537 frames",
         {"blocks": of_block(n_frames=65537)}),
    Rule("string-not-utf8", TEXTS, "the snapshot's name has the byte ff",
         {"structure": swap(b"\x05small", b"\x05sm\xffll")}),
    Rule("metadata-key-twice", METADATA, "the source has two values for `format`", {
        "record": of_record(source={"format": "example", "formaa": 1}),
        "structure": swap(b"\x06formaa", b"\x06format"),
    }),
    Rule("metadata-type", METADATA, "a value of type 13", {
        "record": of_record(source={"format": "example", "fact": True}),
        "structure": swap(b"\x04fact\x07", b"\x04fact\x0d"),
    }),
    Rule("metadata-items", METADATA, "an array of arrays", {
        "record": of_record(source={"format": "example", "fact": [True]}),
        "structure": swap(b"\x04fact\x09\x07", b"\x04fact\x09\x09"),
    }),
    Rule("two-tracks-alike", TWICE, "two tracks are cache 0, stream 0", {
        "track": lambda track: [track, replace(track, attributes={"second": True})],
    }),
    Rule("two-opaque-parts-alike", TWICE, "two opaque parts are named `note`", {
        "record": lambda record: replace(record, opaque=record.opaque * 2),
    }),
    Rule("block-without-frames", "a block without frames", "the only block has 0 frames",
         {"blocks": of_block(n_frames=0)}),
    Rule("layer-missing", LAYERS, "the only layer is number 1",
         {"chunks": of_header(quality_layer=1)}),
    Rule("layer-above-exact", LAYERS, "two layers of exact rows", {"chunks": two_layers(0, 1)}),
    Rule("layers-not-in-order", LAYERS, "layer 1 comes before layer 0",
         {"chunks": two_layers(1, 0)}),
    Rule("refinement-of-nothing", LAYERS, "a chunk of codec 4 in layer 0",
         with_book(book_bytes(), registry.BOOK_REFINEMENT)),
    Rule("difference-below-exact", LAYERS, "rows above a layer of codec 7", with_difference(
        chunks=lambda chunk: [
            *coded(registry.DIFFERENCE, NO_DIFFERENCE)(chunk),
            EncodedChunk(replace(chunk.header, quality_layer=1), chunk.body)])),
    Rule("difference-in-two-chunks", LAYERS, "two chunks of codec 7 in a layer", with_difference(
        chunks=lambda chunk: [
            EncodedChunk(replace(chunk.header, codec=7, first_tensor=i, row_bytes=(8,)), b"\0\1\0")
            for i in range(2)])),
    Rule("source-not-earlier", SOURCES, "a block is the difference to itself",
         with_difference(((1, 0, 2),))),
    Rule("sources-too-few", SOURCES, "one source frame of a block of two",
         with_difference(((0, 0, 1),))),
    Rule("source-outside-block", RUNS, "frames 1 and 2 of a block of two are sources",
         with_difference(((0, 1, 2),))),
    Rule("source-chain", SOURCES, "the difference to a difference, nine in all", chain_of(9)),
    Rule("source-ways", SOURCES, "510 ways from a block to its sources and theirs", web_of(8)),
    Rule("source-lossy", SOURCES, "the sources are of codec 2", with_book(
        book_bytes(), before=coded_block(registry.BOOK_TRANSFORM, b"\2\x88\x13", 2),
        chunks=coded(registry.DIFFERENCE, b"\0\4\0"), sources=(FrameRun(0, 0, 2),),
        runs=((1, 0, 2),))),
    Rule("source-absent", SOURCES, "the sources are not stored", with_difference(
        before=lambda draft: draft.blocks.append(BlockEntry(2, blocks.NO_ID, blocks.NO_ID, ())))),
    Rule("chain-not-descending", CHAIN, "the index names itself as the one before",
         {"index": lambda index, own: replace(index, previous=own)}),
    Rule("chain-not-numbered", CHAIN, "the first index begins with block 1",
         {"index": lambda index, own: replace(index, first_block=1)}),
    Rule("snapshot-number", NUMBERS, "the only snapshot is number 1",
         {"record": of_record(number=1)}),
    Rule("snapshot-parent", NUMBERS, "the only snapshot is its own parent",
         {"record": of_record(parent=0)}),
    Rule("snapshot-dictionary", NUMBERS, "the only snapshot is its own dictionary",
         {"record": of_record(dictionary=0)}),
    Rule("kept-tokens", KEPT, "a token is kept, and there is no parent", {
        "record": of_record(ids=replace(tokens.encode(IDS[:1], IDS[:0], None), kept=1)),
    }),
    Rule("context-kept-tokens", KEPT, "a context keeps three tokens of the parent's two", {
        "earlier": same,
        "record": of_record(contexts=(Context(0, TokenIds(3, 0, 0, b"")),)),
    }),
    Rule("context-source", KEPT, "a context keeps from the parent's context 1, and it has none", {
        "earlier": same,
        "record": of_record(contexts=(Context(1, TokenIds(0, 0, 0, b"")),)),
    }),
    Rule("contexts-too-many", KEPT, "65 contexts", in_context((0, 0, 2, 0, 0), n=65)),
    Rule("role", CODINGS, "a tensor of role 2", {"structure": swap(
        b"\x00\x01\x01\x01\x08\x01", b"\x00\x01\x02\x01\x08\x01")}),
    Rule("cell-column", CODINGS, "a cell column of coding 3", {
        "cells": with_column(plain_cells(2)),
        "structure": swap(b"\x01\x00" + ints_of([7, 9]), b"\x01\x03" + ints_of([7, 9])),
    }),
    Rule("ints-coding", CODINGS, "positions of coding 3", {
        "structure": swap(ints_of([0, 1]), b"\x03" + ints_of([0, 1])[1:]),
    }),
    Rule("token-coding", CODINGS, "token ids of coding 5",
         {"record": of_record(ids=TokenIds(0, 2, 5, b"\0"))}, info=0),
    Rule("plane-coding", CODINGS, "a plane of coding 2", {"chunks": with_codec_1(2)}, info=0),
    Rule("structure-length", STRUCTURE, "the structure states 7 bytes more than its frame",
         {"snapshot": wrong_structure_length}),
    Rule("structure-dictionary-id", STRUCTURE, "the structure's frame states dictionary 1", {
        "snapshot": swap(b"\x28\xb5\x2f\xfd\x20", b"\x28\xb5\x2f\xfd\x21\x01"),
    }),
    Rule("token-ids-left-over", TOKEN_IDS, "a byte follows the code of two tokens",
         {"record": tables_of_token_ids_too_long}, info=0),
    Rule("token-ids-count", TOKEN_IDS, "three tokens, two of them coded",
         {"record": lambda record: of_record(ids=replace(record.ids, count=3))(record)}, info=0),
    Rule("token-ids-of-no-book", TOKEN_IDS, "token ids of coding 4 and no book named",
         {"record": of_record(ids=TokenIds(0, 2, tokens.OF_BOOK, b"\0"))}, info=0),
    Rule("token-ids-without-tables", TOKEN_IDS, "token ids of coding 4, and the book has no tables",
         with_book(book_bytes(), record=of_record(
             tier="near", coding={"book": book_bytes()[-32:].hex(), "rope_pairing": "norm"},
             ids=TokenIds(0, 2, tokens.OF_BOOK, b"\0"))), info=0),
    Rule("run-outside-block", RUNS, "frames 1 and 2 of a block of two", {"runs": ((0, 1, 2),)}),
    Rule("run-of-no-block", RUNS, "frames of block 1, and there is one block",
         {"runs": ((1, 0, 2),)}),
    Rule("run-below-zero", RUNS, "frames of block −1", {"runs": ((-1, 0, 2),)}),
    Rule("context-not-there", CONTEXTS, "frames of context 2, and there is one",
         in_context((0, 0, 2, 2, 0))),
    Rule("context-shift", CONTEXTS, "a shift of 2^32", in_context((0, 0, 2, 1, 1 << 32))),
    Rule("context-position", CONTEXTS, "a frame of position 2^31 in its context",
         in_context((0, 0, 2, 1, -(1 << 31)))),
    Rule("context-of-absent-frames", CONTEXTS, "a context of frames that are not stored",
         in_context((0, 0, 2, 1, 0), blocks=absent)),
    Rule("more-cells-than-frames", RUNS, "a track of four cells in a file of two frames",
         {"runs": ((0, 0, 2), (0, 0, 2)), "cells": plain_cells(4)}),
    Rule("tensors-not-covered", "chunks of a layer that do not cover its track's tensors once and "
         "in order (section 7.3), unless the block is absent", "the values are in no chunk",
         {"chunks": half_the_tensors}),
    Rule("source-of-other-tensors", "chunks of a layer that do not cover its track's tensors once "
         "and in order (section 7.3), unless the block is absent",
         "the sources of a block hold keys alone", with_difference(
             before=lambda draft: draft.block(half_the_tensors(raw_chunk(ROWS, 1))))),
    Rule("absent-without-tokens", "frames of an absent block that lack tokens (section 7.3), where "
         "they are to be computed again", "two frames that are not stored, and one token", {
             "blocks": absent,
             "record": of_record(ids=tokens.encode(IDS[:1], IDS[:0], None)),
         }, info=0),
    Rule("chunk-and-index", "a chunk that index and snapshot do not agree with",
         "the chunk says that it has one frame", {
             "chunks": lambda chunk: [raw_chunk([part[:1] for part in ROWS], 1)],
             "blocks": lambda listed: [
                 replace(each, n_frames=2, chunks=(replace(each.chunks[0], raw_length=32),))
                 for each in listed],
         }, info=0),
    Rule("chunk-and-snapshot", "a chunk that index and snapshot do not agree with",
         "the chunk is of bf16, the tensors of f16", {"chunks": of_header(dtype_id=30)}, info=0),
    Rule("no-book-named", MISSING, "frames of codec 2, and no book named",
         with_book(book_bytes(), record=of_record(tier="near", coding={}))),
    Rule("source-of-no-book", MISSING, "the difference to frames of codec 5, and no book named",
         with_difference(before=coded_block(registry.BOOK_EXACT))),
    Rule("book-without-exact-tables", MISSING, "frames of codec 5, and the book has no tables for "
         "them", with_book(book_bytes(), registry.BOOK_EXACT), info=0),
    Rule("basis-not-named", MISSING, "frames of codec 3, and no basis named",
         with_basis(named=False), info=0),
    Rule("basis-not-there", MISSING, "frames of codec 3, and the basis is not in the file",
         with_basis(stored=False)),
    Rule("codebooks-not-named", MISSING, "frames of codec 6, and no codebooks named",
         with_codebooks(named=False), info=0),
    Rule("identity-type", "a key of the identity (section 12) of another type than stated there, "
         "where the identity is used", "the number of layers is a string, and frames of codec 2",
         with_book(book_bytes(), record=of_record(
             tier="near", identity={"architecture": "toy", "n_layers": "two"},
             coding={"book": book_bytes()[-32:].hex(), "rope_pairing": "norm"})), info=0),
    Rule("content-id", "content that does not hash to its id, where the whole of it was decoded",
         "a bit of the block's content id is changed",
         {"content_id": lambda id_: bytes([id_[0] ^ 1]) + id_[1:]}, info=0),
    Rule("content-id-zero", "content that does not hash to its id, where the whole of it was "
         "decoded", "the content id of exact rows is 16 zero bytes",
         {"content_id": lambda id_: blocks.NO_ID}, info=0),
    Rule("opaque-id", "content that does not hash to its id, where the whole of it was decoded",
         "the opaque part has another id", {
             "record": lambda record: replace(
                 record, opaque=[replace(record.opaque[0], content_id=bytes(16))]),
         }, info=0),
    Rule("lane-end", "an entropy-coded lane that does not end as it should "
         "(classed-rans)", "the last bit of a lane is changed",
         with_basis(damage=lambda body: body[:-1] + bytes([body[-1] ^ 128])), info=0),
    Rule("major-version", NEWER, "major version 2", {"header": Header(major=2)}, UNSUPPORTED,
         info=5, verify=5),
    Rule("required-feature", NEWER, "bit 31 of the required features",
         {"header": Header(required_features=1 << 31)}, UNSUPPORTED, info=5, verify=5),
    Rule("critical-extra", NEWER, "a critical record of type 99",
         {"extras": lambda draft: draft.extra(99, b"new", CRITICAL)}, UNSUPPORTED,
         info=5, verify=5),
    Rule("codec", "an unknown codec id (only where such a chunk is needed: not below an exact "
         "layer that is read)", "a chunk of codec 99",
         {"chunks": of_header(codec=99)}, UNSUPPORTED, info=0, verify=5),
    Rule("book-version", BOOKS, "the book inside is of version 3",
         with_book(next_version(small_book())), UNSUPPORTED, info=0, verify=5),
    Rule("pairing", BOOKS, "the keys are paired by `thirds`",
         with_book(book_bytes(), record=of_record(tier="near", coding={
             "book": book_bytes()[-32:].hex(), "rope_pairing": "thirds"})),
         UNSUPPORTED, info=0, verify=5),
    Rule("book-not-there", OTHER_BOOK, "the book is neither inside nor beside the file",
         with_book(book_bytes(), extras=same), UNDECODABLE, info=0, verify=2),
    Rule("book-of-another-model", OTHER_BOOK, "the book is for a model of another `vocab_size`",
         with_book(book_bytes(vocab_size=8), record=of_record(
             tier="near", identity={"architecture": "toy", "vocab_size": 9},
             coding={"book": book_bytes(vocab_size=8)[-32:].hex(), "rope_pairing": "norm"})),
         UNDECODABLE, info=0, verify=4),
    Rule("book-of-other-tensors", "a track of codec 2 or 5 whose tensors are not those the book is "
         "for (codecs/book-transform.md, *Checks*)",
         "a track of one layer, and a book for two", with_book(book_bytes(), n_layers=1),
         UNDECODABLE, info=0, verify=4),
    Rule("book-of-other-exact-tensors", "a track of codec 2 or 5 whose tensors are not those the "
         "book is for (codecs/book-transform.md, *Checks*)",
         "frames of codec 5, a track of one layer, and a book for two", with_book(
             exact_book().to_bytes(), registry.BOOK_EXACT, n_layers=1),
         UNDECODABLE, info=0, verify=4),
)  # fmt: skip


SOUND: dict[str, dict[str, Any]] = {
    "raw rows": {}, "planes": {"chunks": with_codec_1(0)}, "a book": with_book(book_bytes()),
    "another book": with_book(book_bytes(vocab_size=8)), "a basis": with_basis(),
    "codebooks": with_codebooks(), "a column": {"cells": with_column(plain_cells(2))},
    "facts": {"record": of_record(source={"format": "example", "fact": [True], "formaa": 1})},
    "an extra": {"extras": lambda draft: draft.extra(99, b"new")},
    "absent frames": {"blocks": absent}, "a difference": with_difference(),
    "a chain": chain_of(8), "many ways": web_of(7), "a parent": {"earlier": same},
    "a context": in_context((0, 0, 2, 1, 5)),
    "a first position": in_context((0, 0, 2, 1, 1 << 31), cells=plain_cells(2)),
}  # fmt: skip
"""Changes that break no rule, on which the others build: what a reader rejects is not these."""


def make_invalid(folder: Path, decoder: ModuleType) -> None:
    """The files, and beside each what it breaks and what readers say of it. ``message`` is what the
    decoder of the specification says: for seeing that it is this rule and no other."""
    folder.mkdir(exist_ok=True)
    for rule in RULES:
        data = small(**rule.changes)
        (folder / f"{rule.name}.tsc").write_bytes(data)
        expected = {
            "rule": rule.rule, "breaks": rule.breaks, "class": rule.kind,
            "exit_code": {"info": rule.info, "verify": rule.verify},
            "message": message_of(decoder, data),
        }  # fmt: skip
        text = json.dumps(expected, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{rule.name}.json").write_text(text, encoding="utf-8")


def message_of(decoder: ModuleType, data: bytes) -> str:
    try:
        decoder.File(data)
    except decoder.Rejected as error:
        return str(error)
    raise AssertionError("the file is not rejected")
