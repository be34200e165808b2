"""From a `Snapshot` to the bytes of a llama.cpp state.

The target is planned first (`target`), then every header is placed and every tensor given its
offset, and at last the rows are read from the tracks in ascending spans, each span once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import workers
from ...errors import UsageError
from ...model import BLOCK_FRAMES, CellTable, Snapshot, TensorSpec, Track, read_into
from .cells import encode_cells, encoded_cells_bytes
from .layout import (
    KV,
    SEQUENCE,
    SEQUENCE_BUFFER,
    SEQUENCE_BUFFER_MAGIC,
    SEQUENCE_MAGIC,
    SEQUENCE_VERSION_DELTA,
    SESSION,
    SESSION_MAGIC,
)
from .target import Target, plan_target, resolved_rotation

SPAN_BYTES = 64 << 20
"""Rows asked of a track at once, unless 256 frames take more."""


@dataclass(frozen=True)
class _Rows:
    """Where a tensor's rows go; ``element_bytes`` is not 0 if channel after channel."""

    offset: int
    element_bytes: int


@dataclass
class _Assembly:
    """Headers with their offsets, and the places of the rows of each track."""

    size: int = 0
    headers: list[tuple[int, Callable[[], bytes]]] = field(default_factory=list)
    rows: list[tuple[Track, list[_Rows]]] = field(default_factory=list)

    def put(self, data: bytes) -> None:
        self.put_later(len(data), lambda: data)

    def put_later(self, n_bytes: int, make: Callable[[], bytes]) -> None:
        """Reserve ``n_bytes`` that are made only when written."""
        self.headers.append((self.size, make))
        self.size += n_bytes

    def pack(self, layout: str, *values: int) -> None:
        self.put(struct.pack("<" + layout, *values))


def state_size(
    snapshot: Snapshot,
    *,
    container: str | None = None,
    llama_version: int | None = None,
    v_trans: int | None = None,
    arch: str | None = None,
) -> int:
    """Bytes that `write_state` writes with the same options; raises what it raises."""
    target = plan_target(
        snapshot, container=container, llama_version=llama_version, v_trans=v_trans, arch=arch
    )
    return _assemble(snapshot, target).size


def write_state(
    snapshot: Snapshot,
    out: Any,
    *,
    container: str | None = None,
    llama_version: int | None = None,
    v_trans: int | None = None,
    arch: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``snapshot`` into ``out``, a writable buffer of exactly `state_size` bytes.

    Without options the bytes are those that `open_state` read. ``container`` is one of
    `CONTAINERS`; ``llama_version`` the session number 9, 10 or 11 of the build that shall read
    it (9 is written as its last generation, E); ``v_trans`` 1 stores V channel after channel, as
    contexts without flash attention do, 0 cell after cell; ``arch`` is the model's architecture,
    where neither the snapshot nor its identity knows it. Another container, version or V layout
    leaves llama-server's checkpoint appendix out, which was saved in the old form.

    ``progress`` is called with the bytes of rows placed since the last call. Rows are read in
    ascending spans of whole blocks of 256 frames and at most `SPAN_BYTES`, each frame once.

    Raises `UsageError`, `UnsupportedError` or `MismatchError` for what cannot be right.
    """
    target = plan_target(
        snapshot, container=container, llama_version=llama_version, v_trans=v_trans, arch=arch
    )
    assembly = _assemble(snapshot, target)
    view = memoryview(out).cast("B")
    if len(view) != assembly.size:
        raise UsageError(
            f"the state takes {assembly.size} bytes and the output has {len(view)}; "
            "ask state_size first"
        )
    for offset, make in assembly.headers:
        data = make()
        view[offset : offset + len(data)] = data
    buffer = np.frombuffer(view, dtype=np.uint8)
    for track, rows in assembly.rows:
        _write_rows(track, rows, buffer, progress)


def _assemble(snapshot: Snapshot, target: Target) -> _Assembly:
    assembly = _Assembly()
    _put_prefix(assembly, target)
    assembly.put(target.outputs)
    tracks = {
        (track.cache, track.stream): (track, cells)
        for track, cells in zip(snapshot.tracks, target.cells, strict=True)
    }
    parts = [part for part in snapshot.source["parts"].split(",") if part]
    cache = 0
    for part in parts:
        if part != KV:
            assembly.put(target.recurrent)
            continue
        n_streams = snapshot.source["n_stream"][cache]
        if target.layout.streams:
            assembly.pack("I", n_streams)
        for stream in range(n_streams):
            _put_stream(assembly, snapshot, target, tracks.get((cache, stream)))
        cache += 1
    assembly.put(target.appendix)
    return assembly


def _put_prefix(assembly: _Assembly, target: Target) -> None:
    if target.container in (SESSION, SEQUENCE):
        session = target.container == SESSION
        magic = SESSION_MAGIC if session else SEQUENCE_MAGIC
        number = target.version - (0 if session else SEQUENCE_VERSION_DELTA)
        assembly.pack("III", magic, number, len(target.token_field) // 4)
        assembly.put(target.token_field)
        if not session:
            return
    if target.container == SEQUENCE_BUFFER:
        if target.buffer_seq_id is not None:
            assembly.pack("Ii", SEQUENCE_BUFFER_MAGIC, target.buffer_seq_id)
        return
    name = target.arch.encode("ascii")
    assembly.pack("I", len(name))
    assembly.put(name)


def _put_stream(
    assembly: _Assembly,
    snapshot: Snapshot,
    target: Target,
    found: tuple[Track, CellTable] | None,
) -> None:
    n_cells = len(found[1]) if found else 0
    assembly.pack("I", n_cells)
    if found is None or (n_cells == 0 and target.layout.streams):
        return
    track, cells = found
    assembly.put_later(encoded_cells_bytes(cells), lambda: encode_cells(cells).tobytes())
    v_trans = track.attributes.get("v_trans", 0) if target.v_trans is None else target.v_trans
    n_layers = sum(spec.role == "k" for spec in track.tensors)
    assembly.pack("II", v_trans, n_layers)
    if target.layout.rotation:
        assembly.pack("II", _rotation(snapshot, track, "k"), _rotation(snapshot, track, "v"))
    places = [_put_tensor(assembly, spec, n_cells, v_trans) for spec in track.tensors]
    assembly.rows.append((track, places))


def _rotation(snapshot: Snapshot, track: Track, role: str) -> int:
    """The block size to state for the keys or values of a track."""
    sizes = {resolved_rotation(snapshot, spec) for spec in track.tensors if spec.role == role}
    if not sizes:
        return int(track.attributes.get(f"n_rot_{role}", 0))
    if len(sizes) > 1:
        raise UsageError(
            f"the layers of cache {track.cache} are rotated by different sizes {sorted(sizes)}; "
            "llama.cpp states have one"
        )
    return sizes.pop()


def _put_tensor(assembly: _Assembly, spec: TensorSpec, n_cells: int, v_trans: int) -> _Rows:
    element = 0
    if spec.role == "v" and v_trans:
        element = spec.dtype.block_bytes
        assembly.pack("iII", spec.dtype.ggml_id, element, spec.n_channels)
    else:
        assembly.pack("iQ", spec.dtype.ggml_id, spec.row_bytes)
    place = _Rows(assembly.size, element)
    assembly.size += n_cells * spec.row_bytes
    return place


def _spans(track: Track) -> Iterator[tuple[int, int]]:
    frame_bytes = sum(spec.row_bytes for spec in track.tensors) or 1
    n_blocks = max(1, SPAN_BYTES // (frame_bytes * BLOCK_FRAMES))
    step = n_blocks * BLOCK_FRAMES
    for start in range(0, len(track.cells), step):
        yield start, min(start + step, len(track.cells))


def _write_rows(
    track: Track,
    places: list[_Rows],
    out: NDArray[np.uint8],
    progress: Callable[[int], None] | None,
) -> None:
    if not track.tensors:
        return
    for start, stop in _spans(track):
        _write_span(track, places, out, start, stop)
        if progress is not None:
            progress((stop - start) * sum(spec.row_bytes for spec in track.tensors))


def _write_span(
    track: Track, places: list[_Rows], out: NDArray[np.uint8], start: int, stop: int
) -> None:
    """Frames ``start`` to ``stop``: rows right into their place, channels by way of a buffer."""
    areas = []
    turned: list[tuple[_Rows, NDArray[np.uint8]]] = []
    for place, spec in zip(places, track.tensors, strict=True):
        if place.element_bytes:
            areas.append(np.empty((stop - start, spec.row_bytes), np.uint8))
            turned.append((place, areas[-1]))
        else:
            first = place.offset + start * spec.row_bytes
            last = place.offset + stop * spec.row_bytes
            areas.append(out[first:last].reshape(-1, spec.row_bytes))
    read_into(track, start, stop, areas)

    def turn(task: tuple[_Rows, NDArray[np.uint8]]) -> None:
        place, rows = task
        dtype, n_cells = f"<u{place.element_bytes}", len(track.cells)
        stored = out[place.offset : place.offset + n_cells * rows.shape[1]].view(dtype)
        stored.reshape(-1, n_cells)[:, start:stop] = rows.view(dtype).T

    workers.run(turn, turned)
