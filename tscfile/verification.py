"""Check an archive from its first byte to its last, and say what each damage costs.

`verify` reports what is wrong instead of stopping at it. Quick: header, indices, snapshots and
that they fit together. Full: also every record's checksum, every padding byte, and every block
decoded and compared with what was packed; of each damage which record it hits, of which block, and
which cells of which snapshots are lost by it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from .archived_track import is_absent
from .container.reader import Container
from .container.survey import UNREADABLE, Survey
from .diagnosis import Damage, Diagnosis, SnapshotState
from .errors import DamagedError
from .recovery import LenientArchive, Recovery, recover


@dataclass
class VerifyReport:
    """``problems`` is empty if the file is whole; one line each. ``damages``: the same taken apart;
    bytes behind the last whole commit are one problem. ``snapshots``: what is left of each.
    ``n_absent``: frames that are not in the file but computed again from tokens, which are there.
    ``exit_code``: what ``tsc verify`` ends with: 0, that of `DamagedError`, or where nothing is
    known to be damaged that of the error that keeps some of it from being decoded here.
    """

    path: str
    quick: bool
    n_records: int = 0
    n_blocks: int = 0
    n_snapshots: int = 0
    n_absent: int = 0
    problems: list[str] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    snapshots: list[SnapshotState] = field(default_factory=list)
    exit_code: int = 0

    @property
    def whole(self) -> list[int]:
        """Numbers of the snapshots that lose nothing."""
        return [state.number for state in self.snapshots if state.loss is None]


def verify(
    path: str | os.PathLike[str],
    *,
    quick: bool = False,
    book: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check the archive ``path``.

    ``progress`` is called with the raw bytes of each block decoded. `DamagedError` if nothing of
    an archive is left (``quick``: if it cannot be opened), `UsageError` if a book is not at hand.

    >>> import tempfile, tscfile
    >>> path = tempfile.mkdtemp() + "/session.tsc"
    >>> report = tscfile.pack("samples/session.kv", path)
    >>> with open(path, "r+b") as file:
    ...     place = file.seek(-100000, 2)
    ...     done = file.write(b"sixteen bad bytes")
    >>> (damage,) = verify(path).damages
    >>> damage.kind, damage.block, [(cells.start, cells.stop) for cells in damage.losses[0].cells]
    ('chunk', 1, [(256, 400)])
    """
    with _quickly(path, book) if quick else recover(path, book) as recovery:
        diagnosis = Diagnosis(recovery)
        diagnosis.check_snapshots(quick=quick)
        if not quick:
            diagnosis.check_blocks(progress)
        return report_of(diagnosis, quick)


def report_of(diagnosis: Diagnosis, quick: bool = False) -> VerifyReport:
    """The report of a finished diagnosis."""
    recovery, archive = diagnosis.recovery, diagnosis.archive
    report = VerifyReport(archive.path, quick)
    report.n_records = len(recovery.survey.records)
    report.n_snapshots, report.n_blocks = len(archive), len(archive.container.blocks)
    report.n_absent = sum(
        entry.n_frames for number, entry in enumerate(archive.container.blocks)
        if is_absent(entry) and number not in recovery.lost
    )  # fmt: skip
    report.damages = diagnosis.damages()
    torn = [each for each in report.damages if _is_torn(each, recovery)]
    report.problems = [each.problem for each in report.damages if each not in torn]
    if recovery.error is not None and not any(flaw.leads for flaw in recovery.survey.flaws):
        # Every byte has its checksum, and yet they contradict each other.
        report.problems.insert(0, recovery.error)
    if recovery.torn_bytes:
        report.problems.insert(0, _torn_problem(recovery, torn))
    report.snapshots = diagnosis.states()
    codes = {each.exit_code for each in report.damages if each not in torn}
    if len(report.problems) > len(report.damages) - len(torn):
        codes.add(DamagedError.exit_code)
    is_damaged = DamagedError.exit_code in codes
    report.exit_code = DamagedError.exit_code if is_damaged else max(codes, default=0)
    return report


def _is_torn(damage: Damage, recovery: Recovery) -> bool:
    """Does it concern but what is behind the last whole commit?"""
    whole_end = recovery.archive.size - recovery.torn_bytes
    beyond = all(loss.snapshot >= recovery.n_reachable for loss in damage.losses)
    is_placed = damage.length > 0
    return recovery.torn_bytes > 0 and beyond and (damage.offset >= whole_end or not is_placed)


def _torn_problem(recovery: Recovery, torn: list[Damage]) -> str:
    first = next((each for each in torn if each.kind != UNREADABLE and each.length), None)
    why = "" if first is None else f"; damaged is the {first.kind} at offset {first.offset}"
    more = len(recovery.archive) - recovery.n_reachable
    return (
        f"{recovery.archive.path}: the last {recovery.torn_bytes} bytes are no whole commit; "
        f"{recovery.n_reachable} snapshots before them are in order{why}"
        + (f", and --salvage can have what is left of {more} more" if more else "")
    )


def _quickly(path: str | os.PathLike[str], book: str | os.PathLike[str] | None) -> Recovery:
    """The file as an ordinary reader opens it, none of its bytes surveyed."""
    container = Container(path)
    found = Survey(container.size)
    n_snapshots = len(container.snapshots)
    return Recovery(found, LenientArchive(container, book), None, container.torn_bytes, n_snapshots)
