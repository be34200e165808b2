"""Make the tables of worked-example.md again: python spec/vectors/take_apart.py

A line `<!-- NAME: PART -->` stands before each table; the table is what `PART` of the vector NAME
is, byte by byte: `header`, a record by its kind and number (`chunk 0`), `trailer 0`, or the
unpacked `structure` of a snapshot. `PART, only X` shows the rows whose field begins with X. Of long
fields the first and last bytes are shown. `FIGURES` are tables of what is computed.
"""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SPEC = Path(__file__).resolve().parent.parent
PAGE = SPEC / "worked-example.md"
HEAD = "| offset | bytes | field | meaning |\n|---:|---|---|---|\n"
KINDS = {1: "chunk", 2: "opaque", 3: "snapshot", 4: "index", 5: "basis", 6: "book", 7: "codebooks"}
CODECS = {
    0: "raw", 1: "fields+classed-rans", 2: "book-transform", 3: "session-transform",
    4: "book-refinement", 5: "book-exact", 6: "product", 7: "difference",
}  # fmt: skip
MOST_SHOWN = 100
METADATA_TYPES = {7: "bool", 8: "string", 9: "array", 10: "u64", 11: "i64", 12: "f64"}


class Walk:
    """Reads with the decoder's cursor; `say` makes a row of the bytes since the last one."""

    def __init__(self, decoder: ModuleType, data: bytes, first: int = 0, sign: str = "") -> None:
        self.decoder, self.c = decoder, decoder.Cursor(data)
        self.first, self.sign, self.said = first, sign, 0
        self.rows: list[tuple[str, str, str, str]] = []

    @property
    def at(self) -> int:
        """Offset of the next byte in the file."""
        return int(self.first + self.c.at)

    def say(self, field: str, meaning: Any = "") -> None:
        data, start = self.c.data[self.said : self.c.at], self.first + self.said
        self.said = self.c.at
        if data:
            shown = data.hex(" ")
            if len(data) > MOST_SHOWN:
                shown = f"{data[:12].hex(' ')} … {data[-4:].hex(' ')}"
            self.rows.append((f"{self.sign}{start}", shown, field, str(meaning)))

    def uvarint(self, field: str, meaning: str = "{}") -> int:
        value = int(self.c.uvarint())
        self.say(field, meaning.format(value))
        return value

    def svarint(self, field: str) -> int:
        value = int(self.c.zigzag())
        self.say(field, value)
        return value

    def u8(self, field: str, meanings: dict[int, str] | None = None) -> int:
        value = int(self.c.u8())
        self.say(field, f"{value}: {meanings[value]}" if meanings else value)
        return value

    def string(self, field: str) -> str:
        text = str(self.c.string())
        self.say(field, f"length {len(text.encode())}, `{text}`")
        return text

    def id(self, field: str) -> None:
        self.c.take(16)
        self.say(field)

    def frame(self, field: str, meaning: str) -> None:
        """A zstd frame to the end, by its parts (RFC 8878)."""
        self.c.take(4)
        self.say(field, "zstd: magic")
        descriptor = self.c.u8()
        n = 1 << (descriptor >> 6)
        self.say("", f"frame header: one segment, content size in {n} byte{'s' * (n > 1)}, no "
                 "dictionary id, no checksum")  # fmt: skip
        size = int.from_bytes(self.c.take(n), "little") + (256 if n == 2 else 0)
        self.say("", f"content size {size}")
        while self.c.at < len(self.c.data):
            block = int.from_bytes(self.c.take(3), "little")
            kind, length = ("raw", "one byte repeated", "compressed")[block >> 1 & 3], block >> 3
            stored = 1 if block >> 1 & 3 == 1 else length
            is_last = "last, " if block & 1 else ""
            self.say("", f"block header: {is_last}{kind}, {length} bytes")
            data = self.c.take(stored)
            self.say("", f"`{data.decode()}`" if kind == "raw" else meaning)


def header(w: Walk) -> None:
    w.c.take(8)
    w.say("magic", "`\\x89TSC\\r\\n\\x1a\\n`")
    for field, layout in (("major", "H"), ("minor", "H")):
        (value,) = w.c.fixed(layout)
        w.say(field, value)
    for field, meaning in (("required features", "none"), ("optional features", "none"),
                           ("reserved", "")):  # fmt: skip
        w.c.take(4)
        w.say(field, meaning)
    (value,) = w.c.fixed("Q")
    w.say("checksum", f"XXH3-64 of bytes 0 to 23: `{value:016x}`")


def trailer(w: Walk) -> None:
    start = w.at
    for field in ("index offset", "index length"):
        (value,) = w.c.fixed("Q")
        w.say(field, value)
    (value,) = w.c.fixed("Q")
    own = struct.pack("<Q", start).hex(" ")
    w.say("checksum", f"XXH3-64 of bytes {start} to {start + 15} and `{own}` ({start} as u64): "
          f"`{value:016x}`")  # fmt: skip
    w.c.take(8)
    w.say("closing magic", "`\\x89TSCEND\\n`")


def record(w: Walk, part: Part) -> None:
    """Header, payload and gap."""
    start = w.at
    type_ = w.u8("type", KINDS)
    flags = w.c.u8()
    w.say("flags", "critical" if flags else "not critical")
    (padding,) = w.c.fixed("H")
    w.say("padding", "0: the payload is shorter than 4096 bytes" if not padding else padding)
    (check,) = w.c.fixed("I")
    w.say("header checksum", f"low 32 bits of XXH3-64 of bytes {start} to {start + 3} and "
          f"{start + 8} to {start + 23}: `{check:08x}`")  # fmt: skip
    (length,) = w.c.fixed("Q")
    w.say("length", length)
    (check,) = w.c.fixed("Q")
    w.say("payload checksum", f"XXH3-64 of bytes {start + 24} to {start + 23 + length}: "
          f"`{check:016x}`")  # fmt: skip
    inner = Walk(w.decoder, w.c.take(length), w.first + w.c.at - length)
    PAYLOADS[KINDS[type_]](inner, part)
    inner.c.end()
    w.rows += inner.rows
    w.said = w.c.at
    w.c.rest()
    w.say("gap", "zeros up to a multiple of 8")


# --- payloads ---------------------------------------------------------------------------------


def chunk(w: Walk, part: Part) -> None:
    codec = w.u8("codec", CODECS)
    layer = w.c.u8()
    w.say("quality layer", "base" if not layer else layer)
    n, _ = w.uvarint("frame count"), w.uvarint("first tensor")
    type_ = w.c.uvarint()
    w.say("element type", f"{type_}: {w.decoder.ELEMENT_TYPES[type_]}")
    row_bytes: list[int] = []
    for _ in range(w.uvarint("row run count")):
        count = w.uvarint("tensors")
        size = w.c.uvarint()
        first, last = len(row_bytes), len(row_bytes) + count - 1
        to = "and" if last == first + 1 else "to"
        w.say("row bytes", f"{size}: of tensors {first} {to} {last}")
        row_bytes += [size] * count
    BODIES[codec](w, n, row_bytes, part)


def raw_body(w: Walk, n: int, row_bytes: list[int], part: Part) -> None:
    for tensor, size in enumerate(row_bytes):
        for frame in range(n):
            values = np.frombuffer(w.c.take(size), "<f2")
            w.say(f"tensor {tensor}, frame {frame}", numbers(values))


def fields_body(w: Walk, n: int, row_bytes: list[int], part: Part) -> None:
    """Where all bits of the patterns of f16 are low bits: two planes."""
    at = w.c.at
    rows = [part.view("<f2") for part in w.decoder.decode_fields(w.c, n, 1, row_bytes)]
    w.c.at = at
    w.uvarint("stream length", "{}: of the only field, pattern")
    assert w.c.u8() == 16
    w.say("low bits", "16: all 16, so nothing is entropy-coded")
    size = sum(row_bytes) // 2
    for plane, of in enumerate(("low", "high")):
        if w.c.u8():
            w.say(f"plane {plane}: coding", "zstd")
            length = w.uvarint("length")
            content = w.decoder.unzstd(w.c.take(length), n * size)
            what = "all zero" if not any(content) else content.hex(" ")
            w.say(f"plane {plane}", f"zstd frame of {n * size} bytes, the {of} byte of each value: "
                  f"{what}")  # fmt: skip
            continue
        w.say(f"plane {plane}: coding", "raw")
        for frame in range(n):
            w.c.take(size)
            values = ", ".join(f"of tensor {i} ({numbers(r[frame])})" for i, r in enumerate(rows))
            w.say(f"plane {plane}, frame {frame}", f"{of} bytes {values}")


def session_body(w: Walk, n: int, row_bytes: list[int], part: Part) -> None:
    (basis,) = w.c.fixed("Q")
    w.say("basis", f"`{basis:016x}`")
    learnt = part.file._learnt[basis]
    n_rows = sum(len(group["rows"]) for group in learnt["groups"])
    w.u8("shift")
    chosen = widths(w, n_rows + sum(row_bytes) // 2)
    left = n
    while left:
        count = w.uvarint("segment: frames")
        extra = w.u8("extra")
        (bound,) = w.c.fixed("f")
        w.say("bound", f"{bound:g}")
        finer = np.where(chosen, np.minimum(chosen + extra, 112), 0)
        matrix(w, count, finer)
        left -= count


def widths(w: Walk, n: int) -> Any:
    """The field's rows; what they say, int64 [n]."""
    at = w.c.at
    found = w.decoder.read_widths(w.c, n)
    w.c.at = at
    if w.uvarint("widths: count"):
        w.c.take(w.uvarint("length"))
        w.say("differences", f"widths {numbers(found)}")
    return found


def matrix(w: Walk, n: int, chosen: Any) -> None:
    at = w.c.at
    found = w.decoder.read_matrix(w.c, n, chosen)
    end, w.c.at = w.c.at, at
    stored = [column for column in range(len(chosen)) if chosen[column]]
    if end == at:
        return
    lengths = [w.uvarint("words of a lane") for _ in range(w.uvarint("lane count"))]
    values = "; ".join(numbers(row[stored]) for row in found)
    words = np.frombuffer(w.c.take(2 * sum(lengths)), "<u2")
    w.say("words", " ".join(f"{word:04x}" for word in words))
    w.c.at = end
    w.say("low bits, escapes")
    field, data, name, meaning = w.rows.pop()
    w.rows.append((field, data, name, f"{meaning}{': ' if meaning else ''}rows {values}"))


def exact_body(w: Walk, n: int, row_bytes: list[int], part: Part) -> None:
    w.u8("pairing", {0: "neox", 1: "norm"})
    for field in ("positions", "tokens"):
        values = w.c.ints(n)
        w.say(field, numbers(values))
    lengths = [w.uvarint("words of a lane") for _ in range(w.uvarint("lanes"))]
    for lane, length in enumerate(lengths):
        w.c.take(4 * length)
        w.say(f"lane {lane}", f"{length} words, the state first")


def product_body(w: Walk, n: int, row_bytes: list[int], part: Part) -> None:
    (codebooks,) = w.c.fixed("Q")
    w.say("codebooks", f"`{codebooks:016x}`" if codebooks else "0: those of the book")
    forms: list[int] = []
    while len(forms) < n:
        count, base = w.uvarint("run: frames"), w.uvarint("base")
        width = w.u8("width")
        at = w.c.at
        forms += (base + w.decoder.read_matrix(w.c, count, np.array([width]))[:, 0]).tolist()
        w.c.at = at
        matrix(w, count, np.array([width]))
    for frame, form in enumerate(forms):
        w.c.take(form - 1 if form else sum(row_bytes))
        codes = f"{form - 1} code{'s' * (form != 2)}"
        w.say(f"frame {frame}", codes if form else "exact: its rows")


def difference_body(w: Walk, n: int, row_bytes: list[int], part: Part) -> None:
    """Streams without rANS, as small ones are."""
    if w.u8("turn: kind", {0: "none", 1: "neox", 2: "norm"}):
        mixed = w.c.u8()
        w.say("mixed", f"{mixed}: blocks of {1 << mixed}" if mixed else "0: not")
        w.uvarint("head")
        pairs = w.uvarint("pairs")
        for field in ("cosines", "sines"):
            values = np.array(w.c.fixed(f"{pairs}i"))
            w.say(field, f"{numbers(np.round(np.ldexp(values.astype(float), -28), 4))}")
    modes: list[int] = []
    while len(modes) < len(row_bytes):
        count = w.uvarint("run: tensors")
        modes += count * [w.u8("mode", {0: "as predicted", 1: "differences", 2: "by itself"})]
    tensors = part.file.snapshots[0]["tracks"][0]["tensors"]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (mode, tensor) in enumerate(zip(modes, tensors, strict=True)):
        if mode:
            groups.setdefault((mode, *tensor[1:3]), []).append(i)
    for (mode, role, type_), members in groups.items():
        assert mode == 1
        values = np.zeros((n, sum(row_bytes[i] for i in members)), np.uint8)
        of = f"{('keys', 'values')[role]} ({w.decoder.ELEMENT_TYPES[type_]})"
        for name, (bits, like) in zip(
            ("pattern",) if type_ in w.decoder.FLOATS else ("scale", "codes"),
            w.decoder.split_fields(values, type_), strict=True,
        ):  # fmt: skip
            stream(w, f"{of}, {name}", "near", min(bits, 8), like.shape)


def stream(w: Walk, of: str, what: str, bits: int, shape: tuple[int, ...]) -> None:
    """A near stream, and the far one that it may ask for."""
    data = w.c.take(w.uvarint(f"{of}: length"))
    found = w.decoder.decode_stream(data, bits, *shape)
    places = np.argwhere(found).tolist()
    shown = ", ".join(f"{found[i, j]} of frame {i}, column {j}" for i, j in places)
    if what == "far":
        shown = ", ".join(map(str, found[:, 0].tolist()))
    w.say(what, shown or "all 0")
    if what == "near" and bits == 8 and (found == 255).any() and "codes" not in of:
        stream(w, of, "far", 16, (int((found == 255).sum()), 1))


def opaque(w: Walk, part: Part) -> None:
    w.frame("content", "")


def basis(w: Walk, part: Part) -> None:
    (parent,) = w.c.fixed("Q")
    w.say("parent", f"`{parent:016x}`" if parent else "0: extends none")
    if parent:
        sizes = [group["sizes"] for group in part.file._learnt[parent]["groups"]]
    else:
        sizes = basis_frame(w)
    for number, channels in enumerate(sizes):
        n = w.uvarint(f"group {number}: row count") + (not parent)
        w.c.take(n)
        w.say("exponents", numbers(np.frombuffer(w.c.data[w.c.at - n : w.c.at], np.int8)))
        wide = widths(w, n * len(channels)).reshape(n, len(channels))
        for tensor, size in enumerate(channels):
            matrix(w, size, wide[:, tensor])


def basis_frame(w: Walk) -> list[list[int]]:
    """Channels of the tensors of each group."""
    if w.u8("turned", {0: "as they stand", 1: "turned back"}):
        w.u8("pairing", {0: "norm", 1: "neox"})
        w.uvarint("head_dim")
        m = w.uvarint("pair count")
        w.say("inv_freq", numbers(np.frombuffer(w.c.take(4 * m), "<f4")))
    sizes = []
    for number in range(w.uvarint("group count")):
        n, channels = w.uvarint(f"group {number}: tensor count"), []
        for _ in range(n):
            tensor = w.c.uvarint()
            channels.append(w.c.uvarint())
            w.say("tensor, channels", f"tensor {tensor}, {channels[-1]} channels")
        w.say("steps", numbers(np.frombuffer(w.c.take(4 * n), "<f4")))
        sizes.append(channels)
    return sizes


def snapshot(w: Walk, part: Part) -> None:
    number = w.uvarint("number")
    others = []
    for field in ("parent", "dictionary"):
        others.append(w.c.uvarint())
        w.say(field, f"{others[-1]}: snapshot {others[-1] - 1}" if others[-1] else "0: none")
    token_fields(w, part.file.snapshots[number]["tokens"].tolist())
    for context in range(w.uvarint("context count")):
        source = w.c.uvarint()
        of = f"context {source}" if source else "the tokens"
        w.say(f"context {context + 1}: source", f"{source}: {of} of the parent")
        token_fields(w, part.file.snapshots[number]["contexts"][context].tolist())
    w.uvarint("structure length")
    like = f"the structure of snapshot {others[1] - 1}" if others[1] else "the usual metadata"
    w.frame("structure", f"literals, and copies from {like} and from the structure itself")


def token_fields(w: Walk, found: list[int]) -> None:
    """``found``: what they stand for."""
    w.uvarint("kept tokens")
    n_new = w.uvarint("new tokens")
    names = {0: "runs", 1: "values", 2: "differences", 3: "adaptive", 4: "of book"}
    coding = w.u8("token coding", names)
    data = w.c.take(w.uvarint("token length"))
    runs = f"{runs_of(w.decoder, data)} → " if not coding else ""
    new = f"{runs}{found[len(found) - n_new :]}"
    w.say("token ids", new if n_new == len(found) else f"{new}; with those kept {found}")


def structure(w: Walk, part: Part) -> None:
    for field in ("plan", "tier", "name"):
        w.string(field)
    for field in ("source", "identity", "coding"):
        metadata(w, field)
    for _ in range(w.uvarint("track count")):
        w.uvarint("cache")
        w.uvarint("stream")
        metadata(w, "attributes")
        for _ in range(w.uvarint("tensor run count")):
            w.uvarint("layer")
            w.uvarint("count")
            w.u8("role", {0: "keys", 1: "values"})
            type_ = w.c.uvarint()
            w.say("element type", f"{type_}: {w.decoder.ELEMENT_TYPES[type_]}")
            w.uvarint("row bytes")
            rotation = w.c.uvarint()
            w.say("rotation", f"{rotation}: {('not told', 'none')[rotation]}")
        n, n_ids = frame_runs(w, "frame run"), 0
        for field in ("positions", "sequence counts", "sequence ids"):
            values = integers(w, n if field != "sequence ids" else n_ids, field)
            n_ids = int(values.sum())
        w.uvarint("column count")
    for _ in range(w.uvarint("opaque count")):
        name = w.string("name")
        reference(w, "record")
        w.uvarint("raw length")
        w.c.take(16)
        content = part.file.snapshots[part.number]["opaque"][name]
        w.say("id", f"BLAKE3 of `{content.decode()}`")


def frame_runs(w: Walk, field: str, contexts: bool = True) -> int:
    """How many frames they are."""
    n = expected = 0
    for _ in range(w.uvarint(f"{field} count")):
        apart = w.c.zigzag()
        w.say(f"{field}: block", f"{apart}: block {expected + apart}")
        expected += apart + 1
        w.uvarint(f"{field}: first")
        n += w.uvarint(f"{field}: count")
        if contexts and w.uvarint(f"{field}: context", "{}"):
            w.svarint(f"{field}: shift")
    return n


def metadata(w: Walk, field: str) -> None:
    for _ in range(w.uvarint(f"{field}: count")):
        w.string(f"{field}: key")
        type_ = w.c.u8()
        w.say(f"{field}: value type", METADATA_TYPES[type_])
        value = w.c.value(type_)
        text = f"length {len(value.encode())}, `{value}`" if isinstance(value, str) else value
        if isinstance(value, list):
            kind = METADATA_TYPES[w.c.data[w.said]]
            text = f"{kind}, {len(value)}: " + ", ".join(f"`{each}`" for each in value)
        w.say(f"{field}: value", text)


def integers(w: Walk, n: int, field: str) -> Any:
    coding, length = w.c.u8(), w.c.uvarint()
    data = w.c.take(length)
    values = w.decoder.decode_ints(coding, data, n)
    assert coding == 0
    w.say(field, f"runs, {length} bytes: {runs_of(w.decoder, data)} → {values.tolist()}")
    return values


def runs_of(decoder: ModuleType, data: bytes) -> str:
    c, runs = decoder.Cursor(data), []
    while c.at < len(data):
        runs.append(f"start {c.zigzag()}, step {c.zigzag()}, count {c.uvarint()}")
    return "; ".join(runs) or "none"


def reference(w: Walk, field: str, none: str = "") -> None:
    offset, length = w.c.ref()
    w.say(field, f"offset {offset}, length {length}{none if not length else ''}")


def index(w: Walk, part: Part) -> None:
    reference(w, "previous", ": none")
    n_first = w.uvarint("first block")
    for number in range(n_first, n_first + w.uvarint("block count")):
        w.uvarint("frame count")
        absent = w.decoder.is_absent(part.file.blocks[number])
        w.c.take(16)
        of = f"BLAKE3 of the rows packed into block {number}"
        unknown = f"block {number} is absent" if absent else "the rows packed are not known"
        w.say("content id", of if any(part.file.blocks[number]["content_id"]) else unknown)
        none = not any(w.c.take(16))
        w.say("logical id", "none" if none else logical(part, number))
        for _ in range(w.uvarint("chunk count")):
            reference(w, "record")
            w.c.take(8)
            w.say("payload checksum", "as in the record's header")
            w.u8("codec", CODECS)
            w.u8("quality layer")
            w.uvarint("first tensor")
            w.uvarint("tensor count")
            w.uvarint("raw length")
        if part.file.blocks[number]["sources"]:
            frame_runs(w, "source run", contexts=False)
    w.uvarint("first snapshot")
    for _ in range(w.uvarint("snapshot count")):
        reference(w, "snapshot")
    for _ in range(w.uvarint("extra count")):
        w.u8("extra: type", KINDS)
        w.u8("extra: flags")
        reference(w, "extra: record")


def logical(part: Part, number: int) -> str:
    """What the logical id of a block is of, by the first snapshot that has its frames."""
    for saved in part.file.snapshots:
        at = 0
        for block, first, count, *_ in saved["tracks"][0]["runs"]:
            if block == number:
                tokens = saved["tokens"][: at - first + part.file.blocks[number]["frames"]]
                return f"BLAKE3 of seed, tokens {numbers(tokens)}, start {at - first}"
            at += count
    raise AssertionError("a block that no snapshot has")


def numbers(values: Any) -> str:
    return " ".join(f"{value:g}" for value in np.asarray(values).tolist())


PAYLOADS = {
    "chunk": chunk, "opaque": opaque, "snapshot": snapshot, "index": index, "basis": basis,
}  # fmt: skip
BODIES = {
    0: raw_body, 1: fields_body, 3: session_body, 5: exact_body, 6: product_body,
    7: difference_body,
}  # fmt: skip


# --- the page ---------------------------------------------------------------------------------


class Part:
    """A part of a vector: ``file`` as the decoder read it."""

    def __init__(self, decoder: ModuleType, name: str, what: str) -> None:
        path = SPEC / "vectors" / "valid" / f"{name}.tsc"
        book = path.with_suffix(".tscbook")
        data = book.read_bytes() if book.exists() and name != "embedded" else None
        self.decoder, self.file = decoder, decoder.File(path.read_bytes(), data)
        self.kind, _, number = what.partition(" ")
        self.number = int(number or 0)

    def table(self) -> list[tuple[str, str, str, str]]:
        if self.kind == "structure":
            data = self.file.snapshots[self.number]["structure"]
            w = Walk(self.decoder, data, sign="+")
            structure(w, self)
        else:
            start, stop = self._find()
            w = Walk(self.decoder, self.file.data[start:stop], start)
            if self.kind in ("header", "trailer"):
                (header if self.kind == "header" else trailer)(w)
            else:
                record(w, self)
        w.c.end()
        return w.rows

    def _find(self) -> tuple[int, int]:
        if self.kind == "header":
            return 0, 32
        data, at, seen = self.file.data, 32, 0
        while True:
            is_trailer = data[at + 24 : at + 32] == b"\x89TSCEND\n"
            padding, length = struct.unpack("<HIQ", data[at + 2 : at + 16])[::2]
            stop = at + 32 if is_trailer else at + -(-(24 + padding + length) // 8) * 8
            if self.kind == ("trailer" if is_trailer else KINDS[data[at]]):
                if seen == self.number:
                    return at, stop
                seen += 1
            at = stop


def exact_values(decoder: Any, name: str) -> str:
    """How the first lane of a chunk of codec 5 goes through some of its values."""
    lines = ["| channel | frame | μ | A | state | events | pattern |\n",
             "|--:|--:|--:|--:|---|---|---|\n"]  # fmt: skip
    lanes: list[Any] = []
    plain_leave, plain_value = decoder.ExactLane.leave, decoder.exact_value
    events: list[tuple[int, int, int]] = []

    def leave(lane: Any, start: int, size: int, bits: int) -> None:
        events.append((start, size, bits))
        plain_leave(lane, start, size, bits)

    def value(lane: Any, tables: Any, channel: int, mu: int, mean: int, *form: int) -> Any:
        if lane not in lanes:
            lanes.append(lane)
        seen = [each for each in calls if each[0] == channel]
        calls.append((channel, lane))
        state, frame = lane.state, len(seen)
        events.clear()
        found = plain_value(lane, tables, channel, mu, mean, *form)
        if lane is lanes[0] and channel in (0, 4, 5) and frame < 8:
            shown = ", ".join(f"{a} + {b} of 2^{bits}" for a, b, bits in events)
            lines.append(f"| {channel} | {frame} | {mu} | {mean} | `{state:016x}` | {shown} | "
                         f"`{found[0]:04x}` |\n")  # fmt: skip
        return found

    calls: list[tuple[int, Any]] = []
    decoder.ExactLane.leave, decoder.exact_value = leave, value
    try:
        path = SPEC / "vectors" / "valid" / f"{name}.tsc"
        decoder.File(path.read_bytes(), path.with_suffix(".tscbook").read_bytes())
    finally:
        decoder.ExactLane.leave, decoder.exact_value = plain_leave, plain_value
    return "".join(lines)


def session_frame(decoder: ModuleType, name: str) -> str:
    """Group 0 of frame 5 of `session`, step by step."""
    file = Part(decoder, name, "frame").file
    held, track = file.decoded[0, 0], file.snapshots[0]["tracks"][0]
    basis = file._learnt[held["basis"]]
    group, q = basis["groups"][0], held["integers"][5]
    row = q[0] * group["rows"][0]
    whole = row + q[3:11]
    step = 2.0 ** (-held["shifts"][5] / 4)
    y = whole * step + group["mean"]
    x = y * np.repeat(group["steps"], 4)
    turned = decoder.turn(x[None, :4], np.array([5]), *basis["turn"])[0]
    rows = [track["rows"][i][5] for i in group["tensors"]]
    return steps_table(
        ["K0", "V0"], 4,
        (f"{q[0]} times the row", row), (f"{q[4]} in channel 1 of K0", whole),
        (f"times {step:.4f}", whole * step), ("with the mean", y),
        ("times the steps, 1.5 and 0.75", x),
        ("keys turned by 5 and 2.5", np.concatenate([turned, x[4:]])),
        ("as f16", rows),
    )  # fmt: skip


def product_frame(decoder: ModuleType, name: str) -> str:
    """Frame 0 of `product`, step by step."""
    part = Part(decoder, name, "frame")
    file, book = part.file, next(iter(part.file._opened.values()))
    snapshot, codes = file.snapshots[0], file.decoded[0, 0]["frames"][0]
    lines = "| code | adds to coefficients 0, 1, 2 |\n|---|---|\n"
    for stage, code in enumerate(codes.tolist()):
        added = decoder.sums_of_codes([[0] * stage + [code]], book.product_stages[: stage + 1], 3)
        before = decoder.sums_of_codes([[0] * stage], book.product_stages, 3)
        lines += f"| {code} of stage {stage} | {numbers((added - before)[0])} |\n"
    q = decoder.sums_of_codes([codes], book.product_stages, 3)
    lines += f"| together, `q` | {numbers(q[0])} |\n\n"
    z = book.predict(snapshot["tokens"], np.array([0]))
    y, x = book.channels(z, 0 * q)[0], book.channels(z, q)[0]
    rows = [rows[0] for rows in snapshot["tracks"][0]["rows"]]
    return lines + steps_table(
        ["K0", "K1", "V0", "V1"], 4, (f"`y`, with `z` = {numbers(z[0])}", y), ("`x`", x),
        ("as f16, pairs in neighbouring channels", rows),
    )  # fmt: skip


def steps_table(names: list[str], width: int, *steps: tuple[str, Any]) -> str:
    """Of each step the numbers, or the bytes of rows."""
    lines = ["| | " + " | ".join(names) + " |\n", "|---" * (1 + len(names)) + "|\n"]
    for step, values in steps:
        if isinstance(values, list):
            cells = [" ".join(f"`{part}`" for part in row.tobytes().hex(" ", 2).split())
                     for row in values]  # fmt: skip
        else:
            rounded = np.round(np.asarray(values, float), 4) + 0.0
            cells = [numbers(part) for part in rounded.reshape(len(names), width)]
        lines.append(f"| {step} | {' | '.join(cells)} |\n")
    return "".join(lines)


FIGURES = {"values": exact_values, "session frame": session_frame, "product frame": product_frame}


def rewritten(text: str, decoder: ModuleType) -> str:
    """The page with its tables made again."""

    def table(found: re.Match[str]) -> str:
        name, what, only = found["name"], found["what"], found["only"]
        if what in FIGURES:
            return f"{found['marker']}\n\n{FIGURES[what](decoder, name)}\n"
        rows = Part(decoder, name, what).table()
        if only:
            rows = [row for row in rows if row[2].startswith(only)]
        lines = "".join("| " + " | ".join(row) + " |\n" for row in rows)
        return f"{found['marker']}\n\n{HEAD}{lines}\n"

    marker = (
        r"(?P<marker><!-- (?P<name>\w+): (?P<what>\w+(?: \d+)?|\w+ frame)"
        r"(?:, only (?P<only>[\w ]+))? -->)"
    )
    return re.sub(marker + r"\n+(?:(?:\|.*\n)+\n*)*", table, text)


if __name__ == "__main__":
    sys.path.insert(0, str(SPEC / "vectors"))
    from make import load_decoder

    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), load_decoder()), encoding="utf-8")
