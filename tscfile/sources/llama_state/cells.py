"""Cell records: who sits in each cell of a cache, as the words of the file and as arrays.

A record is ``pos, n_seq_id, ext…, seq ids…``, all i32, so records differ in length where cells are
shared. Both directions work on whole arrays, because a cache has a hundred thousand cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...model import CellTable
from .layout import MAX_SEQUENCES

_FIRST_CHUNK = 64
_MAX_CHUNK = 1 << 20
_SHORT_RUN = 8
_SCALAR_CELLS = 4096


class BadCells(Exception):
    """Records that cannot be cells. ``word`` is where, ``truncated`` that the words ran out."""

    def __init__(self, message: str, word: int, truncated: bool = False) -> None:
        super().__init__(message)
        self.word = word
        self.truncated = truncated


def decode_cells(
    words: NDArray[np.int32], n_cells: int, n_ext: int, max_seq_count: int = MAX_SEQUENCES
) -> tuple[CellTable, int]:
    """Read ``n_cells`` records from the front of ``words``; returns them and the words used.

    ``words``: int32, at least as long as the records. Raises `BadCells`. Nothing is allocated
    before ``n_cells`` is known to fit.
    """
    n_fixed = 2 + n_ext
    if n_cells * n_fixed > len(words):
        raise BadCells(f"{n_cells} cell records do not fit", 0, truncated=True)
    counts, used = _decode_counts(words, n_cells, n_fixed, max_seq_count)
    table = _gather(words[:used], counts, n_ext)
    _check_table(table)
    return table, used


def _decode_counts(
    words: NDArray[np.int32], n_cells: int, n_fixed: int, max_seq_count: int
) -> tuple[NDArray[np.int32], int]:
    """Sequences per cell, found run by run: within a run the records are equally long."""
    counts = np.empty(n_cells, dtype=np.int32)
    cell = word = 0
    chunk = _FIRST_CHUNK
    while cell < n_cells:
        count = _checked_count(words, word, n_fixed, max_seq_count)
        stride = n_fixed + count
        n_tried = min(chunk, n_cells - cell, (len(words) - word) // stride)
        column = words[word + 1 : word + n_tried * stride : stride]
        other = np.flatnonzero(column != count)
        run = int(other[0]) if len(other) else n_tried
        counts[cell : cell + run] = count
        cell += run
        word += run * stride
        if not len(other):
            chunk = min(chunk * 4, _MAX_CHUNK)
        else:
            chunk = _FIRST_CHUNK
            if run < _SHORT_RUN:
                cell, word = _count_one_by_one(words, counts, cell, word, n_fixed, max_seq_count)
    return counts, word


def _count_one_by_one(
    words: NDArray[np.int32],
    counts: NDArray[np.int32],
    cell: int,
    word: int,
    n_fixed: int,
    max_seq_count: int,
) -> tuple[int, int]:
    """The next few thousand cells without array calls, which cost too much for short runs."""
    stop = min(cell + _SCALAR_CELLS, len(counts))
    while cell < stop:
        count = _checked_count(words, word, n_fixed, max_seq_count)
        counts[cell] = count
        word += n_fixed + count
        cell += 1
    return cell, word


def _checked_count(words: NDArray[np.int32], word: int, n_fixed: int, max_seq_count: int) -> int:
    if word + n_fixed > len(words):
        raise BadCells("a cell record is cut", word, truncated=True)
    count = int(words[word + 1])
    if not 0 <= count <= max_seq_count:
        raise BadCells(f"a cell of {count} sequences", word + 1)
    if word + n_fixed + count > len(words):
        raise BadCells("the sequence ids of a cell are cut", word, truncated=True)
    return count


def _gather(words: NDArray[np.int32], counts: NDArray[np.int32], n_ext: int) -> CellTable:
    n_cells = len(counts)
    if n_cells == 0:
        return empty_cells(n_ext)
    n_fixed = 2 + n_ext
    first = int(counts[0])
    if len(words) == n_cells * (n_fixed + first) and (counts == first).all():
        grid = words.reshape(n_cells, n_fixed + first)
        pos, ext, seq_ids = grid[:, 0], grid[:, 2:n_fixed], grid[:, n_fixed:].reshape(-1)
    else:
        starts = _record_starts(counts, n_fixed)
        pos = words[starts]
        ext = np.empty((n_cells, n_ext), np.int32)
        for column in range(n_ext):
            ext[:, column] = words[starts + (2 + column)]
        seq_ids = words[_holds_seq_id(starts, len(words), n_fixed)]
    return CellTable(
        np.ascontiguousarray(pos, dtype=np.int32),
        counts,
        np.ascontiguousarray(seq_ids, dtype=np.int32),
        np.ascontiguousarray(ext, dtype=np.int32),
    )


def _record_starts(counts: NDArray[np.int32], n_fixed: int) -> NDArray[Any]:
    """Where each record starts, in words. The integers are no wider than they must be: a file of
    nothing but cells is read in about twice its size."""
    n_words = len(counts) * n_fixed + int(counts.sum(dtype=np.int64))
    starts: NDArray[Any] = np.zeros(len(counts), np.int32 if n_words < 1 << 31 else np.int64)
    np.cumsum(counts[:-1], out=starts[1:])
    starts += np.arange(len(counts), dtype=starts.dtype) * n_fixed
    return starts


def _holds_seq_id(
    starts: NDArray[Any], n_words: int, n_fixed: int
) -> NDArray[np.bool_]:
    """Of each word whether it is a sequence id: the records without their fixed words."""
    held = np.ones(n_words, np.bool_)
    for word in range(n_fixed):
        held[starts + word] = False
    return held


def _check_table(table: CellTable) -> None:
    if len(table) and int(table.pos.min()) < 0:
        raise BadCells(f"a cell at the negative position {int(table.pos.min())}", 0)
    if len(table.seq_ids):
        low, high = int(table.seq_ids.min()), int(table.seq_ids.max())
        if low < 0 or high >= MAX_SEQUENCES:
            raise BadCells(f"the sequence id {low if low < 0 else high}", 0)


def encode_cells(table: CellTable) -> NDArray[np.int32]:
    """The records of a table as int32 words, `decode_cells` backwards.

    >>> table = CellTable(*(np.array(a, np.int32) for a in ([7, 8], [1, 2], [0, 0, 3])),
    ...                   np.zeros((2, 0), np.int32))
    >>> encode_cells(table).tolist()
    [7, 1, 0, 8, 2, 0, 3]
    """
    n_fixed = 2 + table.ext.shape[1]
    words = np.empty(len(table) * n_fixed + len(table.seq_ids), dtype="<i4")
    if not len(table):
        return words
    starts = _record_starts(table.seq_counts, n_fixed)
    words[starts] = table.pos
    words[starts + 1] = table.seq_counts
    for column in range(table.ext.shape[1]):
        words[starts + (2 + column)] = table.ext[:, column]
    words[_holds_seq_id(starts, len(words), n_fixed)] = table.seq_ids
    return words


def encoded_cells_bytes(table: CellTable) -> int:
    """Length of `encode_cells` in bytes."""
    n_fixed: int = 2 + table.ext.shape[1]
    return 4 * (len(table) * n_fixed + len(table.seq_ids))


def empty_cells(n_ext: int = 0) -> CellTable:
    """A table without cells."""
    none = np.zeros(0, dtype=np.int32)
    return CellTable(none, none.copy(), none.copy(), np.zeros((0, n_ext), dtype=np.int32))
