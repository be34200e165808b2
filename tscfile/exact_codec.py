"""Exact coding of frames with a book: each channel as what those before it leave open.

rows -> patterns, channel after channel -> integers that predict the next ones -> where a value lies
about its prediction -> rANS. All sums are whole numbers, so that every machine predicts the same.

A chunk decodes on its own: it holds the positions that its keys were turned by and the tokens, both
of which only help to predict. ``spec/codecs/book-exact.md`` gives every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import exact, ops
from tscfile_kernels.exact import ExactGroup

from . import registry
from .bytestream import ByteReader, ByteWriter
from .container.records import ChunkHeader
from .container.writer import EncodedChunk
from .context import FrameContext
from .dtypes import dtype_from_ggml
from .entropy import ints
from .errors import DamagedError, MismatchError, UnsupportedError
from .exact_tables import CONSTANT, ExactTables
from .transforms.exact_frames import Patterns, angles
from .transforms.rope import HALVES, NEIGHBOURS

if TYPE_CHECKING:
    from .model import TensorSpec

Rows = NDArray[np.uint8]
Ints = NDArray[np.int64]

PAIRINGS = (HALVES, NEIGHBOURS)
_FRAMES_PER_LANE = 4

Step = Callable[[int, ExactGroup, Ints, tuple[Ints, Ints], Ints], Ints]


class ExactCodec:
    """Codes the tensors of one model with the tables of its book."""

    def __init__(self, tables: ExactTables, inv_freq: NDArray[np.float32], pairing: str) -> None:
        self.tables = tables
        self._inv_freq, self._pairing = inv_freq, pairing

    def _fits(self, tensors: Sequence[TensorSpec]) -> bool:
        """Are there as many tensors and channels as the tables are for?"""
        width, n_layers = self.tables.order.width, self.tables.order.n_layers
        roles = ["".join(tensor.role for tensor in tensors).count(role) for role in "kv"]
        return roles == [n_layers] * 2 and all(tensor.n_channels == width for tensor in tensors)

    @staticmethod
    def takes_types(tensors: Sequence[TensorSpec]) -> bool:
        """Are all tensors of one type that is coded?"""
        types = {tensor.dtype.name for tensor in tensors}
        turned = any(tensor.rotation for tensor in tensors)
        return len(types) == 1 and types <= set(exact.FORMATS) and not turned

    def encode(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], context: FrameContext
    ) -> EncodedChunk:
        """Code all tensors of a track, one uint8 ``[n, row_bytes]`` each, n > 0."""
        form = exact.FORMATS[tensors[0].dtype.name]
        patterns = self.tables.order.gather(rows, tensors, self._pairing)
        n_frames = patterns.shape[1]
        ids = np.maximum(context.history(1)[:, 0], -1)
        shape = (*patterns.shape, 3)
        starts, sizes = np.empty(shape, np.uint32), np.empty(shape, np.uint32)
        bits = np.empty(shape, np.uint8)

        def take(channels: slice, events: ops.ExactEvents) -> None:
            starts[channels], sizes[channels], bits[channels] = events[:3]

        self.events(patterns, form, context.pos, ids, take)
        lanes = min(max(1, n_frames // _FRAMES_PER_LANE), ops.LANES)
        words, lengths = ops.exact_encode(starts, sizes, bits, lanes)
        writer = ByteWriter().u8(PAIRINGS.index(self._pairing))
        ints.write(writer, context.pos)
        ints.write(writer, ids)
        writer.uvarint(lanes)
        for length in lengths.tolist():
            writer.uvarint(length)
        writer.raw(words.astype("<u4").tobytes())
        header = ChunkHeader(
            registry.BOOK_EXACT, 0, n_frames, 0, tensors[0].dtype.ggml_id,
            tuple(part.shape[1] for part in rows),
        )  # fmt: skip
        return EncodedChunk(header, writer.bytes())

    def events(
        self, patterns: Patterns, form: exact.Format, pos: NDArray[np.int32],
        ids: NDArray[np.int32], take: Callable[[slice, ops.ExactEvents], None],
    ) -> None:  # fmt: skip
        """Give ``take`` what is coded of uint16 ``[C, n]``, group by group."""

        def step(
            first: int, group: ExactGroup, base: Ints, turns: tuple[Ints, Ints], means: Ints
        ) -> Ints:
            own = slice(first, first + len(base))
            events = ops.exact_events(
                group, base, turns, means, np.ascontiguousarray(patterns[own]), form,
                self.tables.cumulative,
            )  # fmt: skip
            take(own, events)
            return events.regressors

        self._walk(pos, ids, step)

    def predictions(
        self, patterns: Patterns, form: exact.Format, pos: NDArray[np.int32],
        ids: NDArray[np.int32],
    ) -> NDArray[np.float64]:  # fmt: skip
        """What is predicted of each value of ``patterns``, float64 ``[C, n]``: what learning the
        scales looks at."""
        found = np.empty(patterns.shape, np.float64)

        def step(
            first: int, group: ExactGroup, base: Ints, turns: tuple[Ints, Ints], means: Ints
        ) -> Ints:
            part = np.ascontiguousarray(patterns[first : first + len(base)])
            events = ops.exact_events(
                group, base, turns, means, part, form, self.tables.cumulative
            )
            total = base + group.weights @ events.regressors
            units = np.exp2(-(group.weight_bits + group.scale_bits).astype(np.float64))
            predicted = total * units[:, None]
            firsts = np.flatnonzero(group.pairs >= 0)[::2]
            cos, sin = (
                turn[group.pairs[firsts]] / (1 << exact.ANGLE_BITS) for turn in turns
            )
            a, b = predicted[firsts], predicted[firsts + 1]
            predicted[firsts], predicted[firsts + 1] = a * cos - b * sin, b * cos + a * sin
            found[first : first + len(base)] = predicted
            return events.regressors

        self._walk(pos, ids, step)
        return found

    def decode(
        self, payload: memoryview, tensors: Sequence[TensorSpec], where: str
    ) -> list[Rows]:
        """All rows of a chunk that fits ``tensors``; `DamagedError` if it is not one,
        `MismatchError` if the book is not for these tensors."""
        reader = ByteReader(payload, where)
        header = ChunkHeader.read(reader)
        form = exact.FORMATS.get(dtype_from_ggml(header.dtype_id).name)
        if form is None:
            raise DamagedError(f"{where}: is of a type that is not coded so; damaged")
        if not self._fits(tensors):
            raise MismatchError(f"{where}: its tensors are not such as its book is for")
        pairing = reader.u8()
        if pairing >= len(PAIRINGS):
            raise UnsupportedError(f"{where}: keys are turned in an unknown way, {pairing}")
        pos, ids = (ints.read(reader, header.n_frames) for _ in range(2))
        lanes = reader.uvarint(limit=ops.LANES)
        lengths = np.array([reader.uvarint(limit=1 << 31) for _ in range(lanes)], np.uint32)
        raw = reader.take(4 * int(lengths.sum(dtype=np.uint64)))
        reader.end()
        if not lanes or int(lengths.min()) < 2:
            raise DamagedError(f"{where}: a lane of the entropy coder has no state; damaged")
        words = np.frombuffer(raw, "<u4").astype(np.uint32)
        decoder = ops.ExactDecoder(words, lengths, self.tables.cumulative)
        patterns = np.empty((self.tables.order.n_channels, header.n_frames), np.uint16)

        def step(
            first: int, group: ExactGroup, base: Ints, turns: tuple[Ints, Ints], means: Ints
        ) -> Ints:
            part, regressors = decoder.decode(group, base, turns, means, form)
            patterns[first : first + len(base)] = part
            return regressors

        self._walk(pos, ids, step)
        if not decoder.ended():
            raise DamagedError(f"{where}: an entropy-coded lane does not end as it should")
        return self.tables.order.scatter(patterns, tensors, PAIRINGS[pairing])

    def _walk(self, pos: NDArray[np.int32], ids: NDArray[np.int32], step: Step) -> None:
        """Go through the groups: ``step`` takes what those before predict and gives regressors."""
        tables, n_frames = self.tables, len(pos)
        turns = angles(pos, self._inv_freq)
        means = np.full(n_frames, exact.START_MEAN << exact.MEMORY, np.int64)
        # Constant and token stand before the channels, so that a window is one slice.
        above = 1 + tables.layout.token_dims
        known = np.empty((above + tables.order.n_channels, n_frames), np.float64)
        known[0] = CONSTANT
        known[1:above] = tables.token_regressors(ids)
        for (low, first, stop, dims), (weights, group) in zip(
            tables.layout.groups(), tables.groups, strict=True
        ):
            own = 1 + dims
            total = weights[:, :own] @ known[:own]
            total += weights[:, own:] @ known[above + low : above + first]
            known[above + first : above + stop] = step(
                first, group, total.astype(np.int64), turns, means
            )
