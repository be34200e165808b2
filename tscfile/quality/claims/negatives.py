"""Experiment X10: what the reports rejected: singular values, one ranking, weight deltas."""

from __future__ import annotations

from collections.abc import Sequence

from ..codec import Codec
from ..peers.rotated import RotatedUniform
from . import statistics as st
from .eviction import Evicting, n_early, overlap
from .lab import Answers, Experiment, Lab, no_codecs
from .low_rank import LowRank, rank_of_bits
from .verdicts import PLAIN, TOLERANCE, Reading, near

MEAN_KEPT = 0.5
"""Share of frames kept over all layers, for every ranking."""

_UNRELATED = 2**0.5


# --- weights ----------------------------------------------------------------------------------


def _weights(lab: Lab) -> Answers:
    found = st.layer_steps(lab.engine.layer_weights())
    readings = [
        Reading(PLAIN, f"{kind}: norm of the difference over that of the weights, mean", value,
                near(value, 1.25, 1.44))
        for kind, value in found.items()
    ]  # fmt: skip
    unrelated = Reading(PLAIN, "unrelated matrices of equal norm", _UNRELATED, None)
    return {"III-7": [*readings, unrelated]}


# --- singular values --------------------------------------------------------------------------


def _four_two(lab: Lab) -> RotatedUniform:
    return RotatedUniform(4, 2, group=lab.page)


def _svd(lab: Lab) -> dict[str, LowRank]:
    """The rank of K4/V2's bytes in the first layer, either half, and all layers."""
    layer = lab.caches[0].shape.layers[0]
    bits = (4 + 2) / 2 + 16 / lab.page
    rank = rank_of_bits(bits, lab.frames, layer.n_kv_heads * layer.key_dim)
    n, half = lab.n_layers, lab.n_layers // 2
    parts = {"first layer": range(1), "first half": range(half), "second half": range(half, n),
             "all layers": range(n)}  # fmt: skip
    return {name: LowRank(rank, layers) for name, layers in parts.items()}


def _svd_codecs(lab: Lab) -> Sequence[Codec]:
    return [*_svd(lab).values(), _four_two(lab)]


def _svd_answers(lab: Lab) -> Answers:
    codecs = {name: codec.name for name, codec in _svd(lab).items()}
    kl = {name: lab.quality(codec).kl for name, codec in codecs.items()}
    bits = lab.quality(_four_two(lab).name)
    of_halves = kl["all layers"] / (kl["first half"] + kl["second half"])
    worse = kl["all layers"] / bits.kl
    shown = [
        Reading(PLAIN, f"{name} truncated", lab.ratio(codec), None, "×", lab.quality(codec))
        for name, codec in codecs.items()
    ]
    return {
        "IV-8": [
            Reading(PLAIN, "KL of all layers truncated over that of K4/V2 of as many bytes", worse,
                    worse > 1, "", lab.quality(codecs["all layers"])),
            *shown,
            Reading(PLAIN, "K4/V2 rotated", lab.ratio(_four_two(lab).name), None, "×", bits),
        ],
        "IV-8b": [
            Reading(PLAIN, "KL of all layers truncated over the sum of those of both halves alone; "
                    f"compounding if above {1 + TOLERANCE}", of_halves, of_halves > 1 + TOLERANCE),
        ],
    }  # fmt: skip


# --- rankings ---------------------------------------------------------------------------------


def _rankings(lab: Lab) -> dict[str, Evicting]:
    inner = RotatedUniform(8, 8, group=lab.page)
    early = n_early(lab.n_layers)
    elsewhere = (MEAN_KEPT * lab.n_layers - early) / (lab.n_layers - early)
    found = {
        "each layer's own": Evicting(inner, lab.ranking, MEAN_KEPT),
        "one for all layers": Evicting(inner, lab.ranking, MEAN_KEPT, shared=True),
    }
    if elsewhere > 0:
        found["PreserveEarly"] = Evicting(inner, lab.ranking, round(elsewhere, 4), early)
    return found


def _ranking_codecs(lab: Lab) -> Sequence[Codec]:
    return list(_rankings(lab).values())


def _ranking_answers(lab: Lab) -> Answers:
    codecs = _rankings(lab)
    own, shared = (lab.quality(codecs[n].name) for n in ("each layer's own", "one for all layers"))
    masks = codecs["each layer's own"].masks(lab.caches[0].shape.tokens[: lab.frames])
    return {"IV-9": [
        Reading(PLAIN, f"KL of each layer's own ranking over one for all, {MEAN_KEPT:g} kept",
                own.kl / shared.kl, own.kl < shared.kl, "", own),
        *(
            Reading(PLAIN, name, lab.ratio(codec.name), None, "×", lab.quality(codec.name))
            for name, codec in codecs.items()
        ),
        Reading(PLAIN, "frames that two layers both keep, of those that one does",
                100 * overlap(masks), None, "%"),
    ]}  # fmt: skip


EXPERIMENTS = (
    Experiment("X10, weights", "weights of neighbouring layers", ("III-7",), no_codecs,
               _weights),
    Experiment("X10, SVD", "singular values", ("IV-8", "IV-8b"), _svd_codecs, _svd_answers),
    Experiment("X10, ranking", "rankings of tokens", ("IV-9",), _ranking_codecs, _ranking_answers),
)  # fmt: skip
