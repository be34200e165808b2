"""The samples are what their README says, and both engines read the model the same way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tscfile.dtypes import DTYPES
from tscfile.model import Snapshot
from tscfile.resume.engine import Context, Model
from tscfile.resume.guards import relative_error, to_float
from tscfile.sources.llama_state import open_state

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
SESSIONS = ("session.kv", "session-bf16.kv")
TURNS = tuple(f"series/turn-{turn}.kv" for turn in range(1, 6))
REGENERATED = "series/turn-4-regenerated.kv"
ALL = (*SESSIONS, *TURNS, REGENERATED)


def all_rows(snapshot: Snapshot) -> list[np.ndarray]:
    [track] = snapshot.tracks
    return track.read(0, len(track.cells))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(MODEL)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_samples", SAMPLES / "make_samples.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_size_is_modest() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 28e6


@pytest.mark.parametrize("name", ALL)
def test_tokens_name_the_cells(name: str) -> None:
    snapshot = open_state(SAMPLES / name)
    [track] = snapshot.tracks
    assert track.cells.pos.tolist() == list(range(len(snapshot.tokens)))
    assert set(track.cells.seq_ids.tolist()) == {0}
    dtype = "bf16" if name == "session-bf16.kv" else "f16"
    assert {tensor.dtype.name for tensor in track.tensors} == {dtype}
    assert track.attributes["v_trans"] == (name == "session.kv")


@pytest.mark.parametrize("name", ALL)
def test_llama_cpp_loads_it(model: Model, name: str) -> None:
    snapshot = open_state(SAMPLES / name)
    [track] = snapshot.tracks
    dtype = track.tensors[0].dtype
    flash = not track.attributes["v_trans"]
    with Context(model, 512, type_k=dtype, type_v=dtype, flash_attention=flash) as context:
        load = context.load_session if name in SESSIONS else context.load_sequence
        assert load(SAMPLES / name) == snapshot.tokens.tolist()
        assert context.position_range() == (0, len(snapshot.tokens) - 1)


def test_series_grows_bit_for_bit() -> None:
    snapshots = [open_state(SAMPLES / name) for name in TURNS]
    assert [len(snapshot.tokens) for snapshot in snapshots] == [90, 170, 250, 330, 410]
    for earlier, later in zip(snapshots, snapshots[1:], strict=False):
        count = len(earlier.tokens)
        assert np.array_equal(earlier.tokens, later.tokens[:count])
        for old, new in zip(all_rows(earlier), all_rows(later), strict=True):
            assert np.array_equal(old, new[:count])


def test_regenerated_turn_parts_from_turn_3() -> None:
    before, after = open_state(SAMPLES / TURNS[2]), open_state(SAMPLES / REGENERATED)
    assert len(after.tokens) == 310
    same = before.tokens == after.tokens[: len(before.tokens)]
    assert same[:228].all() and not same[228:].any()
    for old, new in zip(all_rows(before), all_rows(after), strict=True):
        assert np.array_equal(old[:228], new[:228])
        assert not np.array_equal(old[228:], new[228:250])


def test_script_makes_them_again(script: ModuleType, tmp_path: Path) -> None:
    """The same up to the last bits, which differ between processors."""
    script.make_all(tmp_path)
    for name in ALL:
        ours, theirs = open_state(SAMPLES / name), open_state(tmp_path / name)
        assert np.array_equal(ours.tokens, theirs.tokens)
        dtype = ours.tracks[0].tensors[0].dtype
        for old, new in zip(all_rows(ours), all_rows(theirs), strict=True):
            assert relative_error(to_float(old, dtype), to_float(new, dtype)) < 0.01


def test_script_is_deterministic(script: ModuleType, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        script.make_all(tmp_path / folder)
    for name in ALL:
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_transformers_reads_the_same_model(model: Model) -> None:
    """The one file gives both engines the same token ids and the same logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": MODEL.parent, "gguf_file": MODEL.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    network = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    for path in (SAMPLES / "texts" / name for name in ("inaugural-1957.txt", "pep-0259.txt")):
        text = path.read_text(encoding="utf-8")
        tokens = model.tokenize(text)
        assert tokenizer(text)["input_ids"] == tokens
        tokens = tokens[:384]
        with torch.no_grad():
            expected = network(torch.tensor([tokens])).logits[0].numpy()
        f32 = DTYPES["f32"]
        with Context(model, 512, type_k=f32, type_v=f32, flash_attention=False) as context:
            for start in range(0, len(tokens), 96):
                logits = context.decode(tokens[start : start + 96], start)
                assert np.abs(logits - expected[start + 95]).max() < 5e-3
        assert 2 < expected.std() < 4.5
