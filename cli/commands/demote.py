"""``tsc demote``"""

from __future__ import annotations

from pathlib import Path

import click

from tscfile.tiers import TIERS

from ..options import (
    STDIO,
    archive_argument,
    book_option,
    check_apart,
    force_option,
    json_option,
    output_file,
    print_json,
    progress,
    quiet_option,
    say,
    size,
)


@click.command("demote")
@archive_argument
@click.option("--to", "tier", required=True, type=click.Choice(list(TIERS)),
              help="The finest tier to keep.")  # fmt: skip
@click.option(
    "-o", "--output", required=True,
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True), help="The archive to make.",
)  # fmt: skip
@book_option
@force_option
@quiet_option
@json_option
def command(
    archive: Path, tier: str, output: Path, book: Path | None, force: bool, quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Copy ARCHIVE without its quality layers above a tier.

    What is kept is copied as it is, not coded again; saves of coarser tiers stay. ARCHIVE stays.
    '-' as output writes to standard output.
    """
    from tscfile.demotion import demote

    check_apart(archive, output)
    total = archive.stat().st_size if archive.exists() else 0
    with (
        output_file(output) as target,
        progress("copying", total, quiet) as advance,
    ):
        report = demote(archive, target, tier, book=book, force=force, progress=advance)
    if as_json and str(output) != STDIO:
        print_json(report)
    say(
        f"{output}: {report.n_demoted} of {report.n_snapshots} snapshots cut down to {tier}, "
        f"{size(report.bytes_before)} before, {size(report.file_bytes)} now",
        quiet or as_json,
    )
