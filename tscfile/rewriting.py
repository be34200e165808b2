"""Copy parts of one archive into another, as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from . import blocks, tokens
from .archive import Archive
from .bytestream import ByteReader
from .container.records import OPAQUE, ChunkHeader, FrameRun, RecordRef
from .container.snapshots import (
    Context,
    SnapshotRecord,
    TokenIds,
    common_prefix,
    dictionary_for,
)
from .container.writer import ContainerWriter, EncodedChunk
from .registry import DIFFERENCE

Progress = Callable[[int], None]
Tokens = NDArray[np.int32]


class Copier:
    """Copies blocks and snapshots of ``archive`` to ``writer``. ``progress`` is called with the
    bytes of each chunk that is copied."""

    def __init__(
        self, archive: Archive, writer: ContainerWriter, progress: Progress | None = None
    ) -> None:
        self._archive, self._writer = archive, writer
        self._progress = progress or (lambda n: None)
        self._opaque: dict[int, RecordRef] = {}
        self._structures: list[bytes] = []
        self._parents: list[int | None] = []

    def block(
        self, number: int, n_layers: int | None = None, sources: Sequence[FrameRun] | None = None
    ) -> int:
        """Copy a block, or its first ``n_layers`` quality layers; returns its new number.

        ``sources``: where in the new file the frames are that it is a difference to; as in the old
        one by default.
        """
        entry = self._archive.container.blocks[number]
        wanted = [
            chunk for chunk in entry.chunks
            if n_layers is None or chunk.quality_layer < n_layers
        ]  # fmt: skip
        chunks = []
        for chunk in wanted:
            where, payload = self._archive.chunk_payload(number, chunk)
            reader = ByteReader(payload, where)
            header = ChunkHeader.read(reader)
            chunks.append(EncodedChunk(header, bytes(reader.take(reader.remaining))))
            self._progress(len(payload))
        # Frames of no tensors have no chunks either, and are all there.
        content_id = blocks.NO_ID if entry.chunks and not chunks else entry.content_id
        if not any(chunk.codec == DIFFERENCE for chunk in wanted):
            sources = ()
        elif sources is None:
            sources = entry.sources
        return self._writer.add_block(
            entry.n_frames, content_id, entry.logical_id, chunks, sources
        )

    def snapshot(self, record: SnapshotRecord, original: int) -> None:
        """Add ``record``, made of snapshot ``original``, whose opaque parts are copied. Its parent
        is one that was added before."""
        opaque = []
        for entry in record.opaque:
            offset = entry.ref.offset
            if offset not in self._opaque:
                body = bytes(self._archive.container.read(entry.ref, OPAQUE))
                self._opaque[offset] = self._writer.add_opaque(body)
            opaque.append(replace(entry, ref=self._opaque[offset]))
        parent = record.parent
        dictionary = dictionary_for(parent, self._parents.__getitem__)
        head = replace(record.head, number=len(self._parents), dictionary=dictionary)
        record = replace(record, head=head, opaque=opaque)
        # Tokens say something of a cell only where it has columns of its own.
        has_columns = any(track.cells.ext.shape[1] for track in record.tracks)
        ids = self._archive.tokens(original) if has_columns else np.zeros(0, np.int32)
        structure = record.structure(ids)
        like = b"" if dictionary is None else self._structures[dictionary]
        self._writer.add_snapshot(record.write(structure, like))
        self._structures.append(structure)
        self._parents.append(parent)


def nearest_kept(
    archive: Archive, record: SnapshotRecord, new_numbers: Mapping[int, int]
) -> int | None:
    """The new number of the nearest ancestor that is kept; ``new_numbers``: of all that are."""
    ancestor = record.parent
    while ancestor is not None and ancestor not in new_numbers:
        ancestor = archive.head(ancestor).parent
    return None if ancestor is None else new_numbers[ancestor]


def all_tokens(archive: Archive, record: SnapshotRecord) -> list[Tokens]:
    """A snapshot's tokens, and those of its contexts, int32 ``[n]`` each."""
    return [archive.tokens(record.number, i) for i in range(len(record.head.contexts) + 1)]


def tokens_below(
    archive: Archive, record: SnapshotRecord, wanted: Sequence[Tokens],
    above: SnapshotRecord | None, tokens_of: Callable[[int, int], Tokens],
) -> tuple[TokenIds, tuple[Context, ...]]:  # fmt: skip
    """``wanted``, a snapshot's tokens and those of its contexts, as ``record`` stores them below
    another parent, ``above``. ``tokens_of``: those of a snapshot, by the number that its record has
    and the number of a context."""
    known = [np.zeros(0, np.int32)]
    # As when it was appended: an exact snapshot needs no book for its parent's tokens.
    if above is not None and (record.coding or not above.coding):
        known = [tokens_of(above.number, i) for i in range(len(above.head.contexts) + 1)]
    coder = archive.token_coder(record) if "book" in record.coding else None
    contexts = []
    for each in wanted[1:]:
        source = max(range(len(known)), key=lambda i: common_prefix(known[i], each))  # noqa: B023
        contexts.append(Context(source, tokens.encode(each, known[source], coder)))
    return tokens.encode(wanted[0], known[0], coder), tuple(contexts)
