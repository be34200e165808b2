"""What commands that take many saves share: which saves, and what is said of each."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .options import STDIO, fallback, print_json, printable, say, size

if TYPE_CHECKING:
    from tscfile.collecting import SaveReport

F = TypeVar("F", bound=Callable[..., Any])


def sources_argument(function: F) -> F:
    kind = click.Path(path_type=Path, allow_dash=True, readable=False)
    return click.argument("sources", nargs=-1, required=True, type=kind)(function)


def min_common_option(function: F) -> F:
    return click.option(
        "--min-common", type=click.IntRange(min=1), metavar="N",
        help="First tokens that saves of one conversation share, 32 by default: more than a "
        "system prompt has, if many conversations begin with it.",
    )(function)  # fmt: skip


def check_many(sources: Iterable[Path]) -> None:
    if any(str(source) == STDIO for source in sources):
        raise click.UsageError("standard input is one save; give it alone")


def tell(reports: Iterable[SaveReport], n_sources: int, as_json: bool, quiet: bool) -> int:
    """Print what became of each save as it is known; returns the exit code."""
    told: list[SaveReport] = []
    silent = quiet or as_json
    for report in reports:
        if report.problem is None and all(each.problem is not None for each in told):
            say(f"{'plan':<16}{'kept':>8}{'new':>8}{'added':>10}  save", silent)
        tell_one(report, silent)
        told.append(report)
    if as_json:
        print_json([dataclasses.asdict(report) for report in told])
    codes = [report.exit_code for report in told if report.problem is not None]
    _sum_up(told, silent)
    # Alone it is the command's own error.
    return (codes[0] if n_sources == 1 else 1) if codes else 0


def tell_one(report: SaveReport, quiet: bool) -> None:
    """One line: what a save cost, or, whether quiet or not, why it was not taken."""
    if report.problem is None:
        say(_line(report), quiet)
    else:
        print(f"tsc: {printable(report.problem)}", file=sys.stderr)


def _line(report: SaveReport) -> str:
    stored, deleted = report.report, ", deleted" if report.deleted else ""
    if stored is None:
        return f"{'stored already':<16}{'':>26}  {report.source} in {report.archive}{deleted}"
    changed = f", {stored.n_frames_changed} recomputed" if stored.n_frames_changed else ""
    return (
        f"{stored.plan:<16}{stored.n_frames_kept:>8}{stored.n_frames_new:>8}"
        f"{size(stored.bytes_added):>10}  {report.source} in {report.archive}, snapshot "
        f"{stored.snapshot}{changed}{fallback(stored)}{deleted}"
    )


def _sum_up(told: list[SaveReport], quiet: bool) -> None:
    stored = [report.report for report in told if report.report is not None]
    archives = {report.archive for report in told if report.archive is not None}
    if stored:
        raw, added = (sum(getattr(each, key) for each in stored)
                      for key in ("raw_bytes", "bytes_added"))  # fmt: skip
        say(
            f"{len(stored)} saves in {len(archives)} archive{'s' * (len(archives) > 1)}: "
            f"{size(raw)} of keys and values in {size(added)} ({raw / added:.4g}x)",
            quiet,
        )
