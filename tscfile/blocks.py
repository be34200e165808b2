"""Cut frames into blocks and tensors into chunks, and name what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from .container.records import ID_BYTES
from .errors import UnsupportedError
from .model import BLOCK_FRAMES, CellTable, TensorSpec

CHUNK_BYTES = 1 << 20
"""Raw bytes of a full block's chunk at most, unless one tensor alone has more."""

MOST_CHUNK_BYTES = 8 << 20
"""Raw bytes of any chunk at most: readers take that much from a file of any size."""

MOST_LOSSY_BYTES = 32 << 20
"""Raw bytes of a chunk of a lossy codec at most: it holds all tensors of its frames."""

BLOCK_BYTES = 120
"""About what a block takes in a file beside the frames in its chunks."""

NO_ID = bytes(ID_BYTES)
"""The logical id of frames that have none, and the content id of a block that stores nothing or
was put together of others whose rows are not known any more."""


def block_frames(tensors: Sequence[TensorSpec], lossy: bool = False) -> int:
    """Frames of a full block: fewer where rows are so long that a chunk would be too large.

    `UnsupportedError` if a single row is. ``lossy``: all tensors are in one chunk.
    """
    frame_bytes = sum(tensor.row_bytes for tensor in tensors)
    if lossy:
        if frame_bytes > MOST_LOSSY_BYTES:
            raise UnsupportedError(f"frames of {frame_bytes} bytes: too long for a lossy tier")
        return min(BLOCK_FRAMES, MOST_LOSSY_BYTES // max(frame_bytes, 1))
    longest = max((tensor.row_bytes for tensor in tensors), default=1)
    if longest > MOST_CHUNK_BYTES:
        raise UnsupportedError(f"rows of {longest} bytes are longer than {MOST_CHUNK_BYTES}")
    return min(BLOCK_FRAMES, MOST_CHUNK_BYTES // longest)


def block_ranges(start: int, stop: int, n_frames: int = BLOCK_FRAMES) -> Iterator[tuple[int, int]]:
    """Frames ``start`` to ``stop`` as runs of at most ``n_frames``.

    >>> list(block_ranges(0, 600))
    [(0, 256), (256, 512), (512, 600)]
    """
    for first in range(start, stop, n_frames):
        yield first, min(first + n_frames, stop)


def chunk_ranges(tensors: Sequence[TensorSpec]) -> list[tuple[int, int]]:
    """Tensors as runs of one element type that make a chunk of at most `CHUNK_BYTES`."""
    ranges: list[tuple[int, int]] = []
    first = size = 0
    for i, tensor in enumerate(tensors):
        full = size + tensor.row_bytes * BLOCK_FRAMES > CHUNK_BYTES
        if i > first and (full or tensor.dtype != tensors[first].dtype):
            ranges.append((first, i))
            first = i
            size = 0
        size += tensor.row_bytes * BLOCK_FRAMES
    if tensors:
        ranges.append((first, len(tensors)))
    return ranges


def content_id(rows: Sequence[NDArray[np.uint8]]) -> bytes:
    """First 16 bytes of the BLAKE3 of all rows, tensor after tensor."""
    digest = blake3()
    for part in rows:
        digest.update(np.ascontiguousarray(part).data)
    return digest.digest(length=ID_BYTES)


def opaque_id(*contents: bytes | memoryview) -> bytes:
    """First 16 bytes of the BLAKE3 of all ``contents``, one after another."""
    digest = blake3()
    for content in contents:
        digest.update(content)
    return digest.digest(length=ID_BYTES)


def logical_ids(
    cells: CellTable, tokens: NDArray[np.int32], seed: bytes, ranges: Sequence[tuple[int, int]]
) -> list[bytes]:
    """What each range of frames is the state of: its tokens, all before them, and the model.

    Id of frames ``start`` to ``stop``: first 16 bytes of BLAKE3(``seed``, which names the model;
    tokens 0 to ``stop`` as int32; ``start`` as int64; little-endian). Defined only where cell ``i``
    is position ``i`` of one sequence with known tokens; zeros elsewhere. Equal ids mean equal
    state up to rounding, so they serve to find duplicates, never to prove them.
    """
    plain = len(tokens) >= len(cells) and bool(
        (cells.pos == np.arange(len(cells))).all() and (cells.seq_counts == 1).all()
        and (cells.seq_ids == cells.seq_ids[:1]).all()
    )  # fmt: skip
    if not plain:
        return [NO_ID] * len(ranges)
    history, hashed = blake3(seed), 0
    ids = []
    for start, stop in ranges:
        history.update(tokens[hashed:stop].astype("<i4").tobytes())
        hashed = stop
        block = history.copy()
        ids.append(block.update(start.to_bytes(8, "little")).digest(length=ID_BYTES))
    return ids
