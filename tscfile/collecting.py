"""Many saves at a time: into one archive, or into one for each conversation.

One save that cannot be taken does not keep the others out: what became of each is in its
`SaveReport`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import files
from .archive import Archive
from .conversations import (
    FILE_ID,
    MIN_COMMON,
    Conversation,
    FileId,
    Save,
    file_id,
    in_order,
    read_save,
    split,
)
from .errors import MismatchError, TscError, UsageError
from .model import ModelIdentity
from .packing import PackReport, append, pack
from .product_coding import ProductOptions
from .sources import identity_for, open_source
from .staging import staging

SUFFIX = ".tsc"
NO_SAVES = (SUFFIX, ".tscbook")
"""Ends of names that no save in a folder has."""

Path_ = str | os.PathLike[str]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class PackOptions:
    """How saves are packed: the arguments of `tscfile.packing.pack` that hold for all of them."""

    tier: str | Sequence[str] | None = None
    book: Path_ | None = None
    embed_book: bool = False
    target_kl: float | None = None
    target_ratio: float | None = None
    product: ProductOptions | None = None
    identity: ModelIdentity | None = None
    wait: bool = True


@dataclass(frozen=True)
class SaveReport:
    """What became of one save. ``report`` is None if the archive held it already, or if
    ``problem``, one line, says why it was not taken; ``exit_code`` is then that of the error."""

    source: str
    archive: str | None = None
    report: PackReport | None = None
    problem: str | None = None
    exit_code: int = 0
    deleted: bool = False
    """Was the source removed, as it is safe in the archive?"""


def saves_in(sources: Iterable[Path]) -> list[Path]:
    """Files and, for a folder, the files in it; not hidden ones, archives, books or folders."""
    found: dict[Path, None] = {}
    for source in sources:
        if not source.is_dir():
            found[source] = None
            continue
        for each in sorted(source.iterdir()):
            hidden = each.name.startswith(".")
            if each.is_file() and not hidden and each.suffix not in NO_SAVES:
                found[each] = None
    return list(found)


def read_saves(
    sources: Iterable[Path], identity: ModelIdentity | None = None
) -> tuple[list[Save], list[SaveReport]]:
    """Those that can be read, and reports of the others."""
    saves, broken = [], []
    for path in sources:
        try:
            saves.append(read_save(path, identity))
        except (TscError, OSError) as error:
            broken.append(problem(path, error))
    return saves, broken


def pack_saves(
    saves: Sequence[Save],
    output: Path_,
    options: PackOptions,
    *,
    into_folder: bool = False,
    min_common: int = MIN_COMMON,
    force: bool = False,
    progress: Progress | None = None,
) -> Iterator[SaveReport]:
    """Make archives of ``saves``, each save as a snapshot; yields what became of each.

    ``output``: the archive, or with ``into_folder`` a folder, made if it is not there, where each
    conversation gets an archive named after its first save. An archive appears when all of its
    saves are in it. `MismatchError` for one archive and several conversations, `UsageError` if an
    archive exists and ``force`` is not given.
    """
    conversations = split(saves, min_common)
    if len(conversations) > 1 and not into_folder:
        first, second = (conversations[i][0].path for i in (0, 1))
        raise MismatchError(
            f"{second}: is of another conversation than {first} ({len(conversations)} in all); "
            "name a folder, -o DIR/, for an archive of each"
        )
    targets = _targets(conversations, Path(output)) if into_folder else [Path(output)]
    for target in targets:
        files.refuse(target, force)
    if into_folder:
        Path(output).mkdir(mode=0o700, exist_ok=True)
    for members, target in zip(conversations, targets, strict=False):
        yield from _pack_one(members, target, options, force, progress)


def _pack_one(
    saves: Sequence[Save], target: Path, options: PackOptions, force: bool,
    progress: Progress | None,
) -> list[SaveReport]:  # fmt: skip
    reports = []
    with staging(target.parent) as folder:
        unfinished = folder / target.name
        for save in saves:
            try:
                report = take_in(save.path, unfinished, options, progress=progress)
                reports.append(SaveReport(os.fspath(save.path), os.fspath(target), report))
            except UsageError:
                # Of the options, which are the same for all.
                raise
            except (TscError, OSError) as error:
                if isinstance(error, OSError) and error.filename == os.fspath(unfinished):
                    error.filename = os.fspath(target)
                reports.append(problem(save.path, error))
        if unfinished.exists():
            files.publish(unfinished, target, force=force)
    return reports


def append_saves(
    saves: Sequence[Save],
    path: Path_,
    options: PackOptions,
    *,
    min_common: int = MIN_COMMON,
    progress: Progress | None = None,
) -> Iterator[SaveReport]:
    """Append ``saves`` to the archive ``path``, each as a commit of its own; yields what became of
    each. Saves that it holds already are not stored again."""
    with Archive(path, book=options.book) as archive:
        conversation = Conversation.of_archive(archive, min_common)
        ids = held_ids(archive)
    for save in in_order(saves):
        try:
            if conversation.heads and not conversation.has(save):
                raise MismatchError(
                    f"{save.path}: is of another conversation than {path}; pack it into a file of "
                    "its own"
                )
            found = file_id(save.path)
            report = None
            if found not in ids:
                report = take_in(save.path, Path(path), options, found, progress=progress)
            ids.add(found)
            conversation.add(save.tokens, save.layouts, save.identity)
            yield SaveReport(os.fspath(save.path), os.fspath(path), report)
        except UsageError:
            raise
        except (TscError, OSError) as error:
            yield problem(save.path, error)


def take_in(
    source: Path, archive: Path, options: PackOptions, found: FileId | None = None,
    *, name: str | None = None, progress: Progress | None = None,
) -> PackReport:  # fmt: skip
    """Append a save to an archive, or make the archive of it; the snapshot has the id of its file.

    ``found``: that id, where it is known. Raises what `pack` and `append` do.
    """
    snapshot = open_source(source)
    snapshot.source = {**snapshot.source, FILE_ID: list(found or file_id(source))}
    identity = identity_for(snapshot, options.identity)
    name = source.name if name is None else name
    if archive.exists():
        return append(
            snapshot, archive, tier=options.tier, book=options.book, identity=identity,
            name=name, wait=options.wait, progress=progress,
        )  # fmt: skip
    return pack(
        snapshot, archive, tier=options.tier, book=options.book, embed_book=options.embed_book,
        target_kl=options.target_kl, target_ratio=options.target_ratio, product=options.product,
        identity=identity, name=name, progress=progress,
    )  # fmt: skip


def held_ids(archive: Archive) -> set[FileId]:
    """Ids of the files that an archive's snapshots were read from, as far as they say it."""
    ids = (archive.record(number).source.get(FILE_ID) for number in range(len(archive)))
    return {(each[0], each[1]) for each in ids if isinstance(each, list) and len(each) == 2}


def name_for(source: Path, taken: Callable[[str], bool]) -> str:
    """A name for the archive of a conversation whose first save is ``source``.

    >>> name_for(Path("slot.kv"), {"slot.tsc"}.__contains__)
    'slot-2.tsc'
    """
    name, number = source.stem + SUFFIX, 1
    while taken(name):
        number += 1
        name = f"{source.stem}-{number}{SUFFIX}"
    return name


def _targets(conversations: Sequence[Sequence[Save]], folder: Path) -> list[Path]:
    names: list[str] = []
    for members in conversations:
        names.append(name_for(members[0].path, names.__contains__))
    return [folder / name for name in names]


def problem(
    path: Path, error: TscError | OSError, renamed: tuple[Path, Path] | None = None
) -> SaveReport:
    """A report of a save that was not taken. ``renamed``: a path in the message, and what it is
    to be called."""
    where = os.fspath(path)
    known = files.describe_os_error(error, where) if isinstance(error, OSError) else error
    text = str(known)
    if renamed is not None:
        text = text.replace(os.fspath(renamed[0]), os.fspath(renamed[1]))
    if where not in text:
        text = f"{where}: {text}"
    return SaveReport(where, problem=text, exit_code=known.exit_code)
