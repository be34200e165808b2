"""What several test files share: the samples, and snapshots that are made in memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tscfile.dtypes import DTYPES, DType, opaque_dtype
from tscfile.model import CellTable, ModelIdentity, Snapshot, TensorSpec
from tscfile.sources.hf_layout import text_cells
from tscfile.sources.kv_arrays import HeadsTrack
from tscfile.sources.llama_state import state_size, write_state

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "samples"
SESSION = SAMPLES / "session.kv"
SESSION_BF16 = SAMPLES / "session-bf16.kv"
TURNS = tuple(SAMPLES / "series" / f"turn-{turn}.kv" for turn in range(1, 6))
REGENERATED = SAMPLES / "series" / "turn-4-regenerated.kv"

ALL_DTYPES = (*DTYPES.values(), opaque_dtype(12))
MOST_FRAMES = 4096


@dataclass
class MemoryTrack:
    """A `tscfile.model.Track` of arrays."""

    cells: CellTable
    tensors: Sequence[TensorSpec]
    rows: list[NDArray[np.uint8]]
    attributes: dict[str, Any]
    cache: int = 0
    stream: int = 0

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        chosen = range(len(self.tensors)) if tensors is None else tensors
        return [self.rows[i][start:stop] for i in chosen]


def plain_cells(n_frames: int, seq_id: int = 0) -> CellTable:
    """Cells as a plain conversation has them: position after position, one sequence."""
    ones = np.ones(n_frames, np.int32)
    positions = np.arange(n_frames, dtype=np.int32)
    return CellTable(positions, ones, ones * np.int32(seq_id), np.zeros((n_frames, 0), np.int32))


def gaussian_rows(
    rng: np.random.Generator, dtype: DType, n_frames: int, n_channels: int
) -> NDArray[np.uint8]:
    """Rows like those of a cache: every channel has its own scale and mean."""
    scales = np.exp(rng.normal(0, 1.5, n_channels))
    values = rng.normal(rng.normal(0, 1, n_channels), 1, (n_frames, n_channels)) * scales
    if dtype.name == "bf16":
        bits = values.astype(np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.uint8)
    if dtype.name in ("f16", "f32"):
        return values.astype({"f16": np.float16, "f32": np.float32}[dtype.name]).view(np.uint8)
    if not dtype.is_quantized:
        return values.astype(np.int8).view(np.uint8)
    blocks = rng.integers(0, 256, (n_frames, n_channels // 32, dtype.block_bytes), np.uint8)
    n_halves = 2 if dtype.name.endswith("_1") else 1
    halves = np.abs(values.reshape(n_frames, -1, 32)[:, :, :n_halves]).astype(np.float16)
    blocks[:, :, : 2 * n_halves] = np.ascontiguousarray(halves).view(np.uint8)
    if dtype.name == "q8_0":
        codes = rng.normal(0, 30, (n_frames, n_channels // 32, 32)).clip(-127, 127)
        blocks[:, :, 2:] = codes.astype(np.int8).view(np.uint8)
    return blocks.reshape(n_frames, -1)


@cache
def _conversation(seed: int, n_layers: int, n_channels: int, dtype: str) -> list[NDArray[Any]]:
    """Tokens and the rows of all tensors, more than any save has."""
    rng = np.random.default_rng(seed)
    parts: list[NDArray[Any]] = [rng.integers(3, 30000, MOST_FRAMES).astype(np.int32)]
    for _ in range(2 * n_layers):
        parts.append(gaussian_rows(rng, DTYPES[dtype], MOST_FRAMES, n_channels))
    for part in parts:
        part.flags.writeable = False
    return parts


def make_snapshot(
    n_frames: int,
    *,
    n_layers: int = 2,
    n_channels: int = 32,
    dtype: str = "f16",
    seed: int = 0,
    edited_from: int | None = None,
    container: str = "session",
    v_trans: int = 0,
    opaque: dict[str, bytes] | None = None,
    identity: dict[str, Any] | None = None,
) -> Snapshot:
    """A plain llama.cpp state of random tokens and rows.

    Saves of one ``seed`` are saves of one conversation: a longer one begins with the shorter one.
    ``edited_from``: another conversation from that frame on.
    """

    conversation = _conversation(seed, n_layers, n_channels, dtype)
    tokens, *rows = (part[:n_frames] for part in conversation)
    if edited_from is not None:
        other = _conversation(seed + 1000, n_layers, n_channels, dtype)
        tokens, *rows = (
            np.concatenate([ours[:edited_from], theirs[edited_from:n_frames]])
            for ours, theirs in zip(conversation, other, strict=True)
        )
    specs = [
        TensorSpec(layer, role, DTYPES[dtype], rows[0].shape[1])
        for role in "kv" for layer in range(n_layers)
    ]  # fmt: skip
    source = {
        "format": "llama.cpp", "container": container, "version": 10, "generation": "F",
        "kind": "plain", "parts": "kv", "n_stream": [1], "cell_counts": [n_frames],
        "has_outputs": False, "has_streams": True, "ext_bytes": 0, "has_rotation": False,
        "token_form": "plain", "arch": "llama",
    }  # fmt: skip
    track = MemoryTrack(plain_cells(n_frames), specs, rows, {"v_trans": v_trans})
    facts = ModelIdentity(identity or {})
    return Snapshot(tokens, [track], source, opaque or {}, facts)


def some_cache(dtype: str = "f16", n: int = 20, window: int = 8, seed: int = 0) -> Snapshot:
    """Two full layers of different heads, one sliding, one that shares another's cache."""
    rng = np.random.default_rng(seed)
    kind, bits = DTYPES[dtype], np.uint32 if dtype == "f32" else np.uint16
    top = 0x40000000 if dtype == "f32" else 0x4000

    def track(cache: int, layers: list[int], heads: list[int], held: int, **facts: Any) -> Any:
        arrays = [
            rng.integers(0, top, (heads[i], held, 4 if role == "k" else 6)).astype(bits)
            for role in "kv" for i in range(len(layers))
        ]  # fmt: skip
        specs = [
            TensorSpec(i % len(layers), "k" if i < len(layers) else "v", kind,
                       kind.row_bytes(each.shape[0] * each.shape[2]))
            for i, each in enumerate(arrays)
        ]  # fmt: skip
        attributes = {"layers": layers, "n_kv_heads": heads, **facts}
        cells = text_cells(np.arange(n - held, n))
        return HeadsTrack(cache, 0, cells, specs, attributes, arrays)

    tracks = [
        track(0, [0, 2], [2, 3], n, kind="full"),
        track(1, [3], [2], window - 1, kind="sliding", window=window),
    ]
    facts = {"architecture": "gemma2", "rope_base": 1e4, "rope_pairing": "neox", "n_heads": [4, 6]}
    return Snapshot(
        np.arange(n + 1, dtype=np.int32), tracks, {"format": "transformers", "n_layers": 4},
        identity=ModelIdentity(facts),
    )  # fmt: skip


def state_bytes(snapshot: Snapshot) -> bytes:
    """The snapshot as a llama.cpp state."""
    out = bytearray(state_size(snapshot))
    write_state(snapshot, out)
    return bytes(out)


def write_kv(path: Path, n_frames: int, **options: Any) -> Path:
    """Make the llama.cpp state file ``path``; see `make_snapshot`."""
    path.write_bytes(state_bytes(make_snapshot(n_frames, **options)))
    return path


def write_large_kv(path: Path, n_layers: int, n_frames: int, n_channels: int, v_trans: int) -> int:
    """A session file of any size in little memory and time: f16 noise, repeated; returns its size.

    The repeats are of no use to a codec that looks at one block at a time.
    """
    rng = np.random.default_rng(0)
    tile = gaussian_rows(rng, DTYPES["f16"], 1024, 1024).tobytes()
    row_bytes = 2 * n_channels
    cells = np.zeros((n_frames, 3), "<i4")
    cells[:, 0], cells[:, 1] = np.arange(n_frames), 1
    with path.open("wb") as file:
        file.write(struct.pack("<III", 0x6767736E, 10, n_frames))
        file.write(rng.integers(3, 30000, n_frames).astype("<i4").tobytes())
        file.write(struct.pack("<I5sII", 5, b"llama", 1, n_frames) + cells.tobytes())
        file.write(struct.pack("<II", v_trans, n_layers))
        for role in "kv":
            for layer in range(n_layers):
                if role == "v" and v_trans:
                    file.write(struct.pack("<iII", 1, 2, n_channels))
                else:
                    file.write(struct.pack("<iQ", 1, row_bytes))
                left, at = n_frames * row_bytes, 2 * 997 * layer
                while left:
                    part = tile[at : at + left]
                    file.write(part)
                    left, at = left - len(part), 0
        return file.tell()


def rows_of(snapshot: Snapshot) -> list[bytes]:
    return [
        each.tobytes() for track in snapshot.tracks for each in track.read(0, len(track.cells))
    ]


@contextmanager
def bounded_memory(path: Path, slack: int = 64 << 20) -> Iterator[None]:
    """What happens inside takes no more memory than twice the file and ``slack``."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 2 * path.stat().st_size + slack, f"{peak} bytes were allocated"


def same_state(a: Snapshot, b: Snapshot) -> bool:
    """Tokens, cells, tensors and every byte of every row."""
    if not np.array_equal(a.tokens, b.tokens) or len(a.tracks) != len(b.tracks):
        return False
    return all(_same_track(x, y) for x, y in zip(a.tracks, b.tracks, strict=True)) and (
        (a.source, a.opaque, a.identity) == (b.source, b.opaque, b.identity)
    )


def _same_track(a: Any, b: Any) -> bool:
    if list(a.tensors) != list(b.tensors) or len(a.cells) != len(b.cells):
        return False
    tables = ((getattr(x.cells, name) for name in ("pos", "seq_counts", "seq_ids", "ext"))
              for x in (a, b))  # fmt: skip
    rows = zip(a.read(0, len(a.cells)), b.read(0, len(b.cells)), strict=True)
    return (a.cache, a.stream, a.attributes) == (b.cache, b.stream, b.attributes) and all(
        np.array_equal(x, y) for x, y in [*zip(*tables, strict=True), *rows]
    )


@pytest.fixture(scope="session")
def archive_of_series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All saves of ``samples/series`` in one archive; not to be changed."""
    import tscfile

    path = tmp_path_factory.mktemp("series") / "series.tsc"
    tscfile.pack(TURNS[0], path)
    for save in (*TURNS[1:], REGENERATED):
        tscfile.append(save, path)
    return path
