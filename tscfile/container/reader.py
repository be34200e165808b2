"""Open a container: find the newest whole index, then give out records by reference.

Strategy: the trailer at the end of the file leads to the newest index, each index to the one
before it. Where the end of the file is not a trailer, an append was cut off or bytes are damaged;
the newest trailer further in is taken and `Container.torn_bytes` says how much lies behind it.
Payloads are read with ``pread`` when asked for, so opening costs the same for any size of file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from ..bytestream import Allowance
from ..errors import DamagedError, TruncatedError, UsageError
from .records import (
    INDEX,
    RECORD_NAMES,
    BlockEntry,
    ExtraEntry,
    Header,
    Index,
    RecordHeader,
    RecordRef,
    Trailer,
    checksum,
)

_SEARCH_WINDOW = 1 << 20
_MAX_CHAIN = 4096
_SLACK_BYTES = 32 << 20


@dataclass(frozen=True)
class IndexSegment:
    """One index record and how many entries it holds."""

    ref: RecordRef
    n_blocks: int
    n_snapshots: int
    extras: tuple[ExtraEntry, ...]


class Container:
    """A ``.tsc`` file opened for reading; safe to read from several threads.

    ``blocks`` and ``snapshots`` hold the entries of all indices, oldest first; ``segments`` the
    index records, oldest first; ``whole_end`` is where the newest whole commit ends.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path``; `DamagedError`, `UnsupportedError` or `OSError` if that cannot be."""
        self.path = os.fspath(path)
        # Asked before opening, which would wait for the other end of a pipe.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise UsageError(f"{self.path}: is not a regular file; name a .tsc file")
        self._fd = os.open(self.path, os.O_RDONLY)
        try:
            self.size = os.fstat(self._fd).st_size
            self.header = Header.read(self._bytes(0, Header.SIZE), self.path)
            trailer, self.whole_end = self._find_trailer()
            self.torn_bytes = self.size - self.whole_end
            self.segments: list[IndexSegment] = []
            self.blocks: list[BlockEntry] = []
            self.snapshots: list[RecordRef] = []
            self._read_indices(RecordRef(trailer.index_offset, trailer.index_length))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def allowance(self) -> Allowance:
        """How much memory a structure of this file may take: twice the file and a little."""
        return Allowance(2 * self.size + _SLACK_BYTES)

    def read(self, ref: RecordRef, type_: int, payload_checksum: int | None = None) -> memoryview:
        """Payload of the record at ``ref``, its header and checksum verified."""
        name = RECORD_NAMES.get(type_, f"record of type {type_}")
        where = f"{self.path}: {name} at offset {ref.offset}"
        if ref.length < RecordHeader.SIZE or ref.offset + ref.length > self.whole_end:
            raise DamagedError(f"{where}: lies outside the file; damaged")
        data = memoryview(self._pread(ref, where))
        header = RecordHeader.read(data, where)
        start = RecordHeader.SIZE + header.padding
        if header.type != type_ or start + header.length != ref.length:
            raise DamagedError(f"{where}: is not the record the index promises; damaged")
        payload = data[start:]
        if checksum(payload) != header.payload_checksum:
            raise DamagedError(f"{where}: checksum of {header.length} bytes is wrong; damaged")
        if payload_checksum not in (None, header.payload_checksum):
            raise DamagedError(f"{where}: is not the record the index promises; damaged")
        return payload

    def extras(self, type_: int) -> list[RecordRef]:
        """Records of a type that belong to no block or snapshot, oldest first."""
        found = [extra for segment in self.segments for extra in segment.extras]
        return [extra.ref for extra in found if extra.type == type_]

    def by_checksum(self, type_: int) -> dict[int, RecordRef]:
        """The same by the checksum of their payload; of equal ones the oldest."""
        found: dict[int, RecordRef] = {}
        for ref in self.extras(type_):
            if ref.offset + RecordHeader.SIZE > self.whole_end:
                # Whoever needs it will not find it.
                continue
            head = self._bytes(ref.offset, RecordHeader.SIZE)
            try:
                header = RecordHeader.read(head, self.path)
            except DamagedError:
                # Nor this one; what others need is there all the same.
                continue
            found.setdefault(header.payload_checksum, ref)
        return found

    def _bytes(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes of the file. All that is read of it goes through here."""
        return os.pread(self._fd, length, offset)

    def _pread(self, ref: RecordRef, where: str) -> bytes:
        parts = []
        at, left = ref.offset, ref.length
        # One pread returns 2 GiB at most, and may return less than asked for.
        while left:
            part = self._bytes(at, left)
            if not part:
                raise TruncatedError(f"{where}: the file ends within it")
            parts.append(part)
            at, left = at + len(part), left - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _find_trailer(self) -> tuple[Trailer, int]:
        """The last trailer whose index record is whole, and the offset behind it."""
        # A whole file ends with its trailer; only for others is more than that looked at.
        end, reach = self.size, Trailer.SIZE
        # Any number of trailers can name records as long as the file; whole ones are soon found.
        search = Allowance(2 * self.size + _SLACK_BYTES)
        while end >= Header.SIZE + Trailer.SIZE:
            start = max(Header.SIZE, end - reach)
            window = self._bytes(start, end - start)
            at = len(window)
            while (at := window.rfind(Trailer.MAGIC, 0, at)) >= 0:
                first = at + len(Trailer.MAGIC) - Trailer.SIZE
                if first < 0:
                    break
                trailer = Trailer.read(window[first : first + Trailer.SIZE], start + first)
                if trailer and self._is_index(trailer, start + first, search):
                    return trailer, start + first + Trailer.SIZE
            if start == Header.SIZE:
                break
            # Windows overlap by a trailer, so that none is cut in two.
            end, reach = start + Trailer.SIZE - 1, _SEARCH_WINDOW
        raise TruncatedError(f"{self.path}: no whole index; the file is cut short or damaged")

    def _is_index(self, trailer: Trailer, end: int, search: Allowance) -> bool:
        if trailer.index_offset + trailer.index_length > end:
            return False
        self.whole_end = end
        try:
            search.claim(trailer.index_length, self.path)
            self.read(RecordRef(trailer.index_offset, trailer.index_length), INDEX)
        except DamagedError:
            return False
        return True

    def _read_indices(self, newest: RecordRef) -> None:
        indices: list[Index] = []
        allowance = self.allowance()
        ref = newest
        while ref.length:
            payload = self.read(ref, INDEX)
            where = f"{self.path}: index at offset {ref.offset}"
            index = Index.read(payload, where, allowance)
            if index.previous.offset >= ref.offset or len(indices) == _MAX_CHAIN:
                raise DamagedError(f"{self.path}: the chain of indices is not a chain; damaged")
            indices.append(index)
            self.segments.append(
                IndexSegment(ref, len(index.blocks), len(index.snapshots), tuple(index.extras))
            )
            ref = index.previous
        self.segments.reverse()
        for index in reversed(indices):
            if (index.first_block, index.first_snapshot) != (len(self.blocks), len(self.snapshots)):
                raise DamagedError(f"{self.path}: an index does not follow the one before; damaged")
            self.blocks += index.blocks
            self.snapshots += index.snapshots

