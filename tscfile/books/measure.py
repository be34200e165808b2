"""Find the step that meets each tier's quality target, by the continuation protocol."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..book_codec import BookCodec, steps_of
from ..context import FrameContext
from ..dtypes import DTYPES
from ..entropy.ladder import UNITS_PER_OCTAVE
from ..model import ModelIdentity, TensorSpec
from ..quality.arrays import CacheShape, KVArrays, heads, rows
from ..quality.codec import TierCodec
from ..quality.engine import Engine
from ..quality.protocol import CodecResult, Plan, evaluate
from ..quality.windows import Text
from .book import SUFFIX, Book, OpenBook, TierEntry

TARGETS = {"near": 0.001, "balanced": 0.01, "compact": 0.05, "archive": 0.1}
"""Mean KL in nats that each tier stays under, for what comes next and for passages recalled."""

_AIM = 0.45
"""Share of the target that is aimed for. A model knows calibration text better than other text, all
the more if it was trained on it: on the reference model KL on held-out text is 1.5 to 2.3 times
as large."""

_STEPS_PER_KL = 1.6
"""KL grows about as the step to this power; only the search's speed depends on it."""

_ROUNDS = 6
_CLOSE = 0.1


class StepCodec:
    """A book at one step as a codec of the protocols: the chunk alone, no file around it."""

    family = "book"
    source = "this project"

    def __init__(self, book: Book, log_step: int) -> None:
        self.name = f"step {log_step}"
        self.book_bytes = 0
        facts = {"rope_pairing": book.facts["book.rope_pairing"]}
        self._codec = BookCodec(OpenBook("", book, 0), ModelIdentity(facts), "book")
        self._log_step = log_step

    def encode(self, cache: KVArrays) -> bytes:
        context = FrameContext(cache.shape.positions, cache.shape.tokens)
        steps = steps_of(context.pos, len(context.pos), self._log_step)
        stored = [rows(part) for part in (*cache.keys, *cache.values)]
        tensors = _tensors(cache.shape)
        [chunk] = self._codec.encode(
            [part.view(np.uint8) for part in stored], tensors, context, [steps]
        )
        return chunk.header.write() + chunk.body

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        context = FrameContext(shape.positions, shape.tokens)
        found = self._codec.decode([memoryview(data)], _tensors(shape), 0, context, "book")
        arrays = [
            heads(part.view(np.float16), layer.n_kv_heads)
            for part, layer in zip(found, 2 * shape.layers, strict=True)
        ]
        return KVArrays(shape, arrays[: len(shape.layers)], arrays[len(shape.layers) :])


def measure_tiers(
    engine: Engine, book: Book, text: Text, *, n_windows: int, frames: int,
    progress: Callable[[str], None] = lambda words: None,
) -> dict[str, TierEntry]:  # fmt: skip
    """The coarsest step found for each of `TARGETS`, with the larger KL of both protocols and the
    ratio of real archives there.

    ``text``: documents that the book has not learnt from.
    """
    plan = Plan(frames=(frames,), n_windows=n_windows)
    tiers = {}
    log_step = _first_step(book)
    for name, target in TARGETS.items():
        best: tuple[int, CodecResult] | None = None
        for _ in range(_ROUNDS):
            progress(f"tier {name}: trying step {log_step}")
            (result,) = evaluate(engine, text, [StepCodec(book, log_step)], plan).results
            kl = _worst(result)
            aim = target * _AIM
            if kl <= aim and (best is None or log_step > best[0]):
                best = log_step, result
            if aim * (1 - _CLOSE) <= kl <= aim:
                break
            octaves = math.log2(aim * (1 - _CLOSE / 2) / max(kl, 1e-9)) / _STEPS_PER_KL
            log_step += round(UNITS_PER_OCTAVE * max(-4.0, min(4.0, octaves)))
        if best is not None:
            tiers[name] = TierEntry(name, best[0], _worst(best[1]), 0.0)
    progress("measuring archives")
    with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
        path = Path(folder) / f"measured{SUFFIX}"
        path.write_bytes(Book(book.facts, book.arrays, tiers).to_bytes())
        codecs = [TierCodec(name, path) for name in tiers]
        for result in evaluate(engine, text, codecs, plan).results if codecs else ():
            tiers[result.codec] = replace(
                tiers[result.codec], kl=_worst(result), ratio=result.snapshot_ratio
            )
    return tiers


def _worst(result: CodecResult) -> float:
    """KL of the protocol that fares worse."""
    recall = result.recall.kl_mean if result.recall else 0.0
    return max(result.continuation.kl_mean, recall)


def _first_step(book: Book) -> int:
    """About where coefficients take a fifth of a bit for each channel: somewhere to begin."""
    octaves = np.sort(book.log_sigmas.astype(np.float64))[::-1] / UNITS_PER_OCTAVE
    bits = np.cumsum(octaves) - np.arange(1, len(octaves) + 1) * octaves
    first = min(int(np.searchsorted(bits, 0.2 * book.n_channels)), len(octaves) - 1)
    return round(float(octaves[first]) * UNITS_PER_OCTAVE)


def _tensors(shape: CacheShape) -> list[TensorSpec]:
    keys = [2 * layer.n_kv_heads * layer.key_dim for layer in shape.layers]
    values = [2 * layer.n_kv_heads * layer.value_dim for layer in shape.layers]
    return [
        TensorSpec(i, role, DTYPES["f16"], row_bytes)
        for role, sizes in (("k", keys), ("v", values))
        for i, row_bytes in enumerate(sizes)
    ]
