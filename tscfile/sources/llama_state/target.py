"""What a state is to be written as, decided before a byte is placed.

`plan_target` takes a snapshot and the caller's wishes and returns a `Target`, or refuses what the
reader of the new file would misunderstand: rows whose rotation does not suit the build, several
sequences in a sequence file, a session without tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DamagedError, MismatchError, UnsupportedError, UsageError
from ...model import CellTable, Snapshot, TensorSpec, Track
from ...transforms.rotation import rotation_block
from .cells import BadCells, decode_cells, encode_cells
from .layout import (
    CONTAINERS,
    MAX_VERSION,
    MIN_VERSION,
    MROPE_ARCHS,
    SEQUENCE,
    SEQUENCE_BUFFER,
    SESSION,
    STATE_BUFFER,
    Layout,
)
from .tokens import PACKED, PLAIN, VERBATIM, encode_token_field

_NO_OUTPUTS = bytes(20)
_UNROTATED_GENERATIONS = ("A", "B", "C", "A-B", "A-C", "B-C")
_WHOLE = (SESSION, STATE_BUFFER)
_BUFFERS = (STATE_BUFFER, SEQUENCE_BUFFER)


@dataclass(frozen=True)
class Target:
    """A decided container: sections as bytes, switches for the rest.

    ``cells``: the records of each track, in the order of ``snapshot.tracks``. ``v_trans``: None
    keeps what each track says. ``recurrent``: the recurrent part, converted where needed.
    """

    container: str
    version: int
    layout: Layout
    arch: str
    token_field: bytes
    outputs: bytes
    recurrent: bytes
    appendix: bytes
    buffer_seq_id: int | None
    v_trans: int | None
    cells: tuple[CellTable, ...]


def plan_target(
    snapshot: Snapshot,
    *,
    container: str | None,
    llama_version: int | None,
    v_trans: int | None,
    arch: str | None,
) -> Target:
    """Decide how ``snapshot`` is written; see `tscfile.sources.llama_state.write_state`."""
    _check_options(snapshot, container, llama_version, v_trans)
    facts = snapshot.source
    new_container = container or facts["container"]
    known_arch = _architecture(snapshot, arch)
    layout = _source_layout(facts)
    version = llama_version or facts["version"]
    if llama_version is not None:
        layout = _layout_for(snapshot, llama_version, layout, known_arch)
    elif new_container not in _BUFFERS and not version:
        version = _version_of_buffer(facts)
    layout = _with_outputs(layout, facts, new_container, llama_version)
    _check_rotations(snapshot, llama_version, layout)
    for track in snapshot.tracks:
        _check_v_trans(track, v_trans)
    cells, recurrent = _convert_cells(snapshot, new_container, layout)
    if new_container in _WHOLE and not known_arch:
        raise UsageError(
            f"a {new_container} names the model's architecture, which a {facts['container']} "
            "does not; give it (GGUF general.architecture)"
        )
    same_form = new_container == facts["container"] and version == facts["version"]
    return Target(
        container=new_container,
        version=version,
        layout=layout,
        arch=known_arch,
        token_field=_token_field(snapshot, new_container, same_form),
        outputs=snapshot.opaque.get("outputs", _NO_OUTPUTS) if layout.outputs else b"",
        recurrent=recurrent,
        appendix=_appendix(snapshot, same_form, v_trans),
        buffer_seq_id=_buffer_seq_id(facts, new_container, cells),
        v_trans=v_trans,
        cells=cells,
    )


def _check_options(
    snapshot: Snapshot, container: str | None, llama_version: int | None, v_trans: int | None
) -> None:
    if snapshot.source.get("format") != "llama.cpp":
        raise UnsupportedError(
            f"a snapshot from {snapshot.source.get('format', 'an unknown source')} cannot be "
            "written as a llama.cpp state; write it in its own format"
        )
    if container is not None and container not in CONTAINERS:
        raise UsageError(
            f"container {container!r} is unknown; choose one of {', '.join(CONTAINERS)}"
        )
    if llama_version is not None and not MIN_VERSION <= llama_version <= MAX_VERSION:
        raise UsageError(
            f"llama.cpp session version {llama_version} is unknown; choose "
            f"{MIN_VERSION} to {MAX_VERSION}"
        )
    if v_trans not in (None, 0, 1):
        raise UsageError(f"v_trans is {v_trans!r}; it must be 0 or 1")


def _architecture(snapshot: Snapshot, arch: str | None) -> str:
    known = snapshot.source.get("arch") or snapshot.identity.facts.get("architecture") or ""
    if arch and known and arch != known:
        raise MismatchError(f"the state is of a {known} model, not of {arch}; leave arch out")
    return arch or known


def _source_layout(facts: dict[str, Any]) -> Layout:
    return Layout(
        bool(facts["has_outputs"]),
        bool(facts["has_streams"]),
        int(facts["ext_bytes"]),
        bool(facts["has_rotation"]),
    )


def _version_of_buffer(facts: dict[str, Any]) -> int:
    """The number a file of this buffer's generation carries, where the bytes tell it."""
    generations = set(facts["generation"].replace("-", ""))
    if generations and generations <= set("ABCDE"):
        return 9
    if len(generations) == 1:
        return 10 if generations == {"F"} else 11
    raise UsageError(
        f"a {facts['container']} has no version and its layout is that of several; "
        "choose the llama.cpp session version to write"
    )


def _layout_for(snapshot: Snapshot, version: int, source: Layout, arch: str) -> Layout:
    has_ext = source.ext_bytes > 0
    if not has_ext and _may_precede_ext(snapshot.source):
        if arch in MROPE_ARCHS:
            has_ext = True
    ext_bytes = (8 if version == 9 else 12) if has_ext else 0
    return Layout(False, True, ext_bytes, version == 11)


def _may_precede_ext(facts: dict[str, Any]) -> bool:
    """Whether the state may be of a generation (A to C) that left x and y out."""
    return not facts["generation"] or facts["generation"][0] in "ABC"


def _with_outputs(
    layout: Layout, facts: dict[str, Any], container: str, llama_version: int | None
) -> Layout:
    """Whole states of generations A to C have an outputs section, sequence saves never do."""
    if container not in _WHOLE:
        return replace(layout, outputs=False)
    oldest = llama_version is None and not layout.streams
    return replace(layout, outputs=layout.outputs or oldest)


# Rotation of quantized rows ------------------------------------------------------------------


def resolved_rotation(snapshot: Snapshot, spec: TensorSpec) -> int:
    """The rotation of a tensor's rows, by llama.cpp's rule where version 10 leaves it open.

    The rule needs the head size (identity facts ``head_dim_k``, ``head_dim_v``); without it, and
    for version 9, the result stays -1.
    """
    if spec.rotation >= 0:
        return spec.rotation
    head_dim = head_size(snapshot, spec.role)
    if head_dim is None or snapshot.source.get("generation") != "F":
        return -1
    return rotation_block(spec.role, head_dim)


def head_size(snapshot: Snapshot, role: str) -> int | None:
    """The head size of keys (``k``) or values (``v``) if the identity has one for all layers."""
    value = snapshot.identity.facts.get(f"head_dim_{role}")
    return value if isinstance(value, int) else None


def _check_rotations(snapshot: Snapshot, llama_version: int | None, layout: Layout) -> None:
    source = snapshot.source
    for track in snapshot.tracks:
        for spec in track.tensors:
            if not spec.dtype.is_quantized:
                continue
            if llama_version is not None and llama_version != source["version"]:
                _check_new_version(snapshot, spec, llama_version)
            elif llama_version is not None and source["generation"] in _UNROTATED_GENERATIONS:
                _check_new_version(snapshot, spec, llama_version)
            elif source["generation"] in _UNROTATED_GENERATIONS and spec.rotation > 0:
                raise UsageError(
                    f"{_tensor_name(spec)} is rotated, which builds of generation "
                    f"{source['generation']} do not expect; choose a llama.cpp version to write"
                )


def _check_new_version(snapshot: Snapshot, spec: TensorSpec, version: int) -> None:
    """Refuse quantized rows that a build of ``version`` would take for what they are not."""
    rotation = resolved_rotation(snapshot, spec)
    is_newer = snapshot.source["generation"] in ("F", "G")
    if rotation < 0 and (version == 11 or not is_newer):
        remedy = "give the model's head size" if is_newer else "write it in its own version"
        raise UnsupportedError(
            f"{_tensor_name(spec)} is {spec.dtype.name} and the state does not say whether it is "
            f"rotated, which version {version} must know; {remedy}"
        )
    if version == 11 or is_newer:
        # Version 11 compares the sizes at load; 10 and E rotate by one and the same rule.
        return
    head_dim = head_size(snapshot, spec.role)
    expected = None if head_dim is None else rotation_block(spec.role, head_dim)
    uncertain = expected is None and rotation == 0 and spec.n_channels % 64 == 0
    if uncertain or (expected is not None and expected != rotation):
        raise UnsupportedError(
            f"{_tensor_name(spec)} is {spec.dtype.name} and not rotated as version {version} "
            "expects; convert it to another element type with the head size given"
        )


def _tensor_name(spec: TensorSpec) -> str:
    return f"{spec.role.upper()} of layer {spec.layer}"


def _check_v_trans(track: Track, v_trans: int | None) -> None:
    wanted = track.attributes.get("v_trans", 0) if v_trans is None else v_trans
    if not wanted:
        return
    for spec in track.tensors:
        if spec.role == "v" and spec.dtype.name not in ("f32", "f16", "bf16"):
            raise UsageError(
                f"{_tensor_name(spec)} is {spec.dtype.name}, which cannot be stored transposed; "
                "write it with v_trans 0 (flash attention on)"
            )


# Cells and recurrent cells -------------------------------------------------------------------


def _convert_cells(
    snapshot: Snapshot, container: str, layout: Layout
) -> tuple[tuple[CellTable, ...], bytes]:
    was_whole = snapshot.source["container"] in _WHOLE
    is_whole = container in _WHOLE
    tables = [track.cells for track in snapshot.tracks]
    recurrent = snapshot.opaque.get("recurrent", b"")
    if was_whole and not is_whole:
        _check_one_sequence(snapshot, tables, recurrent)
        recurrent = _with_recurrent_ids(recurrent, None)
    elif is_whole and not was_whole:
        seq_id = _only_stream(snapshot)
        tables = [_with_seq_id(table, seq_id) for table in tables]
        recurrent = _with_recurrent_ids(recurrent, seq_id)
    elif layout.streams and not snapshot.source["has_streams"]:
        tables = [_with_seq_id(t, 0) if not t.seq_counts.any() else t for t in tables]
    return tuple(_with_ext(table, layout, snapshot) for table in tables), recurrent


def _check_one_sequence(snapshot: Snapshot, tables: list[CellTable], recurrent: bytes) -> None:
    ids = {int(i) for table in tables for i in np.unique(table.seq_ids)}
    shared = any((table.seq_counts != 1).any() for table in tables)
    streams = {track.stream for track in snapshot.tracks if len(track.cells)}
    n_recurrent = int.from_bytes(recurrent[:4], "little")
    if shared or len(ids) > 1 or len(streams) > 1 or n_recurrent > 1:
        raise UsageError(
            f"the {snapshot.source['container']} holds more than one sequence "
            f"(ids {sorted(ids)}); only a state of one can become a sequence file"
        )


def _only_stream(snapshot: Snapshot) -> int:
    """The id a lone sequence takes in a whole context: that of its stream, 0 if unified."""
    return next((track.stream for track in snapshot.tracks if len(track.cells)), 0)


def _with_seq_id(table: CellTable, seq_id: int) -> CellTable:
    ones = np.ones(len(table), dtype=np.int32)
    return CellTable(table.pos, ones, ones * np.int32(seq_id), table.ext)


def _with_recurrent_ids(part: bytes, seq_id: int | None) -> bytes:
    """The recurrent part with the ids of its cells left out (None) or set.

    Sequence saves store recurrent cells without ids, whole contexts with them.
    """
    if not part:
        return part
    n_cells = int.from_bytes(part[:4], "little")
    try:
        words = np.frombuffer(part, dtype="<i4", offset=4, count=(len(part) - 4) // 4)
        table, used = decode_cells(words, n_cells, 0)
    except (BadCells, ValueError):
        raise DamagedError("the snapshot's recurrent part has no whole cells; damaged") from None
    none = np.zeros(0, dtype=np.int32)
    if seq_id is None:
        table = CellTable(table.pos, np.zeros(n_cells, dtype=np.int32), none, table.ext)
    else:
        table = _with_seq_id(table, seq_id)
    return part[:4] + encode_cells(table).tobytes() + part[4 + 4 * used :]


def _with_ext(table: CellTable, layout: Layout, snapshot: Snapshot) -> CellTable:
    n_ext, n_old = layout.ext_bytes // 4, table.ext.shape[1]
    if n_ext == n_old:
        return table
    ext = np.empty((len(table), n_ext), dtype=np.int32)
    ext[:, : min(2, n_ext)] = table.ext[:, : min(2, n_ext)] if n_old else table.pos[:, None]
    if n_ext == 3:
        ext[:, 2] = _cell_tokens(table, ext, snapshot.tokens)
    return CellTable(table.pos, table.seq_counts, table.seq_ids, ext)


def _cell_tokens(
    table: CellTable, ext: NDArray[np.int32], tokens: NDArray[np.int32]
) -> NDArray[np.int32]:
    """The token of each cell by its position, -1 where that is not certain."""
    unknown = np.full(len(table), -1, dtype=np.int32)
    is_text = bool((ext[:, 0] == table.pos).all() and (ext[:, 1] == table.pos).all())
    if not is_text or not len(tokens) or len(np.unique(table.seq_ids)) > 1:
        return unknown
    within = table.pos < len(tokens)
    unknown[within] = tokens[table.pos[within]]
    return unknown


# Tokens and the rest -------------------------------------------------------------------------


def _token_field(snapshot: Snapshot, container: str, same_form: bool) -> bytes:
    if container in _BUFFERS:
        return b""
    form = snapshot.source.get("token_form", PLAIN)
    if form == VERBATIM and container == SEQUENCE:
        return snapshot.opaque["token_field"]
    tokens = snapshot.tokens
    if container == SESSION and len(tokens) and form != PLAIN and int(tokens.min()) < 0:
        raise UnsupportedError(
            "the state holds media, which a session file cannot name; write a sequence file"
        )
    if not len(tokens) and snapshot.source["container"] in _BUFFERS:
        tokens = _tokens_of_cells(snapshot)
    return encode_token_field(tokens, form if form == PACKED and same_form else PLAIN)


def _tokens_of_cells(snapshot: Snapshot) -> NDArray[np.int32]:
    """The token list of a buffer, from the tokens that newer builds keep in the cells."""
    if not snapshot.tracks and not snapshot.opaque.get("recurrent"):
        return snapshot.tokens
    if snapshot.tracks:
        # In a model of two caches the first one sees the whole context.
        cells = snapshot.tracks[0].cells
        tokens = np.full(len(cells), -1, dtype=np.int32)
        if cells.ext.shape[1] == 3 and len(cells) and int(cells.pos.max()) < len(cells):
            tokens[cells.pos] = cells.ext[:, 2]
        if len(tokens) and int(tokens.min()) >= 0 and (cells.seq_ids == cells.seq_ids[0]).all():
            return tokens
    raise UsageError(
        f"a {snapshot.source['container']} has no token list and a state file without one is "
        "taken for empty; set the snapshot's tokens"
    )


def _appendix(snapshot: Snapshot, same_form: bool, v_trans: int | None) -> bytes:
    """llama-server's checkpoints; they are states of the old form, so a new form drops them."""
    changed = v_trans is not None and any(
        track.attributes.get("v_trans", 0) != v_trans for track in snapshot.tracks
    )
    return snapshot.opaque.get("appendix", b"") if same_form and not changed else b""


def _buffer_seq_id(
    facts: dict[str, Any], container: str, cells: tuple[CellTable, ...]
) -> int | None:
    """The id in a sequence buffer's prefix, None for no prefix."""
    if container != SEQUENCE_BUFFER or not facts.get("buffer_magic", True):
        return None
    found = next((int(table.seq_ids[0]) for table in cells if len(table.seq_ids)), 0)
    return int(facts.get("seq_id", found))
