"""A folder of archives: which one a save belongs to, and which saves they hold already.

What is known of an archive is kept until its file changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .archive import Archive
from .collecting import SUFFIX, PackOptions, SaveReport, held_ids, problem
from .container.snapshots import common_prefix
from .conversations import Conversation, FileId, Save
from .errors import TscError

Signature = tuple[int, int, int]


def signature(found: os.stat_result) -> Signature:
    """What changes when a file is written to or replaced."""
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass
class _Known:
    signature: Signature
    conversation: Conversation
    file_ids: set[FileId]


class Shelf:
    """The archives of ``folder``; those that cannot be read are left alone."""

    def __init__(self, folder: Path, options: PackOptions, min_common: int) -> None:
        self.folder = folder
        self._options = options
        self._min_common = min_common
        self._known: dict[Path, _Known] = {}
        self._told: dict[Path, Signature] = {}

    def refresh(self) -> Iterator[SaveReport]:
        """Look at what is new or has changed; yields a report of each that cannot be read."""
        found: dict[Path, Signature] = {}
        for name in sorted(os.listdir(self.folder)):
            path = self.folder / name
            # Not a pipe, and nothing that is hidden because it is not whole.
            if name.endswith(SUFFIX) and not name.startswith(".") and path.is_file():
                found[path] = signature(path.stat())
        for gone in self._known.keys() - found.keys():
            del self._known[gone]
        for path, now in found.items():
            known = self._known.get(path)
            if (known and known.signature == now) or self._told.get(path) == now:
                continue
            self._known.pop(path, None)
            try:
                with Archive(path, book=self._options.book) as archive:
                    conversation = Conversation.of_archive(archive, self._min_common)
                    self._known[path] = _Known(now, conversation, held_ids(archive))
            except (TscError, OSError) as error:
                self._told[path] = now
                yield problem(path, error)

    def holder(self, file_id: FileId) -> Path | None:
        """The archive that holds the save with this id, if there is one."""
        return next((p for p, known in self._known.items() if file_id in known.file_ids), None)

    def homes(self, save: Save) -> list[Path]:
        """Archives of the save's conversation: first that with most tokens in common, of equals
        the one written last."""
        found = [path for path, known in self._known.items() if known.conversation.has(save)]
        if len(found) < 2:
            return found
        return sorted(found, key=lambda path: self._kinship(path, save), reverse=True)

    def _kinship(self, path: Path, save: Save) -> tuple[int, int]:
        try:
            with Archive(path, book=self._options.book) as archive:
                lists = (archive.tokens(number) for number in range(len(archive)))
                most = max(common_prefix(each, save.tokens) for each in lists)
        except (TscError, OSError):
            most = -1
        return most, self._known[path].signature[2]

    def added(self, path: Path, save: Save, file_id: FileId, n_bytes: int) -> None:
        """``save`` is now the last in ``path``, which has ``n_bytes``; saves reading it again."""
        now = signature(path.stat())
        known = self._known.get(path, _Known(now, Conversation(self._min_common), set()))
        if now[1] == n_bytes:
            known.signature = now
            known.file_ids.add(file_id)
            known.conversation.add(save.tokens, save.layouts, save.identity)
            self._known[path] = known
