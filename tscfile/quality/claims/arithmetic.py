"""Experiment X11 and what else follows from numbers that the reports give, or from one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..codec import Codec, snapshot_from_arrays
from ..page_delta import PageDelta
from .calculators import REPORT_A100, REPORT_H100, Energy, Fleet, cache_bytes
from .lab import Answers, Experiment, Lab, no_codecs
from .verdicts import PLAIN, Reading, near

USERS = (2000, 5000, 10000)
WITHOUT, WITH = (7, 17, 34), (3, 3, 4)
SAVINGS = (504e3, 886e3, 1.35e6)
FLEET_BASIS = (
    "no weights on the GPUs, the shared prefix left out, and two GPUs more with compression"
)
MULTI_HEAD = "the model taken to have 32 heads of keys and values; it has 8"
TWO_CARDS = "MWh and litres of 300 W cards, tonnes and cars of 700 W cards"
SCALED = "a thousand fleets of 10,000 users, each with its own fixed part"
ASSUMED_DELTA = "a difference taken to be 0.1 % of a state"

_GPT2 = (12, 12, 64, 1024)
_LLAMA2 = (32, 32, 128, 4096)
_TREE = sum(4**level for level in range(6))


def _sizes(lab: Lab) -> Answers:
    gpt2, llama2 = cache_bytes(*_GPT2) / 1e6, cache_bytes(*_LLAMA2) / 1e9
    grouped, multi = (cache_bytes(32, heads, 128, 128_000) / 1e9 for heads in (8, 32))
    return {
        "I-8": [
            Reading(PLAIN, "GPT-2, 1024 tokens, fp16", gpt2, near(gpt2, 37.7), " MB"),
            Reading(PLAIN, "LLaMA-2-7B, 4096 tokens, fp16", llama2, near(llama2, 2.1), " GB"),
        ],
        "III-9": [
            Reading(PLAIN, "128,000 tokens of the 8B model (there is no 7B), 8 heads", grouped,
                    near(grouped, 67), " GB"),
            Reading(MULTI_HEAD, "128,000 tokens", multi, near(multi, 67), " GB"),
            Reading(MULTI_HEAD, "80 GB over 537 MB, no weights on the GPU", 80 / 0.537,
                    near(80 / 0.537, 150), " users"),
            Reading(PLAIN, "the 8B model at 125×, 16 GB of weights on the GPU",
                    (80 - 16) / (grouped / 125), None, " users"),
        ],
    }  # fmt: skip


def _fleet(lab: Lab) -> Answers:
    ours, theirs = Fleet(), Fleet.of_report()
    gpus, dollars = [], []
    for fleet, basis in ((ours, PLAIN), (theirs, FLEET_BASIS)):
        for users, without, with_ in zip(USERS, WITHOUT, WITH, strict=True):
            found = fleet.without(users), fleet.with_compression(users)
            gpus += [
                Reading(basis, f"{users} users, {kind}", value, value == stated, " GPUs")
                for kind, value, stated in zip(
                    ("without", "with"), found, (without, with_), strict=True
                )
            ]
        for users, stated in zip(USERS, SAVINGS, strict=True):
            saving = fleet.saving(users)
            dollars.append(
                Reading(basis, f"{users} users at 2 $ an hour", saving, near(saving, stated), " $")
            )
    for users, stated in zip(USERS, SAVINGS, strict=True):
        price = theirs.implied_price(users, stated)
        dollars.append(
            Reading(FLEET_BASIS, f"{users} users: the price that gives the stated saving", price,
                    None, " $ an hour")
        )  # fmt: skip
    return {"IV-7": gpus, "IV-7b": dollars}


def _energy(lab: Lab) -> Answers:
    stated = {"mwh": 102.0, "tonnes_a100": 40.0, "tonnes_h100": 93.0, "cars": 20.0,
              "litres": 184_500.0}  # fmt: skip
    a, h = REPORT_A100, REPORT_H100

    def all_of(basis: str, small: Energy, large: Energy) -> list[Reading]:
        mwh, litres = small.mwh(30), small.litres(30)
        tonnes, cars = large.tonnes(30), large.cars(30)
        return [
            Reading(basis, f"30 GPUs of {small.watts:.0f} W", mwh, near(mwh, stated["mwh"]),
                    " MWh"),
            Reading(basis, f"30 GPUs of {small.watts:.0f} W", litres,
                    near(litres, stated["litres"]), " L"),
            Reading(basis, f"30 GPUs of {large.watts:.0f} W", tonnes,
                    near(tonnes, stated["tonnes_h100"]), " t"),
            Reading(basis, f"30 GPUs of {large.watts:.0f} W", cars, near(cars, stated["cars"]),
                    " cars"),
        ]  # fmt: skip

    scaled = 1000 * (WITHOUT[-1] - WITH[-1])
    fleet = Fleet.of_report()
    direct = fleet.without(10_000_000) - fleet.with_compression(10_000_000)
    return {
        "G-1": [
            *all_of(PLAIN, h, h),
            *all_of(TWO_CARDS, a, h),
            Reading(TWO_CARDS, "30 GPUs, 300 W cards", a.tonnes(30),
                    near(a.tonnes(30), stated["tonnes_a100"]), " t"),
            Reading(TWO_CARDS, "PUE 1.3, 0.390 kg CO2 and 1.8 L a kWh, 4.6 t a car; full power all "
                    "year", 1.3, None),
        ],
        "G-2": [
            Reading(PLAIN, "the fleet formula at 10 million users", direct, direct == scaled,
                    " GPUs"),
            Reading(SCALED, "1000 × (34 - 4)", scaled, near(scaled, 30_000), " GPUs"),
        ],
    }  # fmt: skip


def _tree(lab: Lab) -> Answers:
    ratio = _TREE / (1 + (_TREE - 1) * 0.001)
    return {"D-2": [
        Reading(ASSUMED_DELTA, "states of a tree of 4 branches and 5 levels", _TREE,
                _TREE == 1365),
        Reading(ASSUMED_DELTA, "1365 states, one whole and a thousandth for each other", ratio,
                near(ratio, 593), "×"),
    ]}  # fmt: skip


def _readers(lab: Lab) -> Answers:
    """Both kinds of cache objects make the same snapshot."""
    import torch
    from transformers import DynamicCache

    from ...sources.hf_cache import from_cache

    cache = lab.caches[0].head(min(32, lab.length))
    pairs = [
        (torch.from_numpy(np.array(k))[None], torch.from_numpy(np.array(v))[None])
        for k, v in zip(cache.keys, cache.values, strict=True)
    ]
    known = {"tokens": cache.shape.tokens, "model": cache.shape.identity}
    snapshots = [
        snapshot_from_arrays(cache), from_cache(tuple(pairs), **known),
        from_cache(DynamicCache(ddp_cache_data=pairs), **known),
    ]  # fmt: skip
    rows = [
        [part.tobytes() for track in each.tracks for part in track.read(0, len(track.cells))]
        for each in snapshots
    ]
    same = sum(each == rows[0] for each in rows[1:])
    return {"III-10": [
        Reading(PLAIN, "tuples and DynamicCache give the same rows, of 2 kinds", same, same == 2)
    ]}  # fmt: skip


def _doubling_codecs(lab: Lab) -> Sequence[Codec]:
    return [PageDelta(64, "fp32")]


def _doubling(lab: Lab) -> Answers:
    result = lab.result(PageDelta(64, "fp32").name)
    against = [size * result.raw_bytes / 2 / result.stored_bytes for size in (2, 4)]
    return {"IV-10": [
        Reading(PLAIN, f"I-2 in one cache: {against[1]:.2f}× against fp32 over {against[0]:.2f}× "
                "against fp16", against[1] / against[0], near(against[1] / against[0], 2), "×")
    ]}  # fmt: skip


EXPERIMENTS = (
    Experiment("X11, sizes", "sizes of caches", ("I-8", "III-9"), no_codecs, _sizes),
    Experiment("X11, fleet", "the fleet", ("IV-7", "IV-7b"), no_codecs, _fleet),
    Experiment("X11, energy", "energy, carbon, water", ("G-1", "G-2"), no_codecs, _energy),
    Experiment("arithmetic", "a tree of states", ("D-2",), no_codecs, _tree),
    Experiment("readers", "kinds of cache objects", ("III-10",), no_codecs, _readers),
    Experiment("baseline", "fp32 against fp16", ("IV-10",), _doubling_codecs, _doubling),
)  # fmt: skip
