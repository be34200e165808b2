"""Continuation and recall: what a codec's errors do to the model's next-token distributions.

For each window of held-out text the model reads N tokens (prefill). The cache, rounded to fp16, is
the *original*; a codec encodes and decodes it into the *restored* cache.

- **Continuation**: the next 256 real tokens are fed teacher-forced, in one pass, once behind each
  cache. The logits after each fed token are compared; perplexity is that of the token after it.
- **Recall**: the same with a passage of the cached text in place of the next tokens. Its place is
  drawn by the seed, behind the first 4 tokens and before the last 128 of the context, which many
  codecs keep exactly.
- **Forgetting** is the yardstick: the cache dropped but for its first 4 frames, positions kept.

Everything but the speeds is repeatable to the digit on one machine with one number of threads.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TscError, UsageError
from .arrays import KVArrays
from .calibration import Calibration, check_disjoint
from .metrics import Comparison, compare, perplexity, stack
from .windows import Text, Window, choose_windows, draw

if TYPE_CHECKING:
    from torch import Tensor

    from .codec import Codec
    from .engine import Engine

N_SINKS = 4
N_RECENT = 128
N_SAVES = 4
"""Saves of a growing conversation, each by the same number of tokens, for the series ratio."""

_WARM_UP_FRAMES = 64

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """``frames``: lengths of context. ``n_continue``, ``n_recall``: tokens fed behind it."""

    frames: tuple[int, ...] = (768, 1792)
    n_windows: int = 8
    n_continue: int = 256
    n_recall: int = 128
    seed: int = 0

    def n_steps(self, n_codecs: int) -> int:
        """How often `evaluate` calls its ``progress``."""
        return len(self.frames) * self.n_windows * (n_codecs + 1)


@dataclass(frozen=True)
class WindowPlace:
    """Where a window lies: document of the text, first token in it, and first token of the recalled
    passage in the window (None where the context is too short for one)."""

    document: int
    start: int
    recall_start: int | None


@dataclass(frozen=True)
class Quality:
    """What one protocol says of one cache in place of another, over all windows.

    ``kl_*`` in nats; ``kl_p99`` over all positions of all windows; ``kl_windows`` the mean of each
    window; ``kl_curve`` the mean at each fed position, to 4 digits. ``top1``: share of positions
    where both caches find the same token likeliest; ``accuracy``: where the likeliest is the true
    one.
    """

    kl_mean: float
    kl_p99: float
    top1: float
    perplexity_original: float
    perplexity: float
    perplexity_delta: float
    accuracy_original: float
    accuracy: float
    n_predictions: int
    kl_windows: list[float]
    kl_curve: list[float]


@dataclass(frozen=True)
class Reference:
    """What holds for all codecs at one length of context."""

    frames: int
    windows: list[WindowPlace]
    forgetting: Quality
    forgetting_recall: Quality | None


@dataclass(frozen=True)
class CodecResult:
    """One codec at one length of context; bytes and values are sums over all windows.

    ``kl_of_forgetting``: mean KL as a share of that of forgetting. ``snapshot_ratio``: fp16 bytes
    over all bytes stored, the book apart. ``series_ratio``: the same for `N_SAVES` growing saves of
    each window in one archive, summed fp16 bytes over the file; None where the codec stores single
    snapshots. Speeds are medians over windows, in MB of fp16 cache a second.
    """

    codec: str
    family: str
    source: str
    frames: int
    continuation: Quality
    recall: Quality | None
    kl_of_forgetting: float
    raw_bytes: int
    stored_bytes: int
    book_bytes: int
    bits_per_value: float
    snapshot_ratio: float
    series_ratio: float | None
    encode_mb_s: float
    decode_mb_s: float


@dataclass(frozen=True)
class Report:
    """A whole run. ``conditions``: model, texts, seed and versions it was made with."""

    conditions: dict[str, Any]
    references: list[Reference]
    results: list[CodecResult]

    def repeatable(self) -> dict[str, Any]:
        """All but the speeds, as plain values: equal for two runs on the same machine."""
        plain = asdict(self)
        for result in plain["results"]:
            del result["encode_mb_s"], result["decode_mb_s"]
        return plain

    def reference(self, frames: int) -> Reference:
        return next(each for each in self.references if each.frames == frames)


def evaluate(
    engine: Engine,
    text: Text,
    codecs: Sequence[Codec],
    plan: Plan = Plan(),  # noqa: B008 - frozen
    *,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run both protocols for every codec; see the module's first lines.

    ``calibration``: what codecs have learnt from, to be named and checked for overlap with
    ``text``. ``progress`` is called with a few words at each of `Plan.n_steps` steps.

    Raises `UsageError` if the text is too short or overlaps the calibration text, or if the model
    is too short for the context.
    """
    if calibration is not None:
        check_disjoint(text, calibration.text)
    documents = [engine.tokenize(document) for document in text.documents]
    say = progress or (lambda words: None)
    references, results = [], []
    for frames in plan.frames:
        reference, found = _at_length(engine, documents, codecs, plan, frames, say)
        references.append(reference)
        results += found
    conditions = _conditions(engine, text, plan, calibration)
    books = {each.name: digest for each in codecs if (digest := getattr(each, "book_blake3", None))}
    return Report({**conditions, **({"books": books} if books else {})}, references, results)


# --- one length of context --------------------------------------------------------------------


@dataclass
class _Tally:
    """What was measured of one codec, window after window."""

    continuation: list[Comparison] = field(default_factory=list)
    recall: list[Comparison] = field(default_factory=list)
    n_bytes: int = 0
    series_raw: int = 0
    series_stored: int = 0
    encode_mb_s: list[float] = field(default_factory=list)
    decode_mb_s: list[float] = field(default_factory=list)


def _at_length(
    engine: Engine,
    documents: Sequence[NDArray[np.int32]],
    codecs: Sequence[Codec],
    plan: Plan,
    frames: int,
    say: Progress,
) -> tuple[Reference, list[CodecResult]]:
    cases = _cases(engine, documents, plan, frames)
    forgotten, tallies = _Tally(), [_Tally() for _ in codecs]
    raw_bytes = n_values = 0
    for number, case in enumerate(cases):
        say(f"{frames} frames, window {number + 1}: reading")
        case.prepare(engine)
        raw_bytes += case.original.raw_bytes
        n_values += case.original.shape.n_values
        case.measure(engine, case.original.head(N_SINKS), forgotten)
        for codec, tally in zip(codecs, tallies, strict=True):
            say(f"{frames} frames, window {number + 1}: {codec.name}")
            if not number:
                # Some codecs learn from the cache, and refuse so short a one.
                with suppress(UsageError):
                    _roundtrip(codec, case.original.head(_WARM_UP_FRAMES), _Tally())
            case.measure(engine, _roundtrip(codec, case.original, tally), tally)
        case.release()
    places = [WindowPlace(c.window.document, c.window.start, c.recall_start) for c in cases]
    reference = Reference(
        frames, places, _quality(forgotten.continuation), _recall_quality(forgotten)
    )
    return reference, [
        _result(codec, tally, reference, raw_bytes, n_values)
        for codec, tally in zip(codecs, tallies, strict=True)
    ]


class _Case:
    """One window: its original cache and the logits behind it."""

    def __init__(self, window: Window, frames: int, plan: Plan, seed_path: tuple[int, int]) -> None:
        self.window = window
        self.frames = frames
        self.recall_start = _recall_start(frames, plan, *seed_path)
        self._feeds: list[NDArray[np.int32]] = [window.tokens[frames:]]
        if self.recall_start is not None:
            passage = slice(self.recall_start, self.recall_start + plan.n_recall + 1)
            self._feeds.append(window.tokens[passage])
        self._logits: list[Tensor] = []

    def prepare(self, engine: Engine) -> None:
        self.original = engine.prefill(self.window.tokens[: self.frames])
        self._logits = [self._proceed(engine, self.original, feed) for feed in self._feeds]

    def release(self) -> None:
        del self.original
        self._logits = []

    def measure(self, engine: Engine, restored: KVArrays, tally: _Tally) -> None:
        """Compare ``restored`` with the original under both protocols."""
        for feed, logits, found in zip(
            self._feeds, self._logits, (tally.continuation, tally.recall), strict=False
        ):
            found.append(compare(logits, self._proceed(engine, restored, feed), feed[1:]))

    def _proceed(self, engine: Engine, cache: KVArrays, feed: NDArray[np.int32]) -> Tensor:
        # The last token is only predicted, not fed.
        return engine.proceed(cache, feed[:-1], self.frames)


def _cases(
    engine: Engine, documents: Sequence[NDArray[np.int32]], plan: Plan, frames: int
) -> list[_Case]:
    length = frames + plan.n_continue + 1
    if frames <= N_SINKS or length > engine.max_positions:
        raise UsageError(
            f"{frames} frames and {plan.n_continue} tokens behind them do not fit the model, which "
            f"has {engine.max_positions} positions; give more than {N_SINKS} and fewer frames"
        )
    opening = np.full(0 if engine.bos is None else 1, engine.bos or 0, np.int32)
    windows = choose_windows(documents, length - len(opening), plan.n_windows, plan.seed)
    return [
        _Case(
            Window(each.document, each.start, np.concatenate([opening, each.tokens])),
            frames, plan, (frames, number),
        )
        for number, each in enumerate(windows)
    ]  # fmt: skip


def _recall_start(frames: int, plan: Plan, *seed_path: int) -> int | None:
    """First token of the passage; the token behind the passage is still before the last 128."""
    n_places = frames - N_SINKS - N_RECENT - plan.n_recall
    if n_places < 1:
        return None
    return N_SINKS + draw(n_places, plan.seed, "recall", *seed_path)


def _roundtrip(codec: Codec, original: KVArrays, tally: _Tally) -> KVArrays:
    start = time.perf_counter()
    data = codec.encode(original)
    encoded = time.perf_counter()
    restored = codec.decode(data, original.shape)
    decoded = time.perf_counter()
    _check(codec, original, restored)
    megabytes = original.raw_bytes / 1e6
    tally.n_bytes += len(data)
    tally.encode_mb_s.append(megabytes / max(encoded - start, 1e-9))
    tally.decode_mb_s.append(megabytes / max(decoded - encoded, 1e-9))
    _measure_series(codec, original, tally)
    return restored


def _measure_series(codec: Codec, original: KVArrays, tally: _Tally) -> None:
    """What the same window costs as `N_SAVES` saves of a growing conversation."""
    series_bytes = getattr(codec, "series_bytes", None)
    if series_bytes is None:
        return
    n_tokens = original.shape.n_tokens
    saves = [original.head(n_tokens * k // N_SAVES) for k in range(1, N_SAVES + 1)]
    tally.series_raw += sum(save.raw_bytes for save in saves)
    tally.series_stored += series_bytes(saves)


def _check(codec: Codec, original: KVArrays, restored: KVArrays) -> None:
    for (_, old), (role, new) in zip(original.roles(), restored.roles(), strict=True):
        for layer, (a, b) in enumerate(zip(old, new, strict=True)):
            if a.shape != b.shape or b.dtype != np.float16 or not np.isfinite(b).all():
                raise TscError(
                    f"codec {codec.name}: {role.upper()} of layer {layer} came back as "
                    f"{b.dtype} {b.shape}, finite: {bool(np.isfinite(b).all())}; wanted finite "
                    f"float16 {a.shape}"
                )


# --- sums -------------------------------------------------------------------------------------


def _quality(comparisons: Sequence[Comparison]) -> Quality:
    all_of = stack(comparisons)
    before, after = perplexity(all_of.nll_original), perplexity(all_of.nll_restored)
    return Quality(
        kl_mean=float(all_of.kl.mean()),
        kl_p99=float(np.quantile(all_of.kl, 0.99)),
        top1=float(all_of.same_top1.mean()),
        perplexity_original=before,
        perplexity=after,
        perplexity_delta=after - before,
        accuracy_original=float(all_of.hit_original.mean()),
        accuracy=float(all_of.hit_restored.mean()),
        n_predictions=all_of.kl.size,
        kl_windows=[float(each) for each in all_of.kl.mean(axis=1)],
        kl_curve=[float(f"{each:.4g}") for each in all_of.kl.mean(axis=0)],
    )


def _recall_quality(tally: _Tally) -> Quality | None:
    return _quality(tally.recall) if tally.recall else None


def _result(
    codec: Codec, tally: _Tally, reference: Reference, raw_bytes: int, n_values: int
) -> CodecResult:
    continuation = _quality(tally.continuation)
    return CodecResult(
        codec=codec.name,
        family=codec.family,
        source=codec.source,
        frames=reference.frames,
        continuation=continuation,
        recall=_recall_quality(tally),
        kl_of_forgetting=continuation.kl_mean / reference.forgetting.kl_mean,
        raw_bytes=raw_bytes,
        stored_bytes=tally.n_bytes,
        book_bytes=codec.book_bytes,
        bits_per_value=8 * tally.n_bytes / n_values,
        snapshot_ratio=raw_bytes / tally.n_bytes,
        series_ratio=tally.series_raw / tally.series_stored if tally.series_stored else None,
        encode_mb_s=float(np.median(tally.encode_mb_s)),
        decode_mb_s=float(np.median(tally.decode_mb_s)),
    )


def _conditions(
    engine: Engine, text: Text, plan: Plan, calibration: Calibration | None
) -> dict[str, Any]:
    import torch

    packages = ("tscfile", "torch", "transformers", "numpy")
    return {
        "model": engine.path.name,
        "architecture": engine.architecture,
        "weights_blake3": engine.fingerprint(),
        "text": text.name,
        "text_blake3": text.digest,
        "calibration": calibration and calibration.text.name,
        "calibration_blake3": calibration and calibration.text.digest,
        "frames": list(plan.frames),
        "n_windows": plan.n_windows,
        "n_continue": plan.n_continue,
        "n_recall": plan.n_recall,
        "seed": plan.seed,
        "cache_dtype": "float16",
        "compute_dtype": "float32",
        "device": engine.device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }
