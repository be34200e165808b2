"""``tsc compact``"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from ..options import (
    STDIO,
    archive_argument,
    book_option,
    check_apart,
    chosen_tiers,
    force_option,
    json_option,
    output_file,
    print_json,
    progress,
    quiet_option,
    say,
    size,
    tier_options,
)


@click.command("compact")
@archive_argument
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="The archive to make; in place of ARCHIVE by default.",
)  # fmt: skip
@click.option("--drop", metavar="N[,N]", default="", help="Saves to leave out, by number.")
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N",
              help="Leave out all saves but the last N.")  # fmt: skip
@tier_options("Tier to put the saves into; all must be exact. None changes by default.")
@book_option
@click.option("--no-wait", is_flag=True, help="Fail if another process is writing to ARCHIVE.")
@force_option
@quiet_option
@json_option
def command(
    archive: Path, output: Path | None, drop: str, keep_last: int | None, tier: str | None,
    tiers: str | None, book: Path | None, no_wait: bool, force: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write ARCHIVE again, without the saves that are dropped, in full blocks.

    What is stored of a save that is kept stays: exact rows bit for bit, of lossy tiers the integers
    that rows are made of; but for --tier, which codes all saves anew. ARCHIVE is replaced once the
    new file is whole and on the disk.
    """
    from tscfile.archive import Archive
    from tscfile.compaction import compact
    from tscfile.description import describe

    try:
        dropped = [int(number) for number in drop.split(",") if number.strip()]
    except ValueError:
        raise click.UsageError(f"--drop {drop}: give numbers of saves such as 0,2") from None
    if dropped and keep_last is not None:
        raise click.UsageError("give --drop or --keep-last, not both")
    if output is not None:
        check_apart(archive, output)
    with Archive(archive, book=book) as opened:
        if keep_last is not None:
            dropped = list(range(max(len(opened) - keep_last, 0)))
        total = sum(snapshot.raw_bytes for snapshot in describe(opened).snapshots)
    with (
        output_file(output) if output is not None else nullcontext() as target,
        progress("compacting", total, quiet) as advance,
    ):
        report = compact(
            archive, target, drop=dropped, tier=chosen_tiers(tier, tiers), book=book, force=force,
            wait=not no_wait, progress=advance,
        )  # fmt: skip
    if as_json and str(output) != STDIO:
        print_json(report)
    say(
        f"{output or archive}: {report.n_snapshots} of {report.snapshots_before} snapshots, "
        f"{report.n_blocks} blocks ({report.blocks_before} before), {size(report.file_bytes)} "
        f"({size(report.bytes_before)} before)",
        quiet or as_json,
    )
