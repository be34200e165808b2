"""Experiments X1 to X4: keyframes and differences, in one cache and over growing snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import numpy as np

from ..book_delta import NONE, BookDelta
from ..codec import Codec, TierCodec
from ..page_delta import BITS, PageDelta
from ..page_delta import codecs as delta_codecs
from . import statistics as st
from .catalogue import BY_ID
from .eviction import Evicting
from .growing import (
    APPEND,
    AT_WHOLE,
    DROP,
    GROW,
    GROW_8,
    FourBitRows,
    Fp32,
    KeyframesOnly,
    Run,
    RunSize,
    sizes,
)
from .lab import Answers, Experiment, Lab
from .verdicts import PLAIN, Measured, Reading, near, reaches

HEADLINE = 64
"""Interval of the headline setting."""

AGES = range(4, HEADLINE, 8)
"""Rows since the last whole save: the middles of eighths of an interval."""

N_SAVES = 15

_BOOK_TIER, _SHORTEST = "balanced", 8

EXACT = Measured(0.0, 0.0, 1.0, 0.0, 0)
_ROWS = "rows-4bit"
_SINGLE = f"delta-k{HEADLINE}-fp32"
_EVICTED = f"{_SINGLE}-keep0.75"


def grown(lab: Lab, every: int, first: int, four_bit: bool) -> dict[int, RunSize]:
    """Sizes of the run of saves of the first window, by length."""
    whole = Fp32().encode
    row = FourBitRows().encode if four_bit else whole

    def make() -> object:
        return sizes(lab.caches[0], Run(first, lab.length, every), whole, row)

    return cast(
        "dict[int, RunSize]", lab.remember(f"grown {every} {first} {four_bit}", make)
    )


def lengths(lab: Lab) -> list[int]:
    return [n for n in (128, 256, 512) if n < lab.length] + [lab.length]


# --- X1, X2, X4: ratios -----------------------------------------------------------------------


def _ratio_codecs(lab: Lab) -> Sequence[Codec]:
    delta = list(delta_codecs().values())
    if lab.engine.rope is None:
        delta = [each for each in delta if "prerope" not in each.name]
    return [
        *delta, FourBitRows(), *(FourBitRows(age) for age in AGES), KeyframesOnly(HEADLINE),
        Evicting(PageDelta(HEADLINE, "fp32"), lab.ranking, 0.75), TierCodec("lossless"),
    ]  # fmt: skip


def _ratios(lab: Lab) -> Answers:
    return {"I-1": _exact(lab), "I-2": _headline(lab), "I-3": _growth(lab), "II-1": _evicted(lab)}


def _exact(lab: Lab) -> list[Reading]:
    claim = BY_ID["I-1"]
    cache = lab.caches[0]
    one = lab.ratio("lossless")
    run = grown(lab, 8, 1, False)[lab.length]
    saves = [cache.head(cache.shape.n_tokens * k // N_SAVES) for k in range(1, N_SAVES + 1)]
    all_fp32 = 2 * sum(each.raw_bytes for each in saves)
    rows_once = len(Fp32().encode(cache))
    archive = TierCodec("lossless").series_bytes(saves)
    return [
        Reading(PLAIN, "tsc lossless, one cache", one, reaches(one, claim.ratio), "×", EXACT),
        Reading("one fp32 cache", "the same bytes against fp32", 2 * one,
                reaches(2 * one, claim.ratio), "×", EXACT),
        Reading(GROW_8, f"fp32 rows, {lab.length} saves", run.ratio,
                reaches(run.ratio, claim.ratio), "×", EXACT),
        Reading(GROW_8, "the last of these saves: one fp16 cache over what has to be read for it",
                run.one_cache_ratio, None, "×", EXACT),
        Reading(APPEND, "fp32 rows", all_fp32 / rows_once,
                reaches(all_fp32 / rows_once, claim.ratio), "×", EXACT),
        Reading(APPEND, "tsc pack and tsc append, lossless, one archive", all_fp32 / archive, None,
                "×", EXACT),
    ]  # fmt: skip


def _headline(lab: Lab) -> list[Reading]:
    claim = BY_ID["I-2"]
    quality = lab.quality(_SINGLE)

    def reading(basis: str, what: str, ratio: float, found: Measured) -> Reading:
        holds = reaches(ratio, claim.ratio, found, kl=claim.kl, top1=claim.top1)
        return Reading(basis, what, ratio, holds, "×", found)

    run = grown(lab, HEADLINE, 32, True)[lab.length]
    ages = lab.mean_quality([FourBitRows(age).name for age in AGES])
    rows = lab.quality(_ROWS)
    saves = [lab.caches[0].head(lab.length * k // N_SAVES) for k in range(1, N_SAVES + 1)]
    appended = 2 * sum(each.raw_bytes for each in saves) / len(FourBitRows().encode(saves[-1]))
    dropped = lab.quality(KeyframesOnly(HEADLINE).name)
    found = [
        reading(PLAIN, "keyframe every 64 in fp32, 4-bit differences", lab.ratio(_SINGLE), quality),
        reading("one fp32 cache", "the same bytes against fp32", 2 * lab.ratio(_SINGLE), quality),
        reading(GROW, f"4-bit rows, {lab.length} tokens; quality: mean over 0 to 63 rows since the "
                "whole save", run.ratio, ages),
        reading(AT_WHOLE, "the same bytes", run.ratio, EXACT),
        Reading(GROW, "the last of these saves: one fp16 cache over what has to be read for it",
                run.one_cache_ratio, None, "×", ages),
        reading(APPEND, "4-bit rows", appended, rows),
        reading(DROP, "keyframes alone", 2 * lab.ratio(KeyframesOnly(HEADLINE).name), dropped),
    ]  # fmt: skip
    for name in delta_codecs():
        if name != _SINGLE and ("prerope" not in name or lab.engine.rope is not None):
            found.append(Reading(PLAIN, name, lab.ratio(name), None, "×", lab.quality(name)))
    for age in AGES:
        name = FourBitRows(age).name
        found.append(Reading(
            GROW, f"a save {age} rows after a whole one", lab.ratio(name), None, "×",
            lab.quality(name),
        ))  # fmt: skip
    return found


def _growth(lab: Lab) -> list[Reading]:
    """Growth of the ratio from the shortest length to the longest."""
    codec = PageDelta(HEADLINE, "fp32")
    one = [
        part.raw_bytes / len(codec.encode(part))
        for part in (lab.caches[0].head(n) for n in lengths(lab))
    ]
    run = grown(lab, HEADLINE, 32, True)
    many = [run[n].ratio for n in lengths(lab)]

    def reading(basis: str, ratios: list[float]) -> Reading:
        words = ", ".join(
            f"{ratio:.2f}× at {n}" for n, ratio in zip(lengths(lab), ratios, strict=True)
        )
        growth = ratios[-1] / ratios[0] - 1
        grows = all(b > a for a, b in pairwise(ratios)) and growth > 0.05
        return Reading(basis, f"growth by: {words}", 100 * growth, grows, "%")

    return [reading(PLAIN, one), reading(GROW, many)]


def _evicted(lab: Lab) -> list[Reading]:
    claim, name = BY_ID["II-1"], _EVICTED
    quality = lab.quality(name)
    factor = lab.ratio(name) / lab.ratio(_SINGLE)
    ratio = grown(lab, HEADLINE, 32, True)[lab.length].ratio * factor

    def holds(value: float) -> bool:
        return reaches(value, claim.ratio, quality, kl=claim.kl)

    return [
        Reading(PLAIN, "I-2 of what is left of a quarter evicted", lab.ratio(name),
                holds(lab.ratio(name)), "×", quality),
        Reading(PLAIN, "what the eviction is worth by itself", factor, None, "×"),
        Reading(GROW, "I-2 under this accounting times what the eviction is worth", ratio,
                holds(ratio), "×", quality),
    ]  # fmt: skip


# --- X3: the premise, and errors --------------------------------------------------------------


def _premise(lab: Lab) -> Answers:
    return {
        "I-4": _bound(lab), "I-4b": _largest(lab), "I-5": _smooth(lab), "I-7": _calibration(lab),
    }  # fmt: skip


def _errors(lab: Lab, n: int) -> st.PageErrors:
    kinds = st.frames_by_kind(lab.caches[0].head(n))
    return st.page_errors(
        [*kinds["keys as stored"], *kinds["values"]], BITS, bound_of=2**BITS - 1
    )


def _bound(lab: Lab) -> list[Reading]:
    return [
        Reading(PLAIN, f"largest error over what the bound allows, {n} tokens", found.of_bound,
                found.of_bound <= 1)
        for n in lengths(lab) for found in [_errors(lab, n)]
    ]  # fmt: skip


def _largest(lab: Lab) -> list[Reading]:
    found = []
    for n in lengths(lab):
        errors = _errors(lab, n)
        typical = errors.median_peak / (2**BITS - 1)
        found += [
            Reading(PLAIN, f"largest error of any page, {n} tokens", errors.largest, None),
            Reading(PLAIN, f"α/15 of the page in the middle, {n} tokens", typical, None),
        ]
    return found


def _smooth(lab: Lab) -> list[Reading]:
    found = []
    kinds = [st.frames_by_kind(cache) for cache in lab.caches]
    before_rope = "keys turned back to before RoPE"
    for kind in kinds[0]:
        norms = np.mean([st.delta_norms(each[kind]) for each in kinds], axis=0)
        shown = ", ".join(f"D({k}) {norms[k - 1]:.2f}" for k in (1, 2, 4, 8, 16, 32, 63))
        what = f"{kind}: norm of a difference over that of the frame, largest of 1 to 63 ({shown})"
        bases = {"keys as stored": (PLAIN,), "keys before RoPE": (before_rope,)}
        for basis in bases.get(kind, (PLAIN, before_rope)):
            if basis == PLAIN or "keys before RoPE" in kinds[0]:
                largest = float(norms.max())
                found.append(Reading(basis, what, largest, largest < 1))
    return [*found, *_before_coder(lab)]


def _book_codecs(lab: Lab) -> list[BookDelta]:
    """Differences before the coder of the tiers, the coder alone first."""
    if lab.book is None or lab.calibration is None:
        return []
    kinds = [(NONE, False), (_SHORTEST, False), (HEADLINE, False), (_SHORTEST, True)]
    return [BookDelta(_BOOK_TIER, lab.book, lab.calibration, *kind) for kind in kinds]


def _before_coder(lab: Lab) -> list[Reading]:
    codecs = _book_codecs(lab)
    if not codecs:
        return []
    without, *others = codecs
    alone = lab.result(without.name)
    return [
        Reading(PLAIN, f"{each.name}: bytes saved by differences before the best coder here, of "
                f"{without.name}", 100 * (1 - lab.result(each.name).stored_bytes /
                alone.stored_bytes), None, "%", lab.quality(each.name))
        for each in others
    ]  # fmt: skip


def _calibration(lab: Lab) -> list[Reading]:
    kinds = st.frames_by_kind(lab.caches[0])
    frames = [*kinds["keys as stored"], *kinds["values"]]
    share = partial(st.rejected_deltas, frames, HEADLINE, BITS)
    low, high = share(0.01), share(1e9)
    return [
        Reading(PLAIN, "share of frames that become keyframes, bound 0.01, below the 4-bit error",
                100 * low, low >= 0.99, "%"),
        Reading(PLAIN, "the same, bound above the largest error", 100 * high,
                near(high, 1 / HEADLINE), "%"),
        Reading(PLAIN, "the same, bound 0.09", 100 * share(0.09), None, "%"),
    ]  # fmt: skip


EXPERIMENTS = (
    Experiment("X1, X2, X4", "keyframes and differences, and how bytes are counted",
               ("I-1", "I-2", "I-3", "II-1"), _ratio_codecs, _ratios),
    Experiment("X3", "how far apart frames are", ("I-4", "I-4b", "I-5", "I-7"),
               _book_codecs, _premise),
)  # fmt: skip
