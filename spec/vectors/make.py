"""Make the files of valid/ again: python spec/vectors/make.py [folder]

They are what tscfile writes of small made-up sessions, so another version of it or of zstd may make
other bytes of the same content. The JSON beside each says what every reader must get: what went in,
or, of book tiers, what the decoder of the specification makes of the file.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tscfile
from tscfile.books.book import Book, TierEntry
from tscfile.context import FrameContext
from tscfile.dtypes import DTYPES
from tscfile.entropy import ladder
from tscfile.model import CellTable, ModelIdentity, Snapshot, TensorSpec
from tscfile.transforms import channels

SPEC = Path(__file__).resolve().parent.parent
F16 = DTYPES["f16"]


class MadeUpTrack:
    """Cells at positions 0, 1, 2, … of sequence 0; ``rows``: float16 ``[n, 4]`` of each tensor, the
    keys of all layers and the values of all."""

    cache, stream = 0, 0

    def __init__(self, rows: list[NDArray[np.float16]], attributes: dict[str, Any]) -> None:
        n = len(rows[0])
        self.rows = [np.ascontiguousarray(part, "<f2").view(np.uint8) for part in rows]
        self.tensors = tensors_of(len(rows) // 2)
        pos, one = np.arange(n, dtype=np.int32), np.ones(n, np.int32)
        self.cells = CellTable(pos, one, 0 * one, np.zeros((n, 0), np.int32))
        self.attributes = attributes

    def read(self, start: int, stop: int, tensors: Any = None) -> list[NDArray[np.uint8]]:
        chosen = range(len(self.rows)) if tensors is None else tensors
        return [self.rows[i][start:stop] for i in chosen]


def tensors_of(n_layers: int) -> list[TensorSpec]:
    return [TensorSpec(layer, role, F16, 8, 0) for role in "kv" for layer in range(n_layers)]


def as_ids(tokens: list[int]) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


# --- smallest ---------------------------------------------------------------------------------


def make_smallest(folder: Path) -> None:
    path = folder / "smallest.tsc"
    path.unlink(missing_ok=True)
    saves = {"first": [11, 12, 13], "longer": [11, 12, 13, 7], "cut": [11, 12]}
    for name, tokens in saves.items():
        keys = [[i + 1, 0.5 ** (i + 1), -(i + 1), 0] for i in range(len(tokens))]
        values = [[0.5, 0.5, i + 1.5, -i - 1.5] for i in range(len(tokens))]
        rows = [np.array(part, np.float16) for part in (keys, values)]
        snapshot = Snapshot(
            as_ids(tokens), [MadeUpTrack(rows, {"v_trans": 0})], {"format": "example"},
            {"note": b"hello"}, ModelIdentity({"architecture": "toy"}),
        )  # fmt: skip
        (tscfile.append if path.exists() else tscfile.pack)(snapshot, path, name=name)
    write_json(path)


# --- a book -----------------------------------------------------------------------------------


def toy_book(tiers: tuple[TierEntry, ...] = (TierEntry("near", 256, 0.0005, 3.5),)) -> Book:
    """For two layers of one key head of four channels, each layer a group."""
    facts = {
        "architecture": "toy", "book.history": 2, "book.decays": [0.5], "book.decay_dims": 1,
        "book.head_dim": 4, "book.n_layers": 2, "book.group_layers": 1,
        "book.group_coefficients": [2, 1], "book.group_predictions": [1, 1],
        "book.rope_pairing": "neox", "book.rope_scale": 1.0,
    }  # fmt: skip
    arrays = {
        "mean": floats([0.5, 0, 0, -0.25, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        "token_vectors": small([[64], [-64], [48]]),
        "token_scales": floats([1 / 64, 1 / 64, 1 / 32]),
        "hidden": small([[32, 0], [0, 16], [32, 0], [0, 64], [64, 0]]),
        "hidden_scales": floats([1 / 32, 1 / 16]), "hidden_bias": floats([-0.5, 0.25]),
        "linear": small([[16, 0], [0, -16], [0, 16], [0, 32], [32, 0]]),
        "linear_scales": floats([1 / 32, 1 / 16]),
        "output": small([[32, -32], [64, 0]]), "output_scales": floats([1 / 64, 1 / 64]),
        "prediction": small([[64, 0, 0, 0, 0, 0, 32, 0], [0, 64, 0, 0, 0, 0, 0, -64]]),
        "prediction_scales": floats([1 / 64, 1 / 64]),
        "basis": small([[64, 0, 0, 0, 0, 0, 0, 0], [0, 64, 0, 0, 0, 0, 0, 64],
                        [0, 0, 32, 0, 32, 0, 0, 0]]),
        "basis_scales": floats([1 / 64, 1 / 64, 1 / 32]),
        "metric": np.stack([np.eye(4, dtype=np.float16)] * 4),
        "log_sigmas": np.array([256, -1100, 0], np.int16),
        "frequencies": np.stack([frequencies_of(k) for k in range(ladder.N_CLASSES)]),
        "inv_freq": floats([1, 0.5]),
        "ids_order": planes([1, 0, 2, 3]), "ids_unigram": np.array([7, 6, 4, 1], np.uint8),
        "ids_fan1": planes([2, 2, 1, 0]), "ids_next1": planes([1, 0, 0, 1, 0]),
        "ids_count1": np.array([6, 4, 6, 3, 4], np.uint8),
        "ids_fan2": planes([2, 1, 1, 0, 1]), "ids_next2": planes([0, 0, 0, 1, 0]),
        "ids_count2": np.array([4, 2, 3, 2, 2], np.uint8),
        "ids_weights": np.full((18, 7, 32), 1792, np.int16),
        "ids_match": np.full(16, 61440, np.uint16),
    }  # fmt: skip
    return Book(facts, arrays, {tier.name: tier for tier in tiers})


def floats(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def small(values: list[list[int]]) -> NDArray[np.int8]:
    return np.array(values, np.int8)


def planes(values: list[int]) -> NDArray[np.uint8]:
    return np.array([values], np.uint8)


def frequencies_of(k: int) -> NDArray[np.uint16]:
    """Values that grow rarer by one factor from size to size, as wide as class ``k`` is."""
    factor = np.exp(-np.sqrt(2) / 2 ** ((k + 0.5) / 4 - 3))
    sizes = [0, *(size for size in range(1, 16) for _ in range(2))]
    shares = (1 - factor) / (1 + factor) * factor ** np.array(sizes, float)
    return ladder.normalise(np.append(shares, 1 - shares.sum()))


# --- book tiers -------------------------------------------------------------------------------

TOKENS = [2, 0, 1, 0, 7, 1]
MORE = [0, 1, 2, 1, 0, 1, 2, 1, 0, 1]
OTHERS = [1, 1, 0, 1, 1, 0, 1, 1, 0, 1]
COEFFICIENTS = [  # of each frame
    [4, 0, -1.5], [-3, 0, 0.5], [13, 0, 0], [2.5, 0, -1], [2.25, 0, -1], [-5, 0.5, 0.5],
    [1, 0, 2], [-2, 0, 0], [0.5, 0, -0.75], [3.5, 0, 0.25], [-1.25, 0, 1], [0, 0, -0.5],
    [0.75, 0, 0], [-0.5, 0.5, 1.5], [1.5, 0, -1.25], [2, 0, 0.25],
]  # fmt: skip


def made_up(tokens: list[int]) -> Snapshot:
    """A session whose frames have the coefficients above, but for the rounding to f16."""
    book, n = toy_book(), len(tokens)
    context = FrameContext(np.arange(n, dtype=np.int32), as_ids(tokens))
    coefficients = np.array(COEFFICIENTS[:n], np.float32)
    frames = book.synthesize(book.network(context), coefficients, [2, 1])
    rows = channels.from_frames(frames, tensors_of(2), context.pos, book.rope, 4, "norm")
    track = MadeUpTrack([part.view("<f2") for part in rows], {})
    identity = ModelIdentity({"architecture": "toy", "rope_pairing": "norm"})
    return Snapshot(as_ids(tokens), [track], {"format": "example"}, {}, identity)


def make_lossy(folder: Path) -> None:
    book, path = folder / "lossy.tscbook", folder / "lossy.tsc"
    book.write_bytes(toy_book().to_bytes())
    tscfile.pack(made_up(TOKENS), path, tier="near", book=book, name="lossy", force=True)
    write_json(path, book)


def make_embedded(folder: Path) -> None:
    book, path = folder / "lossy.tscbook", folder / "embedded.tsc"
    tscfile.pack(
        made_up(TOKENS), path, tier="near", book=book, embed_book=True, name="first", force=True
    )
    tscfile.append(made_up(TOKENS + MORE), path, name="longer")
    tscfile.append(made_up(TOKENS[:4] + OTHERS), path, tier="lossless", name="exact")
    write_json(path)


def make_layered(folder: Path) -> None:
    book, path = folder / "layered.tscbook", folder / "layered.tsc"
    tiers = (TierEntry("balanced", 640, 0.005, 7.0), TierEntry("near", 256, 0.0005, 3.5))
    book.write_bytes(toy_book(tiers).to_bytes())
    layers = ["balanced", "near", "lossless"]
    tscfile.pack(made_up(TOKENS), path, tier=layers, book=book, name="layered", force=True)
    write_json(path, book, layers[:-1])


def make_tokens(folder: Path) -> None:
    """Frames that are not stored, frames that are, and both in one track."""
    path = folder / "tokens.tsc"
    path.unlink(missing_ok=True)
    first, longer, other = TOKENS, TOKENS + MORE, (TOKENS + MORE)[:12] + [1, 1]
    for tokens, tier, name in (
        (first, "tokens", "first"), (longer, "tokens", "longer"), (longer, "lossless", "exact"),
        (other, "tokens", "other"),
    ):  # fmt: skip
        snapshot = made_up(tokens)
        snapshot.identity.facts["weights_blake3"] = "0" * 64
        (tscfile.append if path.exists() else tscfile.pack)(snapshot, path, tier=tier, name=name)
    write_json(path)


# --- what is in them --------------------------------------------------------------------------


def write_json(path: Path, book: Path | None = None, layers: Sequence[str] = ()) -> None:
    spec = importlib.util.spec_from_file_location("decoder", SPEC / "reference_decoder.py")
    assert spec and spec.loader
    decoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decoder)
    file = decoder.File(path.read_bytes(), book and book.read_bytes())
    content: dict[str, Any] = {
        "file_bytes": len(file.data), "format_version": "1.0",
        "torn_bytes": len(file.data) - file.end,
        "snapshots": [describe(number, each) for number, each in enumerate(file.snapshots)],
    }  # fmt: skip
    if file.books:
        (content["book"],) = file.books
        content["blocks"] = integers_of(file)
    for tier in layers:
        found = decoder.File(path.read_bytes(), book and book.read_bytes(), tier)
        content.setdefault("layers", {})[tier] = integers_of(found)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # Lists of numbers on one line.
    text = re.sub(r"\[[-\d,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    text = text.replace("[ ", "[").replace(" ]", "]")
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def integers_of(file: Any) -> list[dict[str, Any]]:
    return [
        {"log_steps": found[0].tolist(), "integers": found[1].tolist()}
        for _, found in sorted(file.decoded.items())
        if isinstance(found, tuple)
    ]


def describe(number: int, snapshot: dict[str, Any]) -> dict[str, Any]:
    keys = ("parent", "plan", "tier", "name", "source", "identity", "coding")
    return {
        "number": number, **{key: snapshot[key] for key in keys},
        "tokens": snapshot["tokens"].tolist(),
        "tracks": [describe_track(track) for track in snapshot["tracks"]],
        "opaque": {name: content.hex() for name, content in snapshot["opaque"].items()},
    }  # fmt: skip


def describe_track(track: dict[str, Any]) -> dict[str, Any]:
    return {
        "cache": track["cache"], "stream": track["stream"], "attributes": track["attributes"],
        "positions": track["pos"].tolist(), "sequence_counts": track["seq_counts"].tolist(),
        "sequence_ids": track["seq_ids"].tolist(),
        "tensors": [
            {
                "layer": layer, "role": "kv"[role],
                "element_type": {0: "f32", 1: "f16", 30: "bf16"}[type_],
                "row_bytes": row_bytes, "rotation": rotation,
                "rows": [
                    None if cell in track["absent"] else row.tobytes().hex()
                    for cell, row in enumerate(rows)
                ],
            }
            for (layer, role, type_, row_bytes, rotation), rows in zip(
                track["tensors"], track["rows"], strict=True
            )
        ],
    }  # fmt: skip


def make_all(folder: Path) -> None:
    make_smallest(folder)
    make_lossy(folder)
    make_embedded(folder)
    make_layered(folder)
    make_tokens(folder)


if __name__ == "__main__":
    make_all(Path(sys.argv[1]) if len(sys.argv) > 1 else SPEC / "vectors" / "valid")
