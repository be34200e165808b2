"""Hypothesis strategies for whatever a `tscfile.model.Snapshot` can say, and how many to try.

What gives an example its shape is drawn by Hypothesis and shrinks; the bytes of rows come from a
seed, because drawing each would take most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from conftest import ALL_DTYPES, MemoryTrack
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tscfile.dtypes import DTYPES, DType
from tscfile.identity import is_fact
from tscfile.model import CellTable, ModelIdentity, Snapshot, TensorSpec
from tscfile.sources.hf_layout import text_cells
from tscfile.sources.kv_arrays import HeadsTrack
from tscfile.sources.llama_state import CONTAINERS

Rows = NDArray[np.uint8]
Draw = Callable[[st.SearchStrategy[Any]], Any]

INT32 = st.integers(-(2**31), 2**31 - 1)
SEEDS = st.integers(0, 2**32 - 1)



FACTS = (
    "architecture", "name", "n_layers", "n_heads", "n_kv_heads", "head_dim_k", "head_dim_v",
    "rope_base", "rope_dim", "rope_scaling", "rope_scaling_factor", "rope_pairing",
    "sliding_window", "vocab_size", "tokenizer_blake3", "weights_blake3",
)  # fmt: skip

settings.register_profile("slow", max_examples=2000, derandomize=False)


def examples(n: int) -> settings:
    """Settings of ``n`` examples that are always the same, or, with ``--hypothesis-profile slow``,
    of twenty times as many new ones."""
    scale = settings().max_examples / 100
    return settings(
        max_examples=int(n * scale), derandomize=scale == 1, deadline=None,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip


# --- facts ------------------------------------------------------------------------------------


def identity_of(facts: dict[str, Any]) -> ModelIdentity:
    """Of some facts those that can be: known ones have types."""
    return ModelIdentity({key: value for key, value in facts.items() if is_fact(key, value)})


def texts(most: int = 12) -> st.SearchStrategy[str]:
    return st.text(max_size=most)


_SCALARS: tuple[st.SearchStrategy[Any], ...] = (
    st.booleans(), st.integers(0, 2**64 - 1), st.integers(-(2**63), -1),
    st.floats(allow_nan=False), texts(),
)  # fmt: skip
_LISTS = tuple(
    st.lists(each, max_size=4) for each in (*_SCALARS, st.integers(-(2**63), 2**63 - 1))
)
VALUES = st.one_of(*_SCALARS, *_LISTS)


def metadata(keys: st.SearchStrategy[str] = texts(8)) -> st.SearchStrategy[dict[str, Any]]:  # noqa: B008
    """Keys with values of every type that metadata has."""
    return st.dictionaries(keys, VALUES, max_size=4)


# --- tracks -----------------------------------------------------------------------------------


def row_bytes_of(dtype: DType, rng: np.random.Generator) -> int:
    """Bytes of a short row."""
    return dtype.block_bytes * int(rng.integers(1, 4 if dtype.is_quantized else 24))


def make_rows(rng: np.random.Generator, style: str, n: int, spec: TensorSpec) -> Rows:
    """Rows of bytes that make no sense, that are all alike, that change slowly, or that are NaN
    and infinite as a floating-point type has it."""
    shape = n, spec.row_bytes
    if style == "constant":
        return np.repeat(rng.integers(0, 256, (1, spec.row_bytes), np.uint8), n, axis=0)
    if style == "smooth":
        slope = rng.integers(0, 3, spec.row_bytes)
        return (np.arange(n)[:, None] * slope + np.arange(spec.row_bytes)).astype(np.uint8)
    rows: Rows = rng.integers(0, 256, shape, np.uint8)
    size = spec.dtype.block_bytes
    if style == "not numbers" and size in (2, 4):
        # The high bytes of f16, bf16 and f32 with all exponent bits set.
        rows[:, size - 1 :: size] |= 0x7F
        rows[:, size - 2 :: size] |= 0xC0
        if n:
            rows[:: 3, : size - 1] = 0
    return rows


STYLES = ("random", "constant", "smooth", "not numbers")


@st.composite
def tensor_lists(draw: Draw, most: int = 5) -> list[TensorSpec]:
    """Tensors of all types, layers in any order."""
    names = st.tuples(st.integers(0, 5) | st.integers(0, 0xFFFF), st.sampled_from("kv"))
    rng = np.random.default_rng(draw(SEEDS))
    return [
        TensorSpec(layer, role, dtype, row_bytes_of(dtype, rng), draw(st.sampled_from([-1, 0, 32])))
        for layer, role in draw(st.lists(names, max_size=most, unique=True))
        for dtype in [draw(st.sampled_from(ALL_DTYPES))]
    ]


@st.composite
def cell_tables(draw: Draw, n: int, tokens: NDArray[np.int32]) -> CellTable:
    """Cells at any positions, of any sequences, with up to three columns more."""
    rng = np.random.default_rng(draw(SEEDS))
    style = draw(st.sampled_from(["plain", "gaps", "repeated", "shuffled", "any"]))
    pos = np.arange(n)
    if style == "gaps":
        pos = np.sort(rng.choice(4 * n + 1, n, replace=False))
    elif style == "repeated":
        pos = np.sort(rng.integers(0, n // 3 + 1, n))
    elif style == "shuffled":
        pos = rng.permutation(n)
    elif style == "any":
        pos = rng.integers(-(2**31), 2**31, n)
    pos = pos.astype(np.int32)
    most = draw(st.integers(0, 4))
    counts = rng.integers(min(most, 1), most + 1, n).astype(np.int32)
    ids = rng.integers(*draw(st.sampled_from([(0, 1), (0, 8), (-(2**31), 2**31)])), counts.sum())
    ext = np.empty((n, draw(st.integers(0, 3))), np.int32)
    for column in ext.T:
        kind = draw(st.sampled_from(["any", "position", "token"]))
        column[:] = rng.integers(-3, 3, n)
        if kind == "position":
            column[:] = pos
        elif kind == "token" and len(tokens):
            inside = (pos >= 0) & (pos < len(tokens))
            column[:] = np.where(inside, tokens[np.where(inside, pos, 0)], -1)
    return CellTable(pos, counts, ids.astype(np.int32), ext)


@st.composite
def tracks(
    draw: Draw, tokens: NDArray[np.int32], frames: st.SearchStrategy[int], place: tuple[int, int]
) -> MemoryTrack:
    n, specs = draw(frames), draw(tensor_lists())
    rng = np.random.default_rng(draw(SEEDS))
    rows = [make_rows(rng, draw(st.sampled_from(STYLES)), n, spec) for spec in specs]
    return MemoryTrack(draw(cell_tables(n, tokens)), specs, rows, draw(metadata()), *place)


def token_lists(most: int = 50) -> st.SearchStrategy[NDArray[np.int32]]:
    """Any token ids, -1 among them."""
    ids = st.integers(-1, 40) | INT32
    return st.lists(ids, max_size=most).map(lambda found: np.array(found, np.int32))


FRAMES = st.integers(0, 40)


@st.composite
def snapshots(draw: Draw, frames: st.SearchStrategy[int] = FRAMES) -> Snapshot:
    """Whatever the model can say."""
    tokens = draw(token_lists())
    place = st.tuples(*[st.integers(0, 2) | st.integers(0, 0xFFFF)] * 2)
    places = draw(st.lists(place, max_size=3, unique=True))
    facts = metadata(st.sampled_from(FACTS) | texts(8))
    opaque = st.dictionaries(texts(8), st.binary(max_size=300), max_size=3)
    return Snapshot(
        tokens, [draw(tracks(tokens, frames, each)) for each in places], draw(metadata()),
        draw(opaque), identity_of(draw(facts)),
    )  # fmt: skip


# --- later saves ------------------------------------------------------------------------------


def taken(cells: CellTable, which: NDArray[np.integer]) -> CellTable:
    """Cells in another order, some perhaps missing."""
    starts = np.cumsum(cells.seq_counts, dtype=np.int64) - cells.seq_counts
    ids = [cells.seq_ids[starts[i] : starts[i] + cells.seq_counts[i]] for i in which]
    return CellTable(
        cells.pos[which], cells.seq_counts[which], np.concatenate([np.zeros(0, np.int32), *ids]),
        cells.ext[which],
    )  # fmt: skip


@st.composite
def later(draw: Draw, snapshot: Snapshot) -> Snapshot:
    """Another save of the conversation: tokens and cells cut off, mixed up, moved, more of them,
    rows that were computed again."""
    rng = np.random.default_rng(draw(SEEDS))
    n = draw(st.integers(min(1, len(snapshot.tokens)), len(snapshot.tokens)))
    tokens = np.concatenate([snapshot.tokens[:n], draw(token_lists(8))])
    made = []
    for track in snapshot.tracks:
        assert isinstance(track, MemoryTrack)
        which = np.arange(len(track.cells))
        edit = draw(st.sampled_from(["same", "cut", "mixed", "moved", "longer"]))
        if edit == "cut":
            which = which[: draw(st.integers(0, len(which)))]
        elif edit == "mixed":
            which = rng.permutation(which)[: draw(st.integers(0, len(which)))]
        elif edit == "longer" and len(which):
            which = np.concatenate([which, rng.integers(0, len(which), 5)])
        cells, rows = taken(track.cells, which), [part[which].copy() for part in track.rows]
        if edit == "moved" and len(which):
            pos = cells.pos.astype(np.int64)
            pos[len(pos) // 2 :] -= draw(st.integers(1, 20))
            cells = replace(cells, pos=pos.clip(-(2**31)).astype(np.int32))
        if edit == "longer":
            for part in rows:
                part[len(track.cells) :] ^= 0x55
        for part in rows:
            if part.size and draw(st.booleans()):
                part[rng.integers(len(part))] ^= 1
        made.append(replace(track, cells=cells, rows=rows))
    opaque = {**snapshot.opaque, **draw(st.dictionaries(texts(2), st.binary(max_size=9)))}
    return replace(
        snapshot, tokens=tokens, tracks=made, opaque=opaque, source=draw(metadata()),
        identity=ModelIdentity(dict(snapshot.identity.facts)),
    )  # fmt: skip


def drops(n: int) -> st.SearchStrategy[Sequence[int]]:
    """Snapshots to leave out of ``n``, not all of them."""
    return st.sets(st.integers(0, n - 1), max_size=n - 1).map(sorted)


# --- the sample model -------------------------------------------------------------------------


@st.composite
def sample_shaped(draw: Draw) -> Snapshot:
    """Of the shapes that the sample book is for, whatever else."""
    snapshot = draw(snapshots())
    rng = np.random.default_rng(draw(SEEDS))
    dtype = DTYPES[draw(st.sampled_from(["f16", "bf16", "f32"]))]
    made = []
    for track in snapshot.tracks[:2]:
        order = rng.permutation(6) if draw(st.booleans()) else np.arange(6)
        specs = [TensorSpec(int(i), role, dtype, dtype.row_bytes(128)) for role in "kv"
                 for i in order]  # fmt: skip
        style = draw(st.sampled_from(STYLES))
        rows = [make_rows(rng, style, len(track.cells), spec) for spec in specs]
        made.append(replace(track, tensors=specs, rows=rows))  # type: ignore[type-var]
    facts = {"architecture": "llama", "name": draw(texts())}
    return replace(snapshot, tracks=made, identity=ModelIdentity(facts))


# --- sources ----------------------------------------------------------------------------------


@st.composite
def llama_states(draw: Draw) -> tuple[Snapshot, dict[str, str]]:
    """What a state of llama.cpp can say, and what is to be told to read it.

    A stream of no cells is not in a state, and a sequence is one stream of cells of one sequence.
    """
    container = draw(st.sampled_from(CONTAINERS))
    version = draw(st.sampled_from([9, 10, 11]))
    alone = container in ("sequence", "sequence-buffer")
    has_ext = draw(st.booleans())
    n_ext = {9: 2, 10: 3, 11: 3}[version] if has_ext else 0
    rng = np.random.default_rng(draw(SEEDS))
    n_caches = draw(st.integers(1, 2))
    n_stream = [1 if alone else draw(st.integers(1, 3)) for _ in range(n_caches)]
    made, counts = [], []
    for cache in range(n_caches):
        v_trans = draw(st.integers(0, 1))
        rotations = [draw(st.sampled_from([0, 64])) if version == 11 else 0 for _ in "kv"]
        specs = draw(_state_tensors(v_trans, version, rotations))
        attributes = {"v_trans": v_trans}
        if version == 11:
            attributes |= {"n_rot_k": rotations[0], "n_rot_v": rotations[1]}
        for stream in range(n_stream[cache]):
            n = draw(st.integers(1 if alone else 0, 30))
            counts.append(n)
            if not n:
                continue
            ids = np.ones(n, np.int32) if alone else rng.integers(1, 4, n).astype(np.int32)
            cells = CellTable(
                rng.integers(0, 2**31, n).astype(np.int32), ids,
                rng.integers(0, 256, ids.sum()).astype(np.int32),
                rng.integers(-(2**31), 2**31, (n, n_ext)).astype(np.int32),
            )  # fmt: skip
            rows = [make_rows(rng, draw(st.sampled_from(STYLES)), n, spec) for spec in specs]
            made.append(MemoryTrack(cells, specs, rows, dict(attributes), cache, stream))
    tokens = np.zeros(0, np.int32)
    if container in ("session", "sequence"):
        tokens = draw(token_lists())
    source = {
        "format": "llama.cpp", "container": container,
        "version": 0 if container.endswith("buffer") else version, "generation": "EFG"[version - 9],
        "kind": ("plain", "two-caches")[n_caches - 1], "parts": ",".join(["kv"] * n_caches),
        "n_stream": n_stream, "cell_counts": counts, "has_outputs": False, "has_streams": True,
        "ext_bytes": 4 * n_ext, "has_rotation": version == 11, "token_form": "plain",
    }  # fmt: skip
    if container == "sequence" and draw(st.booleans()):
        source["token_form"] = "packed"
    told = {"arch": "llama"}
    if container in ("session", "state-buffer"):
        source["arch"] = draw(st.sampled_from(["llama", "a", "qwen2vl", "~" * 64]))
        told = {}
    if container == "sequence-buffer":
        source |= {"buffer_magic": True, "seq_id": draw(INT32)}
    return Snapshot(tokens, made, source), told


@st.composite
def _state_tensors(
    draw: Draw, v_trans: int, version: int, rotations: Sequence[int]
) -> list[TensorSpec]:
    rng = np.random.default_rng(draw(SEEDS))
    plain = st.sampled_from([dtype for dtype in ALL_DTYPES if dtype.name in ("f16", "bf16", "f32")])
    types = {"k": st.sampled_from(ALL_DTYPES), "v": plain if v_trans else st.sampled_from(
        ALL_DTYPES)}  # fmt: skip
    n_layers = draw(st.integers(1, 3))
    found = []
    for role, rotation in zip("kv", rotations, strict=True):
        for layer in range(n_layers):
            dtype = draw(types[role])
            is_plain = dtype.name in ("f16", "bf16", "f32")
            said = rotation if version == 11 or is_plain else -1
            found.append(TensorSpec(layer, role, dtype, row_bytes_of(dtype, rng), said))
    return found


@st.composite
def transformers_caches(draw: Draw) -> Snapshot:
    """What a DynamicCache of transformers can hold, full and sliding layers of one model."""
    dtype = DTYPES[draw(st.sampled_from(["f16", "bf16", "f32"]))]
    rng = np.random.default_rng(draw(SEEDS))
    n_seen, n_layers = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    windows = draw(st.lists(st.sampled_from([None, 0, 2, 8, 99]), min_size=n_layers,
                            max_size=n_layers))  # fmt: skip
    if all(window is None for window in windows):
        windows[0] = 0
    made: list[HeadsTrack] = []
    sizes = st.integers(1, 5)
    for window in sorted({each for each in windows if each is not None}):
        layers = [i for i, each in enumerate(windows) if each == window]
        held = min(window - 1, n_seen) if window else n_seen
        heads = [draw(st.integers(1, 3)) for _ in layers]
        arrays, specs = [], []
        for role in "kv":
            for i, n_heads in enumerate(heads):
                spec = TensorSpec(i, role, dtype, dtype.row_bytes(n_heads * draw(sizes)))
                rows = make_rows(rng, draw(st.sampled_from(STYLES)), held, spec)
                bits = rows.view(f"<u{dtype.block_bytes}").reshape(held, n_heads, -1)
                arrays.append(np.ascontiguousarray(bits.swapaxes(0, 1)))
                specs.append(spec)
        facts: dict[str, Any] = {"kind": "sliding" if window else "full", "layers": layers,
                                 "n_kv_heads": heads}  # fmt: skip
        if window:
            facts["window"] = window
        cells = text_cells(np.arange(n_seen - held, n_seen))
        made.append(HeadsTrack(len(made), 0, cells, specs, facts, arrays))
    tokens = rng.integers(0, 2**31, n_seen + draw(st.integers(0, 2))).astype(np.int32)
    while windows[-1] is None:
        windows.pop()
    simple = _SCALARS[0] | st.integers(-(2**63), 2**63 - 1) | texts() | st.floats(
        allow_nan=False, allow_infinity=False)  # fmt: skip
    facts = draw(st.dictionaries(st.sampled_from(FACTS), simple, max_size=4))
    source = {"format": "transformers", "n_layers": len(windows)}
    return Snapshot(tokens, made, source, identity=identity_of(facts))
