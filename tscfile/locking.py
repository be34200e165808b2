"""One writer at a time for an archive that is there already."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import TscError, UsageError


@contextmanager
def locked(path: str | os.PathLike[str], wait: bool) -> Iterator[int]:
    """The archive opened for writing, held against every other writer.

    The lock is on the file itself: nothing is left beside it, and a killed process lets go of it.
    `TscError` if another process holds it and ``wait`` is False.
    """
    where = os.fspath(path)
    if not stat.S_ISREG(os.stat(where).st_mode):
        raise UsageError(f"{where}: is not a regular file; an archive to append to is one")
    while True:
        fd = os.open(where, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The name may have been given to another file while this one was waited for.
            if os.path.samestat(os.fstat(fd), os.stat(where)):
                yield fd
                return
        except BlockingIOError:
            raise TscError(f"{where}: another process is appending; run it again later") from None
        finally:
            os.close(fd)
