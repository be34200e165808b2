"""Make the files of valid/ and invalid/ again: python spec/vectors/make.py [folder]

Those of valid/ are what tscfile writes of small made-up sessions, or, where learning from a session
would make other tables on other machines, what the classes of tscfile write of given integers. So
another version of it or of zstd may make other bytes of the same content. The JSON beside each says
what every reader must get: what went in, or, of lossy tiers, what the decoder of the specification
makes of the file. invalid/ is the matter of make_invalid.py.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tscfile
from tscfile import registry
from tscfile.blocks import content_id
from tscfile.book_codec import BookCodec
from tscfile.books import book as books
from tscfile.books.book import TierEntry
from tscfile.bytestream import ByteWriter
from tscfile.container.records import BASIS, CODEBOOKS, ChunkHeader
from tscfile.container.writer import EncodedChunk
from tscfile.context import FrameContext
from tscfile.entropy import widths
from tscfile.model import ModelIdentity, Snapshot
from tscfile.product_codec import _write_forms
from tscfile.product_session import SessionCodes
from tscfile.session_basis import Basis, Group, KeyTurn

SPEC = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_moved as moved  # noqa: E402
from draft import Draft, plain_cells, snapshot_record, track_record  # noqa: E402
from make_invalid import make_invalid, small  # noqa: E402
from toy import (  # noqa: E402
    MORE,
    OTHERS,
    TOKENS,
    MadeUpTrack,
    as_ids,
    exact_book,
    made_up,
    product_book,
    tensors_of,
    toy_book,
)

# --- smallest ---------------------------------------------------------------------------------


def make_smallest(folder: Path) -> None:
    path = folder / "smallest.tsc"
    path.unlink(missing_ok=True)
    saves = {"first": [11, 12, 13], "longer": [11, 12, 13, 7], "cut": [11, 12]}
    for name, tokens in saves.items():
        keys = [[i + 1, 0.5 ** (i + 1), -(i + 1), 0] for i in range(len(tokens))]
        values = [[0.5, 0.5, i + 1.5, -i - 1.5] for i in range(len(tokens))]
        rows = [np.array(part, np.float16) for part in (keys, values)]
        snapshot = Snapshot(
            as_ids(tokens), [MadeUpTrack(rows, {"v_trans": 0})], {"format": "example"},
            {"note": b"hello"}, ModelIdentity({"architecture": "toy"}),
        )  # fmt: skip
        (tscfile.append if path.exists() else tscfile.pack)(snapshot, path, name=name)
    write_json(path)


def make_small(folder: Path) -> None:
    """What the files of invalid/ are made of."""
    path = folder / "small.tsc"
    path.write_bytes(small())
    write_json(path)


# --- book tiers -------------------------------------------------------------------------------


def make_lossy(folder: Path) -> None:
    book, path = folder / "lossy.tscbook", folder / "lossy.tsc"
    book.write_bytes(toy_book().to_bytes())
    tscfile.pack(made_up(TOKENS), path, tier="near", book=book, name="lossy", force=True)
    write_json(path, book)


def make_embedded(folder: Path) -> None:
    book, path = folder / "lossy.tscbook", folder / "embedded.tsc"
    tscfile.pack(
        made_up(TOKENS), path, tier="near", book=book, embed_book=True, name="first", force=True
    )
    tscfile.append(made_up(TOKENS + MORE), path, name="longer")
    tscfile.append(made_up(TOKENS[:4] + OTHERS), path, tier="lossless", name="exact")
    write_json(path)


def make_layered(folder: Path) -> None:
    book, path = folder / "layered.tscbook", folder / "layered.tsc"
    tiers = (TierEntry("balanced", 640, 0.005, 7.0), TierEntry("near", 256, 0.0005, 3.5))
    book.write_bytes(toy_book(tiers).to_bytes())
    layers = ["balanced", "near", "lossless"]
    tscfile.pack(made_up(TOKENS), path, tier=layers, book=book, name="layered", force=True)
    write_json(path, book, layers[:-1])


def make_tokens(folder: Path) -> None:
    """Frames that are not stored, frames that are, and both in one track."""
    path = folder / "tokens.tsc"
    path.unlink(missing_ok=True)
    first, longer, other = TOKENS, TOKENS + MORE, (TOKENS + MORE)[:12] + [1, 1]
    for tokens, tier, name in (
        (first, "tokens", "first"), (longer, "tokens", "longer"), (longer, "lossless", "exact"),
        (other, "tokens", "other"),
    ):  # fmt: skip
        snapshot = made_up(tokens)
        snapshot.identity.facts["weights_blake3"] = "0" * 64
        (tscfile.append if path.exists() else tscfile.pack)(snapshot, path, tier=tier, name=name)
    write_json(path)


# --- exact rows with a book -------------------------------------------------------------------


def make_exact(folder: Path) -> None:
    """Two tracks, f16 and bf16, of codec 5, with numbers of all kinds among them."""
    book, path = folder / "exact.tscbook", folder / "exact.tsc"
    book.write_bytes(exact_book().to_bytes())
    snapshot = made_up(TOKENS + MORE)
    halves = [part.view("<f2").copy() for part in snapshot.tracks[0].read(0, 16)]
    patterns = [(part.astype("<f4").view("<u4") >> 16).astype("<u2") for part in halves]
    for rows, special in (
        ([part.view("<u2") for part in halves], [0x8000, 0x0001, 0x8203, 0x7BFF, 0x7C00, 0xFE01]),
        (patterns, [0x8000, 0x0001, 0x8041, 0x7F7F, 0xFF80, 0x7FC1]),
    ):
        for i, pattern in enumerate(special):
            rows[i % 4][2 * i, i % 3] = pattern
    opened, ids = books.load(book), snapshot.tokens
    codec = BookCodec(opened, snapshot.identity, "exact").exact
    assert codec is not None
    draft, tracks = Draft(), []
    for track in (MadeUpTrack(halves, {}), MadeUpTrack(patterns, {}, cache=1)):
        rows = track.read(0, 16)
        chunk = codec.encode(rows, track.tensors, FrameContext(track.cells.pos, ids))
        runs = [(draft.block([chunk], content_id(rows)), 0, 16)]
        tracks.append(track_record(track.tensors, runs, track.cells, cache=track.cache))
    coding = {"book": opened.id, "rope_pairing": "norm"}
    draft.snapshot(snapshot_record(ids, tracks, name="exact", coding=coding), ids)
    finish(draft, path, book)


# --- without a book ---------------------------------------------------------------------------

TURN = KeyTurn(4, "neox", np.array([1, 0.5], np.float32))


def make_session(folder: Path) -> None:
    """A basis of two groups of layers, one that extends it, and a save with frames of both."""
    first = Basis(TURN, [
        group_of([0, 2], [1.5, 0.75], [3, 4], [
            [4, 0, -2, 0, 9, 0, 0, 1], [5, -3, 0, 1, 0, 7, -1, 0]]),
        group_of([1, 3], [1, 2], [0, 2, -5], [
            [0, 0, 1, 0, 0, 0, 0, 0], [2, 0, 2, -1, 300, 0, 0, 1], [0, 1, 0, 0, 0, 0, -2, 0]]),
    ])  # fmt: skip
    draft = Draft()
    first.id = draft.extra(BASIS, first.write())
    more = Basis(TURN, [
        with_row(first.groups[0], 6, [0, 0, 0, 9, 0, -4, 0, 3]), first.groups[1],
    ], first.id)  # fmt: skip
    values = np.zeros((6, 19), np.int32)
    values[:, 0], values[:, 1], values[:, 2] = [3, -2, 0, 1, 40, -7], [1, 0, 0, -1, 2, 0], 1
    values[:, 4], values[:, 17] = [0, 0, 1, 0, 0, -1], [900, -20000, 5, 0, 31, 77]
    block = draft.block([session_chunk(first, values, 3, [(4, 0), (2, 4)])])
    ids, names = as_ids(TOKENS), [f"{first.id:016x}"]
    tensors, coding = tensors_of(2), {"bases": names, "keys": "turned back to position 0",
                                      "tolerance": 0.08, "scales": [1.0, 2.0]}  # fmt: skip
    record = snapshot_record(
        ids, [track_record(tensors, [(block, 0, 6)], plain_cells(6))], tier="balanced",
        name="first", coding=coding,
    )  # fmt: skip
    structure = draft.snapshot(record, ids)
    draft.commit()
    more.id = draft.extra(BASIS, more.write(first))
    values = np.zeros((4, 20), np.int32)
    values[:, 0], values[:, 2], values[:, 7] = [1, 2, 3, 4], [-9, 0, 6, 1], [0, 0, 0, 2]
    later = draft.block([session_chunk(more, values, 6, [(4, 0)])])
    longer, coding = as_ids(TOKENS + MORE[:4]), coding | {"bases": [*names, f"{more.id:016x}"]}
    track = track_record(tensors, [(block, 0, 6), (later, 0, 4)], plain_cells(10))
    record = snapshot_record(
        longer, [track], before=ids, number=1, parent=0, plan="append", tier="balanced",
        name="longer", coding=coding,
    )  # fmt: skip
    draft.snapshot(record, longer, structure)
    finish(draft, folder / "session.tsc")


def group_of(
    tensors: list[int], steps: list[float], exponents: list[int], rows: list[list[int]]
) -> Group:
    """Tensors of four channels each; ``rows``: the mean, then the others."""
    return Group(
        tensors, [4] * len(tensors), np.array(steps, np.float32), np.array(exponents, np.int8),
        np.array(rows, np.int32),
    )  # fmt: skip


def with_row(group: Group, exponent: int, row: list[int]) -> Group:
    rows = [*group.entries.tolist(), row]
    return group_of(group.tensors, group.steps.tolist(), [*group.exponents, exponent], rows)


def session_chunk(
    basis: Basis, values: NDArray[np.int32], shift: int, segments: Sequence[tuple[int, int]]
) -> EncodedChunk:
    """``segments``: frames and extra of each."""
    writer = ByteWriter().pack("Q", basis.id).u8(shift)
    chosen = np.where(values.any(axis=0), np.maximum(widths.choose(values)[0], 1), 0)
    chosen = chosen.astype(np.uint8)
    widths.write_widths(writer, chosen)
    start = 0
    for n, extra in segments:
        writer.uvarint(n).u8(extra).pack("f", 0.0625)
        widths.encode(writer, values[start : start + n], widths.finer(chosen, extra))
        start += n
    header = ChunkHeader(registry.SESSION_TRANSFORM, 0, len(values), 0, 1, (8,) * 4)
    return EncodedChunk(header, writer.bytes())


# --- product quantization ---------------------------------------------------------------------


def make_product(folder: Path) -> None:
    """Frames of none to three codes of a book, and an exact one."""
    book, path = folder / "product.tscbook", folder / "product.tsc"
    book.write_bytes(product_book().to_bytes())
    codes = [bytes(each) for each in ([3, 7, 1], [9], [], [255, 0], [255, 255, 255])]
    chunk = product_chunk(0, [*codes, exact_frame()])
    coding = {"book": book.read_bytes()[-32:].hex(), "rope_pairing": "norm", "code_bytes": 2.0,
              "fallback_above": 4.0, "fallback_frames": 1, "fallback_bytes": 32}  # fmt: skip
    finish(one_product_save(Draft(), chunk, coding), path, book)


def make_codebooks(folder: Path) -> None:
    """The same with codebooks in the file: two rounds of them."""
    entries = np.zeros((2, 4, 256, 2), np.int8)
    for place, numbers in (
        ((0, 0, 5), (30, -7)), ((0, 1, 0), (2, 2)), ((0, 2, 255), (-100, 50)), ((0, 3, 1), (1, 9)),
        ((1, 0, 8), (4, 4)), ((1, 1, 8), (-3, 1)), ((1, 3, 77), (6, -6)),
    ):  # fmt: skip
        entries[place] = numbers
    learnt = SessionCodes(
        TURN, [4] * 4, 2, 4, 2,
        np.array([1, 0, 0, -2, 0.5, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0.25], np.float32),
        np.array([2, 1, 4, 0.5], np.float32),
        np.array([[0.0625] * 4, [0.015625] * 4], np.float32), entries, 0.25,
    )  # fmt: skip
    draft = Draft()
    learnt.id = draft.extra(CODEBOOKS, learnt.write())
    first = bytes([5, 0, 5, 0, 255, 1, 0, 1, 8, 8, 8, 8, 0, 77, 0, 77])
    chunk = product_chunk(learnt.id, [first, first[:8], b"", first[:3], exact_frame(), first[:13]])
    coding = {"keys": "turned back to position 0", "code_bytes": 16.0, "fallback_above": 4.0,
              "fallback_frames": 1, "fallback_bytes": 32,
              "codebooks": [f"{learnt.id:016x}"]}  # fmt: skip
    finish(one_product_save(draft, chunk, coding), folder / "codebooks.tsc")


def exact_frame() -> NDArray[np.float16]:
    return np.arange(1, 17).astype("<f2")


def product_chunk(codebooks: int, frames: Sequence[bytes | NDArray[np.float16]]) -> EncodedChunk:
    """Of each frame its codes or, exact, its numbers."""
    forms = np.array([1 + len(each) if isinstance(each, bytes) else 0 for each in frames])
    writer = ByteWriter().pack("Q", codebooks)
    _write_forms(writer, forms[:4])
    _write_forms(writer, forms[4:])
    for each in frames:
        writer.raw(each if isinstance(each, bytes) else each.tobytes())
    header = ChunkHeader(registry.PRODUCT, 0, len(frames), 0, 1, (8,) * 4)
    return EncodedChunk(header, writer.bytes())


def one_product_save(draft: Draft, chunk: EncodedChunk, coding: dict[str, Any]) -> Draft:
    ids = as_ids(TOKENS)
    track = track_record(tensors_of(2), [(draft.block([chunk]), 0, 6)], plain_cells(6))
    draft.snapshot(snapshot_record(ids, [track], tier="custom", name="codes", coding=coding), ids)
    return draft


def finish(draft: Draft, path: Path, book: Path | None = None) -> None:
    path.write_bytes(draft.commit())
    write_json(path, book)


# --- what is in them --------------------------------------------------------------------------


def load_decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decoder", SPEC / "reference_decoder.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_json(path: Path, book: Path | None = None, layers: Sequence[str] = ()) -> None:
    decoder = load_decoder()
    data, book_data = path.read_bytes(), book and book.read_bytes()
    content = decoder.describe(decoder.File(data, book_data))
    for tier in layers:
        found = decoder.describe(decoder.File(data, book_data, tier))
        content.setdefault("layers", {})[tier] = found["blocks"]
    path.with_suffix(".json").write_text(decoder.as_json(content), encoding="utf-8")


# --- moved and patched frames -----------------------------------------------------------------


def make_moved(folder: Path) -> None:
    moved.make_moved(folder / "moved.tsc")
    write_json(folder / "moved.tsc")


def make_difference(folder: Path) -> None:
    finish(moved.make_difference(), folder / "difference.tsc")


VALID = (
    make_smallest, make_small, make_lossy, make_embedded, make_layered, make_tokens, make_exact,
    make_session, make_product, make_codebooks, make_moved, make_difference,
)  # fmt: skip


def make_all(folder: Path) -> None:
    """Fill ``folder``/valid and ``folder``/invalid."""
    (folder / "valid").mkdir(exist_ok=True)
    for make in VALID:
        make(folder / "valid")
    make_invalid(folder / "invalid", load_decoder())


if __name__ == "__main__":
    make_all(Path(sys.argv[1]) if len(sys.argv) > 1 else SPEC / "vectors")
