"""The specification stands by itself: a decoder written from its pages reads what tscfile writes,
and its examples and tables say what files and code say."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import zstandard
from blake3 import blake3

import tscfile
from tscfile import book_codec, exact_tables, lossy_coding, registry, temporal, tokens
from tscfile.archive import Archive
from tscfile.books import book as books
from tscfile.books import product
from tscfile.books.measure import TARGETS
from tscfile.bytestream import ByteWriter
from tscfile.container import metadata, reader, records
from tscfile.context import FrameContext
from tscfile.dtypes import DTYPES, opaque_dtype
from tscfile.entropy import classed_rans, ints, ladder, refinement, segments, token_ids
from tscfile.identity import ROPE_PAIRING, identity_from_gguf
from tscfile.model import CellTable, Snapshot, TensorSpec
from tscfile.quantizers import uniform
from tscfile.tiers import CUSTOM, TIERS
from tscfile.transforms import fields, prediction

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "spec"
SAMPLES = ROOT / "samples"
SMALLEST = SPEC / "vectors" / "valid" / "smallest"
LOSSY = SPEC / "vectors" / "valid" / "lossy"
_LOSSY_BOOK = LOSSY.with_suffix(".tscbook")
LAYERED = SPEC / "vectors" / "valid" / "layered"
EMBEDDED = SPEC / "vectors" / "valid" / "embedded"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"


def _load_decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decoder", SPEC / "reference_decoder.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decoder = _load_decoder()


def _assert_same(path: Path, book: Path | None = None, tier: str | None = None) -> Any:
    """Every snapshot of the archive, by the decoder of the specification and by tscfile."""
    file = decoder.File(path.read_bytes(), book and book.read_bytes(), tier)
    with Archive(path, book=book) as archive:
        assert len(file.snapshots) == len(archive) > 0
        for number, found in enumerate(file.snapshots):
            record, expected = archive.record(number), archive.snapshot(number, tier)
            for key in ("parent", "plan", "tier", "name", "source", "identity", "coding"):
                assert found[key] == getattr(record, key), key
            assert found["structure"] == archive.structure(number)
            assert found["tokens"].tolist() == expected.tokens.tolist()
            assert found["opaque"] == expected.opaque
            for track, reference in zip(found["tracks"], expected.tracks, strict=True):
                _assert_same_track(track, reference, exact=expected.exact)
                if not expected.exact:
                    _assert_same_integers(file, archive, reference)
                else:
                    assert {run.block for run in reference.runs}.isdisjoint(_lossy_blocks(file))
    return file


def _assert_same_track(track: dict[str, Any], reference: Any, exact: bool) -> None:
    for key in ("cache", "stream", "attributes"):
        assert track[key] == getattr(reference, key)
    assert [(layer, "kv"[role], *rest) for layer, role, *rest in track["tensors"]] == [
        (t.layer, t.role, t.dtype.ggml_id, t.row_bytes, t.rotation) for t in reference.tensors
    ]
    cells = reference.cells
    for key in ("pos", "seq_counts", "seq_ids"):
        assert np.array_equal(track[key], getattr(cells, key))
    assert np.array_equal(np.reshape(track["columns"], (-1, len(cells))), cells.ext.T)
    rows = reference.read(0, len(cells))
    assert len(rows) == len(track["rows"]) > 0
    if not exact:
        types = [tensor.dtype.name for tensor in reference.tensors]
        _assert_near(track["rows"], rows, types)
        return
    for mine, theirs in zip(track["rows"], rows, strict=True):
        assert mine.tobytes() == theirs.tobytes()


def _assert_near(mine: Any, theirs: Any, types: list[str]) -> None:
    """Within the tolerance of book-transform.md: 2^-15 of the frame's largest and one place."""
    a, b = (
        np.concatenate([_values(*pair) for pair in zip(rows, types, strict=True)], axis=1)
        for rows in (mine, theirs)
    )
    largest = np.abs(a).max(axis=1, keepdims=True)
    bits = 8 if types[0] == "bf16" else 11
    place = 2.0 ** (np.frexp(np.maximum(np.abs(a), np.abs(b)))[1] - bits)
    assert (np.abs(a - b) <= largest * 2.0**-15 + place).all()
    # What the page says was measured.
    assert (np.abs(a - b) <= largest * 2.0**-20 + place).all()
    assert (a != b).sum() <= 2 + 0.005 * a.size


def _values(rows: np.ndarray, type_: str) -> np.ndarray:
    rows = np.ascontiguousarray(rows)
    if type_ == "bf16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(float)
    return rows.view({"f16": "<f2", "f32": "<f4"}[type_]).astype(float)


def _assert_same_integers(file: Any, archive: Archive, reference: Any) -> None:
    for run in reference.runs:
        number, (chunk,) = run.block, reference.chunks(run)
        if chunk.codec not in registry.LOSSY:
            continue
        where, payloads = reference.lossy_payloads(number, chunk)
        codec = reference.codec()
        log_steps, integers = file.decoded[number]
        stop = 0
        for segment in codec.read(payloads, where):
            assert segment.start == stop
            stop = segment.stop
            whole = np.zeros((stop - segment.start, codec.book.n_coefficients), np.int32)
            whole[:, codec.book.columns(segment.counts)] = segment.values
            assert np.array_equal(whole, integers[segment.start : stop])
            assert (2.0 ** (log_steps[segment.start : stop] / 256) == segment.step).all()
        assert stop == len(integers) == len(log_steps)


def _lossy_blocks(file: Any) -> set[int]:
    return {number for number, found in file.decoded.items() if isinstance(found, tuple)}


# --- the decoder against tscfile --------------------------------------------------------------


@pytest.mark.parametrize("name", ["session.kv", "session-bf16.kv"])
def test_decoder_reads_packed_sessions(name: str, tmp_path: Path) -> None:
    path = tmp_path / "session.tsc"
    tscfile.pack(SAMPLES / name, path)
    _assert_same(path)


def test_decoder_reads_a_series(tmp_path: Path) -> None:
    path = tmp_path / "series.tsc"
    first, *later = sorted((SAMPLES / "series").glob("*.kv"))
    tscfile.pack(first, path)
    for source in later:
        tscfile.append(source, path)
    _assert_same(path)


def test_decoder_reads_a_torn_series(tmp_path: Path) -> None:
    path = tmp_path / "torn.tsc"
    first, second, *_ = sorted((SAMPLES / "series").glob("*.kv"))
    size = tscfile.pack(first, path).file_bytes
    tscfile.append(second, path)
    path.write_bytes(path.read_bytes()[:-1])
    _assert_same(path)
    assert decoder.File(path.read_bytes()).end == size


@pytest.mark.parametrize(
    ("name", "tier"),
    [("session.kv", "near"), ("session.kv", "balanced"), ("session-bf16.kv", "compact")],
)
def test_decoder_reads_book_tiers(name: str, tier: str, tmp_path: Path) -> None:
    path = tmp_path / "session.tsc"
    identity = identity_from_gguf(MODEL)
    tscfile.pack(SAMPLES / name, path, book=BOOK, tier=tier, identity=identity)
    file = _assert_same(path, BOOK)
    (snapshot,) = file.snapshots
    assert list(file.books) == [snapshot["coding"]["book"]] == [file.book(snapshot).id]
    assert (snapshot["coding"]["log_step"],) == file.book(snapshot).tiers[tier][:1]
    # As the page says of the first writer, at positions 0 and last.
    steps = np.concatenate([log_steps for log_steps, _ in file.decoded.values()])
    assert (steps[[0, -1, 100]] - snapshot["coding"]["log_step"]).tolist() == [-384, -768, 0]


def test_decoder_reads_tier_custom(tmp_path: Path) -> None:
    path = tmp_path / "custom.tsc"
    identity = identity_from_gguf(MODEL, weights=False)
    tscfile.pack(SAMPLES / "session.kv", path, book=BOOK, target_ratio=100, identity=identity)
    assert _assert_same(path, BOOK).snapshots[0]["tier"] == "custom"


def test_decoder_reads_a_series_of_a_book_tier(tmp_path: Path) -> None:
    """Frames that later snapshots share, with the tokens of each."""
    path = tmp_path / "series.tsc"
    first, *later = sorted((SAMPLES / "series").glob("*.kv"))[:3]
    tscfile.pack(first, path, book=BOOK, identity=identity_from_gguf(MODEL, weights=False))
    for source in later:
        tscfile.append(source, path, book=BOOK)
    file = _assert_same(path, BOOK)
    assert len(file.snapshots) == 3 and file.snapshots[2]["parent"] is not None


def test_decoder_reads_what_hangs_from_book_coded_tokens(tmp_path: Path) -> None:
    """A lossless save that keeps tokens of a book tier; the book is inside."""
    path = tmp_path / "both.tsc"
    first, second, *_ = sorted((SAMPLES / "series").glob("*.kv"))
    identity = identity_from_gguf(MODEL, weights=False)
    tscfile.pack(first, path, book=BOOK, embed_book=True, identity=identity)
    tscfile.append(second, path, tier="lossless")
    file = _assert_same(path)
    payloads = [file.payload(ref, decoder.SNAPSHOT)[0] for ref in _snapshot_refs(file)]
    assert [_token_coding(payload) for payload in payloads] == [4, 3]


def _snapshot_refs(file: Any) -> list[tuple[int, int]]:
    refs: list[tuple[int, int]] = file._read_chain(file._find_trailer()[0])[1]
    return refs


def _token_coding(payload: bytes) -> int:
    cursor = decoder.Cursor(payload)
    for _ in range(4):
        cursor.uvarint()
    return int(cursor.u8())


@pytest.mark.parametrize("pos", [[-2], [-300, -1, 0, 5], [2**31 - 1, 19, 3], [40, 20, -(2**31)]])
def test_predictions_at_any_position(pos: list[int]) -> None:
    """Before the first token, behind the last, and of tokens without a vector."""
    data = LOSSY.with_suffix(".tscbook").read_bytes()
    tokens = np.array([2, 0, 1, -1, 7, 1, *[0, 1, 2] * 5], np.int32)
    positions = np.array(pos, np.int32)
    mine = decoder.Book(data).predict(tokens, positions)
    theirs = books.open_bytes(data, "book").book.network(FrameContext(positions, tokens))
    assert mine.shape == theirs.shape == (len(pos), 2)
    assert np.allclose(mine, theirs, rtol=0, atol=1e-6)
    none = decoder.Book(data).predict(tokens[:0], positions)
    assert np.allclose(none, books.open_bytes(data, "book").book.network(
        FrameContext(positions, tokens[:0])), rtol=0, atol=1e-6)  # fmt: skip


def test_decoder_asks_for_the_right_book(tmp_path: Path) -> None:
    data = LOSSY.with_suffix(".tsc").read_bytes()
    for other in (None, BOOK.read_bytes()):
        with pytest.raises(decoder.Damaged, match="is needed"):
            decoder.File(data, other)
    broken = bytearray(LOSSY.with_suffix(".tscbook").read_bytes())
    broken[200] ^= 1
    with pytest.raises(decoder.Damaged, match="hash"):
        decoder.File(data, bytes(broken))


class _MemoryTrack:
    """A track with made-up rows, for element types and cells that the samples lack."""

    cache, stream = 1, 2

    def __init__(self, dtype: Any, n_cells: int, n_channels: int) -> None:
        rng = np.random.default_rng(n_cells)
        row_bytes = dtype.row_bytes(n_channels)
        # Few different bytes, so that there is something to code.
        shape = (2, n_cells, row_bytes)
        self.rows = (rng.normal(0, 3, shape).astype(np.int8).view(np.uint8)) & np.uint8(0x9F)
        self.tensors = [TensorSpec(4, role, dtype, row_bytes, -1) for role in "kv"]
        pos = rng.permutation(n_cells).astype(np.int32)
        counts = rng.integers(0, 3, n_cells).astype(np.int32)
        ids = rng.integers(0, 4, int(counts.sum())).astype(np.int32)
        ext = np.stack([pos, rng.integers(-5, 5, n_cells), np.append(7, pos)[pos]], axis=1)
        self.cells = CellTable(pos, counts, ids, ext.astype(np.int32))
        self.attributes = {"flag": True, "list": [1, -2], "names": ["a", "ß"], "ratio": 0.5}

    def read(self, start: int, stop: int, tensors: Any = None) -> list[np.ndarray]:
        return [self.rows[i, start:stop] for i in (range(2) if tensors is None else tensors)]


@pytest.mark.parametrize("dtype", [*DTYPES.values(), opaque_dtype(63)], ids=lambda d: d.name)
@pytest.mark.parametrize("n_cells", [3, 300])
def test_decoder_reads_every_element_type(dtype: Any, n_cells: int, tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 50000, n_cells).astype(np.int32)
    track = _MemoryTrack(dtype, n_cells, 96)
    source = {"format": "example", "empty": [], "negative": -3}
    path = tmp_path / "types.tsc"
    tscfile.pack(Snapshot(tokens, [track], source, {"part": bytes(1000)}), path)
    _assert_same(path)


def test_decoder_notices_damage(tmp_path: Path) -> None:
    data = SMALLEST.with_suffix(".tsc").read_bytes()
    for at in (3, 30, 60, 90, 115, 150):
        broken = bytearray(data)
        broken[at] ^= 1
        if data[at]:
            with pytest.raises(decoder.Damaged):
                decoder.File(bytes(broken))


# --- llama.cpp states, made again as spec/sources/llama-state.md says ---------------------------


def _state_of(snapshot: dict[str, Any]) -> bytes:
    """Section 4 of the page, step by step."""
    facts, opaque, tokens = snapshot["source"], snapshot["opaque"], snapshot["tokens"]
    tracks = {(track["cache"], track["stream"]): track for track in snapshot["tracks"]}
    state = _state_prefix(facts, opaque, tokens.astype("<i4").tobytes(), len(tokens))
    state += opaque.get("outputs", b"")
    cache = 0
    for part in filter(None, facts["parts"].split(",")):
        if part == "rec":
            state += opaque["recurrent"]
            continue
        n_stream = facts["n_stream"][cache]
        state += struct.pack("<I", n_stream) if facts["has_streams"] else b""
        for stream in range(n_stream):
            track = tracks.get((cache, stream))
            state += _state_stream(facts, track) if track else bytes(4)
        cache += 1
    return state + opaque.get("appendix", b"")


def _state_prefix(facts: dict[str, Any], opaque: dict[str, bytes], tokens: bytes, n: int) -> bytes:
    container = facts["container"]
    if facts["token_form"] == "packed":
        tokens = struct.pack("<iII", -1, 1, n) + tokens + bytes(4)
    elif facts["token_form"] == "verbatim":
        tokens = opaque["token_field"]
    if container == "sequence-buffer":
        magic = struct.pack("<Ii", 0xAF143CD8, facts["seq_id"])
        return magic if facts["buffer_magic"] else b""
    prefix = b""
    if container != "state-buffer":
        magic, less = {"session": (0x6767736E, 0), "sequence": (0x67677371, 7)}[container]
        prefix = struct.pack("<III", magic, facts["version"] - less, len(tokens) // 4) + tokens
    if container != "sequence":
        prefix += struct.pack("<I", len(facts["arch"])) + facts["arch"].encode()
    return prefix


def _state_stream(facts: dict[str, Any], track: dict[str, Any]) -> bytes:
    n, attributes = len(track["pos"]), track["attributes"]
    state, first = struct.pack("<I", n), 0
    for i, (pos, count) in enumerate(zip(track["pos"], track["seq_counts"], strict=True)):
        words = [pos, count, *(column[i] for column in track["columns"])]
        words += track["seq_ids"][first : first + count].tolist()
        state += struct.pack(f"<{len(words)}i", *words)
        first += count
    n_layers = sum(role == 0 for _, role, *_ in track["tensors"])
    state += struct.pack("<II", attributes["v_trans"], n_layers)
    if facts["has_rotation"]:
        state += struct.pack("<II", attributes["n_rot_k"], attributes["n_rot_v"])
    for (_, role, type_, row_bytes, _), rows in zip(track["tensors"], track["rows"], strict=True):
        if role == 1 and attributes["v_trans"]:
            width = {0: 4, 1: 2, 30: 2}[type_]
            state += struct.pack("<iII", type_, width, row_bytes // width)
            state += rows.view(f"<u{width}").T.tobytes()
        else:
            state += struct.pack("<iQ", type_, row_bytes) + rows.tobytes()
    return state


def _llama_states() -> list[Path]:
    golden = sorted((ROOT / "tests" / "golden" / "llama").glob("*.kv"))
    return [*golden, SAMPLES / "session.kv", SAMPLES / "session-bf16.kv"]


@pytest.mark.parametrize("path", _llama_states(), ids=lambda path: path.name)
def test_llama_state_from_its_page(path: Path, tmp_path: Path) -> None:
    from tscfile.sources.llama_state import open_state

    facts = path.with_suffix(".json")
    container = json.loads(facts.read_text())["container"] if facts.exists() else None
    archive = tmp_path / "state.tsc"
    tscfile.pack(open_state(path, container=container), archive)
    (snapshot,) = decoder.File(archive.read_bytes()).snapshots
    assert _state_of(snapshot) == path.read_bytes()


# --- examples ---------------------------------------------------------------------------------


def test_smallest_vector() -> None:
    path = SMALLEST.with_suffix(".tsc")
    expected = json.loads(SMALLEST.with_suffix(".json").read_text(encoding="utf-8"))
    _assert_same(path)
    file = decoder.File(path.read_bytes())
    assert len(path.read_bytes()) == expected["file_bytes"]
    for found, wanted in zip(file.snapshots, expected["snapshots"], strict=True):
        for key in ("parent", "plan", "tier", "name", "source", "identity", "coding"):
            assert found[key] == wanted[key], key
        assert found["tokens"].tolist() == wanted["tokens"]
        assert {name: part.hex() for name, part in found["opaque"].items()} == wanted["opaque"]
        (track,), (wanted_track,) = found["tracks"], wanted["tracks"]
        for key, name in (("pos", "positions"), ("seq_ids", "sequence_ids")):
            assert track[key].tolist() == wanted_track[name]
        for rows, tensor in zip(track["rows"], wanted_track["tensors"], strict=True):
            assert [row.tobytes().hex() for row in rows] == tensor["rows"]


@pytest.mark.parametrize("path", [LOSSY, EMBEDDED], ids=["lossy", "embedded"])
def test_vectors_of_book_tiers(path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    file = _assert_same(path.with_suffix(".tsc"), None if path == EMBEDDED else _LOSSY_BOOK)
    assert len(file.data) == expected["file_bytes"]
    assert list(file.books) == [expected["book"]]
    assert file.books[expected["book"]] == _LOSSY_BOOK.read_bytes()
    for number, wanted in zip(sorted(_lossy_blocks(file)), expected["blocks"], strict=True):
        assert [part.tolist() for part in file.decoded[number]] == list(wanted.values())
    for found, wanted in zip(file.snapshots, expected["snapshots"], strict=True):
        for key in ("parent", "plan", "tier", "name", "source", "identity", "coding"):
            assert found[key] == wanted[key], key
        assert found["tokens"].tolist() == wanted["tokens"]
        (track,), (wanted_track,) = found["tracks"], wanted["tracks"]
        assert track["pos"].tolist() == wanted_track["positions"]
        rows = [
            np.frombuffer(bytes.fromhex("".join(tensor["rows"])), np.uint8).reshape(-1, 8)
            for tensor in wanted_track["tensors"]
        ]
        _assert_near(track["rows"], rows, ["f16"] * 4)


def test_layered_vector() -> None:
    expected = json.loads(LAYERED.with_suffix(".json").read_text(encoding="utf-8"))
    path, book = LAYERED.with_suffix(".tsc"), LAYERED.with_suffix(".tscbook")
    for tier, blocks in expected["layers"].items():
        file = _assert_same(path, book, tier)
        for number, wanted in zip(sorted(_lossy_blocks(file)), blocks, strict=True):
            assert [part.tolist() for part in file.decoded[number]] == list(wanted.values())
    (snapshot,), (wanted,) = _assert_same(path, book).snapshots, expected["snapshots"]
    assert snapshot["coding"] == wanted["coding"]
    assert snapshot["coding"]["layers"] == [*expected["layers"], "lossless"]
    rows = [[row.tobytes().hex() for row in part] for part in snapshot["tracks"][0]["rows"]]
    assert rows == [tensor["rows"] for tensor in wanted["tracks"][0]["tensors"]]


@pytest.mark.parametrize("tier", ["archive", "balanced", "near"])
def test_decoder_reads_quality_layers(tier: str, tmp_path: Path) -> None:
    path = tmp_path / "layers.tsc"
    identity = identity_from_gguf(MODEL, weights=False)
    layers = ["archive", "balanced", "near", "lossless"]
    tscfile.pack(SAMPLES / "session.kv", path, book=BOOK, tier=layers, identity=identity)
    _assert_same(path, BOOK, tier)


def test_embedded_vector_has_all_that_the_readme_says() -> None:
    file = decoder.File(EMBEDDED.with_suffix(".tsc").read_bytes())
    payloads = [file.payload(ref, decoder.SNAPSHOT)[0] for ref in _snapshot_refs(file)]
    assert [_token_coding(payload) for payload in payloads] == [0, 4, 3]
    assert [snapshot["tier"] for snapshot in file.snapshots] == ["near", "near", "lossless"]
    assert [snapshot["parent"] for snapshot in file.snapshots] == [None, 0, 1]


def test_vectors_can_be_made_again(tmp_path: Path) -> None:
    """By the script beside them, down to the byte with the zstd that they were made with."""
    spec = importlib.util.spec_from_file_location("make", SPEC / "vectors" / "make.py")
    assert spec and spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.make_all(tmp_path)
    names = {path.name for path in (SPEC / "vectors" / "valid").iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    for name in names:
        made, kept = (folder / name for folder in (tmp_path, SPEC / "vectors" / "valid"))
        if not name.endswith(".json") and zstandard.ZSTD_VERSION == (1, 5, 7):
            assert made.read_bytes() == kept.read_bytes(), name


def test_worked_example_is_the_vector() -> None:
    """The tables show every byte of the file once, in order."""
    text = (SPEC / "worked-example.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ((?:[0-9a-f]{2} ?)+) \|", text, re.M)
    shown = bytearray()
    for offset, hexed in rows:
        assert int(offset) == len(shown)
        shown += bytes.fromhex(hexed)
    assert bytes(shown) == SMALLEST.with_suffix(".tsc").read_bytes()


def test_structures_of_worked_example() -> None:
    """The tables behind the snapshots show every byte of the structures once, in order."""
    text = (SPEC / "worked-example.md").read_text(encoding="utf-8")
    file = decoder.File(SMALLEST.with_suffix(".tsc").read_bytes())
    parts = re.split(r"^The structure, (\d+) bytes:$", text, flags=re.M)[1:]
    for size, part, snapshot in zip(parts[::2], parts[1::2], file.snapshots, strict=True):
        shown = bytearray()
        for offset, hexed in re.findall(r"^\| \+(\d+) \| ((?:[0-9a-f]{2} ?)+) \|", part, re.M):
            assert int(offset) == len(shown)
            shown += bytes.fromhex(hexed)
        assert bytes(shown) == snapshot["structure"] and len(shown) == int(size)


def test_checksums_of_worked_example() -> None:
    text = (SPEC / "worked-example.md").read_text(encoding="utf-8")
    data = SMALLEST.with_suffix(".tsc").read_bytes()
    said = re.findall(r"XXH3-64 of bytes (\d+) to (\d+)(.*?): `([0-9a-f]+)` \|", text)
    assert len(said) == 1 + 9 * 2 + 3
    for first, last, more, value in said:
        hashed = data[int(first) : int(last) + 1]
        if also := re.fullmatch(r" and (\d+) to (\d+)", more):
            hashed += data[int(also[1]) : int(also[2]) + 1]
        elif number := re.search(r"\((\d+) as u64\)", more):
            hashed += int(number[1]).to_bytes(8, "little")
        assert f"{decoder.checksum(hashed):016x}".endswith(value)


def _page(name: str) -> str:
    text = (SPEC / name).read_text(encoding="utf-8")
    return text[text.index("Example\n") :].replace("−", "-")


def _lossy_body() -> bytes:
    """The only chunk's body in the vector."""
    data = LOSSY.with_suffix(".tsc").read_bytes()
    file = decoder.File(data, _LOSSY_BOOK.read_bytes())
    cursor = decoder.Cursor(file.payload(file.blocks[0]["chunks"][0]["ref"], decoder.CHUNK)[0])
    cursor.take(5)
    decoder.row_lengths(cursor)
    return cursor.take(len(cursor.data) - cursor.at)


def test_segments_example() -> None:
    example = _page("codecs/segments.md")
    shown = re.findall(r"^\| `([0-9a-f ]+)` \|", example, re.M)
    assert bytes.fromhex("".join(shown)) == _lossy_body()
    found = re.findall(r"^\| \d \| (-?\d+) \| ([-\d ]+) \|$", example, re.M)
    book = decoder.Book(_LOSSY_BOOK.read_bytes())
    decoded = decoder.decode_segments(decoder.Cursor(_lossy_body()), 6, book)
    steps = [step for step, values in decoded for _ in values]
    assert [int(step) for step, _ in found] == steps
    rows = [row for _, values in decoded for row in values.tolist()]
    assert [[int(v) for v in row.split()] for _, row in found] == rows
    traced = re.findall(r"^\| \d \| (\d+) \| \d+ \| (\d+):? ?\S* ?\S* \| (\d+) \| (\d+) \|",
                        example, re.M)  # fmt: skip
    for k, symbol, f, first in [[int(v) for v in row] for row in traced]:
        row = book.arrays["frequencies"][k].tolist()
        assert (row[symbol], sum(row[:symbol])) == (f, first)
    assert len(traced) == 6


def test_refinement_example() -> None:
    example = _page("codecs/book-refinement.md").replace("\N{MINUS SIGN}", "-")
    file = decoder.File(
        LAYERED.with_suffix(".tsc").read_bytes(), LAYERED.with_suffix(".tscbook").read_bytes()
    )
    payloads = [file.payload(c["ref"], decoder.CHUNK)[0] for c in file.blocks[0]["chunks"][:2]]
    cursors = [decoder.Cursor(payload) for payload in payloads]
    for cursor in cursors:
        cursor.take(5)
        decoder.row_lengths(cursor)
    body = payloads[1][cursors[1].at :]
    shown = re.findall(r"^\| `([0-9a-f ]+)` \|", example, re.M)
    assert bytes.fromhex("".join(shown)) == body
    book = file.book(file.snapshots[0])
    below = decoder.decode_segments(cursors[0], 6, book)
    (step, values), *_ = decoder.decode_refinement(decoder.Cursor(body), below, book)
    rows = re.findall(r"^\| (\d)((?: \| -?\d+){12}) \|$", example, re.M)
    assert len(rows) == len(values) == 4
    sigmas = book.arrays["log_sigmas"].astype(np.int64)
    for frame, row in rows:
        numbers = np.reshape([int(n) for n in row.split("|")[1:]], (2, 6))
        for r, (q, centre, width, k, difference, integer) in zip((0, 2), numbers, strict=True):
            assert q == below[0][1][int(frame), r]
            assert integer == values[int(frame), r] == centre + difference
            found = refinement.expect(
                np.array([[q]], np.int32), np.array([True]), sigmas[[r]], below[0][0], step
            )
            assert [centre, k] == [int(each[0, 0]) for each in found]
            within = refinement.WITHIN_STEP if q else refinement.WITHIN_ZERO
            assert width == min(sigmas[r], below[0][0] + within)
    assert "185364" in example and refinement._ratio(384) == 185364


def test_book_transform_example() -> None:
    example = _page("codecs/book-transform.md")
    expected = json.loads(LOSSY.with_suffix(".json").read_text(encoding="utf-8"))
    for tensor in expected["snapshots"][0]["tracks"][0]["tensors"]:
        row = tensor["rows"][3]
        row = " ".join(f"`{row[i : i + 4]}`" for i in range(0, 16, 4))
        name = {"k": "keys", "v": "values"}[tensor["role"]]
        assert f"| {name} of layer {tensor['layer']} | {row} |" in example
    book = decoder.Book(_LOSSY_BOOK.read_bytes())
    tokens, pos = np.array(expected["snapshots"][0]["tokens"]), np.array([3])
    (features,), (z,) = book.features(tokens, pos), book.predict(tokens, pos)
    shown = re.findall(r"^\| (?:history|mean|position).*? \| (-?[\d.]+) \| ", example, re.M)
    assert [float(v) for v in shown] == features.tolist()
    hidden = np.maximum(features @ book.first[0] + book.arrays["hidden_bias"], 0)
    shown = re.findall(r"^\| (?:hidden \d|`z\[\d\]`) \| (-?[\d.]+) \| ", example, re.M)
    assert [float(v) for v in shown] == [*hidden.tolist(), *z.tolist()]
    rows = dict(re.findall(r"^\| `([yx])` \| (.*) \|$", example, re.M))
    for name, integers in (("y", [0, 0, 0]), ("x", [5, 0, -2])):
        (values,) = book.channels(z[None], np.array([integers]) * 0.5)
        assert [float(v) for v in rows[name].replace("|", "").split()] == values.tolist()


def test_book_example() -> None:
    """The table shows the bytes of the file in order; one long field is cut."""
    data = _LOSSY_BOOK.read_bytes()
    at = 0
    for offset, first, last in re.findall(
        r"^\| (\d+) \| ([0-9a-f ]+)(?: … ([0-9a-f ]+))? \|", _page("book.md"), re.M
    ):
        assert int(offset) == at
        start, stop = bytes.fromhex(first), bytes.fromhex(last)
        if last:
            at = data.index(stop, at)
        assert data[int(offset) :].startswith(start)
        at += len(stop or start)
    assert at == len(data)
    assert f"{len(data)} bytes" in _page("book.md")


def test_classed_rans_example() -> None:
    text = (SPEC / "codecs" / "classed-rans.md").read_text(encoding="utf-8")
    block = re.search(r"```hex\n(.*?)```", text, re.S)
    assert block
    stream = bytes.fromhex(block[1])
    wanted = [[int(v) for v in run.split()] for run in re.findall(r"is\s+`(10 [\d\s]+)`", text)]
    assert len(wanted) == 2 and len(stream) == 291
    assert decoder.decode_stream(stream, 4, 17, 2).T.tolist() == wanted
    ours = classed_rans.decode(memoryview(stream), 4, 17, 2, np.dtype("u1"), "example")
    assert ours.T.tolist() == wanted


def test_ints_example() -> None:
    text = (SPEC / "codecs" / "ints.md").read_text(encoding="utf-8")
    example = re.search(r"`([\d ]+)`: runs .*?: `([0-9a-f ]+)`", text)
    assert example
    wanted = [int(v) for v in example[1].split()]
    assert decoder.Cursor(bytes.fromhex(example[2])).ints(len(wanted)).tolist() == wanted


def test_fields_example() -> None:
    text = (SPEC / "codecs" / "fields.md").read_text(encoding="utf-8")
    example = text[text.index("## Example") :]
    scale, codes = re.findall(r"`([0-9a-f ]+)`", example)[:2]
    row = np.frombuffer(bytes.fromhex(scale + codes), np.uint8).reshape(1, 18)
    parts = fields.split(row, DTYPES["q4_0"])
    assert hex(parts[0][0, 0]) in example
    wanted = re.findall(r"codes \d+ to \d+ are\s+([\d ]+)", example)
    assert parts[1][0].tolist() == [int(v) for run in wanted for v in run.split()]


def test_llama_state_example() -> None:
    from tscfile.sources.llama_state import parse_state, state_size, write_state

    text = (SPEC / "sources" / "llama-state.md").read_text(encoding="utf-8")
    example = text[text.index("## 5. Example") :]
    cells = re.findall(r"^\| (`.*?) \|", example, re.M)
    data = bytes.fromhex("".join(part for cell in cells for part in re.findall("`(.*?)`", cell)))
    assert f"{len(data)} bytes" in example
    snapshot = parse_state(data)
    for key in snapshot.source:
        assert f"`{key}`" in example
    out = bytearray(state_size(snapshot))
    write_state(snapshot, out)
    assert bytes(out) == data


# --- tables -----------------------------------------------------------------------------------


def _table(heading: str) -> list[list[str]]:
    """Rows of the table under a heading of the registry, without its head."""
    text = (SPEC / "registry.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, heading
    lines = [line for line in section[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _names(heading: str) -> dict[int, str]:
    return {int(row[0]): row[1] for row in _table(heading)}


def test_registry_ids() -> None:
    assert _names("Record types") == records.RECORD_NAMES
    assert _names("Codecs") == registry.CODEC_NAMES
    assert tuple(_names("Roles").values()) == records._ROLES
    assert records.KNOWN_FEATURES == 0
    assert {row[1] for row in _table("Feature bits")} == {"–"}
    assert records.CRITICAL == 1
    planes = {"raw": classed_rans._PLANE_RAW, "zstd": classed_rans._PLANE_ZSTD}
    assert _names("Plane codings") == {number: name for name, number in planes.items()}
    codings = {"runs": ints._RUNS, "values": ints._VALUES, "differences": ints._DIFFERENCES}
    assert _names("Integer codings") == {number: name for name, number in codings.items()}
    numbers = [row[0] for row in _table("Token codings")]
    assert numbers == [f"0 to {max(codings.values())}", str(tokens.ADAPTIVE), str(tokens.OF_BOOK)]
    columns = {
        records._EXT_CODED: "coded", records._EXT_POSITION: "position", records._EXT_TOKEN: "token"
    }  # fmt: skip
    assert _names("Cell columns") == columns


def test_registry_element_types() -> None:
    rows = {row[1]: tuple(int(cell) for cell in (row[0], row[2], row[3])) for row in
            _table("Element types")}  # fmt: skip
    assert rows == {
        dtype.name: (dtype.ggml_id, dtype.block_elements, dtype.block_bytes)
        for dtype in DTYPES.values()
    }


def test_registry_fields() -> None:
    said = dict(_table("Fields of element types"))
    for dtype in [*DTYPES.values(), opaque_dtype(63)]:
        known = ", ".join(f"{field.name} {field.bits}" for field in fields.fields_of(dtype))
        assert said[dtype.name if dtype.name in DTYPES else "any other"] == known


def test_registry_metadata_types() -> None:
    rows = {int(row[0]): row[2] for row in _table("Metadata value types")}
    widths = {type_: str(struct.calcsize(code)) for type_, code in metadata._LAYOUTS.items()}
    assert rows == widths | {metadata._BOOL: "1", metadata._STRING: "–", metadata._ARRAY: "–"}


def test_registry_tiers_and_plans() -> None:
    assert {row[0]: (row[1] == "yes", row[2]) for row in _table("Tiers")} == {
        tier.name: (tier.exact, "–" if tier.codec is None else str(tier.codec))
        for tier in (*TIERS.values(), CUSTOM)
    }
    promised = {row[0]: float(row[3]) for row in _table("Tiers") if row[3] != "–"}
    assert promised == {"lossless": 0} | TARGETS
    assert [row[0] for row in _table("Plans")] == [
        temporal.KEYFRAME, temporal.APPEND, temporal.TRUNCATE_APPEND
    ]  # fmt: skip


def test_registry_books() -> None:
    assert {row[0] for row in _table("Book arrays")} == set(books._DTYPES)
    said = {name: pairing for pairing, names in _table("Rotary pairing")
            for name in names.split(", ")}  # fmt: skip
    assert said == ROPE_PAIRING


def test_constants_of_book_tiers() -> None:
    text = (SPEC / "codecs" / "segments.md").read_text(encoding="utf-8")
    assert f"log_step + {-ladder.LOWEST}`" in text
    width = ladder.UNITS_PER_OCTAVE // ladder.CLASSES_PER_OCTAVE
    assert f"`min(u div {width}, {ladder.N_CLASSES - 1})`" in text
    assert f"divides the bytes that took by {segments._BYTES_PER_LANE}" in text
    assert f"| {ladder.ESCAPE} | *escape*" in text and f"to {ladder.LARGEST} |" in text
    text = (SPEC / "codecs" / "book-transform.md").read_text(encoding="utf-8")
    finer = re.findall(r"^ +\| (\d*) ?\| (\d*) ?\| \| (\d+) \| (\d+) \|$", text, re.M)
    assert tuple((int(a), int(b)) for a, b, *_ in finer if a) == book_codec.FINER_FIRST
    assert tuple((int(a), int(b)) for *_, a, b in finer) == book_codec.FINER_LAST
    assert f"error² + {uniform.LAMBDA} · bits" in text
    assert f"below 2^{round(np.log2(prediction._FORGOTTEN))}\n".replace("-", "−") in text
    assert prediction.N_POSITION == 2 and "| position | 2 |" in text
    text = (SPEC / "tsc.md").read_text(encoding="utf-8")
    assert book_codec.MAX_DELTA == 2 and "within two steps" in text


def test_books_are_as_their_page_says() -> None:
    text = (SPEC / "book.md").read_text(encoding="utf-8")
    assert f"`{books.MAGIC.hex(' ')}`" in text and f"| uvarint | {books.VERSION}. " in text
    arrays = re.findall(r"^\| `(\w+)` \| (\w\d) \| ([\w, ]+) \|", text, re.M)
    names = {"2L": "N", "m": "r", "40": "K", "32": "S"}
    axes = {
        name: (type_, "".join(names.get(axis, axis) for axis in dimensions.split(", ")))
        for name, type_, dimensions in arrays
    }
    exact = {name: axes.pop(name)[0] for name in list(axes) if name.startswith(exact_tables.PREFIX)}
    assert exact == {exact_tables.PREFIX + name: code for name, code in exact_tables._TYPES.items()}
    assert axes == books._SHAPES | {"metric": ("f2", "Nww")}
    assert (ladder.N_CLASSES, ladder.N_SYMBOLS) == (40, 32)
    facts = dict(re.findall(r"^\| `(book\.\w+)` \| (\w+)", text, re.M))
    kinds = {"integer": int, "list": list, "string": str, "float": float}
    needed = {key: kinds[kind] for key, kind in list(facts.items())[:10]}
    assert needed == books._FACTS and "The first ten are needed" in text
    assert f"0 to {books._MAX_HISTORY} |" in text and f"at most {books._MAX_DECAYS}," in text
    assert f"−{books._MAX_LOG_STEP} to {books._MAX_LOG_STEP} |" in text
    others = (books.IDS_PREFIX, exact_tables.PREFIX, product.PREFIX)
    used = {name for name in books.load(BOOK).book.arrays if not name.startswith(others)}
    assert used == set(books._SHAPES)


def test_usual_metadata() -> None:
    text = (SPEC / "tsc.md").read_text(encoding="utf-8")
    section = text[text.index("### 7.7 ") : text.index("### 7.8 ")]
    said = re.findall(r"^\| `([\w+]+)` \| ((?:array of )?\w+) \| (.*) \|$", section, re.M)
    read = {
        "bool": lambda v: v == "true", "u64": int, "f64": float, "string": lambda v: v.strip("`"),
        "array of u64": lambda v: [int(item) for item in v.split(", ")],
    }  # fmt: skip
    entries = [(key, read[kind](value)) for key, kind, value in said]
    assert entries == list(metadata.USUAL_METADATA.items())
    assert [type(v) for _, v in entries] == [type(v) for v in metadata.USUAL_METADATA.values()]
    writer = ByteWriter()
    metadata.write_metadata(writer, dict(entries))
    dictionary = metadata.dictionary_of(b"")
    assert decoder.usual_metadata() == dictionary == writer.bytes()
    assert f"{len(dictionary)} bytes" in section
    assert f"begins with `{blake3(dictionary).hexdigest()[:16]}`" in section
    assert f"the last {metadata._DICTIONARY_BYTES} bytes" in section
    assert metadata.dictionary_of(bytes(70000) + b"end") == (bytes(70000) + b"end")[-65536:]


def test_token_codings() -> None:
    text = (SPEC / "tsc.md").read_text(encoding="utf-8")
    section = text[text.index("### 7.8 ") : text.index("### 7.9 ")]
    assert re.findall(r"^\| ([\d, ]+) \|", section, re.M) == [
        "0, 1, 2", str(tokens.ADAPTIVE), str(tokens.OF_BOOK)
    ]  # fmt: skip
    assert f"for more than {tokens._FEW} new" in section
    page = (SPEC / "codecs" / "token-ids.md").read_text(encoding="utf-8")
    for place in (section, page):
        assert f"the last {token_ids.MOST_CONTEXT}" in place
    most = book_codec.MOST_LOG_STEP
    assert lossy_coding.is_step(most) and not lossy_coding.is_step(most + 1)


def test_limits_are_those_of_the_code() -> None:
    text = (SPEC / "tsc.md").read_text(encoding="utf-8")
    assert f"| frames of a block | {records.MAX_BLOCK_FRAMES} |" in text
    assert "| raw length of a chunk, row bytes | 2^30 |" in text
    assert records.MAX_CHUNK_BYTES == 1 << 30
    assert f"| quality layers of a block | {records.MAX_LAYERS} |" in text
    assert records.MAX_CHUNK_TENSORS == 65535 and "*tensor count*, at most 65535" in text
    assert refinement.MAX_RATIO == 3072
    refinement_page = (SPEC / "codecs" / "book-refinement.md").read_text(encoding="utf-8")
    assert refinement_page.count("0 < `b − f` ≤ 3072") == 2
    book_page = (SPEC / "book.md").read_text(encoding="utf-8")
    assert (books._MEMORY_PER_BYTE, books._MEMORY_SLACK) == (2, 1 << 25)
    assert "2 × file size + 2^25 bytes" in book_page
    assert f"`{records.Header.MAGIC.hex(' ')}`" in text
    assert f"`{records.Trailer.MAGIC.hex(' ')}`" in text
    assert f"multiple of {records.PAYLOAD_ALIGNMENT}" in text
    assert f"payload of {records.ALIGNED_FROM} bytes or more" in text
    assert reader._SLACK_BYTES == 1 << 25 and "2 × file size + 2^25 bytes" in text
    said = {int(n) for n in re.findall(r"(\d+) an? (?!ints)[a-z]", text)}
    names = {**vars(records), **vars(metadata)}
    counted = {value for name, value in names.items() if name.endswith("_MEMORY")}
    assert len(counted) > 8 and counted <= said


def test_codec_pages_have_the_same_headings() -> None:
    headings = {
        page.name: re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.M)
        for page in (SPEC / "codecs").glob("*.md")
    }
    assert len(headings) == 11
    assert len({tuple(found) for found in headings.values()}) == 1, headings


def test_links_lead_somewhere() -> None:
    for page in SPEC.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
