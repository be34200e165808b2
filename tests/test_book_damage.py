"""Books and book-coded archives of strangers: they are refused by name, or they decode."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import bounded_memory
from mending import ids_of, rewritten, structure_of, whole_book

import tscfile
from tscfile.archive import Archive
from tscfile.books import book as books
from tscfile.books.book import Book, TierEntry
from tscfile.bytestream import ByteReader, ByteWriter
from tscfile.container.metadata import dictionary_of
from tscfile.container.reader import Container
from tscfile.container.records import (
    BASIS,
    CHUNK,
    SNAPSHOT,
    ChunkHeader,
    ExtraEntry,
    RecordRef,
)
from tscfile.container.writer import ContainerWriter, EncodedChunk
from tscfile.context import FrameContext
from tscfile.entropy import zstd
from tscfile.errors import DamagedError, TscError, UnsupportedError, UsageError

VALID = Path(__file__).parent.parent / "spec" / "vectors" / "valid"
BOOK = VALID / "lossy.tscbook"


def _load_make() -> Any:
    spec = importlib.util.spec_from_file_location("make", VALID.parent / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load_make()


def changed(facts: dict[str, Any] | None = None, **arrays: Any) -> Book:
    """The toy book with some facts and arrays changed; None takes one away."""
    toy = make.toy_book()
    for old, new in ((toy.facts, facts or {}), (toy.arrays, arrays)):
        old.update(new)
        for key in [key for key, value in new.items() if value is None]:
            del old[key]
    return toy


def use(data: bytes) -> None:
    """Everything that is done with a book."""
    opened = books.open_bytes(data, "book")
    context = FrameContext(np.array([0, 5, -7, 1 << 30], np.int32), make.as_ids([1, 2, -5, 9]))
    assert opened.book.predict(context).shape == (4, opened.book.n_channels)
    opened.book.kl_of_step(123)


def test_the_toy_book_is_whole() -> None:
    use(make.toy_book().to_bytes())


@pytest.mark.parametrize("key", [key for key in make.toy_book().facts if "." in key])
@pytest.mark.parametrize(
    "value",
    [None, 0, -1, 1, 3, 1 << 62, 0.0, -1.0, math.nan, math.inf, 1.0, "norm", "", [], [0], [0, 0],
     [-1, 4], [1 << 62, 1], [0.5, 0.999], [1.0], [math.nan], ["a"], [True, True], True, False],
    ids=str,
)  # fmt: skip
def test_facts_that_do_not_fit(key: str, value: Any) -> None:
    try:
        use(changed({key: value}).to_bytes())
    except (DamagedError, UnsupportedError):
        return
    # What says the same, or what nothing else depends on.
    assert value == make.toy_book().facts[key] or (key, value) in (
        ("book.rope_scale", 1.0), ("book.head_dim", 4),
    )  # fmt: skip


@pytest.mark.parametrize("name", list(books._SHAPES))
def test_arrays_that_do_not_fit(name: str) -> None:
    good = make.toy_book().arrays[name]
    bad = {
        "missing": None, "short": good[:-1], "none": good[:0], "long": np.repeat(good, 2, 0),
        "wide": np.repeat(good, 2, -1), "deep": good[None], "type": good.astype(np.int32),
    }  # fmt: skip
    if good.dtype.kind == "f":
        for value in (np.nan, np.inf):
            bad[str(value)] = np.full_like(good, value)
    if name == "inv_freq":
        del bad["short"]  # Fewer pairs may be turned.
    for what, array in bad.items():
        with pytest.raises(DamagedError):
            use(changed(**{name: array}).to_bytes())
            pytest.fail(what)


def test_books_that_describe_more_than_they_hold() -> None:
    """A few kilobytes of zstd can stand for any amount of memory."""
    large = np.zeros(80 << 20, np.uint8)
    with pytest.raises(DamagedError, match="more than a file of its size"):
        use(changed(ids_zeros=large).to_bytes())
    # What no reader of this version needs is passed over.
    use(changed(zeros=large).to_bytes())
    assert "zeros" not in books.open_bytes(changed(zeros=large).to_bytes(), "book").book.arrays
    more = {"basis": np.zeros((10, 8), np.int8), "basis_scales": np.ones(10, np.float32),
            "log_sigmas": np.zeros(10, np.int16)}  # fmt: skip
    with pytest.raises(DamagedError, match="contradict"):
        use(changed({"book.group_coefficients": [9, 1]}, **more).to_bytes())


@pytest.mark.parametrize(
    "what",
    ["tiers", pytest.param("arrays", marks=pytest.mark.slow), "zeros", "text", "facts"],
)
def test_books_of_many_small_things(what: str, tmp_path: Path) -> None:
    n, path = 300_000, tmp_path / "a.tscbook"
    empty = ByteWriter().string("u1").uvarint(1).uvarint(0)
    empty.uvarint(len(zstd.store(b""))).raw(zstd.store(b""))
    zeros = ByteWriter().string("u1").uvarint(1).uvarint(50 << 20)
    packed = zstd.compress(bytes(50 << 20), 1)
    zeros.uvarint(len(packed)).raw(packed)
    wide = ByteWriter().uvarint(1).string("a").u8(8).string("a" * (20 << 20) + "\U0001f600")
    facts, tiers, arrays = {
        "tiers": (b"\0", (n, b"".join(b"\4%04x" % i + bytes(20) for i in range(n))), (0, b"")),
        "arrays": (b"\0", (0, b""), (n, b"".join(
            b"\x09ids_%05x" % i + empty.bytes() for i in range(n)
        ))),
        "zeros": (b"\0", (0, b""), (1, b"\5ids_a" + zeros.bytes())),
        "text": (wide.bytes(), (0, b""), (0, b"")),
        "facts": (ByteWriter().uvarint(n).bytes() + b"".join(
            b"\5%05x\7\1" % i for i in range(n)
        ), (0, b""), (0, b"")),
    }[what]  # fmt: skip
    body = ByteWriter().uvarint(books.VERSION).raw(facts)
    for count, content in (tiers, arrays):
        body.uvarint(count).raw(content)
    path.write_bytes(whole_book(body.bytes()))
    with bounded_memory(path), pytest.raises(DamagedError, match="more than a file of its size"):
        books.load(path)


def test_a_book_knows_a_token() -> None:
    nothing = {name: make.toy_book().arrays[name][:0] for name in ("token_vectors", "token_scales")}
    with pytest.raises(DamagedError):
        use(changed(**nothing).to_bytes())


def test_values_that_do_not_fit() -> None:
    frequencies = make.toy_book().arrays["frequencies"]
    zero = frequencies.copy()
    zero[3, 31] = 0
    zero[3, 0] += frequencies[3, 31]
    more = frequencies.copy()
    more[3, 0] += 1
    for arrays in (
        {"frequencies": zero}, {"frequencies": more},
        {"log_sigmas": np.array([-1100, 256, 0], np.int16)},
    ):  # fmt: skip
        with pytest.raises(DamagedError):
            use(changed(**arrays).to_bytes())
    # Across groups they may rise.
    use(changed(log_sigmas=np.array([256, -1100, 300], np.int16)).to_bytes())


@pytest.mark.parametrize(
    ("step", "kl", "ratio", "whole"),
    [(0, math.nan, math.nan, True), (16384, 0.0, 0.0, True), (-16384, 1.0, 9.0, True),
     (16385, 0.1, 1.0, False), (-16385, 0.1, 1.0, False), (0, -0.1, 1.0, False),
     (0, math.inf, 1.0, False), (0, 0.1, math.inf, False), (0, 0.1, -1.0, False)],
)  # fmt: skip
def test_tiers_that_cannot_be(step: int, kl: float, ratio: float, whole: bool) -> None:
    book = make.toy_book()
    book.tiers["near"] = TierEntry("near", step, kl, ratio)
    if whole:
        use(book.to_bytes())
        assert (book.kl_of_step(3) is None) == (not kl > 0)
        return
    with pytest.raises(DamagedError):
        use(book.to_bytes())


def test_measurements_that_say_nothing() -> None:
    book = make.toy_book()
    for kl, step in ((1e-300, 0), (1e300, 1), (1.0, 16384)):
        book.tiers[str(kl)] = TierEntry(str(kl), step, kl, 1.0)
    assert 0 < (book.kl_of_step(4096) or 0) < math.inf
    assert abs(book.step_of_kl(0.5)) <= 16384
    book.tiers = {}
    with pytest.raises(UsageError):
        book.step_of_kl(0.01)


@pytest.mark.parametrize("kls", [[0.3, 0.005], [0.001, 0.5, 0.002, 0.003], [0.1, 0.1]], ids=str)
def test_measurements_that_do_not_rise(kls: list[float]) -> None:
    """A coarser step with less error is not believed."""
    book = make.toy_book()
    book.tiers = {str(i): TierEntry(str(i), 256 * i, kl, 1.0) for i, kl in enumerate(kls)}
    expected = [book.kl_of_step(step) or 0 for step in range(-512, 2048, 64)]
    assert expected == sorted(expected) and expected[0] < expected[-1] < math.inf
    assert book.kl_of_step(0) == pytest.approx(kls[0])
    assert abs(book.step_of_kl(kls[0])) <= 1


def test_names_that_occur_twice() -> None:
    for part in ("tiers", "arrays"):
        book = make.toy_book()
        items = list(getattr(book, part).items())

        class Twice(dict):  # type: ignore[type-arg]
            """A dict whose first entry comes twice."""

            def __len__(self) -> int:
                return len(items) + 1  # noqa: B023

            def items(self) -> Any:  # type: ignore[override]
                return [items[0], *items]  # noqa: B023

            def values(self) -> Any:  # type: ignore[override]
                return [value for _, value in self.items()]

        setattr(book, part, Twice(items))
        with pytest.raises(DamagedError, match="twice"):
            use(book.to_bytes())


def test_a_basis_of_rows_that_depend_on_each_other(tmp_path: Path) -> None:
    path = tmp_path / "flat.tscbook"
    path.write_bytes(changed(basis=np.zeros((3, 8), np.int8)).to_bytes())
    with pytest.raises(DamagedError):
        tscfile.pack(make.made_up(make.TOKENS), tmp_path / "a.tsc", tier="near", book=path)


# --- archives -----------------------------------------------------------------------------------


def read_all(path: Path, book: Path | None) -> None:
    """All snapshots in all their tiers."""
    with Archive(path, book=book) as archive:
        for number in range(len(archive)):
            for tier in archive.record(number).layers:
                for track in archive.snapshot(number, tier).tracks:
                    track.read(0, len(track.cells))


@pytest.mark.parametrize("name", ["lossy", "embedded", "layered"])
def test_bits_that_flip_behind_right_checksums(name: str, tmp_path: Path) -> None:
    source, path = VALID / f"{name}.tsc", tmp_path / "forged.tsc"
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(400):
        wanted = int(rng.choice([CHUNK, SNAPSHOT]))

        def edit(type_: int, payload: bytes, wanted: int = wanted) -> bytes:
            changed = bytearray(payload)
            if type_ == wanted:
                changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
            return bytes(changed)

        rewritten(source, path, edit)
        try:
            with np.errstate(all="ignore"):
                read_all(path, VALID / "layered.tscbook" if name == "layered" else BOOK)
            read += 1
        except TscError:
            pass
    assert 0 < read < 400


def test_references_beyond_the_file_are_not_followed() -> None:
    with Container(VALID / "embedded.tsc") as container:
        extra = ExtraEntry(BASIS, 0, RecordRef(1 << 63, 100))
        container.segments[-1] = replace(container.segments[-1], extras=(extra,))
        assert container.by_checksum(BASIS) == {}


def test_snapshots_with_frames_of_a_book_name_it(tmp_path: Path) -> None:
    """A reader that has them decoded some other time would not find it."""
    path = structured(tmp_path, b"\x04book\x08", b"\x04bood\x08")
    with Archive(path, book=BOOK) as archive, pytest.raises(DamagedError, match="names none"):
        archive.record()


def structured(tmp_path: Path, old: bytes, new: bytes) -> Path:
    """The lossy vector with other bytes in its structure, which is stored and not compressed."""
    path = tmp_path / "structured.tsc"
    with Container(VALID / "lossy.tsc") as container, path.open("wb") as file:
        writer = ContainerWriter(file.fileno())
        for block in container.blocks:
            reader = ByteReader(container.read(block.chunks[0].ref, CHUNK), "chunk")
            header = ChunkHeader.read(reader)
            chunk = EncodedChunk(header, bytes(reader.take(reader.remaining)))
            writer.add_block(block.n_frames, block.content_id, block.logical_id, [chunk])
        payload = bytes(container.read(container.snapshots[0], SNAPSHOT))
        head, structure = ByteWriter().raw(ids_of(payload)), structure_of(payload)
        assert structure.count(old) == 1
        structure = structure.replace(old, new)
        writer.add_snapshot(head.uvarint(len(structure)).raw(zstd.store(structure)).bytes())
        writer.commit()
    return path


def test_structures_state_no_dictionary() -> None:
    """A frame that names its dictionary means one with an id, which these have not."""
    content, dictionary = b"a structure" * 9, dictionary_of(b"")
    packed = zstd.compress(content, 19, dictionary)
    assert zstd.decompress(packed, 99, "test", dictionary) == content
    # RFC 8878: the two lowest bits of the descriptor say how many bytes of an id follow.
    assert packed[4] & 3 == 0
    named = packed[:4] + bytes([packed[4] | 1, 7]) + packed[5:]
    with pytest.raises(DamagedError):
        zstd.decompress(named, 99, "test", dictionary)
    with pytest.raises(DamagedError):
        zstd.decompress(packed, 98, "test", dictionary)


def test_structures_may_be_stored(tmp_path: Path) -> None:
    read_all(structured(tmp_path, b"\x05lossy", b"\x05other"), BOOK)


PAIRING = b"\x0crope_pairing\x08\x04norm\x0bexpected_kl"
POSITIONS = bytes([0, 3, 0, 2, 6])  # runs: start 0, step 1, count 6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PAIRING, PAIRING.replace(b"norm", b"both")),
        (PAIRING, PAIRING.replace(b"\x08\x04norm", b"\x0a" + bytes(8))),
        # Rows of other lengths, more tensors, quantized ones.
        (bytes([0, 2, 0, 1, 8, 1]), bytes([0, 2, 0, 1, 6, 1])),
        (bytes([0, 2, 0, 1, 8, 1]), bytes([0, 4, 0, 1, 4, 1])),
        (bytes([0, 2, 1, 1, 8, 1]), bytes([0, 2, 0, 1, 8, 1])),
        (bytes([0, 2, 1, 1, 8, 1]), bytes([0, 2, 1, 8, 34, 1])),
        (b"\x04book\x08\x40", b"\x04bock\x08\x40"),
    ],
    ids=str,
)
def test_structures_that_do_not_fit(old: bytes, new: bytes, tmp_path: Path) -> None:
    path = structured(tmp_path, old, new)
    with pytest.raises(TscError):
        read_all(path, BOOK)
    with pytest.raises(TscError):
        tscfile.append(make.made_up(make.TOKENS + make.MORE), path, book=BOOK)


@pytest.mark.parametrize(
    "runs", [[(3, 2, 6)], [(5, 0, 6)], [(19, 0, 6)], [(13, 4, 6)], [(0xFFFFFFFE, 0, 6)]], ids=str
)
def test_positions_of_any_kind_are_read(runs: list[tuple[int, int, int]], tmp_path: Path) -> None:
    """Negative ones (zigzag), and some behind the last token."""
    writer = ByteWriter()
    for run in runs:
        for value in run:
            writer.uvarint(value)
    body = writer.bytes()
    path = structured(tmp_path, POSITIONS, bytes([0, len(body)]) + body)
    read_all(path, BOOK)
