"""From the bytes of a llama.cpp state to a `Snapshot` whose rows are read on demand."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DamagedError, TruncatedError, UnsupportedError, UsageError
from ...model import ModelIdentity, Snapshot, TensorSpec, Track
from .layout import (
    CONTAINERS,
    KINDS,
    KV,
    MAX_ARCH_LENGTH,
    MAX_VERSION,
    MIN_VERSION,
    SEQUENCE,
    SEQUENCE_BUFFER,
    SEQUENCE_BUFFER_MAGIC,
    SEQUENCE_MAGIC,
    SEQUENCE_VERSION_DELTA,
    SESSION,
    SESSION_MAGIC,
    STATE_BUFFER,
    generation_of,
    layouts_of,
)
from .memory import Bytes, Memory, Misfit, Part, Search, StreamPart
from .tokens import VERBATIM, decode_token_field
from .track import StateTrack

_MAGICS = {
    SESSION_MAGIC: SESSION,
    SEQUENCE_MAGIC: SEQUENCE,
    SEQUENCE_BUFFER_MAGIC: SEQUENCE_BUFFER,
}


@dataclass
class _Prefix:
    """What precedes the memory section; ``version`` is the session number or 0."""

    container: str
    end: int
    version: int = 0
    arch: str = ""
    token_field: tuple[int, int] = (0, 0)
    buffer_magic: bool | None = None
    seq_id: int = 0


def open_state(
    path: str | os.PathLike[str], *, container: str | None = None, arch: str | None = None
) -> Snapshot:
    """Map the state file at ``path`` and read its structure.

    ``container`` (one of `CONTAINERS`) says what the file is instead of guessing; ``arch`` names
    the model's architecture (GGUF ``general.architecture``) where the file does not and its
    structure is ambiguous. The snapshot's tracks read from the map, so the file must not be
    changed while they are in use.

    Raises `TruncatedError` and `DamagedError` for files that are cut or contradict themselves,
    `UnsupportedError` for versions and memory kinds without a reading, `OSError` as ``open`` does.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    return parse_state(data, where=os.fspath(path), container=container, arch=arch)


def parse_state(
    buffer: bytes | bytearray | memoryview | mmap.mmap,
    *,
    where: str = "<memory>",
    container: str | None = None,
    arch: str | None = None,
) -> Snapshot:
    """Read a state held in memory; ``where`` names it in messages. See `open_state`.

    The rows of the snapshot are views of ``buffer``, which must not change while they are in use.

    >>> state = b"\\x05\\0\\0\\0llama" + b"\\1\\0\\0\\0" + b"\\0\\0\\0\\0"
    >>> parse_state(state).source["container"]
    'state-buffer'
    """
    if container is not None and container not in CONTAINERS:
        raise UsageError(
            f"container {container!r} is unknown; choose one of {', '.join(CONTAINERS)}"
        )
    source = Bytes(memoryview(buffer).toreadonly().cast("B"))
    try:
        prefix = _read_prefix(source, where, container)
    except Misfit as misfit:
        place = f"{where}: {misfit} at offset {misfit.offset}"
        if misfit.truncated:
            raise TruncatedError(f"{place}; the file was cut, save the state again") from None
        raise DamagedError(f"{place}; this is not a llama.cpp state") from None
    search = Search(source, prefix.container, prefix.arch or arch or "", where)
    layouts = layouts_of(prefix.container, prefix.version, prefix.buffer_magic)
    memory = search.find(prefix.end, layouts)
    return _snapshot(source, prefix, memory)


def _read_prefix(source: Bytes, where: str, container: str | None) -> _Prefix:
    detected = _detect(source)
    if container is None:
        container = detected or STATE_BUFFER
    elif detected not in (None, container):
        raise DamagedError(
            f"{where}: the magic at offset 0 is that of a {detected}, not of a {container}; "
            "leave the container to detection"
        )
    if container in (SESSION, SEQUENCE):
        if detected is None:
            raise Misfit(0, f"no magic of a {container} file")
        return _read_file_prefix(source, where, container)
    if container == SEQUENCE_BUFFER:
        return _read_sequence_buffer_prefix(source, detected is not None)
    arch, end = _read_arch(source, 0)
    return _Prefix(STATE_BUFFER, end, arch=arch)


def _detect(source: Bytes) -> str | None:
    """The container named by a magic number, if there is one."""
    if len(source) < 4:
        return None
    return _MAGICS.get(source.unpack("I", 0, "magic")[0])


def _read_file_prefix(source: Bytes, where: str, container: str) -> _Prefix:
    _, number, n_tokens = source.unpack("III", 0, "the file header")
    version = number if container == SESSION else number + SEQUENCE_VERSION_DELTA
    if not MIN_VERSION <= version <= MAX_VERSION:
        delta = 0 if container == SESSION else SEQUENCE_VERSION_DELTA
        raise UnsupportedError(
            f"{where}: {container} version {number} at offset 4 is unknown; this tscfile reads "
            f"{MIN_VERSION - delta} to {MAX_VERSION - delta}, use a newer one"
        )
    source.need(12, 4 * n_tokens, f"the list of {n_tokens} tokens")
    end = 12 + 4 * n_tokens
    prefix = _Prefix(container, end, version, token_field=(12, end))
    if container == SESSION:
        prefix.arch, prefix.end = _read_arch(source, end)
    return prefix


def _read_sequence_buffer_prefix(source: Bytes, has_magic: bool) -> _Prefix:
    """Builds before 2026-06 write no prefix; their buffers must be announced by the caller."""
    if not has_magic:
        return _Prefix(SEQUENCE_BUFFER, 0, buffer_magic=False)
    _, seq_id = source.unpack("Ii", 0, "the buffer header")
    return _Prefix(SEQUENCE_BUFFER, 8, buffer_magic=True, seq_id=seq_id)


def _read_arch(source: Bytes, offset: int) -> tuple[str, int]:
    (length,) = source.unpack("I", offset, "the architecture's length")
    if not 1 <= length <= MAX_ARCH_LENGTH:
        raise Misfit(offset, f"no architecture name ({length} bytes long)")
    source.need(offset + 4, length, "the architecture's name")
    name = bytes(source.data[offset + 4 : offset + 4 + length])
    if not all(0x20 < byte < 0x7F for byte in name):
        raise Misfit(offset + 4, "no architecture name")
    return name.decode("ascii"), offset + 4 + length


def _snapshot(source: Bytes, prefix: _Prefix, memory: Memory) -> Snapshot:
    tokens, form, opaque = _read_tokens(source, prefix)
    opaque.update(_opaque_sections(source, prefix, memory))
    caches = [part for part in memory.parts if part.kind == KV]
    facts = _source_facts(prefix, memory, caches)
    facts["token_form"] = form
    identity = ModelIdentity({"architecture": prefix.arch} if prefix.arch else {})
    # A state without layers does not tell its generation, but has its rotation sizes all the same.
    rotated_since = (
        None if memory.layout.rotation else _quantized_rotation(facts["generation"])
    )
    tracks: list[Track] = [
        _track(source, cache, index, stream, rotated_since)
        for cache, part in enumerate(caches)
        for index, stream in enumerate(part.streams)
        if stream.v_trans is not None
    ]
    return Snapshot(tokens, tracks, facts, opaque, identity)


def _read_tokens(source: Bytes, prefix: _Prefix) -> tuple[NDArray[np.int32], str, dict[str, bytes]]:
    start, end = prefix.token_field
    if prefix.container == SEQUENCE and end > start:
        tokens, form = decode_token_field(source.data[start:end])
    else:
        tokens, form = source.words(start)[: (end - start) // 4].astype(np.int32), "plain"
    opaque = {"token_field": bytes(source.data[start:end])} if form == VERBATIM else {}
    return tokens, form, opaque


def _opaque_sections(source: Bytes, prefix: _Prefix, memory: Memory) -> dict[str, bytes]:
    extents = {
        "outputs": (prefix.end, memory.outputs_end),
        "appendix": (memory.end, len(source)),
    }
    for part in memory.parts:
        if part.kind != KV:
            extents["recurrent"] = (part.start, part.end)
    return {
        name: bytes(source.data[start:end]) for name, (start, end) in extents.items() if end > start
    }


def _source_facts(prefix: _Prefix, memory: Memory, caches: list[Part]) -> dict[str, Any]:
    layout = memory.layout
    cells = next((s.cells for part in caches for s in part.streams if len(s.cells)), None)
    generation = generation_of(
        prefix.container,
        prefix.version,
        layout,
        kv_seen=bool(caches),
        cells_seen=cells is not None,
        layers_seen=any(stream.tensors for part in caches for stream in part.streams),
        without_ids=cells is not None and int(cells.seq_counts[0]) == 0,
        buffer_magic=prefix.buffer_magic,
    )
    kinds = tuple(part.kind for part in memory.parts)
    facts: dict[str, Any] = {
        "format": "llama.cpp",
        "container": prefix.container,
        "version": prefix.version,
        "generation": generation,
        "kind": KINDS[kinds],
        "parts": ",".join(kinds),
        "n_stream": [len(part.streams) for part in caches],
        "cell_counts": [len(stream.cells) for part in caches for stream in part.streams],
        "has_outputs": layout.outputs,
        "has_streams": layout.streams,
        "ext_bytes": layout.ext_bytes,
        "has_rotation": layout.rotation,
    }
    if prefix.arch:
        facts["arch"] = prefix.arch
    if prefix.buffer_magic is not None:
        facts |= {"buffer_magic": prefix.buffer_magic, "seq_id": prefix.seq_id}
    return facts


def _quantized_rotation(generation: str) -> int | None:
    """Rotation of quantized rows as far as the generation tells it: 0 none, -1 unknown.

    None where the file itself says it (G). Caches have been rotated since E.
    """
    if generation == "G":
        return None
    return 0 if generation in ("A", "B", "C", "A-B", "A-C", "B-C") else -1


def _track(
    source: Bytes, cache: int, index: int, stream: StreamPart, quantized_rotation: int | None
) -> StateTrack:
    attributes: dict[str, Any] = {"v_trans": stream.v_trans}
    if quantized_rotation is None:
        attributes["n_rot_k"], attributes["n_rot_v"] = stream.rotations
    return StateTrack(
        cache=cache,
        stream=index,
        cells=stream.cells,
        tensors=[_spec(stored.spec, quantized_rotation) for stored in stream.tensors],
        attributes=attributes,
        buffer=source.array,
        offsets=[stored.offset for stored in stream.tensors],
        element_bytes=[stored.element_bytes for stored in stream.tensors],
    )


def _spec(spec: TensorSpec, quantized_rotation: int | None) -> TensorSpec:
    known_plain = spec.dtype.name in ("f32", "f16", "bf16")
    if quantized_rotation is None or known_plain:
        return spec
    return TensorSpec(spec.layer, spec.role, spec.dtype, spec.row_bytes, quantized_rotation)
