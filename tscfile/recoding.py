"""Put the saves of an archive into another tier: each is read back and packed again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from . import files
from .archive import Archive
from .errors import UsageError
from .packing import append, pack
from .staging import staging

Progress = Callable[[int], None]


def recode(
    archive: Archive, numbers: Sequence[int], out: Path, tier: str | Sequence[str],
    *,
    book: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Make the archive ``out`` of snapshots ``numbers`` in ``tier``; it appears once it is whole.

    `UsageError` for a snapshot that is not exact: what is coded twice has both errors.
    """
    for number in numbers:
        if not archive.snapshot(number).exact:
            raise UsageError(
                f"{archive.path}: snapshot {number} is of tier {archive.record(number).tier}; only "
                "exact ones can be put into another: drop it, or leave out layers with tsc demote"
            )
    files.refuse(out, force)
    with staging(out.parent) as folder:
        unfinished = folder / out.name
        for number in numbers:
            snapshot, name = archive.snapshot(number), archive.record(number).name
            if number == numbers[0]:
                pack(snapshot, unfinished, tier=tier, book=book, name=name, progress=progress)
            else:
                append(snapshot, unfinished, tier=tier, book=book, name=name, progress=progress)
        files.publish(unfinished, out, force=force)
