"""The memory section: finding the one structure that its untagged bytes can have.

Nothing in the file says which parts follow or which layout switches hold. So every order of parts
(`layout.KINDS`) is tried under every layout of the container, and the one that ends exactly at the
end of the file (or at llama-server's checkpoint appendix) is taken. If two differ, or none fits,
the state is refused. A part that fails raises `Misfit`; the one that came furthest is reported.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DType, dtype_from_ggml
from ...errors import DamagedError, TruncatedError, TscError, UnsupportedError
from ...model import CellTable, TensorSpec
from .cells import BadCells, decode_cells, empty_cells
from .layout import (
    APPENDIX_MAGIC,
    DSV4_MAGIC,
    HYBRID_ARCHS,
    KINDS,
    KV,
    MAX_GGML_TYPE,
    MAX_LAYERS,
    MAX_ROW_BYTES,
    MAX_SEQUENCES,
    MLA_ARCHS,
    MLA_CHANNELS,
    NO_MEMORY_ARCHS,
    REC,
    RECURRENT_ARCHS,
    SEQUENCE,
    SEQUENCE_BUFFER,
    Layout,
)

_APPENDIX_BLOBS = 3
_KEY_HEADER_BYTES = 12


class Misfit(Exception):
    """Bytes that do not fit the structure being tried, at ``offset``."""

    def __init__(self, offset: int, message: str, truncated: bool = False) -> None:
        super().__init__(message)
        self.offset = offset
        self.truncated = truncated


class Unknown(Misfit):
    """Bytes that fit, but that this build has no reading for."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its rows are; ``element_bytes`` is 0 for rows stored cell after cell."""

    spec: TensorSpec
    offset: int
    element_bytes: int


@dataclass(frozen=True)
class StreamPart:
    """One stream of a KV part; ``v_trans`` is None where no layer data was written."""

    cells: CellTable
    start: int
    v_trans: int | None = None
    rotations: tuple[int, int] = (0, 0)
    tensors: tuple[StoredTensor, ...] = ()


@dataclass(frozen=True)
class Part:
    """One part of the memory section with its extent in the file."""

    kind: str
    start: int
    end: int
    n_cells: int
    streams: tuple[StreamPart, ...] = ()

    @property
    def keys_only(self) -> bool:
        tensors = [tensor for stream in self.streams for tensor in stream.tensors]
        return bool(tensors) and all(tensor.spec.role == "k" for tensor in tensors)

    def shape(self) -> tuple[object, ...]:
        """What tells two readings of the same bytes apart."""
        streams = tuple(
            (s.start, len(s.cells), s.cells.ext.shape[1] if len(s.cells) else 0, s.rotations)
            + tuple((t.offset, t.spec.role, t.spec.dtype.name) for t in s.tensors)
            for s in self.streams
        )
        return (self.kind, self.start, self.end, streams)


@dataclass(frozen=True)
class Memory:
    """A whole memory section: its layout, parts and the offset where they end."""

    layout: Layout
    parts: tuple[Part, ...]
    outputs_end: int
    end: int


@dataclass
class Bytes:
    """A buffer read through checked access; offsets are those of the file."""

    data: memoryview
    array: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        # numpy refuses to wrap a buffer of no bytes.
        self.array = np.frombuffer(self.data or b"\0", dtype=np.uint8)[: len(self.data)]

    def __len__(self) -> int:
        return len(self.data)

    def unpack(self, layout: str, offset: int, what: str) -> tuple[int, ...]:
        """Little-endian fields at ``offset``; `Misfit` where the file ends before them."""
        layout = "<" + layout
        self.need(offset, struct.calcsize(layout), what)
        return struct.unpack_from(layout, self.data, offset)

    def need(self, offset: int, n_bytes: int, what: str) -> None:
        """Check that ``n_bytes`` follow ``offset``."""
        if n_bytes > len(self) - offset:
            raise Misfit(
                offset,
                f"{what} takes {n_bytes} bytes and {max(len(self) - offset, 0)} follow",
                truncated=True,
            )

    def words(self, offset: int) -> NDArray[np.int32]:
        """All whole i32 from ``offset`` on, as a view."""
        count = max(len(self) - offset, 0) // 4
        return self.array[offset : offset + 4 * count].view("<i4")


@dataclass
class Search:
    """One attempt to read a memory section, and the misfit that came furthest."""

    source: Bytes
    container: str
    arch: str
    where: str
    furthest: Misfit | None = None

    def find(self, start: int, layouts: tuple[Layout, ...]) -> Memory:
        """The only reading of the bytes from ``start`` on; raises a `TscError` otherwise."""
        self._refuse_dsv4(start)
        found: dict[object, Memory] = {}
        for layout in layouts:
            for memory in self._read_layout(start, layout):
                key = (layout.outputs, *(part.shape() for part in memory.parts))
                found.setdefault(key, memory)
        found = _without_twins(found)
        if len(found) > 1:
            names = sorted({KINDS[tuple(p.kind for p in m.parts)] for m in found.values()})
            raise UnsupportedError(
                f"{self.where}: the memory section at offset {start} can be read in {len(found)} "
                f"ways ({', '.join(names)}); name the model's architecture to decide"
            )
        if not found:
            raise self._error(start)
        return next(iter(found.values()))

    def _refuse_dsv4(self, start: int) -> None:
        if len(self.source) >= start + 4:
            (magic,) = self.source.unpack("I", start, "magic")
            if magic == DSV4_MAGIC:
                raise UnsupportedError(
                    f"{self.where}: DSV4 memory (deepseek4) at offset {start} is not supported; "
                    "keep the state file itself"
                )

    def _error(self, start: int) -> TscError:
        misfit = self.furthest or Misfit(start, "nothing follows", truncated=True)
        place = f"{self.where}: {misfit} at offset {misfit.offset}"
        if isinstance(misfit, Unknown):
            return UnsupportedError(f"{place}; use a newer tscfile or keep the state file itself")
        if misfit.truncated:
            return TruncatedError(f"{place}; the file was cut, save the state again")
        return DamagedError(f"{place}; no known llama.cpp cache layout fits, save the state again")

    def _note(self, misfit: Misfit) -> None:
        if self.furthest is None or misfit.offset > self.furthest.offset:
            # A copy, as the traceback of what was raised keeps all tables read so far.
            self.furthest = type(misfit)(misfit.offset, str(misfit), misfit.truncated)

    def _read_layout(self, start: int, layout: Layout) -> Iterator[Memory]:
        try:
            offset = skip_outputs(self.source, start) if layout.outputs else start
        except Misfit as misfit:
            self._note(misfit)
            return
        for parts in self._extend(offset, (), layout):
            end = parts[-1].end if parts else offset
            yield Memory(layout, parts, offset, end)

    def _extend(
        self, offset: int, parts: tuple[Part, ...], layout: Layout
    ) -> Iterator[tuple[Part, ...]]:
        kinds = tuple(part.kind for part in parts)
        if kinds in KINDS and self._kind_fits(kinds, layout):
            try:
                self._check_end(offset)
            except Misfit as misfit:
                self._note(misfit)
            else:
                yield parts
                return
        for kind in (KV, REC):
            if any(known[: len(kinds) + 1] == (*kinds, kind) for known in KINDS):
                for part in self._read_part(kind, offset, parts, layout):
                    yield from self._extend(part.end, (*parts, part), layout)

    def _kind_fits(self, kinds: tuple[str, ...], layout: Layout) -> bool:
        """Whether the architecture, where known, can have this kind of memory."""
        if not kinds:
            return self.arch in NO_MEMORY_ARCHS
        if not layout.streams or not self.arch:
            # The oldest generations stored recurrent states in the form of a KV cache.
            return True
        if self.arch in RECURRENT_ARCHS:
            return kinds == (REC,)
        return self.arch not in HYBRID_ARCHS or REC in kinds

    def _check_end(self, offset: int) -> None:
        if offset == len(self.source):
            return
        if self.container == SEQUENCE:
            n_left = len(self.source) - offset
            if n_left >= 4 and self.source.unpack("I", offset, "magic")[0] == APPENDIX_MAGIC:
                return check_appendix(self.source, offset)
        raise Misfit(offset, f"{len(self.source) - offset} bytes left over")

    def _read_part(
        self, kind: str, offset: int, parts: tuple[Part, ...], layout: Layout
    ) -> Iterator[Part]:
        try:
            if kind == REC:
                yield from read_recurrent(self.source, offset)
            else:
                yield from self._read_kv(offset, parts, layout)
        except Misfit as misfit:
            self._note(misfit)

    def _read_kv(self, offset: int, parts: tuple[Part, ...], layout: Layout) -> Iterator[Part]:
        """The KV part at ``offset``: with values, and where that can be, without."""
        one_sequence = self.container in (SEQUENCE, SEQUENCE_BUFFER)
        reader = KvReader(self.source, layout, one_sequence)
        try:
            yield reader.read(offset, with_values=True)
        except Misfit as misfit:
            self._note(misfit)
        if self.arch and self.arch not in MLA_ARCHS:
            return
        part = reader.read(offset, with_values=False)
        if part.keys_only and self._looks_latent(part, parts):
            yield part

    def _looks_latent(self, part: Part, parts: tuple[Part, ...]) -> bool:
        """Without an architecture, only key rows of a known latent size may lack values.

        Otherwise a file cut just before its values would pass for a latent cache.
        """
        if self.arch or any(earlier.keys_only for earlier in parts):
            return True
        channels = {t.spec.n_channels for s in part.streams for t in s.tensors}
        return channels <= MLA_CHANNELS


def _without_twins(found: dict[object, Memory]) -> dict[object, Memory]:
    """Readings without those that take a recurrent part for a KV part, or the other way round.

    Generation A wrote sequences of either kind with the same headers. Only recurrent memory keeps
    a whole sequence in one cell.
    """
    kept: dict[object, Memory] = {}
    for memory in found.values():
        extents = tuple((part.start, part.end) for part in memory.parts)
        key = (memory.layout.outputs, extents)
        twin = kept.get(key)
        if twin is None:
            kept[key] = memory
        elif not _are_twins(memory, twin):
            return found
        elif _recurrent_is_right(memory) and not _recurrent_is_right(twin):
            kept[key] = memory
    return kept


def _are_twins(one: Memory, other: Memory) -> bool:
    return tuple(part.kind for part in one.parts) != tuple(part.kind for part in other.parts)


def _recurrent_is_right(memory: Memory) -> bool:
    return all((part.kind == REC) == (part.n_cells <= 1) for part in memory.parts)


def skip_outputs(source: Bytes, offset: int) -> int:
    """The end of an outputs section (generations A to C) at ``offset``."""
    (n_outputs,) = source.unpack("I", offset, "the outputs count")
    offset += 4
    source.need(offset, 4 * n_outputs, "the output ids")
    offset += 4 * n_outputs
    for what in ("logits", "embeddings"):
        (count,) = source.unpack("Q", offset, f"the {what} count")
        offset += 8
        source.need(offset, 4 * count, f"the {what}")
        offset += 4 * count
    return offset


def check_appendix(source: Bytes, offset: int) -> None:
    """Follow llama-server's checkpoint appendix at ``offset`` to its end, which is the file's."""
    _, version, count = source.unpack("III", offset, "the checkpoint appendix")
    if version != 1:
        raise Unknown(offset, f"checkpoint appendix of version {version}")
    offset += 12
    for _ in range(count):
        source.need(offset, 16, "a checkpoint")
        offset += 16
        for _ in range(_APPENDIX_BLOBS):
            (length,) = source.unpack("Q", offset, "a checkpoint's length")
            offset += 8
            source.need(offset, length, "a checkpoint")
            offset += length
    if offset != len(source):
        raise Misfit(offset, f"{len(source) - offset} bytes left over after the checkpoints")


@dataclass(frozen=True)
class KvReader:
    """Reads a KV part under one layout; ``one_sequence`` holds for saves of one sequence."""

    source: Bytes
    layout: Layout
    one_sequence: bool

    def read(self, start: int, with_values: bool) -> Part:
        """The part at ``start``; `Misfit` if the bytes are none."""
        offset, n_streams = start, 1
        if self.layout.streams:
            (n_streams,) = self.source.unpack("I", start, "the stream count")
            if not 1 <= n_streams <= MAX_SEQUENCES:
                raise Misfit(start, f"a cache of {n_streams} streams")
            offset += 4
        streams = []
        for _ in range(n_streams):
            stream, offset = self._read_stream(offset, with_values)
            streams.append(stream)
        n_cells = sum(len(stream.cells) for stream in streams)
        return Part(KV, start, offset, n_cells, tuple(streams))

    def _read_stream(self, start: int, with_values: bool) -> tuple[StreamPart, int]:
        (n_cells,) = self.source.unpack("I", start, "the cell count")
        offset = start + 4
        if n_cells == 0 and self.layout.streams:
            return StreamPart(empty_cells(), start), offset
        cells, offset = self._read_cells(offset, n_cells)
        v_trans, n_layers = self.source.unpack("II", offset, "the layer header")
        if v_trans > 1:
            raise Misfit(offset, f"a V layout flag of {v_trans}")
        _check_layers(n_layers, offset + 4)
        offset += 8
        rotations, offset = self._read_rotations(offset)
        tensors, offset = self._read_layers(offset, n_layers, n_cells, 0, rotations[0], "k")
        if with_values:
            values, offset = self._read_layers(
                offset, n_layers, n_cells, v_trans, rotations[1], "v"
            )
            tensors += values
        return StreamPart(cells, start, v_trans, rotations, tuple(tensors)), offset

    def _read_cells(self, offset: int, n_cells: int) -> tuple[CellTable, int]:
        most = 1 if self.one_sequence else MAX_SEQUENCES
        words = self.source.words(offset)
        try:
            cells, used = decode_cells(words, n_cells, self.layout.ext_bytes // 4, most)
        except BadCells as error:
            raise Misfit(offset + 4 * error.word, str(error), error.truncated) from None
        least_ids = 0 if self.one_sequence and not self.layout.streams else 1
        if n_cells and int(cells.seq_counts.min()) < least_ids:
            raise Misfit(offset, "a cell of no sequence")
        return cells, offset + 4 * used

    def _read_rotations(self, offset: int) -> tuple[tuple[int, int], int]:
        if not self.layout.rotation:
            return (0, 0), offset
        n_rot_k, n_rot_v = self.source.unpack("II", offset, "the rotation sizes")
        for size in (n_rot_k, n_rot_v):
            if size & (size - 1) or size > 1 << 16:
                raise Misfit(offset, f"a rotation of {size} channels")
        return (n_rot_k, n_rot_v), offset + 8

    def _read_layers(
        self, offset: int, n_layers: int, n_cells: int, v_trans: int, rotation: int, role: str
    ) -> tuple[list[StoredTensor], int]:
        self.source.need(offset, n_layers * _KEY_HEADER_BYTES, f"{n_layers} layers")
        tensors = []
        for layer in range(n_layers):
            read = self._read_channels if v_trans else self._read_rows
            dtype, row_bytes, element_bytes = read(offset)
            offset += _KEY_HEADER_BYTES
            self.source.need(offset, n_cells * row_bytes, f"{role.upper()} of layer {layer}")
            spec = TensorSpec(layer, role, dtype, row_bytes, rotation)
            tensors.append(StoredTensor(spec, offset, element_bytes))
            offset += n_cells * row_bytes
        return tensors, offset

    def _read_rows(self, offset: int) -> tuple[DType, int, int]:
        type_id, row_bytes = self.source.unpack("iQ", offset, "a tensor header")
        dtype = _checked_type(type_id, offset)
        if not 0 < row_bytes <= MAX_ROW_BYTES or row_bytes % dtype.block_bytes:
            raise Misfit(offset + 4, f"{dtype.name} rows of {row_bytes} bytes")
        return dtype, row_bytes, 0

    def _read_channels(self, offset: int) -> tuple[DType, int, int]:
        type_id, element_bytes, n_channels = self.source.unpack("iII", offset, "a tensor header")
        dtype = _checked_type(type_id, offset)
        if dtype.is_quantized or not 0 < n_channels * dtype.block_bytes <= MAX_ROW_BYTES:
            raise Misfit(offset, f"transposed {dtype.name} values of {n_channels} channels")
        if dtype.name.startswith("ggml-"):
            raise Unknown(offset, f"transposed values of the unknown ggml type {type_id}")
        if element_bytes != dtype.block_bytes:
            raise Misfit(offset + 4, f"{dtype.name} elements of {element_bytes} bytes")
        return dtype, n_channels * element_bytes, element_bytes


def _check_layers(n_layers: int, offset: int) -> None:
    if n_layers > MAX_LAYERS:
        raise Misfit(offset, f"a cache of {n_layers} layers")


def _checked_type(type_id: int, offset: int) -> DType:
    if not 0 <= type_id <= MAX_GGML_TYPE:
        raise Misfit(offset, f"the ggml type {type_id}")
    return dtype_from_ggml(type_id)


def read_recurrent(source: Bytes, start: int) -> Iterator[Part]:
    """The recurrent parts that can start at ``start``, one for each number of layers that fits.

    How many layers are recurrent is not stored: the records are one half R states and one half S
    states, each half of equal rows.
    """
    (n_cells,) = source.unpack("I", start, "the cell count")
    offset = start + 4
    _, used = _recurrent_cells(source, offset, n_cells)
    offset += 4 * used
    s_trans, n_layers = source.unpack("II", offset, "the layer header")
    if s_trans != 0:
        raise Misfit(offset, f"a state layout flag of {s_trans}")
    _check_layers(n_layers, offset + 4)
    records, misfit = _recurrent_records(source, offset + 8, n_cells, 2 * n_layers)
    fits = False
    for half in range(1, len(records) // 2 + 1):
        if _is_homogeneous(records[:half]) and _is_homogeneous(records[half : 2 * half]):
            fits = True
            yield Part(REC, start, records[2 * half - 1][2], n_cells)
    if misfit is not None:
        raise misfit
    if not fits:
        raise Misfit(offset + 4, f"a recurrent part of {n_layers} layers without state")


def _recurrent_cells(source: Bytes, offset: int, n_cells: int) -> tuple[CellTable, int]:
    try:
        return decode_cells(source.words(offset), n_cells, 0)
    except BadCells as error:
        raise Misfit(offset + 4 * error.word, str(error), error.truncated) from None


def _recurrent_records(
    source: Bytes, offset: int, n_cells: int, most: int
) -> tuple[list[tuple[int, int, int]], Misfit | None]:
    """Records ``(type, row bytes, end)`` as far as they go, and what ended them early."""
    records: list[tuple[int, int, int]] = []
    while len(records) < most and offset < len(source):
        try:
            type_id, row_bytes = source.unpack("iQ", offset, "a state header")
            _checked_type(type_id, offset)
            source.need(offset + 12, n_cells * row_bytes, "a recurrent state")
        except Misfit as misfit:
            return records, misfit
        offset += 12 + n_cells * row_bytes
        records.append((type_id, row_bytes, offset))
    return records, None


def _is_homogeneous(records: list[tuple[int, int, int]]) -> bool:
    return len({record[:2] for record in records}) == 1
