"""Facts and fingerprints of model files, and what becomes of damaged ones."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from tscfile.errors import (
    DamagedError,
    TruncatedError,
    TscError,
    UnsupportedError,
    UsageError,
)
from tscfile.identity import compare, identity_from_gguf, tokenizer_fingerprint
from tscfile.model import ModelIdentity

MODEL = Path(__file__).parents[1] / "samples" / "model" / "reference-llama-6m-f16.gguf"


def write_tiny(path: Path, architecture: str = "llama", **options: object) -> Path:
    """A GGUF file of a few hundred bytes with everything the parser can meet."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_head_count([4, 4, 2])
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5e5)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_sliding_window(128)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["a", "bc", "é"])
    order = options.get("order", ("one.weight", "two.weight"))
    tensors = {
        "one.weight": np.arange(64, dtype=np.float32).reshape(2, 32),
        "two.weight": np.full(5, 2, np.float16),
    }
    for name in order:
        writer.add_tensor(name, tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def test_reference_model() -> None:
    facts = identity_from_gguf(MODEL).facts
    expected = {
        "architecture": "llama",
        "n_layers": 6,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim_k": 64,
        "head_dim_v": 64,
        "rope_base": 10000.0,
        "rope_dim": 64,
        "rope_scaling": "none",
        "rope_pairing": "norm",
        "vocab_size": 4096,
    }
    assert expected.items() <= facts.items()
    assert "sliding_window" not in facts
    assert json.loads(json.dumps(facts)) == facts


def test_tiny_facts(tmp_path: Path) -> None:
    facts = identity_from_gguf(write_tiny(tmp_path / "m.gguf")).facts
    assert facts["n_heads"] == [4, 4, 2]
    assert facts["head_dim_k"] == 16
    assert facts["rope_scaling"] == "yarn"
    assert facts["rope_scaling_factor"] == 4.0
    assert facts["sliding_window"] == 128
    assert facts["tokenizer_blake3"] == tokenizer_fingerprint("gpt2", "default", ["a", "bc", "é"])


def test_pairing_is_absent_where_unknown(tmp_path: Path) -> None:
    facts = identity_from_gguf(write_tiny(tmp_path / "m.gguf", "newarch")).facts
    assert "rope_pairing" not in facts
    assert facts["rope_base"] == 5e5


def test_weights_fingerprint_is_as_defined() -> None:
    """Against gguf-py's reader, from the words of the docstring."""
    hasher = blake3()
    reader = gguf.GGUFReader(MODEL)
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name.encode()):
        name, data = tensor.name.encode(), tensor.data.tobytes()
        dims = [int(dim) for dim in tensor.shape]
        hasher.update(struct.pack("<Q", len(name)) + name)
        hasher.update(struct.pack("<II", int(tensor.tensor_type), len(dims)))
        hasher.update(struct.pack(f"<{len(dims)}QQ", *dims, len(data)) + data)
    assert identity_from_gguf(MODEL).facts["weights_blake3"] == hasher.hexdigest()


def test_tokenizer_fingerprint_of_the_reference_model() -> None:
    fields = gguf.GGUFReader(MODEL).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    model, pre = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("model", "pre"))
    expected = tokenizer_fingerprint(model, pre, tokens)
    assert identity_from_gguf(MODEL, weights=False).facts["tokenizer_blake3"] == expected


def test_weights_fingerprint_does_not_depend_on_order(tmp_path: Path) -> None:
    first = identity_from_gguf(write_tiny(tmp_path / "1.gguf"))
    second = identity_from_gguf(write_tiny(tmp_path / "2.gguf", order=("two.weight", "one.weight")))
    assert first.facts == second.facts


def test_any_weight_bit_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = bytearray(MODEL.read_bytes())
    data[-(len(data) // 3)] ^= 1
    path.write_bytes(data)
    original, changed = identity_from_gguf(MODEL), identity_from_gguf(path)
    [difference] = compare(original, changed)
    assert difference.startswith("weights_blake3: ")
    assert compare(identity_from_gguf(MODEL, weights=False), changed) == []


def test_split_model_is_one_model(tmp_path: Path) -> None:
    whole = identity_from_gguf(write_tiny(tmp_path / "whole.gguf"))
    names = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for index, (path, tensor) in enumerate(zip(names, ("one.weight", "two.weight"), strict=True)):
        write_tiny(path, order=(tensor,))
        add_split_keys(path, index, 2)
    assert identity_from_gguf(names[1]).facts == whole.facts
    shutil.copy(names[0], tmp_path / "renamed.gguf")
    with pytest.raises(UsageError, match="one of 2 parts"):
        identity_from_gguf(tmp_path / "renamed.gguf")
    names[1].unlink()
    with pytest.raises(UsageError, match="no such model file"):
        identity_from_gguf(names[0])


def add_split_keys(path: Path, index: int, count: int) -> None:
    """Put ``split.no`` and ``split.count`` in front of the other keys, with offsets kept whole."""
    data = path.read_bytes()
    (n_values,) = struct.unpack_from("<Q", data, 16)
    keys = b""
    for key, value in ((b"split.no", index), (b"split.count", count)):
        keys += struct.pack("<Q", len(key)) + key + struct.pack("<IH", 2, value)
    filler = b"pad"
    rest = -(len(keys) + 8 + len(filler) + 4 + 8) % 32
    keys += struct.pack("<Q", len(filler)) + filler + struct.pack("<IQ", 8, rest) + bytes(rest)
    path.write_bytes(data[:16] + struct.pack("<Q", n_values + 3) + keys + data[24:])


def test_compare_takes_what_both_know() -> None:
    recorded = ModelIdentity({"architecture": "llama", "n_heads": [4, 2], "name": "a"})
    actual = ModelIdentity({"architecture": "qwen2", "n_heads": [4, 2], "name": "b", "x": 1})
    assert compare(recorded, actual) == ["architecture: recorded llama, model has qwen2"]
    assert compare(ModelIdentity({"rope_base": 10000}), ModelIdentity({"rope_base": 1e4})) == []


def test_import_is_light() -> None:
    code = (
        "import sys, tscfile.identity, tscfile.resume.llama_cpp; "
        "print([m for m in ('gguf', 'numba', 'torch', 'llama_cpp', 'transformers')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_large_vocabulary_is_fast(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{number}" for number in range(128_000)])
    writer.add_token_merges([f"a{number} b" for number in range(280_000)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    started = time.perf_counter()
    assert identity_from_gguf(path).facts["vocab_size"] == 128_000
    assert time.perf_counter() - started < 1.0  # gguf-py's reader takes several seconds


# --- foreign bytes ------------------------------------------------------------------------------


def check_one_line(path: Path) -> None:
    """Either facts or a one-line error of ours; nothing else."""
    try:
        facts = identity_from_gguf(path).facts
    except TscError as error:
        assert "\n" not in str(error) and error.exit_code in (2, 3, 5)
    else:
        json.dumps(facts, allow_nan=False)


def test_every_cut(tiny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    n_padding = 32 - 10  # after the last tensor of five f16 values: nothing is lost with it
    for length in range(len(tiny)):
        path.write_bytes(tiny[:length])
        if length >= len(tiny) - n_padding:
            assert identity_from_gguf(path).facts["name"] == "tiny"
            continue
        error = UsageError if 0 < length < 4 else TruncatedError
        with pytest.raises(error):
            identity_from_gguf(path)


def test_every_byte_flipped(tiny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped.gguf"
    for index in range(len(tiny)):
        for bit in (0x01, 0x80):
            changed = bytearray(tiny)
            changed[index] ^= bit
            path.write_bytes(changed)
            check_one_line(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + tail)
    check_one_line(path)


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(UsageError, match="no such model file"):
        identity_from_gguf(path)
    with pytest.raises(UsageError, match="no such model file"):
        identity_from_gguf(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DamagedError, match="empty"):
        identity_from_gguf(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UsageError, match="not a GGUF"):
        identity_from_gguf(path)
    path.write_bytes(b"GGUF\0\0\0\x03" + bytes(16))
    with pytest.raises(UnsupportedError, match="big-endian"):
        identity_from_gguf(path)
    path.write_bytes(b"GGUF\x04\0\0\0" + bytes(16))
    with pytest.raises(UnsupportedError, match="version 4"):
        identity_from_gguf(path)
    path.write_bytes(b"GGUF\x03\0\0\0" + bytes(16))
    with pytest.raises(UsageError, match="no language model"):
        identity_from_gguf(path)
