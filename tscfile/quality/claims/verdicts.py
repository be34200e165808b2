"""Rules that turn measurements into words; nothing here is a matter of taste.

A claim is tried under one or more *bases*: ways to count and to set up what it says. `PLAIN` is the
configuration that the report names, taken as it stands; a ratio is then that of one fp16 cache to
every byte that is needed to have it back. A basis holds if each of its readings holds, and

- *reproduced*: the plain basis holds;
- *depends on the baseline*: it does not, but another one does, which is named;
- *refuted*: none holds;
- *not answerable here*: nothing was tried.

A ratio holds if it is at least `NEAR` of the stated one with a quality as stated or better: a KL
of at most the stated one, and a top-1 agreement that is lower by at most `TOP1_SLACK`. Any other
number holds if it is within `TOLERANCE` of the stated one, or inside the stated range widened by
that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol import Quality

PLAIN = "plain"

TOLERANCE = 0.1
NEAR = 1 - TOLERANCE
TOP1_SLACK = 0.005
"""Share of predictions. The reports' agreements are multiples of a fifth: of five predictions."""

DEFENSIBLE_KL = 0.1
"""The reports' own limit (part II), taken where a claim states no quality."""

REPRODUCED, REFUTED = "reproduced", "refuted"
DEPENDS, NOT_ANSWERABLE = "depends on the baseline", "not answerable here"


@dataclass(frozen=True)
class Measured:
    """Quality of a cache in place of the original: of next-token distributions, in nats."""

    kl: float
    kl_p99: float
    top1: float
    perplexity_delta: float
    n_predictions: int

    @classmethod
    def of(cls, quality: Quality) -> Measured:
        return cls(
            quality.kl_mean, quality.kl_p99, quality.top1, quality.perplexity_delta,
            quality.n_predictions,
        )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One thing that was measured for a claim. ``what`` says what; ``holds`` is None where it only
    explains and decides nothing."""

    basis: str
    what: str
    value: float
    holds: bool | None
    unit: str = ""
    quality: Measured | None = None


@dataclass(frozen=True)
class Verdict:
    word: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.detail}" if self.detail else self.word


def decide(
    readings: Sequence[Reading], why_not: str = "", note: str = "", ratio: float = 0.0
) -> Verdict:
    """The verdict on the readings of one claim; ``why_not``: why there may be none; ``note``: what
    to bear in mind with any other; ``ratio``: the stated one, to say what a refuted claim lacks.

    >>> good, bad = (Reading(PLAIN, "", 1.0, holds) for holds in (True, False))
    >>> print(decide([good]), "/", decide([good, bad]))
    reproduced / refuted: 1 of 2 measurements hold
    >>> print(decide([bad, Reading("all saves in fp32", "", 9.0, True)]))
    depends on the baseline: all saves in fp32
    """
    tried = [each for each in readings if each.holds is not None]
    if not tried:
        return Verdict(NOT_ANSWERABLE, why_not)
    bases = dict.fromkeys(each.basis for each in tried)
    holding = [
        basis for basis in bases if all(each.holds for each in tried if each.basis == basis)
    ]
    if PLAIN in holding:
        return Verdict(REPRODUCED, note)
    if not holding:
        return Verdict(REFUTED, _lacking(tried, ratio))
    return Verdict(DEPENDS, "; ".join(holding) + (f" ({note})" if note else ""))


def _lacking(tried: Sequence[Reading], ratio: float) -> str:
    """What is missing where nothing holds."""
    if not ratio:
        held = sum(bool(each.holds) for each in tried)
        return f"{held} of {len(tried)} measurements hold" if len(tried) > 1 else ""
    reached = next((each for each in tried if reaches(each.value, ratio)), None)
    if reached is None or reached.quality is None:
        return "no way to count gives the ratio"
    found = reached.quality
    return (
        f"the ratio is reached ({reached.basis}), but not with the quality: KL {found.kl:.4f}, "
        f"top-1 {found.top1:.4f} of {found.n_predictions} predictions"
    )


RATIO_ALONE = "of the ratio alone, as the stated KL is more than losing the whole cache costs here"


def note_of(kl: float | None, forgetting: float) -> str:
    """A stated KL above that of forgetting asks for nothing."""
    return RATIO_ALONE if kl is not None and kl >= forgetting else ""


def near(value: float, low: float, high: float | None = None) -> bool:
    """Is a number within `TOLERANCE` of the stated one, or of the stated range?

    >>> near(0.95, 1.0), near(0.5, 1.0), near(5.4, 3.0, 5.0)
    (True, False, True)
    """
    top = low if high is None else high
    return low * NEAR <= value <= top * (1 + TOLERANCE)


def reaches(
    ratio: float, stated: float, quality: Measured | None = None, *, kl: float | None = None,
    top1: float | None = None,
) -> bool:  # fmt: skip
    """Is a stated ratio reached at the stated quality? Without a stated quality, `DEFENSIBLE_KL`
    is asked for where a quality was measured."""
    if ratio < NEAR * stated:
        return False
    if quality is None:
        return True
    allowed = DEFENSIBLE_KL if kl is None else kl
    return quality.kl <= allowed and (top1 is None or quality.top1 >= top1 - TOP1_SLACK)
