"""Codec 6: frames as a few bytes each, every byte a look-up in a codebook.

rows -> vectors -> one byte a stage -> bytes as they are, and how many each frame has: any frame is
found by adding these up, and decoding is look-ups, a sum, and the way from vectors to rows. What
vectors are is the matter of a `Domain`: coefficients in a book's basis behind its prediction, or
scaled channels with codebooks that the file holds. Frames whose error is above a threshold are
kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from . import blocks, registry
from .book_codec import BookCodec
from .books.product import BookCodes, read_product
from .bytestream import ByteReader, ByteWriter
from .container.records import ChunkHeader
from .container.writer import EncodedChunk
from .context import FrameContext
from .entropy import widths
from .errors import DamagedError
from .model import TensorSpec
from .quantizers.product import BEAM, Codes, ProductQuantizer
from .transforms import channels

Rows = NDArray[np.uint8]
Floats = NDArray[np.float32]

OF_BOOK = 0
"""Names the codebooks of the snapshot's book."""

_EXACT = 0
_ALLOWED = 1.1
"""Error of stored codes over that of its own, for a new frame to count as the stored one."""


class Domain(Protocol):
    """What vectors are. ``id``: names the codebooks in a chunk; ``beam``: how hard codes are looked
    for; ``n_columns``: numbers of a vector."""

    id: int
    beam: int

    @property
    def quantizer(self) -> ProductQuantizer: ...

    @property
    def n_columns(self) -> int: ...

    def check(self, tensors: Sequence[TensorSpec], where: str) -> None:
        """Raises if it is not for these tensors."""
        ...

    def vectors(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], context: FrameContext
    ) -> tuple[Floats, NDArray[np.float64]]:
        """Float32 ``[n, n_columns]``, and the squared length of what they leave out, ``[n]``."""
        ...

    def rows(
        self, vectors: Floats, tensors: Sequence[TensorSpec], context: FrameContext
    ) -> list[Rows]:
        """Undo `vectors`, rounding to the element type."""
        ...

    def encode(
        self, vectors: Floats, worth: NDArray[np.float64]
    ) -> tuple[Codes, NDArray[np.int64]]:
        """Codes of vectors, one after another, and how many each has, ``[n]``."""
        ...


class BookDomain:
    """Coefficients in a book's basis of what its prediction leaves."""

    id = OF_BOOK
    beam = BEAM

    def __init__(self, codec: BookCodec, where: str) -> None:
        """`UsageError` if the book has no codebooks."""
        self.codec = codec
        self.codes: BookCodes = read_product(codec.book, where)
        self.quantizer = self.codes.quantizer
        self.n_columns = self.codes.n_columns

    def check(self, tensors: Sequence[TensorSpec], where: str) -> None:
        self.codec.check(tensors, where)

    def vectors(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], context: FrameContext
    ) -> tuple[Floats, NDArray[np.float64]]:
        book = self.codec.book
        residual = self.codec.residual(rows, tensors, context)
        whole = book.analyse(residual, book.facts["book.group_coefficients"])
        kept = book.columns(self.codes.counts)
        left = np.square(whole, dtype=np.float64).sum(axis=1)
        vectors = np.ascontiguousarray(whole[:, kept])
        return vectors, left - np.square(vectors, dtype=np.float64).sum(axis=1)

    def encode(
        self, vectors: Floats, worth: NDArray[np.float64]
    ) -> tuple[Codes, NDArray[np.int64]]:
        return self.quantizer.encode_worth(vectors, worth, self.beam)

    def rows(
        self, vectors: Floats, tensors: Sequence[TensorSpec], context: FrameContext
    ) -> list[Rows]:
        codec = self.codec
        predicted = codec.book.network(context)
        frames = codec.book.synthesize(predicted, vectors, self.codes.counts)
        return channels.from_frames(
            frames, tensors, context.key_pos, codec.book.rope, codec.head_dim, codec.pairing
        )


@dataclass(frozen=True)
class Stored:
    """Frames as a chunk has them. ``forms``: int64 ``[n]``, 0 for an exact frame, else 1 + its
    stages; ``data``: uint8, the rows or codes of one after another."""

    forms: NDArray[np.int64]
    data: Codes
    frame_bytes: int

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each frame."""
        return np.where(self.forms == _EXACT, self.frame_bytes, self.forms - 1)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Codes of each frame, none of an exact one."""
        return np.maximum(self.forms - 1, 0)

    @property
    def codes(self) -> Codes:
        codes: Codes = self.data[np.repeat(self.forms != _EXACT, self.sizes)]
        return codes

    @property
    def exact(self) -> Rows:
        """Exact frames, uint8 ``[n, frame_bytes]``."""
        exact: Rows = self.data[np.repeat(self.forms == _EXACT, self.sizes)]
        return exact.reshape(-1, self.frame_bytes)

    def part(self, start: int, stop: int) -> Stored:
        ends = np.cumsum(self.sizes)
        first, last = (int(ends[i - 1]) if i else 0 for i in (start, stop))
        return Stored(self.forms[start:stop], self.data[first:last], self.frame_bytes)


@dataclass(frozen=True)
class Coded:
    """A chunk, and how many of its frames are exact."""

    chunk: EncodedChunk
    n_exact: int


def codebook_of(payload: memoryview, where: str) -> int:
    """Id of the codebooks that a chunk of codec 6 is coded with; `OF_BOOK` for those of a book."""
    reader = ByteReader(payload, where)
    ChunkHeader.read(reader)
    (codebook,) = reader.unpack("Q")
    return int(codebook)


class ProductCodec:
    """Encodes and decodes the tensors of one track."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def check(self, tensors: Sequence[TensorSpec], where: str) -> None:
        self.domain.check(tensors, where)

    def encode(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], context: FrameContext,
        worth: NDArray[np.float64], limits: NDArray[np.float64],
    ) -> Coded:  # fmt: skip
        """Code all tensors of a track, one uint8 ``[n, row_bytes]`` each, n > 0.

        ``worth``: float64 ``[n]``, squared error that a byte of each frame must save, where the
        domain lets them differ. ``limits``: float64 ``[n]``: frames of a larger squared error are
        kept exact.
        """
        vectors, left_out = self.domain.vectors(rows, tensors, context)
        codes, counts = self.domain.encode(vectors, worth)
        errors = left_out + _distances(vectors, self._restored(codes, counts))
        exact = errors > limits
        forms = np.where(exact, _EXACT, 1 + counts)
        writer = ByteWriter().pack("Q", self.domain.id)
        for start, stop in _runs(worth):
            _write_forms(writer, forms[start:stop])
        whole, ends = np.concatenate(list(rows), axis=1), np.cumsum(counts)
        for i in range(len(forms)):
            writer.raw((whole[i] if exact[i] else codes[ends[i] - counts[i] : ends[i]]).tobytes())
        row_bytes = tuple(part.shape[1] for part in rows)
        header = ChunkHeader(
            registry.PRODUCT, 0, len(rows[0]), 0, tensors[0].dtype.ggml_id, row_bytes
        )
        return Coded(EncodedChunk(header, writer.bytes()), int(exact.sum()))

    def _restored(self, codes: Codes, counts: NDArray[np.int64]) -> Floats:
        domain = self.domain
        return domain.quantizer.decode(np.ascontiguousarray(codes), counts, domain.n_columns)

    def decode(
        self, payload: memoryview, tensors: Sequence[TensorSpec], first: int, context: FrameContext,
        where: str,
    ) -> list[Rows]:  # fmt: skip
        """Frames ``first`` to ``first + len(context.pos)`` of a chunk."""
        stored = self.read(payload, where).part(first, first + len(context.pos))
        out = self.domain.rows(self._restored(stored.codes, stored.counts), tensors, context)
        exact = stored.forms == _EXACT
        edges = np.cumsum([tensor.row_bytes for tensor in tensors])[:-1]
        for part, rows in zip(out, np.split(stored.exact, edges, axis=1), strict=True):
            part[exact] = rows
        return out

    def read(self, payload: memoryview, where: str) -> Stored:
        """What a whole chunk says of its frames; `DamagedError` if it is not one."""
        reader = ByteReader(payload, where)
        header = ChunkHeader.read(reader)
        if header.raw_length > blocks.MOST_LOSSY_BYTES:
            raise DamagedError(f"{where}: {header.raw_length} raw bytes; damaged")
        reader.unpack("Q")
        parts, left = [], header.n_frames
        while left:
            parts.append(_read_forms(reader, left, 1 + self.domain.quantizer.n_stages))
            left -= len(parts[-1])
        frame_bytes = sum(header.row_bytes)
        stored = Stored(np.concatenate(parts), np.zeros(0, np.uint8), frame_bytes)
        data = np.frombuffer(reader.take(int(stored.sizes.sum())), np.uint8)
        reader.end()
        return Stored(stored.forms, data, frame_bytes)

    def distance(
        self, payload: memoryview, first: int, rows: Sequence[Rows], tensors: Sequence[TensorSpec],
        context: FrameContext, where: str,
    ) -> NDArray[np.float64]:  # fmt: skip
        """How far frames ``rows`` are from what is stored, as vectors of the domain, ``[n]``;
        infinite where codes of their own would serve them clearly better, and where what is stored
        exactly is not the same bytes."""
        stored = self.read(payload, where).part(first, first + len(context.pos))
        vectors, left_out = self.domain.vectors(rows, tensors, context)
        codes, counts = stored.codes, stored.counts
        own = self.domain.quantizer.encode_counts(vectors, counts, self.domain.beam)
        least = left_out + _distances(vectors, self._restored(own, counts))
        found = left_out + _distances(vectors, self._restored(codes, counts))
        apart = np.where(found <= _ALLOWED * least, np.sqrt(found), np.inf)
        exact = stored.forms == _EXACT
        same = (np.concatenate(list(rows), axis=1)[exact] == stored.exact).all(axis=1)
        apart[exact] = np.where(same, 0.0, np.inf)
        return apart


def _write_forms(writer: ByteWriter, forms: NDArray[np.int64]) -> None:
    """Append the forms of frames that are alike: a middle one, and how far each is from it."""
    base = int(np.median(forms))
    apart = (forms - base).astype(np.int32)[:, None]
    wide = widths.choose(apart)[0]
    writer.uvarint(len(forms)).uvarint(base).u8(int(wide[0]))
    widths.encode(writer, apart, wide)


def _read_forms(reader: ByteReader, most: int, largest: int) -> NDArray[np.int64]:
    n, base, wide = reader.uvarint(limit=most), reader.uvarint(limit=largest), reader.u8()
    if not n or wide > widths.LARGEST_WIDTH:
        raise DamagedError(f"{reader.where}: frames without a form; damaged")
    forms = base + widths.decode(reader, n, np.array([wide], np.uint8))[:, 0].astype(np.int64)
    if int(forms.min()) < 0 or int(forms.max()) > largest:
        raise DamagedError(f"{reader.where}: a form that no frame has; damaged")
    return forms


def _runs(worth: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Frames that follow one another with one worth, as ``(start, stop)``."""
    edges = [0, *(np.flatnonzero(np.diff(worth)) + 1).tolist(), len(worth)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _distances(one: Floats, other: Floats) -> NDArray[np.float64]:
    distances: NDArray[np.float64] = np.square(one - other, dtype=np.float64).sum(axis=1)
    return distances

