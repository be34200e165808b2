"""Snapshot records of an open file: each is told from earlier ones, so they are read in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import tokens
from .bytestream import ByteReader
from .container.reader import Container
from .container.records import SNAPSHOT
from .container.snapshots import SnapshotHead, SnapshotRecord, TokenIds
from .errors import DamagedError, UsageError

if TYPE_CHECKING:
    from .entropy.token_ids import TokenCoder

_CACHED_RECORDS = 32 << 20
"""Bytes of snapshot records that are kept once they are read."""

_CACHED_TOKENS = 2 << 20


class History:
    """Heads, records and tokens of the snapshots of ``container``; `tscfile.archive.Archive` gives
    them out.

    ``coder_of(coding, where)``: what token ids of a snapshot with a book are coded with;
    ``check(record, where)``: raises `DamagedError` for a record that the file does not bear out.
    ``max_cells``: cells of a track at most; as many as the file has frames, unless it is changed.
    """

    def __init__(
        self, container: Container, lock: threading.RLock,
        coder_of: Callable[[dict[str, Any], str], TokenCoder | None],
        check: Callable[[SnapshotRecord, str], None],
    ) -> None:  # fmt: skip
        self._container, self._lock = container, lock
        self._coder_of, self._check = coder_of, check
        self._heads: dict[int, SnapshotHead] = {}
        self._records: dict[int, tuple[SnapshotRecord, bytes]] = {}
        self._record_bytes: dict[int, int] = {}
        # By snapshot and context, 0 for its own tokens.
        self._tokens: dict[tuple[int, int], NDArray[np.int32]] = {}
        self._n_tokens = 0
        self.max_cells = sum(block.n_frames for block in container.blocks)

    def record(self, number: int = -1) -> SnapshotRecord:
        """What the file says of snapshot ``number``; negative numbers count from the last.

        `UsageError` if there is no such snapshot.
        """
        return self._record(number)[0]

    def structure(self, number: int) -> bytes:
        """The structure of a snapshot's record."""
        return self._record(number)[1]

    def _record(self, number: int) -> tuple[SnapshotRecord, bytes]:
        wanted = self._index(number)
        # Several threads ask, and what one reads may push out what another has just found.
        with self._lock:
            # A record is told from that of its dictionary, which comes first.
            pending = [] if wanted in self._records else [wanted]
            while pending:
                dictionary = self.head(pending[-1]).dictionary
                if dictionary is not None and dictionary not in self._records:
                    pending.append(dictionary)
                    continue
                self._load(pending.pop(), dictionary)
            return self._records[wanted]

    def head(self, number: int = -1) -> SnapshotHead:
        """What is known of a snapshot without its structure; raises as `record` does."""
        wanted = self._index(number)
        # Whether it keeps too many of the parent's tokens is told by the parent.
        pending = [] if wanted in self._heads else [wanted]
        while pending:
            payload, where = self._payload(pending[-1])
            head = SnapshotHead.read(ByteReader(payload, where, self._container.allowance()))
            if head.number != pending[-1]:
                raise DamagedError(f"{where}: its record says it is number {head.number}; damaged")
            if {head.parent, head.dictionary} & {head.number}:
                raise DamagedError(f"{where}: names itself as an earlier one; damaged")
            if head.parent is not None and head.parent not in self._heads:
                pending.append(head.parent)
                continue
            self._check_kept(head, where)
            self._heads[pending.pop()] = head
        return self._heads[wanted]

    def _check_kept(self, head: SnapshotHead, where: str) -> None:
        if head.parent is None:
            return
        parent = self._heads[head.parent]
        known = [len(parent.ids), *(len(context.ids) for context in parent.contexts)]
        for source, ids in [(0, head.ids), *((each.source, each.ids) for each in head.contexts)]:
            if source >= len(known) or ids.kept > known[source]:
                raise DamagedError(f"{where}: keeps tokens that its parent lacks; damaged")

    def _index(self, number: int) -> int:
        n = len(self._container.snapshots)
        if not -n <= number < n:
            raise UsageError(
                f"{self._container.path}: no snapshot {number}; there are {n}"
                + (f", 0 to {n - 1}" if n else "")
            )
        return number % n

    def tokens(self, number: int = -1, context: int = 0) -> NDArray[np.int32]:
        """Token ids of a snapshot, int32 ``[n]``; needs its book if they are coded with it.

        ``context``: of which of its contexts, counted from 1; 0 for its own.
        """
        # Blocks are decoded by several threads, and each asks.
        with self._lock:
            return self._read_tokens(self._index(number), context)

    def _read_tokens(
        self, number: int, context: int = 0, coding: dict[str, Any] | None = None
    ) -> NDArray[np.int32]:
        """``coding``: that of the snapshot, while its record is not read yet."""
        # The first of its tokens are the parent's, and so on: a loop, as chains are long.
        chain = [(number, context)]
        while chain[-1] not in self._tokens:
            head, (ids, source) = self.head(chain[-1][0]), self._ids(*chain[-1])
            if not ids.kept:
                break
            assert head.parent is not None
            chain.append((head.parent, source))
        found = np.zeros(0, np.int32)
        for key in reversed(chain):
            if key not in self._tokens:
                is_first = key == chain[0]
                self._tokens[key] = self._decode_ids(key, found, coding if is_first else None)
                self._n_tokens += len(self._tokens[key])
                while len(self._tokens) > 2 and self._n_tokens > _CACHED_TOKENS:
                    self._n_tokens -= len(self._tokens.pop(next(iter(self._tokens))))
            found = self._tokens[key]
        return found

    def _ids(self, number: int, context: int) -> tuple[TokenIds, int]:
        """Ids as they are stored, and the parent's context that they keep from."""
        head = self.head(number)
        if not context:
            return head.ids, 0
        return head.contexts[context - 1].ids, head.contexts[context - 1].source

    def _decode_ids(
        self, key: tuple[int, int], before: NDArray[np.int32], coding: dict[str, Any] | None
    ) -> NDArray[np.int32]:
        number, where = key[0], f"{self._container.path}: snapshot {key[0]}"
        ids, coder = self._ids(*key)[0], None
        if ids.coding == tokens.OF_BOOK:
            coder = self._coder_of(coding or self.record(number).coding, where)
        return tokens.decode(ids, before, coder, where)

    def lineage(self, number: int) -> set[int]:
        """A snapshot and those whose records it is read with: numbers."""
        found: set[int] = set()
        pending: list[int | None] = [self._index(number)]
        while pending:
            each = pending.pop()
            if each is not None and each not in found:
                found.add(each)
                head = self.head(each)
                keeps = head.ids.kept or any(context.ids.kept for context in head.contexts)
                pending += [head.dictionary, head.parent if keeps else None]
        return found

    def _payload(self, number: int) -> tuple[memoryview, str]:
        ref = self._container.snapshots[number]
        return self._container.read(ref, SNAPSHOT), f"{self._container.path}: snapshot {number}"

    def _load(self, number: int, dictionary: int | None) -> None:
        payload, where = self._payload(number)
        like = b"" if dictionary is None else self._records[dictionary][1]
        allowance = self._container.allowance()
        full = allowance.left

        def tokens_of(coding: dict[str, Any]) -> NDArray[np.int32]:
            with self._lock:
                return self._read_tokens(number, 0, coding)

        record, structure = SnapshotRecord.read(
            payload, like, tokens_of, self.max_cells, where, allowance
        )
        self._check(record, where)
        self._records[number] = record, structure
        self._record_bytes[number] = full - allowance.left
        # The oldest go; one that is needed again is read again.
        while len(self._records) > 1 and sum(self._record_bytes.values()) > _CACHED_RECORDS:
            oldest = next(iter(self._records))
            del self._records[oldest], self._record_bytes[oldest]
