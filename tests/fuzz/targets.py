"""What is done with the bytes of strangers: one function for each kind of file.

A target takes any bytes. It may raise the documented errors alone, which `attempt` takes for an
answer; all else that a target raises is a finding. What a reader accepts must also be usable:
rows are read, facts can be stored, a state comes back byte for byte.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import tscfile
from tscfile.archive import Archive
from tscfile.book_codec import BookCodec
from tscfile.books import book as books
from tscfile.bytestream import ByteWriter
from tscfile.container.metadata import write_metadata
from tscfile.container.writer import EncodedChunk
from tscfile.context import FrameContext
from tscfile.description import describe
from tscfile.dtypes import DTYPES
from tscfile.entropy.token_ids import TokenCoder
from tscfile.errors import TscError
from tscfile.identity import identity_from_gguf
from tscfile.model import ModelIdentity, Snapshot, TensorSpec
from tscfile.product_codec import BookDomain, ProductCodec
from tscfile.salvage import salvage
from tscfile.sources.gguf_cache import open_gguf
from tscfile.sources.hf_layout import as_llama_state
from tscfile.sources.llama_state import open_state, state_size, write_state
from tscfile.sources.llama_state.layout import CONTAINERS, SEQUENCE_BUFFER
from tscfile.sources.npz_cache import open_npz
from tscfile.sources.safetensors_cache import open_safetensors, write_safetensors

ROOT = Path(__file__).parents[2]
Rows = NDArray[np.uint8]

VECTORS = ROOT / "spec" / "vectors" / "valid"


@cache
def folder() -> Path:
    """Where inputs are written: in memory where the system has such a place."""
    shm = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="tscfile-fuzz-", dir=shm if shm.is_dir() else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@contextlib.contextmanager
def stored(data: bytes, name: str) -> Iterator[Path]:
    """``data`` as a file. It is a new one each time, as a reader may still have the last mapped."""
    path = folder() / name
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    yield path


def attempt(step: Callable[[], object]) -> bool:
    """Whether ``step`` succeeds; it may fail with an error of the project, in one line."""
    try:
        step()
    except TscError as error:
        assert "\n" not in str(error), f"an error of several lines: {error!r}"
        assert type(error) is not TscError, f"an error without a class: {error!r}"
        str(error).encode()
        return False
    return True


# --- snapshots ----------------------------------------------------------------------------------


def use_snapshot(snapshot: Snapshot) -> None:
    """Read all rows, in one go and at both ends, and store what is said of them."""
    for track in snapshot.tracks:
        n = len(track.cells)
        whole = track.read(0, n)
        assert [part.shape for part in whole] == [(n, spec.row_bytes) for spec in track.tensors]
        for start, stop in ((0, min(n, 1)), (n - min(n, 1), n)):
            parts = track.read(start, stop)
            assert all(
                np.array_equal(part, rows[start:stop])
                for part, rows in zip(parts, whole, strict=True)
            )
        write_metadata(ByteWriter(), track.attributes)
    write_metadata(ByteWriter(), snapshot.source)
    write_metadata(ByteWriter(), snapshot.identity.facts)
    for name in snapshot.opaque:
        ByteWriter().string(name)


def write_back(snapshot: Snapshot) -> bytes:
    out = bytearray(state_size(snapshot))
    write_state(snapshot, out)
    return bytes(out)


ARCHS = (None, "llama", "mamba", "jamba", "deepseek2")


def llama(data: bytes) -> None:
    """A state of llama.cpp, as its magic says and in a container and architecture by turns."""
    turn = zlib.crc32(data)
    container = CONTAINERS[turn % 4] if turn & 64 else SEQUENCE_BUFFER
    arch = ARCHS[turn // 128 % len(ARCHS)]
    with stored(data, "a.kv") as path:
        for options in ({}, {"arch": arch, "container": container}):
            attempt(partial(_use_state, path, data, options))


def _use_state(path: Path, data: bytes, options: dict[str, str | None]) -> None:
    snapshot = open_state(path, **options)
    use_snapshot(snapshot)
    assert write_back(snapshot) == data, "another state comes back"


def safetensors(data: bytes) -> None:
    with stored(data, "a.safetensors") as path:
        attempt(lambda: _use_carried(open_safetensors(path)))


def npz(data: bytes) -> None:
    with stored(data, "a.npz") as path:
        attempt(lambda: _use_carried(open_npz(path)))


def gguf(data: bytes) -> None:
    with stored(data, "a.gguf") as path:
        attempt(lambda: _use_carried(open_gguf(path)))


def _use_carried(snapshot: Snapshot) -> None:
    """A cache in a carrier: it becomes a state and another file, where it can be one."""
    use_snapshot(snapshot)
    attempt(lambda: write_back(as_llama_state(snapshot)))
    out = folder() / "again.safetensors"
    if attempt(lambda: write_safetensors(snapshot, out, force=True)):
        again = open_safetensors(out)
        assert np.array_equal(again.tokens, snapshot.tokens)
        use_snapshot(again)


def model(data: bytes) -> None:
    """Facts and fingerprints of a GGUF model."""
    with stored(data, "model.gguf") as path:
        attempt(lambda: write_metadata(ByteWriter(), identity_from_gguf(path).facts))


# --- archives and books -------------------------------------------------------------------------


def tsc(data: bytes) -> None:
    """An archive with books beside it, which some of its snapshots need."""
    beside()
    with stored(data, "a.tsc") as path:
        attempt(lambda: _read_archive(path))
        attempt(lambda: tscfile.verify(path, quick=True))
        attempt(lambda: tscfile.verify(path))


def salvaged(data: bytes) -> None:
    """What can be had of a damaged archive is a whole one."""
    beside()
    out = folder() / "out.tsc"
    with stored(data, "a.tsc") as path:
        attempt(lambda: _salvage(path, out))


def _salvage(path: Path, out: Path) -> None:
    report = salvage(path, out, force=True)
    with Archive(out) as archive:
        assert len(archive) == len(report.kept)
    if not report.undecoded:
        problems = tscfile.verify(out).problems
        assert not problems, f"salvaged and not whole: {problems[0]}"


@cache
def beside() -> None:
    for path in VECTORS.glob("*.tscbook"):
        shutil.copy(path, folder())


def _read_archive(path: Path) -> None:
    with Archive(path) as archive:
        attempt(lambda: describe(archive))
        for number in range(len(archive)):
            attempt(partial(archive.tokens, number))
            attempt(partial(_read_frames, archive, number))


def _read_frames(archive: Archive, number: int) -> None:
    for tier in archive.record(number).layers:
        for track in archive.snapshot(number, tier).tracks:
            n = len(track.cells)
            attempt(partial(track.read, 0, n))
            attempt(partial(track.read, n // 2, n, [len(track.tensors) - 1]))
    attempt(partial(archive.read, number, frames=(0, 1)))


def book(data: bytes) -> None:
    """A book: everything that decoding does with one, and what it encodes comes back."""
    attempt(lambda: _use_book(data))


_ROWS_OF_A_BOOK = 4
_MOST_ARRAYS = 1 << 20
"""Bytes of a book's arrays that are worked with: as floats they take several times as much."""


def _use_book(data: bytes) -> None:
    opened = books.open_bytes(data, "book")
    found, n = opened.book, _ROWS_OF_A_BOOK
    if sum(array.nbytes for array in found.arrays.values()) > _MOST_ARRAYS:
        return
    context = FrameContext(
        np.array([0, 5, -7, 1 << 30], np.int32), np.array([1, 2, -5, 9], np.int32)
    )
    with np.errstate(all="ignore"):
        predicted = found.predict(context)
        assert predicted.shape == (n, found.n_channels)
        attempt(lambda: found.analyse(predicted, found.stored(0)))
        found.kl_of_step(123)
        attempt(lambda: found.step_of_kl(0.01))
        attempt(lambda: _use_token_coder(opened.token_coder, data[-2 * books.HASH_BYTES :]))
        attempt(lambda: _use_codecs(opened, context))


def _use_codecs(opened: books.OpenBook, context: FrameContext) -> None:
    groups = opened.book.groups
    dtype, n = DTYPES["f16"], _ROWS_OF_A_BOOK
    specs = [
        TensorSpec(layer, role, dtype, dtype.row_bytes(groups.width))
        for role in "kv" for layer in range(groups.n_layers)
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    rows = [
        rng.normal(0, 1, (n, groups.width)).astype("<f2").view(np.uint8) for _ in specs
    ]
    codec = BookCodec(opened, ModelIdentity({"rope_pairing": "neox"}), "book")
    codec.check(specs, "book")
    attempt(lambda: _use_lossy(codec, rows, specs, context))
    attempt(lambda: _use_exact(codec, rows, specs, context))
    attempt(lambda: _use_product(codec, rows, specs, context))


def _payload(chunk: EncodedChunk) -> memoryview:
    return memoryview(chunk.header.write() + chunk.body)


def _use_lossy(
    codec: BookCodec, rows: list[Rows], specs: list[TensorSpec], context: FrameContext
) -> None:
    steps = [np.full(len(context.pos), step, np.int32) for step in (512, 256)]
    payloads = [_payload(chunk) for chunk in codec.encode(rows, specs, context, steps)]
    again = codec.decode(payloads, specs, 0, context, "book")
    assert [part.shape for part in again] == [part.shape for part in rows]


def _use_exact(
    codec: BookCodec, rows: list[Rows], specs: list[TensorSpec], context: FrameContext
) -> None:
    if codec.exact is None or not codec.exact.takes_types(specs):
        return
    payload = _payload(codec.exact.encode(rows, specs, context))
    again = codec.decode_exact(payload, specs, "book")
    assert all(np.array_equal(a, b) for a, b in zip(again, rows, strict=True)), "not exact"


def _use_product(
    codec: BookCodec, rows: list[Rows], specs: list[TensorSpec], context: FrameContext
) -> None:
    product = ProductCodec(BookDomain(codec, "book"))
    worth, limits = np.full(len(context.pos), 0.1), np.full(len(context.pos), 10.0)
    payload = _payload(product.encode(rows, specs, context, worth, limits).chunk)
    again = product.decode(payload, specs, 0, context, "book")
    assert [part.shape for part in again] == [part.shape for part in rows]


def _use_token_coder(coder: TokenCoder | None, foreign: bytes) -> None:
    if coder is None:
        return
    nothing, ids = np.zeros(0, np.int32), np.array([1, 2, 3, 9, 1, 2, 3, 9, 70000], np.int32)
    coded = coder.encode(ids, nothing)
    assert np.array_equal(coder.decode(coded, len(ids), nothing, "ids"), ids)
    for data in (bytes(len(coded)), foreign, coded[::-1]):
        attempt(partial(coder.decode, data, len(ids), nothing, "ids"))


# --- all of them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """``most``: bytes of an input; ``seconds``: how long one may take."""

    run: Callable[[bytes], None]
    most: int = 1 << 14
    seconds: int = 20


TARGETS = {
    "llama": Target(llama), "safetensors": Target(safetensors), "npz": Target(npz),
    "gguf": Target(gguf), "model": Target(model), "book": Target(book), "tsc": Target(tsc),
    "salvage": Target(salvaged),
}  # fmt: skip
