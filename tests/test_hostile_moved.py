"""Contexts, sources and codec 7 where no vector shows them: what they do not change, and files that
claim what is not there."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from conftest import make_snapshot, same_state
from spec_decoder import SPEC, VALID, assert_same, decoder, load
from test_hostile import mutations, outcome

import tscfile
from tscfile import compaction, storing
from tscfile.archive import Archive
from tscfile.bytestream import ByteWriter
from tscfile.container.records import CHUNK, BlockEntry, FrameRun, Index
from tscfile.container.snapshots import Context, TokenIds
from tscfile.context import FrameContext
from tscfile.errors import DamagedError, TscError
from tscfile.verification import verify


@pytest.fixture(scope="module")
def make() -> Any:
    return load(SPEC / "vectors" / "make.py")


@pytest.fixture(scope="module")
def invalid(make: Any) -> Any:
    return importlib.import_module("make_invalid")


# Contexts ---------------------------------------------------------------------------------------


def saves_in_context(make: Any, draft: Any, chunk: Any, coding: dict[str, Any]) -> bytes:
    """The same frames without a context, and with one."""
    toy = importlib.import_module("toy")
    ids, tensors, number = toy.as_ids(toy.TOKENS), toy.tensors_of(2), draft.block([chunk])
    other = toy.as_ids(toy.OTHERS)
    context = Context(0, TokenIds(0, len(other), *runs_of(other)))
    for run in ((number, 0, 6), (number, 0, 6, 1, -3)):
        track = make.track_record(tensors, [run], make.plain_cells(6))
        record = make.snapshot_record(
            ids, [track], number=len(draft.snapshots), tier="custom", coding=coding,
            contexts=(context,),
        )  # fmt: skip
        draft.snapshot(record, ids)
    return bytes(draft.commit())


def runs_of(ids: np.ndarray) -> tuple[int, bytes]:
    from tscfile import tokens

    found = tokens.encode(ids, ids[:0], None)
    return found.coding, found.data


def test_a_context_means_nothing_without_a_book(make: Any, tmp_path: Path) -> None:
    """Keys of codec 3 are turned to the cells, whatever the context."""
    draft = make.Draft()
    basis = make.Basis(make.TURN, [make.group_of([0, 1, 2, 3], [1, 1, 1, 1], [0, 0], [
        [1, 2, 3, 4] * 4, [4, 3, 2, 1] * 4])])  # fmt: skip
    basis.id = draft.extra(make.BASIS, basis.write())
    values = np.zeros((6, 17), np.int32)
    values[:, 0] = [3, -2, 1, 1, 4, -7]
    chunk = make.session_chunk(basis, values, 3, [(6, 0)])
    path = tmp_path / "a.tsc"
    path.write_bytes(saves_in_context(make, draft, chunk, {"bases": [f"{basis.id:016x}"]}))
    plain, other = (each["tracks"][0]["rows"] for each in assert_same(path).snapshots)
    assert all(np.array_equal(a, b) for a, b in zip(plain, other, strict=True))
    assert len(np.unique(plain[0], axis=0)) == 6


def test_codes_of_a_book_in_a_context(make: Any, tmp_path: Path) -> None:
    """Their prediction is that of the context, keys are turned to the cells; exact frames are given
    as they are."""
    path, book = tmp_path / "a.tsc", tmp_path / "a.tscbook"
    book.write_bytes(make.product_book().to_bytes())
    codes = [bytes(each) for each in ([3, 7, 1], [9], [], [255, 0], [255, 255, 255])]
    chunk = make.product_chunk(0, [*codes, make.exact_frame()])
    coding = {"book": book.read_bytes()[-32:].hex(), "rope_pairing": "norm"}
    path.write_bytes(saves_in_context(make, make.Draft(), chunk, coding))
    file = assert_same(path, book)
    plain, other = (each["tracks"][0]["rows"] for each in file.snapshots)
    assert all(np.array_equal(a[5], b[5]) for a, b in zip(plain, other, strict=True))
    assert not any(np.array_equal(a[:5], b[:5]) for a, b in zip(plain, other, strict=True))
    snapshot, opened = file.snapshots[1], file.book(file.snapshots[1])
    z = opened.predict(snapshot["contexts"][0], np.array([5]))
    x = opened.channels(z, decoder.sums_of_codes([codes[2]], opened.product_stages, 3))
    assert np.array_equal(other[2][2].view("<f2"), x[0, 8:12].astype(np.float16))


def test_claims_of_contexts_are_bounded(invalid: Any, tmp_path: Path) -> None:
    """A run of equal integers is a list of any length in a few bytes."""
    n = 800_000
    body = ByteWriter().svarint(1).svarint(0).uvarint(n).bytes()
    ids = TokenIds(0, n, 0, body)
    path, context = tmp_path / "a.tsc", Context(0, ids)
    path.write_bytes(invalid.small(record=invalid.of_record(contexts=(context, context))))
    assert isinstance(outcome(path), DamagedError)
    # Long ones that are kept are no claim, and not all in memory at once.
    kept = tuple(Context(0, TokenIds(n - i, 0, 0, b"")) for i in range(64))
    long = invalid.of_record(ids=ids)
    data = invalid.small(record=invalid.of_record(contexts=kept), earlier=long)
    path.write_bytes(data)
    assert outcome(path) is None and len(data) < 2048
    with Archive(path) as archive:
        assert [len(archive.tokens(1, i)) for i in (0, 1, 64)] == [2, n, n - 63]


# Sources ----------------------------------------------------------------------------------------


def test_any_damage_of_sources_is_noticed(make: Any, tmp_path: Path) -> None:
    """Bytes of the index and of a snapshot with right checksums: the rows that went in, or a
    project error."""
    moved, path = importlib.import_module("make_moved"), tmp_path / "a.tsc"
    rows = [b"".join(part.tobytes() for part in each) for each in rows_of(VALID / "difference.tsc")]
    index: list[bytes] = []
    moved.make_difference().commit(payload=lambda payload: index.append(payload) or payload)
    n_right = n_wrong = 0
    rng = np.random.default_rng(0)
    for changed in mutations(index[0], n_bits=2):
        if rng.random() > 0.25:
            continue
        path.write_bytes(moved.make_difference().commit(payload=lambda _, new=changed: new))
        try:
            found = [b"".join(part.tobytes() for part in each) for each in rows_of(path)]
        except TscError:
            n_wrong += 1
            continue
        n_right += found == rows
        assert found == rows
    # The logical ids, and mutations that change nothing.
    assert n_right < n_wrong / 2 and n_wrong > 200


def rows_of(path: Path) -> Iterator[list[np.ndarray]]:
    with Archive(path) as archive:
        for snapshot in archive:
            (track,) = snapshot.tracks
            yield track.read(0, len(track.cells))


def test_claims_of_sources_are_bounded(invalid: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    runs = (FrameRun(0, 0, 0),) * 1_000_000 + (FrameRun(0, 0, 2),)

    def claims(index: Index, own: Any) -> Index:
        first, second = index.blocks
        return replace(index, blocks=[first, replace(second, sources=runs)])

    path.write_bytes(invalid.small(**invalid.with_difference(index=claims)))
    assert isinstance(outcome(path), DamagedError)


def test_writers_keep_to_the_limit_of_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would have too many is stored by itself, when it is packed and when it is compacted."""
    path, out = tmp_path / "a.tsc", tmp_path / "b.tsc"
    saves = [make_snapshot(100, n_layers=1, n_channels=64)]
    for _ in range(2):
        (track,) = saves[-1].tracks
        rows = [part.copy() for part in track.read(0, 100)]
        rows[0][30:60, 0] ^= 1
        saves.append(replace(saves[-1], tracks=[replace(track, rows=rows)]))
    monkeypatch.setattr(storing, "MAX_SOURCE_WAYS", 1)
    tscfile.pack(saves[0], path)
    assert [tscfile.append(save, path).plan for save in saves[1:]] == ["patch", "patch"]
    assert sources_in(path, saves) == [0, 1, 0]
    monkeypatch.setattr(storing, "MAX_SOURCE_WAYS", 2)
    path.unlink()
    tscfile.pack(saves[0], path)
    for save in saves[1:]:
        tscfile.append(save, path)
    assert sources_in(path, saves) == [0, 1, 1]
    tscfile.compact(path, out)
    assert sources_in(out, saves)[-2:] == [1, 1]
    monkeypatch.setattr(compaction, "MAX_SOURCE_WAYS", 1)
    tscfile.compact(path, out, force=True)
    assert sources_in(out, saves)[-2:] == [1, 0]


def sources_in(path: Path, saves: list[Any]) -> list[int]:
    """How many runs of sources each block has."""
    with Archive(path) as archive:
        assert all(map(same_state, archive, saves))
        return [len(entry.sources) for entry in archive.container.blocks]


def test_the_type_of_a_difference_is_that_of_the_first_tensor(make: Any, tmp_path: Path) -> None:
    moved, path = importlib.import_module("make_moved"), tmp_path / "a.tsc"
    draft = moved.make_difference()
    with Archive(VALID / "difference.tsc") as archive:
        ref = archive.container.blocks[1].chunks[0].ref
        payload = bytearray(archive.container.read(ref, CHUNK))
    assert payload[4] == 1  # f16, of the keys; values are q8_0
    payload[4] = 8
    entry: BlockEntry = draft.blocks[1]
    chunk = replace(entry.chunks[0], ref=draft.record(CHUNK, bytes(payload)),
                    payload_checksum=decoder.checksum(payload))  # fmt: skip
    draft.blocks[1] = replace(entry, chunks=(chunk,))
    path.write_bytes(draft.commit())
    with pytest.raises(DamagedError, match="not what index and snapshot say"):
        list(rows_of(path))
    with pytest.raises(decoder.Damaged, match="type of a chunk"):
        decoder.File(path.read_bytes())
    assert verify(path).problems


# Content ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lossy", "layered"])
def test_content_ids_are_of_the_rows_that_were_packed(name: str, make: Any) -> None:
    """Of lossy blocks too."""
    toy = importlib.import_module("toy")
    rows = toy.made_up(toy.TOKENS).tracks[0].read(0, 6)
    (block,) = decoder.File(
        (VALID / f"{name}.tsc").read_bytes(), (VALID / f"{name}.tscbook").read_bytes()
    ).blocks
    packed = b"".join(part.tobytes() for part in rows)
    assert block["content_id"] == blake3(packed).digest(length=16)


def test_where_a_moved_frame_is_decoded() -> None:
    context = FrameContext(np.array([5, 2], np.int32), np.arange(9, dtype=np.int32), -2)
    assert context.key_pos.tolist() == [3, 0] and context.history(1)[:, 0].tolist() == [5, 2]
