"""``tsc verify``"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tscfile.errors import DamagedError

from ..options import (
    STDIO,
    archive_argument,
    book_option,
    force_option,
    json_option,
    output_file,
    print_json,
    progress,
    quiet_option,
    say,
    size,
)

if TYPE_CHECKING:
    from tscfile.salvage import SalvageReport
    from tscfile.verification import VerifyReport


@click.command("verify")
@archive_argument
@click.option("--quick", is_flag=True, help="Structure only; blocks are not read.")
@click.option(
    "--salvage", "output", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    metavar="OUT", help="Write all that is undamaged to a new archive.",
)  # fmt: skip
@book_option
@force_option
@quiet_option
@json_option
def command(
    archive: Path, quick: bool, output: Path | None, book: Path | None, force: bool, quiet: bool,
    as_json: bool,
) -> int:  # fmt: skip
    """Check every checksum of ARCHIVE and decode every block.

    Says of each damage which record and block it hits, and which frames of which saves are lost
    by it. Exit code 3 if anything is damaged; if nothing is, but something cannot be decoded here,
    5 for a codec that this build does not know, 4 for a book that is of another model.

    With --salvage: saves that are whole are copied to OUT as they are, of others the first frames
    up to the first that is damaged; single flipped bits are put right where the record is short.
    ARCHIVE is not changed. Exit code 0 if every save is whole in OUT, whatever was wrong with
    ARCHIVE, and 3 if anything is missing there; if nothing can be had there is no OUT.
    """
    if output is not None and quick:
        raise click.UsageError("--salvage reads all blocks; leave --quick out")
    total = 0
    if not quick:
        total = _raw_bytes(archive)
    if output is None:
        from tscfile.verification import verify

        with progress("verifying", total, quiet or as_json) as advance:
            report = verify(archive, quick=quick, book=book, progress=advance)
        _tell_damages(report, quiet, as_json)
        return report.exit_code
    from tscfile.salvage import salvage

    with (
        output_file(output) as target,
        progress("checking", total, quiet or as_json) as advance,
    ):
        salvaged = salvage(archive, target, book=book, force=force, progress=advance)
    if as_json and str(output) != STDIO:
        print_json(salvaged)
    _tell_damages(salvaged.found, quiet, as_json, printed=True)
    _tell_salvaged(salvaged, output, quiet or as_json)
    return 0 if salvaged.is_complete else DamagedError.exit_code


def _raw_bytes(archive: Path) -> int:
    """What there is to decode, as far as the file can be opened."""
    from tscfile.archive import Archive

    with suppress(DamagedError), Archive(archive) as opened:
        return sum(chunk.raw_length for b in opened.container.blocks for chunk in b.chunks)
    return 0


def _tell_damages(
    report: VerifyReport, quiet: bool, as_json: bool, *, printed: bool = False
) -> None:
    from tscfile.diagnosis import numbered

    if as_json and not printed:
        print_json(report)
    for problem in report.problems:
        say(f"tsc: {problem}", quiet=False)
    done = "structure is whole" if report.quick else "every checksum and block is right"
    if report.n_absent:
        done += f"; {report.n_absent} frames are not stored but recomputed"
    if report.problems and len(report.whole) < report.n_snapshots:
        whole = numbered("snapshot", report.whole) if report.whole else "none"
        say(f"whole as they are: {whole}", quiet or as_json)
    if not report.problems:
        say(
            f"{report.path}: ok: {report.n_snapshots} snapshots, {report.n_blocks} blocks; {done}",
            quiet or as_json,
        )


def _tell_salvaged(report: SalvageReport, output: Path, quiet: bool) -> None:
    n_whole = sum(kept.is_whole for kept in report.kept)
    n_cut, n_before = len(report.kept) - n_whole, report.found.n_snapshots
    say(
        f"{output}: {n_whole} of {n_before} snapshots are whole, {n_cut} cut, "
        f"{len(report.lost)} lost; {size(report.file_bytes)}",
        quiet,
    )
    if report.n_mended:
        say(f"flipped bits put right: {report.n_mended}", quiet)
    if report.counted:
        say(f"blocks known by their order in the file alone: {len(report.counted)}", quiet)
    if report.undecoded:
        say(f"blocks checked by their checksums alone, for want of a book: "
            f"{len(report.undecoded)}", quiet)  # fmt: skip
    for kept in (each for each in report.kept if not each.is_whole):
        without = f", without its {' and '.join(kept.parts)}" if kept.parts else ""
        say(
            f"snapshot {kept.original}: the first {kept.n_cells} of {kept.n_cells_before} frames"
            f"{without}, as snapshot {kept.snapshot}",
            quiet,
        )
    for lost in report.lost:
        say(f"snapshot {lost.original}: lost: {lost.reason}", quiet)
