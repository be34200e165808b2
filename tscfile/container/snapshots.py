"""The snapshot record: what one save of the conversation is (``spec/tsc.md``, section 7).

Its *head* says who the parent is and holds the token ids; the *structure* behind it is everything
else, compressed against the structure of an earlier snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bytestream import Allowance, ByteReader, ByteWriter
from ..dtypes import dtype_from_ggml
from ..entropy import ints, zstd
from ..errors import DamagedError
from ..model import CellTable, TensorSpec, tensor_runs
from .metadata import dictionary_of, read_metadata, write_metadata
from .records import (
    ID_BYTES,
    MAX_CHUNK_BYTES,
    MAX_CONTEXTS,
    FrameRun,
    RecordRef,
    read_runs,
    write_runs,
)

Tokens = Callable[[], NDArray[np.int32]]

# About what an item takes in memory once it is read; claimed before, see `Allowance`.
_TENSOR_MEMORY, _TRACK_MEMORY, _OPAQUE_MEMORY = 192, 2048, 384
_TOKEN_MEMORY = 40

_STRUCTURE_LEVEL = 19

_ROLES = ("k", "v")
_EXT_CODED, _EXT_POSITION, _EXT_TOKEN = range(3)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids as they are stored: the first ``kept`` of a list that is known, as a rule the
    parent's, then ``count`` in ``data``; ``coding`` is one of `entropy.ints` or of
    `tscfile.tokens`."""

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
    def read(cls, reader: ByteReader, claims_kept: bool = True) -> TokenIds:
        """``claims_kept``: is there to be memory for the kept ones too?"""
        kept, count = (reader.uvarint(limit=0x7FFFFFFF) for _ in range(2))
        reader.claim(_TOKEN_MEMORY * (kept * claims_kept + count))
        return cls(kept, count, reader.u8(), bytes(reader.take(reader.uvarint())))


@dataclass(frozen=True, slots=True)
class Context:
    """Tokens that frames of a snapshot are decoded from in place of its own: those they had before
    other tokens were cut out. ``ids`` keep from the parent's tokens where ``source`` is 0, else
    from the parent's context of that number, counted from 1."""

    source: int
    ids: TokenIds

    def write(self, writer: ByteWriter) -> None:
        self.ids.write(writer.uvarint(self.source))

    @classmethod
    def read(cls, reader: ByteReader) -> Context:
        # They are decoded one at a time, and a parent's list was claimed with the parent.
        return cls(reader.uvarint(limit=MAX_CONTEXTS), TokenIds.read(reader, claims_kept=False))


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
        write_runs(writer, self.runs)
        _write_cells(writer, self.cells, tokens)

    @classmethod
    def read(cls, reader: ByteReader, tokens: Tokens, max_cells: int) -> TrackRecord:
        cache, stream = reader.uvarint(limit=0xFFFF), reader.uvarint(limit=0xFFFF)
        attributes = read_metadata(reader)
        tensors = _read_tensors(reader)
        runs = read_runs(reader)
        n_cells = sum(run.count for run in runs)
        if n_cells > max_cells:
            raise DamagedError(f"{reader.where}: a track of more cells than the file has frames")
        cells = _read_cells(reader, n_cells, tokens)
        return cls(cache, stream, attributes, tensors, runs, cells)


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


@dataclass(frozen=True)
class SnapshotHead:
    """What a snapshot record says in front of its structure. ``parent``: the snapshot it was
    planned against; ``dictionary``: the one whose structure its own is compressed against; None
    for none."""

    number: int
    parent: int | None
    dictionary: int | None
    ids: TokenIds
    contexts: tuple[Context, ...] = ()

    def write(self, writer: ByteWriter) -> None:
        writer.uvarint(self.number)
        for other in (self.parent, self.dictionary):
            writer.uvarint(0 if other is None else other + 1)
        self.ids.write(writer)
        writer.uvarint(len(self.contexts))
        for context in self.contexts:
            context.write(writer)

    @classmethod
    def read(cls, reader: ByteReader) -> SnapshotHead:
        """`DamagedError` for a parent or dictionary that does not come before the snapshot."""
        number, *others = (reader.uvarint() for _ in range(3))
        if max(others) > number:
            raise DamagedError(f"{reader.where}: snapshot {number} names one that comes later")
        parent, dictionary = (other - 1 if other else None for other in others)
        ids, n_contexts = TokenIds.read(reader), reader.count(item_bytes=5)
        if n_contexts > MAX_CONTEXTS:
            raise DamagedError(f"{reader.where}: {n_contexts} contexts; damaged")
        contexts = tuple(Context.read(reader) for _ in range(n_contexts))
        if parent is None and (ids.kept or any(c.ids.kept or c.source for c in contexts)):
            raise DamagedError(f"{reader.where}: keeps tokens of no parent; damaged")
        return cls(number, parent, dictionary, ids, contexts)


@dataclass
class SnapshotRecord:
    """One save of the conversation. ``coding``: what decoding needs beyond the file (``book``, its
    id) and what was promised."""

    head: SnapshotHead
    plan: str
    tier: str
    name: str
    source: dict[str, Any]
    identity: dict[str, Any]
    coding: dict[str, Any]
    tracks: list[TrackRecord]
    opaque: list[OpaqueEntry] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.head.number

    @property
    def parent(self) -> int | None:
        return self.head.parent

    @property
    def ids(self) -> TokenIds:
        return self.head.ids

    @property
    def layers(self) -> list[str]:
        """Tiers of the quality layers, the base first; without layers the one tier there is."""
        names = self.coding.get("layers")
        known = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return list(names) if known and names else [self.tier]

    def structure(self, tokens: NDArray[np.int32]) -> bytes:
        """All but the head, before it is compressed. ``tokens``: int32 ``[n]``, what ``ids`` stand
        for."""
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

    def write(self, structure: bytes, like: bytes) -> bytes:
        """``structure``: what `structure` gives; ``like``: that of the snapshot that is the
        dictionary, empty without one. Most of it holds for this snapshot too."""
        writer = ByteWriter()
        self.head.write(writer)
        packed = zstd.compress(structure, _STRUCTURE_LEVEL, dictionary_of(like))
        return writer.uvarint(len(structure)).raw(packed).bytes()

    @classmethod
    def read(
        cls,
        data: memoryview,
        like: bytes,
        tokens_of: Callable[[dict[str, Any]], NDArray[np.int32]],
        max_cells: int,
        where: str,
        allowance: Allowance,
    ) -> tuple[SnapshotRecord, bytes]:
        """The record and its structure. ``tokens_of``: decodes its ids, given the coding; called
        only if cells refer to them. ``max_cells``: the number of frames in all blocks."""
        start = ByteReader(data, where, allowance)
        head = SnapshotHead.read(start)
        length = start.uvarint(limit=MAX_CHUNK_BYTES)
        start.claim(2 * length)
        dictionary = dictionary_of(like)
        structure = zstd.decompress(start.take(start.remaining), length, where, dictionary)
        if len(structure) != length:
            raise DamagedError(f"{where}: its structure has the wrong size; damaged")
        reader = ByteReader(structure, where, allowance)
        plan, tier, name = reader.string(), reader.string(), reader.string()
        source, identity, coding = (read_metadata(reader) for _ in range(3))
        tokens = cache(lambda: tokens_of(coding))
        n_tracks = reader.count(item_bytes=8, item_memory=_TRACK_MEMORY)
        tracks = [TrackRecord.read(reader, tokens, max_cells) for _ in range(n_tracks)]
        n_opaque = reader.count(item_bytes=20, item_memory=_OPAQUE_MEMORY)
        opaque = [OpaqueEntry.read(reader) for _ in range(n_opaque)]
        reader.end()
        if len({(track.cache, track.stream) for track in tracks}) < len(tracks):
            raise DamagedError(f"{where}: two tracks are the same cache and stream; damaged")
        if len({entry.name for entry in opaque}) < len(opaque):
            raise DamagedError(f"{where}: two opaque parts have the same name; damaged")
        return cls(head, plan, tier, name, source, identity, coding, tracks, opaque), structure


def dictionary_for(parent: int | None, parent_of: Callable[[int], int | None]) -> int | None:
    """The ancestor whose structure that of a child of ``parent`` is compressed against.

    A child with ``d`` ancestors takes the one that has as many as are left of ``d`` without its
    lowest bit: its parent half of the time. So a reader unpacks at most log2 d structures.
    """
    chain = []
    while parent is not None:
        chain.append(parent)
        parent = parent_of(parent)
    depth = len(chain)
    return chain[(depth & -depth) - 1] if depth else None


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
