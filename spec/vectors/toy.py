"""What the vectors hold: made-up sessions of few channels, and made-up books for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from draft import plain_cells
from numpy.typing import NDArray

from tscfile.books.book import Book, TierEntry
from tscfile.context import FrameContext
from tscfile.dtypes import DTYPES
from tscfile.entropy import ladder
from tscfile.model import ModelIdentity, Snapshot, TensorSpec
from tscfile.transforms import channels


class MadeUpTrack:
    """Cells at positions 0, 1, 2, … of sequence 0; ``rows``: float16 or uint16 (patterns of bf16)
    ``[n, 4]`` of each tensor, the keys of all layers and the values of all."""

    stream = 0

    def __init__(
        self, rows: list[NDArray[Any]], attributes: dict[str, Any], cache: int = 0
    ) -> None:
        self.rows = [np.ascontiguousarray(part).view(np.uint8) for part in rows]
        dtype = "bf16" if rows[0].dtype == "u2" else "f16"
        self.tensors: Sequence[TensorSpec] = tensors_of(len(rows) // 2, dtype)
        self.cells = plain_cells(len(rows[0]))
        self.attributes, self.cache = attributes, cache

    def read(self, start: int, stop: int, tensors: Any = None) -> list[NDArray[np.uint8]]:
        chosen = range(len(self.rows)) if tensors is None else tensors
        return [self.rows[i][start:stop] for i in chosen]


def tensors_of(n_layers: int, dtype: str = "f16") -> list[TensorSpec]:
    """Keys of all layers, then values: four channels each."""
    return [
        TensorSpec(layer, role, DTYPES[dtype], 8, 0) for role in "kv" for layer in range(n_layers)
    ]


def as_ids(tokens: list[int]) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


# --- a book -----------------------------------------------------------------------------------


def toy_book(tiers: tuple[TierEntry, ...] = (TierEntry("near", 256, 0.0005, 3.5),)) -> Book:
    """For two layers of one key head of four channels, each layer a group."""
    facts = {
        "architecture": "toy", "book.history": 2, "book.decays": [0.5], "book.decay_dims": 1,
        "book.head_dim": 4, "book.n_layers": 2, "book.group_layers": 1,
        "book.group_coefficients": [2, 1], "book.group_predictions": [1, 1],
        "book.rope_pairing": "neox", "book.rope_scale": 1.0,
    }  # fmt: skip
    arrays: dict[str, NDArray[Any]] = {
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


def exact_book() -> Book:
    """The same with tables for exact coding: a channel is predicted from the one two before it."""
    book, n = toy_book(), 16
    widths = [1 + 1 + first + n for first in (0,)]  # constant, token, nothing before, the group
    weights = np.zeros((n, widths[0]), np.int16)
    weights[:, 0] = 8  # of 8192, in units of 2^-16
    weights[:, 1] = np.resize([256, -128, 64, 32], n)
    for channel in range(2, n):
        weights[channel, 2 + channel - 2] = 96
    frequencies = np.ones((256, 103), np.uint16)
    near = np.exp(-np.abs(np.arange(102) - 50.5) / 16)
    frequencies[:, :102] = np.floor(near / near.sum() * 65000)
    frequencies[:, 102] = 65536 - frequencies[:, :102].astype(int).sum(axis=1)
    arrays: dict[str, NDArray[Any]] = {
        "sizes": np.array([0, 16, 10], np.int32), "weights_low": (weights & 255).astype(np.uint8),
        "weights_high": (weights >> 8).astype(np.int8),
        "weight_bits": np.full(n, 8, np.int8), "scale_bits": np.full(n, 10, np.int8),
        "unit_bits": np.full(n, 13, np.int8), "sigmas": np.full(n, 3000, np.uint16),
        "frequencies": frequencies,
    }  # fmt: skip
    flat = {"exact_" + name: array if name == "frequencies" else array.ravel()
            for name, array in arrays.items()}  # fmt: skip
    return Book(book.facts, book.arrays | flat, book.tiers)


def product_book() -> Book:
    """The same with codebooks: three stages of two columns each."""
    book = toy_book()
    centroids = np.zeros((3, 256, 2), np.int8)
    for stage, code, numbers in (
        (0, 3, (64, 16)), (0, 9, (-48, 32)), (0, 255, (96, -8)), (1, 0, (8, -4)), (1, 7, (-16, 12)),
        (2, 1, (3, -5)), (2, 128, (-7, 9)),
    ):  # fmt: skip
        centroids[stage, code] = numbers
    arrays: dict[str, NDArray[Any]] = {
        "product_columns": np.array([[0, 2], [2, 0], [0, 1]], np.uint32),
        "product_centroids": centroids, "product_scales": floats([1 / 16, 1 / 32, 1 / 64]),
        "product_worth": np.geomspace(8, 1 / 64, 19).astype(np.float32),
        "product_errors": np.geomspace(4, 1 / 32, 19).astype(np.float32),
    }  # fmt: skip
    return Book(book.facts, book.arrays | arrays, book.tiers)


def small_book(**facts: Any) -> Book:
    """As few bytes as may be, for files that break a rule; ``facts`` beside the usual ones."""
    book = toy_book()
    arrays = {name: array for name, array in book.arrays.items() if not name.startswith("ids_")}
    arrays["frequencies"] = np.full((40, 32), 128, np.uint16)
    return Book(book.facts | facts, arrays, {})


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
