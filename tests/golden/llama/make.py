"""Makes the golden states of this folder: run it with the Python that has a llama.cpp build.

    python tests/tiny_models.py llama MODELS/llama.gguf          (and the other four)
    WHEEL_PYTHON make.py states MODELS OUT      states of one xllamacpp build, through its C API
    WHEEL_PYTHON make.py server MODELS OUT      llama-server's slot saves of that build
    python make.py describe OUT                 the expected JSON beside each file

The first two need nothing but the xllamacpp wheel, the last one tscfile. Parameter structures
differ between builds, so they are handled as bytes and only fields with a recognisable default
are set.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
import urllib.error
import urllib.request
from pathlib import Path

PARAMS_BYTES = 512
F16, Q8_0 = 1, 8
TOKENS = [(37 * i + 11) % 256 + 3 for i in range(512)]

# What each build is asked for: model, type, container, cells.
BUILDS = {
    "0.1.10": [
        ("llama", F16, "session", 6),
        ("llama", F16, "sequence", 6),
        ("llama", F16, "state-buffer", 6),
        ("llama", Q8_0, "session", 6),
        ("mamba", F16, "session", 6),
        ("qwen2vl", F16, "sequence", 6),
        ("llama", F16, "empty-sequence", 6),
    ],
    "0.1.20": [
        ("llama", F16, "session", 6),
        ("llama", F16, "sequence", 6),
        ("gemma3", F16, "sequence", 6),
    ],
    "0.2.0": [
        ("llama", F16, "session", 6),
        ("llama", F16, "sequence", 6),
        ("llama", F16, "two-streams", 6),
        ("jamba", F16, "session", 6),
        ("qwen2vl", F16, "session", 6),
    ],
    "0.2.8": [("llama", F16, "session", 6)],
    "0.2.14": [
        ("llama", F16, "session", 6),
        ("llama", F16, "sequence-buffer", 6),
        ("qwen2vl", F16, "session", 6),
    ],
    "2026.4.8672": [
        ("llama", F16, "session", 6),
        ("llama", Q8_0, "session", 6),
        ("llama", F16, "sequence-buffer", 6),
        ("qwen2vl", F16, "sequence", 6),
    ],
    "2026.6.9538": [("llama", F16, "sequence-buffer", 6), ("gemma3", F16, "session", 6)],
    "2026.8.10566": [("llama", F16, "sequence", 6)],
    "2026.9.10809": [
        ("llama", F16, "session", 6),
        ("qwen2vl", F16, "session", 6),
        ("jamba", F16, "sequence", 6),
    ],
    "2026.10.11549": [
        ("llama", F16, "session", 6),
        ("llama", Q8_0, "session", 6),
        ("llama", F16, "two-streams", 6),
        ("llama", F16, "sequence-buffer", 6),
        ("qwen2vl", F16, "state-buffer", 6),
        ("gemma3", Q8_0, "session", 6),
        ("mamba", F16, "sequence", 6),
        ("jamba", F16, "session", 6),
    ],
}
SERVER_BUILDS = {
    "2026.6.9538": [("llama", 8)],
    "2026.8.10566": [("llama", 8)],
    "2026.10.11549": [("llama", 8), ("gemma3", 6), ("jamba", 8)],
}
TYPE_NAMES = {F16: "f16", Q8_0: "q8_0"}


class Params(ctypes.Structure):
    """A parameter structure of unknown layout; larger than any, which the calling
    convention (in memory, last argument) does not mind."""

    _fields_ = (("data", ctypes.c_ubyte * PARAMS_BYTES),)

    def ints(self) -> list[int]:
        return list(struct.unpack(f"<{PARAMS_BYTES // 4}i", bytes(self.data)))

    def set_int(self, index: int, value: int) -> None:
        struct.pack_into("<i", self.data, 4 * index, value)


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def load_library() -> ctypes.CDLL:
    import xllamacpp

    folder = Path(xllamacpp.__file__).parent
    lib = ctypes.CDLL(str(next(folder.glob("*.so"))))
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(lib, name).restype = Params
    for name in ("llama_model_load_from_file", "llama_init_from_model"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_batch_init.restype = Batch
    lib.llama_state_get_size.restype = ctypes.c_size_t
    lib.llama_state_get_data.restype = ctypes.c_size_t
    lib.llama_state_seq_get_size.restype = ctypes.c_size_t
    lib.llama_state_seq_get_data.restype = ctypes.c_size_t
    lib.llama_state_save_file.restype = ctypes.c_bool
    lib.llama_state_seq_save_file.restype = ctypes.c_size_t
    lib.llama_backend_init()
    return lib


def make_context(lib: ctypes.CDLL, model: Path, kv_type: int, n_seq: int) -> ctypes.c_void_p:
    weights = lib.llama_model_load_from_file(os.fsencode(model), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.set_int(0, 256 * n_seq)
    params.set_int(3, n_seq)
    if kv_type != F16:
        set_types(params, kv_type)
    context = lib.llama_init_from_model(ctypes.c_void_p(weights), params)
    assert context, "no context"
    return ctypes.c_void_p(context)


def set_types(params: Params, kv_type: int) -> None:
    """Set both cache types, found as two f16 after the floats, and flash attention."""
    ints = params.ints()
    at = next(i for i in range(18, 40) if ints[i] == ints[i + 1] == F16)
    params.set_int(at, kv_type)
    params.set_int(at + 1, kv_type)
    first = ints.index(-1)
    if ints[first : first + 4] == [-1] * 4:
        params.set_int(first + 3, 1)
    elif bytes(params.data[96:101]) == bytes([0, 0, 1, 0, 1]):
        params.data[99] = 1
    else:
        raise SystemExit("flash attention not found")


def decode(lib: ctypes.CDLL, context: ctypes.c_void_p, tokens: list[int], sequence: int) -> None:
    n = len(tokens)
    # The oldest builds read four positions a token for M-RoPE: time, y, x and an unused one.
    batch = lib.llama_batch_init(4 * n, 0, 1)
    batch.n_tokens = n
    for index in range(4 * n):
        batch.pos[index] = index % n if index < 3 * n else 0
    for index, token in enumerate(tokens):
        batch.token[index] = token
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        batch.logits[index] = index == n - 1
    assert lib.llama_decode(context, batch) == 0


def save(lib: ctypes.CDLL, context: ctypes.c_void_p, container: str, path: Path, n: int) -> None:
    ids = (ctypes.c_int32 * n)(*TOKENS[:n])
    name, count = os.fsencode(path), ctypes.c_size_t(n)
    if container in ("session", "two-streams"):
        assert lib.llama_state_save_file(context, name, ids, count)
    elif container in ("sequence", "empty-sequence"):
        assert lib.llama_state_seq_save_file(context, name, 0, ids, count)
    elif container == "state-buffer":
        size = lib.llama_state_get_size(context)
        out = ctypes.create_string_buffer(size)
        written = lib.llama_state_get_data(context, out, ctypes.c_size_t(size))
        path.write_bytes(out.raw[:written])
    else:
        size = lib.llama_state_seq_get_size(context, 0)
        out = ctypes.create_string_buffer(size)
        written = lib.llama_state_seq_get_data(context, out, ctypes.c_size_t(size), 0)
        path.write_bytes(out.raw[:written])


def make_states(models: Path, out: Path) -> None:
    import xllamacpp

    lib = load_library()
    build = xllamacpp.__version__
    for model, kv_type, container, n in BUILDS[build]:
        two = container == "two-streams"
        context = make_context(lib, models / f"{model}.gguf", kv_type, 2 if two else 1)
        if container != "empty-sequence":
            decode(lib, context, TOKENS[:n], 0)
        if two:
            decode(lib, context, TOKENS[:3], 1)
        path = out / f"{build}_{model}_{TYPE_NAMES[kv_type]}_{container}.kv"
        save(lib, context, container, path, 0 if container == "empty-sequence" else n)


def make_server_saves(models: Path, out: Path) -> None:
    """Slot 0 of a server after a prompt."""
    import xllamacpp

    build = xllamacpp.__version__
    for model, n in SERVER_BUILDS[build]:
        params = xllamacpp.CommonParams()
        params.model.path = str(models / f"{model}.gguf")
        params.n_ctx, params.n_parallel, params.port = 256, 1, 0
        params.slot_save_path = str(out) + "/"
        params.warmup = False
        params.endpoint_slots = True
        server = xllamacpp.Server(params)
        url = server.listening_address
        name = f"{build}_{model}_f16_server.kv"
        try:
            ask(url + "/completion", {"prompt": TOKENS[:n], "n_predict": 1, "id_slot": 0})
        except urllib.error.HTTPError as error:
            # Random weights may answer with half a character; the slot is filled all the same.
            print(f"{build}: {error}", file=sys.stderr)
        ask(url + "/slots/0?action=save", {"filename": name})


def ask(url: str, body: dict) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def describe(out: Path) -> None:
    for path in sorted(out.glob("*.kv")):
        expected = json.dumps(description(path), indent=1) + "\n"
        path.with_suffix(".json").write_text(expected, encoding="utf-8")


def announced_container(path: Path) -> str | None:
    """The container of sequence buffers from before they had a magic number."""
    is_old = path.name.startswith(("0.", "2026.4"))
    return "sequence-buffer" if is_old and "sequence-buffer" in path.name else None


def description(path: Path) -> dict:
    """What a reader must find in a golden state."""
    from blake3 import blake3

    from tscfile.sources.llama_state import open_state

    snapshot = open_state(path, container=announced_container(path))
    facts = snapshot.source
    return {
        "container": facts["container"],
        "version": facts["version"],
        "generation": facts["generation"],
        "kind": facts["kind"],
        "arch": facts.get("arch", ""),
        "n_stream": facts["n_stream"],
        "ext_bytes": facts["ext_bytes"],
        "token_form": facts["token_form"],
        "tokens": snapshot.tokens.tolist(),
        "opaque": {name: len(data) for name, data in snapshot.opaque.items()},
        "tracks": [
            {
                "cache": track.cache,
                "stream": track.stream,
                "v_trans": track.attributes["v_trans"],
                "pos": track.cells.pos.tolist(),
                "seq_counts": track.cells.seq_counts.tolist(),
                "tensors": [
                    {
                        "role": spec.role,
                        "layer": spec.layer,
                        "type": spec.dtype.name,
                        "rotation": spec.rotation,
                        "blake3": blake3(rows.tobytes()).hexdigest(),
                    }
                    for spec, rows in zip(
                        track.tensors, track.read(0, len(track.cells)), strict=True
                    )
                ],
            }
            for track in snapshot.tracks
        ],
    }


if __name__ == "__main__":
    command, folders = sys.argv[1], [Path(each) for each in sys.argv[2:]]
    {"states": make_states, "server": make_server_saves, "describe": describe}[command](*folders)
