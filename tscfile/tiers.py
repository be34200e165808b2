"""Named operating points and the codec each one starts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import registry
from .errors import UsageError


@dataclass(frozen=True)
class Tier:
    """``codec``: what new frames are tried with first; None where no frames are stored, only what
    they can be computed again from. ``exact``: what comes back is bit for bit what went in.

    ``tolerance``: without a book, the mean squared error in units of `tscfile.session_learning`,
    chosen so that the reference model's KL is half of the target on its calibration text: other
    text came out up to 1.8 times as high.
    """

    name: str
    codec: int | None
    exact: bool
    tolerance: float = 0.0


TOKENS = "tokens"
# The finest first.
TIERS = {
    "lossless": Tier("lossless", registry.FIELDS_CLASSED_RANS, exact=True),
    "near": Tier("near", registry.BOOK_TRANSFORM, exact=False, tolerance=0.015),
    "balanced": Tier("balanced", registry.BOOK_TRANSFORM, exact=False, tolerance=0.08),
    "compact": Tier("compact", registry.BOOK_TRANSFORM, exact=False, tolerance=0.22),
    "archive": Tier("archive", registry.BOOK_TRANSFORM, exact=False),
    TOKENS: Tier(TOKENS, None, exact=False),
}
CUSTOM = Tier("custom", registry.BOOK_TRANSFORM, exact=False)
"""What a snapshot is packed with that was given a target in place of a tier."""

DEFAULT_TIER, DEFAULT_BOOK_TIER = "lossless", "balanced"


def tiers_from_names(names: str | Sequence[str]) -> list[Tier]:
    """One tier, or the tiers of quality layers from the base to the finest.

    `UsageError` for names that are unknown or cannot be layers of one file in this order.

    >>> [tier.name for tier in tiers_from_names(["archive", "lossless"])]
    ['archive', 'lossless']
    """
    names = [names] if isinstance(names, str) else list(names)
    found = [tier_from_name(name) for name in names]
    if not found:
        raise UsageError("name at least one tier")
    if len(set(names)) < len(names) or any(tier.exact for tier in found[:-1]):
        raise UsageError(
            f"tiers {','.join(names)}: name each once, the coarsest first and lossless last"
        )
    if len(found) > 1 and (CUSTOM in found or any(tier.codec is None for tier in found)):
        raise UsageError(
            f"tiers {','.join(names)}: layers hold frames at named tiers; tokens are in every file"
        )
    return found


def tier_from_name(name: str) -> Tier:
    """The tier called ``name``; `UsageError` with the known names if there is none."""
    if name == CUSTOM.name:
        return CUSTOM
    if name not in TIERS:
        raise UsageError(f"tier {name!r} is unknown; known are {', '.join(TIERS)}")
    return TIERS[name]
