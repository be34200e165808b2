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
from .tiers import TOKENS, tiers_from_names
from .tokens_tier import check_never_shifted

Progress = Callable[[int], None]
Book = str | os.PathLike[str] | None


def recode(
    archive: Archive, numbers: Sequence[int], out: Path, tier: str | Sequence[str],
    *,
    book: Book = None,
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
        if TOKENS in [each.name for each in tiers_from_names(tier)]:
            check_never_shifted(archive, number)
    files.refuse(out, force)
    with staging(out.parent) as folder:
        unfinished = folder / out.name
        try:
            _write(archive, numbers, unfinished, tier, book, progress)
        except OSError as error:
            if error.filename == os.fspath(unfinished):
                # Nobody knows of that one.
                error.filename = os.fspath(out)
            raise
        files.publish(unfinished, out, force=force)


def _write(
    archive: Archive, numbers: Sequence[int], out: Path, tier: str | Sequence[str], book: Book,
    progress: Progress | None,
) -> None:  # fmt: skip
    for number in numbers:
        snapshot, name = archive.snapshot(number), archive.record(number).name
        if number == numbers[0]:
            pack(snapshot, out, tier=tier, book=book, name=name, progress=progress)
        else:
            # What links it with those before may be a snapshot that is left out.
            append(
                snapshot, out, tier=tier, book=book, name=name, same_conversation=True,
                progress=progress,
            )  # fmt: skip
