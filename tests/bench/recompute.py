"""What a recomputed cache differs by from the one that was saved.

    python tests/bench/recompute.py MODEL.gguf heldout.txt [--windows 4] [--json OUT.json]

Windows of the text, as ``tsc eval`` takes them, are read and saved by llama.cpp: in batches of 512,
by two threads, with flash attention, in f16. Each way of computing the same tokens again is
compared with that save: share of fp16 values with the same bits, largest difference, largest
relative error of a tensor, and KL(saved || recomputed) over the next 256 tokens, fed as in
``tsc eval``. ``--state``: a state file that was saved elsewhere, of which the rows alone are
compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tscfile.dtypes import DTYPES
from tscfile.identity import identity_from_gguf
from tscfile.quality.arrays import CacheShape, KVArrays
from tscfile.quality.engine import Engine
from tscfile.quality.metrics import compare
from tscfile.quality.windows import choose_windows, read_text
from tscfile.resume.engine import Context, Model
from tscfile.resume.guards import relative_error, to_float
from tscfile.resume.recompute import recompute
from tscfile.sources import open_source
from tscfile.sources.hf_cache import to_cache
from tscfile.sources.llama_state import parse_state

N_CONTINUE = 256
SAVED = {"n_batch": 512, "n_threads": 2, "flash_attention": True}
WAYS = {
    "again": {},
    "one thread": {"n_threads": 1},
    "batches of 128": {"n_batch": 128},
    "batches of 17": {"n_batch": 17},
    "token by token": {"n_batch": 1},
    "no flash attention": {"flash_attention": False},
}
IN_TRANSFORMERS = "transformers, fp32"

Ids = NDArray[np.int32]


def in_llama_cpp(model: Model, tokens: Ids, shape: CacheShape, **options: object) -> KVArrays:
    """The cache of ``tokens``, in transformers' order of channels."""
    f16, settings = DTYPES["f16"], SAVED | options
    with Context(model, 2048, type_k=f16, type_v=f16, **settings) as context:  # type: ignore[arg-type]
        context.decode(tokens.tolist(), 0)
        state = parse_state(context.state().data, container="state-buffer")
    state.tokens, state.identity = tokens, identity_from_gguf(model.path, weights=False)
    layers = to_cache(state).layers
    keys = [layer.keys[0].numpy() for layer in layers]
    return KVArrays(shape, keys, [layer.values[0].numpy() for layer in layers])


def differences(saved: KVArrays, found: KVArrays) -> dict[str, float]:
    pairs = [
        (a, b)
        for (_, old), (_, new) in zip(saved.roles(), found.roles(), strict=True)
        for a, b in zip(old, new, strict=True)
    ]
    return of_pairs(pairs)


def of_pairs(pairs: list[tuple[NDArray[np.float16], NDArray[np.float16]]]) -> dict[str, float]:
    same = sum(int((a.view(np.uint16) == b.view(np.uint16)).sum()) for a, b in pairs)
    wide = [(a.astype(np.float32), b.astype(np.float32)) for a, b in pairs]
    return {
        "identical": same / sum(a.size for a, _ in pairs),
        "largest_difference": max(float(np.abs(a - b).max()) for a, b in wide),
        "largest_relative_error": max(relative_error(a, b) for a, b in wide),
    }


def of_state(path: Path, model: Path) -> dict[str, float]:
    """A state made elsewhere, and what this machine makes of its tokens as it was made."""
    saved = open_source(path)
    again = recompute(saved, model).snapshot
    columns = [
        [to_float(rows, tensor.dtype).astype(np.float16) for tensor, rows in
         zip(track.tensors, track.read(0, len(track.cells)), strict=True)]
        for track in (saved.tracks[0], again.tracks[0])
    ]  # fmt: skip
    return of_pairs(list(zip(*columns, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--frames", type=int, default=768)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine = Engine(arguments.model)
    documents = [engine.tokenize(part) for part in read_text(arguments.text).documents]
    length = arguments.frames + N_CONTINUE + 1
    found: dict[str, list[dict[str, float]]] = {}
    with Model(arguments.model) as model:
        for window in choose_windows(documents, length, arguments.windows, 0):
            cached, feed = np.split(window.tokens, [arguments.frames])
            computed = engine.prefill(cached)
            saved = in_llama_cpp(model, cached, computed.shape)
            expected = engine.proceed(saved, feed[:-1], arguments.frames)
            ways: dict[str, Callable[[], KVArrays]] = {
                name: lambda options=options: in_llama_cpp(  # type: ignore[misc]
                    model, cached, computed.shape, **options  # noqa: B023
                )
                for name, options in WAYS.items()
            }
            ways[IN_TRANSFORMERS] = lambda: computed  # noqa: B023
            for name, way in ways.items():
                again = way()
                logits = engine.proceed(again, feed[:-1], arguments.frames)
                result = compare(expected, logits, feed[1:])
                row = differences(saved, again) | {
                    "kl": float(result.kl.mean()), "top1": float(result.same_top1.mean())
                }  # fmt: skip
                found.setdefault(name, []).append(row)
    worst = {"largest_difference", "largest_relative_error"}
    summary = {
        name: {
            key: float((max if key in worst else np.mean)([row[key] for row in rows]))
            for key in rows[0]
        }
        for name, rows in found.items()
    }
    print(f"{'':22}{'identical':>10}{'largest':>10}{'relative':>10}{'KL':>12}{'top-1':>8}")
    for name, row in summary.items():
        print(
            f"{name:22}{row['identical']:10.4f}{row['largest_difference']:10.2g}"
            f"{row['largest_relative_error']:10.2g}{row['kl']:12.2g}{row['top1']:8.4f}"
        )
    if arguments.state:
        row = of_state(arguments.state, arguments.model)
        summary[arguments.state.name] = row
        print(
            f"{arguments.state.name:22}{row['identical']:10.4f}{row['largest_difference']:10.2g}"
            f"{row['largest_relative_error']:10.2g}"
        )
    if arguments.json:
        conditions = {
            "model": arguments.model.name, "text": arguments.text.name,
            "frames": arguments.frames, "n_windows": arguments.windows, "saved": SAVED,
        }  # fmt: skip
        whole = {"conditions": conditions, "ways": summary, "windows": found}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
