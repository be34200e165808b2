"""Make the sample state files again, from the reference model and the texts beside this script.

    python samples/make_samples.py [FOLDER]

writes `session.kv`, `session-bf16.kv` and `series/*.kv` into FOLDER, this script's own folder
unless told. llama.cpp itself writes them. The same build on the same machine gives the same bytes;
elsewhere the last bits of the rows may differ, since kernels add in another order.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tscfile.dtypes import DTYPES
from tscfile.resume.engine import Context, Model

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model" / "reference-llama-6m-f16.gguf"
TEXTS = HERE / "texts"

N_CTX = 512
SESSION_TOKENS = 400
TURNS = (90, 170, 250, 330, 410)
"""Tokens in memory at the end of each turn of the series."""
KEPT_TOKENS = 228
"""Of turn 3, what the regenerated turn 4 keeps."""
OTHER_TEXT_START = 600
"""Where in the text the regenerated turn goes on: anywhere else than the first time."""
REGENERATED_TOKENS = 310


def make_context(model: Model, kv_type: str, *, flash_attention: bool) -> Context:
    """A context whose threads are counted: their number may change the order of sums."""
    dtype = DTYPES[kv_type]
    return Context(
        model, N_CTX, type_k=dtype, type_v=dtype, flash_attention=flash_attention, n_threads=2
    )


def read_tokens(model: Model, name: str) -> list[int]:
    text = (TEXTS / name).read_text(encoding="utf-8")
    return model.tokenize(text, add_special=True)


def make_session(model: Model, path: Path, kv_type: str, *, flash_attention: bool) -> None:
    """A session file of the first `SESSION_TOKENS` tokens of the address."""
    tokens = read_tokens(model, "inaugural-1957.txt")[:SESSION_TOKENS]
    with make_context(model, kv_type, flash_attention=flash_attention) as context:
        context.decode(tokens, 0)
        context.save_session(path, tokens)


def make_series(model: Model, folder: Path) -> None:
    """Sequence files, as the server saves them, of one conversation that grows in one context."""
    tokens = read_tokens(model, "pep-0259.txt")
    with make_context(model, "f16", flash_attention=True) as context:
        done = 0
        for turn, total in enumerate(TURNS, start=1):
            context.decode(tokens[done:total], done)
            context.save_sequence(folder / f"turn-{turn}.kv", tokens[:total])
            done = total


def make_regenerated(model: Model, folder: Path) -> None:
    """Turn 4 once more: back to turn 3, a part of it forgotten, continued with other text."""
    tokens = read_tokens(model, "pep-0259.txt")
    other = tokens[OTHER_TEXT_START:][: REGENERATED_TOKENS - KEPT_TOKENS]
    with make_context(model, "f16", flash_attention=True) as context:
        kept = context.load_sequence(folder / "turn-3.kv")[:KEPT_TOKENS]
        context.remove(0, KEPT_TOKENS)
        context.decode(other, KEPT_TOKENS)
        context.save_sequence(folder / "turn-4-regenerated.kv", kept + other)


def make_all(folder: Path) -> None:
    """Write every sample below ``folder``."""
    series = folder / "series"
    series.mkdir(parents=True, exist_ok=True)
    with Model(MODEL) as model:
        make_session(model, folder / "session.kv", "f16", flash_attention=False)
        make_session(model, folder / "session-bf16.kv", "bf16", flash_attention=True)
        make_series(model, series)
        make_regenerated(model, series)


if __name__ == "__main__":
    make_all(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
