"""States of the sample model before and after a context shift, made by llama.cpp.

When a context is full, llama.cpp's programs forget positions ``n_keep`` to ``n_keep + n_discard``
and move the rest down (``llama_memory_seq_rm``, ``llama_memory_seq_add``). Keys are turned at the
next decode, values stay; new tokens take the cells that were freed, so they lie before moved ones.
"""

from __future__ import annotations

from pathlib import Path

from conftest import SAMPLES

from tscfile.dtypes import DTYPES
from tscfile.resume.engine import Context, Model

MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
TEXT = SAMPLES / "texts" / "heldout.txt"


def heldout_tokens(n_tokens: int) -> list[int]:
    """The first tokens of the held-out text, as the sample model reads it."""
    with Model(MODEL) as model:
        return model.tokenize(TEXT.read_text(encoding="utf-8")[: 16 * n_tokens])[:n_tokens]


def shifted_pair(
    folder: Path, tokens: list[int], n_keep: int, n_discard: int, kv_type: str | tuple[str, str],
    n_new: int = 1,
) -> tuple[Path, Path]:  # fmt: skip
    """Session files ``before.kv`` and ``after.kv`` in ``folder``.

    ``kv_type``: element type of keys and values, or of each; the CPU backend of llama.cpp cannot
    shift bf16 keys, it aborts. The last ``n_new`` tokens are read after the shift; before it there
    are all others. Either file lists the tokens that are in memory, in order of positions.
    """
    type_k, type_v = (kv_type, kv_type) if isinstance(kv_type, str) else kv_type
    if type_k == "bf16":
        raise ValueError("llama.cpp aborts when it shifts bf16 keys")
    old, new = tokens[:-n_new], tokens[-n_new:]
    before, after = folder / "before.kv", folder / "after.kv"
    with (
        Model(MODEL) as model,
        Context(
            model, -(-len(tokens) // 256) * 256, type_k=DTYPES[type_k], type_v=DTYPES[type_v],
            flash_attention=True,
        ) as context,
    ):  # fmt: skip
        context.decode(old, 0)
        context.save_session(before, old)
        assert context.remove(0, n_keep, n_keep + n_discard)
        model.library.llama_memory_seq_add(
            context._memory, 0, n_keep + n_discard, -1, -n_discard
        )
        context.decode(new, len(old) - n_discard)
        context.save_session(after, old[:n_keep] + old[n_keep + n_discard :] + new)
    return before, after
