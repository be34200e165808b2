"""Pack saves as a server writes them.

A slot file is overwritten again and again, so nothing is decided by its name: what it holds belongs
to the archive that its tokens continue. No state is kept beside the archives; each snapshot has the
id of the file that it came from, and a file whose id is there is not stored again. That makes it
safe to be killed at any instant: what is started anew finds a save stored or finds it in the slot.

A save is taken when nothing was written to it for a while. It is copied first, for a server that
empties the file under a reader would end the reader; a copy that was changed meanwhile is dropped.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from . import files
from .books.book import load
from .collecting import (
    NO_SAVES,
    PackOptions,
    SaveReport,
    name_for,
    problem,
    take_in,
)
from .conversations import MIN_COMMON, FileId, Save, id_of, save_of
from .errors import TscError, UsageError
from .shelf import Shelf, Signature, signature
from .sources import open_source
from .staging import staging
from .tiers import tiers_from_names

SETTLE, INTERVAL = 2.0, 1.0
"""Seconds."""

_LONGEST = 86400

_PIECE = 1 << 20
_TAKEN = re.compile(r"\.tsc-taken-[0-9a-f]{8}-(.+)", re.DOTALL)
_LONGEST_NAME = 200


@dataclass
class _Seen:
    """A file of the folder: since when it has been as it is, and if it has been dealt with."""

    signature: Signature
    since: float
    is_done: bool = False
    told: str | None = None


class Watcher:
    """Takes saves from the folder ``slots`` into archives in the folder ``archives``.

    ``settle``: seconds that a file must have been left alone, ``interval``: between two looks.
    ``delete_source``: remove what is safe in an archive. Raises `UsageError` for tiers and seconds
    that cannot be, the errors of a book that cannot be read, `OSError` if ``archives`` can neither
    be found nor made.
    """

    def __init__(
        self,
        slots: str | os.PathLike[str],
        archives: str | os.PathLike[str],
        options: PackOptions,
        *,
        min_common: int = MIN_COMMON,
        settle: float = SETTLE,
        interval: float = INTERVAL,
        delete_source: bool = False,
    ) -> None:
        if not (0 <= settle <= _LONGEST and 0 < interval <= _LONGEST):
            raise UsageError(f"seconds to wait: more than 0 and no more than {_LONGEST}")
        # What is wrong with all saves is said at once.
        if options.tier is not None:
            tiers_from_names(options.tier)
        if options.book is not None:
            load(options.book)
        self._slots, self._archives = Path(slots), Path(archives)
        self._options = options
        self._settle, self._interval = settle, interval
        self._delete_source = delete_source
        self._seen: dict[str, _Seen] = {}
        self._archives.mkdir(mode=0o700, exist_ok=True)
        self._shelf = Shelf(self._archives, options, min_common)

    def run(self, *, once: bool = False) -> Generator[SaveReport, None, None]:
        """Take saves until stopped; yields what became of each.

        ``once``: only what is there, waiting for what is still being written as long as a file
        takes to settle.
        """
        with staging(self._archives) as folder:
            while True:
                yield from self._look(folder)
                if once:
                    break
                time.sleep(self._interval)
            waiting = self._waiting()
            if waiting:
                time.sleep(self._settle)
                yield from self._look(folder)
            for name in self._waiting():
                if not self._seen[name].told:
                    yield _still_written(self._slots / name)

    def _waiting(self) -> list[str]:
        return [name for name, seen in self._seen.items() if not seen.is_done]

    def _look(self, folder: Path) -> Iterator[SaveReport]:
        """Take every file that has settled."""
        settled = self._settled()
        if settled:
            yield from self._shelf.refresh()
        for name, found in settled:
            report = self._take(name, found, folder)
            if report is not None:
                yield report

    def _settled(self) -> list[tuple[str, Signature]]:
        """Files to be taken now, the oldest first."""
        now, clock = time.monotonic(), time.time()
        found: dict[str, os.stat_result] = {}
        for entry in os.scandir(self._slots):
            hidden = entry.name.startswith(".") and not _TAKEN.fullmatch(entry.name)
            if hidden or Path(entry.name).suffix in NO_SAVES:
                continue
            with suppress(FileNotFoundError):
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(info.st_mode):
                    found[entry.name] = info
        self._seen = {name: seen for name, seen in self._seen.items() if name in found}
        ready = []
        for name, info in sorted(found.items(), key=lambda item: (item[1].st_mtime_ns, item[0])):
            seen = self._seen.get(name)
            if seen is None or seen.signature != signature(info):
                # Of a file that is older than that nobody has to wait for.
                is_old = clock - info.st_mtime >= self._settle
                since = now - self._settle if is_old else now
                seen = self._seen[name] = _Seen(signature(info), since)
            if not seen.is_done and now - seen.since >= self._settle:
                ready.append((name, seen.signature))
        return ready

    def _take(self, name: str, found: Signature, folder: Path) -> SaveReport | None:
        """Pack one file; None if it has changed meanwhile, or was reported before."""
        seen, path, copy = self._seen[name], self._slots / name, folder / "save"
        try:
            file_id = _copy(path, copy, found)
            if file_id is None:
                seen.since = time.monotonic()
                return None
            report = self._store(copy, path, file_id, folder)
        except (TscError, OSError) as error:
            report = problem(path, error, (copy, path))
            # Bytes that are no save stay so until they change; other trouble may pass.
            seen.is_done = isinstance(error, TscError)
            seen.since = time.monotonic()
        finally:
            copy.unlink(missing_ok=True)
        if report.problem is not None:
            is_new = report.problem != seen.told
            seen.told = report.problem
            return report if is_new else None
        seen.is_done = True
        if self._delete_source and report.archive is not None:
            report = replace(report, deleted=self._delete(path, found, Path(report.archive)))
        return report

    def _store(self, copy: Path, path: Path, file_id: FileId, folder: Path) -> SaveReport:
        """Append the save to the archive of its conversation, or make one."""
        holder = self._shelf.holder(file_id)
        if holder is not None:
            return SaveReport(os.fspath(path), os.fspath(holder))
        save = save_of(open_source(copy), copy, self._options.identity)
        original = _TAKEN.fullmatch(path.name)
        name = original[1] if original else path.name
        for home in self._shelf.homes(save):
            try:
                report = take_in(copy, home, self._options, file_id, name=name)
            except UsageError:
                raise
            except TscError:
                # Another model after all, or a damaged archive: it gets one of its own.
                continue
            self._shelf.added(home, save, file_id, report.file_bytes)
            return SaveReport(os.fspath(path), os.fspath(home), report)
        return self._start(save, path, name, file_id, folder)

    def _start(
        self, save: Save, path: Path, name: str, file_id: FileId, folder: Path
    ) -> SaveReport:
        unfinished = folder / "archive"
        try:
            report = take_in(save.path, unfinished, self._options, file_id, name=name)
            while True:
                home = self._archives / name_for(Path(name), self._is_taken)
                try:
                    files.publish(unfinished, home)
                    break
                except UsageError:
                    # Somebody else took the name meanwhile.
                    if not home.exists():
                        raise
        finally:
            unfinished.unlink(missing_ok=True)
        self._shelf.added(home, save, file_id, report.file_bytes)
        return SaveReport(os.fspath(path), os.fspath(home), report)

    def _is_taken(self, name: str) -> bool:
        return os.path.lexists(self._archives / name)

    def _delete(self, path: Path, found: Signature, archive: Path) -> bool:
        """Remove a save that ``archive`` holds; False if it was written to meanwhile.

        It is moved out of the way before it is looked at for the last time: what is written to its
        name after that is another file. A hidden one that is left behind is taken like any other.
        """
        # Whoever stored it may have been killed before it was on the disk.
        _sync(archive)
        original = _TAKEN.fullmatch(path.name)
        name = os.fsencode(original[1] if original else path.name)[:_LONGEST_NAME]
        hidden = path.with_name(f".tsc-taken-{secrets.token_hex(4)}-{os.fsdecode(name)}")
        try:
            os.rename(path, hidden)
        except FileNotFoundError:
            return False
        if signature(os.lstat(hidden)) == found:
            os.unlink(hidden)
            return True
        with suppress(OSError):
            # Fails if there is a newer one.
            os.link(hidden, path)
            os.unlink(hidden)
        return False


def _copy(path: Path, copy: Path, found: Signature) -> FileId | None:
    """Copy a file and return its id; None if it is not, or not any more, what was ``found``."""
    hasher = blake3()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as source, files.private(copy) as target:
        while signature(os.fstat(fd)) == found and (piece := source.read(_PIECE)):
            hasher.update(piece)
            target.write(piece)
        is_same = signature(os.fstat(fd)) == found and source.tell() == found[1]
    return id_of(hasher) if is_same else None


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    files.sync_folder(path.parent)


def _still_written(path: Path) -> SaveReport:
    return SaveReport(
        os.fspath(path), problem=f"{path}: is still being written; run it again later", exit_code=1
    )
