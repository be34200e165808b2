"""The tables and numbers of the specification say what the code says."""

from __future__ import annotations

import re
import struct

import numpy as np
from blake3 import blake3
from spec_decoder import ROOT, SPEC, decoder

from tscfile import (
    archive,
    blocks,
    book_codec,
    exact_tables,
    lossy_coding,
    registry,
    temporal,
    tokens,
)
from tscfile.books import book as books
from tscfile.books import product
from tscfile.books.measure import TARGETS
from tscfile.bytestream import ByteWriter
from tscfile.container import metadata, reader, records, snapshots
from tscfile.dtypes import DTYPES, opaque_dtype
from tscfile.entropy import classed_rans, ints, ladder, refinement, segments, token_ids
from tscfile.identity import ROPE_PAIRING
from tscfile.quantizers import uniform
from tscfile.tiers import CUSTOM, TIERS
from tscfile.transforms import fields, prediction

BOOK = ROOT / "samples" / "model" / "reference-llama-6m.tscbook"


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
    assert tuple(_names("Roles").values()) == snapshots._ROLES
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
        snapshots._EXT_CODED: "coded", snapshots._EXT_POSITION: "position",
        snapshots._EXT_TOKEN: "token",
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
        temporal.KEYFRAME, temporal.APPEND, temporal.TRUNCATE_APPEND, temporal.SHIFT, temporal.PATCH
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
    assert f"| contexts of a snapshot | {records.MAX_CONTEXTS} |" in text
    assert f"| context count | uvarint | at most {records.MAX_CONTEXTS} |" in text
    assert records._MOST_SHIFT == (1 << 32) - 1 and "beyond −2^32 and below 2^32" in text
    assert f"| steps from a block over sources | {archive.MAX_SOURCE_CHAIN} |" in text
    assert f"| ways from a block over sources | {archive.MAX_SOURCE_WAYS} |" in text
    assert f"Where the next {temporal.LEAST_MOVED} are" in text
    assert f"less than {blocks.BLOCK_BYTES} bytes for as many" in text
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
    names = {**vars(records), **vars(snapshots), **vars(metadata)}
    counted = {value for name, value in names.items() if name.endswith("_MEMORY")}
    assert len(counted) > 7 and counted <= said


def test_codec_pages_have_the_same_headings() -> None:
    headings = {
        page.name: re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.M)
        for page in (SPEC / "codecs").glob("*.md")
    }
    assert len(headings) == 12
    assert len({tuple(found) for found in headings.values()}) == 1, headings


def test_links_lead_somewhere() -> None:
    for page in SPEC.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
