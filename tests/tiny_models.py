"""Random-weight models of a few hundred kilobytes, one for each kind of llama.cpp memory.

They speak nonsense, but their caches have the layout of the real ones. Weights follow from a fixed
seed, so a file is the same each time it is made. `Engine` runs one in the installed llama.cpp and
saves and loads its state in all containers.

    python tests/tiny_models.py llama out.gguf
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

N_VOCAB = 259
N_FF = 96
HEAD_DIM = 64
N_KV_HEADS = 2
N_HEADS = 2
GEMMA_WINDOW = 64


class _Model:
    """A GGUF being written: keys and seeded tensors."""

    def __init__(self, path: Path, arch: str, n_layers: int, n_embd: int = 64) -> None:
        import gguf

        self.n_embd = n_embd
        self.arch = arch
        self.n_layers = n_layers
        self.rng = np.random.default_rng(len(arch) * 1000 + n_layers)
        self.writer = writer = gguf.GGUFWriter(path, arch)
        writer.add_block_count(n_layers)
        writer.add_context_length(4096)
        writer.add_embedding_length(n_embd)
        writer.add_feed_forward_length(N_FF)
        writer.add_vocab_size(N_VOCAB)
        _add_vocabulary(writer)
        self.tensor("token_embd.weight", N_VOCAB, self.n_embd, scale=1.0)
        self.tensor("output.weight", N_VOCAB, self.n_embd)
        self.ones("output_norm.weight", self.n_embd)

    def tensor(self, name: str, *shape: int, scale: float | None = None) -> None:
        """Normal weights; by default of a spread that keeps activations near one."""
        spread = shape[-1] ** -0.5 if scale is None else scale
        values = self.rng.standard_normal(shape, dtype=np.float32) * np.float32(spread)
        # llama.cpp wants vectors and the convolution in full precision.
        small = len(shape) == 1 or "conv1d" in name
        self.writer.add_tensor(name, values if small else values.astype(np.float16))

    def ones(self, name: str, n: int) -> None:
        self.writer.add_tensor(name, np.ones(n, dtype=np.float32))

    def attention(self, layer: int, bias: bool = False, norms: bool = False) -> None:
        n_q, n_kv = N_HEADS * HEAD_DIM, N_KV_HEADS * HEAD_DIM
        for name, rows in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            self.tensor(f"blk.{layer}.attn_{name}.weight", rows, self.n_embd, scale=0.4)
            if bias:
                self.tensor(f"blk.{layer}.attn_{name}.bias", rows, scale=0.1)
        self.tensor(f"blk.{layer}.attn_output.weight", self.n_embd, n_q)
        if norms:
            for name in ("attn_q_norm", "attn_k_norm"):
                self.ones(f"blk.{layer}.{name}.weight", HEAD_DIM)

    def feed_forward(self, layer: int) -> None:
        self.ones(f"blk.{layer}.ffn_norm.weight", self.n_embd)
        self.tensor(f"blk.{layer}.ffn_gate.weight", N_FF, self.n_embd)
        self.tensor(f"blk.{layer}.ffn_up.weight", N_FF, self.n_embd)
        self.tensor(f"blk.{layer}.ffn_down.weight", self.n_embd, N_FF)

    def state_space(self, layer: int, norms: bool) -> None:
        d_inner, d_state, d_conv, dt_rank = 2 * self.n_embd, 8, 4, 4
        prefix = f"blk.{layer}.ssm_"
        self.tensor(prefix + "in.weight", 2 * d_inner, self.n_embd)
        self.tensor(prefix + "conv1d.weight", d_inner, d_conv)
        self.tensor(prefix + "conv1d.bias", d_inner, scale=0.1)
        self.tensor(prefix + "x.weight", dt_rank + 2 * d_state, d_inner)
        self.tensor(prefix + "dt.weight", d_inner, dt_rank)
        self.tensor(prefix + "dt.bias", d_inner, scale=0.1)
        decay = -np.tile(np.arange(1, d_state + 1, dtype=np.float32), (d_inner, 1))
        self.writer.add_tensor(prefix + "a", decay)
        self.ones(prefix + "d", d_inner)
        self.tensor(prefix + "out.weight", self.n_embd, d_inner)
        if norms:
            self.ones(prefix + "dt_norm.weight", dt_rank)
            self.ones(prefix + "b_norm.weight", d_state)
            self.ones(prefix + "c_norm.weight", d_state)

    def state_space_keys(self) -> None:
        self.writer.add_ssm_conv_kernel(4)
        self.writer.add_ssm_inner_size(2 * self.n_embd)
        self.writer.add_ssm_state_size(8)
        self.writer.add_ssm_time_step_rank(4)
        self.writer.add_layer_norm_rms_eps(1e-5)

    def attention_keys(self) -> None:
        self.writer.add_head_count(N_HEADS)
        self.writer.add_head_count_kv(N_KV_HEADS)
        self.writer.add_key_length(HEAD_DIM)
        self.writer.add_value_length(HEAD_DIM)
        self.writer.add_layer_norm_rms_eps(1e-5)
        self.writer.add_rope_freq_base(10000.0)
        self.writer.add_rope_dimension_count(HEAD_DIM)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def _add_vocabulary(writer) -> None:  # type: ignore[no-untyped-def]
    """Byte tokens after the three specials, as sentencepiece models have them."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def write_llama(path: Path) -> None:
    """Plain attention, three layers, two key-value heads of 64."""
    model = _Model(path, "llama", 3)
    model.attention_keys()
    for layer in range(model.n_layers):
        model.ones(f"blk.{layer}.attn_norm.weight", model.n_embd)
        model.attention(layer)
        model.feed_forward(layer)
    model.close()


def write_qwen2vl(path: Path) -> None:
    """M-RoPE: cells carry x and y."""
    model = _Model(path, "qwen2vl", 2, n_embd=N_HEADS * HEAD_DIM)
    model.attention_keys()
    model.writer.add_rope_dimension_sections([8, 12, 12, 0])
    for layer in range(model.n_layers):
        model.ones(f"blk.{layer}.attn_norm.weight", model.n_embd)
        model.attention(layer, bias=True)
        model.feed_forward(layer)
    model.close()


def write_gemma3(path: Path) -> None:
    """Sliding windows: two caches, of one layer and of five."""
    model = _Model(path, "gemma3", 6)
    model.attention_keys()
    model.writer.add_sliding_window(GEMMA_WINDOW)
    for layer in range(model.n_layers):
        for name in ("attn_norm", "post_attention_norm", "post_ffw_norm"):
            model.ones(f"blk.{layer}.{name}.weight", model.n_embd)
        model.attention(layer, norms=True)
        model.feed_forward(layer)
    model.close()


def write_mamba(path: Path) -> None:
    """Recurrent layers only."""
    model = _Model(path, "mamba", 2)
    model.state_space_keys()
    for layer in range(model.n_layers):
        model.ones(f"blk.{layer}.attn_norm.weight", model.n_embd)
        model.state_space(layer, norms=False)
    model.close()


def write_jamba(path: Path) -> None:
    """Recurrent layers with one attention layer among them."""
    model = _Model(path, "jamba", 2, n_embd=N_HEADS * HEAD_DIM)
    model.state_space_keys()
    model.writer.add_head_count(N_HEADS)
    model.writer.add_head_count_kv([0, N_KV_HEADS])
    model.writer.add_key_length(HEAD_DIM)
    model.writer.add_value_length(HEAD_DIM)
    for layer in range(model.n_layers):
        model.ones(f"blk.{layer}.attn_norm.weight", model.n_embd)
        if layer == 1:
            model.attention(layer)
        else:
            model.state_space(layer, norms=True)
        model.feed_forward(layer)
    model.close()


MODELS: dict[str, Callable[[Path], None]] = {
    "llama": write_llama,
    "qwen2vl": write_qwen2vl,
    "gemma3": write_gemma3,
    "mamba": write_mamba,
    "jamba": write_jamba,
}


class Engine:
    """A model and one context of it in the installed llama.cpp.

    ``kv_type`` is a ggml type id; ``flash`` True stores V cell after cell, False transposed.
    """

    def __init__(
        self,
        path: Path,
        *,
        kv_type: int = 1,
        v_type: int | None = None,
        flash: bool = True,
        n_ctx: int = 512,
        n_seq: int = 1,
        unified: bool = True,
    ) -> None:
        import llama_cpp

        self.lib = lib = llama_cpp
        silence(lib)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(
            os.fsencode(path), lib.llama_model_default_params()
        )
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
        params.n_seq_max, params.kv_unified, params.swa_full = n_seq, unified, False
        params.type_k, params.type_v = kv_type, kv_type if v_type is None else v_type
        params.flash_attn_type = int(flash)
        params.n_threads = params.n_threads_batch = 1
        self.context = lib.llama_init_from_model(self.model, params)
        assert self.context, "llama.cpp made no context"
        self.memory = lib.llama_get_memory(self.context)
        self.n_vocab = N_VOCAB

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def decode(
        self, tokens: Sequence[int], position: int = 0, sequences: Iterable[int] = (0,)
    ) -> np.ndarray:
        """Logits after the last token, float32 ``[n_vocab]``."""
        ids = list(sequences)
        batch = self.lib.llama_batch_init(len(tokens), 0, max(len(ids), 1))
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = int(token)
            batch.pos[index] = position + index
            batch.n_seq_id[index] = len(ids)
            for column, seq_id in enumerate(ids):
                batch.seq_id[index][column] = seq_id
            batch.logits[index] = index == len(tokens) - 1
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        assert status == 0, f"decode failed with {status}"
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.n_vocab,)).copy()

    def remove(self, sequence: int, start: int, stop: int) -> None:
        assert self.lib.llama_memory_seq_rm(self.memory, sequence, start, stop)

    def share(self, source: int, target: int) -> None:
        self.lib.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def save(self, container: str, tokens: Sequence[int], sequence: int, folder: Path) -> bytes:
        """The state as one of the four containers."""
        if container == "state-buffer":
            return self._get(self.lib.llama_state_get_size, self.lib.llama_state_get_data)
        if container == "sequence-buffer":
            return self._get(
                self.lib.llama_state_seq_get_size, self.lib.llama_state_seq_get_data, sequence
            )
        path = folder / "saved.kv"
        name, ids = os.fsencode(path), self._tokens(tokens)
        if container == "session":
            assert self.lib.llama_state_save_file(self.context, name, ids, len(tokens))
        else:
            assert self.lib.llama_state_seq_save_file(
                self.context, name, sequence, ids, len(tokens)
            )
        return path.read_bytes()

    def load(self, container: str, data: bytes, sequence: int, folder: Path) -> bool:
        """Whether llama.cpp takes the state, to its last byte."""
        lib = self.lib
        pointer = ctypes.cast(ctypes.create_string_buffer(data, len(data)), _BYTES)
        if container == "state-buffer":
            return lib.llama_state_set_data(self.context, pointer, len(data)) == len(data)
        if container == "sequence-buffer":
            read = lib.llama_state_seq_set_data(self.context, pointer, len(data), sequence)
            return read == len(data)
        path = folder / "loaded.kv"
        path.write_bytes(data)
        out, count = (lib.llama_token * 4096)(), ctypes.c_size_t()
        tail = (out, 4096, ctypes.byref(count))
        if container == "session":
            return bool(lib.llama_state_load_file(self.context, os.fsencode(path), *tail))
        name = os.fsencode(path)
        return bool(lib.llama_state_seq_load_file(self.context, name, sequence, *tail))

    def _get(self, size_of: Any, get: Any, *sequence: int) -> bytes:
        size = size_of(self.context, *sequence)
        out = ctypes.create_string_buffer(size)
        assert get(self.context, ctypes.cast(out, _BYTES), size, *sequence) == size
        return out.raw

    def _tokens(self, tokens: Sequence[int]) -> Any:
        return (self.lib.llama_token * max(len(tokens), 1))(*map(int, tokens))


_BYTES = ctypes.POINTER(ctypes.c_uint8)
_log_callback: Any = None


def silence(library: Any) -> None:
    """Keep the engine's log off the terminal."""
    global _log_callback
    if _log_callback is None:
        _log_callback = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(_log_callback, ctypes.c_void_p(0))


if __name__ == "__main__":
    MODELS[sys.argv[1]](Path(sys.argv[2]))
