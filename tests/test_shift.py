"""Frames that moved, were patched or kept over many turns: real states of the sample model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SESSION, MemoryTrack, make_snapshot, same_state
from hypothesis import given, settings
from hypothesis import strategies as st
from shifted_states import MODEL, heldout_tokens, shifted_pair

import tscfile
from tscfile import planning, temporal
from tscfile.errors import UsageError
from tscfile.explanation import DIFFERENCE, KEPT, MOVED, NEW, explain
from tscfile.identity import identity_from_gguf
from tscfile.model import CellTable, ModelIdentity, Snapshot
from tscfile.sources import open_source

BOOK = MODEL.with_name("reference-llama-6m.tscbook")
N_KEEP, N_DISCARD, N_TOKENS = 32, 256, 500


@pytest.fixture(scope="module")
def identity() -> ModelIdentity:
    return identity_from_gguf(MODEL)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return heldout_tokens(N_TOKENS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> tuple[Path, Path]:
    """Saves before and after a context shift."""
    return shifted_pair(tmp_path_factory.mktemp("pair"), tokens, N_KEEP, N_DISCARD, "f16", 8)


def n_of(path: Path, number: int, kind: str) -> int:
    with tscfile.open(path) as archive:
        parts = explain(archive)[number].parts
    return sum(part.n_frames for part in parts if part.kind == kind)


def values(snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values in order of positions, ``[n, channels]`` each."""
    [track] = snapshot.tracks
    order = np.argsort(track.cells.pos)
    rows = track.read(0, len(track.cells))
    parts = []
    for role in "kv":
        of_role = [r for r, spec in zip(rows, track.tensors, strict=True) if spec.role == role]
        parts.append(np.concatenate([r.view(np.float16) for r in of_role], axis=1)[order])
    return parts[0].astype(np.float64), parts[1].astype(np.float64)


def errors(path: Path, number: int, truth: Path) -> np.ndarray:
    """Mean square error of keys and of values of each frame, relative, ``[2, n]``."""
    with tscfile.open(path, book=BOOK) as archive:
        stored = values(archive.snapshot(number))
    real = values(open_source(truth))
    return np.stack([
        np.square(a - b).mean(axis=1) / np.square(b).mean()
        for a, b in zip(stored, real, strict=True)
    ])  # fmt: skip


# --- shift ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", ("f16", "q8_0")], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_exact_shift(
    kv_type: str | tuple[str, str], known: bool, tokens: list[int], identity: ModelIdentity,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Values are shared, keys predicted: with the model's facts, or with angles that are fitted."""
    before, after = shifted_pair(tmp_path, tokens, N_KEEP, N_DISCARD, kv_type, 8)
    path = tmp_path / "a.tsc"
    first = tscfile.pack(before, path, identity=identity if known else None)
    report = tscfile.append(after, path)
    n_moved = N_TOKENS - 8 - N_KEEP - N_DISCARD
    assert (report.plan, report.n_frames_kept) == ("shift", N_KEEP)
    assert n_of(path, 1, DIFFERENCE) == n_moved == report.n_frames_moved
    # Anew they would take 40 % of the first save's bytes.
    assert report.bytes_added < first.bytes_added / 20
    for number, save in enumerate((before, after)):
        out = tmp_path / "out.kv"
        tscfile.unpack(path, out, snapshot=number, force=True)
        assert out.read_bytes() == save.read_bytes()
    assert not tscfile.verify(path).problems


def test_exact_shift_of_a_book(
    pair: tuple[Path, Path], identity: ModelIdentity, tmp_path: Path
) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(pair[0], path, tier="lossless", book=BOOK, identity=identity)
    report = tscfile.append(pair[1], path, book=BOOK)
    assert report.plan == "shift" and report.bytes_added < 20_000
    out = tmp_path / "out.kv"
    tscfile.unpack(path, out, book=BOOK)
    assert out.read_bytes() == pair[1].read_bytes()


@pytest.mark.parametrize("tier", ["balanced", "archive", "near"])
def test_lossy_shift(
    tier: str, pair: tuple[Path, Path], identity: ModelIdentity, tmp_path: Path
) -> None:
    """Frames that have moved are as good as they were, and take nothing."""
    path, book = tmp_path / "a.tsc", None if tier == "near" else BOOK
    tscfile.pack(pair[0], path, tier=tier, book=book, identity=identity)
    report = tscfile.append(pair[1], path, book=book)
    n_moved = N_TOKENS - 8 - N_KEEP - N_DISCARD
    assert report.plan == "shift" and report.n_frames_moved == n_moved
    assert n_of(path, 1, MOVED) == n_moved and n_of(path, 1, KEPT) == N_KEEP
    assert n_of(path, 1, NEW) == 8
    assert not tscfile.verify(path, book=BOOK).problems
    old, new = errors(path, 0, pair[0]), errors(path, 1, pair[1])
    old, new = old[:, N_KEEP + N_DISCARD :], new[:, N_KEEP : N_KEEP + n_moved]
    # The engine rounds the keys that it turns once more.
    assert (new <= 1.05 * old + 1e-5).all()
    with tscfile.open(path, book=BOOK) as archive:
        said = archive.record(1).coding["max_delta_error"]
        assert 0 < said <= 2
        assert explain(archive)[1].max_delta_error == said


def test_without_the_model_keys_as_they_stand_are_new(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(pair[0], path, tier="near")
    report = tscfile.append(pair[1], path)
    assert (report.n_frames_moved, report.n_frames_kept) == (0, N_KEEP)
    assert errors(path, 1, pair[1]).max() < 0.1


@pytest.fixture(scope="module")
def thrice(tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> list[Path]:
    """Saves of a context that is shifted twice, and grows in between."""
    from tscfile.dtypes import DTYPES
    from tscfile.resume.engine import Context, Model

    folder = tmp_path_factory.mktemp("thrice")
    f16, saves, held = DTYPES["f16"], [], tokens[:300]
    more = iter(tokens[300:])

    def save(context: Context) -> None:
        saves.append(folder / f"{len(saves)}.kv")
        context.save_session(saves[-1], held)

    def grow(context: Context, n: int) -> None:
        new = [next(more) for _ in range(n)]
        context.decode(new, len(held))
        held.extend(new)
        save(context)

    with (
        Model(MODEL) as model,
        Context(model, 512, type_k=f16, type_v=f16, flash_attention=True) as context,
    ):
        context.decode(held, 0)
        save(context)
        for n_discard in (100, 60):
            assert context.remove(0, 16, 16 + n_discard)
            model.library.llama_memory_seq_add(context._memory, 0, 16 + n_discard, -1, -n_discard)
            del held[16 : 16 + n_discard]
            grow(context, 20)
            grow(context, 20)
    return saves


@pytest.fixture(scope="module")
def shifted_series(
    thrice: list[Path], identity: ModelIdentity, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Archives of those saves; not to be changed."""
    folder, found = tmp_path_factory.mktemp("archives"), {}
    for tier, book in (("lossless", None), ("balanced", BOOK), ("near", None)):
        path = found[tier] = folder / f"{tier}.tsc"
        tscfile.pack(thrice[0], path, tier=tier, book=book, identity=identity)
        for save in thrice[1:]:
            tscfile.append(save, path, book=book)
    return found


@pytest.mark.parametrize("tier", ["lossless", "balanced", "near"])
def test_shifts_add_up(tier: str, shifted_series: dict[str, Path], thrice: list[Path]) -> None:
    path = shifted_series[tier]
    with tscfile.open(path, book=BOOK) as archive:
        plans = explain(archive)
        assert [info.plan for info in plans] == ["keyframe", "shift", "append", "shift", "append"]
        assert sum(info.frame_bytes for info in plans[1:]) < plans[0].frame_bytes
        if tier == "balanced":
            # Of each shift the tokens before it; those of the newest come first.
            assert [len(archive.head(n).contexts) for n in range(5)] == [0, 1, 1, 2, 2]
            first = open_source(thrice[0]).tokens
            last = archive.tokens(4, 2)
            assert np.array_equal(last, first[: len(last)]) and len(last) == 300
        for number, save in enumerate(thrice):
            if tier == "lossless":
                found = archive.snapshot(number)
                assert same_state(found, replace(open_source(save), identity=found.identity))
    if tier != "lossless":
        worst = errors(path, 0, thrice[0]).max()
        assert errors(path, 4, thrice[4]).max() <= 1.05 * worst + 1e-5
    assert not tscfile.verify(path, book=BOOK).problems


@pytest.mark.parametrize("tier", ["lossless", "balanced", "near"])
@pytest.mark.parametrize("drop", [(), (0,), (0, 1, 2, 3), (3,)])
def test_compacting_keeps_what_moved(
    tier: str, drop: tuple[int, ...], shifted_series: dict[str, Path], tmp_path: Path
) -> None:
    """Sources and contexts of snapshots that are dropped are not missed."""
    path, out = shifted_series[tier], tmp_path / "out.tsc"
    tscfile.compact(path, out, drop=drop, book=BOOK)
    assert not tscfile.verify(out, book=BOOK).problems
    kept = [number for number in range(5) if number not in drop]
    with tscfile.open(path, book=BOOK) as old, tscfile.open(out, book=BOOK) as new:
        for at, number in enumerate(kept):
            a, b = old.snapshot(number), new.snapshot(at)
            if tier == "lossless":
                assert same_state(a, b)
                continue
            assert np.array_equal(a.tokens, b.tokens)
            for x, y in zip(values(a), values(b), strict=True):
                assert np.allclose(x, y, rtol=2e-3, atol=2e-3)
        if not drop:
            assert new.size <= old.size


def test_compacting_keeps_sources_that_nobody_else_needs(
    shifted_series: dict[str, Path], tmp_path: Path
) -> None:
    """They are smaller than what is a difference to them would be by itself."""
    path, out = shifted_series["lossless"], tmp_path / "out.tsc"
    report = tscfile.compact(path, out, drop=(1, 2))
    assert report.file_bytes < report.bytes_before
    with tscfile.open(path) as old, tscfile.open(out) as new:
        for number, at in ((0, 0), (3, 1), (4, 2)):
            assert same_state(old.snapshot(number), new.snapshot(at))
    assert not tscfile.verify(out).problems


def test_compacting_names_a_shift_so(shifted_series: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.tsc"
    tscfile.compact(shifted_series["balanced"], out, drop=(1,), book=BOOK)
    with tscfile.open(out, book=BOOK) as archive:
        assert [archive.record(n).plan for n in range(3)] == ["keyframe", "shift", "shift"]


def test_plans_as_json(
    shifted_series: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from tscfile_cli.main import main

    assert main(["info", str(shifted_series["balanced"]), "--plan", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [plan["plan"] for plan in plans[:3]] == ["keyframe", "shift", "append"]
    assert {part["kind"] for part in plans[1]["parts"]} == {KEPT, MOVED, NEW}


def test_branches_from_before_and_after_a_shift(
    shifted_series: dict[str, Path], thrice: list[Path], tmp_path: Path
) -> None:
    """A regenerated turn finds its parent on either side of the shift."""
    path = tmp_path / "a.tsc"
    path.write_bytes(shifted_series["balanced"].read_bytes())
    # The newest of those that have all its tokens.
    for number, save in ((0, thrice[0]), (2, thrice[1])):
        whole = open_source(save)
        report = tscfile.append(cut(whole, 150), path, book=BOOK)
        assert (report.parent, report.n_frames_new) == (number, 0)
    assert not tscfile.verify(path, book=BOOK).problems


def test_no_more_contexts_than_a_snapshot_may_have(
    thrice: list[Path], identity: ModelIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would need another is stored anew."""
    monkeypatch.setattr(planning, "MAX_CONTEXTS", 1)
    path = tmp_path / "a.tsc"
    tscfile.pack(thrice[0], path, tier="balanced", book=BOOK, identity=identity)
    for save in thrice[1:]:
        tscfile.append(save, path, book=BOOK)
    with tscfile.open(path, book=BOOK) as archive:
        assert [len(archive.head(n).contexts) for n in range(5)] == [0, 1, 1, 1, 1]
    worst = errors(path, 0, thrice[0]).max()
    assert errors(path, 4, thrice[4]).max() <= 1.05 * worst + 1e-5
    assert not tscfile.verify(path, book=BOOK).problems


def test_a_token_that_happens_to_be_alike_does_not_choose_the_parent(tmp_path: Path) -> None:
    """Behind those that are kept, the first token is now and then that of an older save."""
    path, made = tmp_path / "a.tsc", make_snapshot(400, n_channels=32)
    first = made.tokens[:200]
    second = np.concatenate([first[:16], first[60:], made.tokens[200:244]])
    second[40] = first[16]
    third = np.concatenate([second[:16], second[40:], made.tokens[244:268]])
    tscfile.pack(cut(replace(made, tokens=first), 200), path)
    assert tscfile.append(cut(replace(made, tokens=second), 200), path).parent == 0
    report = tscfile.append(cut(replace(made, tokens=third), 200), path)
    assert (report.parent, report.n_tokens_common) == (1, 16)


def test_no_token_is_kept(tokens: list[int], identity: ModelIdentity, tmp_path: Path) -> None:
    """llama-server keeps none or one of them unless told otherwise; a folder of such saves is one
    conversation."""
    from tscfile_cli.main import main

    (tmp_path / "saves").mkdir()
    before, after = shifted_pair(tmp_path / "saves", tokens, 0, 200, "f16", 8)
    path = tmp_path / "a.tsc"
    options = ["--tier", "balanced", "--book", str(BOOK), "--model", str(MODEL)]
    assert main(["pack", str(tmp_path / "saves"), "-o", str(path), *options]) == 0
    with tscfile.open(path, book=BOOK) as archive:
        assert [info.plan for info in explain(archive)] == ["keyframe", "shift"]
        assert [archive.record(n).name for n in range(2)] == [before.name, after.name]
    assert n_of(path, 1, MOVED) == N_TOKENS - 8 - 200


@pytest.mark.parametrize("tier", ["lossless", "balanced"])
def test_what_moved_cannot_be_computed_again(
    tier: str, shifted_series: dict[str, Path], tmp_path: Path
) -> None:
    path, out = shifted_series[tier], tmp_path / "out.tsc"
    with pytest.raises(UsageError, match="snapshot 1 has frames that have moved"):
        tscfile.demote(path, out, "tokens", book=BOOK)
    if tier == "lossless":
        with pytest.raises(UsageError, match="snapshot 1 has frames that have moved"):
            tscfile.compact(path, out, tier="tokens")
    assert not out.exists()


# --- patch and many turns ---------------------------------------------------------------------


def cut(snapshot: Snapshot, n: int, rows: list[np.ndarray] | None = None) -> Snapshot:
    """The frames of the first ``n`` positions."""
    [track] = snapshot.tracks
    order = np.argsort(track.cells.pos)[:n]
    cells = CellTable(
        track.cells.pos[order], track.cells.seq_counts[order],
        np.zeros(n, np.int32), track.cells.ext[order],
    )  # fmt: skip
    rows = rows or track.read(0, len(track.cells))
    memory = MemoryTrack(cells, track.tensors, [part[order] for part in rows], track.attributes)
    source = {**snapshot.source, "cell_counts": [n]}
    return replace(snapshot, tokens=snapshot.tokens[:n], tracks=[memory], source=source)


@pytest.mark.parametrize("tier", ["lossless", "balanced"])
def test_patched_frames(tier: str, identity: ModelIdentity, tmp_path: Path) -> None:
    """A few frames that differ are stored; in a lossless tier as differences."""
    whole, path = open_source(SESSION), tmp_path / "a.tsc"
    book = BOOK if tier == "balanced" else None
    tscfile.pack(cut(whole, 300), path, tier=tier, book=book, identity=identity)
    [track] = whole.tracks
    rows = [part.copy() for part in track.read(0, 400)]
    for part in rows:
        stored = part.view(np.float16)
        stored[100:110] = stored[100:110] * np.float16(1.001 if tier == "lossless" else 3)
    report = tscfile.append(cut(whole, 320, rows), path, book=book)
    assert (report.plan, report.n_frames_kept, report.n_frames_new) == ("patch", 290, 30)
    assert n_of(path, 1, DIFFERENCE) == (10 if tier == "lossless" else 0)
    with tscfile.open(path, book=BOOK) as archive:
        if tier == "lossless":
            found = archive.snapshot(1)
            assert same_state(found, replace(cut(whole, 320, rows), identity=found.identity))


def test_patched_frames_one_cell_further(tmp_path: Path) -> None:
    """Only they are differences to the cells before, not the new ones behind them."""
    first, path = make_snapshot(20, n_channels=256), tmp_path / "a.tsc"
    longer = make_snapshot(24, n_channels=256)
    [track] = longer.tracks
    assert isinstance(track, MemoryTrack)
    order = np.array([19, *range(19), 20, 21, 22, 23])
    rows = [part[order] for part in track.rows]
    for part in rows:
        part[1:20, 6] ^= 1
    ones, pos = np.ones(24, np.int32), order.astype(np.int32)
    cells = CellTable(pos, ones, 0 * ones, np.zeros((24, 0), np.int32))
    later = replace(longer, tracks=[replace(track, cells=cells, rows=rows)])
    tscfile.pack(first, path)
    tscfile.append(later, path)
    assert (n_of(path, 1, KEPT), n_of(path, 1, DIFFERENCE), n_of(path, 1, NEW)) == (1, 19, 4)
    with tscfile.open(path) as archive:
        assert same_state(archive.snapshot(1), later)


def test_a_few_frames_between_new_ones_are_not_worth_a_block(
    identity: ModelIdentity, tmp_path: Path
) -> None:
    whole, path = open_source(SESSION), tmp_path / "a.tsc"
    tscfile.pack(cut(whole, 300), path, tier="archive", book=BOOK, identity=identity)
    [track] = whole.tracks
    rows = [part.copy() for part in track.read(0, 400)]
    for part in rows:
        # All of 100 to 160 but three.
        for span in (slice(100, 130), slice(133, 160)):
            part.view(np.float16)[span] = part.view(np.float16)[span] * np.float16(3)
    report = tscfile.append(cut(whole, 300, rows), path, book=BOOK)
    assert (report.n_frames_kept, report.n_frames_new) == (240, 60)
    assert len(archive_blocks(path)) == 3


def archive_blocks(path: Path) -> list[Any]:
    with tscfile.open(path) as archive:
        return list(archive.container.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("tier, resumed", [("balanced", False), ("balanced", True), ("near", True)])
def test_errors_do_not_add_up_over_a_hundred_turns(
    tier: str, resumed: bool, identity: ModelIdentity, tmp_path: Path
) -> None:
    """Each turn adds four frames. ``resumed``: the older ones are then what the archive gave back,
    as in a conversation that is resumed from it every time."""
    whole, path, book = open_source(SESSION), tmp_path / "a.tsc", BOOK
    [track] = whole.tracks
    rows = [part.copy() for part in track.read(0, 400)]
    if tier == "near":
        book = None  # type: ignore[assignment]
    first: list[np.ndarray] = []
    for turn in range(100):
        n = 4 * (turn + 1)
        save = cut(whole, n, rows)
        if turn:
            tscfile.append(save, path, book=book)
        else:
            tscfile.pack(save, path, tier=tier, book=book, identity=identity)
        with tscfile.open(path, book=BOOK) as archive:
            given = archive.snapshot().tracks[0].read(n - 4, n)
        first.append(np.concatenate(given, axis=1))
        if resumed:
            for part, back in zip(rows, given, strict=True):
                part[n - 4 : n] = back
    with tscfile.open(path, book=BOOK) as archive:
        last = np.concatenate(archive.snapshot().tracks[0].read(0, 400), axis=1)
        assert np.array_equal(last, np.concatenate(first)), "no frame is ever coded again"
        assert [block.n_frames for block in archive.container.blocks] == [4] * 100
        for turn in (9, 99):
            n = 4 * (turn + 1)
            alone = tmp_path / "alone.tsc"
            rows = [part.copy() for part in track.read(0, 400)]
            tscfile.pack(cut(whole, n, rows), alone, tier=tier, book=book, identity=identity,
                         force=True)  # fmt: skip
            with tscfile.open(alone, book=BOOK) as single:
                frames = single.snapshot().tracks[0].read(n - 4, n)
            true = np.concatenate([part[n - 4 : n] for part in rows], axis=1).view(np.float16)
            once = np.concatenate(frames, axis=1).view(np.float16)
            error = [np.square(x.astype(np.float64) - true).mean() for x in (
                first[turn].view(np.float16), once)]  # fmt: skip
            if tier == "balanced":
                # The step of a frame is the same in a save of its own.
                assert np.isclose(error[0], error[1], rtol=1e-3)
            else:
                # Each save learns a basis: the tolerance is the same, what is left of it not.
                assert error[0] < 1.5 * error[1]


def test_patched_frames_of_two_types(tmp_path: Path) -> None:
    """Keys q8_0 and values f16, as llama.cpp has them: one difference holds both."""
    made = [make_snapshot(100, dtype=dtype, n_channels=64) for dtype in ("q8_0", "f16")]
    [keys], [values_] = (snapshot.tracks for snapshot in made)
    assert isinstance(keys, MemoryTrack) and isinstance(values_, MemoryTrack)
    tensors = [*keys.tensors[:2], *values_.tensors[2:]]
    rows = [*keys.rows[:2], *values_.rows[2:]]
    later = [part.copy() for part in rows]
    for part in later:
        part[40:60, 6] ^= 1
    path = tmp_path / "a.tsc"
    saves = [
        replace(made[0], tracks=[replace(keys, tensors=tensors, rows=each)])
        for each in (rows, later)
    ]
    tscfile.pack(saves[0], path)
    tscfile.append(saves[1], path)
    assert n_of(path, 1, DIFFERENCE) == 20
    assert not tscfile.verify(path).problems
    with tscfile.open(path) as archive:
        assert same_state(archive.snapshot(1), saves[1])


# --- alignment --------------------------------------------------------------------------------


def pieces(draw: Any) -> Iterator[tuple[int, int]]:
    at = 0
    for _ in range(draw(st.integers(1, 4))):
        start = at + draw(st.integers(0, 60))
        at = start + draw(st.integers(1, 60))
        yield start, at


@st.composite
def edited(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and others made of pieces of them in order with new ones between."""
    alphabet = draw(st.sampled_from([2, 5, 1000]))
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    old = rng.integers(0, alphabet, 300).astype(np.int32)
    parts = []
    for start, stop in pieces(draw):
        parts += [old[start:stop], rng.integers(0, alphabet, draw(st.integers(0, 20)))]
    return old, np.concatenate(parts).astype(np.int32)


@settings(max_examples=200, deadline=None)
@given(edited())
def test_origins_have_the_same_tokens(case: tuple[np.ndarray, np.ndarray]) -> None:
    old, new = case
    n_common = temporal_prefix(old, new)
    found = temporal.origins(old, new, n_common)
    if found is None:
        return
    known = np.flatnonzero(found >= 0)
    assert np.array_equal(new[known], old[found[known]])
    assert (np.diff(found[known]) > 0).all(), "in order, none twice"
    assert np.array_equal(found[:n_common], np.arange(n_common))
    # Stretches behind the common ones are long enough to be no accident.
    edges = np.flatnonzero((np.diff(found, prepend=-2) != 1) | (found < 0))
    lengths = np.diff([*edges, len(found)])
    stretches = [n for at, n in zip(edges, lengths, strict=True) if found[at] >= 0]
    assert all(n >= temporal.LEAST_MOVED for n in stretches[1:])


def temporal_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    return int(np.argmax(np.append(a[:n] != b[:n], True)))


def test_cut_out_of_the_middle_is_found() -> None:
    snapshot = make_snapshot(200)
    old = snapshot.tokens
    new = np.concatenate([old[:20], old[50:90], old[120:]])
    found = temporal.origins(old, new, 20)
    assert found is not None
    assert found.tolist() == [*range(20), *range(50, 90), *range(120, 200)]
    assert temporal.origins(old, old[:150], 150) is None
