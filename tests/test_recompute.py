"""Snapshots whose cache is computed again from their tokens, in llama.cpp and transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from conftest import ROOT, SAMPLES
from tscfile_cli.main import main

import tscfile
from tscfile.dtypes import DTYPES
from tscfile.errors import MismatchError, UsageError
from tscfile.identity import identity_from_gguf
from tscfile.model import ModelIdentity, Snapshot
from tscfile.resume.engine import Context, Model
from tscfile.resume.guards import MAX_ERROR_LOSSY
from tscfile.resume.llama_cpp import restore, resume
from tscfile.resume.recompute import recompute
from tscfile.sources.llama_state import open_state, parse_state

MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"
TEXT = (SAMPLES / "texts" / "inaugural-1957.txt").read_text(encoding="utf-8")
N_PREDICT = 24
N_TOKENS = 350


@pytest.fixture(scope="module")
def identity() -> ModelIdentity:
    return identity_from_gguf(MODEL)


class Saved:
    """A session, what it goes on with by itself, and archives of it."""

    def __init__(self, folder: Path, identity: ModelIdentity, flash: bool, type_v: str) -> None:
        self.path = folder / "saved.kv"
        with Model(MODEL) as model, Context(
            model, 512, type_k=DTYPES["f16"], type_v=DTYPES[type_v], flash_attention=flash
        ) as context:
            self.tokens = model.tokenize(TEXT)[:N_TOKENS]
            logits = context.decode(self.tokens, 0)
            context.save_session(self.path, self.tokens)
            self.expected: list[int] = []
            while len(self.expected) < N_PREDICT:
                self.expected.append(int(np.argmax(logits)))
                at = len(self.tokens) + len(self.expected) - 1
                logits = context.decode(self.expected[-1:], at)
        self.archives = {tier: folder / f"{tier}.tsc" for tier in ("lossless", "tokens")}
        for tier, archive in self.archives.items():
            tscfile.pack(self.path, archive, tier=tier, identity=identity)
        if type_v == "f16":
            self.archives["archive"] = folder / "archive.tsc"
            options: Any = {"book": BOOK, "embed_book": True, "identity": identity}
            tscfile.pack(self.path, self.archives["archive"], tier="archive", **options)


@pytest.fixture(scope="module", params=[(False, "f16"), (True, "f16"), (True, "q8_0")],
                ids=["transposed", "flash", "q8_0"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    identity: ModelIdentity,
) -> Saved:  # fmt: skip
    return Saved(tmp_path_factory.mktemp("saved"), identity, *request.param)


# --- the promise --------------------------------------------------------------------------------


def test_resume_as_if_it_had_never_stopped(saved: Saved) -> None:
    """From every tier the text is the session's own, and no row of the archive was taken."""
    for tier, path in saved.archives.items():
        with tscfile.open(path) as archive:
            result = resume(archive.snapshot(), MODEL, "", N_PREDICT, recompute=True)
        assert result.tokens == saved.expected, tier
        assert (result.n_reused, result.n_recomputed) == (0, N_TOKENS)
        assert result.n_computed == N_TOKENS + N_PREDICT - 1
        assert result.compute_seconds > 0 == result.load_seconds
        if tier == "tokens":
            assert result.probe_error is None and "does not hold them" in result.notes[0]
        else:
            assert result.probe_error is not None and result.notes == ()
            assert result.probe_error < (MAX_ERROR_LOSSY if tier == "archive" else 1e-6)


def test_unpack_writes_the_file_of_the_save(saved: Saved, tmp_path: Path) -> None:
    """One engine, one batch size, one number of threads: here even the bytes agree."""
    for tier, path in saved.archives.items():
        out = tmp_path / f"{tier}.kv"
        command = ["unpack", str(path), "-o", str(out), "--recompute", "--model", str(MODEL)]
        assert main([*command, "-q"]) == 0
        assert out.read_bytes() == saved.path.read_bytes(), tier


def test_hybrid_file(saved: Saved, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Frames for an approximate resume at once, ids for the model's own cache later."""
    if "archive" not in saved.archives:
        pytest.skip("rows of two types have no lossy tier")
    path = saved.archives["archive"]
    out = tmp_path / "near.kv"
    assert main(["unpack", str(path), "-o", str(out), "-q"]) == 0
    assert len(out.read_bytes()) == saved.path.stat().st_size
    assert out.read_bytes() != saved.path.read_bytes()
    command = ["resume", str(path), "--model", str(MODEL), "-n", "8"]
    assert main(command) == 0
    assert f"reused {N_TOKENS - 1} tokens" in capfd.readouterr().err
    assert main([*command, "--recompute"]) == 0
    assert f"recomputed {N_TOKENS} tokens in" in capfd.readouterr().err


def test_tier_tokens_recomputes_without_being_told(
    saved: Saved, capfd: pytest.CaptureFixture[str]
) -> None:
    with Model(MODEL) as model:
        text = b"".join(map(model.piece, saved.expected[:12])).decode("utf-8", "replace")
    command = ["resume", str(saved.archives["tokens"]), "--model", str(MODEL), "-n", "12"]
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert out == f"{text}\n"
    assert f"note: {N_TOKENS} frames are not stored: recomputing them" in err
    assert f"recomputed {N_TOKENS} tokens in" in err and "computed 11 more" in err


def test_snapshots_of_a_series(tmp_path: Path, identity: ModelIdentity) -> None:
    """Each save of an archive is its own; a prompt goes on behind it."""
    turns = [SAMPLES / "series" / f"turn-{turn}.kv" for turn in (1, 2)]
    tscfile.pack(turns[0], tmp_path / "a.tsc", tier="tokens", identity=identity)
    tscfile.append(turns[1], tmp_path / "a.tsc")
    with tscfile.open(tmp_path / "a.tsc") as archive:
        for number, turn in enumerate(turns):
            got = resume(archive.snapshot(number), MODEL, " And so", 16, recompute=True)
            assert got.tokens == resume(open_state(turn), MODEL, " And so", 16).tokens


def test_more_tokens_than_cells(tmp_path: Path, identity: ModelIdentity) -> None:
    """Listed but not decoded at the save: computed for the text, not written as rows."""
    saved = Saved(tmp_path, identity, False, "f16")
    whole = open_state(saved.path)
    with Model(MODEL) as model, Context(
        model, 512, type_k=DTYPES["f16"], type_v=DTYPES["f16"], flash_attention=False
    ) as context:
        context.decode(saved.tokens[:-3], 0)
        context.save_session(tmp_path / "less.kv", saved.tokens)
    tscfile.pack(tmp_path / "less.kv", tmp_path / "less.tsc", tier="tokens", identity=identity)
    with tscfile.open(tmp_path / "less.tsc") as archive:
        got = resume(archive.snapshot(), MODEL, "", 16, recompute=True)
        made = recompute(archive.snapshot(), MODEL)
    assert got.tokens == saved.expected[:16] and got.n_recomputed == N_TOKENS - 3
    rows = made.snapshot.tracks[0].read(0, N_TOKENS - 3)
    assert len(made.snapshot.tokens) == N_TOKENS and made.n_tokens == N_TOKENS - 3
    wanted = whole.tracks[0].read(0, N_TOKENS - 3)
    assert all(np.allclose(a.view("<f2"), b.view("<f2"), rtol=0.02, atol=0.02)
               for a, b in zip(rows, wanted, strict=True))  # fmt: skip


@pytest.mark.parametrize("kind", ["gemma3", "jamba"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    """Windows that have let go of cells, and a recurrent part, which is kept as it was saved."""
    path, state = tmp_path / "model.gguf", tmp_path / "saved.kv"
    (tiny_models.write_jamba if kind == "jamba" else tiny_models.MODELS[kind])(path)
    tokens = np.random.default_rng(0).integers(3, tiny_models.N_VOCAB, 120).tolist()
    with tiny_models.Engine(path, flash=False) as run:
        logits = run.decode(tokens)
        state.write_bytes(run.save("session", tokens, 0, tmp_path))
    identity = identity_from_gguf(path)
    tscfile.pack(state, tmp_path / "a.tsc", tier="tokens", identity=identity)
    with tscfile.open(tmp_path / "a.tsc") as archive:
        snapshot = archive.snapshot()
        assert snapshot.n_absent == sum(len(t.cells) for t in snapshot.tracks)
        with restore(snapshot, path, recompute=True) as restored:
            assert restored.logits is not None
            assert np.abs(restored.logits - logits).max() < 1e-3
        tscfile.unpacking.write_snapshot(recompute(snapshot, path).snapshot, tmp_path / "back.kv")
    back, saved = (parse_state((tmp_path / n).read_bytes()) for n in ("back.kv", "saved.kv"))
    assert back.opaque == saved.opaque and back.tokens.tolist() == tokens
    for new, old in zip(back.tracks, saved.tracks, strict=True):
        assert np.array_equal(new.cells.pos, old.cells.pos)
        for a, b in zip(new.read(0, len(new.cells)), old.read(0, len(old.cells)), strict=True):
            assert np.allclose(a.view("<f2"), b.view("<f2"), rtol=0.02, atol=0.02)


# --- refusals -----------------------------------------------------------------------------------


def other_weights(path: Path) -> Path:
    """The reference model with one weight moved: same shapes, another fingerprint."""
    data = bytearray(MODEL.read_bytes())
    reader = gguf.GGUFReader(MODEL)
    tensor = reader.tensors[-1]
    at = int(tensor.data_offset) + 64
    data[at] ^= 0x40
    path.write_bytes(data)
    return path


def test_another_model_is_refused(
    saved: Saved, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = other_weights(tmp_path / "other.gguf")
    for archive in saved.archives.values():
        for command in (["resume", str(archive), "--recompute"],
                        ["unpack", str(archive), "--recompute", "-o", str(tmp_path / "out.kv")]):
            capfd.readouterr()
            assert main([*command, "--model", str(other)]) == 4
            out, err = capfd.readouterr()
            assert "another model" in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out.kv").exists()


def test_rows_of_another_text_are_refused(saved: Saved) -> None:
    """Without a recorded model the stored rows are what tells."""
    snapshot = open_state(saved.path)
    assert resume(snapshot, MODEL, "", 1, recompute=True).probe_error is not None
    snapshot.tokens = snapshot.tokens[::-1].copy()
    with pytest.raises(MismatchError, match="did not make this cache"):
        resume(snapshot, MODEL, "", 1, recompute=True)


def test_what_cannot_be_recomputed(saved: Saved, tmp_path: Path) -> None:
    snapshot = open_state(saved.path)
    with tscfile.open(saved.archives["tokens"]) as archive:
        with pytest.raises(UsageError, match="context of 256 cells is too small: 350 tokens"):
            resume(archive.snapshot(), MODEL, "", 8, recompute=True, n_ctx=256)
        with pytest.raises(UsageError, match="not stored"):
            resume(archive.snapshot(), MODEL, "", 8)
    bare = Snapshot(snapshot.tokens[:0], snapshot.tracks, snapshot.source, snapshot.opaque)
    bare.source["token_form"] = "plain"
    with pytest.raises(UsageError, match="nothing to recompute it from"):
        resume(bare, MODEL, "x", 8, recompute=True)


def test_options_of_unpack(
    saved: Saved, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive, out = str(saved.archives["tokens"]), tmp_path / "out.kv"
    assert main(["unpack", archive, "-o", str(out), "--recompute"]) == 2
    assert main(["unpack", archive, "-o", str(out), "--model", str(MODEL)]) == 2
    assert "go together" in capfd.readouterr().err
    out.write_bytes(b"mine")
    assert main(["unpack", archive, "-o", str(out), "--recompute", "--model", str(MODEL)]) == 2
    assert out.read_bytes() == b"mine"
    npz = tmp_path / "out.npz"
    wanted = ["--recompute", "--model", str(MODEL), "--as", "npz", "-o", str(npz)]
    assert main(["unpack", archive, *wanted, "--kv-type", "f16"]) == 0
    assert tscfile.sources.open_source(npz).tokens.tolist() == saved.tokens


# --- how near it is -----------------------------------------------------------------------------


def load_bench(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "bench" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_how_near_another_batch_and_another_engine_come() -> None:
    """Faithful, not bit for bit: what `tests/bench/recompute.py` measures, on one window."""
    pytest.importorskip("transformers")
    from tscfile.quality.engine import Engine
    from tscfile.quality.metrics import compare

    bench, engine = load_bench("recompute"), Engine(MODEL)
    tokens = engine.tokenize(TEXT)[:300]
    cached, feed = tokens[:236], tokens[236:]
    computed = engine.prefill(cached)
    with Model(MODEL) as model:
        saved, again, narrow = (
            bench.in_llama_cpp(model, cached, computed.shape, **options)
            for options in ({}, {}, {"n_batch": 17})
        )
    assert bench.differences(saved, again)["identical"] == 1
    expected = engine.proceed(saved, feed[:-1], 236)
    for other in (narrow, computed):
        found = bench.differences(saved, other)
        assert 0.3 < found["identical"] < 1 and found["largest_relative_error"] < 0.002
        logits = engine.proceed(other, feed[:-1], 236)
        assert 0 < compare(expected, logits, feed[1:]).kl.mean() < 1e-5


# --- transformers -------------------------------------------------------------------------------


def test_in_transformers(saved: Saved) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tscfile.resume.transformers import prepare

    model = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL.parent, gguf_file=MODEL.name, dtype=torch.float32, local_files_only=True
    ).eval()
    with pytest.raises(UsageError, match="not stored"):
        prepare(saved.archives["tokens"], model)
    for tier in ("tokens", *({"archive"} & saved.archives.keys())):
        prepared = prepare(saved.archives[tier], model, recompute=True)
        assert (prepared.n_reused, prepared.n_recomputed) == (0, N_TOKENS - 1)
        assert (prepared.probe_error is None) == (tier == "tokens")
        out = model.generate(**prepared.inputs, max_new_tokens=16, do_sample=False)
        assert out[0, N_TOKENS:].tolist() == saved.expected[:16]
