"""The lossy pipeline: frames to integer coefficients by way of a book, and back.

rows -> channels before RoPE -> less the prediction from the tokens -> coefficients in the book's
basis -> integers of one step -> rANS. Frames decode on their own: a prediction needs the tokens,
which every archive has, and no other frame.

The first positions take a finer step: all later tokens attend to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import registry
from .books.book import Book, OpenBook
from .bytestream import ByteReader, ByteWriter
from .container.records import ChunkHeader
from .container.writer import EncodedChunk
from .entropy import ladder, segments
from .errors import DamagedError, MismatchError, UnsupportedError
from .history import FrameContext
from .identity import ROPE_PAIRING, compare
from .model import ModelIdentity, TensorSpec
from .quantizers import uniform
from .transforms import channels

Rows = NDArray[np.uint8]

N_SINKS = 4
SINK_OCTAVES = 1.5
"""Octaves by which the step of the first positions is finer."""


class BookCodec:
    """Encodes and decodes the tensors of one model with its book."""

    def __init__(self, opened: OpenBook, identity: ModelIdentity, where: str) -> None:
        """`MismatchError` if ``identity`` is known to be another model's than the book's."""
        self.id = opened.id
        self.book: Book = opened.book
        self.pairing = _pairing(identity, where)
        own = {key: value for key, value in self.book.facts.items() if key != "rope_pairing"}
        differences = compare(ModelIdentity(own), identity)
        if differences:
            raise MismatchError(f"{where}: the book is another model's: {'; '.join(differences)}")
        self._lengths = size_lengths(self.book.frequencies)

    @property
    def head_dim(self) -> int:
        return int(self.book.facts["book.head_dim"])

    def check(self, tensors: Sequence[TensorSpec], where: str) -> None:
        """`MismatchError` or `UnsupportedError` if the book does not fit these tensors."""
        channels.check_floats(tensors)
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise UnsupportedError(f"{where}: keys and values of two types have no lossy tier")
        n_channels = sum(tensor.n_channels for tensor in tensors)
        roles = [sum(tensor.role == role for tensor in tensors) for role in "kv"]
        if n_channels != self.book.n_channels or roles[0] != roles[1]:
            raise MismatchError(
                f"{where}: frames of {n_channels} channels; the book is for {self.book.n_channels}"
            )

    def encode(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], context: FrameContext,
        log_step: int,
    ) -> EncodedChunk:  # fmt: skip
        """Code all tensors of a track, one uint8 ``[n, row_bytes]`` each, n > 0."""
        frames = channels.to_frames(
            rows, tensors, context.pos, self.book.rope, self.head_dim, self.pairing
        )
        if not np.isfinite(frames).all():
            raise UnsupportedError(
                "keys or values are not finite, which a lossy tier cannot keep; use --tier lossless"
            )
        coefficients = (frames - self.book.predict(context.history)) @ self.book.analysis
        writer = ByteWriter()
        steps = np.where(context.pos < N_SINKS, log_step - _finer(), log_step)
        edges = np.flatnonzero(np.diff(steps, prepend=steps[0] - 1, append=steps[-1] - 1))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            step = int(steps[start])
            values = self._quantize(coefficients[start:stop], step)
            classes = ladder.class_of(self.book.log_sigmas, step)
            segments.encode(writer, values, step, classes, self.book.frequencies)
        row_bytes = tuple(part.shape[1] for part in rows)
        header = ChunkHeader(
            registry.BOOK_TRANSFORM, 0, len(rows[0]), 0, tensors[0].dtype.ggml_id, row_bytes
        )
        return EncodedChunk(header, writer.bytes())

    def decode(
        self, payload: memoryview, tensors: Sequence[TensorSpec], first: int, context: FrameContext,
        where: str,
    ) -> list[Rows]:  # fmt: skip
        """Frames ``first`` to ``first + len(context.pos)`` of a chunk."""
        _, values = self.coefficients(payload, where)
        part = values[first : first + len(context.pos)]
        # Most coefficients of a coarse tier are zero in every frame.
        used = np.flatnonzero(part.any(axis=0))
        frames = part[:, used] @ self.book.synthesis[used] + self.book.predict(context.history)
        return channels.from_frames(
            frames, tensors, context.pos, self.book.rope, self.head_dim, self.pairing
        )

    def coefficients(
        self, payload: memoryview, where: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of a whole chunk: each frame's step, ``[n, 1]``, and coefficients, ``[n, R]``."""
        reader = ByteReader(payload, where)
        header = ChunkHeader.read(reader)
        steps, parts, left = [], [], header.n_frames
        while left:
            log_step, values = segments.decode(
                reader, self.book.n_coefficients, self.book.log_sigmas, self.book.frequencies, left
            )
            if not len(values):
                raise DamagedError(f"{where}: a segment without frames; damaged")
            step = 2.0 ** (log_step / ladder.UNITS_PER_OCTAVE)
            steps.append(np.full((len(values), 1), step, np.float32))
            parts.append(uniform.dequantize(values, step))
            left -= len(values)
        reader.end()
        return np.concatenate(steps), np.concatenate(parts)

    def same(
        self, payload: memoryview, first: int, rows: Sequence[Rows], tensors: Sequence[TensorSpec],
        context: FrameContext, where: str,
    ) -> NDArray[np.bool_]:  # fmt: skip
        """Which frames ``rows`` lie within `MAX_DELTA` steps of what is stored, bool ``[n]``."""
        steps, stored = self.coefficients(payload, where)
        span = slice(first, first + len(context.pos))
        frames = channels.to_frames(
            rows, tensors, context.pos, self.book.rope, self.head_dim, self.pairing
        )
        new = (frames - self.book.predict(context.history)) @ self.book.analysis
        apart = np.abs(new - stored[span])
        near: NDArray[np.bool_] = (apart <= MAX_DELTA * steps[span]).all(axis=1)
        return near

    def _quantize(self, coefficients: NDArray[np.float32], log_step: int) -> NDArray[np.int32]:
        classes = ladder.class_of(self.book.log_sigmas, log_step)
        used = np.flatnonzero(classes >= 0)
        values = np.zeros(coefficients.shape, np.int32)
        scaled = coefficients[:, used] * np.float32(2.0 ** (-log_step / ladder.UNITS_PER_OCTAVE))
        values[:, used] = uniform.quantize(scaled, self._lengths, classes[used])
        return values


MAX_DELTA = 2.0
"""Steps by which a coefficient may differ for a frame of the same tokens to count as the stored
one. Rounding for rate alone moves one by up to one and a half."""


def size_lengths(frequencies: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Bits of a value of size 0 to 15 and of an escape, float32 ``[K, 17]``."""
    bits = 12 - np.log2(frequencies.astype(np.float64))
    sizes = [bits[:, 0], *(bits[:, 2 * s - 1 : 2 * s + 1].mean(axis=1) for s in range(1, 16))]
    return np.stack([*sizes, bits[:, ladder.ESCAPE] + 16], axis=1).astype(np.float32)


def _finer() -> int:
    return int(SINK_OCTAVES * ladder.UNITS_PER_OCTAVE)


def _pairing(identity: ModelIdentity, where: str) -> str:
    pairing = identity.facts.get("rope_pairing")
    if pairing is None:
        pairing = ROPE_PAIRING.get(str(identity.facts.get("architecture")))
    if pairing is None:
        raise UnsupportedError(
            f"{where}: how the keys are turned is not known; name the model with --model"
        )
    return str(pairing)
