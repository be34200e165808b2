"""What each step of product quantization gains, at equal bytes a frame.

    python tests/bench/product_steps.py --book BOOK

Learns from calibration text, measures on held-out text: the squared error of frames in the metric
of the book, which KL grows with, as a share of what is lost where every frame is the mean. Steps
come one on top of the other; codebooks have 256 centroids each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tscfile.books.book import Book, load
from tscfile.books.product import read_product
from tscfile.books.train import _FrameSource, _windows, check_shape, split_texts
from tscfile.quality.engine import Engine
from tscfile.quality.windows import read_text
from tscfile.quantizers.product import (
    CENTROIDS,
    ProductQuantizer,
    balanced,
    kmeans,
    learn_rotation,
    learn_stages,
)

SAMPLES = Path(__file__).parent.parent.parent / "samples"
ITERATIONS = 8
Floats = NDArray[np.float32]


class Frames:
    """Frames of text: as they are stored, before RoPE, and what the book predicts of these."""

    def __init__(self, engine: Engine, book: Book, windows: list[NDArray[np.int32]]) -> None:
        source = _FrameSource(engine, windows, check_shape(_shape(engine, windows), 1 << 14)[0])
        numbers = range(len(windows))
        plain = [source.frames(i) for i in numbers]
        predicted = [book.predict(source.context(i)) for i in numbers]
        self.plain, self.predicted = np.concatenate(plain), np.concatenate(predicted)
        self._pos = np.concatenate([source.context(i).pos for i in numbers])
        self._book = book
        self.turned = self.turn(self.plain, book.rope.apply)

    def turn(self, frames: Floats, how: Callable[[Floats, NDArray[np.int32]], Floats]) -> Floats:
        """Frames with their keys turned, or turned back."""
        keys, values = np.split(frames, 2, axis=1)
        heads = keys.reshape(len(keys), -1, int(self._book.facts["book.head_dim"]))
        heads = how(heads.transpose(1, 0, 2), self._pos)
        keys = np.ascontiguousarray(heads.transpose(1, 0, 2)).reshape(keys.shape)
        return np.concatenate([keys, values], axis=1)


def _shape(engine: Engine, windows: list[NDArray[np.int32]]) -> object:
    return engine.prefill(windows[0][:8]).shape


def coded(learnt: Floats, tested: Floats, n_parts: int, shared: int = 0) -> Floats:
    """``tested`` by codebooks of ``learnt``, one a sub-vector of equal width, or for each half of
    the sub-vectors in ``shared`` parts one that all of a part share."""
    width = learnt.shape[1] // n_parts
    out = np.empty_like(tested)
    groups = np.arange(n_parts) * max(shared, 1) // n_parts if shared else np.arange(n_parts)
    rng = np.random.default_rng(0)
    for group in range(int(groups.max()) + 1):
        columns = np.flatnonzero(np.repeat(groups == group, width))
        part = np.ascontiguousarray(learnt[:, columns]).reshape(-1, width)
        centroids = kmeans(part[:: max(1, len(part) >> 16)], CENTROIDS, ITERATIONS, rng)
        n = len(columns) // width
        quantizer = ProductQuantizer(
            np.arange(len(columns), dtype=np.int32).reshape(n, width), np.zeros(n, np.int32),
            centroids[None],
        )  # fmt: skip
        mine = np.ascontiguousarray(tested[:, columns])
        counts = np.full(len(mine), n)
        codes = quantizer.encode_counts(mine, counts, beam=1)
        out[:, columns] = quantizer.decode(codes, counts, len(columns))
    return out


def steps(
    learnt: Frames, tested: Frames, book: Book, n_bytes: int, threshold: float
) -> Iterator[tuple[str, float, Floats]]:
    """Name, bytes a frame, and errors of the tested frames in channels ``[n, C]``."""
    head = int(book.facts["book.head_dim"])
    turn = tested.turned - coded(learnt.turned, tested.turned, n_bytes, shared=2)
    yield "rows as stored, codebook a role", n_bytes, tested.turn(turn, book.rope.undo)
    yield "keys before RoPE", n_bytes, tested.plain - coded(
        learnt.plain, tested.plain, n_bytes, shared=2
    )
    mean = learnt.plain.mean(axis=0)
    by_head = (learnt.plain - mean).reshape(len(learnt.plain), -1, head)
    scale = np.repeat(np.sqrt(np.square(by_head).mean(axis=(0, 2))), head)
    normal = [(each.plain - mean) / scale for each in (learnt, tested)]
    yield "means and scales of heads", n_bytes, (normal[1] - coded(*normal, n_bytes, 2)) * scale
    yield "codebook a sub-vector", n_bytes, (normal[1] - coded(*normal, n_bytes)) * scale
    rotation = learn_rotation(normal[0], normal[0].shape[1] // n_bytes, 4, np.random.default_rng(0))
    spun = [each @ rotation for each in normal]
    yield "optimized rotation", n_bytes, ((spun[1] - coded(*spun, n_bytes)) @ rotation.T) * scale
    left = [(each.plain - each.predicted) / scale for each in (learnt, tested)]
    rotation = learn_rotation(left[0], left[0].shape[1] // n_bytes, 4, np.random.default_rng(0))
    spun = [each @ rotation for each in left]
    yield "prediction", n_bytes, ((spun[1] - coded(*spun, n_bytes)) @ rotation.T) * scale
    counts = book.facts["book.group_coefficients"]
    whole = [book.analyse(each.plain - each.predicted, counts) for each in (learnt, tested)]
    yield from whitened(whole, tested, book, n_bytes, threshold)


def whitened(
    whole: list[Floats], tested: Frames, book: Book, n_bytes: int, threshold: float
) -> Iterator[tuple[str, float, Floats]]:
    """The steps on coefficients in the book's basis."""
    counts = book.facts["book.group_coefficients"]
    none = np.zeros((len(whole[1]), len(book.prediction.rows)), np.float32)
    residual = tested.plain - tested.predicted

    def errors(found: Floats) -> Floats:
        full = np.zeros_like(whole[1])
        full[:, : found.shape[1]] = found
        return residual - (book.synthesize(none, full, counts) - book.arrays["mean"])

    size = min(8, whole[0].shape[1] // n_bytes) * n_bytes
    power = np.square(whole[0][:, :size], dtype=np.float64).mean(axis=0)
    order = balanced(power, n_bytes)
    found = np.empty((len(whole[1]), size), np.float32)
    found[:, order] = coded(*(np.ascontiguousarray(each[:, order]) for each in whole), n_bytes)
    yield "whitened coefficients", n_bytes, errors(found)
    rng = np.random.default_rng(0)
    stages = list(learn_stages(whole[0][:, :size].copy(), 2 * n_bytes, 32, ITERATIONS, rng))
    quantizer = ProductQuantizer(
        np.stack([columns for columns, _ in stages]), np.arange(len(stages), dtype=np.int32),
        np.stack([centroids for _, centroids in stages]),
    )  # fmt: skip
    mine = np.ascontiguousarray(whole[1][:, :size])
    fixed = np.full(len(mine), n_bytes)
    for name, beam in (("residual stages", 1), ("8 codes followed", 8)):
        codes = quantizer.encode_counts(mine, fixed, beam)
        yield name, n_bytes, errors(quantizer.decode(codes, fixed, size))
    lengths = np.square(whole[1], dtype=np.float64).sum(axis=1)
    beside = lengths - np.square(mine, dtype=np.float64).sum(axis=1)
    reached = quantizer.errors(mine) + beside[:, None]
    choices = (("bytes where they are worth it", np.inf), ("worst frames exact", threshold))
    for name, above in choices:
        worth, n, exact = _at_rate(reached, n_bytes, above, 2 * residual.shape[1])
        codes, chosen = quantizer.encode_worth(mine, np.full(len(mine), worth))
        left = errors(quantizer.decode(codes, chosen, size))
        left[exact] = 0
        share = f" ({exact.mean():.2%})" if exact.any() else ""
        yield name + share, n, left


def _at_rate(
    reached: NDArray[np.float64], n_bytes: float, above: float, row: int
) -> tuple[float, float, NDArray[np.bool_]]:
    """What a byte must save for frames to take ``n_bytes`` with the number of codes of each, the
    bytes they then take, and which are exact, of ``row`` bytes, as their error is more than
    ``above`` times the mean."""
    low, high = 1e-6, 1e9
    for _ in range(60):
        middle = (low * high) ** 0.5
        chosen = (reached + middle * np.arange(reached.shape[1])).argmin(axis=1)
        found = np.take_along_axis(reached, chosen[:, None], axis=1)[:, 0]
        exact = found > above * found.mean()
        share = np.bincount(chosen) / len(chosen)
        bits = -(share * np.log2(np.maximum(share, 1e-12))).sum()
        total = float(np.where(exact, row, chosen).mean() + bits / 8)
        low, high = (middle, high) if total > n_bytes else (low, middle)
    return high, total, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--book", type=Path, required=True)
    parser.add_argument("--model", type=Path,
                        default=SAMPLES / "model" / "reference-llama-6m-f16.gguf")  # fmt: skip
    parser.add_argument("--windows", type=int, default=8, help="of calibration text")
    parser.add_argument("--bytes", type=int, default=24, help="of a frame")
    parser.add_argument("--threshold", type=float, default=4.0, help="of exact frames")
    options = parser.parse_args()
    engine, book = Engine(options.model, "cpu"), load(options.book).book
    texts = SAMPLES / "texts"
    sets = []
    calibration, _ = split_texts([read_text(texts / "calibration.txt")])
    for text, length, n in ((calibration, 2048, options.windows),
                            (read_text(texts / "heldout.txt"), 768, 8)):  # fmt: skip
        documents = [engine.tokenize(document) for document in text.documents]
        sets.append(Frames(engine, book, _windows(documents, length, n, 0)))
    metric = book.arrays["metric"].astype(np.float64)

    def cost(errors: Floats) -> NDArray[np.float64]:
        parts = errors.astype(np.float64).reshape(len(errors), len(metric), -1)
        return np.einsum("ntw,twv,ntv->n", parts, metric, parts, optimize=True)

    _print_entropy(book, sets[1], str(options.book))
    base = float(cost(sets[1].plain - sets[0].plain.mean(axis=0)).mean())
    print(f"{'step':<32}{'bytes':>8}{'error':>9}{'worst 1%':>10}{'worst':>8}")
    for name, n_bytes, errors in steps(*sets, book, options.bytes, options.threshold):
        _print(name, n_bytes, cost(errors), base)


def _print_entropy(book: Book, tested: Frames, where: str) -> None:
    """How much shorter an entropy coder would make the codes of the book's own stages."""
    codes = read_product(book, where)
    vectors = book.analyse(tested.plain - tested.predicted, codes.counts)
    stored = codes.quantizer.encode_counts(vectors, np.full(len(vectors), 16)).reshape(-1, 16)
    shares = [np.bincount(column, minlength=CENTROIDS) / len(column) for column in stored.T]
    bits = [-(share[share > 0] * np.log2(share[share > 0])).sum() for share in shares]
    print(f"entropy of codes, first 16 stages: {np.mean(bits):.3f} of 8 bits")


def _print(name: str, n_bytes: float, costs: NDArray[np.float64], base: float) -> None:
    worst = np.sort(costs)[::-1][: max(1, len(costs) // 100)]
    print(
        f"{name:<32}{n_bytes:>8.2f}{costs.mean() / base:>9.4f}{worst.mean() / base:>10.3f}"
        f"{worst[0] / base:>8.2f}", flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
