"""Codebooks that a session itself teaches and its file holds: product quantization without a book.

A track's rows become channels, keys turned back where that is known; a head's channels are divided
by its scale once their means are away; sub-vectors are consecutive channels of a head. Heads and
layers of a role share the codebooks of a place in the head, so that there are enough vectors to
learn from and few codebooks to store. ``spec/codecs/product.md`` gives every byte of the record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .bytestream import ByteReader, ByteWriter
from .container.records import checksum
from .context import FrameContext
from .entropy import zstd
from .errors import DamagedError, UsageError
from .model import TensorSpec
from .quantizers.product import CENTROIDS, Codes, ProductQuantizer, kmeans
from .session_basis import KeyTurn, channels_of, rows_of
from .session_codec import check, check_finite
from .session_learning import Sample
from .transforms.channels import tensor_order

Rows = NDArray[np.uint8]
Floats = NDArray[np.float32]

NARROWEST = 4
"""Channels of a sub-vector at least; more bytes than those take are further stages."""

MOST_STAGES = 1 << 16
_MOST_TENSORS, _MOST_CHANNELS = 1 << 16, 1 << 24
_BYTES_PER_BYTE, _SPARE_BYTES = 16, 1 << 20
"""Bytes of tables that a record may hold by its length: reading one takes bounded memory."""

_ITERATIONS = 12
_MOST_VECTORS = 1 << 16
_MOST_ROUNDS = 8


@dataclass
class SessionCodes:
    """``channels``: of each tensor, in the order of a frame; ``n_keys``: how many of them are
    keys. ``head``: channels that share a scale; ``width``: of a sub-vector.

    ``mean``: float32 ``[C]``; ``scales``: float32 ``[C / head]``; ``entries``: int8
    ``[rounds, B, 256, width]`` in units of ``units`` (float32 ``[rounds, B]``), B the places of
    sub-vectors in a head of keys, then those of values. ``error``: mean squared error of a frame it
    was learnt from, in scaled channels.
    """

    turn: KeyTurn | None
    channels: list[int]
    n_keys: int
    head: int
    width: int
    mean: Floats
    scales: Floats
    units: Floats
    entries: NDArray[np.int8]
    error: float
    id: int = field(default=0, compare=False)

    beam = 1

    @property
    def n_columns(self) -> int:
        return sum(self.channels)

    @property
    def code_bytes(self) -> int:
        """Bytes of a frame."""
        return len(self.entries) * (self.n_columns // self.width)

    @cached_property
    def quantizer(self) -> ProductQuantizer:
        n_parts = self.n_columns // self.width
        columns = np.arange(self.n_columns, dtype=np.int32).reshape(n_parts, self.width)
        places = self.head // self.width
        is_value = np.repeat(np.arange(len(self.channels)) >= self.n_keys, self.channels)
        books = np.arange(n_parts) % places + places * is_value[:: self.width]
        rounds, n_books = self.units.shape
        centroids = self.entries.astype(np.float32) * self.units[:, :, None, None]
        return ProductQuantizer(
            np.tile(columns, (rounds, 1)),
            np.concatenate([books + i * n_books for i in range(rounds)]).astype(np.int32),
            centroids.reshape(-1, CENTROIDS, self.width),
        )

    # --- the domain of `tscfile.product_codec` ------------------------------------------------

    def check(self, tensors: Sequence[TensorSpec], where: str) -> None:
        """`DamagedError` if the codebooks are not for these tensors."""
        check(tensors, where)
        if not self.fits(tensors):
            raise DamagedError(f"{where}: its codebooks are for other tensors; damaged")

    def fits(self, tensors: Sequence[TensorSpec]) -> bool:
        """Are these the tensors that the codebooks are for?"""
        order = [tensors[i] for i in tensor_order(tensors)]
        return (
            [tensor.n_channels for tensor in order] == self.channels
            and sum(tensor.role == "k" for tensor in order) == self.n_keys
        )

    def vectors(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], context: FrameContext
    ) -> tuple[Floats, NDArray[np.float64]]:
        frames = channels_of(self.turn, rows, tensors, context.key_pos)
        check_finite([frames])
        return (frames - self.mean) / self._spread, np.zeros(len(frames))

    def rows(
        self, vectors: Floats, tensors: Sequence[TensorSpec], context: FrameContext
    ) -> list[Rows]:
        return rows_of(self.turn, vectors * self._spread + self.mean, tensors, context.key_pos)

    def encode(
        self, vectors: Floats, worth: NDArray[np.float64]
    ) -> tuple[Codes, NDArray[np.int64]]:
        """All stages of every vector."""
        counts = np.full(len(vectors), self.quantizer.n_stages, np.int64)
        return self.quantizer.encode_counts(vectors, counts, self.beam), counts

    @cached_property
    def _spread(self) -> Floats:
        return np.repeat(self.scales, self.head)

    # --- bytes --------------------------------------------------------------------------------

    def write(self) -> bytes:
        """The payload of its record."""
        writer = ByteWriter().u8(self.turn is not None)
        if self.turn is not None:
            self.turn.write(writer)
        writer.uvarint(len(self.channels)).uvarint(self.n_keys)
        for size in self.channels:
            writer.uvarint(size)
        writer.uvarint(self.head).uvarint(self.width).uvarint(len(self.entries))
        writer.pack("f", self.error)
        tables = [self.mean.astype("<f2"), self.scales.astype("<f4"), self.units.astype("<f4")]
        content = b"".join(table.tobytes() for table in (*tables, self.entries))
        return writer.raw(zstd.compress(content)).bytes()

    @classmethod
    def read(cls, data: memoryview, where: str) -> SessionCodes:
        """`DamagedError` for a payload that is none."""
        reader = ByteReader(data, where)
        turned = reader.u8()
        if turned > 1:
            raise DamagedError(f"{where}: keys are turned in an unknown way; damaged")
        turn = KeyTurn.read(reader) if turned else None
        n = reader.count()
        n_keys = reader.uvarint(limit=n)
        sizes = [reader.uvarint(limit=_MOST_CHANNELS) for _ in range(n)]
        head, width = (reader.uvarint(limit=_MOST_CHANNELS) for _ in range(2))
        rounds = reader.uvarint(limit=MOST_STAGES)
        (error,) = reader.unpack("f")
        total = sum(sizes)
        whole = (
            0 < n <= _MOST_TENSORS and width and head and not head % width and all(sizes)
            and not any(size % head for size in sizes) and total <= _MOST_CHANNELS
            and 0 < rounds * (total // width) <= MOST_STAGES
            and not any(size % (turn.head_dim if turn else 1) for size in sizes[:n_keys])
        )  # fmt: skip
        if not whole or not 0 <= error < math.inf:
            raise DamagedError(f"{where}: codebooks that cannot be; damaged")
        n_books = 2 * (head // width)
        parts = [(total, "<f2"), (total // head, "<f4"), (rounds * n_books, "<f4"),
                 (rounds * n_books * CENTROIDS * width, "i1")]  # fmt: skip
        lengths = [count * np.dtype(code).itemsize for count, code in parts]
        if sum(lengths) > _BYTES_PER_BYTE * len(data) + _SPARE_BYTES:
            raise DamagedError(f"{where}: codebooks that its bytes cannot hold; damaged")
        content = zstd.decompress(reader.take(reader.remaining), sum(lengths), where)
        if len(content) != sum(lengths):
            raise DamagedError(f"{where}: codebooks of another size; damaged")
        ends = np.cumsum(lengths)
        mean, scales, units, entries = (
            np.frombuffer(content[end - length : end], code)
            for (_, code), length, end in zip(parts, lengths, ends, strict=True)
        )
        finite = all(np.isfinite(part).all() for part in (mean, scales, units))
        if not finite or (scales <= 0).any():
            raise DamagedError(f"{where}: numbers that are none; damaged")
        return cls(
            turn, sizes, n_keys, head, width, mean.astype(np.float32), scales.astype(np.float32),
            units.astype(np.float32).reshape(rounds, n_books),
            entries.reshape(rounds, n_books, CENTROIDS, width), float(error), checksum(data),
        )  # fmt: skip


# --- learning ---------------------------------------------------------------------------------


def learn_session(
    sample: Sample, tensors: Sequence[TensorSpec], turn: KeyTurn | None,
    head_dims: Sequence[int], code_bytes: float, n_frames: int, seed: int = 0,
) -> SessionCodes:  # fmt: skip
    """Codebooks for ``n_frames`` frames like those of ``sample``, of at most ``code_bytes`` each.

    ``head_dims``: channels of heads, as far as they are known. `UsageError` where so few bytes do
    not do, or the frames are so few that the codebooks would take more than their codes.
    """
    order = [tensors[i] for i in tensor_order(tensors)]
    sizes = [tensor.n_channels for tensor in order]
    n_keys = sum(tensor.role == "k" for tensor in order)
    head = math.gcd(*sizes, *head_dims)
    width, rounds = plan(sum(sizes), head, code_bytes)
    frames = sample.channels(range(len(tensors)))
    mean = frames.mean(axis=0).clip(-65504, 65504).astype(np.float16).astype(np.float32)
    by_head = (frames - mean).reshape(len(frames), -1, head)
    scales = np.sqrt(np.square(by_head).mean(axis=(0, 2)))
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    found = SessionCodes(
        turn, sizes, n_keys, head, width, mean, scales,
        np.zeros((rounds, 2 * head // width), np.float32),
        np.zeros((rounds, 2 * head // width, CENTROIDS, width), np.int8), 0.0,
    )  # fmt: skip
    _refuse_few(found, n_frames)
    left = (frames - mean) / np.repeat(scales, head)
    _fill(found, left, np.random.default_rng(seed))
    return found


def plan(n_channels: int, head: int, code_bytes: float) -> tuple[int, int]:
    """Channels of a sub-vector and how many stages each has, for at most ``code_bytes`` a frame;
    `UsageError` if a byte for each head is more.

    >>> plan(1536, 64, 200), plan(1536, 64, 1000)
    ((8, 1), (4, 2))
    """
    widths = [n for n in range(1, head + 1) if not head % n]
    fitting = [n for n in widths if n_channels // n <= code_bytes]
    if not fitting:
        raise UsageError(
            f"{code_bytes:g} code bytes a frame: without a book a frame takes "
            f"{n_channels // head} at least; give as many, or a book with --book"
        )
    width = max(fitting[0], min(NARROWEST, head))
    while head % width:
        width += 1
    return width, min(int(code_bytes // (n_channels // width)), _MOST_ROUNDS)


def _refuse_few(codes: SessionCodes, n_frames: int) -> None:
    """Codebooks must not take more than what they code, nor have fewer vectors than centroids."""
    n_vectors = min(codes.n_keys, len(codes.channels) - codes.n_keys) * (
        codes.channels[0] // codes.head
    )
    needed = max(
        -(-codes.entries.size // codes.code_bytes), -(-2 * CENTROIDS // max(n_vectors, 1))
    )
    if n_frames < needed:
        raise UsageError(
            f"{n_frames} new frames are too few to pay for codebooks of their own: "
            f"{needed} are needed at {codes.code_bytes} code bytes; give a book with --book"
        )


def _fill(codes: SessionCodes, left: Floats, rng: np.random.Generator) -> None:
    """Learn the codebooks round by round from scaled channels ``[n, C]``, which are used up."""
    rounds, n_books = codes.units.shape
    n_parts = codes.n_columns // codes.width
    books, columns = codes.quantizer.books[:n_parts], codes.quantizer.columns[:n_parts]
    vectors = left.reshape(len(left), n_parts, codes.width)
    for i in range(rounds):
        for book in range(n_books):
            mine = np.ascontiguousarray(vectors[:, books == book]).reshape(-1, codes.width)
            if not len(mine):
                continue
            step = -(-len(mine) // _MOST_VECTORS)
            centroids = kmeans(mine[::step], CENTROIDS, _ITERATIONS, rng)
            unit = np.float32(max(float(np.abs(centroids).max()) / 127, 1e-12))
            codes.units[i, book] = unit
            codes.entries[i, book] = np.rint(centroids / unit)
        quantizer = ProductQuantizer(
            columns, books,
            codes.entries[i].astype(np.float32) * codes.units[i][:, None, None],
        )  # fmt: skip
        counts = np.full(len(left), n_parts, np.int64)
        left -= quantizer.decode(quantizer.encode_counts(left, counts, 1), counts, codes.n_columns)
    # It was made of empty codebooks.
    del codes.__dict__["quantizer"]
    codes.error = float(np.float32(np.square(left, dtype=np.float64).sum(axis=1).mean()))
