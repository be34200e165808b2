"""Tell saves of one conversation from those of others, and put them in order, by their tokens.

Two saves are of one conversation if the first ``min_common`` tokens of both are the same, or all of
the shorter one: a short save begins whatever goes on from it. So is a save half of whose tokens are
those of the one before it, less what was cut out in front of them (a context shift). What
conversations share beyond that (a long system prompt) nobody can know from the tokens; a larger
``min_common`` says it.
"""

from __future__ import annotations

import heapq
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from .archive import Archive
from .container.records import ID_BYTES
from .container.snapshots import TrackRecord, common_prefix
from .errors import UsageError
from .identity import compare
from .model import ModelIdentity, Snapshot, TensorSpec, Track
from .sources import identity_for, open_source
from .temporal import origins

MIN_COMMON = 32

FILE_ID = "file_id"
"""Key of a snapshot's source facts: `file_id` of the file that it was read from."""

FileId = tuple[int, int]
"""The first 16 bytes of the BLAKE3 hash of a file, as two little-endian u64: the smallest that
metadata can hold."""

_PIECE = 1 << 20

Tokens = NDArray[np.int32]
Layouts = dict[tuple[int, int], tuple[TensorSpec, ...]]
"""The tensors of each cache and stream."""


@dataclass(frozen=True, eq=False)
class Save:
    """A cache file as far as its conversation is told from it. ``tokens``: int32 ``[n]``."""

    path: Path
    time_ns: int
    tokens: Tokens
    layouts: Layouts
    identity: ModelIdentity
    raw_bytes: int = 0


def read_save(path: str | os.PathLike[str], identity: ModelIdentity | None = None) -> Save:
    """Structure and tokens of a cache file, of whatever kind; its rows are not read.

    ``identity``: what is known of the model beside what the file says. Raises what
    `tscfile.sources.open_source` does, and `UsageError` if there are no tokens.
    """
    path = Path(path)
    return save_of(open_source(path), path, identity)


def save_of(snapshot: Snapshot, path: Path, identity: ModelIdentity | None = None) -> Save:
    """The same of an open snapshot; ``path``: its file."""
    if not len(snapshot.tokens):
        raise UsageError(f"{path}: holds no tokens that tell its conversation; pack it alone")
    given = identity_for(snapshot, identity) or ModelIdentity()
    facts = ModelIdentity({**given.facts, **snapshot.identity.facts})
    # A copy, as a view would keep the whole file mapped.
    tokens = np.array(snapshot.tokens, np.int32)
    layouts, raw = _layouts(snapshot.tracks), snapshot.raw_bytes
    return Save(path, path.stat().st_mtime_ns, tokens, layouts, facts, raw)


def id_of(hasher: blake3) -> FileId:
    first, second = struct.unpack("<QQ", hasher.digest(ID_BYTES))
    return first, second


def file_id(path: str | os.PathLike[str]) -> FileId:
    """The id of a file's bytes.

    >>> file_id("samples/series/turn-1.kv")
    (3490057909291457203, 16521822153684517838)
    """
    hasher = blake3()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            hasher.update(piece)
    return id_of(hasher)


def in_order(saves: Iterable[Save]) -> list[Save]:
    """Saves as they were made: what begins another comes before it, else the older comes first.

    Equal times are told apart by name.
    """
    given = list(saves)
    # Of two keys the one begins the other exactly if its tokens do; sorted, beginnings come first.
    keys = [save.tokens.astype(">i4").tobytes() for save in given]
    ranks = [(save.time_ns, os.fsencode(save.path)) for save in given]
    after: dict[int, list[int]] = {i: [] for i in range(-1, len(given))}
    stack: list[int] = []
    for i in sorted(range(len(given)), key=lambda i: (keys[i], ranks[i])):
        while stack and not keys[i].startswith(keys[stack[-1]]):
            stack.pop()
        after[stack[-1] if stack else -1].append(i)
        stack.append(i)
    ordered: list[Save] = []
    ready = [(ranks[i], i) for i in after[-1]]
    heapq.heapify(ready)
    while ready:
        _, i = heapq.heappop(ready)
        ordered.append(given[i])
        for each in after[i]:
            heapq.heappush(ready, (ranks[each], each))
    return ordered


@dataclass
class Conversation:
    """What tells whether a save belongs to a conversation.

    ``heads``: the first ``min_common`` tokens of its saves, each once; ``latest``: all of its last
    save's. A save belongs if it has the first ones of any of them, or what is left of the last when
    its context is shifted, the same tensors, and no other model.
    """

    min_common: int = MIN_COMMON
    heads: list[Tokens] = field(default_factory=list)
    layouts: Layouts = field(default_factory=dict)
    identity: ModelIdentity = field(default_factory=ModelIdentity)
    latest: Tokens = field(default_factory=lambda: np.zeros(0, np.int32))

    @classmethod
    def of_archive(cls, archive: Archive, min_common: int = MIN_COMMON) -> Conversation:
        """That of an open archive; raises what reading its structure raises."""
        found = cls(min_common)
        for number in range(len(archive)):
            record = archive.record(number)
            found.add(
                archive.tokens(number), _layouts(record.tracks), ModelIdentity(record.identity)
            )
        return found

    def add(self, tokens: Tokens, layouts: Layouts, identity: ModelIdentity) -> None:
        """Take in one save more. One without tokens tells nothing."""
        head = np.array(tokens[: self.min_common], np.int32)
        if len(head) and not any(np.array_equal(head, each) for each in self.heads):
            self.heads.append(head)
        if len(tokens):
            self.latest = tokens
        self.layouts |= layouts
        self.identity = ModelIdentity({**self.identity.facts, **identity.facts})

    def has(self, save: Save) -> bool:
        """Does ``save`` belong to it?"""
        mine = save.layouts
        if any(mine[key] != self.layouts[key] for key in mine.keys() & self.layouts.keys()):
            return False
        if compare(self.identity, save.identity):
            return False
        return any(
            common_prefix(head, save.tokens) >= min(len(head), len(save.tokens))
            for head in self.heads
        ) or self._is_shifted(save.tokens)

    def _is_shifted(self, tokens: Tokens) -> bool:
        """Are half of the tokens what follows in the last save behind some that were cut out?"""
        found = origins(self.latest, tokens, common_prefix(self.latest, tokens))
        if found is None:
            return False
        # What was put in front of other tokens is no shift.
        n_found = int((found >= np.arange(len(found))).sum())
        return n_found >= max(self.min_common, len(tokens) / 2)


def split(saves: Sequence[Save], min_common: int = MIN_COMMON) -> list[list[Save]]:
    """Saves by conversation, each in order; conversations in the order of their first saves.

    A save that could belong to several goes where it has most tokens in common, to the newest of
    equals.
    """
    found: list[tuple[Conversation, list[Save]]] = []
    for save in in_order(saves):
        best, most = None, -1
        for conversation, members in found:
            if conversation.has(save):
                n_common = max(common_prefix(each.tokens, save.tokens) for each in members)
                if n_common >= most:
                    best, most = (conversation, members), n_common
        if best is None:
            best = (Conversation(min_common), [])
            found.append(best)
        best[0].add(save.tokens, save.layouts, save.identity)
        best[1].append(save)
    return [members for _, members in found]


def _layouts(tracks: Sequence[Track] | Sequence[TrackRecord]) -> Layouts:
    return {
        (track.cache, track.stream): tuple(track.tensors) for track in tracks if len(track.cells)
    }
