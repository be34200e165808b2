"""What frames cost that a context shift or another batch size made of frames that are known.

    python tests/bench/shift.py MODEL.gguf heldout.txt [--tokens 700] [--keep 32] [--discard 256]

*Shifts*: llama.cpp reads the first tokens of the text, forgets positions ``--keep`` to ``--keep`` +
``--discard``, moves the rest down and reads one more token. Counted are the chunks of the moved
frames, in blocks of 256: in codec 1; the same without the values, which are those of before; and in
codec 7, as the difference to the frames of before, keys turned by angles of the model's facts or by
angles that are fitted to the keys. *Batches*: the same tokens are read in batches of 512 and of 64;
codec 7 takes the second cache as the difference to the first. Every body is decoded and compared.
*ms*: encoding and decoding in codec 7, angles of the facts, one thread, without fitting.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tscfile import blocks, pipeline, registry
from tscfile.bytestream import ByteReader
from tscfile.difference_codec import decode, encode
from tscfile.dtypes import DTYPES
from tscfile.identity import identity_from_gguf
from tscfile.model import TensorSpec, Track
from tscfile.resume.engine import Context, Model
from tscfile.sources.llama_state import parse_state
from tscfile.transforms.turning import Turn
from tscfile.turns import fit_turn, turn_of

CACHES = (("f16", "f16"), ("f32", "f32"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("f16", "q8_0"))
BATCHES = (512, 64)

Rows = list[NDArray[np.uint8]]


def context_of(model: Model, n_cells: int, types: Sequence[str], n_batch: int = 512) -> Context:
    type_k, type_v = (DTYPES[name] for name in types)
    return Context(
        model, n_cells, type_k=type_k, type_v=type_v, flash_attention=True, n_batch=n_batch
    )


def track_of(context: Context) -> Track:
    return parse_state(context.state().data, container="state-buffer").tracks[0]


def shifted(
    model: Model, tokens: list[int], n_keep: int, n_discard: int, types: Sequence[str]
) -> tuple[Rows, Rows, Sequence[TensorSpec]]:
    """Rows of the moved frames, those of before, by position, and the tensors."""
    with context_of(model, len(tokens), types) as context:
        context.decode(tokens[:-1], 0)
        before = track_of(context)
        context.remove(0, n_keep, n_keep + n_discard)
        model.library.llama_memory_seq_add(context._memory, 0, n_keep + n_discard, -1, -n_discard)
        context.decode(tokens[-1:], len(tokens) - 1 - n_discard)
        after = track_of(context)
    rows, base = (
        [part[np.argsort(track.cells.pos)] for part in track.read(0, len(track.cells))]
        for track in (after, before)
    )
    return [p[n_keep:-1] for p in rows], [p[n_keep + n_discard :] for p in base], after.tensors


def in_codec_1(rows: Rows, tensors: Sequence[TensorSpec]) -> int:
    return sum(
        len(pipeline.encode_chunk(
            [part[start:stop] for part in rows[a:b]], tensors[a].dtype, a,
            registry.FIELDS_CLASSED_RANS,
        ).body)
        for start, stop in blocks.block_ranges(0, len(rows[0]))
        for a, b in blocks.chunk_ranges(tensors)
    )  # fmt: skip


def in_codec_7(
    rows: Rows, base: Rows, tensors: Sequence[TensorSpec], turn: Turn | None
) -> tuple[int, float, float]:
    """Bytes, and seconds of encoding and decoding."""
    size, took = 0, [0.0, 0.0]
    for start, stop in blocks.block_ranges(0, len(rows[0])):
        own, old = ([part[start:stop] for part in parts] for parts in (rows, base))
        started = time.perf_counter()
        body = encode(own, old, tensors, turn)
        between = time.perf_counter()
        found = decode(ByteReader(body, "chunk"), old, tensors)
        took[0] += between - started
        took[1] += time.perf_counter() - between
        if not all(np.array_equal(a, b) for a, b in zip(own, found, strict=True)):
            raise SystemExit("rows do not come back")
        size += len(body)
    return size, *took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    for name, default in (("tokens", 700), ("keep", 32), ("discard", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    identity = identity_from_gguf(arguments.model, weights=False)
    found: dict[str, dict[str, Any]] = {}
    with Model(arguments.model) as model:
        text = arguments.text.read_text(encoding="utf-8")[: 16 * arguments.tokens]
        tokens = model.tokenize(text)[: arguments.tokens + 1]
        for types in CACHES:
            rows, base, tensors = shifted(
                model, tokens, arguments.keep, arguments.discard, types
            )
            keys = [i for i, tensor in enumerate(tensors) if tensor.role == "k"]
            turn = turn_of(identity, tensors, -arguments.discard)
            in_codec_7(rows, base, tensors, turn)  # compiles
            size, *took = in_codec_7(rows, base, tensors, turn)
            found["shift, " + "/".join(types)] = {
                "raw": sum(part.nbytes for part in rows), "codec 1": in_codec_1(rows, tensors),
                "keys": in_codec_1([rows[i] for i in keys], [tensors[i] for i in keys]),
                "codec 7": size,
                "fitted": in_codec_7(rows, base, tensors, fit_turn(rows, base, tensors))[0],
                "ms": [1000 * each for each in took],
            }  # fmt: skip
        for types in CACHES:
            saves = []
            for n_batch in BATCHES:
                with context_of(model, len(tokens), types, n_batch) as context:
                    context.decode(tokens[:-1], 0)
                    saves.append(track_of(context))
            base, rows = (track.read(0, len(track.cells)) for track in saves)
            tensors = saves[0].tensors
            size, *took = in_codec_7(rows, base, tensors, None)
            found["batches, " + "/".join(types)] = {
                "raw": sum(part.nbytes for part in rows), "codec 1": in_codec_1(rows, tensors),
                "codec 7": size, "ms": [1000 * each for each in took],
            }  # fmt: skip
    columns = ("raw", "codec 1", "keys", "codec 7", "fitted")
    print(f"{'':20}" + "".join(f"{name:>10}" for name in columns) + f"{'ms':>14}")
    for name, row in found.items():
        sizes = "".join(f"{row.get(column, '-'):>10}" for column in columns)
        print(f"{name:20}{sizes}{row['ms'][0]:>8.1f}{row['ms'][1]:>6.1f}")
    if arguments.json:
        conditions = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
        whole = {"conditions": conditions, "found": found}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
