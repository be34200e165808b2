"""``tsc verify``"""

from __future__ import annotations

from pathlib import Path

import click

from tscfile.errors import DamagedError

from ..options import (
    archive_argument,
    book_option,
    json_option,
    print_json,
    progress,
    quiet_option,
    say,
)


@click.command("verify")
@archive_argument
@click.option("--quick", is_flag=True, help="Structure only; blocks are not read.")
@book_option
@quiet_option
@json_option
def command(archive: Path, quick: bool, book: Path | None, quiet: bool, as_json: bool) -> int:
    """Check every checksum of ARCHIVE and decode every block. Exit code 3 if anything is wrong."""
    from tscfile.archive import Archive
    from tscfile.verification import verify

    with Archive(archive) as opened:
        raw = sum(chunk.raw_length for b in opened.container.blocks for chunk in b.chunks)
    with progress("verifying", 0 if quick else raw, quiet or as_json) as advance:
        report = verify(archive, quick=quick, book=book, progress=advance)
    if as_json:
        print_json(report)
    for problem in report.problems:
        say(f"tsc: {problem}", quiet=False)
    done = "structure is whole" if quick else "every checksum and block is right"
    if report.n_absent:
        done += f"; {report.n_absent} frames are not stored but recomputed"
    if not report.problems:
        say(
            f"{archive}: ok: {report.n_snapshots} snapshots, {report.n_blocks} blocks; {done}",
            quiet or as_json,
        )
    return DamagedError.exit_code if report.problems else 0
