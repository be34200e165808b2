"""An open ``.tsc`` file: its snapshots, their frames, and what they cost."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import blocks, pipeline, registry
from .archived_track import ArchivedTrack, is_absent, is_exact
from .bytestream import Allowance
from .container.reader import Container
from .container.records import (
    BASIS,
    BOOK,
    CHUNK,
    CODEBOOKS,
    MAX_LAYERS,
    OPAQUE,
    BlockEntry,
    ChunkEntry,
    ChunkHeader,
    FrameRun,
    Header,
    RecordRef,
    Trailer,
)
from .container.snapshots import (
    OpaqueEntry,
    SnapshotHead,
    SnapshotRecord,
    TrackRecord,
)
from .entropy import zstd
from .errors import DamagedError, UsageError
from .history import History
from .identity import read_identity
from .model import ModelIdentity, Snapshot, TensorSpec

if TYPE_CHECKING:
    from .book_codec import BookCodec
    from .books.book import OpenBook
    from .entropy.token_ids import TokenCoder
    from .product_codec import ProductCodec
    from .session_codec import SessionCodec

Rows = NDArray[np.uint8]

_CACHED_SOURCES = 16 << 20

MAX_SOURCE_CHAIN = 8
"""Differences of blocks to blocks that are differences themselves."""

MAX_SOURCE_WAYS = 256
"""Blocks behind a difference, each as often as there is a way to it: a reader that does not keep
what it decoded decodes so many."""


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
        self, path: str | os.PathLike[str], *, book: str | os.PathLike[str] | None = None,
        container: Container | None = None,
    ) -> None:  # fmt: skip
        """``book``: its file, where it is neither beside the archive nor in ``TSC_BOOKS``.
        ``container``: the file at ``path`` if it is open already; it is closed with the archive.
        """
        self._container = container or Container(path)
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
        self._history = History(self._container, self._lock, self._token_coder, self._check_runs)
        self._source_rows: dict[int, list[Rows]] = {}
        self._source_ways: dict[int, int] = {}
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
        return self._history.record(number)

    def head(self, number: int = -1) -> SnapshotHead:
        """What is known of a snapshot without its structure; raises as `record` does."""
        return self._history.head(number)

    def structure(self, number: int) -> bytes:
        """The structure of a snapshot's record."""
        return self._history.structure(number)

    def tokens(self, number: int = -1, context: int = 0) -> NDArray[np.int32]:
        """Token ids of a snapshot, int32 ``[n]``; needs its book if they are coded with it.

        ``context``: of which of its contexts, counted from 1; 0 for its own.
        """
        return self._history.tokens(number, context)

    def lineage(self, number: int) -> set[int]:
        """A snapshot and those whose records it is read with: numbers."""
        return self._history.lineage(number)

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
            opaque={entry.name: self.opaque_part(entry, allowance) for entry in record.opaque},
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
        # Blocks shared with a snapshot of more layers have the finest one last.
        return -1 if tier == names[-1] else names.index(tier)

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

    def source_rows(self, number: int, decode: Callable[[], list[Rows]]) -> list[Rows]:
        """All rows of a block that others are differences to: decoded once for several."""
        with self._lock:
            if number not in self._source_rows:
                rows = decode()
                while self._source_rows and (
                    _total(rows) + sum(map(_total, self._source_rows.values())) > _CACHED_SOURCES
                ):
                    del self._source_rows[next(iter(self._source_rows))]
                self._source_rows[number] = rows
            return self._source_rows[number]

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
        # A difference holds tensors of all types, and names the first one's.
        named = expected[:1] if header.codec == registry.DIFFERENCE else expected
        if (
            header.n_frames != self._container.blocks[number].n_frames
            or (header.first_tensor, header.codec) != (chunk.first_tensor, chunk.codec)
            or (header.quality_layer, header.raw_length) != (chunk.quality_layer, chunk.raw_length)
            or list(header.row_bytes) != [tensor.row_bytes for tensor in expected]
            or any(tensor.dtype.ggml_id != header.dtype_id for tensor in named)
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
        return self._token_coder(record.coding, f"{self.path}: snapshot {record.number}")

    def _token_coder(self, coding: dict[str, Any], where: str) -> TokenCoder | None:
        return self._book(coding, where).token_coder

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
                         for key, ref in self.basis_chain(basis, where)]  # fmt: skip
                found: Basis | None = None
                for ref, payload in reversed(chain):
                    place = f"{self.path}: basis at offset {ref.offset}"
                    found = Basis.read(payload, place, found)
                assert found is not None
                self._session_codecs[basis] = SessionCodec(found)
            return self._session_codecs[basis]

    def basis_chain(self, basis: int, where: str) -> Iterator[tuple[int, RecordRef]]:
        """A basis and those it extends, the nearest first: ids and records. `DamagedError` where
        one of them is not there."""
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
        used = self.with_sources(run.block for track in record.tracks for run in track.runs)
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
        return total + sum(self._container.snapshots[each].length for each in self.lineage(number))

    def bases(self, record: SnapshotRecord) -> list[int]:
        """Ids of the bases that a snapshot's blocks of codec 3 are coded with, the newest last."""
        return self._named(record, "bases", "a basis")

    def codebooks(self, record: SnapshotRecord) -> list[int]:
        """Ids of the codebooks of the file that a snapshot's blocks of codec 6 are coded with, the
        newest last."""
        return self._named(record, "codebooks", "codebooks")

    def _named(self, record: SnapshotRecord, key: str, what: str) -> list[int]:
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
        chains = [self.basis_chain(basis, where) for basis in self.bases(record)]
        return {ref for chain in chains for _, ref in chain}

    def _check_runs(self, record: SnapshotRecord, where: str) -> None:
        for track in record.tracks:
            at = 0
            for run in track.runs:
                self._check_context(run, at, track, record, where)
                at += run.count
            self._check_blocks([run.block for run in track.runs], track, record, where)

    def check_run(
        self, run: FrameRun, start: int, track: TrackRecord, record: SnapshotRecord, where: str
    ) -> None:
        """`DamagedError` unless a frame run of a snapshot, whose first frame is cell ``start``,
        leads to frames of its track."""
        self._check_context(run, start, track, record, where)
        self._check_blocks([run.block], track, record, where)

    def _check_context(
        self, run: FrameRun, start: int, track: TrackRecord, record: SnapshotRecord, where: str
    ) -> None:
        absent = is_absent(self.block(run))
        if run.context > len(record.head.contexts):
            raise DamagedError(f"{where}: has frames of a context it lacks; damaged")
        if run.context and absent:
            raise DamagedError(f"{where}: has a context for frames that are not stored; damaged")
        pos = track.cells.pos[start : start + run.count].astype(np.int64) - run.shift
        if run.context and (pos != pos.astype(np.int32)).any():
            raise DamagedError(f"{where}: has frames of positions that cannot be; damaged")

    def _check_blocks(
        self, numbers: Iterable[int], track: TrackRecord, record: SnapshotRecord, where: str
    ) -> None:
        has_book = isinstance(record.coding.get("book"), str)
        for number in self.with_sources(numbers):
            block = self._container.blocks[number]
            if self.source_ways(block.sources) > MAX_SOURCE_WAYS:
                raise DamagedError(f"{where}: is a difference to too many others; damaged")
            self._check_chunks(block, track, where)
            if not all(is_exact(self.block(run)) for run in block.sources):
                raise DamagedError(f"{where}: has a difference to frames of a lossy tier; damaged")
            if not has_book and any(c.codec in registry.OF_BOOK for c in block.chunks):
                raise DamagedError(f"{where}: has frames of a book and names none; damaged")

    def with_sources(self, numbers: Iterable[int]) -> list[int]:
        """Blocks and all that they are differences to, in ascending order.

        `DamagedError` for a chain of more than `MAX_SOURCE_CHAIN`.
        """
        found: set[int] = set()
        level, entries = set(numbers), self._container.blocks
        for _ in range(MAX_SOURCE_CHAIN + 1):
            found |= level
            level = {run.block for number in level for run in entries[number].sources}
            if not level:
                return sorted(found)
        raise DamagedError(f"{self.path}: a chain of too many differences to blocks; damaged")

    def source_ways(self, sources: Iterable[FrameRun]) -> int:
        """How many blocks there are behind a difference to ``sources``, each as often as there is a
        way to it."""
        direct = {run.block for run in sources}
        for number in self.with_sources(direct):
            if number not in self._source_ways:
                behind = {run.block for run in self._container.blocks[number].sources}
                self._source_ways[number] = sum(1 + self._source_ways[each] for each in behind)
        return sum(1 + self._source_ways[number] for number in direct)

    def n_sources(self, number: int) -> int:
        """How long the chain of differences is that a block is read with."""
        level, length, entries = {number}, 0, self._container.blocks
        while level := {run.block for each in level for run in entries[each].sources}:
            length += 1
        return length

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
            if not codecs <= registry.CODEC_NAMES.keys():
                # Of a later version, and of no concern where it is not asked for.
                continue
            if codecs & registry.LOSSY:
                # One chunk of all tensors; what refines needs what it refines below it.
                fits = not number
                if codecs == {registry.BOOK_REFINEMENT}:
                    below = {chunk.codec for chunk in by_layer[number - 1]}
                    newer = not below <= registry.CODEC_NAMES.keys()
                    fits = number > 0 and (newer or below <= registry.BOOK_LOSSY)
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

    def opaque_part(self, entry: OpaqueEntry, allowance: Allowance) -> bytes:
        """Bytes that a snapshot's source carried; `DamagedError` if they are not what they were."""
        where = f"{self.path}: opaque part {entry.name!r} at offset {entry.ref.offset}"
        allowance.claim(entry.raw_length, where)
        content = zstd.decompress(
            self._container.read(entry.ref, OPAQUE), entry.raw_length, where
        )
        if blocks.opaque_id(content) != entry.content_id:
            raise DamagedError(f"{where}: its content is not what the snapshot says; damaged")
        return content


def _total(rows: Sequence[Rows]) -> int:
    return sum(part.nbytes for part in rows)


def _as_values(rows: Rows, tensor: TensorSpec) -> NDArray[Any]:
    view = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}.get(tensor.dtype.name)
    return rows if view is None else rows.view(view)
