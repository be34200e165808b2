"""A decoder of .tsc 1.0, written from the pages beside it and sharing no code with tscfile.

It needs NumPy, zstandard, xxhash and blake3, favours plainness over speed, keeps the whole file in
memory and decodes all of it at once. It follows the order of the specification: words of tsc.md,
the container, the codecs by their numbers, books, token ids.

    File(open("session.tsc", "rb").read()).snapshots[-1]["tracks"][0]["rows"]

Archives of a book tier need the bytes of the book, `File(data, book)`, unless it is inside. Rows of
lossy tiers are computed in float64; `File.decoded` has the integers that they are made from.

    python spec/reference_decoder.py FILE.tsc [--book BOOK] [--snapshot N] [--tier TIER]

prints what the JSON beside the files of `vectors/valid` says. A file that section 15 of tsc.md
rejects raises `Damaged`, `Unsupported` or `Undecodable`; the command then says so on one line and
ends with 3, 5 or 4. How much memory a hostile file may take is not bounded here.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import sys
from fractions import Fraction
from functools import cached_property

import numpy as np
import xxhash
import zstandard
from blake3 import blake3

CHUNK, OPAQUE, SNAPSHOT, INDEX, BASIS, BOOK, CODEBOOKS = range(1, 8)
RAW, FIELDS, BOOK_TRANSFORM, SESSION_TRANSFORM = range(4)
REFINEMENT, BOOK_EXACT, PRODUCT, DIFFERENCE = range(4, 8)
EXACT = (RAW, FIELDS, BOOK_EXACT, DIFFERENCE)
LOSSY = (BOOK_TRANSFORM, SESSION_TRANSFORM, REFINEMENT, PRODUCT)
BLOCKS = {  # element type: (elements, bytes, has minimum, bits of a code); registry.md, fields.md
    2: (32, 18, False, 4), 3: (32, 20, True, 4), 6: (32, 22, False, 5), 7: (32, 24, True, 5),
    8: (32, 34, False, 8), 20: (32, 18, False, 4),
}  # fmt: skip
FLOATS = {0: 4, 1: 2, 30: 2}
ELEMENT_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl",
    30: "bf16",
}  # fmt: skip
MOST_RAW = 1 << 30
MOST_LOSSY = 1 << 25
MOST_CONTEXTS = 64
MOST_SOURCE_CHAIN = 8
MOST_SOURCE_WAYS = 256


class Rejected(Exception):
    """The file, or a part that was asked for, is not decoded; `kind` is as in tsc.md, section 15,
    and ``code`` what the command ends with."""


class Damaged(Rejected):
    """The file breaks a rule of the specification."""

    kind, code = "damaged", 3


class Unsupported(Rejected):
    """It needs something that version 1.0 does not have."""

    kind, code = "unsupported", 5


class Undecodable(Rejected):
    """It cannot be decoded with what is given."""

    kind, code = "cannot be decoded with what is given", 4


def need(condition, message, error=Damaged):
    if not condition:
        raise error(message)


# --- tsc.md, section 1: conventions; section 10: metadata; codecs/ints.md -----------------------


def checksum(data):
    return xxhash.xxh3_64_intdigest(data)


def short_hash(*parts):
    """16 bytes: ids of contents."""
    return blake3(b"".join(parts)).digest(length=16)


def unzstd(data, limit, dictionary=b""):
    """Content of a frame; ``dictionary`` is what it may copy from, raw content."""
    raw = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    try:
        size = zstandard.frame_content_size(data)
        need(0 <= size <= limit, "zstd content size")
        need(zstandard.get_frame_parameters(data).dict_id == 0, "zstd dictionary id")
        content = zstandard.ZstdDecompressor(dict_data=raw).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError:
        raise Damaged("zstd frame") from None
    need(len(content) == size, "zstd content size")
    return content


class Cursor:
    """Reads fields one after another."""

    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def take(self, n):
        need(0 <= n <= len(self.data) - self.at, "bytes run out")
        self.at += n
        return self.data[self.at - n : self.at]

    def rest(self):
        return self.take(len(self.data) - self.at)

    def end(self):
        need(self.at == len(self.data), "bytes left over")

    def u8(self):
        return self.take(1)[0]

    def fixed(self, layout):
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def uvarint(self, limit=(1 << 64) - 1):
        value = 0
        for shift in range(0, 70, 7):
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                need((byte or not shift) and value <= limit, "uvarint out of range")
                return value
        raise Damaged("uvarint without end")

    def several(self, read, limit=(1 << 64) - 1):
        """A count and as many items, each of at least one byte."""
        n = self.uvarint(limit)
        need(n <= len(self.data) - self.at, "more items than bytes")
        return [read() for _ in range(n)]

    def string(self):
        try:
            return self.take(self.uvarint()).decode()
        except UnicodeDecodeError:
            raise Damaged("a string is not UTF-8") from None

    def ref(self):
        return self.uvarint(), self.uvarint()

    def zigzag(self):
        u = self.uvarint()
        return u >> 1 ^ -(u & 1)

    def frame_runs(self, contexts=True):
        """Section 7.3: of each run block, first, count and, where they have them, context and
        shift."""
        expected, runs = 0, []
        for _ in range(self.uvarint()):
            block = expected + self.zigzag()
            run = [block, self.uvarint(), self.uvarint()]
            if contexts:
                context = self.uvarint(MOST_CONTEXTS)
                run += [context, self.zigzag() if context else 0]
                need(abs(run[-1]) < 1 << 32, "shift of a frame run")
            need(block >= 0, "block number")
            runs.append(tuple(run))
            expected = block + 1
        return runs

    def metadata(self):
        entries = self.several(lambda: (self.string(), self.value(self.u8())))
        need(len(dict(entries)) == len(entries), "a metadata key occurs twice")
        return dict(entries)

    def value(self, type_):
        if type_ == 9:
            item = self.u8()
            need(item in (7, 8) or item in SCALARS, "type of metadata items")
            return self.several(lambda: self.value(item))
        if type_ in (7, 8):
            return bool(self.u8()) if type_ == 7 else self.string()
        need(type_ in SCALARS, "metadata value type")
        return self.fixed(SCALARS[type_])[0]

    def ints(self, n):
        return decode_ints(self.u8(), self.take(self.uvarint()), n)


SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), "BbHhIifQqd", strict=True))


def decode_ints(coding, data, n):
    """int32 [n]"""
    need(coding <= 2, "ints coding")
    if coding == 0:
        body, parts, left = Cursor(data), [np.zeros(0, np.int64)], n
        while body.at < len(data):
            start, step, count = body.zigzag(), body.zigzag(), body.uvarint()
            need(1 <= count <= left, "number of integers")
            for value in (start, start + step * (count - 1)):
                need(-(1 << 31) <= value < 1 << 31, "an integer leaves 32 bits")
            parts.append(start + step * np.arange(count) if count > 1 else np.array([start]))
            left -= count
        need(not left, "number of integers")
        return np.concatenate(parts).astype(np.int32)
    raw = unzstd(data, 4 * n)
    need(len(raw) == 4 * n, "number of integers")
    planes = np.frombuffer(raw, np.uint8).reshape(4, n)
    values = np.ascontiguousarray(planes.T).view("<i4").reshape(n)
    return np.cumsum(values, dtype=np.int32) if coding == 2 else values


# --- tsc.md, sections 2 to 9, 11 and 13: the container ------------------------------------------


class File:
    """What is in a file: ``snapshots``, dicts with tokens, source, tracks, opaque and the like; see
    `_snapshot` and `_track`.

    ``book``: bytes of a book. ``tier``: of snapshots with quality layers the one to read, where
    they have it, else the last. ``only``: number of the only snapshot whose rows are decoded;
    tracks of the others have none. ``blocks``: the entries of the indices. ``decoded``: of each
    (block, layer) that was read what it holds, before positions and tokens come in. ``books``:
    bytes of the books inside and of the one given, by id.
    """

    def __init__(self, data, book=None, tier=None, only=None):
        self.data, self.tier, self.only = data, tier, only
        self.books, self._opened, self._learnt, self._held = {}, {}, {}, {}
        if book is not None:
            self.books[book[-32:].hex()] = book
        self.version = self._header()
        ref, self.end = self._find_trailer()
        self.blocks, snapshots, self.extras = self._read_chain(ref)
        for type_, _, place in self.extras:
            if type_ == BOOK:
                inside = self.payload(place, BOOK)[0]
                self.books[inside[-32:].hex()] = inside
        self.decoded, self.snapshots = {}, []
        for ref in snapshots:
            self.snapshots.append(self._snapshot(Cursor(self.payload(ref, SNAPSHOT)[0])))

    # Sections 3, 4 and 9.

    def _header(self):
        need(self.data[:8] == b"\x89TSC\r\n\x1a\n" and len(self.data) >= 32, "magic")
        major, minor, required, _, _, check = struct.unpack("<HHIIIQ", self.data[8:32])
        need(check == checksum(self.data[:24]), "header checksum")
        need(major == 1, "major version is not known", Unsupported)
        need(not required, "a required feature is not known", Unsupported)
        return f"{major}.{minor}"

    def payload(self, ref, type_, end=None):
        """Payload of the record at a reference, and its checksum."""
        offset, length = ref
        end = self.end if end is None else end
        need(24 <= length <= end - offset, "reference outside the file")
        head = self.data[offset : offset + 24]
        got, _, padding, check, size, payload_check = struct.unpack("<BBHIQQ", head)
        need(check == checksum(head[:4] + head[8:]) & 0xFFFFFFFF, "record header checksum")
        need(got == type_ and 24 + padding + size == length, "not the record that was meant")
        payload = self.data[offset + 24 + padding : offset + length]
        need(payload_check == checksum(payload), "payload checksum")
        return payload, payload_check

    def _find_trailer(self):
        for t in range(len(self.data) - 32, 31, -1):
            if self.data[t + 24 : t + 32] != b"\x89TSCEND\n":
                continue
            offset, length, check = struct.unpack("<QQQ", self.data[t : t + 24])
            if check == checksum(self.data[t : t + 16] + struct.pack("<Q", t)):
                try:
                    self.payload((offset, length), INDEX, end=t)
                    return (offset, length), t + 32
                except Damaged:
                    pass
        raise Damaged("no whole index")

    # Section 8: the indices.

    def _read_chain(self, ref):
        """Blocks, references of snapshots and extras, oldest first."""
        chain = []
        while ref[1]:
            c = Cursor(self.payload(ref, INDEX)[0])
            previous = c.ref()
            need(previous[0] < ref[0] and len(chain) < 4096, "chain of indices")
            first_block, blocks = c.uvarint(), []
            for number in range(first_block, first_block + c.uvarint()):
                blocks.append(block_entry(c, number))
            first_snapshot, snapshots = c.uvarint(), c.several(c.ref)
            extras = c.several(lambda c=c: (c.u8(), c.u8(), c.ref()))
            c.end()
            for type_, flags, _ in extras:
                known = CHUNK <= type_ <= CODEBOOKS
                need(known or not flags & 1, "a critical record is not known", Unsupported)
            chain.append((first_block, blocks, first_snapshot, snapshots, extras))
            ref = previous
        blocks, snapshots, extras = [], [], []
        for first_block, more, first_snapshot, refs, others in reversed(chain):
            need((first_block, first_snapshot) == (len(blocks), len(snapshots)), "numbering")
            blocks, snapshots, extras = blocks + more, snapshots + refs, extras + others
        return blocks, snapshots, extras

    def _record(self, type_, id_):
        """Payload and offset of the extra with this checksum, the oldest of equal ones."""
        for got, _, ref in self.extras:
            if got == type_ and self.payload(ref, type_)[1] == id_:
                return self.payload(ref, type_)[0], ref[0]
        raise Damaged("a record that the file does not have")

    # Section 7: snapshots.

    def _snapshot(self, c):
        number, parent, dictionary = c.uvarint(), c.uvarint(), c.uvarint()
        need(number == len(self.snapshots), "number")
        need(max(parent, dictionary) <= number, "parent or dictionary")
        lists = [(0, token_fields(c))]
        lists += c.several(lambda: (c.uvarint(), token_fields(c)), limit=MOST_CONTEXTS)
        known = [np.zeros(0, np.int32)]  # tokens and contexts of the parent
        if parent:
            known = [self.snapshots[parent - 1]["tokens"], *self.snapshots[parent - 1]["contexts"]]
        for source, (kept, *_) in lists:
            need(source < len(known) and kept <= len(known[source]), "kept tokens")
        length, like = c.uvarint(limit=MOST_RAW), usual_metadata()
        if dictionary:
            like = self.snapshots[dictionary - 1]["structure"][-65536:]
        structure = unzstd(c.rest(), length, like)
        need(len(structure) == length, "length of the structure")
        out = {"number": number, "parent": parent - 1 if parent else None, "structure": structure}
        c = Cursor(structure)
        out |= {"plan": c.string(), "tier": c.string(), "name": c.string()}
        out |= {"source": c.metadata(), "identity": c.metadata(), "coding": c.metadata()}
        out["tokens"], *out["contexts"] = (
            self._tokens(fields, known[source], out) for source, fields in lists
        )
        out["tracks"] = c.several(lambda: self._track(c, out))
        opaque = c.several(lambda: self._opaque(c))
        c.end()
        out["opaque"] = dict(opaque)
        need(len(out["opaque"]) == len(opaque), "an opaque name occurs twice")
        places = {(track["cache"], track["stream"]) for track in out["tracks"]}
        need(len(places) == len(out["tracks"]), "a track occurs twice")
        if self.only in (None, number):
            for track in out["tracks"]:
                self._decode_track(track, out)
        return out

    def _tokens(self, fields, before, snapshot):
        """Section 7.8; ``before``: what tokens are kept of."""
        kept, n, coding, ids = fields
        need(coding <= 4, "token coding")
        if coding <= 2:
            new = decode_ints(coding, ids, n)
        else:
            tables = self.book(snapshot).token_tables if coding == 4 else None
            new = decode_token_ids(ids, n, tables, before[:kept].tolist())
        return np.concatenate([before[:kept], new])

    def _track(self, c, snapshot):
        """Sections 7.1 to 7.4: tensors are (layer, role, element type, row bytes, rotation); of a
        run of frames block, first, count, context and shift."""
        out = {"cache": c.uvarint(65535), "stream": c.uvarint(65535), "attributes": c.metadata()}
        out["tensors"] = sum(c.several(lambda: tensor_run(c)), [])
        runs = out["runs"] = c.frame_runs()
        n = sum(count for _, _, count, *_ in runs)
        need(n <= sum(block["frames"] for block in self.blocks), "more cells than frames")
        for number, first, count, context, _ in runs:
            self._check_run(number, first, count)
            need(context <= len(snapshot["contexts"]), "context of a frame run")
            need(not context or not is_absent(self.blocks[number]), "context of absent frames")
            self._check_block(number, out["tensors"], snapshot)
        out["pos"], out["seq_counts"] = c.ints(n), c.ints(n)
        at = 0
        for _, _, count, context, shift in runs:
            there = out["pos"][at : at + count].astype(np.int64) - shift
            need(not context or (there == there.astype(np.int32)).all(), "position in a context")
            at += count
        n_ids = int(out["seq_counts"].sum(dtype=np.int64))
        need((out["seq_counts"] >= 0).all() and n_ids <= 256 * max(n, 1), "sequences of a cell")
        out["seq_ids"] = c.ints(n_ids)
        columns = c.several(lambda: cell_column(c, out["pos"], snapshot["tokens"]), limit=16)
        return out | {"columns": columns}

    def _check_run(self, number, first, count):
        need(number < len(self.blocks), "block number")
        need(first + count <= self.blocks[number]["frames"], "frame run outside its block")

    def _check_block(self, number, tensors, snapshot):
        """Of a block whose frames a track has, and all that it is a difference to: sections 7.3,
        7.6, 8 and 13."""
        level, chain, found = {number}, 0, set()
        while level:
            found |= level
            need(chain <= MOST_SOURCE_CHAIN, "chain of sources")
            for block in (self.blocks[each] for each in level):
                if not is_absent(block):
                    layers_of(block, tensors)
                codecs = {chunk["codec"] for chunk in block["chunks"]}
                if codecs & {BOOK_TRANSFORM, REFINEMENT, BOOK_EXACT}:
                    named = isinstance(snapshot["coding"].get("book"), str)
                    need(named, "frames of a book, none is named")
                for run in block["sources"]:
                    self._check_source(run)
            level = {source for each in level for source, *_ in self.blocks[each]["sources"]}
            chain += 1
        ways = {}
        for each in sorted(found):
            sources = {source for source, *_ in self.blocks[each]["sources"]}
            ways[each] = sum(1 + ways[source] for source in sources)
            need(ways[each] <= MOST_SOURCE_WAYS, "ways to sources")

    def _check_source(self, run):
        """Section 8."""
        self._check_run(*run)
        chunks = self.blocks[run[0]]["chunks"]
        need(chunks and chunks[-1]["codec"] not in LOSSY, "a source is not exact")

    def _opaque(self, c):
        """Sections 6 and 7.5."""
        name, ref, length, id_ = c.string(), c.ref(), c.uvarint(), c.take(16)
        content = unzstd(self.payload(ref, OPAQUE)[0], length)
        need(len(content) == length and short_hash(content) == id_, "opaque part")
        return name, content

    def book(self, snapshot):
        """The book that a snapshot names."""
        wanted = snapshot["coding"].get("book")
        need(isinstance(wanted, str), "no book is named")
        need(wanted in self.books, f"book {wanted} is needed", Undecodable)
        if wanted not in self._opened:
            self._opened[wanted] = Book(self.books[wanted])
        return self._opened[wanted]

    # Sections 11 and 13: frames.

    def _decode_track(self, track, snapshot):
        """Rows, uint8 [cells, row bytes] of each tensor, and ``absent``: cells whose frames are not
        stored; their rows have no meaning."""
        n = len(track["pos"])
        track["absent"] = []
        track["rows"] = [np.zeros((n, tensor[3]), np.uint8) for tensor in track["tensors"]]
        at = 0
        for number, first, count, context, shift in track["runs"]:
            pos, span = track["pos"][at : at + count], slice(first, first + count)
            if is_absent(self.blocks[number]):
                self._check_absent(pos, snapshot["tokens"])
                track["absent"] += range(at, at + count)
            elif count and track["tensors"]:
                known, there = snapshot["tokens"], pos
                if context:
                    known = snapshot["contexts"][context - 1]
                    there = (pos.astype(np.int64) - shift).astype(np.int32)
                place = known, there, pos
                found = self._frames(number, span, snapshot, track["tensors"], place)
                for rows, part in zip(track["rows"], found, strict=True):
                    rows[at : at + count] = part
            at += count

    def _check_absent(self, pos, tokens):
        """Section 7.3."""
        last = int(pos.max(initial=-1))
        need(pos.min(initial=0) >= 0 and last < len(tokens), "tokens of absent frames")
        need(tokens[: last + 1].min(initial=0) >= 0, "tokens of absent frames")

    def _frames(self, number, span, snapshot, tensors, place):
        """Rows of the frames ``span`` of a block. ``place``: the tokens that they are decoded from,
        their positions there, and those of their cells."""
        layers, coding = layers_of(self.blocks[number], tensors), snapshot["coding"]
        names = coding.get("layers")
        names = names if isinstance(names, list) and names else [snapshot["tier"]]
        wanted = names.index(self.tier) if self.tier in names else len(names) - 1
        layer = min(wanted, len(layers) - 1)
        codec, held = layers[layer][0]["codec"], self._layer(number, layer, snapshot, tensors)
        if codec in (BOOK_TRANSFORM, REFINEMENT):
            book, pairing = self._book_and_pairing(snapshot)
            steps = step_of(held["log_steps"][span])
            vectors = held["integers"][span] * steps[:, None]
            return book.rows(vectors, tensors, place, pairing)
        if codec == SESSION_TRANSFORM:
            basis = self._basis(held["basis"], coding)
            integers, shifts = held["integers"][span], held["shifts"][span]
            return session_rows(integers, shifts, basis, tensors, place[2])
        if codec == PRODUCT and held["codebooks"]:
            learnt = self._codebooks(held["codebooks"], coding)
            return product_session_rows(held["frames"][span], learnt, tensors, place[2])
        if codec == PRODUCT:
            book, pairing = self._book_and_pairing(snapshot)
            return product_book_rows(held["frames"][span], book, tensors, place, pairing)
        return [rows[span] for rows in held["rows"]]

    def _layer(self, number, layer, snapshot, tensors):
        """What a layer of a block holds; it is decoded once, whole."""
        # Whoever shares a block with other tensors or another book is not to find it here.
        key = number, layer, tuple(tensors), snapshot["coding"].get("book")
        if key not in self._held:
            block = self.blocks[number]
            layers, held = layers_of(block, tensors), None
            if layers[layer][0]["codec"] in LOSSY:
                for (chunk,) in layers[: layer + 1]:
                    held = self._chunk(block, chunk, tensors, snapshot, held)
            else:
                parts = [self._chunk(block, chunk, tensors, snapshot) for chunk in layers[layer]]
                held = {"rows": [rows for part in parts for rows in part["rows"]]}
                whole = [rows.tobytes() for rows in held["rows"]]
                need(short_hash(*whole) == block["content_id"], "content id")
            self._held[key] = self.decoded[number, layer] = held
        return self._held[key]

    def _chunk(self, block, chunk, tensors, snapshot, below=None):
        """What a chunk holds, section 5; ``below``: the layer that it refines."""
        payload, check = self.payload(chunk["ref"], CHUNK)
        c = Cursor(payload)
        codec, layer, n_frames = c.u8(), c.u8(), c.uvarint(limit=65536)
        first, type_, row_bytes = c.uvarint(), c.uvarint(limit=65535), row_lengths(c)
        raw = n_frames * sum(row_bytes)
        need(1 <= raw <= MOST_RAW, "raw length of a chunk")
        said = [check, codec, layer, first, len(row_bytes), raw]
        keys = ("check", "codec", "layer", "first", "tensors", "raw")
        need(said == [chunk[key] for key in keys], "chunk and index differ")
        meant = tensors[first : first + len(row_bytes)]
        need(n_frames == block["frames"], "frames of a chunk")
        need(row_bytes == [tensor[3] for tensor in meant], "tensors of a chunk")
        types = [tensor[2] for tensor in meant]
        need(set(types[:1] if codec == DIFFERENCE else types) == {type_}, "type of a chunk")
        need(codec <= DIFFERENCE, f"codec {codec} is not known", Unsupported)
        need(codec < BOOK_TRANSFORM or raw <= MOST_LOSSY, "raw length of a chunk")
        if codec == RAW:
            rows = [np.frombuffer(c.take(n_frames * n), np.uint8).reshape(-1, n) for n in row_bytes]
            held = {"rows": rows}
        elif codec == FIELDS:
            held = {"rows": decode_fields(c, n_frames, type_, row_bytes)}
        elif codec in (BOOK_TRANSFORM, REFINEMENT):
            book, _ = self._book_and_pairing(snapshot)
            book.check_track(tensors)
            if codec == BOOK_TRANSFORM:
                segments = decode_segments(c, n_frames, book)
            else:
                segments = decode_refinement(c, below["segments"], book)
            log_steps = np.concatenate([np.full(len(values), step) for step, values in segments])
            integers = np.concatenate([values for _, values in segments])
            held = {"segments": segments, "log_steps": log_steps, "integers": integers}
        elif codec == SESSION_TRANSFORM:
            (id_,) = c.fixed("Q")
            integers, shifts = session_integers(c, n_frames, self._basis(id_, snapshot["coding"]))
            held = {"basis": id_, "shifts": shifts, "integers": integers}
        elif codec == BOOK_EXACT:
            need(type_ in EXACT_TYPES, "element type of an exact chunk")
            book, _ = self._book_and_pairing(snapshot)
            book.check_track(tensors)
            names = [tensor[1::-1] for tensor in tensors]
            patterns = exact_rows(c, n_frames, type_, names, book.exact_tables)
            held = {"rows": [patterns[name].view(np.uint8) for name in names]}
        elif codec == DIFFERENCE:
            base = self._sources(block, tensors, snapshot)
            held = {"rows": difference_rows(c, base, [tensor[1:3] for tensor in tensors])}
        else:
            (id_,) = c.fixed("Q")
            if id_:
                n_stages = len(self._codebooks(id_, snapshot["coding"])["stages"])
            else:
                n_stages = len(self._book_and_pairing(snapshot)[0].product_stages)
            frames = product_frames(c, n_frames, n_stages, sum(row_bytes))
            held = {"codebooks": id_, "frames": frames}
        c.end()
        return held

    def _sources(self, block, tensors, snapshot):
        """Rows that a block is the difference to, section 8."""
        parts = []
        for number, first, count in block["sources"]:
            last = len(layers_of(self.blocks[number], tensors)) - 1
            held = self._layer(number, last, snapshot, tensors)
            parts.append([rows[first : first + count] for rows in held["rows"]])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def _book_and_pairing(self, snapshot):
        """Of a snapshot with frames of its book, section 7.6; the book must be for its model."""
        book, pairing = self.book(snapshot), snapshot["coding"].get("rope_pairing")
        need(pairing in ("norm", "neox"), "pairing of the keys", Unsupported)
        for key, value in snapshot["identity"].items():
            need(is_fact(key, value), "type of a fact of the identity")
            free = key in ("name", "rope_pairing") or key.startswith("book.")
            same = free or same_fact(value, book.facts.get(key, value))
            need(same, f"the book is for another model: {key}", Undecodable)
        return book, pairing

    def _basis(self, id_, coding):
        """A basis that the snapshot names, with all that it extends."""
        need_named(id_, coding.get("bases"))
        if id_ not in self._learnt:
            (payload, offset), chain = self._record(BASIS, id_), []
            while True:
                chain.append(payload)
                need(len(chain) <= 256, "chain of bases")
                (parent,) = Cursor(payload).fixed("Q")
                if not parent:
                    break
                before = offset
                payload, offset = self._record(BASIS, parent)
                need(offset < before, "chain of bases")
            found = None
            for payload in reversed(chain):
                found = read_basis(payload, found)
            self._learnt[id_] = found
        return self._learnt[id_]

    def _codebooks(self, id_, coding):
        need_named(id_, coding.get("codebooks"))
        if id_ not in self._learnt:
            self._learnt[id_] = read_codebooks(self._record(CODEBOOKS, id_)[0])
        return self._learnt[id_]


def need_named(id_, names):
    """Section 7.6: ``names`` are the ids that a snapshot lists."""
    named = isinstance(names, list) and f"{id_:016x}" in names
    need(named, "a record that the snapshot does not name")


IDENTITY = {  # section 12: types of the keys; of lists, those of the items
    "architecture": str, "name": str, "n_layers": int, "n_heads": int, "n_kv_heads": int,
    "head_dim_k": int, "head_dim_v": int, "rope_base": float, "rope_dim": int, "rope_scaling": str,
    "rope_scaling_factor": float, "rope_scaling_original_context": float, "rope_pairing": str,
    "sliding_window": int, "vocab_size": int, "tokenizer_blake3": str, "weights_blake3": str,
}  # fmt: skip


def is_fact(key, value):
    """Section 12: is it of the type that the key has? Numbers are not below 0, or finite."""
    kind = IDENTITY.get(key)
    per_layer = key in ("n_heads", "n_kv_heads", "head_dim_k", "head_dim_v")
    if per_layer and isinstance(value, list):
        return bool(value) and all(is_fact("n_layers", each) for each in value)
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 63
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return kind is None or isinstance(value, kind)


def same_fact(a, b):
    """Section 12: floats count as equal within a millionth."""
    if isinstance(a, float) and isinstance(b, float | int):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    return same_fact(b, a) if isinstance(b, float) and isinstance(a, int) else a == b


def token_fields(c):
    """Kept tokens, new tokens, coding and bytes."""
    kept, n, coding = c.uvarint(limit=2**31 - 1), c.uvarint(limit=2**31 - 1), c.u8()
    return kept, n, coding, c.take(c.uvarint())


def block_entry(c, number):
    """Section 8."""
    frames, content_id, logical_id = c.uvarint(limit=65536), c.take(16), c.take(16)
    need(frames, "a block without frames")
    chunks = c.several(lambda: chunk_entry(c))
    entry = {"frames": frames, "content_id": content_id, "logical_id": logical_id}
    sources = []
    if any(chunk["codec"] == DIFFERENCE for chunk in chunks):
        sources = c.frame_runs(contexts=False)
        need(all(block < number for block, *_ in sources), "a source that is not earlier")
        need(sum(count for *_, count in sources) == frames, "number of source frames")
    return entry | {"chunks": chunks, "sources": sources}


def chunk_entry(c):
    entry = {"ref": c.ref(), "check": c.fixed("Q")[0], "codec": c.u8(), "layer": c.u8()}
    return entry | {"first": c.uvarint(), "tensors": c.uvarint(), "raw": c.uvarint(limit=MOST_RAW)}


def is_absent(block):
    return not block["chunks"] and block["content_id"] == bytes(16)


def layers_of(block, tensors):
    """Chunks of each quality layer of a block; sections 7.3 and 13."""
    chunks = block["chunks"]
    last = chunks[-1]["layer"] if chunks else 0
    need(last < 16, "quality layers")
    layers = [[chunk for chunk in chunks if chunk["layer"] == n] for n in range(last + 1)]
    need(sum(layers, []) == chunks, "order of the chunks")
    below = set()
    for n, layer in enumerate(layers):
        at = 0
        for chunk in layer:
            held = tensors[at : at + chunk["tensors"]]
            raw = block["frames"] * sum(tensor[3] for tensor in held)
            need((chunk["first"], chunk["raw"]) == (at, raw), "tensors of a layer")
            at += chunk["tensors"]
        need(at == len(tensors), "tensors of a layer")
        codecs = {chunk["codec"] for chunk in layer}
        if max(codecs, default=0) > DIFFERENCE:
            pass  # of a later version, and no matter where it is not asked for
        elif codecs & set(LOSSY):
            need(len(layer) == 1, "one chunk in a lossy layer")
            refines = codecs == {REFINEMENT}
            need(refines == (n > 0), "codec of a layer")
            newer = max(below, default=0) > DIFFERENCE
            fits = newer or below <= {BOOK_TRANSFORM, REFINEMENT}
            need(not refines or fits, "what a layer refines")
        else:
            need(n == last, "a layer above the exact one")
            several = codecs.isdisjoint({BOOK_EXACT, DIFFERENCE})
            need(several or len(layer) == 1, "one chunk in the layer")
        below = codecs
    return layers


def tensor_run(c):
    """Section 7.2; rotation is -1 where the source does not tell."""
    layer, count, role = c.uvarint(limit=65535), c.uvarint(limit=65535), c.u8()
    need(role <= 1, "role of a tensor")
    type_, row_bytes = c.uvarint(limit=65535), c.uvarint(limit=MOST_RAW)
    size = BLOCKS[type_][1] if type_ in BLOCKS else FLOATS.get(type_, 1)
    need(row_bytes and not row_bytes % size, "row bytes of a tensor")
    rotation = c.uvarint(limit=1 << 32) - 1
    return [(layer + i, role, type_, row_bytes, rotation) for i in range(count)]


def cell_column(c, pos, tokens):
    """Section 7.4."""
    coding = c.u8()
    need(coding <= 2, "cell column")
    if coding == 2:
        inside = (pos >= 0) & (pos < len(tokens))
        return np.where(inside, np.append(tokens, 0)[np.where(inside, pos, 0)], -1).astype(np.int32)
    return pos if coding == 1 else c.ints(len(pos))


def row_lengths(c):
    """Row bytes of each tensor of a chunk, section 5."""
    found = []
    for _ in range(c.uvarint()):
        count = c.uvarint(limit=65535 - len(found))
        found += count * [c.uvarint(limit=MOST_RAW)]
    return found


USUAL_METADATA = {  # section 7.7
    "has_outputs": False, "has_streams": True, "ext_bytes": 0, "has_rotation": False,
    "container": "sequence", "version": 9, "generation": "G", "parts": "kv", "kind": "plain",
    "n_stream": [1], "cell_counts": [0], "arch": "llama", "token_form": "plain", "v_trans": 0,
    "format": "llama.cpp", "attributes": "transformers", "layers": [0, 1, 2, 3, 4, 5, 6, 7],
    "sliding_window": 4096, "rope_scaling_factor": 1.0, "rope_scaling_original_context": 8192,
    "architecture": "qwen3", "name": "llama", "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
    "head_dim_k": 128, "head_dim_v": 128, "rope_base": 10000.0, "rope_dim": 128,
    "rope_scaling": "none", "vocab_size": 128256, "tokenizer_blake3": "0123456789abcdef",
    "weights_blake3": "0123456789abcdef", "book": "0123456789abcdef", "log_step": 0,
    "expected_kl": 0.01, "rope_pairing": "neox", "full": "norm", "keyframe": "balanced",
    "append": "lossless", "truncate+append": "session",
}  # fmt: skip


def usual_metadata():
    """Bytes of `USUAL_METADATA`, which the structure of a snapshot without parent copies from."""

    def uvarint(n):
        return bytes([n]) if n < 128 else bytes([n & 0x7F | 0x80]) + uvarint(n >> 7)

    def string(text):
        return uvarint(len(text)) + text.encode()

    def value(v):
        for kind, type_, to_bytes in (
            (bool, 7, lambda v: bytes([v])), (str, 8, string),
            (int, 10, lambda v: struct.pack("<Q", v)), (float, 12, lambda v: struct.pack("<d", v)),
        ):  # fmt: skip
            if isinstance(v, kind):
                return bytes([type_]) + to_bytes(v)
        items = [value(item) for item in v]
        return b"\x09" + items[0][:1] + uvarint(len(v)) + b"".join(item[1:] for item in items)

    entries = [string(key) + value(v) for key, v in USUAL_METADATA.items()]
    return uvarint(len(entries)) + b"".join(entries)


# --- codec 1: codecs/fields.md and codecs/classed-rans.md ---------------------------------------


def decode_fields(c, n_frames, element_type, row_bytes):
    """Rows, uint8 [n_frames, row bytes] of each tensor."""
    if element_type in BLOCKS:
        elements, block, has_minimum, code_bits = BLOCKS[element_type]
        layout = [(16, 1)] * (1 + has_minimum) + [(code_bits, elements)]
    else:
        block = FLOATS.get(element_type, 1)
        layout = [(8 * block, 1)]
    counts = [n // block for n in row_bytes]
    parts = []
    for bits, per_block in layout:
        data = c.take(c.uvarint())
        matrix = decode_stream(data, bits, n_frames, per_block * sum(counts))
        parts.append(np.split(matrix, per_block * np.cumsum(counts)[:-1], axis=1))
    if element_type not in BLOCKS:
        return [part.astype(f"<u{block}").view(np.uint8) for part in parts[0]]
    return [join_blocks(part, n_frames, code_bits) for part in zip(*parts, strict=True)]


def join_blocks(part, n_frames, code_bits):
    *halves, codes = part
    pieces = [half.astype("<u2").view(np.uint8).reshape(n_frames, -1, 2) for half in halves]
    codes = codes.astype(np.uint8).reshape(n_frames, -1, 32)
    if code_bits == 5:
        pieces.append(np.packbits(codes >> 4, axis=2, bitorder="little"))
    if code_bits < 8:
        codes = codes[:, :, :16] & 15 | codes[:, :, 16:] << 4
    return np.concatenate([*pieces, codes], axis=2).reshape(n_frames, -1)


def decode_stream(data, bits, n_rows, n_columns):
    """uint32 [n_rows, n_columns] of a classed-rans stream."""
    c, n = Cursor(data), n_rows * n_columns
    low_bits = c.u8()
    need(low_bits <= bits, "low bits")
    out = np.zeros(n, np.uint32)
    whole, width = divmod(low_bits, 8)
    for p in range(whole):
        out |= read_plane(c, n).astype(np.uint32) << (8 * p)
    if width:
        packed = read_plane(c, width * -(-n // 8))
        out |= unpack_plane(packed, width, n).astype(np.uint32) << (8 * whole)
    if low_bits < bits:
        out |= decode_high(c, n, n_columns, bits - low_bits) << low_bits
    c.end()
    return out.reshape(n_rows, n_columns)


def read_plane(c, size):
    coding = c.u8()
    need(coding <= 1, "plane coding")
    raw = unzstd(c.take(c.uvarint()), size) if coding else c.take(size)
    need(len(raw) == size, "size of a plane")
    return np.frombuffer(raw, np.uint8)


def unpack_plane(packed, width, n):
    m = -(-n // 8)
    stored, runs = packed.reshape(width, m), np.zeros((8, m), np.uint8)
    runs[:width] = stored & ((1 << width) - 1)
    for q in range(8 - width):
        for a in range(width):
            runs[width + q] |= (stored[a] >> (width + q) & 1) << a
    return runs.reshape(-1)[:n]


def decode_high(c, n, n_columns, bits):
    tables = Cursor(unzstd(c.take(c.uvarint()), 4 + 512 + n_columns + 131072))
    n_symbols = tables.uvarint()
    need(1 <= n_symbols <= 256, "number of symbols")
    alphabet = np.array(tables.fixed(f"{n_symbols}H"), np.uint32)
    need((np.diff(alphabet.astype(int)) > 0).all(), "alphabet")
    need(int(alphabet[-1]) >> bits == 0, "alphabet")
    n_classes = tables.uvarint()
    need(1 <= n_classes <= 256, "number of classes")
    classes = np.frombuffer(tables.take(n_columns), np.uint8)
    need(classes.max() < n_classes, "class of a column")
    low, high = (np.frombuffer(tables.take(n_classes * n_symbols), np.uint8) for _ in range(2))
    tables.end()
    f = (low + 256 * high.astype(np.int64)).reshape(n_classes, n_symbols)
    lengths = list(c.fixed("32I"))
    return alphabet[decode_lanes(c.take(2 * sum(lengths)), lengths, f, classes, n)]


def decode_lanes(data, lengths, f, classes, n):
    """``n`` symbols, int64 [n]: those of lane ``l`` are l, l + N, …

    ``f``: [classes, symbols]; ``classes``: of each column, value ``i`` being in column
    ``i mod len(classes)``; ``lengths``: words of each lane.
    """
    need(1 <= len(lengths) <= 32 and min(lengths) >= 2, "lanes")
    need((f.sum(axis=1) == 4096).all(), "frequencies")
    first = (np.cumsum(f, axis=1) - f).tolist()
    symbol_of_slot = [np.repeat(np.arange(f.shape[1]), row).tolist() for row in f]
    f, classes, n_columns = f.tolist(), classes.tolist(), len(classes)
    words, stop = np.frombuffer(data, "<u2").tolist(), 0
    symbols = np.empty(n, np.int64)
    for lane, length in enumerate(lengths):
        at, stop = stop, stop + length
        x, at = words[at] << 16 | words[at + 1], at + 2
        found = []
        for i in range(lane, n, len(lengths)):
            k, slot = classes[i % n_columns], x & 0xFFF
            s = symbol_of_slot[k][slot]
            x = f[k][s] * (x >> 12) + slot - first[k][s]
            if x < 1 << 16:
                need(at < stop, "words of a lane")
                x, at = x << 16 | words[at], at + 1
            found.append(s)
        need(x == 1 << 16 and at == stop, "a lane does not end as it should")
        symbols[lane :: len(lengths)] = found
    return symbols


# --- codec 2: codecs/segments.md; the transform is that of the book, below ----------------------


def decode_segments(c, n_frames, book):
    """Segments of a chunk of codec 2: log_step and int64 values [n, R] of each."""
    sigmas = book.arrays["log_sigmas"].astype(np.int64)
    segments, left = [], n_frames
    while left:
        n, (log_step,) = c.uvarint(), c.fixed("h")
        need(1 <= n <= left, "frames of a segment")
        units = sigmas - log_step + 768
        stored = units >= 0
        classes = np.minimum(units[stored] // 64, 39)
        values = np.zeros((n, len(sigmas)), np.int64)
        values[:, stored] = decode_values(c, classes, n * len(classes), book).reshape(n, -1)
        segments.append((log_step, values))
        left -= n
    return segments


def decode_values(c, classes, n, book):
    """``n`` integers, int64; ``classes``: of each column."""
    if not n:
        return np.zeros(0, np.int64)
    lengths = c.several(c.uvarint, limit=32)
    frequencies = book.arrays["frequencies"].astype(np.int64)
    symbols = decode_lanes(c.take(2 * sum(lengths)), lengths, frequencies, classes, n)
    return with_escapes(c, symbols)


def with_escapes(c, symbols):
    """Values of symbols, int64; those of escapes are read."""
    values = (symbols + 1) // 2 * np.where(symbols % 2, 1, -1)
    for i in np.flatnonzero(symbols == 31):
        u = c.uvarint(limit=(1 << 32) - 1)
        values[i] = u >> 1 ^ -(u & 1)
    return values


def step_of(log_steps):
    """float64: book-transform.md, *Decoding* step 1."""
    return np.float32(2.0 ** (log_steps / 256)).astype(float)


# --- codecs/book-transform.md, steps 4 and 5, for all codecs that turn keys ---------------------


def turn(keys, pos, pairing, head_dim, inv_freq, scale=1.0):
    """Apply RoPE to float64 [n, channels] and put each head's pairs where the source does."""
    need(not keys.shape[1] % head_dim, "channels of a key head")
    angles = (pos.astype(np.float32)[:, None] * inv_freq).astype(float)  # float32 product
    cos, sin = np.cos(angles)[:, None] * scale, np.sin(angles)[:, None] * scale
    heads = keys.reshape(len(pos), -1, head_dim)
    m = len(inv_freq)
    a, b = heads[..., :m], heads[..., m : 2 * m]
    pair = np.stack([a * cos - b * sin, b * cos + a * sin], axis=2 if pairing == "neox" else 3)
    turned = pair.reshape(*heads.shape[:2], 2 * m)
    return np.concatenate([turned, heads[..., 2 * m :]], axis=2).reshape(keys.shape)


def as_rows(values, type_):
    """Round to nearest, ties to even."""
    need(type_ in FLOATS, "element type of a lossy chunk")
    with np.errstate(over="ignore"):
        if type_ == 30:
            bits = values.astype("<f4").view("<u4")
            stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
        else:
            stored = values.astype({0: "<f4", 1: "<f2"}[type_])
    return np.ascontiguousarray(stored).view(np.uint8)


def frame_order(tensors):
    """Indices of the tensors in the order of a frame's channels: keys by layer, values by layer."""
    return sorted(range(len(tensors)), key=lambda i: (tensors[i][1], tensors[i][0]))


# --- codec 3: codecs/session-transform.md -------------------------------------------------------


WIDTH_FREQUENCIES = """
4058 1 5 4
4046 1 11 10
4018 1 25 24
3959 1 54 54
3853 1 107 107
3688 1 189 188 2 2
3470 1 296 296 4 3
3211 1 421 421 8 8
2926 1 553 553 18 17 2 2
2633 1 677 677 39 39 3 3
2343 1 777 777 79 79 7 7 2 2
2067 1 843 843 140 140 16 16 3 3 2 2
1809 1 872 872 216 216 36 36 7 7 2 2
1574 1 866 865 294 294 70 70 15 15 5 5 2 2
1362 1 832 832 359 359 119 119 33 32 10 10 4 4 2 2
1173 1 781 781 404 404 173 173 62 62 21 21 8 8 3 3 2 2
1007 1 718 718 425 425 222 222 101 101 41 41 17 17 7 7 4 4 2 2 2 2
862 1 649 649 426 426 259 259 142 142 71 71 33 33 15 15 8 8 4 4 3 3 2 2 2 1
736 2 580 580 413 413 279 279 176 176 104 104 57 57 30 30 16 16 9 9 5 5 3 3 2 2 2 2 2 2
626 4 514 514 388 388 285 285 200 200 134 134 85 85 52 52 30 30 18 18 10 10 6 6 4 4 3 3 2 2 2 2
"""  # of each class: 0, the escape, then 1, -1, 2, -2, …; those that are left out have 1


def width_frequencies():
    """int64 [20, 32]"""
    f = np.ones((20, 32), np.int64)
    for row, line in zip(f, WIDTH_FREQUENCIES.strip().splitlines(), strict=True):
        row[0], row[31], *others = map(int, line.split())
        row[1 : 1 + len(others)] = others
    return f


def read_widths(c, n_columns):
    """int64 [n_columns]"""
    n, out = c.uvarint(limit=n_columns), np.zeros(n_columns, np.int64)
    if n:
        steps = np.frombuffer(unzstd(c.take(c.uvarint()), n), np.uint8)
        need(len(steps) == n, "number of widths")
        out[:n] = np.cumsum(steps.astype(np.int64)) % 256
    need(out.max(initial=0) <= 112, "width")
    return out


def read_matrix(c, n_rows, widths):
    """int64 [n_rows, columns]"""
    out, stored = np.zeros((n_rows, len(widths)), np.int64), np.flatnonzero(widths)
    if not len(stored) or not n_rows:
        return out
    low = np.maximum(0, -((20 - widths[stored]) // 4))
    classes = widths[stored] - 1 - 4 * low
    lengths = c.several(c.uvarint, limit=32)
    words = c.take(2 * sum(lengths))
    symbols = decode_lanes(words, lengths, width_frequencies(), classes, n_rows * len(stored))
    bits_of = [np.flatnonzero(low > b) for b in range(int(low.max()))]
    n_bits = n_rows * sum(len(columns) for columns in bits_of)
    packed = np.frombuffer(c.take(-(-n_bits // 8)), np.uint8)
    bits = np.unpackbits(packed, bitorder="little")[:n_bits].astype(np.int64)
    high = with_escapes(c, symbols).reshape(n_rows, -1)
    values = (high << low) - ((1 << low) >> 1)
    at = 0
    for b, columns in enumerate(bits_of):
        n = n_rows * len(columns)
        values[:, columns] += bits[at : at + n].reshape(n_rows, -1) << b
        at += n
    need((values >= -(1 << 31)).all() and (values < 1 << 31).all(), "an integer leaves 32 bits")
    out[:, stored] = values
    return out


def read_turn(c):
    """Pairing, head_dim and inv_freq; None where keys are taken as they stand."""
    turned = c.u8()
    need(turned <= 1, "how keys are turned")
    if not turned:
        return None
    pairing, head_dim, m = c.u8(), c.uvarint(limit=65536), c.uvarint(limit=65536)
    need(pairing <= 1 and head_dim >= max(1, 2 * m), "how keys are turned")
    inv_freq = np.frombuffer(c.take(4 * m), "<f4")
    need(np.isfinite(inv_freq).all(), "how keys are turned")
    return ("norm", "neox")[pairing], head_dim, inv_freq


def read_basis(payload, before=None):
    """The basis of a record; ``before`` is the one that it extends, where it names one."""
    c = Cursor(payload)
    (parent,) = c.fixed("Q")
    need(bool(parent) == (before is not None), "the basis that is extended")
    if parent:
        out = {"turn": before["turn"], "groups": [dict(g) for g in before["groups"]]}
    else:
        out = {"turn": read_turn(c), "groups": c.several(lambda: basis_group(c))}
    budget = 16 * len(payload) + (1 << 20)
    for group in out["groups"]:
        n_channels = sum(group["sizes"])
        n = c.uvarint(limit=n_channels) + (not parent)
        budget -= n * n_channels
        need(budget >= 0, "entries of a basis")
        exponents = np.frombuffer(c.take(n), np.int8).astype(float)
        widths = read_widths(c, n * len(group["sizes"])).reshape(n, len(group["sizes"]))
        entries = [read_matrix(c, size, widths[:, t]).T for t, size in enumerate(group["sizes"])]
        rows = np.concatenate(entries, axis=1) * 2.0 ** (-exponents[:, None] / 4)
        if not parent:
            group["mean"], group["rows"] = rows[0], rows[1:]
        else:
            group["rows"] = np.concatenate([group["rows"], rows])
        need(len(group["rows"]) <= n_channels, "more rows than channels")
    c.end()
    return out


def basis_group(c):
    """Tensors of a group, their channels and steps."""
    pairs = c.several(lambda: (c.uvarint(), c.uvarint(limit=MOST_RAW)))
    need(pairs and all(size for _, size in pairs), "tensors of a group")
    steps = np.frombuffer(c.take(4 * len(pairs)), "<f4").astype(float)
    need(np.isfinite(steps).all() and (steps > 0).all(), "steps")
    tensors, sizes = [i for i, _ in pairs], [size for _, size in pairs]
    return {"tensors": tensors, "sizes": sizes, "steps": steps}


def session_integers(c, n_frames, basis):
    """int64 [frames, R + C] and each frame's shift, of the body of a chunk behind the basis."""
    n_rows = sum(len(g["rows"]) for g in basis["groups"])
    n_channels = sum(sum(g["sizes"]) for g in basis["groups"])
    base = c.u8()
    widths = read_widths(c, n_rows + n_channels)
    parts, shifts, left = [], [], n_frames
    while left:
        n, extra, _ = c.uvarint(), c.u8(), c.fixed("f")
        need(1 <= n <= left, "frames of a segment")
        finer = np.where(widths, np.minimum(widths + extra, 112), 0)
        parts.append(read_matrix(c, n, finer))
        shifts.append(np.full(n, base + extra))
        left -= n
    return np.concatenate(parts), np.concatenate(shifts)


def session_rows(values, shifts, basis, tensors, pos):
    """uint8 [n, row bytes] of each tensor."""
    out = [None] * len(tensors)
    step = 2.0 ** (-shifts[:, None] / 4)
    held = sorted(i for g in basis["groups"] for i in g["tensors"])
    need(held == list(range(len(tensors))), "tensors of the basis")
    column, channel = 0, sum(len(g["rows"]) for g in basis["groups"])
    for g in basis["groups"]:
        own = [tensors[i] for i in g["tensors"]]
        need(frame_order(own) == list(range(len(own))), "order of a group")
        n_rows, n_channels = g["rows"].shape
        y = values[:, column : column + n_rows] @ g["rows"]
        y = (y + values[:, channel : channel + n_channels]) * step + g["mean"]
        column, channel = column + n_rows, channel + n_channels
        parts = np.split(y, np.cumsum(g["sizes"])[:-1], axis=1)
        for i, part, size, scale in zip(g["tensors"], parts, g["sizes"], g["steps"], strict=True):
            out[i] = real_rows(part * scale, size, tensors[i], basis["turn"], pos)
    return out


def real_rows(x, size, tensor, turned, pos):
    """Rows of a tensor from float64 [n, channels], keys not turned yet."""
    _, role, type_, row_bytes, _ = tensor
    need(type_ in FLOATS and size * FLOATS[type_] == row_bytes, "channels of a tensor")
    return as_rows(turn(x, pos, *turned) if role == 0 and turned else x, type_)


# --- codec 4: codecs/book-refinement.md ---------------------------------------------------------


def decode_refinement(c, below, book):
    """Segments as `decode_segments` gives them, from those of the layer below."""
    sigmas = book.arrays["log_sigmas"].astype(np.int64)
    segments = []
    for coarse, q in below:
        n, (fine,) = c.uvarint(), c.fixed("h")
        need(n == len(q) and 0 < coarse - fine <= 3072, "frames or step of a refinement")
        stored, known = sigmas - fine + 768 >= 0, sigmas - coarse + 768 >= 0
        ratio = int(np.floor(2.0 ** ((coarse - fine) / 256 + 16) + 0.5))
        centres = np.sign(q) * ((np.abs(q) * ratio + 32768) // 65536)
        narrow = np.where(q == 0, coarse - 362, coarse - 459)
        widths = np.where(known, np.minimum(sigmas, narrow), sigmas)
        classes = np.clip((widths - fine + 768) // 64, 0, 39)[:, stored].reshape(-1)
        values = np.zeros(q.shape, np.int64)
        found = decode_values(c, classes, len(classes), book).reshape(n, -1)
        values[:, stored] = centres[:, stored] + found
        need((values >= -(1 << 31)).all() and (values < 1 << 31).all(), "refined integers")
        segments.append((fine, values))
    return segments


# --- codec 5: codecs/book-exact.md --------------------------------------------------------------

EXACT_TYPES = {1: (10, -24), 30: (7, -133)}  # bits of fraction, log2 of the smallest number
ESCAPE = 102
BIN_WIDTHS = [0] * 32 + [2] * 8 + [4] * 4 + [5] * 4 + [8, 9, 10]  # log2, from the middle outwards
BIN_STARTS = [int(v) for v in np.cumsum([0, *(1 << width for width in BIN_WIDTHS)])]
BIN_START = [-v for v in BIN_STARTS[:0:-1]] + BIN_STARTS[:-1]  # of each symbol
BIN_WIDTH = BIN_WIDTHS[::-1] + BIN_WIDTHS
SINE = (1686629713, -693598668, 85569304, -5026994, 172272)
COSINE = (1073741824, -1324676119, 272378143, -22402376, 987035)


def shift(x, n):
    return x << min(n, 30) if n >= 0 else x >> min(-n, 62)


def outwards(x):
    """``out`` of the page."""
    return x if x >= 0 else -1 - x


def highest_bit(x):
    """``log2`` of the page."""
    return x.bit_length() - 1


def series(terms, q):
    total = terms[-1]
    for term in terms[-2::-1]:
        total = ((q * total) >> 30) + term
    return total


def exact_angle(position, inv_freq):
    """Step 1: cosine and sine of one pair at one position."""
    with np.errstate(all="ignore"):
        product = np.float32(position) * inv_freq
    t = float(product if np.isfinite(product) else 0) * 0.6366197723675814
    v = np.floor(t + 0.5)
    r = int(np.floor((t - v) * 2.0**30 + 0.5))
    q = (r * r) >> 30
    s, c = (((x + (1 << 14)) >> 15) for x in ((r * series(SINE, q)) >> 30, series(COSINE, q)))
    return [(c, s), (-s, c), (-c, -s), (s, -c)][int(np.mod(v, 4))]


class ExactLane:
    def __init__(self, words):
        self.words, self.at = words, 2
        self.state = words[0] << 32 | words[1]
        need(1 << 31 <= self.state < 1 << 63, "a lane's first state")

    def low(self, bits):
        return self.state & ((1 << bits) - 1)

    def leave(self, start, size, bits):
        """Step 5, an event of ``size`` of ``2^bits``."""
        self.state = size * (self.state >> bits) + self.low(bits) - start
        if self.state < 1 << 31:
            need(self.at < len(self.words), "words of a lane")
            self.state = self.state << 32 | self.words[self.at]
            self.at += 1

    def raw(self, bits):
        value = self.low(bits)
        self.leave(value, 1, bits)
        return value


class ExactTables:
    """What a book holds for the codec, by channel; book.md, section 4."""

    def __init__(self, book):
        a = {}
        for name, code in (
            ("sizes", "i4"), ("weights_low", "u1"), ("weights_high", "i1"), ("weight_bits", "i1"),
            ("scale_bits", "i1"), ("unit_bits", "i1"), ("sigmas", "u2"), ("frequencies", "u2"),
        ):  # fmt: skip
            need("exact_" + name in book.arrays, "the book has no tables for exact coding")
            a[name] = book.arrays["exact_" + name]
            ndim = 2 if name == "frequencies" else 1
            need(a[name].dtype == f"<{code}" and a[name].ndim == ndim, "type of exact tables")
        self.layers, self.head_dim = book.facts["book.n_layers"], book.head_dim
        self.c = len(book.arrays["mean"])
        self.w = self.c // (2 * self.layers)
        self.inv_freq = book.arrays["inv_freq"]
        self.vectors, self.vector_scales = (
            book.arrays[name] for name in ("token_vectors", "token_scales")
        )
        need(len(a["sizes"]) == 3 and not self.head_dim % 2, "sizes of exact tables")
        window, token_channels, self.token_bits = a["sizes"].tolist()
        need(0 <= window <= self.c and 0 <= token_channels <= self.c, "sizes of exact tables")
        need(abs(self.token_bits) <= 60, "sizes of exact tables")
        for name, low, high in (
            ("weight_bits", 0, 40), ("scale_bits", -60, 60), ("unit_bits", -40, 40),
            ("sigmas", 2048, 4095),
        ):  # fmt: skip
            need(a[name].shape == (self.c,), "sizes of exact tables")
            need((a[name] >= low).all() and (a[name] <= high).all(), "ranges of exact tables")
        self.weight_bits, self.scale_bits, self.unit_bits, self.sigmas = (
            a[name].tolist() for name in ("weight_bits", "scale_bits", "unit_bits", "sigmas")
        )
        need(a["weights_low"].shape == a["weights_high"].shape, "number of weights")
        weights = 256 * a["weights_high"].astype(np.int64) + a["weights_low"]
        need(a["frequencies"].shape == (256, ESCAPE + 1), "sizes of exact tables")
        self.sums = np.zeros((256, ESCAPE + 2), np.int64)
        np.cumsum(a["frequencies"], axis=1, out=self.sums[:, 1:])
        need((self.sums[:, -1] == 65536).all() and (a["frequencies"] > 0).all(), "frequencies")
        # Of each channel its weights, and where its regressors lie in the list of constant, token
        # and all channels.
        dims, at, self.rows, self.seen = self.vectors.shape[1], 0, [], []
        for first in range(0, self.c, 32):
            stop = min(first + 32, self.c)
            head = 1 + (dims if first < token_channels else 0)
            before = 1 + dims + np.arange(max(0, first - window), stop)
            seen = np.concatenate([np.arange(head), before])
            need(len(seen) <= 1 << 18, "regressors of a channel")
            for _ in range(first, stop):
                self.rows.append(weights[at : at + len(seen)])
                self.seen.append(seen)
                at += len(seen)
        need(at == len(weights), "number of weights")
        seconds = [i for i in range(self.c) if (self.pair(i) or (0, 0))[1]]
        same = all(self.scale_bits[i] == self.scale_bits[i - 1] for i in seconds)
        need(same, "scale bits of a pair")

    def token(self, i):
        """Step 2."""
        if not 0 <= i < len(self.vectors):
            return [0] * self.vectors.shape[1]
        numbers = self.vectors[i].astype(float) * float(self.vector_scales[i])
        numbers = np.floor(numbers * 2.0**self.token_bits + 0.5)
        return np.clip(numbers, 1 - 2**19, 2**19 - 1).astype(np.int64)

    def pair(self, channel):
        """Pair of a channel and whether it is the second; None if it is not turned."""
        place = channel % (2 * self.w) - self.w
        place = place % self.head_dim if place >= 0 else self.head_dim
        return divmod(place, 2) if place < 2 * len(self.inv_freq) else None

    def place(self, channel, norm):
        """Role (0 keys, 1 values), layer, and channel of the row."""
        layer, at = divmod(channel, 2 * self.w)
        if at < self.w:
            return 1, layer, at
        head, at = divmod(at - self.w, self.head_dim)
        if at < 2 * len(self.inv_freq) and not norm:
            at = at // 2 + (at % 2) * len(self.inv_freq)
        return 0, layer, head * self.head_dim + at


def exact_value(lane, tables, channel, mu, mean, f, l):  # noqa: E741
    """Steps 4 to 6: pattern of one value, and the running mean behind it."""
    u, sigma = tables.unit_bits[channel], tables.sigmas[channel]
    g = max(highest_bit(outwards(mu)) - f, l + u)
    half = (1 << g) // 2 if g > 0 else 0
    nu = mu + half if mu >= 0 else mu - half
    s = min(max((sigma * mean) >> 13, 16), 1 << 18)
    o = highest_bit(s)
    quarter = 4 * o + sum(((s << 16) >> o) >= each for each in (77936, 92682, 110218))
    k = max(o - 3, highest_bit(outwards(nu) + (4 << o)) - f, l + u, 0)
    row = 8 * min(max(quarter - 4 * k + 16, 0), 31) + shift(nu, 3 - k) % 8
    sums = tables.sums[row]
    symbol = int(np.searchsorted(sums, lane.low(16), side="right")) - 1
    lane.leave(int(sums[symbol]), int(sums[symbol + 1] - sums[symbol]), 16)
    most = min((mean >> 2) + 64, 1 << 16)
    if symbol == ESCAPE:
        return lane.raw(16), mean - (mean >> 5) + most
    low, bits = ((nu >> k) << k) + (BIN_START[symbol] << k), k + BIN_WIDTH[symbol]
    x = low + lane.low(bits)
    z, sign = outwards(x), x < 0
    need(z < 1 << 28, "a value beyond the units")
    b = max(highest_bit(z) - f, l + u)
    if b >= 0:
        z = (z >> b) << b
        x = -1 - z if sign else z
        pattern = ((b - u - l) << f) + (z >> b)
    cell = 1 << max(b, 0)
    left = x + 1 - cell if sign else x
    left, right = max(left, low), min(left + cell, low + (1 << bits))
    lane.leave(left - low, right - left, bits)
    if b < 0:
        pattern = ((b - u - l) << f) + (z << -b) + lane.raw(-b) if z else lane.raw(15)
    need(pattern < 1 << 15, "a pattern beyond 15 bits")
    error = min((abs(x - mu) * ((1 << 32) // sigma)) >> 24, most)
    return pattern + 32768 * sign, mean - (mean >> 5) + error


def exact_regressor(pattern, h, f, l):  # noqa: E741
    """Step 7."""
    e, n = pattern % 32768 >> f, pattern % (1 << f)
    if e == 32767 >> f:
        return 0
    n += (1 << f) if e else 0
    b = max(e - 1, 0) + l + h
    n = n << b if b >= 0 else (n + (1 << (-b - 1))) >> -b if b > -40 else 0
    n = min(n, 2**19 - 1)
    return -n if pattern >= 32768 else n


def exact_rows(c, n_frames, element_type, names, tables):
    """Of each tensor, named by (role, layer), the u16 patterns ``[n_frames, w]``.

    Frames are worked through side by side: they depend on each other only in the lanes.
    """
    f, l = EXACT_TYPES[element_type]  # noqa: E741
    norm = c.u8()
    need(norm <= 1, "pairing of the keys", Unsupported)
    positions, tokens = c.ints(n_frames).tolist(), c.ints(n_frames).tolist()
    lengths = c.several(lambda: c.uvarint(limit=1 << 31), limit=32)
    need(lengths and min(lengths) >= 2, "words of a lane")
    lanes = [ExactLane(struct.unpack(f"<{n}I", c.take(4 * n))) for n in lengths]
    dims = tables.vectors.shape[1]
    known = np.zeros((n_frames, 1 + dims + tables.c), np.int64)
    known[:, 0] = 8192
    known[:, 1 : 1 + dims] = [tables.token(i) for i in tokens]
    turns = [[exact_angle(p, each) for each in tables.inv_freq] for p in positions]
    means = [6144] * n_frames
    patterns = np.zeros((n_frames, tables.c), np.uint16)

    def predict(channel, until):
        """P of each frame from the regressors before channel ``until``."""
        seen = tables.seen[channel]
        before = seen < 1 + dims + until
        sums = known[:, seen[before]] @ tables.rows[channel][before]
        by = 8 - tables.weight_bits[channel]
        return [clip(shift(int(each), by), 1 << 30) for each in sums]

    for channel in range(tables.c):
        pair = tables.pair(channel)
        if pair is None:
            predicted = predict(channel, channel)
        elif pair[1] == 0:
            both = predict(channel, channel), predict(channel + 1, channel)
            angles = [each[pair[0]] for each in turns]
            both = list(zip(*both, angles, strict=True))
            predicted = [(a * cos - b * sin) >> 15 for a, b, (cos, sin) in both]
        else:
            predicted = [(b * cos + a * sin) >> 15 for a, b, (cos, sin) in both]
        h = tables.scale_bits[channel]
        for t, p in enumerate(predicted):
            mu = clip(shift(p, tables.unit_bits[channel] - h - 8), (1 << 28) - 1)
            patterns[t, channel], means[t] = exact_value(
                lanes[t % len(lanes)], tables, channel, mu, means[t], f, l
            )
            known[t, 1 + dims + channel] = exact_regressor(int(patterns[t, channel]), h, f, l)
        if pair is not None and pair[1]:
            place = 1 + dims + channel
            for t, (cos, sin) in enumerate(angles):
                a, b = (int(each) for each in known[t, place - 1 : place + 1])
                turned = (a * cos + b * sin + 2**14) >> 15, (b * cos - a * sin + 2**14) >> 15
                known[t, place - 1 : place + 1] = [clip(each, 2**19 - 1) for each in turned]
    for lane in lanes:
        need(lane.state == 1 << 31 and lane.at == len(lane.words), "end of a lane")
    found = {name: np.zeros((n_frames, tables.w), np.uint16) for name in names}
    for channel in range(tables.c):
        role, layer, at = tables.place(channel, norm)
        found[names_by_rank(names, role)[layer]][:, at] = patterns[:, channel]
    return found


def names_by_rank(names, role):
    """Of the tensors of a role, by ascending layer."""
    return sorted(name for name in names if name[0] == role)


# --- codec 6: codecs/product.md -----------------------------------------------------------------


def product_frames(c, n_frames, n_stages, frame_bytes):
    """Of each frame its codes, uint8, or its rows as bytes if it is exact; of the body of a chunk
    behind the id."""
    forms = []
    while len(forms) < n_frames:
        n, base, width = c.uvarint(), c.uvarint(), c.u8()
        need(1 <= n <= n_frames - len(forms) and base <= 1 + n_stages, "frames of a run")
        need(width <= 112, "width")
        forms += (base + read_matrix(c, n, np.array([width]))[:, 0]).tolist()
    need(all(0 <= form <= 1 + n_stages for form in forms), "form of a frame")
    frames = []
    for form in forms:
        data = c.take(form - 1 if form else frame_bytes)
        frames.append(np.frombuffer(data, np.uint8) if form else data)
    return frames


def sums_of_codes(frames, stages, n_columns):
    """float64 [n, columns]: what codes stand for; ``stages`` are pairs of columns and centroids."""
    out = np.zeros((len(frames), n_columns))
    for row, codes in zip(out, frames, strict=True):
        for code, (columns, centroids) in zip(codes, stages, strict=False):
            row[columns] += centroids[code]
    return out


def product_book_rows(frames, book, tensors, place, pairing):
    """uint8 [n, row bytes] of each tensor."""
    codes = [() if isinstance(frame, bytes) else frame for frame in frames]
    vectors = sums_of_codes(codes, book.product_stages, len(book.arrays["basis"]))
    return put_exact(book.rows(vectors, tensors, place, pairing), frames)


def read_codebooks(payload):
    """What a codebooks record says, with the stages of its codes."""
    c = Cursor(payload)
    turned = read_turn(c)
    n, n_keys = c.uvarint(limit=65536), c.uvarint()
    need(0 < n and n_keys <= n, "tensors")
    sizes = [c.uvarint(limit=1 << 24) for _ in range(n)]
    head, width, rounds = c.uvarint(), c.uvarint(), c.uvarint(limit=65536)
    need(head and width and rounds and not head % width, "a head and its sub-vectors")
    need(all(size and not size % head for size in sizes), "heads of a tensor")
    (error,) = c.fixed("f")
    need(np.isfinite(error) and error >= 0, "error")
    total, places = sum(sizes), head // width
    need(total <= 1 << 24 and rounds * (total // width) <= 65536, "number of stages")
    n_books = 2 * places
    shapes = [((total,), "<f2"), ((total // head,), "<f4"), ((rounds, n_books), "<f4"),
              ((rounds, n_books, 256, width), "i1")]  # fmt: skip
    lengths = [int(np.prod(shape)) * np.dtype(code).itemsize for shape, code in shapes]
    need(sum(lengths) <= 16 * len(payload) + (1 << 20), "size of the tables")
    content = Cursor(unzstd(c.rest(), sum(lengths)))
    mean, scales, units, entries = (
        np.frombuffer(content.take(length), code).reshape(shape).astype(float)
        for (shape, code), length in zip(shapes, lengths, strict=True)
    )
    need(all(np.isfinite(t).all() for t in (mean, scales, units)) and (scales > 0).all(), "numbers")
    stages = []
    for r in range(rounds):
        for j in range(total // width):
            is_value = j * width >= sum(sizes[:n_keys])
            book = j % places + places * is_value
            columns = np.arange(j * width, (j + 1) * width)
            stages.append((columns, entries[r, book] * units[r, book]))
    out = {"turn": turned, "sizes": sizes, "n_keys": n_keys, "mean": mean, "error": error}
    return out | {"spread": np.repeat(scales, head), "stages": stages}


def product_session_rows(frames, learnt, tensors, pos):
    """uint8 [n, row bytes] of each tensor."""
    order = frame_order(tensors)
    need(sum(tensors[i][1] == 0 for i in order) == learnt["n_keys"], "tensors")
    need(len(order) == len(learnt["sizes"]), "tensors")
    codes = [() if isinstance(frame, bytes) else frame for frame in frames]
    y = sums_of_codes(codes, learnt["stages"], len(learnt["mean"]))
    x, rows = y * learnt["spread"] + learnt["mean"], [None] * len(tensors)
    parts = np.split(x, np.cumsum(learnt["sizes"])[:-1], axis=1)
    for i, part in zip(order, parts, strict=True):
        rows[i] = real_rows(part, part.shape[1], tensors[i], learnt["turn"], pos)
    return put_exact(rows, frames)


def put_exact(rows, frames):
    """Frames that are kept as they are have the rows of all tensors one after another."""
    for i, frame in enumerate(frames):
        if isinstance(frame, bytes):
            c = Cursor(frame)
            for part in rows:
                part[i] = np.frombuffer(c.take(part.shape[1]), np.uint8)
    return rows


# --- codec 7: codecs/difference.md --------------------------------------------------------------


FLOAT_PLACES = {1: (11, -24), 30: (8, -133), 0: (24, -149)}  # bits, log2 of the smallest number
MIDDLE_CODES = {2: 8, 6: 16}
TURNED_TYPES = {0, 1, 2, 3, 6, 7, 8, 30}


def difference_rows(c, base, tensors):
    """Rows, uint8 [n, row bytes] of each tensor. ``base``: the same; ``tensors``: (role, type)."""
    turned = read_key_turn(c)
    modes = []
    while len(modes) < len(tensors):
        count, mode = c.uvarint(), c.u8()
        need(1 <= count <= len(tensors) - len(modes) and mode <= 2, "modes")
        modes += count * [mode]
    rows = [
        turn_rows(part, type_, turned)
        if mode < 2 and turned and is_turned(part, role, type_, turned) else part
        for part, mode, (role, type_) in zip(base, modes, tensors, strict=True)
    ]  # fmt: skip
    groups = {}
    for i, (mode, tensor) in enumerate(zip(modes, tensors, strict=True)):
        if mode:
            groups.setdefault((mode, tensor), []).append(i)
    for (mode, (_, type_)), members in groups.items():
        own = [rows[i] for i in members]
        sizes = [part.shape[1] for part in own]
        if mode == 2:
            found = decode_fields(c, len(own[0]), type_, sizes)
        else:
            found = add_differences(c, own, type_)
        for i, part in zip(members, found, strict=True):
            rows[i] = part
    return rows


def read_key_turn(c):
    kind = c.u8()
    need(kind <= 2, "kind")
    if not kind:
        return None
    log_mixed, head, pairs = c.u8(), c.uvarint(), c.uvarint()
    need(log_mixed <= 16 and 1 <= head <= 65536 and 2 * pairs <= head, "turn")
    cos, sin = c.fixed(f"{pairs}i"), c.fixed(f"{pairs}i")
    need(all(abs(v) <= 1 << 29 for v in (*cos, *sin)), "cosine or sine")
    if kind == 1:
        places = [(j, j + pairs) for j in range(pairs)]
    else:
        places = [(2 * j, 2 * j + 1) for j in range(pairs)]
    return 1 << log_mixed, head, list(zip(places, cos, sin, strict=True))


def is_turned(rows, role, type_, turned):
    if role or type_ not in TURNED_TYPES:
        return False
    elements, size = BLOCKS[type_][:2] if type_ in BLOCKS else (1, FLOATS[type_])
    channels = rows.shape[1] // size * elements
    return channels <= 1 << 20 and channels % turned[0] == channels % turned[1] == 0


def add_differences(c, base, type_):
    n = len(base[0])
    split = [split_fields(part, type_) for part in base]
    out = []
    for number, bits in enumerate(bits for bits, _ in split[0]):
        predicted = np.concatenate([part[number][1] for part in split], axis=1)
        z = decode_stream(c.take(c.uvarint()), min(bits, 8), *predicted.shape).astype(np.int64)
        far = z == 255
        if bits > 8 and far.any():
            z[far] = decode_stream(c.take(c.uvarint()), bits, int(far.sum()), 1)[:, 0]
        d = np.where(z % 2 == 0, z // 2, -(z // 2) - 1)
        half, whole = 1 << (bits - 1), 1 << bits
        if type_ in BLOCKS or type_ not in FLOATS:
            value = (predicted + d) % whole
        else:
            rank = np.where(predicted < half, predicted + half, whole - 1 - predicted)
            rank = (rank + d) % whole
            value = np.where(rank >= half, rank - half, whole - 1 - rank)
        widths = [part[number][1].shape[1] for part in split]
        out.append(np.split(value, np.cumsum(widths)[:-1], axis=1))
    if type_ in BLOCKS:
        return [join_blocks(part, n, BLOCKS[type_][3]) for part in zip(*out, strict=True)]
    kind = f"<u{FLOATS.get(type_, 1)}"
    return [part.astype(kind).view(np.uint8).reshape(n, -1) for part in out[0]]


def split_fields(rows, type_):
    """Pairs of bits and int64 [n, columns]; codecs/fields.md."""
    n = len(rows)
    if type_ not in BLOCKS:
        size = FLOATS.get(type_, 1)
        return [(8 * size, np.ascontiguousarray(rows).view(f"<u{size}").astype(np.int64))]
    _, size, has_minimum, bits = BLOCKS[type_]
    blocks = np.ascontiguousarray(rows).reshape(n, -1, size)
    halves = 1 + has_minimum
    out = [
        (16, np.ascontiguousarray(blocks[:, :, 2 * i : 2 * i + 2]).view("<u2")[:, :, 0].astype(int))
        for i in range(halves)
    ]
    codes = blocks[:, :, 2 * halves :]
    if bits < 8:
        low = codes[:, :, -16:]
        wide = np.concatenate([low & 15, low >> 4], axis=2)
        if bits == 5:
            wide = wide + 16 * np.unpackbits(codes[:, :, :4], axis=2, bitorder="little")
        codes = wide
    return [*out, (bits, codes.reshape(n, -1).astype(np.int64))]


def turn_rows(rows, type_, turned):
    mixed, head, pairs = turned
    out = []
    for row in rows:
        values = mix(read_values(row, type_), mixed)
        values = [nearest_float(v, 0) for v in values]
        for first in range(0, len(values), head):
            for (i, j), c, s in pairs:
                x, y = values[first + i], values[first + j]
                values[first + i] = sum_of((x, c), (y, s), minus=True)
                values[first + j] = sum_of((x, s), (y, c))
        values = [v / mixed for v in mix(values, mixed)]
        out.append(store_blocks(values, row, type_) if type_ in BLOCKS else
                   store_floats(values, row, type_))  # fmt: skip
    return np.array(out, np.uint8).reshape(rows.shape)


def sum_of(p, q, minus=False):
    """The sum of two products, given as pairs of a number and an integer, in units of 2^-28."""
    if not all(math.isfinite(x) for x, _ in (p, q)):
        return math.nan
    sign = -1 if minus else 1
    exact = Fraction(p[0]) * p[1] + sign * Fraction(q[0]) * q[1]
    if exact:
        return math.ldexp(float(exact), -28)
    # Fractions have no sign of zero.
    return p[0] * p[1] - q[0] * q[1] if minus else p[0] * p[1] + q[0] * q[1]


def mix(values, block):
    apart = 1
    while apart < block:
        for i in range(len(values)):
            if i % (2 * apart) < apart:
                x, y = values[i], values[i + apart]
                values[i], values[i + apart] = x + y, x - y
        apart *= 2
    return values


def read_values(row, type_):
    if type_ not in BLOCKS:
        data = bytes(row)
        if type_ == 30:
            data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        return [float(v) for (v,) in struct.iter_unpack("<e" if type_ == 1 else "<f", data)]
    parts = split_fields(row[None], type_)
    codes, scales = parts[-1][1][0], parts[0][1][0]
    lows = parts[1][1][0] if len(parts) > 2 else None
    out = []
    for i, code in enumerate(codes.tolist()):
        q = code - MIDDLE_CODES.get(type_, 0) if type_ != 8 else code - 256 * (code > 127)
        low = half_float(lows[i // 32]) if lows is not None else 0.0
        value = half_float(scales[i // 32]) * q
        out.append(value + low if lows is not None else value)
    return out


def half_float(pattern):
    return struct.unpack("<e", struct.pack("<H", int(pattern)))[0]


def nearest_float(value, type_):
    """The nearest number of a float type, ties to even, as a float; infinite beyond its range."""
    if not math.isfinite(value) or not value:
        return value
    bits, smallest = FLOAT_PLACES[type_]
    place = max(math.frexp(value)[1] - bits, smallest)
    rounded = math.copysign(math.ldexp(round(math.ldexp(value, -place)), place), value)
    most = {1: 65504.0, 30: math.ldexp(255, 120), 0: math.ldexp((1 << 24) - 1, 104)}[type_]
    return rounded if abs(rounded) <= most else math.copysign(math.inf, value)


def store_floats(values, row, type_):
    size, out = FLOATS[type_], b""
    for i, value in enumerate(values):
        rounded = nearest_float(value, type_)
        if not math.isfinite(rounded):
            out += bytes(row[size * i : size * i + size])
        elif type_ == 30:
            out += struct.pack("<f", rounded)[2:]
        else:
            out += struct.pack("<e" if type_ == 1 else "<f", rounded)
    return list(out)


def store_blocks(values, row, type_):
    _, size, has_minimum, bits = BLOCKS[type_]
    out = b""
    for n in range(len(values) // 32):
        with np.errstate(all="ignore"):
            block = store_block(np.array(values[32 * n : 32 * n + 32]).astype(np.float32), type_)
        if block is None:
            out += bytes(row[size * n : size * n + size])
            continue
        halves, codes = block
        parts = [np.array([[h]]) for h in halves] + [np.array([codes])]
        out += join_blocks(parts, 1, bits).tobytes()
    return list(out)


def store_block(v, type_):
    """Patterns of the halves and the codes; None where the block of the base row is taken."""
    one = np.float32
    if not all(np.isfinite(v)):
        return None
    low = one(0)
    if type_ == 8:
        scale = max(abs(x) for x in v) / one(127)
    elif type_ in MIDDLE_CODES:
        scale = max(v, key=abs) / one(-MIDDLE_CODES[type_])
    else:
        low = min(v) + one(0)
        scale = (max(v) + one(0) - low) / one(15 if type_ == 3 else 31)
    inverse = one(1) / scale if scale else one(0)
    halves = [scale.astype("<f2")] + ([low.astype("<f2")] if type_ in (3, 7) else [])
    if not np.isfinite(halves).all():
        return None
    p = [(x - low) * inverse for x in v]
    most = 15 if type_ in (2, 3) else 31
    if type_ == 8:
        codes = [max(-127, min(127, round(float(x)))) % 256 for x in p]
    else:
        middle = one(MIDDLE_CODES.get(type_, 0) + 0.5)
        codes = [max(0, min(most, math.floor(x + middle))) for x in p]
    return [int(h.view("<u2")) for h in halves], codes


# --- book.md, and the transform of codecs/book-transform.md -------------------------------------


BOOK_ARRAYS = {  # type, and a letter for each dimension, as in book.md, section 4
    "mean": ("f4", "C"), "token_vectors": ("i1", "VD"), "token_scales": ("f4", "V"),
    "hidden": ("i1", "FM"), "hidden_scales": ("f4", "M"), "hidden_bias": ("f4", "M"),
    "linear": ("i1", "FP"), "linear_scales": ("f4", "P"), "output": ("i1", "MP"),
    "output_scales": ("f4", "P"), "prediction": ("i1", "Pc"), "prediction_scales": ("f4", "P"),
    "basis": ("i1", "Rc"), "basis_scales": ("f4", "R"), "metric": ("f2", "Nww"),
    "log_sigmas": ("i2", "R"), "frequencies": ("u2", "KS"), "inv_freq": ("f4", "m"),
}  # fmt: skip
BOOK_FACTS = {
    "book.history": int, "book.decays": list, "book.decay_dims": int, "book.head_dim": int,
    "book.n_layers": int, "book.group_layers": int, "book.group_coefficients": list,
    "book.group_predictions": list, "book.rope_scale": float, "book.rope_pairing": str,
}  # fmt: skip


class Book:
    """``facts``, ``tiers`` (name: log_step, KL, ratio), ``arrays``; ``id`` in hexadecimal."""

    def __init__(self, data):
        need(data[:12] == b"\x89TSCBOOK\r\n\x1a\n" and len(data) >= 44, "magic of a book")
        need(blake3(data[:-32]).digest() == data[-32:], "hash of a book")
        self.id = data[-32:].hex()
        c = Cursor(data[12:-32])
        need(c.uvarint() == 2, "version of a book", Unsupported)
        self.facts = c.metadata()
        tiers = c.several(lambda: (c.string(), c.fixed("idd")))
        arrays = c.several(lambda: book_array(c))
        c.end()
        self.tiers, self.arrays = dict(tiers), dict(arrays)
        need(len(self.tiers) == len(tiers) and len(self.arrays) == len(arrays), "a name twice")
        self._check()
        self.history, self.decays, self.decay_dims, self.head_dim, self.n_layers = (
            self.facts["book." + key]
            for key in ("history", "decays", "decay_dims", "head_dim", "n_layers")
        )
        self.vectors = self.scaled("token_vectors", "token_scales", axis=0)
        self.first = [self.scaled(name, name + "_scales", axis=1) for name in ("hidden", "linear")]
        self.output = self.scaled("output", "output_scales", axis=1)
        self.groups = list(self.read_groups())

    def _check(self):
        """book.md, section 5."""
        sizes = {"K": 40, "S": 32}
        for name, (code, axes) in BOOK_ARRAYS.items():
            need(name in self.arrays, f"array {name} is missing")
            array = self.arrays[name]
            need(array.dtype == f"<{code}" and array.ndim == len(axes), f"type of {name}")
            for axis, n in zip(axes, array.shape, strict=True):
                need(sizes.setdefault(axis, n) == n, f"size of {name}")
            need(code[0] != "f" or np.isfinite(array).all(), f"{name} is not finite")
        facts = {}
        for key, kind in BOOK_FACTS.items():
            need(isinstance(self.facts.get(key), kind), f"fact {key}")
            facts[key[5:]] = self.facts[key]
        need(facts["rope_pairing"] == "neox", "pairing of a book", Unsupported)
        layers, head_dim, w = facts["n_layers"], facts["head_dim"], sizes["w"]
        need(layers >= 1 and head_dim >= 1 and 1 <= facts["group_layers"], "layers of a book")
        groups, rest = divmod(layers, facts["group_layers"])
        need(not rest and sizes["C"] and not sizes["C"] % (2 * layers * head_dim), "layers")
        need((sizes["N"], 2 * layers * w) == (2 * layers, sizes["C"]), "channels of a book")
        need(sizes["c"] * groups == sizes["C"], "channels of a group")
        need(1 <= sizes["m"] and 2 * sizes["m"] <= head_dim, "pairs of a head")
        need(0 < facts["rope_scale"] < float("inf"), "rope_scale")
        for key, total in (("group_coefficients", "R"), ("group_predictions", "P")):
            counts = facts[key]
            need(all(isinstance(n, int) and 0 <= n <= sizes["c"] for n in counts), key)
            need((len(counts), sum(counts)) == (groups, sizes[total]), key)
        decays, dims = facts["decays"], facts["decay_dims"]
        need(0 <= facts["history"] <= 64 and len(decays) <= 16, "features of a book")
        need(all(isinstance(d, float) and 0 < d <= 0.999 for d in decays), "decays of a book")
        need(sizes["V"] >= 1 and 0 <= dims <= sizes["D"], "features of a book")
        features = facts["history"] * sizes["D"] + len(decays) * dims + 2
        need(sizes["F"] == features, "features of a book")
        f = self.arrays["frequencies"]
        need(f.all() and (f.sum(axis=1, dtype=np.int64) == 4096).all(), "frequencies of a book")
        edges = np.cumsum(facts["group_coefficients"])[:-1]
        for part in np.split(self.arrays["log_sigmas"].astype(int), edges):
            need((np.diff(part) <= 0).all(), "log_sigmas rise")
        for log_step, *measured in self.tiers.values():
            need(abs(log_step) <= 16384, "step of a tier")
            need(all(n != n or 0 <= n < float("inf") for n in measured), "tier")

    def scaled(self, name, scales, axis):
        """Float64 of an array of integers, one scale for each index of ``axis``."""
        return self.arrays[name].astype(float) * np.expand_dims(self.arrays[scales], 1 - axis)

    def read_groups(self):
        """Of each group of layers: its channels, the rows of the prediction basis and of the basis,
        and where those are among all."""
        n_groups = self.n_layers // self.facts["book.group_layers"]
        half = len(self.arrays["mean"]) // 2
        size = half // n_groups
        at = [0, 0]
        for g in range(n_groups):
            keys = np.arange(g * size, (g + 1) * size)
            group = [np.concatenate([keys, half + keys])]
            for i, (name, counts) in enumerate(
                (("prediction", "book.group_predictions"), ("basis", "book.group_coefficients"))
            ):
                span = slice(at[i], at[i] + self.facts[counts][g])
                group += [self.scaled(name, name + "_scales", axis=0)[span], span]
                at[i] = span.stop
            yield group

    @cached_property
    def token_tables(self):
        need("ids_order" in self.arrays, "the book has no tables of token ids")
        return TokenTables(self.arrays)

    @cached_property
    def exact_tables(self):
        return ExactTables(self)

    @cached_property
    def product_stages(self):
        """Pairs of columns and centroids: product.md, *Parameters*."""
        arrays = {name: self.arrays.get("product_" + name) for name in
                  ("columns", "centroids", "scales", "worth", "errors")}  # fmt: skip
        there = any(array is not None for array in arrays.values())
        need(there, "the book has no codebooks", Undecodable)
        need(all(array is not None for array in arrays.values()), "codebooks of a book")
        codes = [array.dtype.str[1:] for array in arrays.values()]
        need(codes == ["u4", "i1", "f4", "f4", "f4"], "types of codebooks")
        columns, centroids, scales, worth, errors = arrays.values()
        need(columns.ndim == 2 and 1 <= len(columns) <= 4096, "sizes of codebooks")
        need(centroids.shape == (len(columns), 256, columns.shape[1]), "sizes of codebooks")
        need(columns.shape[1] and scales.shape == (len(columns),), "sizes of codebooks")
        need(worth.shape == errors.shape == (19,), "sizes of codebooks")
        for falling in (worth, errors):
            fits = np.isfinite(falling).all() and falling[-1] > 0 and (np.diff(falling) <= 0).all()
            need(fits, "worth and errors of codebooks")
        need(np.isfinite(scales).all(), "scales of codebooks")
        need(int(columns.max()) < len(self.arrays["basis"]), "columns of codebooks")
        need(all(len(set(row)) == len(row) for row in columns.tolist()), "a column twice")
        pairs = zip(columns, centroids, scales, strict=True)
        return [(row, c.astype(float) * scale) for row, c, scale in pairs]

    def check_track(self, tensors):
        """book-transform.md, *Checks*."""
        roles = [tensors[i][1] for i in frame_order(tensors)]
        right = roles == [0] * self.n_layers + [1] * self.n_layers
        w = len(self.arrays["mean"]) // (2 * self.n_layers)
        fits = all(row_bytes == FLOATS.get(type_, 0) * w for _, _, type_, row_bytes, _ in tensors)
        need(right and fits, "the book is for other tensors", Undecodable)

    def features(self, tokens, pos):
        """float64 [n, F]"""
        known = (tokens >= 0) & (tokens < len(self.vectors))
        v = self.vectors[np.where(known, tokens, 0)] * known[:, None]  # of every token
        none, found = np.zeros(v.shape[1]), []
        for p in pos.tolist():
            f = [v[p - k] if 0 <= p - k < len(v) else none for k in range(self.history)]
            seen = np.arange(min(p + 1, len(v)))
            p = max(p, 0)
            for decay in self.decays:
                total = (1 - decay ** (p + 1)) / (1 - decay)
                f.append(decay ** (p - seen.astype(float)) / total @ v[seen, : self.decay_dims])
            found.append(np.concatenate([*f, [np.log2(p + 1) / 16, 1 / (p + 1)]]))
        return np.array(found)

    def predict(self, tokens, pos):
        """Coordinates in the prediction basis, float64 [n, P]."""
        f = self.features(tokens, pos)
        hidden, linear = self.first
        a = np.maximum(f @ hidden + self.arrays["hidden_bias"], 0)
        return f @ linear + a @ self.output

    def channels(self, z, coefficients):
        """float64 [n, C]"""
        x = np.repeat(self.arrays["mean"][None].astype(float), len(z), axis=0)
        for channels, prediction, of_z, basis, of_r in self.groups:
            x[:, channels] += z[:, of_z] @ prediction + coefficients[:, of_r] @ basis
        return x

    def rows(self, coefficients, tensors, place, pairing):
        """uint8 [n, row bytes] of each tensor, from float64 coefficients [n, R]. ``place``: as in
        `File._frames`."""
        self.check_track(tensors)
        tokens, there, pos = place
        x = self.channels(self.predict(tokens, there), coefficients)
        order, rows = frame_order(tensors), [None] * len(tensors)
        inv_freq, scale = self.arrays["inv_freq"], float(np.float32(self.facts["book.rope_scale"]))
        for i, part in zip(order, np.split(x, len(order), axis=1), strict=True):
            if tensors[i][1] == 0:
                part = turn(part, pos, pairing, self.head_dim, inv_freq, scale)
            rows[i] = as_rows(part, tensors[i][2])
        return rows


def book_array(c):
    name, code = c.string(), c.string()
    need(code in ("f4", "f2", "i1", "u1", "i2", "u2", "i4", "u4"), "type of an array")
    n_dimensions = c.uvarint(limit=4)
    shape = [c.uvarint(limit=1 << 31) for _ in range(n_dimensions)]
    size = int(code[1])
    for n in shape:
        size *= n
    content = unzstd(c.take(c.uvarint()), size)
    need(len(content) == size, "size of an array")
    return name, np.frombuffer(content, "<" + code).reshape(shape)


# --- codecs/token-ids.md ------------------------------------------------------------------------


def log2(v):
    """Units of 1/256 octaves; the 12 highest bits of v count."""
    s = max(0, v.bit_length() - 12)
    v >>= s
    octaves = v.bit_length() - 1
    m, units = v << (31 - octaves), octaves
    for _ in range(8):
        m = m * m >> 31
        bit = m >> 32
        m, units = m >> bit, 2 * units + bit
    return units + 256 * s


def clip(v, limit):
    return max(-limit, min(v, limit))


def probabilities():
    found, p = [], 1
    for x in range(-2816, 2817):
        while p < 65535 and log2(p) - log2(65536 - p) < x:
            p += 1
        found.append(max(32, min(p, 65504)))
    return found


PROBABILITY = probabilities()


def step(code):
    return code if code < 2 else (2 + (code & 1)) << (code // 2 - 1)


def bucket(n):
    return max(c for c in range(16) if step(c) <= n)


def from_planes(planes):
    return sum(plane.astype(np.int64) << 8 * i for i, plane in enumerate(planes)).tolist()


def check_token_tables(arrays):
    """*Checks*: types and sizes."""
    sizes, steps = {"18": 18, "7": 7, "32": 32, "16": 16}, {"unigram": 0, "count1": 1, "count2": 1}
    for name, code, axes in (
        ("order", "u1", "PV"), ("unigram", "u1", "V"), ("fan1", "u1", "QV"), ("next1", "u1", "RE"),
        ("count1", "u1", "E"), ("fan2", "u1", "SE"), ("next2", "u1", "TF"), ("count2", "u1", "F"),
        ("weights", "i2", ("18", "7", "32")), ("match", "u2", ("16",)),
    ):  # fmt: skip
        need("ids_" + name in arrays, "tables of token ids")
        array = arrays["ids_" + name]
        need(array.dtype == f"<{code}" and array.ndim == len(axes), "types of token tables")
        for axis, n in zip(axes, array.shape, strict=True):
            need(sizes.setdefault(axis, n) == n, "sizes of token tables")
            need(axis not in "PQRST" or 1 <= n <= 4, "planes of token tables")
        if name in steps:
            least = steps[name]
            need((array >= least).all() and (array <= 47).all(), "steps of token tables")
    need(1 <= sizes["V"] <= 1 << 20, "number of leaves")
    need(max(sizes["E"], sizes["F"]) <= 1 << 24, "number of pairs")
    match = arrays["ids_match"]
    need((match >= 64).all() and (match <= 65472).all(), "match probabilities")


def lists(gaps, fan):
    """Rising lists of fan[i] values each."""
    need(sum(fan) == len(gaps), "fan does not add up")
    found, at = [], 0
    for n in fan:
        values = np.cumsum(np.array(gaps[at : at + n], np.int64) + 1) - 1
        found.append(values.tolist())
        at += n
    return found


class TokenTables:
    """Ids of the leaves, their weights, and (leaf, count) lists of followers."""

    def __init__(self, arrays=None, bits=0):
        self.ids = range(1 << bits)
        self.weights = [(1 << 24) // (i + 128) for i in self.ids]
        self.after1, self.after2 = {}, {}
        self.mixing = np.full((18, 7, 32), 28672, np.int64)
        self.match = [61440] * 16
        if arrays is not None:
            self._read(arrays)
        self.leaf_of = {id_: leaf for leaf, id_ in enumerate(self.ids)}
        self.sums = np.cumsum([0, *self.weights, 1]).tolist()
        self.nodes = {}

    def _read(self, arrays):
        check_token_tables(arrays)
        self.ids = from_planes(arrays["ids_order"])
        need(sorted(self.ids) == list(range(len(self.ids))), "order of the ids")
        self.weights = [4 * step(c) + 1 for c in arrays["ids_unigram"].tolist()]
        nexts = lists(from_planes(arrays["ids_next1"]), from_planes(arrays["ids_fan1"]))
        counts = iter([step(c) for c in arrays["ids_count1"].tolist()])
        ranks = iter(lists(from_planes(arrays["ids_next2"]), from_planes(arrays["ids_fan2"])))
        counts2 = iter([step(c) for c in arrays["ids_count2"].tolist()])
        need(all(max(leaves, default=0) < len(self.ids) for leaves in nexts), "leaves that follow")
        for first, leaves in enumerate(nexts):
            self.after1[first] = [(leaf, next(counts)) for leaf in leaves]
            for second in leaves:
                found = next(ranks)
                need(max(found, default=-1) < len(nexts[second]), "ranks that follow")
                self.after2[first, second] = [(nexts[second][k], next(counts2)) for k in found]
        self.mixing = arrays["ids_weights"].astype(np.int64) << 4
        self.match = arrays["ids_match"].tolist()

    def node(self, lo, hi):
        if (lo, hi) not in self.nodes:
            both = self.sums[lo] + self.sums[hi]
            self.nodes[lo, hi] = min(
                range(lo + 1, hi), key=lambda m: (abs(2 * self.sums[m] - both), m)
            )
        return self.nodes[lo, hi]


class TokenModel:
    """``n``: tokens of context and stream together."""

    def __init__(self, tables, data, n):
        self.tables, self.data, self.sums = tables, data, tables.sums
        self.mixing, self.match = tables.mixing.copy(), list(tables.match)
        self.n_slots = 1 << max(12, min(22, (256 * n - 1).bit_length()))
        self.single, self.slots = {}, {}
        self.history, self.seen, self.match_at, self.match_length = [], {}, 0, 0
        self.low, self.high, self.at = 0, 0xFFFFFFFF, 0
        self.steps = []

    def code(self):
        return int.from_bytes(self.data[self.at : self.at + 4].ljust(4, b"\0"), "big")

    def decide(self, p):
        span = self.high - self.low
        middle = self.low + (span >> 16) * p + ((span & 0xFFFF) * p >> 16)
        bit = int(self.code() <= middle)
        self.steps.append([self.low, self.high, p, bit])
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 24 == self.high >> 24:
            self.low = self.low << 8 & 0xFFFFFFFF
            self.high = self.high << 8 & 0xFFFFFFFF | 0xFF
            self.at += 1
        return bit

    def end(self):
        for k in range(5):
            unit = 1 << (32 - 8 * k)
            v = -(-self.low // unit) * unit
            if v <= self.high:
                break
        need(len(self.data) == self.at + k and self.code() == v, "end of the token ids")

    def slot(self, key, n_slots):
        return (key * 0x9E3779B97F4A7C15 % (1 << 64)) * n_slots >> 64

    def token(self, leaf=None):
        """Decode a leaf, or learn from a known one."""
        h, tables = self.history, self.tables
        after1 = tables.after1.get(h[-1], []) if h else []
        after2 = tables.after2.get((h[-2], h[-1]), []) if len(h) > 1 else []
        x2, x1 = ([0, 0] + [x + 1 for x in h[-2:]])[-2:]
        predicted = h[self.match_at] if self.match_length else None
        length = min(self.match_length, 15)
        lo, hi = 0, len(self.sums) - 1
        while hi - lo > 1:
            m = tables.node(lo, hi)
            pairs = [
                [sum(c for x, c in after if a <= x < b) for a, b in ((lo, m), (m, hi))]
                for after in (after1, after2)
            ]
            keys = [x1 << 21 | m, 1 << 63 | x2 << 42 | x1 << 21 | m]
            places = [(self.single, m)] + [(self.slots, self.slot(k, self.n_slots)) for k in keys]
            pairs += [memory.get(place, [0, 0]) for memory, place in places]
            odds = log2(self.sums[hi] - self.sums[m]) - log2(self.sums[m] - self.sums[lo])
            inputs = [(clip(odds, 2816), 0)]
            for n0, n1 in pairs:
                odds = clip(log2(16 * n1 + 2) - log2(16 * n0 + 2), 2816)
                inputs.append((odds, bucket(n0 + n1) + (16 if n0 and n1 else 0)))
            matching = predicted is not None and lo <= predicted < hi
            if matching:
                p = self.match[length]
                odds = log2(p) - log2(65536 - p)
                inputs.append((odds if predicted >= m else -odds, length))
            else:
                inputs.append((0, 0))
            table_order = 2 if sum(pairs[1]) else 1 if sum(pairs[0]) else 0
            session_order = 2 if sum(pairs[4]) else 1 if sum(pairs[3]) else 0
            w = self.mixing[(3 * table_order + session_order) * 2 + matching]
            total = sum(int(w[i, b]) * odds for i, (odds, b) in enumerate(inputs)) >> 16
            p = PROBABILITY[clip(total, 2816) + 2816]
            bit = self.decide(p) if leaf is None else int(leaf >= m)
            if leaf is None:
                used = [int(w[i, b]) for i, (_, b) in enumerate(inputs)]
                self.steps[-1] += [m, [(o, b, u) for (o, b), u in zip(inputs, used, strict=True)]]
            for i, (odds, b) in enumerate(inputs):
                change = (odds * (65536 * bit - p) + (1 << 18)) >> 19
                w[i, b] = clip(int(w[i, b]) + change, 1 << 20)
            if matching:
                p = self.match[length]
                right = bit == (predicted >= m)
                self.match[length] = p + (65535 - p >> 6) if right else max(64, p - (p >> 6))
            for memory, place in places:
                n = list(memory.get(place, [0, 0]))
                n[bit] = min(255, n[bit] + 1)
                if n[1 - bit] > 2:
                    n[1 - bit] = n[1 - bit] // 2 + 1
                memory[place] = n
            lo, hi = (m, hi) if bit else (lo, m)
        self.learn_match(lo, predicted)
        return lo

    def learn_match(self, leaf, predicted):
        h = self.history
        h.append(leaf)
        if leaf == predicted:
            self.match_at, self.match_length = self.match_at + 1, self.match_length + 1
        else:
            self.match_length = 0
        if len(h) < 2:
            return
        slot = self.slot(h[-2] + 1 << 21 | h[-1] + 1, 1 << 16)
        if not self.match_length and slot in self.seen:
            self.match_at = self.seen[slot]
            while (
                self.match_length < min(16, self.match_at)
                and h[self.match_at - 1 - self.match_length] == h[-1 - self.match_length]
            ):
                self.match_length += 1
        self.seen[slot] = len(h)


def token_model(data, n, tables, context):
    """The model, with the context behind it."""
    if tables is None:
        need(len(data) and data[0] <= 20, "size of token ids")
        tables, data = TokenTables(bits=data[0]), data[1:]
    model = TokenModel(tables, bytes(data), len(context) + n)
    for id_ in context:
        model.token(tables.leaf_of.get(id_, len(tables.ids)))
    return model


def decode_token_ids(data, n, tables=None, context=()):
    """int32 [n]; ``tables`` of the book, or None without."""
    context = list(context)[-4096:]
    need(n or not data, "bytes for no tokens")
    need(n <= (len(data) + 4) << 14, "more tokens than bytes can hold")
    if not n:
        return np.zeros(0, np.int32)
    model, found = token_model(data, n, tables, context), []
    for _ in range(n):
        leaf = model.token()
        if leaf < len(model.tables.ids):
            found.append(model.tables.ids[leaf])
        else:
            bits = "".join(str(model.decide(1 << 15)) for _ in range(32))
            found.append(int(bits, 2) - (1 << 32 if bits[0] == "1" else 0))
            need(not 0 <= found[-1] < len(model.tables.ids), "escape of an id that has a leaf")
    model.end()
    if tables is None:
        largest = max([0, *(i for i in [*context, *found] if 0 <= i < 1 << 20)])
        need(data[0] == largest.bit_length(), "size of token ids")
    return np.array(found, np.int32)


def trace(data, n):
    """Decisions of a stream without tables and escapes: token, node, low, high, probability, bit,
    and (log-odds, bucket, weight) of each input."""
    model = token_model(data, n, None, ())
    for number in range(n):
        need(model.token() < len(model.tables.ids), "no escapes here")
        for low, high, p, bit, node, inputs in model.steps:
            yield number, node, f"{low:08x}", f"{high:08x}", p, bit, inputs
        model.steps.clear()
    model.end()


# --- the command --------------------------------------------------------------------------------


def describe(file):
    """What the JSON beside the files of `vectors/valid` says, but for ``layers``."""
    content = {
        "file_bytes": len(file.data), "format_version": file.version,
        "torn_bytes": len(file.data) - file.end,
        "snapshots": [
            describe_snapshot(snapshot) for snapshot in file.snapshots
            if file.only in (None, snapshot["number"])
        ],
    }  # fmt: skip
    held = describe_blocks(file)
    if file.books:
        (content["book"],) = file.books
    if file.books or held:
        content["blocks"] = held
    return content


def describe_blocks(file):
    """Of each lossy block that was read, the integers or bytes that its rows are made from."""
    found = []
    for _, held in sorted(file.decoded.items()):
        if "log_steps" in held:
            keys = ("log_steps", "integers")
            found.append({key: held[key].tolist() for key in keys})
        elif "shifts" in held:
            found.append({"basis": f"{held['basis']:016x}"})
            found[-1] |= {key: held[key].tolist() for key in ("shifts", "integers")}
        elif "frames" in held:
            codes = [
                {"exact": frame.hex()} if isinstance(frame, bytes) else frame.tobytes().hex()
                for frame in held["frames"]
            ]
            found.append({"codebooks": f"{held['codebooks']:016x}", "codes": codes})
    return found


def describe_snapshot(snapshot):
    keys = ("number", "parent", "plan", "tier", "name", "source", "identity", "coding")
    return {
        **{key: snapshot[key] for key in keys},
        "tokens": snapshot["tokens"].tolist(),
        "contexts": [tokens.tolist() for tokens in snapshot["contexts"]],
        "tracks": [describe_track(track) for track in snapshot["tracks"]],
        "opaque": {name: content.hex() for name, content in snapshot["opaque"].items()},
    }  # fmt: skip


def describe_track(track):
    return {
        "cache": track["cache"], "stream": track["stream"], "attributes": track["attributes"],
        "positions": track["pos"].tolist(), "sequence_counts": track["seq_counts"].tolist(),
        "sequence_ids": track["seq_ids"].tolist(),
        "tensors": [
            {
                "layer": layer, "role": "kv"[role],
                "element_type": ELEMENT_TYPES.get(type_, f"type {type_}"),
                "row_bytes": row_bytes, "rotation": rotation,
                "rows": [
                    None if cell in track["absent"] else row.tobytes().hex()
                    for cell, row in enumerate(rows)
                ],
            }
            for (layer, role, type_, row_bytes, rotation), rows in zip(
                track["tensors"], track["rows"], strict=True
            )
        ],
    }  # fmt: skip


def as_json(content):
    """Text with lists of numbers on one line."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    text = re.sub(r"\[[-\d,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    return text.replace("[ ", "[").replace(" ]", "]") + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Print what a .tsc file holds, as JSON.")
    parser.add_argument("file")
    parser.add_argument("--book", help="the book that the file names, if it is not inside")
    parser.add_argument("--snapshot", type=int, help="decode this one alone; -1 is the last")
    parser.add_argument("--tier", help="of quality layers the one to read; the last if left out")
    given = parser.parse_args(arguments)
    data, book = (
        open(path, "rb").read() if path else None  # noqa: SIM115
        for path in (given.file, given.book)
    )
    try:
        only = given.snapshot
        if only is not None and only < 0:
            only += len(File(data, book, only=-1).snapshots)
        file = File(data, book, given.tier, only)
        need(only is None or 0 <= only < len(file.snapshots), "no such snapshot", Undecodable)
        sys.stdout.write(as_json(describe(file)))
    except Rejected as error:
        print(f"{given.file}: {error.kind}: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
