"""The report as a page of Markdown, as a table for a terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .catalogue import Claim
from .growing import WAYS
from .run import ClaimsReport, Row
from .verdicts import PLAIN, Measured, Reading, Verdict

if TYPE_CHECKING:
    from rich.table import Table


_WAYS = ("one cache, or as stated", "another way to count")


def to_json(report: ClaimsReport) -> str:
    return json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> ClaimsReport:
    """Undo `to_json`."""
    plain = json.loads(text)
    return ClaimsReport(
        plain["conditions"], Measured(**plain["forgetting"]), [_row(each) for each in plain["rows"]]
    )


def _row(plain: dict[str, Any]) -> Row:
    readings = [
        Reading(**{**each, "quality": each["quality"] and Measured(**each["quality"])})
        for each in plain["readings"]
    ]
    return Row(Claim(**plain["claim"]), plain["experiment"], readings, Verdict(**plain["verdict"]))


# --- words ------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits or a little more.

    >>> number(0.00512), number(63.08), number(525600.0), number(7.0), number(0.00001)
    ('0.00512', '63.1', '525,600', '7', '1e-05')
    """
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def measured(reading: Reading) -> str:
    """The number with its unit, and the quality."""
    words = f"{number(reading.value)}{reading.unit}"
    return words if reading.quality is None else f"{words}, {quality(reading.quality)}"


def quality(found: Measured) -> str:
    if not found.n_predictions:
        return "exact"
    return (
        f"KL {number(found.kl)} (99 %: {number(found.kl_p99)}), top-1 {found.top1:.4f}"
    )


def _cell(row: Row, plain: bool) -> str:
    """The readings that decide, under the plain basis or under the others."""
    chosen = [
        each for each in row.readings if each.holds is not None and (each.basis == PLAIN) == plain
    ]
    if not chosen:
        return "–"
    if len(chosen) > 3:
        held = sum(bool(each.holds) for each in chosen)
        first, last = measured(chosen[0]), measured(chosen[-1])
        return f"{first} … {last} ({held} of {len(chosen)} hold)"
    return "; ".join(map(measured, chosen))


# --- terminal ---------------------------------------------------------------------------------


def table(report: ClaimsReport) -> Table:
    """A rich table of all claims."""
    from rich.table import Table

    conditions = report.conditions
    made = Table(
        title=f"Claims of the TSC reports on {conditions['model']}, {conditions['text']}, "
        f"{report.forgetting.n_predictions} predictions; forgetting costs a KL of "
        f"{report.forgetting.kl:.3f}",
        title_justify="left", show_lines=True,
    )  # fmt: skip
    made.add_column("id", no_wrap=True)
    for name in ("stated", *_WAYS, "verdict"):
        made.add_column(name)
    for row in report.rows:
        made.add_row(
            row.claim.id, row.claim.stated, _cell(row, True), _cell(row, False), str(row.verdict)
        )
    return made


# --- page -------------------------------------------------------------------------------------

_HEAD = """# What the TSC reports claim, and what was measured

The reports on Temporal State Compression (solsticestudio.ai, 2026) say how much smaller a language
model's KV cache can be made. This page puts a measurement beside each claim. It is made by
`tsc eval --report claims`; no verdict on it is written by hand.

## Two ratios

- **One cache**: the bytes of one cache in fp16, as a serving engine holds it, over every byte that
  is needed to have it back: scales, codebooks, masks and headers too. This is what somebody saves
  who holds a conversation.
- **Another way to count**: whatever the report divides, or seems to divide. Most often that is the
  bytes of *all* saves of a growing conversation, in fp32, over the bytes that store them all.
  Such a ratio grows with the number of saves. It says nothing of one cache.

fp32 in place of fp16 alone doubles a ratio. Caches are fp16 when models are served.

## Words

- **reproduced**: true as stated; for a ratio, of one cache.
- **depends on the baseline**: not so, but true in the other way to count that is named.
- **refuted**: true in no way that was tried.
- **not answerable here**: with the reason.

A ratio counts as reached within 10 %, at the stated KL or a smaller one, and at the stated top-1
agreement less half a percent. (The reports' top-1 figures are multiples of a fifth, so they seem
to rest on five predictions each.) Where a claim states no quality, a KL of 0.1 is allowed, which
the reports call defensible. Other figures have to lie within 10 %.

KL compares next-token distributions behind the restored cache with those behind the original one,
in nats; beside the mean stands the 99th percentile. Top-1 is the share of positions where both find
the same token likeliest.
"""


def markdown(report: ClaimsReport) -> str:
    """The whole page."""
    parts = (_ways(report), _made_with(report), _summary(report), _details(report))
    return "\n".join([_HEAD, *(line for part in parts for line in part)]) + "\n"


def _ways(report: ClaimsReport) -> Iterator[str]:
    used = {each.basis for row in report.rows for each in row.readings}
    found = [name for name in WAYS if any(basis.startswith(name) for basis in used)]
    if found:
        yield "## Ways to count"
        yield ""
        for name in found:
            yield f"- *{name}*: {WAYS[name]}."
        yield ""


def _made_with(report: ClaimsReport) -> Iterator[str]:
    c, forgetting = report.conditions, report.forgetting
    yield "## Made with"
    yield ""
    yield (
        f"Model `{c['model']}` (weights {c['weights_blake3'][:16]}), text `{c['text']}`, "
        f"{c['frames'][0]} tokens in the cache, {c['n_windows']} places of the text, "
        f"{forgetting.n_predictions} predictions for each figure of quality, seed {c['seed']}. "
        "The reports' models are others, so their KL and ours do not compare digit by digit."
    )
    yield ""
    yield (
        f"Dropping the whole cache but for 4 tokens costs this model a KL of {forgetting.kl:.3f} "
        f"(99 %: {forgetting.kl_p99:.2f}) and leaves a top-1 agreement of {forgetting.top1:.3f}. "
        "A KL of that size means that the cache is gone; claims that state a larger one ask for "
        "nothing here."
    )
    yield ""


def _summary(report: ClaimsReport) -> Iterator[str]:
    yield "## Claims"
    yield ""
    counts = {word: 0 for word in dict.fromkeys(row.verdict.word for row in report.rows)}
    for row in report.rows:
        counts[row.verdict.word] += 1
    yield ", ".join(f"{n} {word}" for word, n in counts.items()) + "."
    yield ""
    columns = ("id", "what the report says", "stated", *_WAYS, "verdict")
    yield f"| {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|"
    for row in report.rows:
        claim = row.claim
        cells = (
            claim.id, claim.says, claim.stated, _cell(row, True), _cell(row, False),
            f"**{row.verdict.word}**{_detail(row.verdict)}",
        )  # fmt: skip
        yield "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"
    yield ""


def _detail(verdict: Verdict) -> str:
    return f": {verdict.detail}" if verdict.detail else ""


def _details(report: ClaimsReport) -> Iterator[str]:
    yield "## All measurements"
    yield ""
    yield (
        "*Holds* says whether the line meets what is stated; lines without it explain. A way to "
        "count holds if all its lines do."
    )
    for row in report.rows:
        if not row.readings:
            continue
        yield ""
        yield f"### {row.claim.id}"
        yield ""
        yield f"{row.claim.report}: {row.claim.says} Stated: {row.claim.stated}."
        yield ""
        yield "| counted as | what | measured | holds |"
        yield "|---|---|---|---|"
        for each in row.readings:
            basis = _WAYS[0] if each.basis == PLAIN else each.basis
            holds = {None: "", True: "yes", False: "no"}[each.holds]
            yield f"| {basis} | {each.what} | {measured(each)} | {holds} |"
