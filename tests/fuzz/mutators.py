"""Mutations that keep what random bytes would break first: lengths, checksums, compression.

Each is called with an input, the most bytes that may come out, and a number that decides all it
does. Now and then every one of them changes plain bytes, which is the only mutation of a target
that is not listed.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import atheris
from mending import Rebuilt, frames_in, whole_book, with_frame

from tscfile.books.book import HASH_BYTES, MAGIC
from tscfile.bytestream import ByteReader, ByteWriter
from tscfile.container.metadata import read_metadata, write_metadata
from tscfile.container.records import BOOK
from tscfile.entropy import zstd

Mutator = Callable[[bytes, int, int], bytes]
_MOST_GROWTH = 256

_VALUES: tuple[Any, ...] = (
    0, 1, 2, 3, 4, 8, -1, 255, 65535, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64,
    True, False, None, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "0", "[]", "{}", "full",
    "sliding", "latent", "F16", "BF16", "F32", "I32", "I64", "\ud800", "\n\x1b[2J", "é" * 20, [],
    [0], [[]], {}, {"": 0},
)  # fmt: skip


def plain(data: bytes, most: int) -> bytes:
    mutated: bytes = atheris.Mutate(data, max(1, min(most, len(data) + _MOST_GROWTH)))
    return mutated


def _aware(mutate: Callable[[bytes, int, random.Random], bytes]) -> Mutator:
    """``mutate`` where it can and its result is not too long, plain bytes else."""

    def run(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.15:
            return plain(data, most)
        try:
            made = mutate(data, most, rng)
        except Exception:
            # An input may be anything by now, also nothing that can be taken apart.
            return plain(data, most)
        return made if len(made) <= most else plain(data, most)

    return run


# --- JSON ---------------------------------------------------------------------------------------


def edited(value: Any, rng: random.Random) -> Any:
    """A value of JSON with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.random()
        made = dict(value)
        if action < 0.06:
            del made[key]
        elif action < 0.12:
            made[rng.choice([f"layers.{rng.randrange(5)}.{rng.choice('kv')}", "x"])] = value[key]
        elif action < 0.18:
            other = rng.choice(list(value))
            made[key], made[other] = value[other], value[key]
        else:
            made[key] = edited(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        action = rng.random()
        if action < 0.1:
            return value[:at] + value[at + 1 :]
        if action < 0.2:
            return value[:at] + [value[at]] * rng.randrange(1, 4) + value[at:]
        return value[:at] + [edited(value[at], rng)] + value[at + 1 :]
    if isinstance(value, str) and value[:1] in ("[", "{") and rng.random() < 0.8:
        try:
            return json.dumps(edited(json.loads(value), rng))
        except ValueError:
            return value
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-8, -4, -2, -1, 1, 2, 4, 8, value))
    return rng.choice(_VALUES)


def _safetensors(data: bytes, most: int, rng: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    text, content = data[8 : 8 + length], data[8 + length :]
    action = rng.random()
    if action < 0.15:
        content = plain(content, most)
    elif action < 0.4:
        text = plain(text, most)
    elif action < 0.6:
        text, content = _reshaped(json.loads(text), rng)
    else:
        text = json.dumps(edited(json.loads(text), rng)).encode()
    return struct.pack("<Q", len(text)) + text + content


def _reshaped(entries: Any, rng: random.Random) -> tuple[bytes, bytes]:
    """Arrays of other types and shapes whose places follow from them."""
    heads, n, size = (rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(3))
    at = 0
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if name == "__metadata__" or not isinstance(entry, dict):
            continue
        tokens = name == "tokens"
        if rng.random() < 0.2:
            entry["dtype"] = rng.choice(("I32", "I64") if tokens else ("F16", "BF16", "F32"))
        if rng.random() < 0.7:
            entry["shape"] = [n + rng.choice((0, 0, 1, 5))] if tokens else [heads, n, size]
            if not tokens and rng.random() < 0.2:
                entry["shape"] = [1, *entry["shape"]]
        width = {"F16": 2, "BF16": 2, "I64": 8}.get(str(entry.get("dtype")), 4)
        for each in entry.get("shape", ()):
            width *= each
        if not 0 <= width < 4096:
            raise ValueError("too much to be made up")
        entry["data_offsets"] = [at, at + width]
        at += width
    if rng.random() < 0.3:
        facts = entries.get("__metadata__")
        if isinstance(facts, dict):
            facts["n_seen"] = str(n)
    return json.dumps(entries).encode(), rng.randbytes(at)


# --- npz ----------------------------------------------------------------------------------------


def _npz(data: bytes, most: int, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(each.filename, archive.read(each)) for each in archive.infolist()]
    if not members:
        raise ValueError("nothing to change")
    at = rng.randrange(len(members))
    name, content = members[at]
    action = rng.random()
    if action < 0.1:
        members[at] = (plain(name.encode(), 40).decode("utf-8", "replace"), content)
    elif action < 0.2:
        members.pop(at)
    elif action < 0.3:
        members.append((rng.choice(("layers.1.k.npy", "layers.4.v.npy", "metadata.npy")), content))
    elif action < 0.6:
        members[at] = (name, plain(content, most))
    else:
        members[at] = (name, _npy(content, rng))
    out, kind = io.BytesIO(), rng.choice((0, 0, 8, 8, 12, 14))
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", kind) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    made = bytearray(out.getvalue())
    if rng.random() < 0.2:
        # Sizes, flags and offsets of the directory at the end.
        start = made.rfind(b"PK\1\2")
        at = rng.randrange(max(start, 0), len(made))
        made[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 9, 0x7FFFFFFF, 0xFFFFFFFF)))
    return bytes(made)


def _npy(content: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack_from("<H", content, 8)
    header, data = content[10 : 10 + length], content[10 + length :]
    action = rng.random()
    if action < 0.3:
        header = plain(header, len(header) + 40)
    elif action < 0.6:
        kinds = (b"<f2", b"<u2", b"<f4", b"<i8", b"<i4", b"<U3", b"<U300", b"|O8", b"<f8", b"|u1")
        header = re.sub(rb"[<|][fiuUO][0-9]+", rng.choice(kinds), header)
    elif action < 0.8:
        numbers = [str(rng.choice((0, 1, 2, 3, 4, 99, 1 << 31))) for _ in range(rng.randrange(5))]
        shape = ", ".join(numbers) + ("," if len(numbers) == 1 else "")
        header = re.sub(rb"\([0-9, ]*\)", b"(" + shape.encode() + b")", header)
    else:
        data = plain(data, len(data) + 8)
    return content[:8] + struct.pack("<H", len(header)) + header + data


# --- books --------------------------------------------------------------------------------------


def _book(data: bytes, most: int, rng: random.Random) -> bytes:
    body = data[len(MAGIC) : -HASH_BYTES]
    if rng.random() < 0.2:
        return whole_book(plain(body, most))
    reader = ByteReader(body, "book")
    version, facts = reader.uvarint(), read_metadata(reader)
    tiers = [(reader.string(), bytes(reader.take(20))) for _ in range(reader.uvarint())]
    arrays = []
    for _ in range(reader.uvarint()):
        name, code = reader.string(), reader.string()
        shape = [reader.uvarint() for _ in range(reader.uvarint())]
        arrays.append((name, code, shape, bytes(reader.take(reader.uvarint()))))
    action = rng.random()
    if action < 0.25:
        facts = edited(facts, rng)
    elif action < 0.3 and tiers:
        at = rng.randrange(len(tiers))
        tiers[at] = (tiers[at][0], plain(tiers[at][1], 20).ljust(20, b"\0")[:20])
    elif arrays:
        at = rng.randrange(len(arrays))
        arrays[at] = _array(arrays[at], rng)
    writer = ByteWriter().uvarint(version)
    try:
        write_metadata(writer, facts)
    except TypeError:
        raise ValueError("facts that cannot be written") from None
    writer.uvarint(len(tiers))
    for name, numbers in tiers:
        writer.string(name).raw(numbers)
    writer.uvarint(len(arrays))
    for name, code, shape, frame in arrays:
        writer.string(name).string(code).uvarint(len(shape))
        for size in shape:
            writer.uvarint(size)
        writer.uvarint(len(frame)).raw(frame)
    return whole_book(writer.bytes())


def _array(
    array: tuple[str, str, list[int], bytes], rng: random.Random
) -> tuple[str, str, list[int], bytes]:
    name, code, shape, frame = array
    action = rng.random()
    if action < 0.05:
        return "x" + name, code, shape, frame
    if action < 0.1:
        code = rng.choice(("f4", "f2", "i1", "u1", "i2", "u2", "i4", "u4", "f8"))
        return name, code, shape, frame
    content = zstd.decompress(frame, 1 << 24, "array")
    if action < 0.3 and shape:
        # Another size along one axis, and content to fill it.
        axis = rng.randrange(len(shape))
        rest = len(content) // max(shape[axis], 1)
        shape = [*shape[:axis], max(0, shape[axis] + rng.choice((-1, 1, 2))), *shape[axis + 1 :]]
        content = (content + rng.randbytes(rest * 2))[: rest * shape[axis]]
    else:
        content = plain(content, len(content) + 1).ljust(len(content), b"\0")[: len(content)]
    return name, code, shape, zstd.compress(content, 3)


# --- archives -----------------------------------------------------------------------------------


def _tsc(data: bytes, most: int, rng: random.Random) -> bytes:
    archive = Rebuilt(data)
    types = archive.types()
    if not types:
        raise ValueError("no records")
    # Chunks are many; the other kinds should be changed as often.
    wanted = rng.choice(sorted(set(types)))
    number = rng.choice([n for n, type_ in enumerate(types) if type_ == wanted])

    def change(n: int, type_: int, payload: bytes) -> bytes:
        if n != number:
            return payload
        if type_ == BOOK:
            return MUTATORS["book"](payload, most, rng.getrandbits(32))
        frames = frames_in(payload)
        if frames and rng.random() < 0.6:
            return with_frame(payload, rng.choice(frames), lambda each: plain(each, len(each) + 8))
        return plain(payload, most)

    return archive.write(change)


def _damaged(data: bytes, most: int, rng: random.Random) -> bytes:
    """Bits that flip and parts that are lost, now and then in an archive that is odd already."""
    made = bytearray(_tsc(data, most, rng) if rng.random() < 0.5 else data)
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(made))
        made[at] ^= 1 << rng.randrange(8)
    action, at = rng.random(), rng.randrange(len(made) + 1)
    length = rng.choice((8, 64, 512))
    if action < 0.1:
        del made[at:]
    elif action < 0.2:
        del made[at : at + length]
    elif action < 0.3:
        made[at : at + length] = bytes(len(made[at : at + length]))
    elif action < 0.35:
        made[at:at] = rng.randbytes(length)
    return bytes(made)


MUTATORS: dict[str, Mutator] = {
    "safetensors": _aware(_safetensors),
    "npz": _aware(_npz),
    "book": _aware(_book),
    "tsc": _aware(_tsc),
    "salvage": _aware(_damaged),
}
