"""Caches in GGUF, safetensors and npz files: read by others, back bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
from conftest import rows_of, some_cache
from tscfile_cli.main import main

import tscfile
from tscfile.conversion import convert, identified
from tscfile.dtypes import DTYPES, dtype_from_ggml
from tscfile.errors import TscError, UsageError
from tscfile.identity import identity_from_gguf
from tscfile.model import CellTable, ModelIdentity, Snapshot, TensorSpec
from tscfile.retype import retype
from tscfile.sources import open_source, write_carrier
from tscfile.sources.hf_layout import as_transformers
from tscfile.sources.kv_arrays import HeadsTrack
from tscfile.sources.llama_state import open_state, parse_state
from tscfile.unpacking import StateOptions

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
SESSION = SAMPLES / "session.kv"
BF16 = SAMPLES / "session-bf16.kv"
TURN = SAMPLES / "series" / "turn-3.kv"
ARRAYS = ("safetensors", "npz")
CARRIERS = ("gguf", *ARRAYS)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def identity() -> ModelIdentity:
    return identity_from_gguf(MODEL, weights=False)


def assert_same(first: Snapshot, second: Snapshot) -> None:
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.source == second.source and first.opaque == second.opaque
    assert first.identity.facts == second.identity.facts
    for a, b in zip(first.tracks, second.tracks, strict=True):
        assert (a.cache, a.stream, a.attributes) == (b.cache, b.stream, b.attributes)
        assert list(a.tensors) == list(b.tensors)
        for name in ("pos", "seq_counts", "seq_ids", "ext"):
            assert np.array_equal(getattr(a.cells, name), getattr(b.cells, name))
    assert rows_of(first) == rows_of(second)


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [SESSION, BF16, TURN], ids=lambda path: path.stem)
def test_a_state_comes_back_from_gguf_byte_for_byte(state: Path, tmp_path: Path) -> None:
    carrier, back = tmp_path / "a.gguf", tmp_path / "a.kv"
    size = convert(state, carrier)
    assert size == carrier.stat().st_size
    assert_same(open_state(state), open_source(carrier))
    convert(carrier, back)
    assert back.read_bytes() == state.read_bytes()


def golden_states() -> list[Path]:
    return sorted((Path(__file__).parent / "golden").rglob("*.kv"))[:60]


def test_golden_states_of_all_generations_come_back(tmp_path: Path) -> None:
    """Several caches, recurrent parts, packed tokens, appendices, old outputs."""
    tried = 0
    for path in golden_states():
        try:
            snapshot = open_state(path)
        except TscError:
            continue  # needs to be told its architecture
        carrier, back = tmp_path / f"{tried}.gguf", tmp_path / f"{tried}.kv"
        convert(path, carrier)
        assert_same(snapshot, open_source(carrier))
        convert(carrier, back)
        assert back.read_bytes() == path.read_bytes(), path
        tried += 1
    assert tried > 10


@pytest.mark.parametrize("kv_type", [name for name in DTYPES if name != "f16"])
def test_every_element_type_is_kept(kv_type: str, tmp_path: Path) -> None:
    snapshot = retype(open_state(SESSION), kv_type, head_dim=64)
    path = tmp_path / "a.gguf"
    write_carrier(snapshot, path, "gguf")
    assert rows_of(open_source(path)) == rows_of(snapshot)
    reader = gguf.GGUFReader(path)
    tensor = next(t for t in reader.tensors if t.name == "kv.0.0.blk.2.v")
    assert tensor.tensor_type == DTYPES[kv_type].ggml_id
    assert tensor.shape.tolist() == [128, 400]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert values.shape == (400, 128)


def test_gguf_py_reads_it(tmp_path: Path, identity: ModelIdentity) -> None:
    path = tmp_path / "a.gguf"
    snapshot = identified(open_state(TURN), identity)
    convert(snapshot, path)
    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.type"] == "kvcache" and facts["general.architecture"] == "llama"
    assert facts["kvcache.version"] == 1 and facts["kvcache.source_format"] == "ggsq/3"
    assert facts["kvcache.identity.tokenizer_blake3"] == identity.facts["tokenizer_blake3"]
    assert facts["kvcache.cell_count"] == [250] and facts["kvcache.rot_k"] == [0] * 6
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert tensors["kvcache.tokens"].tolist() == snapshot.tokens.tolist()
    assert tensors["kvcache.pos"].tolist() == list(range(250))
    [track] = snapshot.tracks
    for spec, rows in zip(track.tensors, track.read(0, 250), strict=True):
        assert tensors[f"kv.0.0.blk.{spec.layer}.{spec.role}"].tobytes() == rows.tobytes()


def test_an_unknown_type_is_carried_as_bytes(tmp_path: Path) -> None:
    rows = np.arange(60, dtype=np.uint8).reshape(3, 20)
    spec = TensorSpec(0, "k", dtype_from_ggml(17), 20)
    cells = CellTable(*(np.array(each, np.int32) for each in ([5, 0, 3], [1, 2, 0], [0, 0, 7])),
                      np.zeros((3, 0), np.int32))  # fmt: skip
    track = HeadsTrack(0, 0, cells, [spec], {"v_trans": 0}, [rows[None]])
    source = {**open_state(SESSION).source, "cell_counts": [3]}
    snapshot = Snapshot(np.zeros(0, np.int32), [track], source, {"appendix": b"xyz", "none": b""})
    path = tmp_path / "a.gguf"
    write_carrier(snapshot, path, "gguf")
    back = open_source(path)
    snapshot.opaque.pop("none")  # empty parts are as good as none
    assert_same(snapshot, back)
    assert len(gguf.GGUFReader(path).tensors) == 5


def test_a_transformers_cache_is_carried(tmp_path: Path) -> None:
    snapshot = some_cache("bf16")
    write_carrier(snapshot, tmp_path / "a.gguf", "gguf")
    assert_same(snapshot, open_source(tmp_path / "a.gguf"))


# --- safetensors and npz ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("carrier", ARRAYS)
def test_arrays_come_back_bit_for_bit(carrier: str, dtype: str, tmp_path: Path) -> None:
    snapshot = some_cache(dtype)
    first, second = tmp_path / "1", tmp_path / "2"
    size = write_carrier(snapshot, first, carrier)
    assert size == first.stat().st_size
    back = open_source(first)
    assert_same(snapshot, back)
    write_carrier(back, second, carrier)
    assert first.read_bytes() == second.read_bytes()
    tscfile.pack(back, tmp_path / "a.tsc")
    with tscfile.open(tmp_path / "a.tsc") as archive:
        assert_same(snapshot, archive.snapshot())


@pytest.mark.parametrize("carrier", ARRAYS)
def test_a_session_goes_there_and_back(
    carrier: str, tmp_path: Path, identity: ModelIdentity
) -> None:
    """In transformers' order of channels there, in llama.cpp's again here."""
    path, back = tmp_path / f"a.{carrier}", tmp_path / "a.kv"
    convert(BF16, path, identity=identity)
    convert(path, back)
    assert back.read_bytes() == BF16.read_bytes()
    convert(SESSION, path, identity=identity, force=True)
    convert(path, back, options=StateOptions(v_trans=True), force=True)
    assert back.read_bytes() == SESSION.read_bytes()
    expected = as_transformers(identified(open_state(SESSION), identity))
    assert rows_of(open_source(path)) == rows_of(expected)


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    snapshot = some_cache("bf16")
    path = tmp_path / "a.safetensors"
    write_carrier(snapshot, path, "safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "tscfile-kv"
        keys = file.get_tensor("layers.2.k")
        assert keys.dtype == torch.bfloat16 and keys.shape == (3, 20, 4)
        assert file.get_tensor("layers.3.v").shape == (2, 7, 6)
        assert file.get_tensor("tokens").tolist() == list(range(21))
        bits = keys.transpose(0, 1).reshape(20, 12).contiguous().view(torch.uint8).numpy()
        assert bits.tobytes() == snapshot.tracks[0].read(0, 20, [1])[0].tobytes()


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "a.safetensors"
    arrays = {
        f"layers.{i}.{role}": np.full((1, 2, 9, 4), i, np.float32)
        for i in range(3) for role in "kv"
    }  # fmt: skip
    numpy.save_file({**arrays, "tokens": np.arange(9)}, path)
    snapshot = open_source(path)
    assert snapshot.source == {"format": "transformers", "n_layers": 3}
    assert snapshot.tracks[0].attributes["layers"] == [0, 1, 2]
    assert snapshot.tokens.tolist() == list(range(9))
    assert rows_of(snapshot)[1] == np.ones((9, 8), np.float32).tobytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpy_writes_and_reads_npz(save: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    arrays = {f"layers.0.{role}": rng.standard_normal((2, 9, 4)).astype("f2") for role in "kv"}
    save(path, tokens=np.arange(9), **arrays)
    snapshot = open_source(path)
    assert rows_of(snapshot)[0] == arrays["layers.0.k"].swapaxes(0, 1).tobytes()
    write_carrier(snapshot, tmp_path / "b.npz", "npz")
    with np.load(tmp_path / "b.npz", allow_pickle=False) as ours:
        assert np.array_equal(ours["layers.0.v"], arrays["layers.0.v"])


def test_what_arrays_cannot_hold_is_refused(tmp_path: Path, identity: ModelIdentity) -> None:
    out = tmp_path / "a.safetensors"
    rotated = identified(retype(open_state(SESSION), "q8_0", head_dim=64), identity)
    with pytest.raises(TscError, match="q8_0"):
        convert(rotated, out)
    convert(rotated, out, options=StateOptions(kv_type="f16"))
    with pytest.raises(UsageError, match="exists"):
        convert(SESSION, out, identity=identity)
    with pytest.raises(UsageError, match="head size is not known"):
        convert(SESSION, out, force=True)
    convert(SESSION, out, options=StateOptions(head_dim=64), force=True)
    for name, words in (("a.tsc", "made with pack"), ("a.zip", "does not say what to write")):
        with pytest.raises(UsageError, match=words):
            convert(SESSION, tmp_path / name)
    with pytest.raises(UsageError, match="holds a model"):
        open_source(MODEL)
    tscfile.pack(SESSION, tmp_path / "b.tsc")
    with pytest.raises(UsageError, match="is an archive already"):
        open_source(tmp_path / "b.tsc")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.tsc"]


def test_several_sequences_go_into_gguf_only(tmp_path: Path) -> None:
    model = tmp_path / "llama.gguf"
    tiny_models.write_llama(model)
    with tiny_models.Engine(model, n_seq=2, unified=False) as engine:
        engine.decode([5, 6, 7], sequences=(0,))
        engine.decode([8, 9], sequences=(1,))
        state = engine.save("session", [5, 6, 7], 0, tmp_path)
    snapshot = parse_state(state)
    facts = ModelIdentity({"head_dim_k": 64, "head_dim_v": 64})
    with pytest.raises(TscError, match="2 sequences"):
        convert(snapshot, tmp_path / "a.npz", identity=facts)
    convert(snapshot, tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "a.kv")
    assert (tmp_path / "a.kv").read_bytes() == state


# --- commands -----------------------------------------------------------------------------------


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tsc(*arguments: object) -> int:
        return main([str(each) for each in arguments])

    carrier, back = tmp_path / "a.gguf", tmp_path / "a.kv"
    assert tsc("convert", SESSION, carrier, "-q") == 0
    assert tsc("convert", carrier, back) == 0
    assert back.read_bytes() == SESSION.read_bytes()
    assert tsc("convert", carrier, back) == 2  # exists
    assert tsc("convert", SESSION, SESSION, "-f") == 2
    assert tsc("convert", SESSION, tmp_path / "a.tsc") == 2
    archive = tmp_path / "a.tsc"
    assert tsc("pack", SESSION, "--model", MODEL, "-o", archive, "-q") == 0
    for name in CARRIERS:
        out = tmp_path / f"b.{name}"
        assert tsc("unpack", archive, "--as", name, "-o", out) == 0
        packed, again = tmp_path / f"{name}.tsc", tmp_path / f"{name}.kv"
        assert tsc("pack", out, "-o", packed) == 0
        assert tsc("unpack", packed, "--as", "state", "--v-trans", "yes", "-o", again) == 0
        assert again.read_bytes() == SESSION.read_bytes()
    assert tsc("unpack", tmp_path / "npz.tsc") == 0
    expected = (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "npz.safetensors").read_bytes() == expected
    assert tsc("pack", tmp_path / "b.npz", "--model", MODEL, "-o", tmp_path / "m.tsc") == 0
    assert tsc("info", tmp_path / "m.tsc") == tsc("verify", tmp_path / "m.tsc") == 0
    capsys.readouterr()
    (tmp_path / "cut.safetensors").write_bytes(expected[:5000])
    assert tsc("pack", tmp_path / "cut.safetensors") == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
