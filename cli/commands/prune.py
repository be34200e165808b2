"""``tsc prune``"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from ..options import SizeType, json_option, print_json, printable, quiet_option, say, size


@click.command("prune")
@click.argument("folder", metavar="DIR",
                type=click.Path(exists=True, file_okay=False, path_type=Path))  # fmt: skip
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N",
              help="Archives to keep whatever their size, the newest; 1 by default.")  # fmt: skip
@click.option("--max-bytes", type=SizeType(), metavar="SIZE",
              help="Remove no more once the rest takes no more than this: 10G, 500M, 1.5GiB.",
              )  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@quiet_option
@json_option
def command(
    folder: Path, keep_last: int | None, max_bytes: int | None, dry_run: bool, quiet: bool,
    as_json: bool,
) -> int:  # fmt: skip
    """Remove archives from DIR, the least recently written first.

    With --max-bytes only as many as it takes, without it all but the newest. Other files, links
    and folders in DIR are left alone.
    """
    from tscfile.pruning import prune

    if keep_last is None and max_bytes is None:
        raise click.UsageError("say what is to stay: --keep-last N, --max-bytes SIZE or both")
    report = prune(folder, keep_last=keep_last or 1, max_bytes=max_bytes, dry_run=dry_run)
    if as_json:
        sums = {"freed_bytes": report.freed_bytes, "kept_bytes": report.kept_bytes}
        print_json(dataclasses.asdict(report) | sums)
    silent = quiet or as_json
    for archive in report.removed:
        verb = "would remove" if dry_run else "removed"
        say(f"{verb} {archive.path}, {size(archive.n_bytes)}", silent)
    for problem in report.problems:
        print(f"tsc: {printable(problem)}", file=sys.stderr)
    over = max_bytes is not None and report.kept_bytes > max_bytes
    say(
        f"{folder}: {len(report.removed)} archives {'to remove' if dry_run else 'removed'}, "
        f"{size(report.freed_bytes)} freed; {len(report.kept)} kept, {size(report.kept_bytes)}"
        f"{', which is more than was asked for' if over else ''}",
        silent,
    )
    return 1 if report.problems else 0
