"""Experiment X9: users that share a prefix, and turns of a conversation, in real archives."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from ..arrays import KVArrays
from ..codec import Codec, TierCodec, snapshot_from_arrays
from ..peers.rotated import RotatedUniform
from .calculators import shared_prefix_factor
from .catalogue import BY_ID
from .lab import Answers, Experiment, Lab
from .verdicts import PLAIN, Reading, near, reaches

N_USERS, N_TURNS = 8, 4
FRAMES = 512
"""Tokens of a user."""

FLEET_SHARE, LARGE_SHARE = 0.5, 0.8
"""Share of a user's tokens that all users have: in the reports' fleet, and at the top of what their
factors need."""

MOSTLY_SHARED = "a cache for each user, four fifths of whose tokens all users share"
HALF_SHARED = "a cache for each user, half of whose tokens all users share"
TURNS_KEPT = "a whole cache kept for each of four turns"
BOTH = f"{MOSTLY_SHARED}; {TURNS_KEPT}"


def _codecs(lab: Lab) -> Sequence[Codec]:
    return [RotatedUniform(4, 2, group=lab.page)]


def _own_size(cache: KVArrays) -> int:
    return len(TierCodec("lossless").encode(cache))


def joined(cache: KVArrays, other: KVArrays, n_shared: int) -> KVArrays:
    """The first ``n_shared`` frames of one cache and what follows them in another, as a server has
    them that reads a shared prefix once."""
    tokens = np.concatenate([cache.shape.tokens[:n_shared], other.shape.tokens[n_shared:]])
    roles = [
        [
            np.concatenate([a[:, :n_shared], b[:, n_shared:]], axis=1)
            for a, b in zip(ours, theirs, strict=True)
        ]
        for ours, theirs in ((cache.keys, other.keys), (cache.values, other.values))
    ]
    return KVArrays(replace(cache.shape, tokens=tokens), *roles)


def users(lab: Lab, share: float) -> list[KVArrays]:
    """Caches of `N_USERS` users with a share of their tokens in common; what is each one's own is
    read behind the shared part."""
    documents = [lab.engine.tokenize(document) for document in lab.text.documents]
    ids = np.concatenate(documents)
    n = min(FRAMES, lab.length, len(ids) // (N_USERS + 1))
    n_shared = int(share * n)
    prefix = ids[:n_shared]
    base = lab.engine.prefill(ids[:n])
    found = []
    for user in range(N_USERS):
        own = ids[n * (user + 1) : n * (user + 1) + n - n_shared]
        whole = lab.engine.prefill(np.concatenate([prefix, own]).astype(np.int32))
        found.append(joined(base, whole, n_shared))
    return found


def archived_once(caches: Sequence[KVArrays]) -> int:
    """Bytes of one lossless archive of all caches, each appended to those before."""
    from ...packing import append, pack

    with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
        path = Path(folder) / "users.tsc"
        pack(snapshot_from_arrays(caches[0]), path, tier="lossless")
        for cache in caches[1:]:
            append(snapshot_from_arrays(cache), path, tier="lossless")
        return path.stat().st_size


def prefix_factor(lab: Lab, share: float) -> float:
    """Bytes of an archive for each user over one archive of all."""

    def make() -> object:
        caches = users(lab, share)
        return sum(map(_own_size, caches)) / archived_once(caches)

    return cast("float", lab.remember(f"prefix {share}", make))


def _turns(lab: Lab) -> tuple[int, int, int]:
    """Bytes of an archive for each turn together, of one archive of all, and of the last alone."""

    def make() -> object:
        cache = lab.caches[0].head(min(FRAMES, lab.length))
        n = cache.shape.n_tokens
        saves = [cache.head(n * turn // N_TURNS) for turn in range(1, N_TURNS + 1)]
        return sum(map(_own_size, saves)), archived_once(saves), _own_size(saves[-1])

    return cast("tuple[int, int, int]", lab.remember("turns", make))


def _answers(lab: Lab) -> Answers:
    half, most = (prefix_factor(lab, share) for share in (FLEET_SHARE, LARGE_SHARE))
    every, once, last = _turns(lab)
    turns, live = every / once, last / once
    name = RotatedUniform(4, 2, group=lab.page).name
    one, quality = lab.ratio(name), lab.quality(name)
    product = most * turns * one
    prefix = [
        Reading(PLAIN, f"half of the tokens shared, as in the reports' fleet, {N_USERS} users: an "
                f"archive for each over one of all (arithmetic {_factor(FLEET_SHARE)})", half,
                near(half, 3, 5), "×"),
        Reading(PLAIN, "the same with any number of users, at most", 1 / (1 - FLEET_SHARE), None,
                "×"),
        Reading(MOSTLY_SHARED, f"{N_USERS} users (arithmetic {_factor(LARGE_SHARE)})", most,
                near(most, 3, 5), "×"),
    ]  # fmt: skip
    by_turn = [
        Reading(PLAIN, "the last turn's own archive over that of all turns: a live service keeps "
                "one cache", live, near(live, 2, 3), "×"),
        Reading(TURNS_KEPT, "an archive for each turn over one of all (arithmetic "
                f"{(N_TURNS + 1) / 2:.1f}×)", turns, near(turns, 2, 3), "×"),
    ]  # fmt: skip

    def service(number: str) -> list[Reading]:
        stated = BY_ID[number].ratio
        return [
            Reading(PLAIN, "K4/V2 rotated", one, reaches(one, stated, quality), "×", quality),
            Reading(HALF_SHARED, "K4/V2 and half of the tokens shared",
                    one * half, reaches(one * half, stated, quality), "×", quality),
            Reading(BOTH, f"{most:.2f} for users × {turns:.2f} for turns × {one:.2f} for bits",
                    product, reaches(product, stated, quality), "×", quality),
        ]  # fmt: skip

    return {
        "IV-4": prefix, "IV-5": by_turn, "IV-6": service("IV-6"), "SV-6": service("SV-6"),
    }  # fmt: skip


def _factor(share: float) -> str:
    return f"{shared_prefix_factor(share, N_USERS):.2f}×"


EXPERIMENTS = (
    Experiment("X9", "users and turns", ("IV-4", "IV-5", "IV-6", "SV-6"), _codecs, _answers),
)  # fmt: skip
