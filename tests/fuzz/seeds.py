"""Small whole files of every kind, from which inputs are mutated."""

from __future__ import annotations

import importlib.util
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from conftest import make_snapshot, some_cache, state_bytes
from tscfile_kernels.exact import TABLE_BITS

import tscfile
from tscfile import exact_coding, pipeline, product_session
from tscfile.books.book import Book
from tscfile.books.product import RATES
from tscfile.container.writer import EncodedChunk
from tscfile.exact_tables import FREQUENCIES, Layout
from tscfile.model import CellTable, Snapshot
from tscfile.sources import write_carrier
from tscfile.sources.llama_state import parse_state

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "spec" / "vectors"
GOLDEN = ROOT / "tests" / "golden" / "llama"
_SMALL = 7000


def make_seeds(target: str) -> list[bytes]:
    return list(_MAKERS[target]())


# --- states -------------------------------------------------------------------------------------

_AGES = {
    "C": {"version": 9, "has_outputs": True},
    "D": {"version": 9, "ext_bytes": 8},
    "F": {"version": 10, "ext_bytes": 12},
    "G": {"version": 11, "has_rotation": True},
}


def _llama() -> Iterator[bytes]:
    containers = ("session", "sequence", "state-buffer", "sequence-buffer")
    for container, v_trans in product(containers, (0, 1)):
        yield state_bytes(_small(container=container, v_trans=v_trans))
    yield state_bytes(_small(dtype="q8_0", n_channels=32))
    for letter, facts in _AGES.items():
        snapshot = _small()
        track = snapshot.tracks[0]
        n_ext = facts.get("ext_bytes", 0) // 4
        ext = np.tile(track.cells.pos[:, None], (1, n_ext)).astype(np.int32)
        track.cells = replace(track.cells, ext=ext)
        if facts.get("has_rotation"):
            track.attributes |= {"n_rot_k": 0, "n_rot_v": 64}
        if facts.get("has_outputs"):
            snapshot.opaque["outputs"] = struct.pack("<IIQ4sQ", 1, 7, 1, bytes(4), 0)
        snapshot.source |= {"generation": letter, **facts}
        yield state_bytes(snapshot)
    cells = np.array([[i, 1, 0] for i in range(3)], "<i4").tobytes()
    layer = struct.pack("<iQ", 1, 16) + bytes(48)
    kv = struct.pack("<II", 1, 3) + cells + struct.pack("<II", 0, 1) + layer * 2
    rec = struct.pack("<Iii", 1, 5, 1) + struct.pack("<i", 0) + struct.pack("<II", 0, 2)
    rec += (struct.pack("<iQ", 0, 8) + bytes(8)) * 4
    for parts in (rec, kv + rec, kv + kv, kv + kv + rec, kv + rec + kv, kv + kv + kv):
        yield b"\5\0\0\0other" + parts
        yield b"\xd8\x3c\x14\xaf\0\0\0\0" + parts
    latent = struct.pack("<II", 1, 1) + cells[:12] + struct.pack("<IIiQ", 0, 1, 0, 1280)
    yield b"nsgg" + struct.pack("<III", 10, 0, 9) + b"deepseek2" + latent + bytes(1280)
    packed = struct.pack("<7i", -1, 1, 2, 5, 6, 0, 0)[:24]
    whole = struct.pack("<II", 3, 6) + packed
    yield b"qsgg" + whole + kv
    media = struct.pack("<8i", -1, 1, 2, 5, -1, 1, 1, 3) + b"abc\0"
    yield b"qsgg" + struct.pack("<II", 3, 9) + media + kv
    appendix = b"SCKP" + struct.pack("<II16s", 1, 1, bytes(16)) + struct.pack("<Q2s", 2, b"ab") * 3
    yield b"qsgg" + whole + kv + appendix
    for path in sorted(GOLDEN.glob("*.kv")):
        if path.stat().st_size < _SMALL:
            yield path.read_bytes()


def _small(**options: Any) -> Snapshot:
    return make_snapshot(3, **{"n_layers": 1, "n_channels": 8, **options})


# --- carriers -----------------------------------------------------------------------------------


def _carried(name: str, *snapshots: Snapshot) -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        for number, snapshot in enumerate(snapshots):
            path = Path(folder) / str(number)
            write_carrier(snapshot, path, name)
            yield path.read_bytes()


def _caches() -> Iterator[Snapshot]:
    for dtype in ("f16", "bf16", "f32"):
        yield some_cache(dtype, n=5, window=3)


def _safetensors() -> Iterator[bytes]:
    yield from _carried("safetensors", *_caches())
    entries = b""
    for name, kind, shape, first, last in (
        ("tokens", "I64", "[1]", 0, 8), ("layers.0.k", "F16", "[1,1,2]", 8, 12),
        ("layers.0.v", "BF16", "[1,1,1,2]", 12, 16),
    ):  # fmt: skip
        entries += b'"%s":{"dtype":"%s","shape":%s,"data_offsets":[%d,%d]},' % (
            name.encode(), kind.encode(), shape.encode(), first, last,
        )  # fmt: skip
    text = b"{" + entries[:-1] + b"}"
    yield struct.pack("<Q", len(text)) + text + bytes(16)


def _npz() -> Iterator[bytes]:
    yield from _carried("npz", *_caches())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        rows = np.ones((1, 2, 4), np.float16)
        arrays = {"layers.0.k": rows, "layers.0.v": rows, "tokens": np.arange(2)}
        np.savez_compressed(path, **arrays)
        yield path.read_bytes()


def _gguf() -> Iterator[bytes]:
    states = [parse_state(data) for data in _llama() if len(data) < 600]
    unusual = [each for each in states if each.source["kind"] != "plain" or each.opaque]
    yield from _carried("gguf", *unusual)
    yield from _carried(
        "gguf", *_caches(), _small(opaque={"appendix": b"checkpoint"}, identity={"n_heads": [2]}),
        _small(dtype="q8_0", n_channels=32), _small(v_trans=1, container="sequence"),
        _small(identity={"tags": ["a", "é"], "name": "é", "rope_base": 0.5, "empty": []}),
    )  # fmt: skip


def _model() -> Iterator[bytes]:
    import gguf

    for architecture in ("llama", "other"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.gguf"
            writer = gguf.GGUFWriter(path, architecture)
            writer.add_name("tiny")
            writer.add_block_count(3)
            writer.add_embedding_length(64)
            writer.add_head_count([4, 4, 2])
            writer.add_head_count_kv(2)
            writer.add_rope_freq_base(5e5)
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(4.0)
            writer.add_sliding_window(128)
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a", "bc", "é"])
            writer.add_tensor("one.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
            writer.add_tensor("two.weight", np.full(5, 2, np.float16))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            yield path.read_bytes()


# --- books and archives -------------------------------------------------------------------------


@cache
def _vectors() -> Any:
    """The module that makes the specification's vectors, with its toy book and session."""
    spec = importlib.util.spec_from_file_location("make", VECTORS / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _full_book() -> Book:
    """The toy book with tables for everything that a book can have tables for."""
    book: Book = _vectors().toy_book()
    book.arrays |= _exact_arrays(book) | _product_arrays(book)
    return book


def _book() -> Iterator[bytes]:
    for path in sorted(VECTORS.glob("valid/*.tscbook")):
        yield path.read_bytes()
    yield _vectors().toy_book().to_bytes()
    yield _full_book().to_bytes()


def _exact_arrays(book: Book) -> dict[str, np.ndarray]:
    """Tables that are whole, if of little use: every weight is 1."""
    n_channels, n_dims = book.n_channels, book.arrays["token_vectors"].shape[1]
    sizes = [8, n_channels, 6]
    n_weights = sum(
        (stop - first) * (1 + dims + stop - low)
        for low, first, stop, dims in Layout(n_channels, sizes[0], n_dims, sizes[1]).groups()
    )
    frequencies = np.ones(FREQUENCIES, np.uint16)
    frequencies[:, 0] = (1 << TABLE_BITS) - FREQUENCIES[1] + 1
    zeros = np.zeros(n_channels, np.int8)
    return {
        "exact_sizes": np.array(sizes, np.int32),
        "exact_weights_low": np.ones(n_weights, np.uint8),
        "exact_weights_high": np.zeros(n_weights, np.int8),
        "exact_weight_bits": zeros + 12, "exact_scale_bits": zeros + 8,
        "exact_unit_bits": zeros, "exact_sigmas": np.full(n_channels, 2048, np.uint16),
        "exact_frequencies": frequencies,
    }  # fmt: skip


def _product_arrays(book: Book) -> dict[str, np.ndarray]:
    n_stages, columns = 2, np.array([[0, 1], [1, 2]], np.uint32)
    assert book.n_coefficients == 3
    centroids = np.arange(n_stages * 256 * 2).astype(np.int8).reshape(n_stages, 256, 2)
    curve = np.linspace(2, 1, len(RATES), dtype=np.float32)
    return {
        "product_columns": columns, "product_centroids": centroids,
        "product_scales": np.full(n_stages, 0.1, np.float32),
        "product_worth": curve, "product_errors": curve,
    }  # fmt: skip


def _tsc() -> Iterator[bytes]:
    for path in sorted(VECTORS.glob("valid/*.tsc")):
        yield path.read_bytes()
    options: dict[str, Any] = {"n_layers": 1, "n_channels": 8}
    with tempfile.TemporaryDirectory() as folder:
        path, book = Path(folder) / "a.tsc", Path(folder) / "a.tscbook"
        for tier in ("lossless", "near"):
            snapshot = make_snapshot(6, opaque={"appendix": b"checkpoint" * 4}, **options)
            tscfile.pack(snapshot, path, tier=tier, force=True)
            yield path.read_bytes()
            tscfile.append(make_snapshot(9, **options), path)
            tscfile.append(make_snapshot(12, edited_from=5, **options), path)
            yield path.read_bytes()
        for snapshot in (_turned(), _with_columns()):
            tscfile.pack(snapshot, path, tier="near", force=True)
            yield path.read_bytes()
        with mock.patch.object(product_session, "_refuse_few", lambda *_: None):
            made = make_snapshot(24, **options)
            tscfile.pack(made, path, product=tscfile.ProductOptions(4), force=True)
            yield path.read_bytes()
        book.write_bytes(_full_book().to_bytes())
        make = _vectors()
        for how in ({"tier": "near"}, {"product": tscfile.ProductOptions(2)}, {"tier": "lossless"}):
            with mock.patch.object(exact_coding.pipeline, "encode_chunk", _long_chunk):
                tscfile.pack(
                    make.made_up(make.TOKENS), path, book=book, embed_book=True, force=True, **how
                )
            yield path.read_bytes()


def _turned() -> Snapshot:
    """Of a model that is known well enough for keys to be turned back."""
    numbers = {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim_k": 8, "head_dim_v": 8}
    rope = {"rope_pairing": "norm", "rope_base": 1e4, "rope_dim": 8, "rope_scaling": "none"}
    return _small(identity={"architecture": "llama", **numbers, **rope})


def _with_columns() -> Snapshot:
    """Cells with columns that are positions, tokens and neither, shared by several sequences."""
    snapshot = _small()
    [track] = snapshot.tracks
    pos = track.cells.pos
    columns = np.stack([pos, snapshot.tokens[pos], 7 * pos], 1)
    track.cells = CellTable(pos, np.array([1, 2, 1], np.int32), np.array([0, 0, 3, 1], np.int32),
                            columns)  # fmt: skip
    return snapshot


_encode_chunk = pipeline.encode_chunk


def _long_chunk(*arguments: Any) -> EncodedChunk:
    """What is coded without a book is made long, so that the codec with one is taken."""
    chunk = _encode_chunk(*arguments)
    return EncodedChunk(chunk.header, chunk.body + bytes(1 << 16))


_MAKERS = {
    "llama": _llama, "safetensors": _safetensors, "npz": _npz, "gguf": _gguf, "model": _model,
    "book": _book, "tsc": _tsc, "salvage": _tsc,
}  # fmt: skip
