"""Walk over a file from record to record, whatever its indices say of them.

Every byte is accounted for: it is of the header, of a record, of a trailer, or zero between them,
or it is a `Flaw`. Where a record header cannot be read, the walk goes on at the next place that
holds one: records start at multiples of 8, and a header has a checksum of its own.

A flaw that is one flipped bit is found out, and the byte that was there with it: the checksum is
right again once the bit is flipped back. That another byte string of those that are tried has the
same 64 bits of checksum happens once in 2^45 records of the longest kind.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from ..errors import DamagedError, UnsupportedError
from .records import (
    INDEX,
    RECORD_ALIGNMENT,
    RECORD_NAMES,
    Header,
    RecordHeader,
    RecordRef,
    Trailer,
)

HEADER, TRAILER, PADDING, GAP, UNREADABLE = "header", "trailer", "padding", "gap", "bytes"
"""Kinds of flaws beside those of records, which are in `RECORD_NAMES`."""

MOST_TRIED_BYTES = 1 << 16
"""Payloads up to this length are tried for a flipped bit: about a second."""

_MOST_TRIES = 1 << 21
_PIECE = 1 << 20
_HEADER_LIKENESS = Header.SIZE // 2


@dataclass(frozen=True)
class FoundRecord:
    """A record whose header could be read. ``is_right``: its payload has its checksum, perhaps
    with a bit flipped back."""

    offset: int
    header: RecordHeader
    is_right: bool

    @property
    def ref(self) -> RecordRef:
        length = RecordHeader.SIZE + self.header.padding + self.header.length
        return RecordRef(self.offset, length)

    @property
    def kind(self) -> str:
        return RECORD_NAMES.get(self.header.type, f"record of type {self.header.type}")


@dataclass(frozen=True)
class Flaw:
    """Bytes that are not what they should be.

    ``kind``: `HEADER`, `TRAILER`, a record's, `PADDING` or `GAP` that is not zero, or `UNREADABLE`
    where a record should be. ``offset``: of the header, trailer or record that is hit, else of the
    bytes. ``problem``: what is wrong. ``flipped``: offset of the byte whose bit was flipped back.
    """

    kind: str
    offset: int
    length: int
    problem: str
    flipped: int | None = None

    @property
    def is_harmless(self) -> bool:
        """Nobody reads these bytes."""
        return self.kind in (PADDING, GAP)

    @property
    def leads(self) -> bool:
        """These bytes may be on the way to the snapshots."""
        return self.kind in (HEADER, TRAILER, RECORD_NAMES[INDEX], UNREADABLE)


@dataclass
class Survey:
    """``records`` and ``trailers`` by their offsets, in the order of the file. ``patches``: right
    bytes by offset, of what was put right and of a header that was not."""

    size: int
    records: list[FoundRecord] = field(default_factory=list)
    trailers: dict[int, Trailer] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)
    patches: dict[int, int] = field(default_factory=dict)


def survey(path: str | os.PathLike[str]) -> Survey:
    """Walk over the file at ``path``.

    `DamagedError` if it is no tsc file to all appearances, `UnsupportedError` if it is one of
    another version.

    >>> import tempfile, tscfile
    >>> path = tempfile.mkdtemp() + "/session.tsc"
    >>> report = tscfile.pack("samples/session.kv", path)
    >>> found = survey(path)
    >>> [record.kind for record in found.records][-2:], len(found.trailers), found.flaws
    (['snapshot', 'index'], 1, [])
    """
    with open(path, "rb") as file:
        return _Walk(file.fileno(), os.fspath(path)).run()


class _Walk:
    def __init__(self, fd: int, path: str) -> None:
        self._fd, self._path = fd, path
        self._size = os.fstat(fd).st_size
        self._found = Survey(self._size)
        self._tries_left = _MOST_TRIES

    def run(self) -> Survey:
        self._header()
        at = Header.SIZE
        while at < self._size:
            after = self._step(at)
            if after is None:
                after = self._next(at + RECORD_ALIGNMENT)
                self._lose(at, after)
            at = after
        self._found.flaws.sort(key=lambda flaw: flaw.offset)
        return self._found

    # --- parts of the file --------------------------------------------------------------------

    def _header(self) -> None:
        data = self._read(0, Header.SIZE)
        try:
            Header.read(data, self._path)
            return
        except DamagedError as error:
            usual = Header().write()
            likeness = sum(a == b for a, b in zip(data, usual, strict=False))
            last = max(self._size - Trailer.SIZE, 0)
            if likeness < _HEADER_LIKENESS and not Trailer.read(
                self._read(last, Trailer.SIZE), last
            ):
                raise
            flipped = self._mend(0, data, self._is_header)
            if flipped is None:
                # Its fields are not known; all files so far have the usual ones.
                self._found.patches |= dict(enumerate(usual))
            problem = str(error).removeprefix(f"{self._path}: ")
            self._found.flaws.append(Flaw(HEADER, 0, Header.SIZE, problem, flipped))

    def _is_header(self, data: bytes) -> bool:
        try:
            Header.read(data, self._path)
        except DamagedError:
            return False
        except UnsupportedError:
            # It says so with the right checksum, once the bit is flipped back.
            raise
        return True

    def _step(self, at: int) -> int | None:
        """Take in the record or trailer at ``at``; returns where the next one is, None if there
        is none here."""
        head = self._read(at, Trailer.SIZE)
        flipped = None
        trailer, header = Trailer.read(head, at), self._record_header(head, at)
        if trailer is None and header is None and len(head) == Trailer.SIZE:
            flipped = self._mend(at, head, lambda data: Trailer.read(data, at) is not None)
            if flipped is not None:
                trailer = Trailer.read(self._mended(at, head), at)
                self._flaw(TRAILER, at, Trailer.SIZE, "its checksum is wrong", flipped)
        if trailer is not None:
            self._found.trailers[at] = trailer
            return at + Trailer.SIZE
        if header is None and len(head) >= RecordHeader.SIZE:
            flipped = self._mend(at, head[: RecordHeader.SIZE], lambda data: self._leads(data, at))
            if flipped is not None:
                header = self._record_header(self._mended(at, head), at)
        return None if header is None else self._record(at, header, flipped)

    def _record(self, at: int, header: RecordHeader, flipped: int | None) -> int:
        start = at + RecordHeader.SIZE + header.padding
        stop = start + header.length
        after = min(stop + -stop % RECORD_ALIGNMENT, self._size)
        is_right = self._checksum(start, header.length) == header.payload_checksum
        problem = "its header's checksum is wrong" if flipped is not None else None
        if not is_right:
            problem = f"checksum of {header.length} bytes is wrong"
            if header.length <= MOST_TRIED_BYTES:
                data = self._read(start, header.length)
                right = header.payload_checksum
                flipped = self._mend(start, data, lambda d: xxhash.xxh3_64_intdigest(d) == right)
                is_right = flipped is not None
        record = FoundRecord(at, header, is_right)
        if problem:
            self._flaw(record.kind, at, record.ref.length, problem, flipped)
        self._found.records.append(record)
        self._zero(PADDING, at + RecordHeader.SIZE, start)
        self._zero(GAP, stop, after)
        return after

    def _lose(self, start: int, stop: int) -> None:
        last = self._found.records[-1] if self._found.records else None
        if last and last.header.type == INDEX and _end(last.ref) == start <= stop - Trailer.SIZE:
            self._flaw(TRAILER, start, Trailer.SIZE, "it cannot be read")
            start += Trailer.SIZE
        trailer = Trailer.read(self._read(stop, Trailer.SIZE), stop)
        if trailer and start == trailer.index_offset:
            self._flaw(RECORD_NAMES[INDEX], start, stop - start, "its header cannot be read")
        elif start < stop:
            self._flaw(UNREADABLE, start, stop - start, "they are no record and no trailer")

    def _zero(self, kind: str, start: int, stop: int) -> None:
        if any(self._read(start, stop - start)):
            self._flaw(kind, start, stop - start, "it is not zero")

    def _flaw(
        self, kind: str, offset: int, length: int, problem: str, flipped: int | None = None
    ) -> None:
        self._found.flaws.append(Flaw(kind, offset, length, problem, flipped))

    # --- looking for records ------------------------------------------------------------------

    def _record_header(self, head: bytes, at: int) -> RecordHeader | None:
        """The header in these bytes if a record with it can be here."""
        try:
            header = RecordHeader.read(head, self._path)
        except DamagedError:
            return None
        room = self._size - at - RecordHeader.SIZE
        return header if header.type and header.padding + header.length <= room else None

    def _leads(self, head: bytes, at: int) -> bool:
        """Does a header lead to the payload that it speaks of?"""
        header = self._record_header(head, at)
        if header is None:
            return False
        start = at + RecordHeader.SIZE + header.padding
        return self._checksum(start, header.length) == header.payload_checksum

    def _next(self, at: int) -> int:
        """The first place from ``at`` on where a record or a trailer is, or the end."""
        while at < self._size:
            # Windows overlap by what a trailer takes, and end at a multiple of 8.
            window = self._read(at, _PIECE + Trailer.SIZE)
            for place in _candidates(window, at, self._size):
                head = window[place - at : place - at + Trailer.SIZE]
                if Trailer.read(head, place) or self._record_header(head, place):
                    return place
            at += _PIECE
        return self._size

    # --- bits -----------------------------------------------------------------------------------

    def _mend(self, offset: int, data: bytes, is_right: Callable[[bytes], bool]) -> int | None:
        """Flip one bit back so that ``data``, which stands at ``offset``, is right; returns the
        offset of its byte, and notes what is right there."""
        n_tries = 8 * len(data)
        if n_tries > self._tries_left:
            return None
        self._tries_left -= n_tries
        tried = bytearray(data)
        for i in range(len(tried)):
            for bit in range(8):
                tried[i] ^= 1 << bit
                # Hashes read any buffer; no copy is made for those that are wrong.
                if is_right(tried):  # type: ignore[arg-type]
                    self._found.patches[offset + i] = tried[i]
                    return offset + i
                tried[i] ^= 1 << bit
        return None

    def _mended(self, offset: int, data: bytes) -> bytes:
        return patched(data, offset, self._found.patches)

    def _read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset) if length else b""

    def _checksum(self, start: int, length: int) -> int:
        digest = xxhash.xxh3_64()
        for at in range(start, start + length, _PIECE):
            digest.update(self._read(at, min(_PIECE, start + length - at)))
        return digest.intdigest()


def _end(ref: RecordRef) -> int:
    """Where the next record or trailer is."""
    return ref.offset + ref.length + -(ref.offset + ref.length) % RECORD_ALIGNMENT


def patched(data: bytes, offset: int, patches: dict[int, int]) -> bytes:
    """``data``, which stands at ``offset`` of a file, with the right bytes of ``patches``.

    >>> patched(b"abc", 10, {11: 66, 99: 0})
    b'aBc'
    """
    inside = {at: byte for at, byte in patches.items() if offset <= at < offset + len(data)}
    if not inside:
        return data
    whole = bytearray(data)
    for at, byte in inside.items():
        whole[at - offset] = byte
    return bytes(whole)


def _candidates(window: bytes, start: int, size: int) -> Iterator[int]:
    """Offsets in the file where a record header or a trailer may stand in ``window``, whose first
    byte is at ``start``, a multiple of 8."""
    words = np.frombuffer(window, "<u8", len(window) // 8)
    if len(words) < 3:
        return
    first, length = words[:-2], words[1:-1]
    places = start + 8 * np.arange(len(first), dtype=np.int64)
    # The length of a record that fits is all zeros above the file's; random bytes are not.
    room = np.maximum(size - places - RecordHeader.SIZE, 0).astype(np.uint64)
    fits = (first & np.uint64(0xFF) > 0) & (length <= room)
    (magic,) = struct.unpack("<Q", Trailer.MAGIC)
    ends = np.zeros(len(first), bool)
    ends[: len(words) - 3] = words[3:] == magic
    yield from places[fits | ends].tolist()
