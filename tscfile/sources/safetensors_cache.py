"""Caches in safetensors files; names and metadata are those of `kv_arrays`.

The format is a u64 header length, a JSON header and the arrays' bytes. It is read and written here
and not with the safetensors package, so that bf16 needs no torch, rows go straight from and into a
mapped file, and every length is checked before it is used.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..dtypes import DTYPES
from ..errors import DamagedError, TruncatedError, UnsupportedError, UsageError
from ..model import Snapshot
from .hf_layout import as_transformers
from .kv_arrays import (
    HeadArray,
    Plane,
    metadata,
    parse_json,
    place,
    planes,
    snapshot_from_arrays,
    spans,
)

Progress = Callable[[int], None]

_NAMES = {"F16": "f16", "BF16": "bf16", "F32": "f32"}
_TOKEN_TYPES = {"I32": "<i4", "I64": "<i8"}
_MAX_HEADER = 2 << 20
"""Bytes of JSON, which take up to twenty times as much memory; a cache of 1024 layers needs 0.2
MB."""
_ALIGNMENT = 8


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that starts with ``head`` looks like a safetensors file."""
    return len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32


# --- writing --------------------------------------------------------------------------------------


def write_safetensors(
    snapshot: Snapshot,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the cache of ``snapshot``, whole or not at all; returns the size of the file.

    A llama.cpp state is put in transformers' order (`hf_layout.as_transformers`, which says what
    is refused). `UsageError` if ``out`` exists and ``force`` is not given.
    """
    snapshot = as_transformers(snapshot)
    arrays = planes(snapshot)
    tokens = snapshot.tokens.astype("<i4")
    header, offsets = _header(snapshot, arrays, tokens)
    size = offsets["end"]
    with files.new_mapped_file(out, size, force=force) as view:
        view[: len(header)] = header
        content = np.frombuffer(view, np.uint8)
        content[offsets["tokens"] : offsets["tokens"] + tokens.nbytes] = tokens.view(np.uint8)
        _write_planes(snapshot, arrays, offsets, content, progress)
        del content
    return size


def _header(
    snapshot: Snapshot, arrays: list[Plane], tokens: NDArray[np.int32]
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the file each array starts."""
    entries: dict[str, Any] = {"__metadata__": metadata(snapshot)}
    starts = {"tokens": 0}
    entries["tokens"] = _entry("I32", [len(tokens)], 0, tokens.nbytes)
    at = tokens.nbytes
    for plane in arrays:
        starts[plane.name] = at
        entries[plane.name] = _entry(plane.dtype.name.upper(), list(plane.shape), at, plane.n_bytes)
        at += plane.n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + start for name, start in {**starts, "end": at}.items()}


def _entry(dtype: str, shape: list[int], start: int, n_bytes: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + n_bytes]}


def _write_planes(
    snapshot: Snapshot,
    arrays: list[Plane],
    offsets: Mapping[str, int],
    content: NDArray[np.uint8],
    progress: Progress | None,
) -> None:
    for number, track in enumerate(snapshot.tracks):
        targets = {}
        for plane in arrays:
            if plane.track == number:
                start = offsets[plane.name]
                bits = content[start : start + plane.n_bytes].view(f"<u{plane.dtype.block_bytes}")
                targets[plane.tensor] = (plane, bits.reshape(plane.shape))
        for start, stop in spans(track):
            for index, rows in enumerate(track.read(start, stop)):
                plane, target = targets[index]
                place(rows, plane, start, target)
                if progress is not None:
                    progress(rows.nbytes)


# --- reading --------------------------------------------------------------------------------------


def open_safetensors(path: str | os.PathLike[str]) -> Snapshot:
    """Map the file at ``path``; its rows are read on demand, so it must not change meanwhile.

    Raises `TruncatedError` and `DamagedError` for files that contradict themselves, `UsageError`
    for arrays that are not of a cache, `UnsupportedError` for element types that are not carried.
    """
    where = os.fspath(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    entries, start = _read_header(data, where)
    facts = _read_metadata(entries.pop("__metadata__", {}), where)
    located = {name: _locate(name, entry, size - start, where) for name, entry in entries.items()}
    _check_cover(located, size - start, where)
    if "tokens" not in located:
        raise UsageError(
            f"{where}: has no array 'tokens': the ids of the cached tokens prove a resume"
        )
    tokens = _read_tokens(data, start, located.pop("tokens"), where)
    arrays = {name: _array(data, start, each, name, where) for name, each in located.items()}
    return snapshot_from_arrays(arrays, tokens, facts, where)


_Located = tuple[str, tuple[int, ...], int, int]
"""Type name, shape, first and last byte in the data."""


def _read_header(data: Any, where: str) -> tuple[dict[str, Any], int]:
    if len(data) < 8:
        raise TruncatedError(f"{where}: {len(data)} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise TruncatedError(
            f"{where}: the header takes {length} bytes and the file has {len(data)}; it was cut"
        )
    if length > _MAX_HEADER:
        raise DamagedError(f"{where}: a header of {length} bytes, more than a cache can have")
    entries = parse_json(data[8 : 8 + length], where)
    if not isinstance(entries, dict):
        raise DamagedError(f"{where}: the header is no table of arrays")
    return entries, 8 + length


def _read_metadata(values: Any, where: str) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise DamagedError(f"{where}: the metadata is no table of strings")
    return values


def _locate(name: str, entry: Any, n_data: int, where: str) -> _Located:
    label = name[:40]
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last] if isinstance(shape, list) else [None]
    except (KeyError, TypeError, ValueError):
        raise DamagedError(f"{where}: the entry of {label!r} lacks a field") from None
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
        raise DamagedError(f"{where}: the entry of {label!r} has a field of the wrong type")
    if dtype not in _NAMES and dtype not in _TOKEN_TYPES:
        raise UnsupportedError(
            f"{where}: {label!r} is of type {dtype[:20]!r}; {', '.join(_NAMES)} are carried"
        )
    if not first <= last or last > n_data:
        raise TruncatedError(
            f"{where}: {label!r} ends at byte {last} of {n_data} bytes of data; the file was cut"
        )
    width = 2 if dtype.endswith("16") else 8 if dtype == "I64" else 4
    if len(shape) > 4 or math.prod(shape) * width != last - first:
        raise DamagedError(f"{where}: {label!r} of shape {shape[:8]} is not {last - first} bytes")
    return dtype, tuple(shape), first, last


def _check_cover(located: Mapping[str, _Located], n_data: int, where: str) -> None:
    """Arrays must follow one another to the end, as the format says."""
    at = 0
    for _, _, first, last in sorted(located.values(), key=lambda each: each[2:]):
        if first != at:
            raise DamagedError(f"{where}: the arrays overlap or leave a gap at byte {at} of data")
        at = last
    if at != n_data:
        raise DamagedError(f"{where}: {n_data - at} bytes of data belong to no array")


def _read_tokens(data: Any, start: int, located: _Located, where: str) -> NDArray[np.integer]:
    dtype, shape, first, _ = located
    if dtype not in _TOKEN_TYPES or len(shape) != 1:
        raise DamagedError(f"{where}: 'tokens' is {dtype} {list(shape)}, not a list of integers")
    return np.frombuffer(data, _TOKEN_TYPES[dtype], shape[0], start + first)


def _array(data: Any, start: int, located: _Located, name: str, where: str) -> HeadArray:
    dtype, shape, first, _ = located
    if dtype not in _NAMES:
        raise UnsupportedError(
            f"{where}: {name[:40]!r} is of type {dtype}; {', '.join(_NAMES)} are carried"
        )
    if 0 in shape:
        raise DamagedError(f"{where}: {name[:40]!r} of shape {list(shape)} holds nothing")
    if len(shape) == 4 and shape[0] == 1:
        shape = shape[1:]
    carried = DTYPES[_NAMES[dtype]]
    bits = np.frombuffer(data, f"<u{carried.block_bytes}", math.prod(shape), start + first)
    return HeadArray(carried, bits.reshape(shape))
