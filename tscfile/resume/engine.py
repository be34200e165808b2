"""llama.cpp through its C interface: a model, a context, and errors instead of null pointers.

llama-cpp-python's own ``Llama`` class keeps a token list beside the cache and decides for itself
what to evaluate again; a resume has to know exactly that. So the calls are made directly, and what
is in the memory is asked of the engine.

The package is imported when the first `Model` is made, not with this module.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType
from ..errors import MismatchError, TscError, UsageError

BATCH_TOKENS = 512
"""Tokens given to the engine in one call, at most."""

ANY_SEQUENCE = -1

_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h
_complaints: list[str] = []  # of the call in progress
_MAX_COMPLAINTS = 8
_log_callback: Any = None  # kept alive here: the engine holds only the bare pointer


def load_library(*, verbose: bool = False) -> ModuleType:
    """The ``llama_cpp`` package with its log caught; `UsageError` if it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise UsageError(
            "resuming in llama.cpp needs llama-cpp-python: pip install 'tscfile[llama]'"
        ) from None
    except (OSError, RuntimeError, AttributeError) as error:
        raise TscError(f"llama-cpp-python is installed but does not load: {error}") from None
    _catch_log(llama_cpp, verbose)
    return llama_cpp


def _catch_log(library: ModuleType, verbose: bool) -> None:
    global _log_callback

    def keep(level: int, text: bytes, _user_data: Any) -> None:
        line = text.decode("utf-8", "replace")
        if level == _LOG_LEVEL_ERROR and line.strip() and len(_complaints) < _MAX_COMPLAINTS:
            _complaints.append(line.strip())
        if verbose:
            sys.stderr.write(line)

    _log_callback = library.llama_log_callback(keep)
    library.llama_log_set(_log_callback, ctypes.c_void_p(0))


def _reason() -> str:
    """What the engine complained of, as the end of an error message.

    The first complaint names the cause, the following ones who passed it on.
    """
    return f" (llama.cpp: {_complaints[0]})" if _complaints else ""


class _Closing:
    """Something of llama.cpp's that is freed by `close`, at the latest with its last reference."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Model(_Closing):
    """Weights and vocabulary of one GGUF file. Close it, or use it as a context manager."""

    def __init__(self, path: str | os.PathLike[str], *, verbose: bool = False) -> None:
        """Load the weights; `UsageError` if there is no such file, `TscError` if it will not load.

        Check a file of unknown origin first (`tscfile.identity.identity_from_gguf`).
        """
        self._model: Any = None
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"{path}: no such model file")
        self.library = lib = load_library(verbose=verbose)
        lib.llama_backend_init()
        _complaints.clear()
        self._model = lib.llama_model_load_from_file(
            os.fsencode(self.path), lib.llama_model_default_params()
        )
        if not self._model:
            raise TscError(f"{path}: llama.cpp cannot load this model{_reason()}")
        self._vocab = lib.llama_model_get_vocab(self._model)

    def close(self) -> None:
        """Free the weights. Contexts made from them must be closed before."""
        model, self._model = self._model, None
        if model:
            self.library.llama_model_free(model)

    @property
    def handle(self) -> Any:
        return self._model

    @property
    def architecture(self) -> str:
        """``general.architecture`` of the file; empty if it has none."""
        out = ctypes.create_string_buffer(128)
        key = b"general.architecture"
        count = self.library.llama_model_meta_val_str(self._model, key, out, len(out))
        return out.value.decode("utf-8", "replace") if count >= 0 else ""

    @property
    def n_vocab(self) -> int:
        return int(self.library.llama_vocab_n_tokens(self._vocab))

    @property
    def n_layers(self) -> int:
        return int(self.library.llama_model_n_layer(self._model))

    @property
    def sliding_window(self) -> int:
        """Positions that a sliding-window layer sees; 0 if the model has none."""
        return int(self.library.llama_model_n_swa(self._model))

    @property
    def is_recurrent(self) -> bool:
        """Whether any layer keeps a summary instead of one row per position."""
        lib = self.library
        return bool(
            lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        )

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of ``text``; with ``add_special`` also the ones a fresh prompt starts with."""
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            out = (self.library.llama_token * room)()
            count = self.library.llama_tokenize(
                self._vocab, data, len(data), out, room, add_special, False
            )
            if 0 <= count <= room:
                return list(out[:count])
            if -count <= room:
                raise TscError(f"llama.cpp cannot tokenise {len(data)} bytes of text{_reason()}")
            room = -count

    def piece(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; empty for control tokens."""
        room = 64
        while True:
            out = ctypes.create_string_buffer(room)
            count = self.library.llama_token_to_piece(self._vocab, token, out, room, 0, False)
            if count >= 0:
                return out.raw[:count]
            if -count <= room:
                raise TscError(f"llama.cpp has no text for token {token}{_reason()}")
            room = -count

    def ends_text(self, token: int) -> bool:
        """Whether generation stops at ``token``."""
        return bool(self.library.llama_vocab_is_eog(self._vocab, token))


class Context(_Closing):
    """One KV cache and the means to run the model on it.

    Sequences share one unified cache, so a file always has one stream. Close it before its model,
    or use it as a context manager.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        *,
        type_k: DType,
        type_v: DType,
        flash_attention: bool,
        n_sequences: int = 1,
        n_threads: int | None = None,
        n_batch: int = BATCH_TOKENS,
    ) -> None:
        """Allocate a cache of ``n_ctx`` cells; `TscError` if the engine refuses.

        Without flash attention llama.cpp keeps V transposed and cannot quantize it.
        """
        self._context: Any = None
        self.model = model
        self.library = lib = model.library
        self.flash_attention = flash_attention
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_batch
        params.n_seq_max = n_sequences
        params.kv_unified = True
        # A sliding-window cache of full size takes any number of restored cells.
        params.swa_full = True
        params.type_k, params.type_v = type_k.ggml_id, type_v.ggml_id
        params.flash_attn_type = int(flash_attention)
        params.n_threads = params.n_threads_batch = n_threads or _usable_cores()
        params.no_perf = True
        _complaints.clear()
        self._context = lib.llama_init_from_model(model.handle, params)
        if not self._context:
            raise TscError(
                f"llama.cpp cannot make a context of {n_ctx} cells with {type_k.name} keys and "
                f"{type_v.name} values{_reason()}"
            )
        # The engine may have taken less than asked for, and it aborts at a batch larger than that.
        self._n_batch = int(lib.llama_n_batch(self._context))
        self._memory = lib.llama_get_memory(self._context)
        if not self._memory:
            raise TscError(f"{model.path}: this model keeps no state that could be restored")

    def close(self) -> None:
        """Free the cache."""
        context, self._context = self._context, None
        if context:
            self.library.llama_free(context)

    @property
    def n_ctx(self) -> int:
        return int(self.library.llama_n_ctx(self._context))

    @property
    def v_trans(self) -> bool:
        """Whether values lie channel by channel in this context's state."""
        return not self.flash_attention

    def position_range(self, sequence: int = 0) -> tuple[int, int]:
        """First and last position in memory of ``sequence``; (-1, -1) if it holds nothing."""
        lib = self.library
        return (
            int(lib.llama_memory_seq_pos_min(self._memory, sequence)),
            int(lib.llama_memory_seq_pos_max(self._memory, sequence)),
        )

    def remove(self, sequence: int, start: int, stop: int = -1) -> bool:
        """Forget positions ``start`` to ``stop``; False where the memory cannot do that."""
        return bool(self.library.llama_memory_seq_rm(self._memory, sequence, start, stop))

    def share(self, source: int, target: int, start: int, stop: int) -> None:
        """Let ``target`` hold the cells of ``source`` at positions ``start`` to ``stop``, too."""
        self.library.llama_memory_seq_cp(self._memory, source, target, start, stop)

    def clear(self) -> None:
        """Forget everything."""
        self.library.llama_memory_clear(self._memory, True)

    def decode(
        self, tokens: Sequence[int], position: int, sequence: int = 0
    ) -> NDArray[np.float32]:
        """Run ``tokens`` from ``position`` on; logits after the last one, float32 ``[n_vocab]``."""
        if not len(tokens):
            raise ValueError("no tokens to decode")
        for token in tokens:
            if not 0 <= token < self.model.n_vocab:
                raise UsageError(
                    f"token {token} is outside the vocabulary of {self.model.n_vocab} tokens"
                )
        for start in range(0, len(tokens), self._n_batch):
            part = tokens[start : start + self._n_batch]
            self._decode_batch(part, position + start, sequence)
        logits = self.library.llama_get_logits_ith(self._context, -1)
        if not logits:
            raise TscError(f"llama.cpp returned no logits{_reason()}")
        return np.ctypeslib.as_array(logits, shape=(self.model.n_vocab,)).copy()

    def _decode_batch(self, tokens: Sequence[int], position: int, sequence: int) -> None:
        lib = self.library
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index] = int(token)
                batch.pos[index] = position + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = index == len(tokens) - 1
            _complaints.clear()
            status = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if status == 1:
            raise TscError(
                f"the context of {self.n_ctx} cells is full at position {position}: give a larger "
                "one"
            )
        if status:
            raise TscError(f"llama.cpp failed to decode (status {status}){_reason()}")

    def sequence_state(self, sequence: int = 0) -> NDArray[np.uint8]:
        """The state of one sequence: a *sequence buffer*, uint8 ``[n_bytes]``."""
        lib = self.library
        size = int(lib.llama_state_seq_get_size(self._context, sequence))
        state = np.empty(size, np.uint8)
        written = lib.llama_state_seq_get_data(self._context, _pointer(state), size, sequence)
        if written != size:
            raise TscError(f"llama.cpp wrote {written} of {size} state bytes{_reason()}")
        return state

    def state(self) -> NDArray[np.uint8]:
        """The whole state: a *state buffer*, uint8 ``[n_bytes]``. Unlike that of a sequence it has
        cells that sliding windows will not look at again."""
        lib = self.library
        size = int(lib.llama_state_get_size(self._context))
        state = np.empty(size, np.uint8)
        written = lib.llama_state_get_data(self._context, _pointer(state), size)
        if not 0 < written <= size:
            raise TscError(f"llama.cpp wrote {written} of {size} state bytes{_reason()}")
        return state[:written]

    def set_sequence_state(self, state: NDArray[np.uint8], sequence: int = 0) -> None:
        """Load a sequence buffer into ``sequence``; `MismatchError`, nothing loaded, if refused."""
        _complaints.clear()
        read = self.library.llama_state_seq_set_data(
            self._context, _pointer(state), state.size, sequence
        )
        if read != state.size:
            self.clear()  # a refused load can leave part of its cells behind
            raise MismatchError(
                f"{self.model.path}: llama.cpp does not take the state into this model{_reason()}"
            )

    def save_session(self, path: str | os.PathLike[str], tokens: Sequence[int]) -> None:
        """Write all sequences as a *session file* with this token list."""
        array = _tokens(self.library, tokens)
        if not self.library.llama_state_save_file(
            self._context, os.fsencode(path), array, len(tokens)
        ):
            raise TscError(f"{path}: llama.cpp could not save the session{_reason()}")

    def save_sequence(
        self, path: str | os.PathLike[str], tokens: Sequence[int], sequence: int = 0
    ) -> None:
        """Write one sequence as a *sequence file* with this token list."""
        array = _tokens(self.library, tokens)
        if not self.library.llama_state_seq_save_file(
            self._context, os.fsencode(path), sequence, array, len(tokens)
        ):
            raise TscError(f"{path}: llama.cpp could not save the sequence{_reason()}")

    def load_session(self, path: str | os.PathLike[str], capacity: int | None = None) -> list[int]:
        """Load a session file into all sequences; returns its tokens.

        Only for files that are known to be whole.
        """
        lib = self.library
        room = self.n_ctx if capacity is None else capacity
        out, count = (lib.llama_token * max(room, 1))(), ctypes.c_size_t()
        _complaints.clear()
        if not lib.llama_state_load_file(
            self._context, os.fsencode(path), out, room, ctypes.byref(count)
        ):
            self.clear()
            raise TscError(f"{path}: llama.cpp did not take the session{_reason()}")
        return list(out[: count.value])

    def load_sequence(
        self, path: str | os.PathLike[str], sequence: int = 0, capacity: int | None = None
    ) -> list[int]:
        """Load a sequence file into ``sequence``; returns its tokens.

        Only for files that are known to be whole: the engine ends the process at a short one.
        """
        lib = self.library
        room = self.n_ctx if capacity is None else capacity
        out, count = (lib.llama_token * max(room, 1))(), ctypes.c_size_t()
        _complaints.clear()
        if not lib.llama_state_seq_load_file(
            self._context, os.fsencode(path), sequence, out, room, ctypes.byref(count)
        ):
            self.clear()
            raise TscError(f"{path}: llama.cpp did not take the sequence{_reason()}")
        return list(out[: count.value])

    def session_version(self) -> int:
        """The session file version that this build writes and takes.

        Read from an empty file it writes: constants of the binding may lag behind the engine.
        """
        with tempfile.TemporaryDirectory(prefix="tsc-") as folder:
            path = Path(folder) / "empty.kv"
            array = _tokens(self.library, [])
            # The sequence that no one uses: an empty state, whatever the others hold.
            self.library.llama_state_seq_save_file(
                self._context, os.fsencode(path), self._spare_sequence, array, 0
            )
            version = int.from_bytes(path.read_bytes()[4:8], "little")
        # Sequence files count 7 below session files in every version known (9/2, 10/3, 11/4).
        return version + 7

    @property
    def _spare_sequence(self) -> int:
        return int(self.library.llama_n_seq_max(self._context)) - 1


def _tokens(library: ModuleType, tokens: Sequence[int]) -> Any:
    return (library.llama_token * max(len(tokens), 1))(*[int(token) for token in tokens])


def _pointer(array: NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
