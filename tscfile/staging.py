"""A folder for what is not whole yet, beside where it is to be.

It is locked while it is in use. What a killed process left behind is not locked and is removed by
the next one that works in the same place.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UsageError

PREFIX = ".tsc-staging-"


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, private to its owner, that is gone afterwards.

    `UsageError` if ``parent`` does not exist, `OSError` if it cannot be written to.
    """
    clear_stale(parent)
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except FileNotFoundError:
            raise UsageError(f"{parent}: the folder does not exist") from None
        except OSError as error:
            # Not the temporary name, of which nobody knows.
            error.filename = os.fspath(parent)
            raise
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            # Before it was locked another process took it for left behind.
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_at(fd, path):
                yield path
                return
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(fd)


def clear_stale(parent: Path) -> None:
    """Remove what killed processes left in ``parent``, as far as it is allowed to."""
    with suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(PREFIX):
                _remove_unlocked(parent / name)


def _remove_unlocked(path: Path) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, path):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
