"""Experiments X5 and X6: vector quantization, what mends it, and what it is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from ..arrays import KVArrays
from ..codec import Codec
from . import statistics as st
from .catalogue import BY_ID
from .growing import GROW, Run, RunSize, sizes
from .lab import Answers, Experiment, Lab
from .vector import Model, VectorQuantizer, vector_name
from .verdicts import PLAIN, Reading, reaches

BLOCKS = (8, 4, 2, 1)
PRODUCTS = ((2, 2), (8, 2))
"""Block and parts: 8 and 2 bits a value."""

THRESHOLDS = {8: (0.4, 0.6, 0.8), 2: (0.05, 0.1, 0.2, 0.4)}
"""Of each block, root mean square errors over it, in units of its head, above which it stays in
fp16."""

_STEP_THRESHOLD = 0.8
_FIRST, _EVERY = 64, 64
CAUSE = 0.5
"""Part of the naive KL below which normalising must bring it to be the cause of it."""


def _codecs(lab: Lab) -> Sequence[Codec]:
    return [
        *(VectorQuantizer(b, normalised=each) for each in (False, True) for b in BLOCKS),
        *(VectorQuantizer(b, parts=parts, normalised=True) for b, parts in PRODUCTS),
        *(
            VectorQuantizer(b, normalised=True, threshold=t)
            for b, thresholds in THRESHOLDS.items() for t in thresholds
        ),
    ]  # fmt: skip


def grown_codes(lab: Lab, block: int, parts: int = 1) -> RunSize:
    """The run of saves of the first window: whole ones with a codebook, new rows in its codes."""
    codec = VectorQuantizer(block, parts=parts, normalised=parts > 1)
    first = min(_FIRST, lab.length)
    newest: list[Model] = []

    def whole(save: KVArrays) -> bytes:
        newest[:] = [codec.learn(save)]
        return codec.encode(save)

    def make() -> object:
        run = Run(first, lab.length, _EVERY)
        return sizes(lab.caches[0], run, whole, lambda row: codec.codes(row, newest[0]))

    found = cast("dict[int, RunSize]", lab.remember(f"grown {codec.name}", make))
    return found[lab.length]


def _answers(lab: Lab) -> Answers:
    naive = {"II-2": 8, "II-6": 2, "III-1": 8, "III-2": 4, "III-3": 2, "III-4": 1}
    return {
        **{number: _naive(lab, number, block) for number, block in naive.items()},
        "II-3": _cause(lab), "II-4": _steps(lab), "II-5": _product(lab), "III-5": _fallback(lab),
    }  # fmt: skip


def _naive(lab: Lab, number: str, block: int) -> list[Reading]:
    claim, name = BY_ID[number], vector_name(block)
    quality = lab.quality(name)
    many = grown_codes(lab, block).ratio
    better = vector_name(block, normalised=True)
    return [
        Reading(PLAIN, f"{block} values a byte, codebook counted", lab.ratio(name),
                reaches(lab.ratio(name), claim.ratio, quality, kl=claim.kl, top1=claim.top1), "×",
                quality),
        Reading(GROW, f"the same, {lab.length} tokens, new rows in the same codes", many,
                reaches(many, claim.ratio, quality, kl=claim.kl, top1=claim.top1), "×", quality),
        Reading(PLAIN, "the same with heads divided by their size", lab.ratio(better), None, "×",
                lab.quality(better)),
    ]  # fmt: skip


def _cause(lab: Lab) -> list[Reading]:
    naive, better = (lab.quality(vector_name(8, normalised=each)) for each in (False, True))
    by_cache = np.stack([st.head_peaks(cache) for cache in lab.caches])
    peaks = by_cache.reshape(-1)
    return [
        Reading(PLAIN, f"8 values a byte: KL with heads divided by their size over KL without; "
                f"the cause if at most {CAUSE}", better.kl / naive.kl,
                better.kl <= CAUSE * naive.kl, "", better),
        Reading(PLAIN, "8 values a byte as they are", naive.kl, None, " nats", naive),
        Reading(PLAIN, "largest value of a head, median over layers, heads, keys and values",
                float(np.median(peaks)), None),
        Reading(PLAIN, "the same, largest head", float(peaks.max()), None),
        *(
            Reading(PLAIN, f"the same, median over {role}", float(np.median(part)), None)
            for role, part in zip(("keys", "values"), np.split(by_cache, 2, axis=1), strict=True)
        ),
    ]  # fmt: skip


def _steps(lab: Lab) -> list[Reading]:
    """Each step against codebooks without it at as many bits, between those of 1, 2, 4 and 8."""
    steps = (
        ("heads divided by their size", vector_name(8, normalised=True), False),
        (f"fp16 above {_STEP_THRESHOLD}", vector_name(8, 1, True, _STEP_THRESHOLD), True),
        ("product quantization", vector_name(8, 2, True), True),
    )
    found = []
    for what, name, normalised in steps:
        share = lab.quality(name).kl / _kl_at(lab, lab.bits(name), normalised)
        found.append(Reading(
            PLAIN, f"{what}, at {lab.bits(name):.2f} bits a value: KL over that of plain codebooks "
            "of as many bits", share, share < 1, "", lab.quality(name),
        ))  # fmt: skip
    return found


def _kl_at(lab: Lab, bits: float, normalised: bool) -> float:
    """KL of codebooks for blocks at a rate between theirs, on straight lines of its logarithm."""
    names = [vector_name(block, normalised=normalised) for block in BLOCKS]
    rates = [lab.bits(name) for name in names]
    logs = [np.log(max(lab.quality(name).kl, 1e-12)) for name in names]
    return float(np.exp(np.interp(bits, rates, logs)))


def _product(lab: Lab) -> list[Reading]:
    claim = BY_ID["II-5"]
    found = []
    for block, parts in PRODUCTS:
        name = vector_name(block, parts, True)
        quality, many = lab.quality(name), grown_codes(lab, block, parts).ratio
        what = f"{parts} bytes for {block} values, {lab.bits(name):.2f} bits a value"
        # One of the two is what the report has; which, its block size would say.
        one_holds = reaches(lab.ratio(name), claim.ratio, quality, kl=claim.kl)
        many_holds = reaches(many, claim.ratio, quality, kl=claim.kl)
        found += [
            Reading(PLAIN, what, lab.ratio(name), one_holds, "×", quality),
            Reading(f"{GROW}, {parts} bytes for {block} values", what, many, many_holds, "×",
                    quality),
        ]  # fmt: skip
    return found


def _fallback(lab: Lab) -> list[Reading]:
    """Every threshold in one cache, and all of them under the accounting that gives the other
    figures of the table: ratio of the saves times fp32 bits over measured bits."""
    claim = BY_ID["III-5"]
    run = Run(min(_FIRST, lab.length), lab.length, _EVERY)
    factor = run.sum_of_lengths / (sum(run.whole) + run.n_rows)
    found = []
    for block, thresholds in THRESHOLDS.items():
        for threshold in thresholds:
            codec = VectorQuantizer(block, normalised=True, threshold=threshold)
            quality, ratio = lab.quality(codec.name), lab.ratio(codec.name)
            share = codec.share_exact(lab.caches[0].head(lab.frames))
            what = (
                f"{block} values a byte, fp16 above {threshold:g}: {100 * share:.0f} % of blocks "
                f"in fp16, {lab.bits(codec.name):.1f} bits a value"
            )
            many = factor * 32 / lab.bits(codec.name)
            found += [
                Reading(PLAIN, what, ratio, None, "×", quality),
                Reading(GROW, what, many, None, "×", quality),
            ]
    for basis in (PLAIN, GROW):
        own = [each for each in found if each.basis == basis]
        best = max(own, key=lambda each: _score(each, claim.ratio))
        assert best.quality is not None
        holds = reaches(best.value, claim.ratio, best.quality, kl=claim.kl, top1=claim.top1)
        found[found.index(best)] = Reading(
            basis, best.what, best.value, holds, "×", best.quality
        )
    return found


def _score(reading: Reading, ratio: float) -> tuple[bool, float]:
    """The setting that comes nearest: of those that reach the ratio the one of least KL, else the
    one of the largest ratio."""
    assert reading.quality is not None
    reached = reaches(reading.value, ratio)
    return reached, -reading.quality.kl if reached else reading.value


EXPERIMENTS = (
    Experiment("X5, X6", "vector quantization",
               ("II-2", "II-3", "II-4", "II-5", "II-6", "III-1", "III-2", "III-3", "III-4",
                "III-5"), _codecs, _answers),
)  # fmt: skip
