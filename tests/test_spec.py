"""The specification stands by itself: a decoder written from its pages reads what tscfile writes,
and its examples say what files and code say. Its tables: test_spec_tables.py; its files:
test_vectors.py."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spec_decoder import (
    ROOT,
    SPEC,
    VALID,
    assert_same,
    decoder,
    load,
    snapshot_refs,
    token_coding,
)

import tscfile
from tscfile.books import book as books
from tscfile.context import FrameContext
from tscfile.dtypes import DTYPES, opaque_dtype
from tscfile.entropy import classed_rans, refinement
from tscfile.identity import identity_from_gguf
from tscfile.model import CellTable, Snapshot, TensorSpec
from tscfile.transforms import fields

SAMPLES = ROOT / "samples"
SMALLEST = VALID / "smallest"
LOSSY = VALID / "lossy"
_LOSSY_BOOK = LOSSY.with_suffix(".tscbook")
LAYERED = VALID / "layered"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"


# --- the decoder against tscfile --------------------------------------------------------------


@pytest.mark.parametrize("name", ["session.kv", "session-bf16.kv"])
def test_decoder_reads_packed_sessions(name: str, tmp_path: Path) -> None:
    path = tmp_path / "session.tsc"
    tscfile.pack(SAMPLES / name, path)
    assert_same(path)


def test_decoder_reads_a_series(tmp_path: Path) -> None:
    path = tmp_path / "series.tsc"
    first, *later = sorted((SAMPLES / "series").glob("*.kv"))
    tscfile.pack(first, path)
    for source in later:
        tscfile.append(source, path)
    assert_same(path)


def test_decoder_reads_a_torn_series(tmp_path: Path) -> None:
    path = tmp_path / "torn.tsc"
    first, second, *_ = sorted((SAMPLES / "series").glob("*.kv"))
    size = tscfile.pack(first, path).file_bytes
    tscfile.append(second, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert_same(path)
    assert decoder.File(path.read_bytes()).end == size


@pytest.mark.parametrize(
    ("name", "tier"),
    [("session.kv", "near"), ("session.kv", "balanced"), ("session-bf16.kv", "compact")],
)
def test_decoder_reads_book_tiers(name: str, tier: str, tmp_path: Path) -> None:
    path = tmp_path / "session.tsc"
    identity = identity_from_gguf(MODEL)
    tscfile.pack(SAMPLES / name, path, book=BOOK, tier=tier, identity=identity)
    file = assert_same(path, BOOK)
    (snapshot,) = file.snapshots
    assert list(file.books) == [snapshot["coding"]["book"]] == [file.book(snapshot).id]
    assert (snapshot["coding"]["log_step"],) == file.book(snapshot).tiers[tier][:1]
    # As the page says of the first writer, at positions 0 and last.
    steps = np.concatenate([held["log_steps"] for held in file.decoded.values()])
    assert (steps[[0, -1, 100]] - snapshot["coding"]["log_step"]).tolist() == [-384, -768, 0]


def test_decoder_reads_tier_custom(tmp_path: Path) -> None:
    path = tmp_path / "custom.tsc"
    identity = identity_from_gguf(MODEL, weights=False)
    tscfile.pack(SAMPLES / "session.kv", path, book=BOOK, target_ratio=100, identity=identity)
    assert assert_same(path, BOOK).snapshots[0]["tier"] == "custom"


def test_decoder_reads_a_series_of_a_book_tier(tmp_path: Path) -> None:
    """Frames that later snapshots share, with the tokens of each."""
    path = tmp_path / "series.tsc"
    first, *later = sorted((SAMPLES / "series").glob("*.kv"))[:3]
    tscfile.pack(first, path, book=BOOK, identity=identity_from_gguf(MODEL, weights=False))
    for source in later:
        tscfile.append(source, path, book=BOOK)
    file = assert_same(path, BOOK)
    assert len(file.snapshots) == 3 and file.snapshots[2]["parent"] is not None


def test_decoder_reads_what_hangs_from_book_coded_tokens(tmp_path: Path) -> None:
    """A lossless save that keeps tokens of a book tier; the book is inside."""
    path = tmp_path / "both.tsc"
    first, second, *_ = sorted((SAMPLES / "series").glob("*.kv"))
    identity = identity_from_gguf(MODEL, weights=False)
    tscfile.pack(first, path, book=BOOK, embed_book=True, identity=identity)
    tscfile.append(second, path, tier="lossless")
    file = assert_same(path)
    payloads = [file.payload(ref, decoder.SNAPSHOT)[0] for ref in snapshot_refs(file)]
    assert [token_coding(payload) for payload in payloads] == [4, 3]


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
        with pytest.raises(decoder.Undecodable, match="is needed"):
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
    assert_same(path)


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


@pytest.mark.parametrize("tier", ["archive", "balanced", "near"])
def test_decoder_reads_quality_layers(tier: str, tmp_path: Path) -> None:
    path = tmp_path / "layers.tsc"
    identity = identity_from_gguf(MODEL, weights=False)
    layers = ["archive", "balanced", "near", "lossless"]
    tscfile.pack(SAMPLES / "session.kv", path, book=BOOK, tier=layers, identity=identity)
    assert_same(path, BOOK, tier)


def _worked_example() -> tuple[str, str]:
    """The part about the smallest file, and that about other tiers."""
    text = (SPEC / "worked-example.md").read_text(encoding="utf-8")
    first, other = text.split("## Other tiers")
    return first, other


def test_worked_example_is_the_vector() -> None:
    """The tables show every byte of the file once, in order."""
    text, _ = _worked_example()
    rows = re.findall(r"^\| (\d+) \| ((?:[0-9a-f]{2} ?)+) \|", text, re.M)
    shown = bytearray()
    for offset, hexed in rows:
        assert int(offset) == len(shown)
        shown += bytes.fromhex(hexed)
    assert bytes(shown) == SMALLEST.with_suffix(".tsc").read_bytes()


def test_structures_of_worked_example() -> None:
    """The tables behind the snapshots show every byte of the structures once, in order."""
    text, _ = _worked_example()
    file = decoder.File(SMALLEST.with_suffix(".tsc").read_bytes())
    parts = re.split(r"^The structure, (\d+) bytes:$", text, flags=re.M)[1:]
    for size, part, snapshot in zip(parts[::2], parts[1::2], file.snapshots, strict=True):
        shown = bytearray()
        for offset, hexed in re.findall(r"^\| \+(\d+) \| ((?:[0-9a-f]{2} ?)+) \|", part, re.M):
            assert int(offset) == len(shown)
            shown += bytes.fromhex(hexed)
        assert bytes(shown) == snapshot["structure"] and len(shown) == int(size)


def test_checksums_of_worked_example() -> None:
    text, _ = _worked_example()
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


def test_other_tiers_of_worked_example_are_of_the_vectors() -> None:
    """Each table shows bytes of its file, or of a structure in it, with no gap but in long rows."""
    _, text = _worked_example()
    shown = re.findall(r"<!-- (\w+): (\w+) (\d+)(, only .*)? -->\n\n((?:\|.*\n)+)", text)
    assert len(shown) >= 10
    for name, kind, number, only, table in shown:
        path = VALID / f"{name}.tsc"
        data = path.read_bytes()
        if kind == "structure":
            data = decoder.File(data, only=-1).snapshots[int(number)]["structure"]
        stop = None
        for offset, first, last in re.findall(
            r"^\| \+?(\d+) \| ([0-9a-f ]+?)(?: … ([0-9a-f ]+))? \|", table, re.M
        ):
            start, end = bytes.fromhex(first), bytes.fromhex(last)
            assert data[int(offset) :].startswith(start)
            assert only or stop is None or int(offset) == stop
            stop = data.index(end, int(offset)) + len(end) if last else int(offset) + len(start)


def test_tables_of_worked_example_can_be_made_again() -> None:
    take_apart = load(SPEC / "vectors" / "take_apart.py")
    text = (SPEC / "worked-example.md").read_text(encoding="utf-8")
    assert take_apart.rewritten(text, decoder) == text


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
