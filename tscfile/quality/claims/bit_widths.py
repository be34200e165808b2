"""Experiments X7 and X8: bits for keys and values, rotation, and eviction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..arrays import CacheShape, LayerShape, from_layers
from ..codec import Codec, TierCodec
from ..peers.rotated import RotatedUniform
from .calculators import eviction_ratio
from .catalogue import BY_ID
from .eviction import Evicting, n_early
from .lab import Answers, Experiment, Lab
from .verdicts import PLAIN, Measured, Reading, reaches

CONFIGURATIONS = (
    (8, 8, 1.0), (4, 4, 1.0), (4, 2, 1.0), (8, 8, 0.5), (4, 4, 0.9), (4, 4, 0.7), (4, 2, 0.9),
    (4, 2, 0.8), (4, 2, 0.7), (4, 2, 0.6), (4, 2, 0.3), (4, 2, 0.1),
)  # fmt: skip
"""Bits of keys and of values, share of frames kept outside the early layers: in place of the twelve
configurations of the scale validation, which are not public."""

_PLAIN_WIDTHS = ((4, 2), (4, 4), (3, 2))
NO_SCALES = "scales not counted"
THREE_BITS = "3 bits for keys in place of 4, scales not counted"
WITH_EVICTION = "three tenths of the tokens evicted outside the early layers"
EVICTED_LABEL = "the label read as the share that is evicted"
NOT_THE_SAME_BITS = "\"lossless\" read as hard to tell from the original: other bits come back"
TINY_LAYERS, LARGE_LAYERS = 22, 32
"""Layers of the models of part IV and of the smallest model of the scale validation."""


def _rotated(lab: Lab, key_bits: int, value_bits: int, turned: bool = True) -> RotatedUniform:
    return RotatedUniform(key_bits, value_bits, turned=turned, group=lab.page)


def configuration(lab: Lab, key_bits: int, value_bits: int, kept: float) -> Codec:
    inner = _rotated(lab, key_bits, value_bits)
    return inner if kept == 1 else Evicting(inner, lab.ranking, kept, n_early(lab.n_layers))


def _width_codecs(lab: Lab) -> Sequence[Codec]:
    pairs = [_rotated(lab, *bits, turned) for bits in _PLAIN_WIDTHS for turned in (True, False)]
    return [*pairs, configuration(lab, 4, 2, 0.7), TierCodec("lossless")]


def _width_answers(lab: Lab) -> Answers:
    return {
        "IV-1": _four_two(lab, "IV-1"), "IV-1b": _four_two(lab, "IV-1b"),
        "SV-1": _lossless_tier(lab), "SV-3": _any_shape(),
    }  # fmt: skip


def _without_scales(lab: Lab, key_bits: int, value_bits: int) -> float:
    """Ratio with the bytes of the scales taken off what was measured."""
    result = lab.result(_rotated(lab, key_bits, value_bits).name)
    n_values = result.raw_bytes // 2
    return result.raw_bytes / (result.stored_bytes - 2 * n_values / lab.page)


def _four_two(lab: Lab, number: str) -> list[Reading]:
    claim = BY_ID[number]

    def reading(basis: str, what: str, ratio: float, quality: Measured, decides: bool) -> Reading:
        holds = reaches(ratio, claim.ratio, quality, kl=claim.kl) if decides else None
        return Reading(basis, what, ratio, holds, "×", quality)

    found = []
    for key_bits, value_bits in _PLAIN_WIDTHS:
        for turned in (True, False):
            name = _rotated(lab, key_bits, value_bits, turned).name
            decides = turned and (key_bits, value_bits) == (4, 2)
            what = f"K{key_bits}/V{value_bits} {'rotated' if turned else 'not rotated'}"
            found.append(reading(PLAIN, what, lab.ratio(name), lab.quality(name), decides))
    four, three = (_rotated(lab, bits, 2).name for bits in (4, 3))
    ratio = _without_scales(lab, 4, 2)
    found.append(reading(NO_SCALES, "K4/V2 rotated", ratio, lab.quality(four), True))
    ratio = _without_scales(lab, 3, 2)
    found.append(
        reading(THREE_BITS, "K3/V2 rotated", ratio, lab.quality(three), number == "IV-1b")
    )
    if number == "IV-1b":
        evicted = configuration(lab, 4, 2, 0.7)
        ratio = eviction_ratio(TINY_LAYERS, n_early(TINY_LAYERS), 0.7, 4, 2, lab.page)
        what = "K4/V2, scales counted, 0.7 kept outside the first 5 of 22 layers; quality: here"
        found.append(reading(WITH_EVICTION, what, ratio, lab.quality(evicted.name), True))
    return found


def _lossless_tier(lab: Lab) -> list[Reading]:
    claim, name = BY_ID["SV-1"], _rotated(lab, 4, 4).name
    exact, ratio, quality = lab.ratio("lossless"), lab.ratio(name), lab.quality(name)
    return [
        Reading(PLAIN, "the same bits back: tsc lossless", exact, reaches(exact, claim.ratio), "×",
                lab.quality("lossless")),
        Reading(NOT_THE_SAME_BITS, "K4/V4 rotated", ratio, reaches(ratio, claim.ratio, quality),
                "×", quality),
    ]  # fmt: skip


def _any_shape() -> list[Reading]:
    """Made-up caches of two shapes: of a code of fixed rate only the number of values counts."""
    rng = np.random.default_rng(0)

    def noise(role: str, layer: int, n_heads: int, dim: int) -> NDArray[np.float16]:
        return rng.standard_normal((n_heads, 100, dim)).astype(np.float16)

    ratios = []
    for n_layers, dim in ((2, 64), (6, 128)):
        shape = CacheShape(np.zeros(100, np.int32), (LayerShape(2, dim, dim),) * n_layers)
        cache = from_layers(shape, noise)
        ratios.append(cache.raw_bytes / len(RotatedUniform(4, 2).encode(cache)))
    apart = abs(ratios[1] / ratios[0] - 1)
    return [
        Reading(PLAIN, "K4/V2 of made-up caches, 2 layers with heads of 64 and 6 with heads of "
                f"128: {ratios[0]:.2f}× and {ratios[1]:.2f}×, as of any code of fixed rate; apart "
                "by", 100 * apart, apart < 0.01, "%"),
    ]  # fmt: skip


# --- X8 ---------------------------------------------------------------------------------------


def _sweep_codecs(lab: Lab) -> Sequence[Codec]:
    return [configuration(lab, *each) for each in CONFIGURATIONS]


def _sweep_answers(lab: Lab) -> Answers:
    return {
        "IV-2": _preserve_early(lab, "IV-2", 0.3), "IV-3": _preserve_early(lab, "IV-3", 0.1),
        "SV-2": _conservative(lab), "SV-5": [_measured(lab, *each) for each in CONFIGURATIONS],
    }  # fmt: skip


def _measured(lab: Lab, key_bits: int, value_bits: int, kept: float) -> Reading:
    name = configuration(lab, key_bits, value_bits, kept).name
    early = n_early(lab.n_layers)
    expected = eviction_ratio(lab.n_layers, early, kept, key_bits, value_bits, lab.page)
    return Reading(
        PLAIN, f"K{key_bits}/V{value_bits}, {kept:g} kept outside the first {early} of "
        f"{lab.n_layers} layers (arithmetic: {expected:.2f}×)",
        lab.ratio(name), None, "×", lab.quality(name),
    )  # fmt: skip


def _preserve_early(lab: Lab, number: str, label: float) -> list[Reading]:
    """The ratio at the report's 22 layers, by the arithmetic that the measured file confirms, with
    the quality measured here. The label may be the share kept or the share evicted: 10 % is the
    smaller file of the two, so it is read as kept."""
    claim = BY_ID[number]
    shares = ((PLAIN, label), (EVICTED_LABEL, 1 - label))
    found = []
    for basis, kept in shares:
        here = _measured(lab, 4, 2, round(kept, 1))
        assert here.quality is not None
        there = eviction_ratio(TINY_LAYERS, n_early(TINY_LAYERS), kept, 4, 2, lab.page)
        holds = reaches(there, claim.ratio, here.quality, kl=claim.kl, top1=claim.top1)
        what = f"K4/V2, {kept:g} kept outside the first 5 of 22 layers; quality: here"
        found += [
            Reading(basis, what, there, holds, "×", here.quality), replace(here, basis=basis),
        ]  # fmt: skip
    return found


def _conservative(lab: Lab) -> list[Reading]:
    claim, here = BY_ID["SV-2"], _measured(lab, 4, 2, 0.8)
    assert here.quality is not None
    there = eviction_ratio(LARGE_LAYERS, n_early(LARGE_LAYERS), 0.8, 4, 2, 128)
    return [
        Reading(PLAIN, "K4/V2 with a scale for 128 values, 0.8 kept outside the first 7 of 32 "
                "layers; quality: here", there, reaches(there, claim.ratio, here.quality), "×",
                here.quality),
        here,
    ]  # fmt: skip


EXPERIMENTS = (
    Experiment("X7", "bits for keys and values, with and without rotation",
               ("IV-1", "IV-1b", "SV-1", "SV-3"), _width_codecs, _width_answers),
    Experiment("X8", "eviction by attention received", ("IV-2", "IV-3", "SV-2", "SV-5"),
               _sweep_codecs, _sweep_answers),
)  # fmt: skip
