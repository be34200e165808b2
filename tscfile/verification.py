"""Check an archive from its first byte to its last.

`verify` reports what is wrong instead of stopping at it. Quick: header, indices, snapshots and
that they fit together. Full: also every record's checksum, every padding byte, and every block
decoded and compared with what was packed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import xxhash

from . import workers
from .archive import Archive
from .archived_track import ArchivedTrack, is_absent
from .container.records import RECORD_ALIGNMENT, Header, RecordHeader, Trailer
from .errors import DamagedError, TscError, UsageError
from .model import Snapshot

_PIECE = 1 << 20


@dataclass
class VerifyReport:
    """``problems`` is empty if the file is whole; one line each. ``n_absent``: frames that are not
    in the file but computed again from tokens, which are there."""

    path: str
    quick: bool
    n_records: int = 0
    n_blocks: int = 0
    n_snapshots: int = 0
    n_absent: int = 0
    problems: list[str] = field(default_factory=list)


def verify(
    path: str | os.PathLike[str],
    *,
    quick: bool = False,
    book: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check the archive ``path``; raises only if it cannot be opened at all.

    ``progress`` is called with the raw bytes of each block decoded.
    """
    with Archive(path, book=book) as archive:
        report = VerifyReport(archive.path, quick)
        if archive.torn_bytes:
            report.problems.append(
                f"{archive.path}: the last {archive.torn_bytes} bytes are no whole commit; "
                f"{len(archive)} snapshots before them are in order"
            )
        report.n_snapshots = len(archive)
        report.n_blocks = len(archive.container.blocks)
        report.n_absent = sum(b.n_frames for b in archive.container.blocks if is_absent(b))
        users = _check_snapshots(archive, report)
        if not quick:
            # A book that is not at hand is no damage of the file: found out before the blocks.
            for user in sorted(set(users.values())):
                _track(archive, user).find_book()
            _check_records(archive, report)
            _check_blocks(archive, users, report, progress)
        return report


_User = tuple[int, int]
"""A track of a snapshot by number. Not the track itself: records of all snapshots together may take
any amount of memory."""


def _track(archive: Archive, user: _User) -> ArchivedTrack:
    record = archive.record(user[0])
    return ArchivedTrack(archive, record.tracks[user[1]], record)


def _check_snapshots(archive: Archive, report: VerifyReport) -> dict[int, _User]:
    """Read every snapshot record; returns for each block in use the last track that uses it."""
    users: dict[int, _User] = {}
    for number in range(len(archive)):
        try:
            record = archive.record(number)
            for i, part in enumerate(record.tracks):
                users |= {run.block: (number, i) for run in part.runs}
            if not report.quick:
                _check_tokens(archive.snapshot(number), f"{archive.path}: snapshot {number}")
        except UsageError:
            # A book that is not at hand: token ids may need it, and it is no damage either.
            raise
        except TscError as error:
            report.problems.append(str(error))
    return users


def _check_tokens(snapshot: Snapshot, where: str) -> None:
    """Frames that are not stored must have all tokens that they are computed from."""
    for track in snapshot.tracks if snapshot.n_absent else ():
        assert isinstance(track, ArchivedTrack)
        pos = track.absent_positions()
        last = int(pos.max(initial=-1))
        known = len(snapshot.tokens) > last and (snapshot.tokens[: last + 1] >= 0).all()
        if (pos < 0).any() or not known:
            raise DamagedError(f"{where}: lacks tokens of frames that are not stored; damaged")


def _check_blocks(
    archive: Archive,
    users: dict[int, _User],
    report: VerifyReport,
    progress: Callable[[int], None] | None,
) -> None:
    # Blocks of one track after another, so that its record is read once.
    order = sorted(range(report.n_blocks), key=lambda number: (users.get(number, (-1, 0)), number))

    def tasks() -> Iterator[tuple[int, ArchivedTrack | None]]:
        for number in order:
            user = users.get(number)
            yield number, None if user is None else _track(archive, user)

    def check(task: tuple[int, ArchivedTrack | None]) -> str | None:
        number, track = task
        if track is None:
            return None
        try:
            track.check_block(number)
        except TscError as error:
            return str(error)
        return None

    problems = {}
    for number, problem in zip(order, workers.in_order(check, tasks()), strict=True):
        if problem:
            problems[number] = problem
        if progress:
            entry = archive.container.blocks[number]
            progress(sum(chunk.raw_length for chunk in entry.chunks))
    report.problems += [problems[number] for number in sorted(problems)]


def _check_records(archive: Archive, report: VerifyReport) -> None:
    """Walk over all records; the bytes between them must be zero."""
    with open(archive.path, "rb") as file:
        for problem in _walk(file.fileno(), archive.container.whole_end, archive.path, report):
            report.problems.append(problem)


def _walk(fd: int, end: int, path: str, report: VerifyReport) -> Iterator[str]:
    at = Header.SIZE
    while at < end:
        head = os.pread(fd, max(RecordHeader.SIZE, Trailer.SIZE), at)
        if Trailer.read(head, at):
            at += Trailer.SIZE
            continue
        where = f"{path}: record at offset {at}"
        try:
            header = RecordHeader.read(head, where)
        except TscError as error:
            # Without its length the next record cannot be found; the indices still lead to those
            # that blocks and snapshots need, and those are checked on their own.
            yield str(error)
            return
        start = at + RecordHeader.SIZE + header.padding
        stop = start + header.length
        after = stop + -stop % RECORD_ALIGNMENT
        if after > end:
            yield f"{where}: reaches past the end of the commit; damaged"
            return
        report.n_records += 1
        if _checksum_of(fd, start, header.length) != header.payload_checksum:
            yield f"{where}: checksum of {header.length} bytes is wrong; damaged"
        for first, last in ((at + RecordHeader.SIZE, start), (stop, after)):
            if any(os.pread(fd, last - first, first)):
                yield f"{path}: padding at offset {first} is not zero; damaged"
        at = after


def _checksum_of(fd: int, start: int, length: int) -> int:
    digest = xxhash.xxh3_64()
    for at in range(start, start + length, _PIECE):
        digest.update(os.pread(fd, min(_PIECE, start + length - at), at))
    return digest.intdigest()

