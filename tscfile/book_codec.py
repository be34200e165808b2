"""The lossy pipeline: frames to integer coefficients by way of a book, and back.

rows -> channels before RoPE -> less the prediction from the tokens -> coefficients in the book's
basis -> integers of one step -> rANS. Frames decode on their own: a prediction needs the tokens,
which every archive has, and no other frame. The integers of a finer step may be stored as what is
missing from those of a coarser one, a quality layer above it.

Frames that later tokens lean on more take a finer step: the first ones, which all attend to, and
the newest ones, which what comes next attends to most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import registry
from .books.book import Book, OpenBook
from .bytestream import ByteReader, ByteWriter
from .container.records import ChunkHeader
from .container.writer import EncodedChunk
from .context import FrameContext
from .entropy import ladder, refinement, segments
from .errors import DamagedError, MismatchError, UnsupportedError
from .identity import ROPE_PAIRING, compare
from .model import ModelIdentity, TensorSpec
from .quantizers import uniform
from .transforms import channels
from .transforms.rope import HALVES, NEIGHBOURS

if TYPE_CHECKING:
    from .entropy.token_ids import TokenCoder
    from .exact_codec import ExactCodec

Rows = NDArray[np.uint8]
Floats = NDArray[np.float32]

FINER_FIRST = ((4, 384),)
FINER_LAST = ((2, 768), (8, 512), (32, 256))
"""``(n, units)``: the first and the last n positions take a step finer by so many 1/256 octaves.
Of several that hold, the first counts; the finer of both ends."""


def steps_of(pos: NDArray[np.int32], n_positions: int, log_step: int) -> NDArray[np.int32]:
    """The step of each frame in 1/256 octaves, int32 ``[n]``.

    ``n_positions``: one more than the last position of the save that is being packed.

    >>> steps_of(np.array([0, 50, 99], np.int32), 100, 100).tolist()
    [-284, 100, -668]
    """
    finer = np.zeros(len(pos), np.int32)
    for ends, distance in ((FINER_FIRST, pos), (FINER_LAST, n_positions - 1 - pos)):
        for n, units in ends:
            finer = np.where(distance < n, np.maximum(finer, units), finer)
    return (log_step - finer).astype(np.int32)


MOST_LOG_STEP = 16 * ladder.UNITS_PER_OCTAVE
"""Of steps that are searched for; coefficients keep to 32 bits at the finest of them."""


@dataclass(frozen=True)
class Segment:
    """Frames ``start`` to ``stop`` of a chunk, which share one step.

    ``counts``: coefficients stored of each group; ``values``: int32 ``[n, sum(counts)]``.
    """

    start: int
    stop: int
    step: float
    counts: list[int]
    values: NDArray[np.int32]


@dataclass(frozen=True)
class _Integers:
    """What a layer stores of a run of frames: ``log_step`` in 1/256 octaves, coefficients of each
    group, values int32 ``[n, sum(counts)]``."""

    log_step: int
    counts: list[int]
    values: NDArray[np.int32]


class BookCodec:
    """Encodes and decodes the tensors of one model with its book."""

    def __init__(self, opened: OpenBook, identity: ModelIdentity, where: str) -> None:
        """`MismatchError` if ``identity`` is known to be another model's than the book's."""
        self.id = opened.id
        self.book: Book = opened.book
        self._opened = opened
        self.pairing = _pairing(identity, where)
        own = {key: value for key, value in self.book.facts.items() if key != "rope_pairing"}
        differences = compare(ModelIdentity(own), identity)
        if differences:
            raise MismatchError(f"{where}: the book is another model's: {'; '.join(differences)}")
        self._lengths = size_lengths(self.book.frequencies)

    @property
    def token_coder(self) -> TokenCoder | None:
        return self._opened.token_coder

    @cached_property
    def exact(self) -> ExactCodec | None:
        """What codes exactly with this book; None for one without tables for that. `DamagedError`
        for tables that are none."""
        from .exact_codec import ExactCodec
        from .exact_tables import PREFIX, ExactTables

        book = self.book
        if not any(name.startswith(PREFIX) for name in book.arrays):
            return None
        tables = ExactTables(
            book.arrays, book.exact_order, book.token_vectors, book.token_scales,
            f"book {self.id[:16]}",
        )  # fmt: skip
        return ExactCodec(tables, book.inv_freq, self.pairing)

    def decode_exact(
        self, payload: memoryview, tensors: Sequence[TensorSpec], where: str
    ) -> list[Rows]:
        """All rows of a chunk that is coded exactly."""
        if self.exact is None:
            raise DamagedError(f"{where}: its book has no tables for exact coding; damaged")
        return self.exact.decode(payload, tensors, where)

    @property
    def head_dim(self) -> int:
        return int(self.book.facts["book.head_dim"])

    def reads(self, other: BookCodec) -> bool:
        """Do both make the same frames of the same integers?"""
        return (self.id, self.pairing) == (other.id, other.pairing)

    def check(self, tensors: Sequence[TensorSpec], where: str) -> None:
        """`MismatchError` or `UnsupportedError` if the book does not fit these tensors."""
        channels.check_floats(tensors)
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise UnsupportedError(f"{where}: keys and values of two types have no lossy tier")
        groups = self.book.groups
        roles = [[t.n_channels for t in tensors if t.role == role] for role in "kv"]
        if roles != [[groups.width] * groups.n_layers] * 2:
            raise MismatchError(
                f"{where}: frames of {sum(map(sum, roles))} channels in {len(tensors)} tensors; "
                f"the book is for {groups.n_layers} layers, {groups.width} channels of each role"
            )

    def encode(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], context: FrameContext,
        layers: Sequence[NDArray[np.int32]],
    ) -> list[EncodedChunk]:  # fmt: skip
        """Code all tensors of a track, one uint8 ``[n, row_bytes]`` each, n > 0.

        ``layers``: for each quality layer, the base first, int32 ``[n]``, see `steps_of`; from
        layer to layer finer, and by the same in all frames.
        """
        residual = self.residual(rows, tensors, context)
        writers = [ByteWriter() for _ in layers]
        for start, stop in _runs(layers[0]):
            below = None
            for writer, steps in zip(writers, layers, strict=True):
                below = self._encode(writer, residual[start:stop], int(steps[start]), below)
        return _chunks(writers, len(rows[0]), tensors)

    def join(
        self, parts: Sequence[tuple[Sequence[memoryview], int, int]],
        tensors: Sequence[TensorSpec], where: str,
    ) -> list[EncodedChunk]:  # fmt: skip
        """Frames of several blocks as one block, their integers as they are.

        ``parts``: of each block the payloads of its layers, as many in all, the first frame that is
        taken of it and how many are.
        """
        frames: list[list[_Integers]] = []
        for payloads, first, count in parts:
            layers = list(self._layers(payloads, where))
            stop = 0
            for segments_of_layers in zip(*layers, strict=True):
                start, stop = stop, stop + len(segments_of_layers[0].values)
                span = slice(max(first - start, 0), max(first + count - start, 0))
                found = [replace(each, values=each.values[span]) for each in segments_of_layers]
                if not len(found[0].values):
                    continue
                steps = [each.log_step for each in found]
                if frames and steps == [each.log_step for each in frames[-1]]:
                    both = zip(frames.pop(), found, strict=True)
                    found = [
                        replace(a, values=np.concatenate([a.values, b.values])) for a, b in both
                    ]
                frames.append(found)
        writers = [ByteWriter() for _ in frames[0]]
        for found in frames:
            below = None
            for writer, each in zip(writers, found, strict=True):
                self._write(writer, each, below)
                below = each
        return _chunks(writers, sum(count for _, _, count in parts), tensors)

    def _encode(
        self, writer: ByteWriter, residual: Floats, step: int, below: _Integers | None
    ) -> _Integers:
        """Quantize and append a segment; ``below``: the same frames in the layer below, None in the
        base."""
        counts = self.book.stored(step)
        columns = self.book.columns(counts)
        scaled = self.book.analyse(residual, counts)
        scaled *= np.float32(2.0 ** (-step / ladder.UNITS_PER_OCTAVE))
        if not np.abs(scaled).max(initial=0) < 1 << 30:
            raise UnsupportedError("keys or values are too large for so fine a step")
        if below is None:
            classes = ladder.class_of(self.book.log_sigmas, step)[columns]
            values = uniform.quantize(scaled, self._lengths, classes)
        else:
            centres, classes = self._expect(below, step)
            apart = uniform.quantize(scaled - centres.astype(np.float32), self._lengths, classes)
            values = (centres + apart).astype(np.int32)
        found = _Integers(step, counts, values)
        self._write(writer, found, below)
        return found

    def _write(self, writer: ByteWriter, integers: _Integers, below: _Integers | None) -> None:
        step, values = integers.log_step, integers.values
        if below is None:
            columns = self.book.columns(integers.counts)
            classes = ladder.class_of(self.book.log_sigmas, step)[columns]
            segments.encode(writer, values, step, classes, self.book.frequencies)
            return
        centres, classes = self._expect(below, step)
        writer.uvarint(len(values)).pack("h", step)
        # Every value has a class of its own.
        apart = (values - centres).astype(np.int32).reshape(1, -1)
        segments.write_values(writer, apart, classes.reshape(-1), self.book.frequencies)

    def _expect(
        self, below: _Integers, step: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`refinement.expect` of all coefficients stored at ``step``, given those ``below``."""
        columns = self.book.columns(self.book.stored(step))
        known = self.book.columns(below.counts)
        values = np.zeros((len(below.values), len(self.book.log_sigmas)), np.int32)
        values[:, known] = below.values
        is_stored = np.zeros(values.shape[1], bool)
        is_stored[known] = True
        log_sigmas = self.book.log_sigmas[columns]
        return refinement.expect(
            values[:, columns], is_stored[columns], log_sigmas, below.log_step, step
        )

    def decode(
        self, payloads: Sequence[memoryview], tensors: Sequence[TensorSpec], first: int,
        context: FrameContext, where: str,
    ) -> list[Rows]:  # fmt: skip
        """Frames ``first`` to ``first + len(context.pos)`` of a block.

        ``payloads``: chunks of its layers from the base to the one wanted.
        """
        predicted = self.book.network(context)
        frames = np.empty((len(predicted), self.book.n_channels), np.float32)
        for place, segment, values in _within(self.read(payloads, where), first, len(frames)):
            frames[place] = self.book.synthesize(
                predicted[place], values, segment.counts, segment.step
            )
        return channels.from_frames(
            frames, tensors, context.key_pos, self.book.rope, self.head_dim, self.pairing
        )

    def read(self, payloads: Sequence[memoryview], where: str) -> list[Segment]:
        """The integers of a whole block at the last of the layers; `DamagedError` if they are no
        layers of one block."""
        found: list[Segment] = []
        for each in self._integers(payloads, where):
            start = found[-1].stop if found else 0
            step = 2.0 ** (each.log_step / ladder.UNITS_PER_OCTAVE)
            found.append(Segment(start, start + len(each.values), step, each.counts, each.values))
        return found

    def _integers(self, payloads: Sequence[memoryview], where: str) -> list[_Integers]:
        """Segments of the last of the layers of a whole block."""
        integers: list[_Integers] = []
        for integers in self._layers(payloads, where):  # noqa: B007 - the last is wanted
            pass
        return integers

    def _layers(self, payloads: Sequence[memoryview], where: str) -> Iterator[list[_Integers]]:
        """Segments of each layer of a whole block; all layers have the same frames in them."""
        reader = ByteReader(payloads[0], where)
        n_frames = ChunkHeader.read(reader).n_frames
        integers: list[_Integers] = []
        start = 0
        while start < n_frames:
            log_step, values = segments.decode(
                reader, self.book.log_sigmas, self.book.frequencies, n_frames - start
            )
            integers.append(_Integers(log_step, self.book.stored(log_step), values))
            start += len(values)
        reader.end()
        yield integers
        for payload in payloads[1:]:
            reader = ByteReader(payload, where)
            ChunkHeader.read(reader)
            integers = [self._refine(reader, below) for below in integers]
            reader.end()
            yield integers

    def _refine(self, reader: ByteReader, below: _Integers) -> _Integers:
        """The next segment of a refinement, which is of the frames of ``below``."""
        n_frames = reader.uvarint()
        (step,) = reader.unpack("h")
        if n_frames != len(below.values) or not 0 < below.log_step - step <= refinement.MAX_RATIO:
            raise DamagedError(f"{reader.where}: a refinement of other frames or steps; damaged")
        centres, classes = self._expect(below, step)
        apart = segments.read_values(reader, 1, classes.reshape(-1), self.book.frequencies)
        values = centres + apart.reshape(centres.shape)
        bounds = np.iinfo(np.int32)
        if values.size and not bounds.min <= values.min() <= values.max() <= bounds.max:
            raise DamagedError(f"{reader.where}: refined integers beyond 32 bits; damaged")
        return _Integers(step, self.book.stored(step), values.astype(np.int32))

    def distance(
        self, payloads: Sequence[memoryview], first: int, rows: Sequence[Rows],
        tensors: Sequence[TensorSpec], context: FrameContext, where: str,
    ) -> NDArray[np.float64]:  # fmt: skip
        """By how many steps the coefficients of frames ``rows`` differ at most from those that are
        stored, ``[n]``; infinite from `MAX_DELTA` on."""
        residual = self.residual(rows, tensors, context)
        furthest = np.zeros(len(residual))
        for place, segment, values in _within(self.read(payloads, where), first, len(furthest)):
            new = self.book.analyse(residual[place], segment.counts)
            apart = np.abs(new - uniform.dequantize(values, segment.step)) / segment.step
            furthest[place] = apart.max(axis=1, initial=0)
        furthest[~(furthest <= MAX_DELTA)] = np.inf
        return furthest

    def residual(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], context: FrameContext
    ) -> Floats:
        """What the tokens do not say of the frames, float32 ``[n, C]``."""
        frames = channels.to_frames(
            rows, tensors, context.key_pos, self.book.rope, self.head_dim, self.pairing
        )
        if not np.isfinite(frames).all():
            raise UnsupportedError(
                "keys or values are not finite, which a lossy tier cannot keep; use --tier lossless"
            )
        frames -= self.book.predict(context)
        return frames


MAX_DELTA = 2.0
"""Steps by which a coefficient may differ for a frame of the same tokens to count as the stored
one. Rounding for rate alone moves one by up to one and a half."""


def _chunks(
    writers: Sequence[ByteWriter], n_frames: int, tensors: Sequence[TensorSpec]
) -> list[EncodedChunk]:
    """What was written of each layer, as chunks of all tensors."""
    row_bytes = tuple(tensor.row_bytes for tensor in tensors)
    chunks = []
    for number, writer in enumerate(writers):
        codec = registry.BOOK_REFINEMENT if number else registry.BOOK_TRANSFORM
        dtype_id = tensors[0].dtype.ggml_id
        header = ChunkHeader(codec, number, n_frames, 0, dtype_id, row_bytes)
        chunks.append(EncodedChunk(header, writer.bytes()))
    return chunks


def size_lengths(frequencies: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Bits of a value of size 0 to 15 and of an escape, float32 ``[K, 17]``."""
    bits = 12 - np.log2(frequencies.astype(np.float64))
    sizes = [bits[:, 0], *(bits[:, 2 * s - 1 : 2 * s + 1].mean(axis=1) for s in range(1, 16))]
    return np.stack([*sizes, bits[:, ladder.ESCAPE] + 16], axis=1).astype(np.float32)


def _runs(steps: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Frames that follow one another with one step, as ``(start, stop)``."""
    edges = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _within(
    found: Sequence[Segment], first: int, n_frames: int
) -> Iterator[tuple[slice, Segment, NDArray[np.int32]]]:
    """What segments hold of frames ``first`` to ``first + n_frames``: where it belongs among
    them, the segment, and the values."""
    for segment in found:
        start, stop = max(segment.start, first), min(segment.stop, first + n_frames)
        if start < stop:
            values = segment.values[start - segment.start : stop - segment.start]
            yield slice(start - first, stop - first), segment, values


def _pairing(identity: ModelIdentity, where: str) -> str:
    pairing = identity.facts.get("rope_pairing")
    if pairing is None:
        pairing = ROPE_PAIRING.get(str(identity.facts.get("architecture")))
    if pairing is None:
        raise UnsupportedError(
            f"{where}: how the keys are turned is not known; name the model with --model"
        )
    if pairing not in (HALVES, NEIGHBOURS):
        raise UnsupportedError(f"{where}: keys are turned in an unknown way, {pairing!r}")
    return str(pairing)
