"""Many saves at a time: their order, which conversation each is of, and what each cost."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REGENERATED, SAMPLES, SESSION, TURNS, make_snapshot, same_state, write_kv
from tscfile_cli.main import main

import tscfile
from tscfile.conversations import Conversation, Save, file_id, in_order, split
from tscfile.model import ModelIdentity
from tscfile.sources import open_source

Capture = pytest.CaptureFixture[str]
SERIES = [*TURNS[:3], REGENERATED, *TURNS[3:]]


def run(capfd: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


def save(name: str, tokens: list[int], time: int = 0, **facts: Any) -> Save:
    return Save(Path(name), time, np.array(tokens, np.int32), {}, ModelIdentity(facts))


def names(saves: list[Save]) -> str:
    return " ".join(str(each.path) for each in saves)


# Order and kinship ------------------------------------------------------------------------------


def test_beginnings_come_first_then_older_ones() -> None:
    saves = [
        save("long", [1, 2, 3, 4], time=1), save("short", [1, 2], time=5),
        save("branch", [1, 2, 9], time=3), save("media", [1, 2, -1], time=4),
        save("end of branch", [1, 2, 9, 9], time=2), save("other", [7], time=6),
        save("b", [7], time=6), save("first", [300], time=0), save("later", [300, 1], time=0),
    ]  # fmt: skip
    expected = "first later short long branch end of branch media b other"
    for seed in range(20):
        random.Random(seed).shuffle(saves)
        assert names(in_order(saves)) == expected


def test_conversations_by_their_first_tokens() -> None:
    prompt = list(range(40))
    saves = [
        save("a", [*prompt, 1]), save("a2", [*prompt, 1, 2]), save("b", [*prompt, 5]),
        save("z", [9, *prompt]),
    ]  # fmt: skip

    def groups(min_common: int) -> list[str]:
        return [names(members) for members in split(saves, min_common)]

    assert groups(1) == groups(40) == ["a a2 b", "z"] and groups(41) == ["a a2", "b", "z"]
    # What begins both is of both.
    saves.append(save("start", prompt[:10], 1))
    assert groups(41) == ["z", "start a a2 b"]
    other = [save("x", prompt, 0, weights_blake3="a"), save("y", prompt, 0, weights_blake3="b")]
    assert len(split(other)) == 2


def test_a_shifted_save_belongs() -> None:
    """Also where no first token was kept; but not what has new tokens in front."""
    first, shifted = list(range(200)), [*range(90, 200), 7, 7, 7]
    third = [*shifted[60:], *range(300, 360)]
    saves = [save("1", first, 1), save("2", shifted, 2), save("3", third, 3)]
    assert [names(each) for each in split(saves)] == ["1 2", "3"], "the third has less than half"
    saves[2] = save("3", shifted[40:], 3)
    assert [names(each) for each in split(saves)] == ["1 2 3"]
    assert len(split([save("1", first, 1), save("2", [7, 7, *first], 2)])) == 2


def test_a_save_goes_where_it_has_most_in_common() -> None:
    ours, theirs = list(range(50)), [*range(40), 99, 98, 97]
    saves = [save("1", ours, 1), save("2", theirs, 2), save("3", [*theirs, 5], 3)]
    assert [names(each) for each in split(saves, 41)] == ["1", "2 3"]
    first = Conversation(41)
    first.add(saves[0].tokens, {}, ModelIdentity())
    assert first.has(saves[0]) and not first.has(saves[1])


# pack and append --------------------------------------------------------------------------------


def holds(archive: Path, saves: list[Path]) -> None:
    """The archive's snapshots are these files, byte for byte."""
    with tscfile.open(archive) as opened:
        assert [opened.record(n).name for n in range(len(opened))] == [s.name for s in saves]
        facts = [opened.record(n).source["file_id"] for n in range(len(opened))]
    assert facts == [list(file_id(each)) for each in saves]
    out = archive.with_suffix(".back")
    for number, each in enumerate(saves):
        tscfile.unpack(archive, out, snapshot=number, force=True)
        assert out.read_bytes() == each.read_bytes()
    out.unlink()
    assert not tscfile.verify(archive).problems


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The series in a folder, times in order, names that are not."""
    path = tmp_path / "saves"
    path.mkdir()
    for age, each in enumerate(SERIES):
        shutil.copy(each, path / each.name)
        os.utime(path / each.name, (1e9 + age, 1e9 + age))
    return path


def test_pack_a_folder(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    (folder / ".hidden").write_bytes(b"x")
    (folder / "old.tsc").write_bytes(b"x")
    (folder / "sub").mkdir()
    code, out, err = run(capfd, "pack", folder, "-o", tmp_path / "a.tsc")
    assert (code, out) == (0, "")
    assert err.count("\nappend ") == 4 and err.count("truncate+append") == 1
    assert "6 saves in 1 archive: 4.79 MB" in err
    holds(tmp_path / "a.tsc", [folder / each.name for each in SERIES])
    assert sorted(os.listdir(tmp_path)) == ["a.tsc", "saves"]
    # The order given does not matter, nor do times that a copy lost.
    for each in folder.glob("*.kv"):
        os.utime(each, (0, 0))
    shuffled = random.Random(0).sample(SERIES, len(SERIES))
    assert run(capfd, "pack", *shuffled, "-o", tmp_path / "b.tsc", "-q") == (0, "", "")
    with tscfile.open(tmp_path / "b.tsc") as archive:
        found = [archive.record(number).name for number in range(6)]
    assert [name for name in found if "regenerated" not in name] == [t.name for t in TURNS]


def test_reports_as_json(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    path = tmp_path / "a.tsc"
    code, out, err = run(capfd, "pack", folder, "-o", path, "--json")
    reports = json.loads(out)
    assert (code, err) == (0, "") and len(reports) == 6
    assert [each["report"]["n_frames_new"] for each in reports] == [90, 80, 80, 82, 80, 80]
    assert sum(each["report"]["bytes_added"] for each in reports) == path.stat().st_size
    before = path.read_bytes()
    code, out, err = run(capfd, "append", path, folder, "--json")
    assert code == 0 and all(each["report"] is None for each in json.loads(out))
    assert path.read_bytes() == before


def test_append_many(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    path = tmp_path / "a.tsc"
    assert run(capfd, "pack", folder / "turn-1.kv", folder / "turn-2.kv", "-o", path)[0] == 0
    code, out, err = run(capfd, "append", path, folder)
    assert (code, out) == (0, "") and err.count("stored already") == 2
    holds(path, [folder / each.name for each in SERIES])
    # A save of another conversation stays out, the others come in.
    later = write_kv(tmp_path / "other.kv", 50)
    newest = tmp_path / "newest.kv"
    shutil.copy(TURNS[4], newest)
    code, out, err = run(capfd, "append", path, later, folder / "turn-1.kv", newest)
    assert (code, out) == (1, "") and "tsc: " in err and "another conversation" in err
    code, out, err = run(capfd, "append", path, SAMPLES / "texts")
    assert code == 1 and all(line.startswith("tsc: ") for line in err.splitlines())


def test_one_broken_save_among_many(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    path, cut = tmp_path / "a.tsc", folder / "turn-2.kv"
    cut.write_bytes(cut.read_bytes()[:-1])
    code, out, err = run(capfd, "pack", folder, "-o", path)
    assert (code, out) == (1, "")
    assert [line for line in err.splitlines() if line.startswith("tsc: ")] == [err.splitlines()[0]]
    assert str(cut) in err.splitlines()[0]
    holds(path, [folder / each.name for each in SERIES if each.name != cut.name])
    # Alone it is what a single pack says, and nothing is made.
    alone = tmp_path / "alone"
    alone.mkdir()
    cut.rename(alone / "x.kv")
    code, out, err = run(capfd, "pack", alone, "-o", tmp_path / "b.tsc")
    assert (code, err.count("\n")) == (3, 1) and not (tmp_path / "b.tsc").exists()


def test_saves_of_several_conversations(tmp_path: Path, capfd: Capture) -> None:
    one = [write_kv(tmp_path / f"one-{n}.kv", n) for n in (40, 60)]
    two = [write_kv(tmp_path / f"two-{n}.kv", n, seed=7) for n in (50, 70)]
    type_ = write_kv(tmp_path / "type.kv", 45, dtype="bf16")
    for age, each in enumerate((*one, *two, type_)):
        os.utime(each, (age, age))
    target = tmp_path / "a.tsc"
    code, out, err = run(capfd, "pack", *one, *two, "-o", target)
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert str(one[0]) in err and str(two[0]) in err and "-o DIR/" in err
    assert not target.exists()
    out_folder = tmp_path / "out"
    code, out, err = run(capfd, "pack", *two, type_, *one, "-o", f"{out_folder}/")
    assert code == 0 and "5 saves in 3 archives" in err
    assert sorted(os.listdir(out_folder)) == ["one-40.tsc", "two-50.tsc", "type.tsc"]
    holds(out_folder / "one-40.tsc", one)
    holds(out_folder / "two-50.tsc", two)
    # Nothing is replaced unasked, and it is known before anything is packed.
    (out_folder / "one-40.tsc").unlink()
    code, out, err = run(capfd, "pack", *one, *two, "-o", f"{out_folder}/")
    assert (code, err.count("\n")) == (2, 1) and "two-50.tsc: exists" in err
    assert sorted(os.listdir(out_folder)) == ["two-50.tsc", "type.tsc"]
    assert run(capfd, "pack", *one, *two, "-o", f"{out_folder}/", "-f", "-q")[0] == 0
    holds(out_folder / "one-40.tsc", one)


def test_a_common_prompt(tmp_path: Path, capfd: Capture) -> None:
    """Conversations that begin with the same 100 tokens, told apart by --min-common."""
    saves = [write_kv(tmp_path / f"{n}.kv", 150, edited_from=n) for n in (100, 120)]
    whole = write_kv(tmp_path / "whole.kv", 150)
    assert run(capfd, "pack", *saves, whole, "-o", tmp_path / "a.tsc", "-q") == (0, "", "")
    folder = tmp_path / "out"
    arguments = ("pack", *saves, whole, "-o", f"{folder}/", "--min-common", "110", "-q")
    assert run(capfd, *arguments) == (0, "", "")
    assert len(os.listdir(folder)) == 2


def test_saves_of_a_book_tier(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    book = SAMPLES / "model" / "reference-llama-6m.tscbook"
    model = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
    path = tmp_path / "a.tsc"
    arguments = ("--book", book, "--tier", "near", "--model", model)
    code, out, err = run(capfd, "pack", folder, "-o", path, "--embed-book", *arguments, "--json")
    assert code == 0, err
    reports = json.loads(out)
    assert [each["report"]["tier"] for each in reports] == ["near"] * 6
    assert [each["report"]["n_frames_new"] for each in reports] == [90, 80, 80, 82, 80, 80]
    code, out, err = run(capfd, "append", path, folder, *arguments, "--json")
    assert code == 0 and all(each["report"] is None for each in json.loads(out))
    # A tier that needs a book is no fault of the saves: one line, not six.
    code, out, err = run(capfd, "pack", folder, "-o", tmp_path / "b.tsc", "--tier", "archive")
    assert (code, err.count("\n")) == (2, 1) and not (tmp_path / "b.tsc").exists()


def test_what_cannot_be_asked_for(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "empty").mkdir()
    state = tmp_path / "buffer.kv"
    tscfile.pack(SESSION, tmp_path / "s.tsc")
    buffer = tscfile.StateOptions(container="state-buffer")
    tscfile.unpack(tmp_path / "s.tsc", state, options=buffer)
    assert len(open_source(state).tokens) == 0
    for code, arguments in (
        (2, ["pack", folder]), (2, ["pack", SESSION, TURNS[0]]), (2, ["pack", folder, "-o", "-"]),
        (2, ["pack", folder, "-", "-o", tmp_path / "x"]),
        (2, ["pack", tmp_path / "empty", "-o", tmp_path / "x"]),
        (2, ["pack", folder, "-o", folder]), (2, ["pack", folder, "-f", "-o", folder]),
        (2, ["pack", folder, "-o", tmp_path / "x", "--min-common", "0"]),
        (2, ["pack", folder, "-o", tmp_path / "none" / "x"]),
        (2, ["pack", *TURNS[:2], "-f", "-o", TURNS[1]]),
        (1, ["pack", tmp_path / "none.kv", folder / "none.kv", "-o", tmp_path / "x"]),
        (2, ["append", tmp_path / "s.tsc", tmp_path / "empty"]),
        (2, ["append", tmp_path / "s.tsc", "-", SESSION]),
        (1, ["append", tmp_path / "none.tsc", folder]), (3, ["append", SESSION, folder]),
        (1, ["pack", state, tmp_path / "none.kv", "-o", tmp_path / "x"]),
    ):  # fmt: skip
        found, out, err = run(capfd, *arguments)
        assert (found, out) == (code, ""), (arguments, err)
        assert all(line.startswith("tsc: ") for line in err.splitlines()) and err
    assert not (tmp_path / "x").exists()


def test_interrupted_pack_of_many_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tscfile import collecting

    genuine, calls = collecting.append, itertools.count()

    def append(*rest: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return genuine(*rest, **options)

    monkeypatch.setattr(collecting, "append", append)
    assert main(["pack", str(folder), "-o", str(tmp_path / "a.tsc"), "-q"]) == 130
    assert os.listdir(tmp_path) == ["saves"]


def test_what_a_killed_process_left_is_cleared(folder: Path, tmp_path: Path) -> None:
    from tscfile.staging import PREFIX, staging

    (tmp_path / f"{PREFIX}old").mkdir()
    (tmp_path / f"{PREFIX}old" / "half.tsc").write_bytes(b"x")
    with staging(tmp_path) as mine:
        (mine / "x").write_bytes(b"x")
        with staging(tmp_path) as theirs:
            # That of another, still at work, is left alone.
            assert (mine / "x").exists() and theirs != mine
        assert sorted(os.listdir(tmp_path)) == sorted([mine.name, "saves"])
    assert os.listdir(tmp_path) == ["saves"]


def test_facts_of_the_file_do_not_change_what_is_written(tmp_path: Path) -> None:
    snapshot = make_snapshot(40)
    snapshot.source = {**snapshot.source, "file_id": [1, 2**64 - 1]}
    tscfile.pack(snapshot, tmp_path / "a.tsc")
    with tscfile.open(tmp_path / "a.tsc") as archive:
        assert same_state(archive.snapshot(), snapshot)
    tscfile.unpack(tmp_path / "a.tsc", tmp_path / "a.kv")
    assert (tmp_path / "a.kv").read_bytes() == write_kv(tmp_path / "b.kv", 40).read_bytes()


# The tree ---------------------------------------------------------------------------------------


def test_tree_of_a_conversation_forked_and_continued_twice(tmp_path: Path, capfd: Capture) -> None:
    path = tmp_path / "a.tsc"
    grown = [make_snapshot(n) for n in (60, 100, 150)]
    forks = [make_snapshot(n, edited_from=120) for n in (140, 170)]
    tscfile.pack(grown[0], path, name="one")
    for name, each in zip("two three fork fork-on".split(), [*grown[1:], *forks], strict=True):
        tscfile.append(each, path, name=name)
    tscfile.append(make_snapshot(180), path, name="four")
    code, out, err = run(capfd, "info", "--tree", path)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()[2:]]
    assert [(*line[:4], "".join(line[3:6]), line[-1]) for line in lines] == [
        ("*", "0", "keyframe", "0", "0+60", "one"),
        ("*", "1", "append", "60", "60+40", "two"),
        ("*", "2", "append", "100", "100+50", "three"),
        ("|-*", "3", "truncate+append", "120", "120+20", "fork"),
        ("|", "*", "4", "append", "append140+", "fork-on"),
        ("*", "5", "append", "150", "150+30", "four"),
    ]
    info = json.loads(run(capfd, "info", "--json", path)[1])
    rows = info["snapshots"]
    assert [row["parent"] for row in rows] == [None, 0, 1, 2, 3, 2]
    assert [row["n_tokens_common"] for row in rows] == [0, 60, 100, 120, 140, 150]
    # Nothing is counted twice, and hardly anything is left out.
    assert 0.9 < sum(row["added_bytes"] for row in rows) / path.stat().st_size < 1
    # JSON is the same with the tree.
    assert json.loads(run(capfd, "info", "--json", "--tree", path)[1]) == info


def test_tree_of_a_long_and_of_a_bushy_file() -> None:
    from tscfile_cli.tree import draw

    n = 20_000
    assert list(draw([None, *range(n)])) == [("*", number) for number in range(n + 1)]
    assert [graph for graph, _ in draw([None, *[0] * n])] == ["*", *["|-*"] * (n - 1), "*"]
    assert list(draw([])) == [] and list(draw([None, None])) == [("*", 0), ("*", 1)]
    # Each snapshot starts a branch of the branch before.
    comb = [None if i < 2 else i - 2 for i in range(3000)]
    assert sorted(number for _, number in draw(comb)) == list(range(3000))
