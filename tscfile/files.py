"""Output files that are whole or absent, private to their owner, and never in the way of others."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import TscError, UsageError

_LONGEST_PREFIX = 48
"""Characters of a target's name in that of its temporary file, which must not become too long."""

PRIVATE = 0o600
"""Permissions of what is written: caches hold conversations."""


@contextmanager
def new_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[int]:
    """A file descriptor, open for reading and writing, that becomes ``path`` on success.

    The bytes go to a temporary file beside ``path``, are synced and then renamed; on any exception
    the temporary file is removed. `UsageError` if ``path`` exists and ``force`` is not given.
    """
    target = Path(path)
    refuse(target, force)
    try:
        prefix = f".{target.name[:_LONGEST_PREFIX]}."
        fd, temporary = tempfile.mkstemp(".tmp", prefix, target.parent)
    except FileNotFoundError:
        raise UsageError(f"{target}: the folder {target.parent} does not exist") from None
    except OSError as error:
        # Not the temporary file's name, of which nobody knows.
        error.filename = os.fspath(target)
        raise
    try:
        os.fchmod(fd, PRIVATE)
        yield fd
        os.fsync(fd)
        if force:
            os.replace(temporary, target)
        else:
            _rename_to_new(temporary, target)
    except BaseException as error:
        _unlink_quietly(temporary)
        if isinstance(error, OSError):
            name_file(error, target)
        raise
    finally:
        os.close(fd)
    sync_folder(target.parent)


@contextmanager
def new_mapped_file(
    path: str | os.PathLike[str], size: int, *, force: bool = False
) -> Iterator[memoryview]:
    """Like `new_file`, as a writable view of ``size`` bytes.

    The room is allocated first, so that a full disk is an `OSError` here and not a signal later.
    """
    with new_file(path, force=force) as fd:
        with mapped(fd, size) as view:
            yield view


@contextmanager
def mapped(fd: int, size: int) -> Iterator[memoryview]:
    """A writable view of the first ``size`` bytes of an open file, for which there is room."""
    if not size:
        yield memoryview(bytearray())
        return
    _allocate(fd, size)
    # Not closed here: after an error the functions that are being left still hold parts of it.
    yield memoryview(mmap.mmap(fd, size))


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:
        # Not every system and file system can; zeros take the room just as well.
        if isinstance(error, OSError) and error.errno not in _CANNOT_ALLOCATE:
            raise
        zeros = bytes(1 << 20)
        for at in range(0, size, len(zeros)):
            part = memoryview(zeros)[: size - at]
            while part:
                written = os.pwrite(fd, part, at)
                part, at = part[written:], at + written


_CANNOT_ALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def private(path: Path) -> BinaryIO:
    """A new file, readable by its owner only, open for writing; replaces what was there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE)
    return open(fd, "wb")


def publish(whole: Path, target: Path, *, force: bool = False) -> None:
    """Give a finished and synced file of the same file system its name.

    `UsageError` if ``target`` exists and ``force`` is not given.
    """
    refuse(target, force)
    if force:
        os.replace(whole, target)
    else:
        _rename_to_new(os.fspath(whole), target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename within ``folder`` last through a power cut, where the system can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def refuse(target: Path, force: bool) -> None:
    """`UsageError` if ``target`` cannot become an output."""
    if target.is_dir():
        raise UsageError(f"{target}: is a directory; name a file")
    if target.exists() and not target.is_file():
        raise UsageError(f"{target}: is not a regular file; it is not replaced")
    if target.exists() and not force:
        raise UsageError(f"{target}: exists; use -f to replace it")


def _rename_to_new(temporary: str, target: Path) -> None:
    # link() fails where the name was taken meanwhile; rename() would replace it.
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise UsageError(f"{target}: exists; use -f to replace it") from None
    except OSError:
        os.replace(temporary, target)
        return
    os.unlink(temporary)


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def name_file(error: OSError, path: str | os.PathLike[str]) -> None:
    """Let an error of a descriptor say which file it was; others say it already."""
    if error.errno is not None and error.filename is None:
        error.filename = os.fspath(path)


def describe_os_error(error: OSError, path: str) -> TscError:
    """One line for an `OSError`: what failed, where, and what to do."""
    where = os.fsdecode(error.filename) if error.filename else path
    hint = {
        errno.ENOSPC: "; make room and run it again",
        errno.EACCES: "; check the permissions",
    }.get(error.errno or 0)
    return TscError(f"{where}: {(error.strerror or str(error)).lower()}{hint or ''}")
