"""Runs the experiments and puts a verdict beside each claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..calibration import Calibration
from ..codec import Codec
from ..engine import Engine
from ..protocol import Progress, evaluate
from ..windows import Text
from . import arithmetic, bit_widths, codebooks, negatives, serving, temporal
from .catalogue import BY_ID, CLAIMS, Claim
from .lab import Answers, Experiment, Lab
from .verdicts import Measured, Reading, Verdict, decide, note_of

EXPERIMENTS: tuple[Experiment, ...] = tuple(
    each
    for module in (temporal, codebooks, bit_widths, serving, negatives, arithmetic)
    for each in module.EXPERIMENTS
)


@dataclass(frozen=True)
class Row:
    """``experiment``: the name of the one that answers, empty where there is none."""

    claim: Claim
    experiment: str
    readings: list[Reading]
    verdict: Verdict


@dataclass(frozen=True)
class ClaimsReport:
    """``conditions``: as in `tscfile.quality.protocol.Report`. ``forgetting``: what it costs to
    drop the cache but for 4 frames, and so the worst there is."""

    conditions: dict[str, Any]
    forgetting: Measured
    rows: list[Row]

    def row(self, number: str) -> Row:
        return next(each for each in self.rows if each.claim.id == number)


def choose(only: Sequence[str]) -> list[Experiment]:
    """The experiments that answer the claims ``only``, all if it is empty; `UsageError` for an id
    that no claim has."""
    unknown = [each for each in only if each not in BY_ID]
    if unknown:
        raise UsageError(f"claim {unknown[0]!r} is unknown; known are {', '.join(BY_ID)}")
    return [each for each in EXPERIMENTS if not only or set(each.ids) & set(only)]


def codecs_of(lab: Lab, experiments: Sequence[Experiment]) -> list[Codec]:
    """What has to be measured, each codec once."""
    found = {codec.name: codec for each in experiments for codec in each.codecs(lab)}
    return list(found.values())


def judge(
    engine: Engine,
    text: Text,
    *,
    frames: int = 768,
    n_windows: int = 8,
    seed: int = 0,
    only: Sequence[str] = (),
    calibration: Calibration | None = None,
    book: Path | None = None,
    steps: Callable[[int], None] = lambda total: None,
    progress: Progress = lambda words: None,
) -> ClaimsReport:
    """Measure what the claims ``only`` need, all by default, and decide on them.

    ``steps`` is told once how often ``progress`` is going to be called. Raises as
    `tscfile.quality.protocol.evaluate` does, and `UsageError` for an unknown claim.
    """
    experiments = choose(only)
    lab = Lab(engine, text, frames, n_windows, seed, calibration, book)
    codecs = codecs_of(lab, experiments)
    steps(lab.plan.n_steps(len(codecs)) + len(experiments))
    lab.report = evaluate(
        engine, text, codecs, lab.plan, calibration=calibration, progress=progress
    )
    answers: Answers = {}
    by_id: dict[str, str] = {}
    for each in experiments:
        progress(each.title)
        found = each.answer(lab)
        answers |= found
        by_id |= dict.fromkeys(found, each.name)
    forgetting = Measured.of(lab.report.reference(frames).forgetting)
    rows = []
    for claim in CLAIMS:
        if not only or claim.id in only:
            readings = answers.get(claim.id, [])
            note = note_of(claim.kl, forgetting.kl)
            verdict = decide(readings, claim.why_not, note, claim.ratio)
            rows.append(Row(claim, by_id.get(claim.id, ""), readings, verdict))
    return ClaimsReport(lab.report.conditions, forgetting, rows)
