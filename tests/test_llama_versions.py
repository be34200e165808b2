"""States written by ten llama.cpp builds: read, written again, and resumed by the installed one."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny_models import HEAD_DIM, MODELS, Engine

from tscfile.dtypes import DTYPES
from tscfile.errors import DamagedError, TscError, UnsupportedError
from tscfile.model import Snapshot
from tscfile.retype import dequantize, retype
from tscfile.sources.llama_state import open_state, parse_state, state_size, write_state

pytest.importorskip("llama_cpp")

GOLDEN = Path(__file__).parent / "golden" / "llama"
FILES = sorted(GOLDEN.glob("*.kv"))


@cache
def load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = {name: folder / f"{name}.gguf" for name in MODELS}
    for name, path in paths.items():
        MODELS[name](path)
    return paths


def open_golden(path: Path) -> Snapshot:
    return open_state(path, container=load_maker().announced_container(path))


def written(snapshot: Snapshot, **options: object) -> bytes:
    out = bytearray(state_size(snapshot, **options))  # type: ignore[arg-type]
    write_state(snapshot, out, **options)  # type: ignore[arg-type]
    return bytes(out)


def select(*words: str) -> list[Path]:
    return [path for path in FILES if all(word in path.name for word in words)]


def by_name(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_every_generation_is_here() -> None:
    found = {json.loads(p.with_suffix(".json").read_text())["generation"] for p in FILES}
    letters = {letter for label in found for letter in label}
    assert letters >= set("ABCDEFG")
    assert len(FILES) >= 40


@by_name(FILES)
def test_read_and_written_again(path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert load_maker().description(path) == expected
    assert written(open_golden(path)) == path.read_bytes()


@by_name(FILES)
def test_tokens_and_positions_are_those_decoded(path: Path) -> None:
    """The facts of the JSON files that follow from how the states were made."""
    snapshot = open_golden(path)
    tokens = load_maker().TOKENS
    assert snapshot.tokens.tolist() == tokens[: len(snapshot.tokens)]
    for track in snapshot.tracks:
        assert track.cells.pos.tolist() == list(range(len(track.cells)))
        n_tokens = 3 if track.stream == 1 else len(snapshot.tokens) or len(track.cells)
        assert len(track.cells) == n_tokens
        assert track.cells.ext[:, :2].tolist() == [
            [pos] * min(2, track.cells.ext.shape[1]) for pos in track.cells.pos.tolist()
        ]
        if track.cells.ext.shape[1] == 3:
            assert track.cells.ext[:, 2].tolist() == tokens[:n_tokens]


def float_states() -> list[Path]:
    return [p for p in select("_f16_") if "empty" not in p.name and "two-streams" not in p.name]


def prepare(path: Path) -> tuple[Snapshot, str, list[int]]:
    """A golden snapshot with its tokens, and the model that made it."""
    snapshot = open_golden(path)
    n_cells = max([len(t.cells) for t in snapshot.tracks] or [len(snapshot.tokens)])
    tokens = load_maker().TOKENS[:n_cells]
    return replace(snapshot, tokens=np.array(tokens, np.int32)), path.name.split("_")[1], tokens


@by_name(float_states())
def test_rows_are_those_of_the_installed_build(
    path: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    snapshot, name, tokens = prepare(path)
    with Engine(models[name]) as engine:
        engine.decode(tokens)
        ours = parse_state(engine.save("session", tokens, 0, tmp_path))
    assert len(ours.tracks) == len(snapshot.tracks)
    for track, other in zip(snapshot.tracks, ours.tracks, strict=True):
        n = len(track.cells)
        assert [(t.role, t.layer) for t in track.tensors] == [
            (t.role, t.layer) for t in other.tensors
        ]
        for rows, others in zip(track.read(0, n), other.read(0, n), strict=True):
            values, wanted = (dequantize(r, DTYPES["f16"]) for r in (rows, others))
            assert np.abs(values - wanted).max() < 0.02 * np.abs(wanted).max()


@by_name(float_states())
@pytest.mark.parametrize("container", ["session", "sequence"])
def test_resumed_by_the_installed_build(
    path: Path, container: str, models: dict[str, Path], tmp_path: Path
) -> None:
    snapshot, name, tokens = prepare(path)
    data = written(snapshot, container=container, llama_version=10, v_trans=0, arch=name)
    with Engine(models[name]) as engine:
        engine.decode(tokens)
        expected = engine.decode([50], len(tokens))
    with Engine(models[name]) as engine:
        assert engine.load(container, data, 0, tmp_path)
        logits = engine.decode([50], len(tokens))
    assert np.corrcoef(logits, expected)[0, 1] > 0.9999
    assert logits.argmax() == expected.argmax()


@by_name(select("two-streams"))
def test_streams_resumed_by_the_installed_build(
    path: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    data = written(open_golden(path), llama_version=10, v_trans=0)
    tokens = load_maker().TOKENS
    context = {"n_seq": 2, "unified": False}
    with Engine(models["llama"], **context) as engine:
        engine.decode(tokens[:6], 0, [0])
        engine.decode(tokens[:3], 0, [1])
        expected = [engine.decode([50], n, [s]) for s, n in ((0, 6), (1, 3))]
    with Engine(models["llama"], **context) as engine:
        assert engine.load("session", data, 0, tmp_path)
        found = [engine.decode([50], n, [s]) for s, n in ((0, 6), (1, 3))]
    assert np.corrcoef(np.ravel(found), np.ravel(expected))[0, 1] > 0.9999


def quantized_logits(
    models: dict[str, Path], folder: Path, data: bytes | None, name: str = "llama"
) -> np.ndarray:
    """Next-token logits of a q8_0 context after loading ``data``, or after a prefill."""
    tokens = load_maker().TOKENS[:6]
    with Engine(models[name], kv_type=8) as engine:
        if data is None:
            engine.decode(tokens)
        else:
            assert engine.load("session", data, 0, folder)
        return engine.decode([50], 6)


def test_quantized_states_change_version_where_the_rotation_is_known(
    models: dict[str, Path], tmp_path: Path
) -> None:
    (newest,) = select("2026.10", "llama_q8_0")
    expected = quantized_logits(models, tmp_path, None)
    data = written(open_golden(newest), llama_version=10)
    assert np.corrcoef(quantized_logits(models, tmp_path, data), expected)[0, 1] > 0.999
    (windows,) = select("2026.10", "gemma3_q8_0")
    data = written(open_golden(windows), llama_version=10)
    wanted = quantized_logits(models, tmp_path, None, "gemma3")
    assert np.corrcoef(quantized_logits(models, tmp_path, data, "gemma3"), wanted)[0, 1] > 0.999


def test_unrotated_states_are_rotated_before_they_change_version(
    models: dict[str, Path], tmp_path: Path
) -> None:
    (oldest,) = select("0.1.10", "q8_0")
    snapshot = open_golden(oldest)
    assert {t.rotation for t in snapshot.tracks[0].tensors} == {0}
    for version in (9, 10):
        with pytest.raises(UnsupportedError, match="not rotated"):
            written(snapshot, llama_version=version)
    rotated = retype(snapshot, "q8_0", head_dim=HEAD_DIM)
    data = written(rotated, llama_version=10)
    expected = quantized_logits(models, tmp_path, None)
    assert np.corrcoef(quantized_logits(models, tmp_path, data), expected)[0, 1] > 0.99
    with pytest.raises(TscError, match="do not expect"):
        written(rotated)


def test_unknown_rotation_stays_in_its_version() -> None:
    (path,) = select("2026.4", "q8_0")
    snapshot = open_golden(path)
    assert {t.rotation for t in snapshot.tracks[0].tensors} == {-1}
    snapshot.identity.facts |= {"head_dim_k": HEAD_DIM, "head_dim_v": HEAD_DIM}
    for version in (10, 11):
        with pytest.raises(UnsupportedError, match="rotated"):
            written(snapshot, llama_version=version)
    assert written(snapshot, llama_version=9) == path.read_bytes()
    assert written(snapshot, container="sequence")[:4] == b"qsgg"


@by_name(select("2026.10", "gemma3_f16_server") + select("0.1.10", "state-buffer"))
def test_cut_and_flipped(path: Path) -> None:
    data = path.read_bytes()
    appendix = len(open_golden(path).opaque.get("appendix", b""))
    memory_end = len(data) - appendix
    for length in [*range(0, 400), *range(400, len(data), 61), len(data) - 1]:
        # A file that ends with its memory section or with its first cache is a whole one.
        if length != memory_end:
            with pytest.raises(DamagedError):
                parse_state(data[:length])
    for offset in [*range(0, 300), *range(300, len(data), 97), *range(memory_end, len(data), 13)]:
        damaged = bytearray(data)
        damaged[offset] ^= 1 << (offset % 8)
        try:
            snapshot = parse_state(damaged)
        except TscError as error:
            assert "\n" not in str(error)
        else:
            assert written(snapshot) == damaged
