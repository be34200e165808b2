"""A snapshot goes back into llama.cpp and continues there, or is refused for a good reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models

import tscfile
from tscfile.dtypes import DTYPES
from tscfile.errors import (
    DamagedError,
    MismatchError,
    TscError,
    UnsupportedError,
    UsageError,
)
from tscfile.identity import identity_from_gguf
from tscfile.model import ModelIdentity, Snapshot
from tscfile.resume import engine, guards
from tscfile.resume.engine import Context, Model
from tscfile.resume.llama_cpp import restore, resume
from tscfile.sources.llama_state import open_state, parse_state, state_size, write_state

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
SESSION = SAMPLES / "session.kv"
TEXT = (SAMPLES / "texts" / "inaugural-1957.txt").read_text(encoding="utf-8")
N_PREDICT = 64

OURS = """
import json, sys
from tscfile.resume.llama_cpp import restore, resume
from tscfile.sources.llama_state import open_state
state, model = sys.argv[1:3]
with restore(open_state(state), model, n_more=64) as restored:
    logits = restored.logits.tobytes().hex()
result = resume(open_state(state), model, "", 64)
print(json.dumps([result.tokens, result.n_reused, result.n_computed, logits]))
"""
"""Loads through this project; arguments: state file, model."""

ENGINE_ALONE = """
import json, sys
from tscfile.dtypes import DTYPES
from tscfile.resume.engine import Context, Model
state, model, kind, type_k, type_v, flash = sys.argv[1:7]
with Model(model) as model, Context(
    model, 512, type_k=DTYPES[type_k], type_v=DTYPES[type_v], flash_attention=flash == "True"
) as context:
    tokens = (context.load_session if kind == "session" else context.load_sequence)(state)
    context.remove(0, len(tokens) - 1)
    print(json.dumps(context.decode(tokens[-1:], len(tokens) - 1).tobytes().hex()))
"""
"""Loads llama.cpp's own file with llama.cpp's own loader; nothing of ours touches the bytes."""


def in_fresh_process(code: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "llama_" not in done.stderr  # its log is silent unless asked
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(MODEL)


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    return model.tokenize(TEXT)[:350]


def save(
    model: Model,
    path: Path,
    tokens: list[int],
    *,
    type_k: str = "f16",
    type_v: str = "f16",
    flash: bool = True,
    kind: str = "session",
    listed: list[int] | None = None,
) -> list[int]:
    """Prefill and save; returns what the run itself continues with, greedily."""
    with Context(
        model, 512, type_k=DTYPES[type_k], type_v=DTYPES[type_v], flash_attention=flash
    ) as context:
        logits = context.decode(tokens, 0)
        write = context.save_session if kind == "session" else context.save_sequence
        write(path, tokens if listed is None else listed)
        continued: list[int] = []
        while len(continued) < N_PREDICT:
            continued.append(int(np.argmax(logits)))
            logits = context.decode(continued[-1:], len(tokens) + len(continued) - 1)
    return continued


def saved_snapshot(model: Model, folder: Path, tokens: list[int], **options: Any) -> Snapshot:
    save(model, folder / "saved.kv", tokens, **options)
    return open_state(folder / "saved.kv")


# --- the promise --------------------------------------------------------------------------------

CACHES = [
    ("session", "f16", "f16", False),
    ("session", "bf16", "bf16", True),
    ("sequence", "f16", "f16", True),
    ("sequence", "f32", "f32", False),
    ("session", "q8_0", "q8_0", True),
    ("session", "q8_0", "f16", False),
    ("session", "q4_0", "q4_0", True),
    ("sequence", "iq4_nl", "q5_1", True),
]


@pytest.mark.parametrize(("kind", "type_k", "type_v", "flash"), CACHES)
def test_resume_in_a_fresh_process(
    model: Model,
    tokens: list[int],
    tmp_path: Path,
    kind: str,
    type_k: str,
    type_v: str,
    flash: bool,
) -> None:
    """The uninterrupted run's tokens, and exactly the logits of llama.cpp's own reload."""
    own, ours = tmp_path / "own.kv", tmp_path / "ours.kv"
    expected = save(model, own, tokens, type_k=type_k, type_v=type_v, flash=flash, kind=kind)
    snapshot = open_state(own)
    state = bytearray(state_size(snapshot))
    write_state(snapshot, state)
    ours.write_bytes(state)
    got, n_reused, n_computed, logits = in_fresh_process(OURS, ours, MODEL)
    assert got == expected
    assert (n_reused, n_computed) == (len(tokens) - 1, 1 + N_PREDICT - 1)
    assert logits == in_fresh_process(ENGINE_ALONE, own, MODEL, kind, type_k, type_v, flash)


@pytest.mark.parametrize(("kind", "flash"), [("session", False), ("sequence", True)])
def test_resume_through_an_archive(
    model: Model, tokens: list[int], tmp_path: Path, kind: str, flash: bool
) -> None:
    """Save, pack, unpack, load in a fresh process: nothing is lost on the way."""
    own, packed, back = (tmp_path / name for name in ("own.kv", "own.tsc", "back.kv"))
    expected = save(model, own, tokens, flash=flash, kind=kind)
    tscfile.pack(own, packed, identity=identity_from_gguf(MODEL))
    tscfile.unpack(packed, back)
    assert back.read_bytes() == own.read_bytes()
    got, n_reused, n_computed, logits = in_fresh_process(OURS, back, MODEL)
    assert got == expected and n_reused == len(tokens) - 1
    assert logits == in_fresh_process(ENGINE_ALONE, own, MODEL, kind, "f16", "f16", flash)
    with tscfile.open(packed) as archive:
        assert resume(archive.snapshot(), MODEL, "", N_PREDICT).tokens == expected


@pytest.mark.parametrize("flash", [False, True])
def test_v_layout_can_change(model: Model, tokens: list[int], tmp_path: Path, flash: bool) -> None:
    """Saved in one layout, written in the other: the same continuation."""
    expected = save(model, tmp_path / "own.kv", tokens, flash=flash)
    snapshot = open_state(tmp_path / "own.kv")
    state = bytearray(state_size(snapshot, v_trans=int(flash)))
    write_state(snapshot, state, v_trans=int(flash))
    assert resume(parse_state(state), MODEL, "", N_PREDICT).tokens == expected


def test_prompt_continues_the_text(model: Model, tokens: list[int], tmp_path: Path) -> None:
    """The same as if prompt and text had been read in one go."""
    prompt = " And so shall America"
    extra = model.tokenize(prompt)
    expected = save(model, tmp_path / "long.kv", tokens + extra)
    snapshot = saved_snapshot(model, tmp_path, tokens)
    heard: list[str] = []
    result = resume(snapshot, MODEL, prompt, 20, on_text=heard.append)
    assert result.tokens == expected[:20]
    assert result.n_reused == len(tokens) - 1
    assert result.n_computed == 1 + len(extra) + 19
    assert "".join(heard) == result.text
    assert result.text == b"".join(map(model.piece, result.tokens)).decode("utf-8", "replace")
    assert result.probe_error is not None and result.probe_error < 0.01
    assert result.notes == ()


@pytest.mark.parametrize("name", ["series/turn-3.kv", "series/turn-4-regenerated.kv"])
def test_samples_resume(name: str) -> None:
    snapshot = open_state(SAMPLES / name)
    result = resume(snapshot, MODEL, "\n", 8)
    assert len(result.tokens) == 8
    assert result.n_reused == len(snapshot.tokens) - 1


def test_sampling_is_repeatable() -> None:
    snapshot = open_state(SESSION)
    runs = [resume(snapshot, MODEL, "", 12, temperature=0.9, seed=seed) for seed in (1, 1, 2)]
    assert runs[0].tokens == runs[1].tokens != runs[2].tokens


@pytest.mark.parametrize("kind", ["llama", "qwen2vl", "gemma3"])
@pytest.mark.parametrize("container", ["session", "sequence"])
def test_other_architectures(tmp_path: Path, kind: str, container: str) -> None:
    """M-RoPE cells, and sliding windows whose first cells are gone."""
    path = tmp_path / "model.gguf"
    tiny_models.MODELS[kind](path)
    tokens = np.random.default_rng(0).integers(3, tiny_models.N_VOCAB, 200).tolist()
    with tiny_models.Engine(path, flash=False) as run:
        logits = run.decode(tokens)
        state = run.save(container, tokens, 0, tmp_path)
    with restore(parse_state(state), path) as restored:
        assert restored.logits is not None
        assert np.abs(restored.logits - logits).max() < 1e-3
        assert (restored.n_reused, restored.n_computed) == (199, 1)


def test_hybrid_continues_with_a_prompt(tmp_path: Path) -> None:
    """A recurrent part cannot step back, so there is nothing to replay or probe."""
    path = tmp_path / "model.gguf"
    tiny_models.write_jamba(path)
    tokens = np.random.default_rng(0).integers(3, tiny_models.N_VOCAB, 80).tolist()
    with tiny_models.Engine(path) as run:
        run.decode(tokens)
        state = run.save("session", tokens, 0, tmp_path)
        prompt = "ab"
        logits = run.decode([3 + byte for byte in prompt.encode()], 80)
    with restore(parse_state(state), path, n_more=8) as restored:
        assert np.array_equal(restored.decode([3 + b for b in prompt.encode()]), logits)
        assert (restored.n_reused, restored.n_computed) == (80, 2)
        assert "summaries" in restored.notes[0]
    with pytest.raises(UsageError, match="give a prompt"):
        resume(parse_state(state), path, "", 4)


# --- token list and cells -----------------------------------------------------------------------


def test_more_tokens_than_cells(model: Model, tokens: list[int], tmp_path: Path) -> None:
    """As llama-completion saves it: the last tokens are listed but not decoded yet."""
    expected = save(model, tmp_path / "all.kv", tokens)
    snapshot = saved_snapshot(model, tmp_path, tokens[:-3], listed=tokens)
    result = resume(snapshot, MODEL, "", 16)
    assert result.tokens == expected[:16]
    assert (result.n_reused, result.n_computed) == (len(tokens) - 4, 4 + 15)


def test_without_tokens(model: Model, tokens: list[int], tmp_path: Path) -> None:
    snapshot = saved_snapshot(model, tmp_path, tokens, listed=[])
    with pytest.raises(UsageError, match="give a prompt"):
        resume(snapshot, MODEL, "", 4)
    result = resume(snapshot, MODEL, " and", 4)
    assert result.n_reused == len(tokens)
    assert result.probe_error is None
    assert any("no token list" in note for note in result.notes)


def test_fewer_tokens_than_cells(model: Model, tokens: list[int], tmp_path: Path) -> None:
    snapshot = saved_snapshot(model, tmp_path, tokens, listed=tokens[:-1])
    with pytest.raises(MismatchError, match="349 tokens do not name 350 cells"):
        resume(snapshot, MODEL, "", 4)


@pytest.mark.parametrize("index", [2, -1])
def test_wrong_token(index: int) -> None:
    """A token list of another text: layer 0 already tells."""
    snapshot = open_state(SESSION)
    snapshot.tokens = snapshot.tokens.copy()
    snapshot.tokens[index] += 1
    with pytest.raises(MismatchError, match="did not make this cache"):
        resume(snapshot, MODEL, "", 4)


def test_token_outside_the_vocabulary() -> None:
    snapshot = open_state(SESSION)
    snapshot.tokens = snapshot.tokens.copy()
    snapshot.tokens[7] = 4096
    with pytest.raises(MismatchError, match="vocabulary of 4096"):
        resume(snapshot, MODEL, "", 4)
    with pytest.raises(UsageError, match="vocabulary of 4096"):
        resume(snapshot, MODEL, "", 4, identity_check=False)


def test_several_sequences(model: Model, tokens: list[int], tmp_path: Path) -> None:
    f16 = DTYPES["f16"]
    path = tmp_path / "two.kv"
    with Context(
        model, 512, type_k=f16, type_v=f16, flash_attention=True, n_sequences=2
    ) as context:
        context.decode(tokens[:100], 0)
        context.decode(tokens[:50], 0, 1)
        context.save_session(path, tokens[:100])
        with pytest.raises(UnsupportedError, match="2 sequences"):
            resume(open_state(path), MODEL, "", 4)
        context.save_sequence(path, tokens[:50], 1)
        assert resume(open_state(path), MODEL, "", 4).n_reused == 49


def test_gap_and_empty(model: Model, tokens: list[int], tmp_path: Path) -> None:
    f16 = DTYPES["f16"]
    path = tmp_path / "gap.kv"
    with Context(model, 512, type_k=f16, type_v=f16, flash_attention=True) as context:
        context.save_session(path, [])
        with pytest.raises(MismatchError, match="no cells"):
            resume(open_state(path), MODEL, " and", 4)
        context.decode(tokens, 0)
        context.remove(0, 20, 30)
        context.save_session(path, tokens)
        with pytest.raises(MismatchError, match="gaps"):
            resume(open_state(path), MODEL, " and", 4)


# --- another model ------------------------------------------------------------------------------


def changed_model(folder: Path, change: Callable[[gguf.GGUFReader], None]) -> Path:
    """A copy of the reference model, changed in place."""
    path = folder / "changed.gguf"
    shutil.copy(MODEL, path)
    path.chmod(0o644)
    reader = gguf.GGUFReader(path, "r+")
    change(reader)
    reader.data.flush()
    return path


def other_weights(reader: gguf.GGUFReader) -> None:
    random = np.random.default_rng(1)
    for tensor in reader.tensors:
        if tensor.data.ndim == 2:
            spread = float(tensor.data.astype(np.float32).std())
            values = random.standard_normal(tensor.data.shape) * spread
            tensor.data[:] = values.astype(tensor.data.dtype)


def noise_in_one_layer(reader: gguf.GGUFReader) -> None:
    """What a small adapter might do."""
    random = np.random.default_rng(1)
    [tensor] = [tensor for tensor in reader.tensors if tensor.name == "blk.2.attn_v.weight"]
    values = tensor.data.astype(np.float32)
    values += 0.3 * values.std() * random.standard_normal(values.shape).astype(np.float32)
    tensor.data[:] = values.astype(tensor.data.dtype)


def other_rope_base(reader: gguf.GGUFReader) -> None:
    field = reader.fields["llama.rope.freq_base"]
    field.parts[field.data[0]][0] = 11000.0


CHANGES = {
    other_weights: "weights_blake3",
    noise_in_one_layer: "weights_blake3",
    other_rope_base: "rope_base: recorded 10000.0, model has 11000.0",
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_model_is_refused_by_identity(
    tmp_path: Path, change: Callable[[gguf.GGUFReader], None]
) -> None:
    snapshot = open_state(SESSION)
    snapshot.identity = identity_from_gguf(MODEL)
    assert resume(snapshot, MODEL, "", 2).notes == ()
    with pytest.raises(MismatchError) as caught:
        resume(snapshot, changed_model(tmp_path, change), "", 2, probe=False)
    assert CHANGES[change] in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("cache", "change"),
    [
        ("f16", other_weights),
        ("f16", noise_in_one_layer),
        ("f16", other_rope_base),
        ("q4_0", other_weights),
        ("q4_0", other_rope_base),
    ],
)
def test_other_model_is_refused_by_the_probe(
    model: Model,
    tokens: list[int],
    tmp_path: Path,
    change: Callable[[gguf.GGUFReader], None],
    cache: str,
) -> None:
    """Nothing is recorded, the shapes fit, llama.cpp itself would load it."""
    snapshot = saved_snapshot(model, tmp_path, tokens, type_k=cache, type_v=cache)
    snapshot.identity = ModelIdentity()
    changed = changed_model(tmp_path, change)
    with pytest.raises(MismatchError, match="did not make this cache"):
        resume(snapshot, changed, "", 2, identity_check=False)
    with restore(snapshot, changed, identity_check=False, probe=False) as restored:
        assert len(restored.notes) == 2


def test_other_shapes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.write_llama(path)
    with pytest.raises(MismatchError, match="vocabulary|layers"):
        resume(open_state(SESSION), path, "", 2)
    snapshot = open_state(SESSION)
    snapshot.tokens = snapshot.tokens % tiny_models.N_VOCAB
    with pytest.raises(MismatchError, match="6 layers, the model 3"):
        resume(snapshot, path, "", 2)
    with pytest.raises(MismatchError, match="does not take the state .*mismatched layer count"):
        resume(snapshot, path, "", 2, identity_check=False)


def test_row_size_is_compared() -> None:
    snapshot = open_state(SESSION)
    facts = identity_from_gguf(MODEL, weights=False).facts
    with pytest.raises(MismatchError, match="has 128 channels, .* 4 heads of 64 have 256"):
        guards.check_shape(snapshot, ModelIdentity({**facts, "n_kv_heads": 4}), MODEL)


def test_other_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.write_gemma3(path)
    with pytest.raises(MismatchError, match="architecture: recorded llama, model has gemma3"):
        resume(open_state(SESSION), path, "", 2)
    with pytest.raises(TscError):
        resume(open_state(SESSION), path, "", 2, identity_check=False)


# --- what else can go wrong ---------------------------------------------------------------------


def test_errors_are_one_line(model: Model, tmp_path: Path) -> None:
    snapshot, f16 = open_state(SESSION), DTYPES["f16"]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(MODEL.read_bytes()[:300_000])
    cases: list[tuple[type[TscError], str, Callable[[], object]]] = [
        (UsageError, "no such model file", lambda: resume(snapshot, tmp_path / "no", "", 1)),
        (UsageError, "take 468", lambda: resume(snapshot, MODEL, "", 68, n_ctx=467)),
        (UsageError, "negative", lambda: resume(snapshot, MODEL, "", -1)),
        (TscError, "cannot load this model", lambda: Model(cut)),
        (
            TscError,
            "requires flash_attn",
            lambda: Context(model, 256, type_k=f16, type_v=DTYPES["q8_0"], flash_attention=False),
        ),
    ]
    for kind, words, call in cases:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(DamagedError, match="ends at byte"):
        snapshot.identity = identity_from_gguf(MODEL)
        resume(snapshot, cut, "", 1)


def test_full_context(model: Model, tokens: list[int]) -> None:
    f16 = DTYPES["f16"]
    with Context(model, 256, type_k=f16, type_v=f16, flash_attention=True) as context:
        with pytest.raises(TscError, match="256 cells is full"):
            context.decode(tokens, 0)


def test_refused_state_leaves_nothing(model: Model) -> None:
    f16 = DTYPES["f16"]
    with Context(model, 512, type_k=f16, type_v=f16, flash_attention=True) as context:
        for state in (np.zeros(100, np.uint8), context.sequence_state()[:-1]):
            with pytest.raises(MismatchError, match="does not take the state"):
                context.set_sequence_state(state)
            assert context.position_range() == (-1, -1)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UsageError, match=r"pip install 'tscfile\[llama\]'"):
        engine.load_library()


def test_state_version_is_asked_of_the_engine(model: Model, tmp_path: Path) -> None:
    f16 = DTYPES["f16"]
    path = tmp_path / "s.kv"
    with Context(model, 256, type_k=f16, type_v=f16, flash_attention=True) as context:
        context.save_session(path, [])
        assert context.session_version() == int.from_bytes(path.read_bytes()[4:8], "little")
