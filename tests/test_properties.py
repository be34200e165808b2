"""Whatever the model can say comes back bit for bit on every lossless way."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import strategies as own
from checks import BOOK, check_holds
from conftest import same_state, state_bytes
from hypothesis import given
from hypothesis import strategies as st

import tscfile
from tscfile.compaction import compact
from tscfile.errors import MismatchError
from tscfile.model import Snapshot
from tscfile.salvage import salvage
from tscfile.sources import open_source, write_carrier
from tscfile.sources.llama_state import parse_state


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of files that each example overwrites."""
    return tmp_path_factory.mktemp("properties")


def append_chain(draw: st.DrawFn, first: Snapshot, path: Path, **options: Any) -> list[Snapshot]:
    """Pack ``first`` and append later saves of it; returns what the archive has then."""
    tscfile.pack(first, path, force=True, name=draw(own.texts()), **options)
    held = [first]
    book = {key: options[key] for key in options if key == "book"}
    for _ in range(draw(st.integers(0, 3))):
        save = draw(own.later(draw(st.sampled_from(held))))
        before = path.read_bytes()
        try:
            tscfile.append(save, path, **book)
        except MismatchError as error:
            # A save that has nothing to do with the others is refused and changes nothing.
            assert "in common" in str(error) or "no first token" in str(error)
            assert path.read_bytes() == before
        else:
            held.append(save)
    return held


@own.examples(60)
@given(st.data(), st.booleans())
def test_lossless_ways(folder: Path, data: st.DataObject, small_blocks: bool) -> None:
    """Packed, appended, compacted, salvaged."""
    path, out = folder / "a.tsc", folder / "out.tsc"
    frames = own.FRAMES | st.sampled_from([255, 256, 257, 300]) if small_blocks else own.FRAMES
    held = append_chain(data.draw, data.draw(own.snapshots(frames)), path)
    check_holds(path, held)
    report = salvage(path, out, force=True)
    assert report.is_complete and not report.n_mended
    check_holds(out, held)
    dropped = data.draw(own.drops(len(held)))
    compact(path, out, drop=dropped, force=True)
    kept = [each for number, each in enumerate(held) if number not in dropped]
    check_holds(out, kept)
    # What was compacted takes later saves as well.
    compact(out)
    try:
        more = data.draw(own.later(kept[-1]))
        tscfile.append(more, out)
    except MismatchError:
        more = replace(kept[-1])
        tscfile.append(more, out)
    check_holds(out, [*kept, more])


@own.examples(8)
@given(st.data())
def test_lossless_ways_with_a_book(folder: Path, data: st.DataObject) -> None:
    """Whatever the rows of a model's tensors are, its book loses nothing of them."""
    path, out = folder / "a.tsc", folder / "out.tsc"
    first = data.draw(own.sample_shaped())
    held = append_chain(data.draw, first, path, tier="lossless", book=BOOK)
    check_holds(path, held, BOOK)
    assert salvage(path, out, book=BOOK, force=True).is_complete
    check_holds(out, held, BOOK)
    dropped = data.draw(own.drops(len(held)))
    compact(path, out, drop=dropped, book=BOOK, force=True)
    kept = [each for number, each in enumerate(held) if number not in dropped]
    check_holds(out, kept, BOOK)


# --- sources ----------------------------------------------------------------------------------


@own.examples(100)
@given(own.llama_states())
def test_llama_states_come_back(folder: Path, state: tuple[Snapshot, dict[str, str]]) -> None:
    """Written, read, packed, carried in a GGUF file: one snapshot, and its bytes again."""
    snapshot, told = state
    data = state_bytes(snapshot)
    found = parse_state(data, **told)
    unnamed = {key: value for key, value in snapshot.source.items() if key != "generation"}
    assert {key: found.source[key] for key in unnamed} == unnamed
    same = replace(snapshot, source=found.source, identity=found.identity)
    assert same_state(found, same)
    tscfile.pack(found, folder / "a.tsc", force=True)
    write_carrier(found, folder / "a.gguf", "gguf", force=True)
    with tscfile.open(folder / "a.tsc") as archive:
        for back in (archive.snapshot(), open_source(folder / "a.gguf")):
            assert same_state(back, found)
            assert state_bytes(back) == data


@own.examples(60)
@given(own.transformers_caches())
def test_transformers_caches_come_back(folder: Path, cache: Snapshot) -> None:
    """From an archive and from every carrier, which are then the same bytes."""
    tscfile.pack(cache, folder / "a.tsc", force=True)
    with tscfile.open(folder / "a.tsc") as archive:
        packed = archive.snapshot()
        assert same_state(packed, cache)
        for carrier in ("safetensors", "npz", "gguf"):
            first, second = folder / f"1.{carrier}", folder / f"2.{carrier}"
            write_carrier(cache, first, carrier, force=True)
            assert same_state(open_source(first), cache), carrier
            write_carrier(packed, second, carrier, force=True)
            assert first.read_bytes() == second.read_bytes(), carrier
