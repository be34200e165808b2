"""GGUF as a carrier of caches: an exchange form that gguf-py and every GGUF viewer reads.

Rows are stored uncompressed in the ggml type they have, quantized ones too, and whatever else the
source needs is stored beside them, so that a llama.cpp state comes back byte for byte. The file
follows section 15.3 of the project's note on llama.cpp states:

=====================================  ==========================================================
``general.type``                       ``kvcache``
``general.architecture``               GGUF's name of the model's architecture, or ``unknown``
``kvcache.version``                    u32, 1
``kvcache.producer``                   who wrote the file
``kvcache.source_format``              ``ggsn/10``, ``ggsq/3``, …, or ``transformers``
``kvcache.k_rope``                     ``post``: keys are stored after RoPE
``kvcache.cache_index``, ``.stream_index``, ``.cell_count``, ``.n_ext``
                                       i64 arrays, one value for each track
``kvcache.n_k``, ``kvcache.n_v``       i64 arrays: tensors of keys and of values of each track
``kvcache.rot_k``, ``kvcache.rot_v``   i64 arrays: block of the rotation of each K and each V, 0 for
                                       none, -1 where the source cannot tell
``kvcache.type_k``, ``kvcache.type_v`` i64 arrays: ggml types; rows of a type that this project does
                                       not know are stored as i8
``kvcache.row_k``, ``kvcache.row_v``   i64 arrays: bytes of a row
``kvcache.source.*``                   facts that the source's format needs
``kvcache.identity.*``                 facts of the model (`tscfile.identity`)
``kvcache.track.{i}.*``                facts of track i, such as ``v_trans``
tensors ``kv.{cache}.{stream}.blk.{layer}.k``, ``.v``
                                       rows, dimensions ``[channels, cells]``
tensors ``kvcache.tokens``, ``.pos``, ``.seq_count``, ``.seq``, ``.ext``
                                       i32; the cells of all tracks, one track after another
tensors ``kvcache.opaque.{name}``      i8: bytes of the source that are kept as they are
=====================================  ==========================================================

Empty tensors are left out. Layers count within their cache. Values are stored cell after cell,
also where the state has them channel after channel.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..bytestream import Allowance
from ..dtypes import DTYPES, DType, dtype_from_ggml
from ..errors import DamagedError, TruncatedError, UnsupportedError, UsageError
from ..identity import _parse, read_identity  # the one bounds-checked GGUF parser of the project
from ..model import CellTable, Snapshot, TensorSpec, Track, read_into
from .hf_layout import FORMAT, LLAMA_CPP, MAX_LAYERS, check_layout
from .kv_arrays import read_facts, spans

Progress = Callable[[int], None]

MAGIC = b"GGUF"
KIND = "kvcache"
_VERSION = 1
_GGUF_VERSION = 3
_ALIGNMENT = 32
_I8, _I32 = 24, 26
_MAX_NAME = 63
_MAX_TRACKS = 1024
_TEXT_MEMORY, _SPEC_MEMORY = 64, 640
"""About what a text and a tensor take in memory; see `Allowance`."""
_TABLE = re.compile(r"kvcache\.(source|identity|track\.[0-9]+)\.")
_CELL_ARRAYS = ("tokens", "pos", "seq_count", "seq", "ext")

_U32_VALUE, _BOOL_VALUE, _STRING_VALUE, _ARRAY_VALUE, _I64_VALUE, _F64_VALUE = 4, 7, 8, 9, 11, 12


# --- writing --------------------------------------------------------------------------------------


def write_gguf(
    snapshot: Snapshot,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write ``snapshot``, whole or not at all; returns the size of the file.

    Raises `UsageError` if ``out`` exists and ``force`` is not given, `UnsupportedError` for tracks
    whose tensors are not keys by layer and then values by layer.
    """
    from .. import __version__

    tensors = _Tensors()
    for name, array in _cell_arrays(snapshot).items():
        tensors.add(f"{KIND}.{name}", _I32, (array.size,), array.nbytes, array)
    for name, content in snapshot.opaque.items():
        data = np.frombuffer(content, np.uint8)
        tensors.add(f"{KIND}.opaque.{name}", _I8, (data.size,), data.size, data)
    places = [_add_track(tensors, track) for track in snapshot.tracks]
    header = _header(_keys(snapshot, f"tscfile {__version__}"), tensors)
    size = len(header) + tensors.size
    with files.new_mapped_file(out, size, force=force) as view:
        view[: len(header)] = header
        content_area = np.frombuffer(view, np.uint8)[len(header) :]
        for entry in tensors.entries:
            if entry.content is not None:
                data = np.ascontiguousarray(entry.content).view(np.uint8)
                content_area[entry.offset : entry.offset + entry.n_bytes] = data
        for track, offsets in zip(snapshot.tracks, places, strict=True):
            _write_rows(track, offsets, content_area, progress)
        del content_area
    return size


@dataclass(frozen=True)
class _Entry:
    name: str
    ggml_type: int
    dims: tuple[int, ...]
    n_bytes: int
    offset: int
    content: NDArray[Any] | None = field(repr=False)


@dataclass
class _Tensors:
    """Tensors with their places in the data section."""

    entries: list[_Entry] = field(default_factory=list)
    size: int = 0

    def add(
        self, name: str, ggml_type: int, dims: tuple[int, ...], n_bytes: int,
        content: NDArray[Any] | None = None,
    ) -> int:  # fmt: skip
        """Give a tensor its place; returns the offset. Empty ones get none."""
        offset = self.size
        if not n_bytes:
            return offset
        if len(name.encode()) > _MAX_NAME:
            raise UnsupportedError(f"tensor name {name[:40]!r}… is longer than GGUF allows")
        self.entries.append(_Entry(name, ggml_type, dims, n_bytes, offset, content))
        self.size += n_bytes + -n_bytes % _ALIGNMENT
        return offset


def _cell_arrays(snapshot: Snapshot) -> dict[str, NDArray[np.int32]]:
    tables = [track.cells for track in snapshot.tracks]

    def joined(parts: Iterator[NDArray[np.int32]]) -> NDArray[np.int32]:
        whole: NDArray[np.int32] = np.concatenate([np.zeros(0, np.int32), *parts]).astype("<i4")
        return whole

    return {
        "tokens": snapshot.tokens.astype("<i4"),
        "pos": joined(table.pos for table in tables),
        "seq_count": joined(table.seq_counts for table in tables),
        "seq": joined(table.seq_ids for table in tables),
        "ext": joined(table.ext.reshape(-1) for table in tables),
    }


def _add_track(tensors: _Tensors, track: Track) -> list[int]:
    """Offsets of the tensors of a track, in its order."""
    n_cells, offsets = len(track.cells), []
    _check_order(track)
    for spec in track.tensors:
        name = f"kv.{track.cache}.{track.stream}.blk.{spec.layer}.{spec.role}"
        known = spec.dtype.name in DTYPES
        ggml_type = spec.dtype.ggml_id if known else _I8
        width = spec.n_channels if known else spec.row_bytes
        offsets.append(tensors.add(name, ggml_type, (width, n_cells), n_cells * spec.row_bytes))
    return offsets


def _check_order(track: Track) -> None:
    n_k = sum(spec.role == "k" for spec in track.tensors)
    expected = [("k", i) for i in range(n_k)]
    expected += [("v", i) for i in range(len(track.tensors) - n_k)]
    if [(spec.role, spec.layer) for spec in track.tensors] != expected:
        raise UnsupportedError(
            f"cache {track.cache} does not have keys layer by layer and then values: it cannot be "
            "carried in a GGUF file"
        )


def _keys(snapshot: Snapshot, producer: str) -> dict[str, Any]:
    identity, source = snapshot.identity.facts, snapshot.source
    tracks = snapshot.tracks
    keys: dict[str, Any] = {
        "general.architecture": identity.get("architecture") or source.get("arch") or "unknown",
        "general.type": KIND,
        "kvcache.producer": producer,
        "kvcache.source_format": _source_format(source),
        "kvcache.k_rope": "post",
        "kvcache.cache_index": [track.cache for track in tracks],
        "kvcache.stream_index": [track.stream for track in tracks],
        "kvcache.cell_count": [len(track.cells) for track in tracks],
        "kvcache.n_ext": [track.cells.ext.shape[1] for track in tracks],
    }
    for role in "kv":
        specs = [spec for track in tracks for spec in track.tensors if spec.role == role]
        keys[f"kvcache.n_{role}"] = [
            sum(spec.role == role for spec in track.tensors) for track in tracks
        ]
        keys[f"kvcache.rot_{role}"] = [spec.rotation for spec in specs]
        keys[f"kvcache.type_{role}"] = [spec.dtype.ggml_id for spec in specs]
        keys[f"kvcache.row_{role}"] = [spec.row_bytes for spec in specs]
    keys |= {f"kvcache.source.{name}": value for name, value in source.items()}
    keys |= {f"kvcache.identity.{name}": value for name, value in identity.items()}
    for number, track in enumerate(tracks):
        for name, value in track.attributes.items():
            keys[f"kvcache.track.{number}.{name}"] = value
    return keys


def _source_format(source: Mapping[str, Any]) -> str:
    if source.get("format") != LLAMA_CPP:
        return str(source.get("format", "unknown"))
    from .llama_state.layout import SEQUENCE, SEQUENCE_VERSION_DELTA, SESSION

    version = int(source.get("version", 0))
    if source.get("container") == SESSION:
        return f"ggsn/{version}"
    if source.get("container") == SEQUENCE:
        return f"ggsq/{version - SEQUENCE_VERSION_DELTA}"
    return str(source.get("container"))


def _header(keys: Mapping[str, Any], tensors: _Tensors) -> bytes:
    """All bytes before the data, padded to its alignment."""
    out = bytearray(MAGIC)
    out += struct.pack("<IQQ", _GGUF_VERSION, len(tensors.entries), len(keys) + 1)
    out += _string("kvcache.version") + struct.pack("<II", _U32_VALUE, _VERSION)
    for key, value in keys.items():
        out += _string(key) + _value(value)
    for entry in tensors.entries:
        out += _string(entry.name) + struct.pack("<I", len(entry.dims))
        out += struct.pack(f"<{len(entry.dims)}Q", *entry.dims)
        out += struct.pack("<IQ", entry.ggml_type, entry.offset)
    return bytes(out) + bytes(-len(out) % _ALIGNMENT)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kinds = {_kind(item) for item in value} or {_I64_VALUE}
        if len(kinds) != 1:
            raise UnsupportedError("a list of mixed kinds cannot be stored in a GGUF file")
        kind = kinds.pop()
        items = b"".join(_scalar(kind, item) for item in value)
        return struct.pack("<IIQ", _ARRAY_VALUE, kind, len(value)) + items
    kind = _kind(value)
    return struct.pack("<I", kind) + _scalar(kind, value)


def _kind(value: Any) -> int:
    for type_, kind in ((bool, _BOOL_VALUE), (int, _I64_VALUE), (float, _F64_VALUE)):
        if isinstance(value, type_):
            return kind
    if isinstance(value, str):
        return _STRING_VALUE
    raise UnsupportedError(f"a fact of type {type(value).__name__} cannot be stored in a GGUF file")


def _scalar(kind: int, value: Any) -> bytes:
    if kind == _STRING_VALUE:
        return _string(value)
    return struct.pack({_BOOL_VALUE: "<?", _I64_VALUE: "<q", _F64_VALUE: "<d"}[kind], value)


def _write_rows(
    track: Track, offsets: Sequence[int], out: NDArray[np.uint8], progress: Progress | None
) -> None:
    for start, stop in spans(track):
        areas = [
            out[at : at + len(track.cells) * spec.row_bytes].reshape(-1, spec.row_bytes)[start:stop]
            for at, spec in zip(offsets, track.tensors, strict=True)
        ]
        read_into(track, start, stop, areas)
        if progress is not None:
            progress(sum(area.nbytes for area in areas))


# --- reading --------------------------------------------------------------------------------------


def open_gguf(path: str | os.PathLike[str]) -> Snapshot:
    """Map the file at ``path``; its rows are read on demand, so it must not change meanwhile.

    Raises `UsageError` for a GGUF file that is no cache, `TruncatedError` and `DamagedError` for
    one that contradicts itself, `UnsupportedError` for a version this build does not know.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise TruncatedError(f"{path}: the file is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _Reader(Path(path), data).snapshot()


@dataclass
class _GgufTrack:
    """Rows of one track, read from the mapped file; ``rows``: uint8 ``[n_cells, row_bytes]``."""

    cache: int
    stream: int
    cells: CellTable
    tensors: Sequence[TensorSpec]
    attributes: dict[str, Any]
    rows: Sequence[NDArray[np.uint8]] = field(repr=False)

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        if not 0 <= start <= stop <= len(self.cells):
            raise IndexError(f"frames {start} to {stop} of a track of {len(self.cells)}")
        chosen = range(len(self.rows)) if tensors is None else tensors
        return [self.rows[i][start:stop] for i in chosen]


class _Reader:
    """Takes one file apart; every claim is compared with the file before it is used."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._where = str(path)
        self._gguf = _parse(path, data)
        values = self._gguf.values
        if values.get("general.type") != KIND:
            kind = values.get("general.type", "model")
            raise UsageError(
                f"{path}: this GGUF file holds a {str(kind)[:40]}, not a {KIND}; "
                "a model is given with --model"
            )
        if values.get("kvcache.version") != _VERSION:
            raise UnsupportedError(
                f"{path}: version {str(values.get('kvcache.version'))[:20]} of the cache schema; "
                f"this build reads {_VERSION}"
            )
        self._tensors: dict[str, Any] = {}
        for tensor in self._gguf.tensors:
            name = tensor.name.decode("utf-8", "replace")
            if name in self._tensors:
                raise DamagedError(f"{path}: tensor {name[:40]!r} occurs twice")
            self._tensors[name] = tensor

    def snapshot(self) -> Snapshot:
        arrays = {name: self._words(f"{KIND}.{name}") for name in _CELL_ARRAYS}
        tables = self._cells(arrays)
        source = self._facts("kvcache.source.")
        index = self._track_index()
        specs = {role: iter(self._described(role, len(index))) for role in "kv"}
        tracks: list[Track] = [
            self._track(number, *pair, cells, specs)
            for number, (pair, cells) in enumerate(zip(index, tables, strict=True))
        ]
        opaque = self._opaque()
        self._check_all_used(tracks)
        identity = read_identity(self._facts("kvcache.identity."), self._where)
        tokens = arrays["tokens"].astype(np.int32)
        snapshot = Snapshot(tokens, tracks, source, opaque, identity)
        self._check_source(snapshot)
        return snapshot

    # Metadata ------------------------------------------------------------------------------------

    def _damaged(self, message: str) -> DamagedError:
        return DamagedError(f"{self._where}: {message}; damaged")

    def _facts(self, prefix: str) -> dict[str, Any]:
        return read_facts(self._tables.get(prefix, {}), self._where)

    @cached_property
    def _tables(self) -> dict[str, dict[str, Any]]:
        """Keys and values by what the key starts with, found in one go for all tracks."""
        tables: dict[str, dict[str, Any]] = {}
        gguf = self._gguf
        for key in [*gguf.values, *gguf.string_arrays]:
            if match := _TABLE.match(key):
                extent = gguf.string_arrays.get(key)
                value = gguf.values.get(key) if extent is None else self._texts(extent)
                tables.setdefault(match[0], {})[key[match.end() :]] = value
        return tables

    def _texts(self, extent: Any) -> list[str]:
        texts, at = [], extent.start
        length = extent.stop - extent.start
        self._gguf.allowance.claim(_TEXT_MEMORY * extent.count + 5 * length, self._where)
        for _ in range(extent.count):
            (length,) = struct.unpack_from("<Q", self._gguf.data, at)
            raw = self._gguf.data[at + 8 : at + 8 + length]
            texts.append(raw.decode("utf-8", "replace"))
            at += 8 + length
        return texts

    def _numbers(self, name: str) -> list[int]:
        values = self._gguf.values.get(f"{KIND}.{name}")
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise self._damaged(f"{KIND}.{name} is no list of integers")
        return values

    def _track_index(self) -> list[tuple[int, int]]:
        index = list(
            zip(self._numbers("cache_index"), self._numbers("stream_index"), strict=False)
        )
        if len(set(index)) != len(index) or any(not 0 <= n < _MAX_TRACKS for p in index for n in p):
            raise self._damaged("two tracks are one, or their numbers are out of range")
        return index

    def _check_source(self, snapshot: Snapshot) -> None:
        """The facts that writers rely on; a GGUF file has no checksum."""
        kind = snapshot.source.get("format")
        if kind == FORMAT:
            check_layout(snapshot)
            return
        if kind != LLAMA_CPP:
            raise UnsupportedError(f"{self._where}: a cache from {str(kind)[:40]!r} is not known")
        from .llama_state.facts import check_facts

        check_facts(snapshot)
        self._check_recurrent(snapshot.opaque.get("recurrent"))
        widths = {track.cells.ext.shape[1] * 4 for track in snapshot.tracks}
        if widths - {snapshot.source["ext_bytes"]}:
            raise self._damaged("its cells are not as wide as its source says")

    def _check_recurrent(self, part: bytes | None) -> None:
        """The cells of a recurrent part, which are taken apart where another container is made."""
        from .llama_state.cells import BadCells, decode_cells

        if part is None:
            return
        words = np.frombuffer(part, "<i4", len(part) // 4)
        try:
            decode_cells(words[1:], int(words[0]) if len(words) else -1, 0)
        except (BadCells, ValueError):
            raise self._damaged("the cells of its recurrent part are none") from None

    # Arrays --------------------------------------------------------------------------------------

    def _data(self, name: str, ggml_type: int, n_bytes: int | None) -> NDArray[np.uint8]:
        """All bytes of a tensor of this type, or ``n_bytes`` of them; none if it is absent."""
        tensor = self._tensors.get(name)
        if tensor is None:
            if n_bytes:
                raise self._damaged(f"tensor {name[:60]!r} is missing")
            return np.zeros(0, np.uint8)
        if tensor.ggml_type != ggml_type:
            raise self._damaged(f"tensor {name[:60]!r} is of type {tensor.ggml_type}")
        known = math.prod(tensor.dims) * {_I8: 1, _I32: 4}.get(ggml_type, 0)
        size = known if n_bytes is None else n_bytes
        start = self._gguf.data_start + tensor.offset
        if start + size > len(self._gguf.data):
            raise TruncatedError(
                f"{self._where}: tensor {name[:60]!r} ends at byte {start + size} of "
                f"{len(self._gguf.data)}; the file was cut"
            )
        return np.frombuffer(self._gguf.data, np.uint8, size, start)

    def _opaque(self) -> dict[str, bytes]:
        """Copies of all opaque parts, which cannot be more than the file."""
        prefix, allowance = f"{KIND}.opaque.", Allowance(len(self._gguf.data))
        parts = {}
        for name in self._tensors:
            if name.startswith(prefix):
                data = self._data(name, _I8, None)
                allowance.claim(data.nbytes, self._where)
                parts[name.removeprefix(prefix)] = data.tobytes()
        return parts

    def _words(self, name: str) -> NDArray[np.int32]:
        return self._data(name, _I32, None).view("<i4")

    def _cells(self, arrays: Mapping[str, NDArray[np.int32]]) -> list[CellTable]:
        counts, n_ext = self._numbers("cell_count"), self._numbers("n_ext")
        n_tracks = len(counts)
        sizes = [len(self._numbers(name)) for name in ("n_ext", "cache_index", "stream_index")]
        if n_tracks > _MAX_TRACKS or any(size != n_tracks for size in sizes):
            raise self._damaged("its lists of tracks differ in length")
        if any(n < 0 for n in counts) or any(not 0 <= n <= 3 for n in n_ext):
            raise self._damaged("a track's numbers of cells are out of range")
        pos, seq_counts = arrays["pos"], arrays["seq_count"]
        if not sum(counts) == len(pos) == len(seq_counts):
            raise self._damaged("its cells are not as many as its tracks say")
        if len(pos) and (int(pos.min()) < 0 or int(seq_counts.min()) < 0):
            raise self._damaged("a cell has a negative position or count")
        n_ids = int(seq_counts.sum(dtype=np.int64))
        n_ext_words = sum(n * width for n, width in zip(counts, n_ext, strict=True))
        if n_ids != len(arrays["seq"]) or n_ext_words != len(arrays["ext"]):
            raise self._damaged("its sequence ids or extensions are not as many as its cells say")
        tables, at, id_at, ext_at = [], 0, 0, 0
        for n, width in zip(counts, n_ext, strict=True):
            own = seq_counts[at : at + n]
            n_own = int(own.sum(dtype=np.int64))
            ext = arrays["ext"][ext_at : ext_at + n * width].reshape(n, width)
            ids = arrays["seq"][id_at : id_at + n_own]
            tables.append(CellTable(pos[at : at + n], own, ids, ext))
            at, id_at, ext_at = at + n, id_at + n_own, ext_at + n * width
        return tables

    def _described(self, role: str, n_tracks: int) -> list[tuple[DType, int, int]]:
        """Type, bytes of a row and rotation of each tensor of a role, one track after another."""
        types, row_bytes, rotations = (
            self._numbers(f"{name}_{role}") for name in ("type", "row", "rot")
        )
        counts = self._numbers(f"n_{role}")
        right = len(counts) == n_tracks and all(0 <= n <= MAX_LAYERS for n in counts)
        if not right or not sum(counts) == len(types) == len(row_bytes) == len(rotations):
            raise self._damaged(f"its lists of {role} tensors differ in length")
        from .llama_state.layout import MAX_GGML_TYPE

        described = []
        self._gguf.allowance.claim(_SPEC_MEMORY * len(types), self._where)
        for ggml_id, size, rotation in zip(types, row_bytes, rotations, strict=True):
            dtype = dtype_from_ggml(ggml_id)
            known = 0 <= ggml_id <= MAX_GGML_TYPE and -1 <= rotation < 1 << 16
            if not known or not 0 < size < 1 << 31 or size % dtype.block_bytes:
                raise self._damaged(f"a {role} tensor has rows of {size} bytes of {dtype.name}")
            described.append((dtype, size, rotation))
        return described

    def _track(
        self, number: int, cache: int, stream: int, cells: CellTable,
        specs: Mapping[str, Iterator[tuple[DType, int, int]]],
    ) -> _GgufTrack:  # fmt: skip
        tensors, rows = [], []
        for role in "kv":
            for layer in range(self._numbers(f"n_{role}")[number]):
                dtype, row_bytes, rotation = next(specs[role])
                tensors.append(TensorSpec(layer, role, dtype, row_bytes, rotation))
                name = f"kv.{cache}.{stream}.blk.{layer}.{role}"
                ggml_type = dtype.ggml_id if dtype.name in DTYPES else _I8
                content = self._data(name, ggml_type, len(cells) * row_bytes)
                self._check_dims(name, tensors[-1], len(cells))
                rows.append(content.reshape(len(cells), row_bytes))
        attributes = self._facts(f"kvcache.track.{number}.")
        return _GgufTrack(cache, stream, cells, tensors, attributes, rows)

    def _check_dims(self, name: str, spec: TensorSpec, n_cells: int) -> None:
        width = spec.n_channels if spec.dtype.name in DTYPES else spec.row_bytes
        tensor = self._tensors.get(name)
        if tensor is not None and tensor.dims != (width, n_cells):
            raise self._damaged(f"tensor {name!r} has dimensions {tensor.dims}")

    def _check_all_used(self, tracks: Sequence[Track]) -> None:
        n_rows = sum(name.startswith("kv.") for name in self._tensors)
        if n_rows != sum(len(track.tensors) for track in tracks if len(track.cells)):
            raise self._damaged("some of its tensors belong to no track")
