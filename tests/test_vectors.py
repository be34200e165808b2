"""The files of spec/vectors: every reader gets out of the valid ones what their JSON says, and
rejects each invalid one for what it breaks."""

from __future__ import annotations

import importlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from spec_decoder import (
    SPEC,
    VALID,
    assert_near,
    assert_same,
    decoder,
    load,
    lossy_blocks,
    snapshot_refs,
    token_coding,
)
from tscfile_cli.main import main

from tscfile.archive import Archive
from tscfile.errors import DamagedError, MismatchError, TscError, UnsupportedError, UsageError
from tscfile.verification import verify

VECTORS = SPEC / "vectors"
INVALID = VECTORS / "invalid"
NAMES = (
    "smallest", "small", "lossy", "embedded", "layered", "tokens", "exact", "session", "product",
    "codebooks", "moved", "difference",
)  # fmt: skip
CLASSES = (
    (DamagedError, "damaged"), (UnsupportedError, "unsupported"),
    (MismatchError, "cannot be decoded with what is given"),
    (UsageError, "cannot be decoded with what is given"),
)  # fmt: skip


@cache
def _make() -> Any:
    return load(VECTORS / "make.py")


def _book(path: Path) -> Path | None:
    book = path.with_suffix(".tscbook")
    return book if book.exists() and path.stem != "embedded" else None


def _json(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


# --- valid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_gets_what_the_json_says(name: str) -> None:
    path = VALID / f"{name}.tsc"
    expected, book = _json(path), _book(path)
    expected.pop("layers", None)
    file = assert_same(path, book)
    found = json.loads(decoder.as_json(decoder.describe(file)))
    for mine, wanted in zip(found["snapshots"], expected["snapshots"], strict=True):
        for track, other in zip(mine["tracks"], wanted["tracks"], strict=True):
            _assert_rows(track["tensors"], other["tensors"], lossy=bool(lossy_blocks(file)))
    assert found == expected
    assert not verify(path, book=book).problems


def _assert_rows(mine: Any, wanted: Any, lossy: bool) -> None:
    """The same bytes, or numbers within the tolerance; takes the rows away."""
    rows = [[tensor.pop("rows") for tensor in part] for part in (mine, wanted)]
    if not lossy:
        assert rows[0] == rows[1]
        return
    types = [tensor["element_type"] for tensor in mine]
    arrays = [
        [np.stack([np.frombuffer(bytes.fromhex(row), np.uint8) for row in part]) for part in each]
        for each in rows
    ]
    assert_near(arrays[0], arrays[1], types)


def test_layers_of_the_layered_vector() -> None:
    path = VALID / "layered.tsc"
    expected, book = _json(path), path.with_suffix(".tscbook")
    for tier, blocks in expected["layers"].items():
        assert decoder.describe(assert_same(path, book, tier))["blocks"] == blocks
    (snapshot,) = expected["snapshots"]
    assert snapshot["coding"]["layers"] == [*expected["layers"], "lossless"]


def test_vectors_have_all_that_the_readme_says() -> None:
    file = decoder.File((VALID / "embedded.tsc").read_bytes())
    assert list(file.books.values()) == [(VALID / "lossy.tscbook").read_bytes()]
    payloads = [file.payload(ref, decoder.SNAPSHOT)[0] for ref in snapshot_refs(file)]
    assert [token_coding(payload) for payload in payloads] == [0, 4, 3]
    assert [snapshot["tier"] for snapshot in file.snapshots] == ["near", "near", "lossless"]
    assert [snapshot["parent"] for snapshot in file.snapshots] == [None, 0, 1]
    used = set()
    for name in NAMES:
        path = VALID / f"{name}.tsc"
        book = _book(path)
        blocks = decoder.File(path.read_bytes(), book and book.read_bytes()).blocks
        used |= {chunk["codec"] for block in blocks for chunk in block["chunks"]}
    assert used == set(range(8))


def test_the_command_prints_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    path, book = str(VALID / "lossy.tsc"), str(VALID / "lossy.tscbook")
    assert decoder.main([path, "--book", book]) == 0
    assert json.loads(capsys.readouterr().out)["book"] == _json(VALID / "lossy.tsc")["book"]
    assert decoder.main([str(VALID / "smallest.tsc"), "--snapshot", "-1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["snapshots"] == _json(VALID / "smallest.tsc")["snapshots"][-1:]
    layered = [str(VALID / "layered.tsc"), "--book", str(VALID / "layered.tscbook")]
    assert decoder.main([*layered, "--tier", "balanced"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["blocks"] == _json(VALID / "layered.tsc")["layers"]["balanced"]
    assert decoder.main([path]) == 4
    assert "lossy.tsc: cannot be decoded with what is given: book" in capsys.readouterr().err
    assert decoder.main([str(VALID / "smallest.tsc"), "--snapshot", "3"]) == 4


# --- invalid ----------------------------------------------------------------------------------


def _tscfile_rejects(path: Path) -> str | None:
    """The class of error that reading everything ends with."""
    try:
        with Archive(path) as archive:
            for snapshot in archive:
                for track in snapshot.tracks if not snapshot.n_absent else ():
                    track.read(0, len(track.cells))
        return "damaged" if verify(path).problems else None
    except TscError as error:
        return next(name for kind, name in CLASSES if isinstance(error, kind))


def _decoder_rejects(data: bytes) -> tuple[str, str] | None:
    try:
        decoder.File(data)
    except decoder.Rejected as error:
        return error.kind, str(error)
    return None


@pytest.mark.parametrize("name", ["small", "session", "codebooks", "difference"])
def test_the_decoder_of_the_specification_rejects_damage(name: str) -> None:
    """A flipped bit in every byte, a cut at every length: never another kind of error. Torn bytes
    behind a whole commit, padding and reserved bytes are no reason to reject."""
    data = (VALID / f"{name}.tsc").read_bytes()
    n_rejected = 0
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        for broken in (bytes(flipped), data[:at]):
            n_rejected += _decoder_rejects(broken) is not None
    assert n_rejected > 1.4 * len(data)


@pytest.mark.parametrize("path", sorted(INVALID.glob("*.tsc")), ids=lambda path: path.stem)
def test_both_readers_reject(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = _json(path)
    assert _decoder_rejects(path.read_bytes()) == (expected["class"], expected["message"])
    assert _tscfile_rejects(path) == expected["class"]
    for command, code in expected["exit_code"].items():
        assert main([command, str(path)]) == code, command
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(("tsc: ", "whole as they are: "))


def test_what_the_invalid_files_are_made_of_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.tsc"
    _make()
    invalid = importlib.import_module("make_invalid")
    for name, changes in invalid.SOUND.items():
        path.write_bytes(invalid.small(**changes))
        assert_same(path)
        assert not verify(path).problems, name


def test_readers_take_what_they_know(tmp_path: Path) -> None:
    """Exact rows above a layer of a codec of a later version."""
    _make()
    invalid = importlib.import_module("make_invalid")
    layers = invalid.two_layers(0, 1)

    def chunks(chunk: Any) -> Any:
        base, exact = layers(chunk)
        return [invalid.EncodedChunk(invalid.replace(base.header, codec=99), b"new"), exact]

    coding = {"layers": ["near", "lossless"]}
    data = invalid.small(chunks=chunks, record=invalid.of_record(coding=coding))
    (track,) = decoder.File(data).snapshots[0]["tracks"]
    for mine, theirs in zip(track["rows"], invalid.ROWS, strict=True):
        assert np.array_equal(mine, theirs)
    with pytest.raises(decoder.Unsupported, match="codec 99"):
        decoder.File(data, tier="near")
    path = tmp_path / "newer.tsc"
    path.write_bytes(data)
    with Archive(path) as archive:
        for mine, theirs in zip(archive.snapshot().tracks[0].read(0, 2), invalid.ROWS, strict=True):
            assert np.array_equal(mine, theirs)
        with pytest.raises(UnsupportedError, match="codec 99"):
            archive.snapshot(tier="near").tracks[0].read(0, 2)
    assert not verify(path).problems


def test_every_rule_has_a_file() -> None:
    """Of the table of section 15, but for what is no property of a file."""
    text = (SPEC / "tsc.md").read_text(encoding="utf-8")
    table = text[text.index("| a decoder must reject | as |") :].split("\n\n")[0]
    table = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", table)
    rules = dict(row.strip("| ").rsplit(" | ", 1) for row in table.splitlines()[2:])
    shown = {each["rule"]: each["class"] for each in map(_json, INVALID.glob("*.tsc"))}
    assert set(shown.items()) <= set(rules.items())
    assert set(rules) - set(shown) == {
        "frames of an absent block, where they are not computed again"
    }


# --- both -------------------------------------------------------------------------------------


def test_vectors_can_be_made_again(tmp_path: Path) -> None:
    """By the scripts beside them, down to the byte with the zstd that they were made with."""
    _make().make_all(tmp_path)
    for folder in ("valid", "invalid"):
        names = {path.name for path in (VECTORS / folder).iterdir()}
        assert names == {path.name for path in (tmp_path / folder).iterdir()}
        for name in names:
            made, kept = (parent / folder / name for parent in (tmp_path, VECTORS))
            is_text = folder == "valid" and name.endswith(".json")
            if not is_text and zstandard.ZSTD_VERSION == (1, 5, 7):
                assert made.read_bytes() == kept.read_bytes(), name
