"""Caches in npz files, as ``numpy.savez`` makes them; names are those of `kv_arrays`.

NumPy has no bf16, so bf16 arrays are uint16 bit patterns. The metadata is one array more,
``metadata``: JSON in a string. Nothing is pickled, and an object array is refused.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from .. import files
from ..dtypes import DTYPES
from ..errors import DamagedError, UnsupportedError, UsageError
from ..model import Snapshot
from .hf_layout import as_transformers
from .kv_arrays import (
    HeadArray,
    metadata,
    parse_json,
    place,
    planes,
    snapshot_from_arrays,
    spans,
)

Progress = Callable[[int], None]

MAGIC = b"PK\x03\x04"
_TYPES = {"<f2": "f16", "<u2": "bf16", "<f4": "f32"}
_NUMPY_TYPES = {name: code for code, name in _TYPES.items()}
_MAX_MEMBERS = 4096
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][fiuU][0-9]{1,9})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,15},? ?){0,4})\),? ?\}\s*"
)
"""What NumPy writes for a plain array. Its own parser evaluates the header as Python, and fails in
as many ways."""
_GENEROUS = 48 << 20
_MAX_EXPANSION = 8
"""A compressed file may unpack to this many times its size, or to 48 MB: keys and values cannot be
compressed further, so more than that is an attack on memory."""
_MAX_DIRECTORY = 1 << 20
"""Bytes of a zip file's list of members; the standard library makes ten times as much of them."""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What NumPy writes. Other methods are decompressed without a bound by the standard library."""
_PIECE = 1 << 20

_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError,
    ValueError, KeyError, IndexError, TypeError, OverflowError, OSError,
)  # fmt: skip
"""What the standard library raises for damaged files; an invalid offset is an `OSError`."""


def write_npz(
    snapshot: Snapshot,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the cache of ``snapshot``, uncompressed; returns the size. See `write_safetensors`.

    Holds one track in memory.
    """
    snapshot = as_transformers(snapshot)
    with files.new_file(out, force=force) as fd:
        with os.fdopen(os.dup(fd), "w+b") as file, zipfile.ZipFile(file, "w") as archive:
            _add(archive, "metadata", np.array(json.dumps(metadata(snapshot))))
            _add(archive, "tokens", snapshot.tokens.astype("<i4"))
            for number in range(len(snapshot.tracks)):
                for name, array in _arrays(snapshot, number, progress):
                    _add(archive, name, array)
        return os.fstat(fd).st_size


def _arrays(
    snapshot: Snapshot, number: int, progress: Progress | None
) -> list[tuple[str, NDArray[Any]]]:
    """Arrays of one track with their names."""
    track = snapshot.tracks[number]
    wanted = {plane.tensor: plane for plane in planes(snapshot) if plane.track == number}
    made = {
        index: np.empty(plane.shape, f"<u{plane.dtype.block_bytes}")
        for index, plane in wanted.items()
    }
    for start, stop in spans(track):
        for index, rows in enumerate(track.read(start, stop)):
            place(rows, wanted[index], start, made[index])
            if progress is not None:
                progress(rows.nbytes)
    return [
        (plane.name, made[index].view(_NUMPY_TYPES[plane.dtype.name]))
        for index, plane in wanted.items()
    ]


def _add(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    # A fixed date, so that equal caches make equal files.
    entry = zipfile.ZipInfo(name + ".npy")
    with archive.open(entry, "w", force_zip64=True) as member:
        npy.write_array(member, array, allow_pickle=False)


def open_npz(path: str | os.PathLike[str]) -> Snapshot:
    """Read the file at ``path`` into memory; checksums of the zip members are checked.

    Raises like `tscfile.sources.safetensors_cache.open_safetensors`.
    """
    where = os.fspath(path)
    try:
        with _Opened(path, where) as file, zipfile.ZipFile(file) as archive:
            file.most = None
            arrays = _read_members(archive, file.size, where)
    except _ZIP_ERRORS as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        first = (str(error) or type(error).__name__).split("\n")[0][:100]
        raise DamagedError(f"{where}: is no whole npz file ({first})") from None
    facts = _facts(arrays.pop("metadata", None), where)
    tokens = arrays.pop("tokens", None)
    if tokens is None:
        raise UsageError(f"{where}: has no array 'tokens': the ids of the cached tokens")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DamagedError(f"{where}: 'tokens' is no list of integers")
    return snapshot_from_arrays(
        {name: _head_array(name, array, where) for name, array in arrays.items()},
        tokens, facts, where,
    )  # fmt: skip


class _Opened(io.BufferedReader):
    """A file of which no more than ``most`` bytes are read at once, if that is not None."""

    def __init__(self, path: str | os.PathLike[str], where: str) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size
        self.most: int | None = _MAX_DIRECTORY
        self._where = where

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is not None:
            wanted = self.size - self.tell() if size is None or size < 0 else size
            if wanted > self.most:
                raise DamagedError(
                    f"{self._where}: its list of members takes {wanted} bytes; damaged"
                )
        return super().read(size)


def _read_members(archive: zipfile.ZipFile, size: int, where: str) -> dict[str, NDArray[Any]]:
    """Arrays by name; ``size``: bytes of the file."""
    entries = archive.infolist()
    if len(entries) > _MAX_MEMBERS:
        raise UnsupportedError(f"{where}: {len(entries)} arrays; at most {_MAX_MEMBERS}")
    if sum(entry.compress_size for entry in entries) > size:
        raise DamagedError(f"{where}: its members take more bytes than the file has")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max(_GENEROUS, _MAX_EXPANSION * size):
        raise DamagedError(
            f"{where}: unpacks from {size} to {unpacked} bytes, which no cache does"
        )
    made: dict[str, NDArray[Any]] = {}
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        if name in made or name == entry.filename:
            raise UsageError(f"{where}: member {entry.filename[:40]!r} is no array of a cache")
        if entry.compress_type not in _METHODS:
            raise UnsupportedError(f"{where}: {name[:40]!r} is compressed in a way NumPy has not")
        with archive.open(entry) as member:
            made[name] = _read_member(member, entry.file_size, name, where)
    return made


def _read_member(member: IO[bytes], size: int, name: str, where: str) -> NDArray[Any]:
    """One array; its claims are compared with the member's size before anything is allocated."""
    start = member.read(10)
    if start[:8] != _NPY_MAGIC or len(start) < 10:
        raise UnsupportedError(f"{where}: {name[:40]!r} is no array of npy version 1.0")
    header = _NPY_HEADER.fullmatch(member.read(struct.unpack("<H", start[8:])[0]))
    if header is None:
        raise UnsupportedError(
            f"{where}: {name[:40]!r} has no header of a plain array; objects are never unpickled"
        )
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(each) for each in header[3].split(b",") if each.strip())
    n_bytes = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or n_bytes > size:
        raise DamagedError(f"{where}: {name[:40]!r} of shape {shape[:8]} is more than its member")
    data, at = np.empty(n_bytes, np.uint8), 0
    while part := member.read(_PIECE):
        if at + len(part) > n_bytes:
            raise DamagedError(f"{where}: {name[:40]!r} has more than {n_bytes} bytes; damaged")
        data[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
    if at < n_bytes:
        raise DamagedError(f"{where}: {name[:40]!r} has {at} bytes instead of {n_bytes}; damaged")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if header[2] == b"True" else "C")


def _facts(array: NDArray[Any] | None, where: str) -> dict[str, str]:
    if array is None:
        return {}
    if array.dtype.kind != "U" or array.size != 1:
        raise DamagedError(f"{where}: 'metadata' is no string")
    try:
        text = array.tobytes().decode("utf-32-le").rstrip("\0")
    except UnicodeDecodeError:
        raise DamagedError(f"{where}: 'metadata' holds what is no character; damaged") from None
    values = parse_json(text, where)
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise DamagedError(f"{where}: 'metadata' is no table of strings")
    return values


def _head_array(name: str, array: NDArray[Any], where: str) -> HeadArray:
    known = _TYPES.get(array.dtype.str)
    if known is None:
        raise UnsupportedError(
            f"{where}: {name[:40]!r} is of type {array.dtype.str}; float16, float32 and, for bf16, "
            "uint16 are carried"
        )
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    dtype = DTYPES[known]
    return HeadArray(dtype, array.view(f"<u{dtype.block_bytes}"))
