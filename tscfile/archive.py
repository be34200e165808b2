"""An open ``.tsc`` file: its snapshots, their frames, and what they cost."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import blocks, pipeline, registry, tokens
from .archived_track import ArchivedTrack, is_absent
from .bytestream import Allowance
from .container.reader import Container
from .container.records import (
    BASIS,
    BOOK,
    CHUNK,
    CODEBOOKS,
    MAX_LAYERS,
    OPAQUE,
    SNAPSHOT,
    BlockEntry,
    ChunkEntry,
    ChunkHeader,
    FrameRun,
    Header,
    OpaqueEntry,
    RecordRef,
    SnapshotRecord,
    TokenIds,
    TrackRecord,
    Trailer,
)
from .entropy import zstd
from .errors import DamagedError, UsageError
from .identity import read_identity
from .model import ModelIdentity, Snapshot, TensorSpec

if TYPE_CHECKING:
    from .book_codec import BookCodec
    from .books.book import OpenBook
    from .entropy.token_ids import TokenCoder
    from .product_codec import ProductCodec
    from .session_codec import SessionCodec

Rows = NDArray[np.uint8]

_CACHED_RECORDS = 32 << 20
"""Bytes of snapshot records that are kept once they are read."""

_CACHED_TOKENS = 8 << 20


@dataclass(frozen=True)
class Frames:
    """Decoded frames of one tensor: ``values`` is ``[n_frames, n_channels]``.

    float16 for f16, float32 for f32, uint16 bit patterns for bf16; for quantized and unknown
    types the stored rows, uint8 ``[n_frames, row_bytes]``.
    """

    cache: int
    stream: int
    tensor: TensorSpec
    values: NDArray[Any]


class Archive:
    """A ``.tsc`` file opened for reading. Use it as a context manager, or `close` it.

    ``torn_bytes`` counts bytes behind the newest whole commit: not 0 after an append that was cut
    off, or where the end of the file is damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, book: str | os.PathLike[str] | None = None
    ) -> None:
        """``book``: its file, where it is neither beside the archive nor in ``TSC_BOOKS``."""
        self._container = Container(path)
        self._given_book = book
        self._books: dict[str, OpenBook] = {}
        self._codecs: dict[int, BookCodec] = {}
        self._products: dict[int, ProductCodec] = {}
        self._session_products: dict[int, ProductCodec] = {}
        self._bases: dict[int, RecordRef] | None = None
        self._session_codecs: dict[int, SessionCodec] = {}
        self._lock = threading.RLock()
        self.path = self._container.path
        self.size = self._container.size
        self.torn_bytes = self._container.torn_bytes
        self._records: dict[int, tuple[SnapshotRecord, bytes]] = {}
        self._record_bytes: dict[int, int] = {}
        self._tokens: dict[int, NDArray[np.int32]] = {}
        self._max_cells = sum(block.n_frames for block in self._container.blocks)
        # Decoding a chunk takes a few times its size, on every core.
        self._max_chunk = max(blocks.MOST_CHUNK_BYTES, self.size // 4)

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many snapshots there are."""
        return len(self._container.snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        """The snapshots, oldest first."""
        return (self.snapshot(number) for number in range(len(self)))

    def blocks(self, snapshot: int = -1) -> Iterator[tuple[ArchivedTrack, int, int]]:
        """Frames of a snapshot as they are stored: the track, and where each run of frames that
        decodes on its own starts and stops in it; ``track.read(start, stop)`` decodes one.

        >>> import tempfile, tscfile
        >>> path = tempfile.mkdtemp() + "/session.tsc"
        >>> report = tscfile.pack("samples/session.kv", path)
        >>> with tscfile.open(path) as archive:
        ...     [(start, stop) for track, start, stop in archive.blocks()]
        [(0, 256), (256, 400)]
        """
        record = self.record(snapshot)
        for part in record.tracks:
            track, at = ArchivedTrack(self, part, record), 0
            for run in part.runs:
                yield track, at, at + run.count
                at += run.count

    @property
    def container(self) -> Container:
        return self._container

    def record(self, number: int = -1) -> SnapshotRecord:
        """What the file says of snapshot ``number``; negative numbers count from the last.

        `UsageError` if there is no such snapshot.
        """
        n = len(self)
        if not -n <= number < n:
            raise UsageError(
                f"{self.path}: no snapshot {number}; there are {n}"
                + (f", 0 to {n - 1}" if n else "")
            )
        wanted = number % n
        # Several threads ask, and what one reads may push out what another has just found.
        with self._lock:
            # A record is told from its parent's, so parents come first; a loop: chains are long.
            pending = [] if wanted in self._records else [wanted]
            while pending:
                payload, where = self._payload(pending[-1])
                parent = SnapshotRecord.read_parent(payload, where)
                if parent is not None and parent not in self._records:
                    if parent >= pending[-1]:
                        raise DamagedError(f"{where}: its parent is itself or comes later; damaged")
                    pending.append(parent)
                    continue
                self._load(pending.pop(), payload, parent, where)
            return self._records[wanted][0]

    def structure(self, number: int) -> bytes:
        """The structure of a snapshot's record, against which its children's are compressed."""
        return self._records[self.record(number).number][1]

    def tokens(self, number: int = -1) -> NDArray[np.int32]:
        """Token ids of a snapshot, int32 ``[n]``; needs its book if they are coded with it."""
        # Blocks are decoded by several threads, and each asks.
        with self._lock:
            return self._read_tokens(self.record(number))

    def _read_tokens(self, record: SnapshotRecord) -> NDArray[np.int32]:
        # The first of its tokens are the parent's, and so on: a loop, as chains are long.
        chain = [record]
        while chain[-1].number not in self._tokens and chain[-1].ids.kept:
            chain.append(self.record(chain[-1].parent))  # type: ignore[arg-type]
        for each in reversed(chain):
            if each.number in self._tokens:
                continue
            where = f"{self.path}: snapshot {each.number}"
            found = self._decode_tokens(each.ids, each.parent, each.coding, where)
            self._tokens[each.number] = found
            while len(self._tokens) > 2 and _size(self._tokens) > _CACHED_TOKENS:
                del self._tokens[next(iter(self._tokens))]
        return self._tokens[record.number]

    def _decode_tokens(
        self, ids: TokenIds, parent: int | None, coding: dict[str, Any], where: str
    ) -> NDArray[np.int32]:
        before = np.zeros(0, np.int32)
        if ids.kept and parent is not None:
            before = self._tokens[parent] if parent in self._tokens else self.tokens(parent)
        coder = None
        if ids.coding == tokens.OF_BOOK:
            coder = self._book(coding, where).token_coder
        return tokens.decode(ids, before, coder, where)

    def snapshot(self, number: int = -1, tier: str | None = None) -> Snapshot:
        """Snapshot ``number`` with tracks that decode on demand, and its opaque parts.

        ``tier``: of a snapshot with quality layers the one to read, the finest by default;
        `UsageError` if it is none of them.
        """
        record = self.record(number)
        layer = -1 if tier is None else self._layer_of(record, tier)
        allowance = self._container.allowance()
        tracks = [ArchivedTrack(self, track, record, layer) for track in record.tracks]
        return Snapshot(
            tokens=self.tokens(record.number),
            tracks=tracks,
            source=dict(record.source),
            opaque={entry.name: self._opaque(entry, allowance) for entry in record.opaque},
            identity=read_identity(record.identity, f"{self.path}: snapshot {record.number}"),
            exact=all(track.is_exact() for track in tracks),
            n_absent=sum(len(track.absent_positions()) for track in tracks),
        )

    def _layer_of(self, record: SnapshotRecord, tier: str) -> int:
        names = record.layers
        if tier not in names:
            raise UsageError(
                f"{self.path}: snapshot {record.number} has no tier {tier}; "
                f"it has {', '.join(names)}"
            )
        return names.index(tier)

    def read(
        self,
        snapshot: int = -1,
        layers: Sequence[int] | None = None,
        frames: tuple[int, int] | None = None,
    ) -> list[Frames]:
        """Keys and values of a snapshot, decoding only what is asked for.

        ``layers``: numbers of layers as the track counts them, all by default. ``frames``: start
        and stop, cut to the length of each track, all by default. See `Frames` for the values.

        >>> import tscfile
        >>> with tscfile.open("samples/session.tsc") as archive:     # doctest: +SKIP
        ...     keys, values = archive.read(layers=[3], frames=(0, 10))
        ...     keys.values.shape
        (10, 128)
        """
        record = self.record(snapshot)
        there = {tensor.layer for track in record.tracks for tensor in track.tensors}
        if layers is not None and not set(layers) <= there:
            missing = sorted(set(layers) - there)
            raise UsageError(f"{self.path}: no layers {missing}; there are 0 to {len(there) - 1}")
        if frames and not 0 <= frames[0] <= frames[1]:
            raise UsageError(f"frames {frames[0]} to {frames[1]}: give a start and a later stop")
        result = []
        for track in (ArchivedTrack(self, part, record) for part in record.tracks):
            chosen = [
                i for i, tensor in enumerate(track.tensors)
                if layers is None or tensor.layer in layers
            ]  # fmt: skip
            start, stop = frames or (0, len(track.cells))
            start, stop = min(start, len(track.cells)), min(stop, len(track.cells))
            for i, rows in zip(chosen, track.read(start, stop, chosen), strict=True):
                tensor = track.tensors[i]
                result.append(Frames(track.cache, track.stream, tensor, _as_values(rows, tensor)))
        return result

    def block(self, run: FrameRun) -> BlockEntry:
        """The index entry of a run's block; `DamagedError` if the run does not fit it."""
        entries = self._container.blocks
        if run.block >= len(entries) or run.first + run.count > entries[run.block].n_frames:
            raise DamagedError(f"{self.path}: a snapshot names frames that no block has; damaged")
        return entries[run.block]

    def decode(
        self, number: int, chunk: ChunkEntry, tensors: Sequence[TensorSpec]
    ) -> list[Rows]:
        """Rows of one chunk of block ``number``, checked against the index and ``tensors``."""
        where, payload = self.chunk_payload(number, chunk)
        header, rows = pipeline.decode_chunk(payload, where, self._max_chunk)
        self.check_header(number, chunk, header, tensors, where)
        return rows

    def check_header(
        self, number: int, chunk: ChunkEntry, header: ChunkHeader, tensors: Sequence[TensorSpec],
        where: str,
    ) -> None:  # fmt: skip
        """`DamagedError` unless a chunk is the one that index and snapshot speak of."""
        expected = tensors[chunk.first_tensor : chunk.first_tensor + chunk.n_tensors]
        if (
            header.n_frames != self._container.blocks[number].n_frames
            or (header.first_tensor, header.codec) != (chunk.first_tensor, chunk.codec)
            or (header.quality_layer, header.raw_length) != (chunk.quality_layer, chunk.raw_length)
            or list(header.row_bytes) != [tensor.row_bytes for tensor in expected]
            or any(tensor.dtype.ggml_id != header.dtype_id for tensor in expected)
        ):
            raise DamagedError(f"{where}: is not what index and snapshot say; damaged")

    def chunk_payload(self, number: int, chunk: ChunkEntry) -> tuple[str, memoryview]:
        """Where a chunk of block ``number`` is, for messages, and its verified payload."""
        where = f"{self.path}: block {number}, chunk at offset {chunk.ref.offset}"
        return where, self._container.read(chunk.ref, CHUNK, chunk.payload_checksum)

    def book_codec(self, record: SnapshotRecord) -> BookCodec:
        """The codec of a snapshot's book; `UsageError` if the book cannot be found."""
        with self._lock:
            if record.number not in self._codecs:
                from .book_codec import BookCodec

                where = f"{self.path}: snapshot {record.number}"
                opened = self._book(record.coding, where)
                facts = read_identity(record.identity, where).facts
                if "rope_pairing" in record.coding:
                    facts["rope_pairing"] = record.coding["rope_pairing"]
                self._codecs[record.number] = BookCodec(opened, ModelIdentity(facts), self.path)
            return self._codecs[record.number]

    def token_coder(self, record: SnapshotRecord) -> TokenCoder | None:
        """What token ids of a snapshot with a book are coded with."""
        return self._book(record.coding, f"{self.path}: snapshot {record.number}").token_coder
    def book_product(self, record: SnapshotRecord) -> ProductCodec:
        """The codec of the codebooks in a snapshot's book; raises as `book_codec` does, and
        `UsageError` if the book has none."""
        from .product_codec import BookDomain, ProductCodec

        with self._lock:
            if record.number not in self._products:
                codec = self.book_codec(record)
                self._products[record.number] = ProductCodec(BookDomain(codec, self.path))
            return self._products[record.number]

    def session_product(self, codebooks: int, where: str) -> ProductCodec:
        """The codec of codebooks that the file holds; `DamagedError` if it does not."""
        from .product_codec import ProductCodec
        from .product_session import SessionCodes

        with self._lock:
            if codebooks not in self._session_products:
                ref = self._container.by_checksum(CODEBOOKS).get(codebooks)
                if ref is None:
                    raise DamagedError(f"{where}: its codebooks are not in the file; damaged")
                payload = self._container.read(ref, CODEBOOKS, codebooks)
                place = f"{self.path}: codebooks at offset {ref.offset}"
                found = ProductCodec(SessionCodes.read(payload, place))
                self._session_products[codebooks] = found
            return self._session_products[codebooks]

    def _book(self, coding: dict[str, Any], where: str) -> OpenBook:
        """The book that a snapshot's coding names."""
        wanted = coding.get("book")
        if not isinstance(wanted, str):
            raise DamagedError(f"{where}: names no book; damaged")
        if wanted not in self._books:
            from .books.book import find

            inside = self.embedded_book(wanted)
            self._books[wanted] = inside or find(wanted, self._given_book, self.path)
        return self._books[wanted]

    def embedded_book(self, wanted: str) -> OpenBook | None:
        """The book with id ``wanted``, if the archive holds it."""
        from .books.book import book_id, open_bytes

        for ref in self._container.extras(BOOK):
            data = self._container.read(ref, BOOK)
            if book_id(data).hex() == wanted:
                return open_bytes(data, f"{self.path}: book at offset {ref.offset}")
        return None

    def session_codec(self, basis: int, where: str) -> SessionCodec:
        """The codec of a basis that the file holds; `DamagedError` if it does not."""
        from .session_basis import Basis
        from .session_codec import SessionCodec

        # One thread decodes a basis, the others wait for it.
        with self._lock:
            if basis not in self._session_codecs:
                chain = [(ref, self._container.read(ref, BASIS, key))
                         for key, ref in self._basis_chain(basis, where)]  # fmt: skip
                found: Basis | None = None
                for ref, payload in reversed(chain):
                    place = f"{self.path}: basis at offset {ref.offset}"
                    found = Basis.read(payload, place, found)
                assert found is not None
                self._session_codecs[basis] = SessionCodec(found)
            return self._session_codecs[basis]

    def _basis_chain(self, basis: int, where: str) -> Iterator[tuple[int, RecordRef]]:
        """A basis and those it extends, the nearest first: ids and records."""
        from .session_basis import MAX_CHAIN, Basis

        if self._bases is None:
            self._bases = self._container.by_checksum(BASIS)
        end = self.size
        for _ in range(MAX_CHAIN):
            ref = self._bases.get(basis)
            if ref is None or ref.offset >= end:
                raise DamagedError(f"{where}: its basis is not in the file before it; damaged")
            yield basis, ref
            end = ref.offset
            basis = Basis.read_parent(self._container.read(ref, BASIS, basis), where)
            if not basis:
                return
        raise DamagedError(f"{where}: its basis extends too many others; damaged")

    def check_content(self, number: int, rows: Sequence[Rows]) -> None:
        """`DamagedError` unless ``rows`` are what block ``number`` was made of."""
        if blocks.content_id(rows) != self._container.blocks[number].content_id:
            raise DamagedError(
                f"{self.path}: block {number} does not decode to what was packed; damaged"
            )

    def restore_bytes(self, number: int = -1, layer: int | None = None) -> int:
        """Bytes of the file needed to restore one snapshot, structure included; ``layer``: with
        quality layers up to this one and no others."""
        record = self.record(number)
        used = {run.block for track in record.tracks for run in track.runs}
        total = Header.SIZE + Trailer.SIZE
        total += sum(segment.ref.length for segment in self._container.segments)
        total += sum(
            chunk.ref.length for block in used for chunk in self._container.blocks[block].chunks
            if layer is None or chunk.quality_layer <= layer
        )  # fmt: skip
        total += sum(entry.ref.length for entry in record.opaque)
        total += sum(ref.length for ref in self.basis_records(record))
        held = self._container.by_checksum(CODEBOOKS)
        total += sum(held[key].length for key in set(self.codebooks(record)) if key in held)
        ancestor: int | None = record.number
        while ancestor is not None:
            total += self._container.snapshots[ancestor].length
            ancestor = self.record(ancestor).parent
        return total

    def bases(self, record: SnapshotRecord) -> list[int]:
        """Ids of the bases that a snapshot's blocks of codec 3 are coded with, the newest last."""
        return self._ids(record, "bases", "a basis")

    def codebooks(self, record: SnapshotRecord) -> list[int]:
        """Ids of the codebooks of the file that a snapshot's blocks of codec 6 are coded with, the
        newest last."""
        return self._ids(record, "codebooks", "codebooks")

    def _ids(self, record: SnapshotRecord, key: str, what: str) -> list[int]:
        names = record.coding.get(key, [])
        if not isinstance(names, list) or not all(
            isinstance(name, str) and re.fullmatch("[0-9a-f]{16}", name) for name in names
        ):
            raise DamagedError(
                f"{self.path}: snapshot {record.number} names {what} in an unknown way; damaged"
            )
        return [int(name, 16) for name in names]

    def basis_records(self, record: SnapshotRecord) -> set[RecordRef]:
        """Records of a snapshot's bases and of all that they extend."""
        where = f"{self.path}: snapshot {record.number}"
        chains = [self._basis_chain(basis, where) for basis in self.bases(record)]
        return {ref for chain in chains for _, ref in chain}

    def _payload(self, number: int) -> tuple[memoryview, str]:
        ref = self._container.snapshots[number]
        return self._container.read(ref, SNAPSHOT), f"{self.path}: snapshot {number}"

    def _load(self, number: int, payload: memoryview, parent: int | None, where: str) -> None:
        before = (None, b"") if parent is None else self._records[parent]
        allowance = self._container.allowance()
        full = allowance.left

        def tokens_of(ids: TokenIds, coding: dict[str, Any]) -> NDArray[np.int32]:
            return self._decode_tokens(ids, parent, coding, where)

        record, structure = SnapshotRecord.read(
            payload, *before, tokens_of, self._max_cells, where, allowance
        )
        if record.number != number:
            raise DamagedError(f"{where}: its record says it is number {record.number}; damaged")
        has_book = isinstance(record.coding.get("book"), str)
        for track in record.tracks:
            for run in track.runs:
                block = self.block(run)
                self._check_chunks(block, track, where)
                if not has_book and any(c.codec in registry.OF_BOOK for c in block.chunks):
                    raise DamagedError(f"{where}: has frames of a book and names none; damaged")
        self._records[number] = record, structure
        self._record_bytes[number] = full - allowance.left
        # The oldest go; one that is needed again is read again.
        while len(self._records) > 1 and sum(self._record_bytes.values()) > _CACHED_RECORDS:
            oldest = next(iter(self._records))
            del self._records[oldest], self._record_bytes[oldest]

    def _check_chunks(self, block: BlockEntry, track: TrackRecord, where: str) -> None:
        """Each quality layer of a block must be all tensors of the track, once and in order, and
        the layers build on each other."""
        if is_absent(block):
            return
        if block.n_layers > MAX_LAYERS:
            raise DamagedError(f"{where}: a block of {block.n_layers} quality layers; damaged")
        by_layer = [block.layer(number) for number in range(block.n_layers)]
        whole = block.chunks == tuple(chunk for chunks in by_layer for chunk in chunks)
        for number, chunks in enumerate(by_layer):
            whole = whole and self._holds(chunks, block, track)
            codecs = {chunk.codec for chunk in chunks}
            if codecs & registry.LOSSY:
                # One chunk of all tensors; what refines needs what it refines below it.
                below = {chunk.codec for chunk in by_layer[number - 1]} if number else set()
                refines = codecs == {registry.BOOK_REFINEMENT}
                fits = bool(below) and below <= registry.BOOK_LOSSY if refines else not number
                whole = whole and fits and len(chunks) == 1
            else:
                whole = whole and number == block.n_layers - 1
                whole = whole and (len(chunks) == 1 or not codecs & registry.WHOLE)
        if not whole or (track.tensors and not by_layer):
            raise DamagedError(f"{where}: a block does not hold the tensors of its track; damaged")

    def _holds(self, chunks: Sequence[ChunkEntry], block: BlockEntry, track: TrackRecord) -> bool:
        next_tensor = 0
        for chunk in chunks:
            held = track.tensors[next_tensor : next_tensor + chunk.n_tensors]
            raw_length = block.n_frames * sum(spec.row_bytes for spec in held)
            if (chunk.first_tensor, chunk.raw_length) != (next_tensor, raw_length):
                return False
            next_tensor += chunk.n_tensors
        return next_tensor == len(track.tensors)

    def _opaque(self, entry: OpaqueEntry, allowance: Allowance) -> bytes:
        where = f"{self.path}: opaque part {entry.name!r} at offset {entry.ref.offset}"
        allowance.claim(entry.raw_length, where)
        content = zstd.decompress(
            self._container.read(entry.ref, OPAQUE), entry.raw_length, where
        )
        if blocks.opaque_id(content) != entry.content_id:
            raise DamagedError(f"{where}: its content is not what the snapshot says; damaged")
        return content


def _size(arrays: dict[int, NDArray[np.int32]]) -> int:
    return sum(each.nbytes for each in arrays.values())


def _as_values(rows: Rows, tensor: TensorSpec) -> NDArray[Any]:
    view = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}.get(tensor.dtype.name)
    return rows if view is None else rows.view(view)
