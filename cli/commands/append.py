"""``tsc append``"""

from __future__ import annotations

from pathlib import Path

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


@click.command("append")
@archive_argument
@click.argument("source", type=click.Path(path_type=Path, allow_dash=True))
@tier_options("Quality tier; that of the save before, if any.")
@book_option
@click.option("--no-wait", is_flag=True, help="Fail if another process is appending.")
@model_option
@quiet_option
@json_option
def command(
    archive: Path, source: Path, tier: str | None, tiers: str | None, book: Path | None,
    no_wait: bool, model: Path | None, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Add SOURCE, a later save of the same conversation, to ARCHIVE.

    Only the frames that are not in ARCHIVE yet are stored.
    """
    from tscfile.packing import append
    from tscfile.sources import identity_for, open_source

    identity = model_identity(model)
    with input_file(source) as path:
        snapshot = open_source(path)
        identity = identity_for(snapshot, identity)
        with progress("appending", snapshot.raw_bytes, quiet) as advance:
            report = append(
                snapshot, archive, tier=chosen_tiers(tier, tiers), book=book, identity=identity,
                wait=not no_wait, progress=advance, name=source.name,
            )  # fmt: skip
    if as_json:
        print_json(report)
    changed = f", {report.n_frames_changed} recomputed" if report.n_frames_changed else ""
    say(
        f"{archive}: snapshot {report.snapshot} ({report.plan}): {report.n_frames_kept} frames "
        f"kept, {report.n_frames_new} new{changed}; {size(report.bytes_added)} added"
        + fallback(report),
        quiet or as_json,
    )
