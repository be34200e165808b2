"""How fast a book's tier reads and writes, and what it is to be held against.

Everything runs in one thread unless told otherwise, in the same process, best of several runs, so
that ratios between the rows mean something; absolute times depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .book_codec import BookCodec, steps_of
from .books.basis import GROUP_CHANNELS, layer_groups
from .books.book import Book, OpenBook, load
from .context import FrameContext
from .dtypes import DTYPES
from .entropy import ladder
from .errors import UsageError
from .model import BLOCK_FRAMES, ModelIdentity, Snapshot, TensorSpec
from .sources import identity_for, open_source
from .transforms import channels

_RUNS = 5


@dataclass(frozen=True)
class Shape:
    """What of a model decides the work: layers, channels of a role in a layer, weights."""

    n_layers: int
    width: int
    head_dim: int
    n_weights: float
    n_tokens: int = 128256


SHAPES = {
    "llama-3-8b": Shape(32, 1024, 128, 8.0e9),
    "llama-3-70b": Shape(80, 1024, 128, 70.6e9),
}


@dataclass(frozen=True)
class Row:
    """One measurement: seconds for all blocks, and MB of restored cache a second."""

    name: str
    seconds: float
    mb_s: float


@dataclass
class BenchReport:
    """``symbols_s``: million symbols a second of the entropy decoder alone. ``flops_frame``:
    multiplications and additions of the transform for one frame, ``flops_prefill`` those of the
    model for one token. ``prefill_ratio``: how much longer llama.cpp takes to compute the state
    than restoring it takes; None where that was not measured."""

    what: str
    tier: str
    n_frames: int
    raw_bytes: int
    stored_bytes: int
    rows: list[Row] = field(default_factory=list)
    symbols_s: float = 0.0
    flops_frame: float = 0.0
    flops_prefill: float | None = None
    prefill_ratio: float | None = None

    def add(self, name: str, seconds: float) -> None:
        self.rows.append(Row(name, seconds, self.raw_bytes / 1e6 / seconds))

    def seconds(self, name: str) -> float:
        return next(row.seconds for row in self.rows if row.name == name)


def bench_state(
    state: Path, book: Path, tier: str, model: Path | None, progress: Callable[[str], None]
) -> BenchReport:
    """A saved state, coded with its model's book. ``model``: its GGUF file, to compare with
    computing the state again in llama.cpp."""
    snapshot = open_source(state)
    if model is not None:
        from .identity import identity_from_gguf
        from .packing import identify

        identify(snapshot, identity_for(snapshot, identity_from_gguf(model)))
    codec = BookCodec(load(book), snapshot.identity, str(book))
    report = _bench(snapshot, codec, codec.book.tier(tier).log_step, tier, str(state), progress)
    if model is not None:
        progress("llama.cpp")
        _against_llama(report, snapshot, book, tier, model)
    return report


def bench_shape(name: str, n_frames: int, progress: Callable[[str], None]) -> BenchReport:
    """A made-up book of a large model's shape: what its transform costs, not what it keeps."""
    if name not in SHAPES:
        raise UsageError(f"shape {name!r} is unknown; known are {', '.join(SHAPES)}")
    shape = SHAPES[name]
    progress("making a book")
    codec = BookCodec(_made_book(shape), ModelIdentity({"rope_pairing": "neox"}), name)
    snapshot = _made_snapshot(shape, n_frames)
    report = _bench(snapshot, codec, 0, "balanced", f"{name}, made up", progress)
    report.flops_prefill = 2 * shape.n_weights
    return report


# --- measuring --------------------------------------------------------------------------------


def _bench(
    snapshot: Snapshot, codec: BookCodec, log_step: int, tier: str, what: str,
    progress: Callable[[str], None],
) -> BenchReport:  # fmt: skip
    if len(snapshot.tracks) != 1 or not len(snapshot.tracks[0].cells):
        raise UsageError(f"{what}: has {len(snapshot.tracks)} caches; name a state of one")
    track = snapshot.tracks[0]
    tensors = track.tensors
    codec.check(tensors, what)
    n = len(track.cells)
    spans = [(start, min(start + BLOCK_FRAMES, n)) for start in range(0, n, BLOCK_FRAMES)]
    contexts = [FrameContext(track.cells.pos[a:b], snapshot.tokens) for a, b in spans]
    steps = [steps_of(each.pos, n, log_step) for each in contexts]
    rows = [track.read(a, b) for a, b in spans]
    progress("encoding")

    def encode() -> list[memoryview]:
        parts = zip(rows, contexts, steps, strict=True)
        chunks = [codec.encode(part, tensors, context, [each])[0] for part, context, each in parts]
        return [memoryview(chunk.header.write() + chunk.body) for chunk in chunks]

    encoding, payloads = _best(encode, 2)
    stored = sum(map(len, payloads))
    report = BenchReport(what, tier, n, snapshot.raw_bytes, stored)
    report.add("encode", encoding)
    progress("decoding")
    book = codec.book
    pairs = list(zip(payloads, contexts, strict=True))
    decoding, _ = _best(lambda: [codec.decode([p], tensors, 0, c, what) for p, c in pairs])
    report.add("decode", decoding)
    reading, read = _best(lambda: [codec.read([p], what) for p in payloads])
    report.add("  entropy decoder", reading)
    n_symbols = sum(segment.values.size for segments in read for segment in segments)
    report.symbols_s = n_symbols / reading / 1e6
    predicting, predicted = _best(lambda: [book.network(c) for c in contexts])
    report.add("  prediction", predicting)
    frames = [np.zeros((len(c.pos), book.n_channels), np.float32) for c in contexts]

    def finish() -> None:
        for context, part in zip(contexts, frames, strict=True):
            channels.from_frames(
                part, tensors, context.pos, book.rope, codec.head_dim, codec.pairing
            )

    report.add("  RoPE and rounding", _best(finish)[0])
    progress("matrix products")
    products = _products(book, predicted, read)
    seconds, _ = _best(lambda: [a @ b for a, b in products])
    report.add("matrix products alone", seconds)
    report.flops_frame = sum(2.0 * a.shape[0] * b.size for a, b in products) / n
    return report


def _products(
    book: Book, predicted: Sequence[NDArray[np.float32]], read: Sequence[Sequence[Any]]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The dense products of decoding: those of the network, and the synthesis of each segment."""
    features = book.network.features
    width = features.vectors.shape[1]
    rng = np.random.default_rng(0)
    found = []
    for z, segments in zip(predicted, read, strict=True):
        n = len(z)
        first = book.network.first
        # Distinct tokens of a block; on text about half of them.
        distinct = rng.standard_normal((max(1, n // 2), width)).astype(np.float32)
        for k in range(features.history):
            found.append((distinct, first[k * width : (k + 1) * width]))
        dense = rng.standard_normal((n, features.n_features - features.history * width))
        found.append((dense.astype(np.float32), first[features.history * width :]))
        hidden = rng.standard_normal((n, len(book.network.bias))).astype(np.float32)
        found.append((hidden, book.network.output))
        for segment in segments:
            for g, count in enumerate(segment.counts):
                n_rows = book.prediction.counts[g] + count
                left = rng.standard_normal((segment.stop - segment.start, n_rows))
                found.append((left.astype(np.float32), book.stacked[g][:n_rows]))
    return found


def _best(work: Callable[[], Any], runs: int = _RUNS) -> tuple[float, Any]:
    """Seconds of the quickest run after one that warms up, and what it gave."""
    found = work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


def _against_llama(
    report: BenchReport, snapshot: Snapshot, book: Path, tier: str, model: Path
) -> None:
    """Restoring an archive into llama.cpp beside computing the same tokens, on all cores."""
    import tempfile

    from .archive import Archive
    from .packing import pack
    from .resume.engine import Context, Model
    from .resume.llama_cpp import restore

    with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
        path = Path(folder) / "bench.tsc"
        pack(snapshot, path, tier=tier, book=book)

        def load_again() -> float:
            with Archive(path, book=book) as archive:
                with restore(archive.snapshot(), model, probe=False) as restored:
                    return restored.load_seconds

        load_again()
        restoring = min(load_again() for _ in range(_RUNS))
    tokens = snapshot.tokens.tolist()
    with Model(model) as loaded:
        f16 = DTYPES["f16"]
        with Context(
            loaded, -(-len(tokens) // 256) * 256, type_k=f16, type_v=f16, flash_attention=False
        ) as context:

            def prefill() -> None:
                context.clear()
                context.decode(tokens, 0)

            computing, _ = _best(prefill)
    report.add("restore in llama.cpp, all cores", restoring)
    report.add("prefill in llama.cpp, all cores", computing)
    report.prefill_ratio = computing / restoring


# --- made-up books ----------------------------------------------------------------------------


def _made_book(shape: Shape) -> OpenBook:
    rng = np.random.default_rng(0)
    groups = layer_groups(shape.n_layers, shape.width, GROUP_CHANNELS)
    rank, n_predicted, n_hidden, dims, history, decays = 1024, 256, 1024, 256, 3, (0.8, 0.95, 0.99)
    n_features = history * dims + len(decays) * 64 + 2
    n_all, n_predictions = rank * groups.n_groups, n_predicted * groups.n_groups

    def table(*size: int) -> NDArray[np.int8]:
        return rng.integers(-127, 128, size, np.int8)

    def scales(n: int) -> NDArray[np.float32]:
        return np.full(n, 1e-3, np.float32)

    # Scales fall as they do on the reference model: a sixth of the rank is above the step.
    falling = np.rint(512 - 256 * 6 * np.arange(rank) / rank * 1.5).astype(np.int16)
    halving = (2.0 ** -np.arange(32.0)).astype(np.float64)
    frequencies = np.stack([ladder.normalise(halving) for _ in range(40)])
    arrays: dict[str, NDArray[Any]] = {
        "mean": np.zeros(2 * shape.n_layers * shape.width, np.float32),
        "token_vectors": table(shape.n_tokens, dims), "token_scales": scales(shape.n_tokens),
        "hidden": table(n_features, n_hidden), "hidden_scales": scales(n_hidden),
        "hidden_bias": scales(n_hidden),
        "linear": table(n_features, n_predictions), "linear_scales": scales(n_predictions),
        "output": table(n_hidden, n_predictions), "output_scales": scales(n_predictions),
        "prediction": table(n_predictions, groups.n_channels),
        "prediction_scales": scales(n_predictions),
        "basis": table(n_all, groups.n_channels), "basis_scales": scales(n_all),
        "metric": np.broadcast_to(
            np.eye(shape.width, dtype=np.float16), (2 * shape.n_layers, shape.width, shape.width)
        ),
        "log_sigmas": np.tile(falling, groups.n_groups), "frequencies": frequencies,
        "inv_freq": (5e5 ** (-np.arange(0, 1, 2 / shape.head_dim))).astype(np.float32),
    }  # fmt: skip
    facts = {
        "book.history": history, "book.decays": list(decays), "book.decay_dims": 64,
        "book.n_layers": shape.n_layers, "book.group_layers": groups.per_group,
        "book.group_coefficients": [rank] * groups.n_groups,
        "book.group_predictions": [n_predicted] * groups.n_groups,
        "book.rope_pairing": "neox", "book.rope_scale": 1.0, "book.head_dim": shape.head_dim,
    }  # fmt: skip
    return OpenBook("made up", Book(facts, arrays), 0)


@dataclass
class _MadeTrack:
    """Frames of noise."""

    cells: Any
    tensors: Sequence[TensorSpec]
    cache: int = 0
    stream: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)

    def read(
        self, start: int, stop: int, tensors: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        rng = np.random.default_rng(start)
        chosen = range(len(self.tensors)) if tensors is None else tensors
        return [
            rng.standard_normal((stop - start, self.tensors[i].n_channels), np.float32)
            .astype(np.float16).view(np.uint8)
            for i in chosen
        ]  # fmt: skip


def _made_snapshot(shape: Shape, n_frames: int) -> Snapshot:
    from .model import CellTable

    pos = np.arange(n_frames, dtype=np.int32)
    ones = np.ones(n_frames, np.int32)
    cells = CellTable(pos, ones, 0 * ones, np.zeros((n_frames, 0), np.int32))
    tensors = [
        TensorSpec(layer, role, DTYPES["f16"], 2 * shape.width)
        for role in "kv" for layer in range(shape.n_layers)
    ]  # fmt: skip
    tokens = np.random.default_rng(1).zipf(1.2, n_frames).clip(0, shape.n_tokens - 1)
    return Snapshot(tokens.astype(np.int32), [_MadeTrack(cells, tensors)], {})
