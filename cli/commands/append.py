"""``tsc append``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..options import (
    archive_argument,
    book_option,
    chosen_tiers,
    fallback,
    input_file,
    json_option,
    model_identity,
    model_option,
    print_json,
    progress,
    quiet_option,
    say,
    size,
    tier_options,
)
from ..saves import check_many, min_common_option, sources_argument, tell

if TYPE_CHECKING:
    from tscfile.collecting import PackOptions


@click.command("append")
@archive_argument
@sources_argument
@tier_options("Quality tier; that of the save before, if any.")
@book_option
@min_common_option
@click.option("--no-wait", is_flag=True, help="Fail if another process is appending.")
@model_option
@quiet_option
@json_option
def command(
    archive: Path, sources: tuple[Path, ...], tier: str | None, tiers: str | None,
    book: Path | None, min_common: int | None, no_wait: bool, model: Path | None, quiet: bool,
    as_json: bool,
) -> int:  # fmt: skip
    """Add SOURCES, later saves of the same conversation, to ARCHIVE.

    Only the frames that are not in ARCHIVE yet are stored. Several sources, or a folder of them,
    are put in order by their tokens; those that ARCHIVE was given that way before are left out.
    """
    from tscfile.collecting import PackOptions

    options = PackOptions(
        chosen_tiers(tier, tiers), book, identity=model_identity(model), wait=not no_wait
    )
    if len(sources) > 1 or sources[0].is_dir():
        return _append_many(archive, sources, options, min_common, quiet, as_json)
    _append_one(archive, sources[0], options, quiet, as_json)
    return 0


def _append_one(
    archive: Path, source: Path, options: PackOptions, quiet: bool, as_json: bool
) -> None:
    from tscfile.packing import append
    from tscfile.sources import identity_for, open_source

    with input_file(source) as path:
        snapshot = open_source(path)
        with progress("appending", snapshot.raw_bytes, quiet) as advance:
            report = append(
                snapshot, archive, tier=options.tier, book=options.book,
                identity=identity_for(snapshot, options.identity), wait=options.wait,
                progress=advance, name=source.name,
            )  # fmt: skip
    if as_json:
        print_json(report)
    changed = f", {report.n_frames_changed} recomputed" if report.n_frames_changed else ""
    changed += f", {report.n_frames_moved} moved" if report.n_frames_moved else ""
    say(
        f"{archive}: snapshot {report.snapshot} ({report.plan}): {report.n_frames_kept} frames "
        f"kept, {report.n_frames_new} new{changed}; {size(report.bytes_added)} added"
        + fallback(report),
        quiet or as_json,
    )


def _append_many(
    archive: Path, sources: tuple[Path, ...], options: PackOptions, min_common: int | None,
    quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    from itertools import chain

    from tscfile.collecting import append_saves, read_saves, saves_in
    from tscfile.conversations import MIN_COMMON

    check_many(sources)
    paths = saves_in(sources)
    if not paths:
        raise click.UsageError(f"{sources[0]}: holds no saves")
    saves, broken = read_saves(paths, options.identity)
    with progress("appending", sum(save.raw_bytes for save in saves), quiet) as advance:
        reports = append_saves(
            saves, archive, options, min_common=min_common or MIN_COMMON, progress=advance
        )
        return tell(chain(broken, reports), len(paths), as_json, quiet)
