"""Codec 3: frames in a basis that the file itself holds; no model and no book is needed.

rows -> channels, keys turned back where that is known -> steps -> coefficients in the basis, and
what they miss of those channels where that is worth its bits -> integers -> rANS. Blocks decode on
their own, given the basis; the basis is learnt by `tscfile.session_learning`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import blocks, registry
from .bytestream import ByteReader, ByteWriter
from .container.records import ChunkHeader
from .container.writer import EncodedChunk
from .entropy import widths
from .errors import DamagedError, UnsupportedError
from .model import TensorSpec
from .session_basis import SCALES_PER_OCTAVE, Basis, Floats, Group, Ints, Rows
from .transforms import channels, klt

BITS_WORTH = 0.15
"""Squared steps that one bit must save for a column to be stored."""

_LARGEST = 1 << 30
_LARGEST_BOUND = 3e38
_ALLOWED = 1.25
"""How far beyond the bound of its block a frame may lie to count as one that is stored: prefixes
that were computed again differ in their last bits."""


def check(tensors: Sequence[TensorSpec], where: str) -> None:
    """`UnsupportedError` if these tensors have no lossy tier."""
    channels.check_floats(tensors)
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise UnsupportedError(f"{where}: keys and values of two types have no lossy tier")


def basis_of(payload: memoryview, where: str) -> int:
    """Id of the basis that a chunk of codec 3 is coded with."""
    reader = ByteReader(payload, where)
    ChunkHeader.read(reader)
    (basis,) = reader.unpack("Q")
    return int(basis)


class SessionCodec:
    """Encodes and decodes the tensors of one track with one basis."""

    def __init__(self, basis: Basis) -> None:
        self.basis = basis
        self._analysis: list[Floats] | None = None

    def check(self, tensors: Sequence[TensorSpec], where: str) -> None:
        """`DamagedError` if the basis is not for these tensors."""
        check(tensors, where)
        if not self.basis.fits(tensors):
            raise DamagedError(f"{where}: its basis is for other tensors; damaged")

    # --- encoding ------------------------------------------------------------------------------

    def encode(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], pos: NDArray[np.int32],
        shifts: NDArray[np.int64],
    ) -> EncodedChunk:  # fmt: skip
        """Code all tensors of a track, one uint8 ``[n, row_bytes]`` each, n > 0.

        ``shifts``: int64 ``[n]``, quarter octaves by which a frame's step is finer.
        """
        frames = self.basis.frames(rows, tensors, pos)
        check_finite(frames)
        values, chosen, errors = self.quantize(frames, shifts)
        base = int(shifts.min())
        writer = ByteWriter().pack("Q", self.basis.id).u8(base)
        widths.write_widths(writer, chosen)
        edges = np.flatnonzero(np.diff(shifts, prepend=shifts[0] - 1, append=shifts[-1] - 1))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            extra = int(shifts[start]) - base
            error = errors[start:stop].sum(axis=1) / self.basis.n_channels
            bound = min(float(error.max()), _LARGEST_BOUND)
            writer.uvarint(stop - start).u8(extra).pack("f", bound)
            widths.encode(writer, values[start:stop], widths.finer(chosen, extra))
        row_bytes = tuple(part.shape[1] for part in rows)
        header = ChunkHeader(
            registry.SESSION_TRANSFORM, 0, len(rows[0]), 0, tensors[0].dtype.ggml_id, row_bytes
        )
        return EncodedChunk(header, writer.bytes())

    def quantize(
        self, frames: Sequence[Floats], shifts: NDArray[np.int64]
    ) -> tuple[Ints, NDArray[np.uint8], Floats]:
        """Integers ``[n, R + C]`` of `Basis.frames`, widths of their columns in frames of the least
        shift, and each frame's sum of squared errors in each group, in steps, ``[n, n_groups]``."""
        if self._analysis is None:
            self._analysis = [klt.analysis(group.rows) for group in self.basis.groups]
        finer = (2.0 ** (shifts / SCALES_PER_OCTAVE)).astype(np.float32)[:, None]
        parts = [
            quantize_group(group, analysis, part, finer)
            for group, analysis, part in zip(self.basis.groups, self._analysis, frames, strict=True)
        ]
        whole = [np.concatenate([found[k] for found in parts], axis=-1) for k in range(4)]
        errors = np.stack([found[4] for found in parts], axis=1)
        values = np.concatenate(whole[:2], axis=1)
        chosen: NDArray[np.uint8] = np.concatenate(whole[2:])
        usual = shifts == shifts.min()
        if not usual.all():
            there = widths.choose(np.ascontiguousarray(values[usual]))[0]
            chosen = np.where(chosen, np.maximum(there, 1), 0).astype(np.uint8)
        return values, chosen, errors

    # --- decoding ------------------------------------------------------------------------------

    def decode(
        self, payload: memoryview, tensors: Sequence[TensorSpec], first: int,
        pos: NDArray[np.int32], where: str,
    ) -> list[Rows]:  # fmt: skip
        """Frames ``first`` to ``first + len(pos)`` of a chunk."""
        span = slice(first, first + len(pos))
        return self.basis.rows(self.restored(payload, span, where)[0], tensors, pos)

    def restored(
        self, payload: memoryview, span: slice, where: str
    ) -> tuple[list[Floats], NDArray[np.float64]]:
        """What is stored of some frames: `Basis.frames`, and each frame's bound ``[n]``."""
        values, shifts, bounds = self.integers(payload, where)
        step = (2.0 ** (-shifts[span] / SCALES_PER_OCTAVE)).astype(np.float32)[:, None]
        part = values[span]
        frames = []
        column, channel = 0, self.basis.rank
        for group in self.basis.groups:
            coefficients = part[:, column : column + group.rank]
            missed = part[:, channel : channel + group.n_channels]
            # Damaged bytes may say anything: infinity is as good an answer as any.
            with np.errstate(over="ignore", invalid="ignore"):
                found = coefficients.astype(np.float32) @ group.rows
                if missed.any():
                    found += missed
                frames.append(found * step)
            column, channel = column + group.rank, channel + group.n_channels
        return frames, bounds[span]

    def integers(
        self, payload: memoryview, where: str
    ) -> tuple[Ints, NDArray[np.int64], NDArray[np.float64]]:
        """Of a whole chunk: integers ``[n, R + C]``, each frame's shift and bound, ``[n]``."""
        reader = ByteReader(payload, where)
        header = ChunkHeader.read(reader)
        if header.raw_length > blocks.MOST_LOSSY_BYTES:
            raise DamagedError(f"{where}: {header.raw_length} raw bytes; damaged")
        left = header.n_frames
        reader.unpack("Q")
        base = reader.u8()
        chosen = widths.read_widths(reader, self.basis.rank + self.basis.n_channels)
        parts, shifts, bounds = [], [], []
        while left:
            n = reader.uvarint(limit=left)
            extra, bound = reader.u8(), reader.unpack("f")[0]
            if not n:
                raise DamagedError(f"{where}: a segment without frames; damaged")
            parts.append(widths.decode(reader, n, widths.finer(chosen, extra)))
            shifts.append(np.full(n, base + extra, np.int64))
            bounds.append(np.full(n, bound))
            left -= n
        reader.end()
        return np.concatenate(parts), np.concatenate(shifts), np.concatenate(bounds)

    def distance(
        self, payload: memoryview, first: int, rows: Sequence[Rows], tensors: Sequence[TensorSpec],
        pos: NDArray[np.int32], where: str,
    ) -> NDArray[np.float64]:  # fmt: skip
        """By how many steps, root mean square, frames ``rows`` differ from what is stored, ``[n]``;
        infinite where that is more than for those that were packed."""
        stored, bounds = self.restored(payload, slice(first, first + len(pos)), where)
        total = np.zeros(len(pos))
        for new, old in zip(self.basis.frames(rows, tensors, pos), stored, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                total += np.square(new - old).sum(axis=1, dtype=np.float64)
        near = total <= _ALLOWED * bounds * self.basis.n_channels
        return np.where(near, np.sqrt(total / self.basis.n_channels), np.inf)


def quantize_group(
    group: Group, analysis: Floats, frames: Floats, finer: Floats
) -> tuple[Ints, Ints, NDArray[np.uint8], NDArray[np.uint8], Floats]:
    """Coefficients and what they miss, the widths of both, and each frame's squared error."""
    scaled = frames * finer
    coefficients = _rounded(scaled @ analysis)
    wide, bits = widths.choose(coefficients)
    # A component is worth its bits for all channels together; its row has length one or nearly.
    _drop(coefficients, wide, bits, scaled @ analysis, np.square(group.rows).sum(axis=1))
    missing = scaled - coefficients.astype(np.float32) @ group.rows
    missed = _rounded(missing)
    columns = np.flatnonzero(missed.any(axis=0))
    residual_wide = np.zeros(group.n_channels, np.uint8)
    if len(columns):
        part = np.ascontiguousarray(missed[:, columns])
        part_wide, part_bits = widths.choose(part)
        _drop(part, part_wide, part_bits, missing[:, columns], np.ones(len(columns)))
        residual_wide[columns] = part_wide
        missed[:, columns] = part
    error = np.square((missing - missed) / finer).sum(axis=1)
    return coefficients, missed, wide, residual_wide, error


def _drop(
    values: Ints, wide: NDArray[np.uint8], bits: Floats, exact: NDArray[np.floating],
    weights: NDArray[np.floating],
) -> None:
    """Make zero the columns that save less error than `BITS_WORTH` of their bits."""
    saved = np.square(exact).sum(axis=0) - np.square(exact - values).sum(axis=0)
    useless = saved * weights <= BITS_WORTH * bits
    values[:, useless] = 0
    wide[useless] = 0


def _rounded(values: NDArray[np.floating]) -> Ints:
    rounded: Ints = np.rint(np.clip(values, -_LARGEST, _LARGEST)).astype(np.int32)
    return rounded


def check_finite(frames: Sequence[Floats]) -> None:
    """`UnsupportedError` unless all numbers are finite."""
    if not all(np.isfinite(part).all() for part in frames):
        raise UnsupportedError(
            "keys or values are not finite, which a lossy tier cannot keep; use --tier lossless"
        )
