"""Keep a folder of archives within bounds by removing whole archives.

Only regular files that are named and begin like archives are ever looked at; links are not
followed.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import files
from .collecting import SUFFIX
from .container.records import Header
from .errors import UsageError


@dataclass(frozen=True)
class PrunedArchive:
    """One archive: ``n_bytes`` is its size, ``written_ns`` when it was last written to."""

    path: str
    n_bytes: int
    written_ns: int


@dataclass
class PruneReport:
    """``removed``: what was, or with ``dry_run`` would be, the oldest first. ``problems``: one line
    for each that should have been removed and was not."""

    folder: str
    dry_run: bool
    removed: list[PrunedArchive] = field(default_factory=list)
    kept: list[PrunedArchive] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def freed_bytes(self) -> int:
        return sum(archive.n_bytes for archive in self.removed)

    @property
    def kept_bytes(self) -> int:
        return sum(archive.n_bytes for archive in self.kept)


def prune(
    folder: str | os.PathLike[str],
    *,
    keep_last: int = 1,
    max_bytes: int | None = None,
    dry_run: bool = False,
) -> PruneReport:
    """Remove archives of ``folder``, the least recently written first.

    The ``keep_last`` newest are always kept. ``max_bytes``: stop as soon as what is left is no
    larger; without it all others are removed. An archive that is being appended to is kept.
    `UsageError` for bounds that cannot be meant, `OSError` if the folder cannot be read.
    """
    if keep_last < 1 or (max_bytes is not None and max_bytes < 0):
        raise UsageError("keep at least one archive, and no fewer than 0 bytes")
    report = PruneReport(os.fspath(folder), dry_run)
    report.kept = sorted(_archives(Path(folder)), key=lambda each: (each.written_ns, each.path))
    n_left = report.kept_bytes
    for archive in report.kept[:-keep_last]:
        if max_bytes is not None and n_left <= max_bytes:
            break
        if dry_run or _remove(archive, report):
            report.removed.append(archive)
            n_left -= archive.n_bytes
    gone = {archive.path for archive in report.removed}
    report.kept = [archive for archive in report.kept if archive.path not in gone]
    if report.removed and not dry_run:
        files.sync_folder(Path(folder))
    return report


def _archives(folder: Path) -> Iterator[PrunedArchive]:
    for name in os.listdir(folder):
        if name.endswith(SUFFIX) and not name.startswith("."):
            with _opened(folder / name) as fd:
                if fd is not None:
                    info = os.fstat(fd)
                    path = os.fspath(folder / name)
                    yield PrunedArchive(path, info.st_size, info.st_mtime_ns)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """An archive open for reading, or None if the path is not that of one."""
    try:
        # Asked before opening, which might act on what is no file.
        if not stat.S_ISREG(os.lstat(path).st_mode):
            yield None
            return
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        is_one = stat.S_ISREG(os.fstat(fd).st_mode)
        is_one = is_one and os.pread(fd, len(Header.MAGIC), 0) == Header.MAGIC
        yield fd if is_one else None
    finally:
        os.close(fd)


def _remove(archive: PrunedArchive, report: PruneReport) -> bool:
    """Remove it unless somebody uses it or it is not any more what was found."""
    path = Path(archive.path)
    with _opened(path) as fd:
        if fd is None:
            return False
        try:
            # Appenders hold it too; one that waits notices that the file has gone.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            info = os.fstat(fd)
            is_same = (info.st_size, info.st_mtime_ns) == (archive.n_bytes, archive.written_ns)
            if is_same and os.path.samestat(info, os.lstat(path)):
                os.unlink(path)
                return True
            report.problems.append(f"{path}: was written to meanwhile; it is kept")
        except BlockingIOError:
            report.problems.append(f"{path}: another process is appending to it; it is kept")
        except OSError as error:
            files.name_file(error, path)
            report.problems.append(str(files.describe_os_error(error, archive.path)))
    return False
