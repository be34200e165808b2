"""A track of a snapshot in an archive: its frames are decoded when they are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import blocks, registry, workers
from .bytestream import ByteReader
from .container.records import BlockEntry, ChunkEntry, ChunkHeader, FrameRun
from .container.snapshots import SnapshotRecord, TrackRecord, common_prefix
from .context import FrameContext
from .errors import DamagedError, UnsupportedError, UsageError
from .model import NOT_STORED, CellTable, TensorSpec

if TYPE_CHECKING:
    from .archive import Archive
    from .book_codec import BookCodec
    from .product_codec import ProductCodec
    from .session_codec import SessionCodec

Rows = NDArray[np.uint8]


class ArchivedTrack:
    """A `tscfile.model.Track` whose frames are decoded from the archive when read."""

    def __init__(
        self, archive: Archive, record: TrackRecord, owner: SnapshotRecord, layer: int = -1
    ) -> None:
        """``layer``: the quality layer to read; the last of each block by default."""
        self._archive = archive
        self._owner = owner
        self._layer = layer
        self.cache = record.cache
        self.stream = record.stream
        self.attributes = record.attributes
        self.tensors: Sequence[TensorSpec] = record.tensors
        self.cells: CellTable = record.cells
        self.runs = record.runs

    def read(self, start: int, stop: int, tensors: Sequence[int] | None = None) -> list[Rows]:
        """Frames ``start`` to ``stop``, uint8 ``[stop - start, row_bytes]`` for each tensor.

        Decodes the chunks that hold them and no others, on all cores. `IndexError` if the frames
        are not in the track, `DamagedError` if the archive does not hold what it says.
        """
        self._check_range(start, stop)
        self._check_stored(start, stop)
        chosen = list(range(len(self.tensors)) if tensors is None else tensors)
        out = [np.empty((stop - start, self.tensors[i].row_bytes), np.uint8) for i in chosen]
        self._decode(start, stop, dict(zip(chosen, out, strict=True)))
        return out

    def read_into(self, start: int, stop: int, out: Sequence[Rows]) -> None:
        """Like `read` of all tensors, into the arrays ``out``."""
        self._check_range(start, stop)
        self._check_stored(start, stop)
        self._decode(start, stop, dict(enumerate(out)))

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self.cells):
            raise IndexError(f"frames {start} to {stop} of a track of {len(self.cells)}")

    def _check_stored(self, start: int, stop: int) -> None:
        at = 0
        for run in self.runs if self.tensors else ():
            inside = max(at, start) < min(at + run.count, stop)
            if inside and is_absent(self._archive.block(run)):
                raise UsageError(f"{self._archive.path}: {NOT_STORED}")
            at += run.count

    def absent_positions(self) -> NDArray[np.int32]:
        """Positions of the frames that are not in the file, int32 ``[n]``."""
        absent = [is_absent(self._archive.block(run)) for run in self.runs]
        return self.cells.pos[np.flatnonzero(np.repeat(absent, [run.count for run in self.runs]))]

    def _decode(self, start: int, stop: int, out: dict[int, Rows]) -> None:
        """Fill ``out``, arrays by tensor, with frames ``start`` to ``stop``."""

        def decode(task: tuple[FrameRun, int, ChunkEntry]) -> None:
            run, at, chunk = task
            rows = self.decode(run, start + at, chunk)
            for i, part in enumerate(rows, chunk.first_tensor):
                if i in out:
                    out[i][at : at + run.count] = part

        workers.run(decode, self._tasks(start, stop, out))
        if len(out) == len(self.tensors):
            workers.run(self._check_block, self._whole_blocks(start, stop, out))

    def decode(self, run: FrameRun, cell: int, chunk: ChunkEntry) -> list[Rows]:
        """Rows of ``run``, whose first frame is cell ``cell``, from one chunk of its block."""
        # A stranger's book may lead to infinities, which rows can hold.
        with np.errstate(all="ignore"):
            return self._decode_run(run, cell, chunk)

    def _decode_run(self, run: FrameRun, cell: int, chunk: ChunkEntry) -> list[Rows]:
        if chunk.codec not in registry.LOSSY:
            rows = self.exact_rows(run.block, chunk)
            return [part[run.first : run.first + run.count] for part in rows]
        where, payloads = self.lossy_payloads(run.block, chunk)
        context = self.context_in(run, self.cells.pos[cell : cell + run.count])
        if chunk.codec == registry.PRODUCT:
            product = self.product_codec(payloads[0], where)
            return product.decode(payloads[0], self.tensors, run.first, context, where)
        if chunk.codec == registry.SESSION_TRANSFORM:
            codec = self.session_codec(payloads[0], where)
            return codec.decode(payloads[0], self.tensors, run.first, context.key_pos, where)
        return self.codec().decode(payloads, self.tensors, run.first, context, where)

    def exact_rows(self, number: int, chunk: ChunkEntry) -> list[Rows]:
        """All rows of an exact chunk of block ``number``."""
        if chunk.codec not in registry.WHOLE:
            return self._archive.decode(number, chunk, self.tensors)
        where, payload = self._whole_payload(number, chunk)
        if chunk.codec == registry.BOOK_EXACT:
            return self.codec().decode_exact(payload, self.tensors, where)
        from . import difference_codec

        body = ByteReader(payload, where)
        ChunkHeader.read(body)
        sources = self._archive.container.blocks[number].sources
        return difference_codec.decode(body, self._rows_of(sources, where), self.tensors)

    def _rows_of(self, sources: Sequence[FrameRun], where: str) -> list[Rows]:
        """Frames of other blocks that are exact."""
        parts = []
        for run in sources:
            entry = self._archive.block(run)
            if not is_exact(entry):
                raise DamagedError(f"{where}: is a difference to frames of a lossy tier; damaged")
            rows = self._archive.source_rows(run.block, partial(self.block_rows, run.block))
            parts.append([part[run.first : run.first + run.count] for part in rows])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def block_rows(self, number: int) -> list[Rows]:
        """All rows of a block whose last layer is exact."""
        chunks = self._archive.container.blocks[number].layer(-1)
        return [part for chunk in chunks for part in self.exact_rows(number, chunk)]

    def _whole_payload(self, number: int, chunk: ChunkEntry) -> tuple[str, memoryview]:
        """A chunk of all tensors that fits index and snapshot."""
        where, payload = self._archive.chunk_payload(number, chunk)
        header = ChunkHeader.read(ByteReader(payload, where))
        self._archive.check_header(number, chunk, header, self.tensors, where)
        if header.raw_length > blocks.MOST_LOSSY_BYTES:
            raise DamagedError(f"{where}: {header.raw_length} raw bytes are too many; damaged")
        return where, payload

    def lossy_payloads(self, number: int, chunk: ChunkEntry) -> tuple[str, list[memoryview]]:
        """A lossy chunk and those that it refines, the base first; they fit index, snapshot, and
        book, basis or codebooks."""
        payloads = []
        entry = self._archive.container.blocks[number]
        for each in entry.chunks[: chunk.quality_layer + 1]:
            where, payload = self._whole_payload(number, each)
            if each.codec not in registry.CODEC_NAMES:
                raise UnsupportedError(f"{where}: codec {each.codec} is not known to this build")
            payloads.append(payload)
        if chunk.codec == registry.PRODUCT:
            self.product_codec(payloads[0], where).check(self.tensors, where)
        elif chunk.codec == registry.SESSION_TRANSFORM:
            self.session_codec(payloads[0], where).check(self.tensors, where)
        else:
            self.codec().check(self.tensors, where)
        return where, payloads

    def chunks(self, run: FrameRun) -> tuple[ChunkEntry, ...]:
        """Those of the layer that is read. A block may have fewer: it is then read as it is."""
        entry = self._archive.block(run)
        layer = self._layer if self._layer < entry.n_layers else -1
        return entry.layer(layer)

    def session_codec(self, payload: memoryview, where: str) -> SessionCodec:
        """What a chunk of codec 3 is decoded with."""
        from .session_codec import basis_of

        basis = basis_of(payload, where)
        if basis not in self._archive.bases(self._owner):
            raise DamagedError(f"{where}: is coded with a basis that its snapshot lacks; damaged")
        return self._archive.session_codec(basis, where)

    def product_codec(self, payload: memoryview, where: str) -> ProductCodec:
        """What a chunk of codec 6 is decoded with."""
        from .product_codec import OF_BOOK, codebook_of

        codebook = codebook_of(payload, where)
        if codebook == OF_BOOK:
            return self._archive.book_product(self._owner)
        if codebook not in self._archive.codebooks(self._owner):
            raise DamagedError(f"{where}: is coded with codebooks that its snapshot lacks; damaged")
        return self._archive.session_product(codebook, where)

    @property
    def n_layers(self) -> int:
        """Quality layers of the snapshot."""
        return len(self._owner.layers)

    @property
    def archive(self) -> Archive:
        return self._archive

    @property
    def coding(self) -> dict[str, Any]:
        """What the snapshot says of how its frames are coded."""
        return self._owner.coding

    def codec(self) -> BookCodec:
        """What the snapshot's book-coded chunks are decoded with."""
        return self._archive.book_codec(self._owner)

    def find_book(self) -> None:
        """Find the book that the track's blocks need, if they do; raises as `codec` does."""
        numbers = self._archive.with_sources(run.block for run in self.runs)
        entries = self._archive.container.blocks
        chunks = (chunk for number in numbers for chunk in entries[number].chunks)
        needing = set(registry.OF_BOOK)
        if "book" in self._owner.coding:
            needing.add(registry.PRODUCT)
        if any(chunk.codec in needing for chunk in chunks):
            self.codec()

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Token ids of the snapshot, int32 ``[n_tokens]``."""
        return self._archive.tokens(self._owner.number)

    def same_tokens(
        self, tokens: NDArray[np.int32], pos: NDArray[np.int32]
    ) -> NDArray[np.bool_]:
        """At which positions ``pos`` all tokens so far are those of ``tokens``, bool ``[n]``."""
        same: NDArray[np.bool_] = pos < common_prefix(self.tokens, tokens)
        return same

    def may_be_same(self, tokens: NDArray[np.int32], pos: NDArray[np.int32]) -> NDArray[np.bool_]:
        """The same, and true wherever one of both does not know its tokens."""
        if not len(self.tokens) or not len(tokens):
            return np.ones(len(pos), bool)
        return self.same_tokens(tokens, pos)

    def context(self, start: int, stop: int) -> FrameContext:
        """What is known of cells ``start`` to ``stop`` without the payload, if they never moved."""
        return FrameContext(self.cells.pos[start:stop], self.tokens)

    def context_in(self, run: FrameRun, pos: NDArray[np.int32]) -> FrameContext:
        """What the frames of ``run``, in cells at positions ``pos``, are decoded from."""
        if not run.context:
            return FrameContext(pos, self.tokens)
        known = self._archive.tokens(self._owner.number, run.context)
        return FrameContext((pos.astype(np.int64) - run.shift).astype(np.int32), known, run.shift)

    def _whole_blocks(
        self, start: int, stop: int, out: dict[int, Rows]
    ) -> Iterator[tuple[int, list[Rows]]]:
        """Blocks that were decoded whole, with their rows."""
        at = 0
        for run in self.runs:
            first, last = at - start, at + run.count - start
            entry = self._archive.block(run)
            is_whole = run.count == entry.n_frames and are_exact(self.chunks(run))
            if first >= 0 and last <= stop - start and is_whole:
                yield run.block, [out[i][first:last] for i in range(len(out))]
            at += run.count

    def is_exact(self) -> bool:
        """Are all rows the very ones that were packed?"""
        entries = [(self._archive.block(run), self.chunks(run)) for run in self.runs]
        return all(not is_absent(entry) and are_exact(chunks) for entry, chunks in entries)

    def check_block(self, number: int) -> None:
        """Decode a whole block of the track; `DamagedError` if it is not what was packed."""
        entry = self._archive.container.blocks[number]
        if is_absent(entry):
            return
        if is_exact(entry):
            self._archive.check_content(number, self.block_rows(number))
        lossy = lossy_chunks(entry)
        if not lossy or (is_exact(entry) and self.n_layers == 1):
            # An exact snapshot has no use for coarser layers, nor names what they are coded with.
            return
        where, payloads = self.lossy_payloads(number, lossy[-1])
        if lossy[-1].codec == registry.PRODUCT:
            self.product_codec(payloads[0], where).read(payloads[0], where)
        elif lossy[-1].codec == registry.SESSION_TRANSFORM:
            self.session_codec(payloads[0], where).integers(payloads[0], where)
        else:
            self.codec().read(payloads, where)

    def _check_block(self, task: tuple[int, list[Rows]]) -> None:
        number, rows = task
        self._archive.check_content(number, rows)

    def _tasks(
        self, start: int, stop: int, wanted: Collection[int]
    ) -> Iterator[tuple[FrameRun, int, ChunkEntry]]:
        """Chunks to decode: the part of a run that is asked for, where it goes, the chunk."""
        at = 0
        for run in self.runs:
            first, last = max(at, start), min(at + run.count, stop)
            if first < last:
                part = replace(run, first=run.first + first - at, count=last - first)
                for chunk in self.chunks(run):
                    tensors = range(chunk.first_tensor, chunk.first_tensor + chunk.n_tensors)
                    if any(tensor in wanted for tensor in tensors):
                        yield part, first - start, chunk
            at += run.count


def is_exact(block: BlockEntry) -> bool:
    """Does the last layer of a block give back the very rows that were packed?"""
    return not is_absent(block) and are_exact(block.layer(-1))


def are_exact(chunks: Sequence[ChunkEntry]) -> bool:
    return all(chunk.codec not in registry.LOSSY for chunk in chunks)


def lossy_chunks(block: BlockEntry) -> list[ChunkEntry]:
    """The chunks of a block's lossy layers, one a layer, the base first."""
    return [chunk for chunk in block.chunks if chunk.codec in registry.LOSSY]


def is_absent(block: BlockEntry) -> bool:
    """Are the frames of a block not in the file, but to be computed again?"""
    return not block.chunks and block.content_id == blocks.NO_ID
