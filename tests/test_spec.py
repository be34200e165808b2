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

import tscfile
from tscfile import registry, temporal
from tscfile.container import records
from tscfile.dtypes import DTYPES, opaque_dtype
from tscfile.entropy import classed_rans, ints
from tscfile.model import CellTable, Snapshot, TensorSpec
from tscfile.tiers import TIERS
from tscfile.transforms import fields

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "spec"
SAMPLES = ROOT / "samples"
SMALLEST = SPEC / "vectors" / "valid" / "smallest"


def _load_decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decoder", SPEC / "reference_decoder.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decoder = _load_decoder()


def _assert_same(path: Path) -> None:
    """Every snapshot of the archive, by the decoder of the specification and by tscfile."""
    file = decoder.File(path.read_bytes())
    with tscfile.open(path) as archive:
        assert len(file.snapshots) == len(archive) > 0
        for number, found in enumerate(file.snapshots):
            record, expected = archive.record(number), archive.snapshot(number)
            for key in ("parent", "plan", "tier", "name", "source", "identity"):
                assert found[key] == getattr(record, key), key
            assert found["tokens"].tolist() == expected.tokens.tolist()
            assert found["opaque"] == expected.opaque
            for track, reference in zip(found["tracks"], expected.tracks, strict=True):
                _assert_same_track(track, reference)


def _assert_same_track(track: dict[str, Any], reference: Any) -> None:
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
    for mine, theirs in zip(track["rows"], rows, strict=True):
        assert mine.tobytes() == theirs.tobytes()


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
        for key in ("parent", "plan", "tier", "name", "source", "identity"):
            assert found[key] == wanted[key], key
        assert found["tokens"].tolist() == wanted["tokens"]
        assert {name: part.hex() for name, part in found["opaque"].items()} == wanted["opaque"]
        (track,), (wanted_track,) = found["tracks"], wanted["tracks"]
        for key, name in (("pos", "positions"), ("seq_ids", "sequence_ids")):
            assert track[key].tolist() == wanted_track[name]
        for rows, tensor in zip(track["rows"], wanted_track["tensors"], strict=True):
            assert [row.tobytes().hex() for row in rows] == tensor["rows"]


def test_worked_example_is_the_vector() -> None:
    """The tables show every byte of the file once, in order."""
    text = (SPEC / "worked-example.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ((?:[0-9a-f]{2} ?)+) \|", text, re.M)
    shown = bytearray()
    for offset, hexed in rows:
        assert int(offset) == len(shown)
        shown += bytes.fromhex(hexed)
    assert bytes(shown) == SMALLEST.with_suffix(".tsc").read_bytes()


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
    widths = {type_: str(struct.calcsize(code)) for type_, code in records._LAYOUTS.items()}
    assert rows == widths | {records._BOOL: "1", records._STRING: "–", records._ARRAY: "–"}


def test_registry_tiers_and_plans() -> None:
    assert {row[0]: (row[1] == "yes", int(row[2])) for row in _table("Tiers")} == {
        tier.name: (tier.exact, tier.codec) for tier in TIERS.values()
    }
    assert [row[0] for row in _table("Plans")] == [
        temporal.KEYFRAME, temporal.APPEND, temporal.TRUNCATE_APPEND
    ]  # fmt: skip


def test_limits_are_those_of_the_code() -> None:
    text = (SPEC / "tsc.md").read_text(encoding="utf-8")
    assert f"| frames of a block | {records.MAX_BLOCK_FRAMES} |" in text
    assert "| raw length of a chunk, row bytes | 2^30 |" in text
    assert records.MAX_CHUNK_BYTES == 1 << 30
    assert f"`{records.Header.MAGIC.hex(' ')}`" in text
    assert f"`{records.Trailer.MAGIC.hex(' ')}`" in text
    assert f"multiple of {records.PAYLOAD_ALIGNMENT}" in text
    assert f"payload of {records.ALIGNED_FROM} bytes or more" in text


def test_codec_pages_have_the_same_headings() -> None:
    headings = {
        page.name: re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.M)
        for page in (SPEC / "codecs").glob("*.md")
    }
    assert len(headings) == 4
    assert len({tuple(found) for found in headings.values()}) == 1, headings


def test_links_lead_somewhere() -> None:
    for page in SPEC.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
