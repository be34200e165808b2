"""What is learnt from a session itself and stored in its file: the basis of codec 3.

A *basis* says how a track's rows become frames of real channels (whether the keys' rotation is
undone, and each tensor's step) and holds rows that frames are written in: a mean, and for each
*group* of layers the components that its frames have in common. The entries are integers, each row
no finer than its component asks for. A basis may *extend* an earlier one of the file: it then has
the earlier one's rows and a few more. ``spec/codecs/session-transform.md`` gives every byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .bytestream import ByteReader, ByteWriter
from .container.records import checksum
from .entropy import widths
from .errors import DamagedError
from .model import ModelIdentity, TensorSpec
from .transforms import channels
from .transforms.rope import HALVES, NEIGHBOURS, Rope

Rows = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

SCALES_PER_OCTAVE = 4
MAX_ROTATED = 1 << 16
MAX_CHAIN = 256
"""Bases that are read for one: itself and those it extends."""

_ENTRIES_PER_BYTE, _SPARE_ENTRIES = 16, 1 << 20
"""Entries that a basis may hold by its length: reading one takes bounded memory."""

_PAIRINGS = (NEIGHBOURS, HALVES)


@dataclass(frozen=True)
class KeyTurn:
    """How the keys of every head are turned; ``inv_freq``: float32 ``[m]``, m pairs a head."""

    head_dim: int
    pairing: str
    inv_freq: Floats

    @property
    def rope(self) -> Rope:
        return Rope(self.inv_freq)

    def write(self, writer: ByteWriter) -> None:
        writer.u8(_PAIRINGS.index(self.pairing)).uvarint(self.head_dim)
        writer.uvarint(len(self.inv_freq)).raw(self.inv_freq.astype("<f4").tobytes())

    @classmethod
    def read(cls, reader: ByteReader) -> KeyTurn:
        pairing, head_dim = reader.u8(), reader.uvarint(limit=MAX_ROTATED)
        n_pairs = reader.uvarint(limit=MAX_ROTATED)
        inv_freq = np.frombuffer(reader.take(4 * n_pairs), "<f4").astype(np.float32)
        fits = pairing < len(_PAIRINGS) and 0 < head_dim and 2 * n_pairs <= head_dim
        if not fits or not np.isfinite(inv_freq).all():
            raise DamagedError(f"{reader.where}: keys cannot be turned so; damaged")
        return cls(head_dim, _PAIRINGS[pairing], inv_freq)


def key_turn(identity: ModelIdentity, tensors: Sequence[TensorSpec]) -> KeyTurn | None:
    """How the model turns its keys, where the identity tells; None where it does not.

    >>> facts = {"rope_base": 10000.0, "rope_dim": 4, "rope_scaling": "none",
    ...          "rope_pairing": "neox", "head_dim_k": 4}
    >>> key_turn(ModelIdentity(facts), []).inv_freq.tolist()
    [1.0, 0.009999999776482582]
    """
    facts = identity.facts
    base, dim, head_dim = (facts.get(key) for key in ("rope_base", "rope_dim", "head_dim_k"))
    pairing, scaling = facts.get("rope_pairing"), facts.get("rope_scaling")
    factor = facts.get("rope_scaling_factor") if scaling == "linear" else 1.0
    if not (
        isinstance(base, float | int) and isinstance(dim, int) and isinstance(head_dim, int)
        and isinstance(factor, float | int) and scaling in ("none", "linear")
        and pairing in _PAIRINGS
    ):  # fmt: skip
        return None
    if base <= 0 or factor <= 0 or not 0 < dim <= head_dim <= MAX_ROTATED or dim % 2:
        return None
    if any(tensor.role == "k" and tensor.n_channels % head_dim for tensor in tensors):
        return None
    exponents = -np.arange(0, dim, 2) / dim
    return KeyTurn(head_dim, str(pairing), (float(base) ** exponents / factor).astype(np.float32))


def same_turn(one: KeyTurn | None, other: KeyTurn | None) -> bool:
    """Are keys turned alike?"""
    if one is None or other is None:
        return one is other
    same = (one.head_dim, one.pairing) == (other.head_dim, other.pairing)
    return same and np.array_equal(one.inv_freq, other.inv_freq)


@dataclass
class Group:
    """Some layers of a track: which tensors, and what their frames are written in.

    ``tensors``: indices in the track's list, in the order of the group's channels. ``steps``:
    float32, one a tensor. ``exponents``: int8 ``[1 + R]``; ``entries``: int32 ``[1 + R, C]``,
    row 0 the mean. Row ``r`` is ``entries[r] * 2 ** (-exponents[r] / 4)``, in steps.
    """

    tensors: list[int]
    sizes: list[int]
    steps: Floats
    exponents: NDArray[np.int8]
    entries: Ints
    mean: Floats = field(init=False)
    rows: Floats = field(init=False)

    def __post_init__(self) -> None:
        scales = 2.0 ** (-self.exponents.astype(np.float64) / SCALES_PER_OCTAVE)
        rows = self.entries.astype(np.float32) * scales.astype(np.float32)[:, None]
        self.mean, self.rows = rows[0], rows[1:]

    @property
    def channel_steps(self) -> Floats:
        """Step of each channel, float32 ``[C]``."""
        return np.repeat(self.steps, self.sizes)

    @property
    def rank(self) -> int:
        return len(self.rows)

    @property
    def n_channels(self) -> int:
        return sum(self.sizes)


@dataclass
class Basis:
    """``turn`` is None where keys are taken as they stand. ``id``: checksum of the record's
    payload, 0 before it is written; ``parent``: the id of the basis it extends, or 0; ``depth``:
    how many bases of the file it takes, itself included."""

    turn: KeyTurn | None
    groups: list[Group]
    parent: int = 0
    id: int = 0
    depth: int = 1

    @property
    def rank(self) -> int:
        """Coefficients of a frame."""
        return sum(group.rank for group in self.groups)

    @property
    def n_channels(self) -> int:
        return sum(group.n_channels for group in self.groups)

    def fits(self, tensors: Sequence[TensorSpec]) -> bool:
        """Are these the tensors that the basis is for?"""
        held = sorted((i, size) for group in self.groups for i, size in zip(
            group.tensors, group.sizes, strict=True))  # fmt: skip
        if held != [(i, tensor.n_channels) for i, tensor in enumerate(tensors)]:
            return False
        parts = [[tensors[i] for i in group.tensors] for group in self.groups]
        if any(channels.tensor_order(part) != list(range(len(part))) for part in parts):
            return False
        head_dim = self.turn.head_dim if self.turn else 1
        return not any(t.role == "k" and t.n_channels % head_dim for t in tensors)

    # --- bytes ---------------------------------------------------------------------------------

    def write(self, parent: Basis | None = None) -> bytes:
        """The payload of its record; only the rows that ``parent`` lacks, if it extends one."""
        writer = ByteWriter().pack("Q", parent.id if parent else 0)
        if parent is None:
            writer.u8(self.turn is not None)
            if self.turn is not None:
                self.turn.write(writer)
            writer.uvarint(len(self.groups))
            for group in self.groups:
                writer.uvarint(len(group.tensors))
                for i, size in zip(group.tensors, group.sizes, strict=True):
                    writer.uvarint(i).uvarint(size)
                writer.raw(group.steps.astype("<f4").tobytes())
        for number, group in enumerate(self.groups):
            first = 1 + parent.groups[number].rank if parent else 0
            _write_rows(writer, group, first)
        return writer.bytes()

    @classmethod
    def read(cls, data: memoryview, where: str, old: Basis | None = None) -> Basis:
        """``old``: the basis that this one extends, if it does (`read_parent`)."""
        reader = ByteReader(data, where)
        (parent_id,) = reader.unpack("Q")
        left = _ENTRIES_PER_BYTE * len(data) + _SPARE_ENTRIES
        groups: list[Group] = []
        if old is not None:
            turn, frames = old.turn, [(g.tensors, g.sizes, g.steps) for g in old.groups]
        else:
            turn, frames = _read_frame(reader)
        for number, (tensors, sizes, steps) in enumerate(frames):
            exponents, entries = _read_rows(reader, sizes, left, old is not None)
            left -= entries.size
            if old is not None:
                before = old.groups[number]
                exponents = np.concatenate([before.exponents, exponents])
                entries = np.concatenate([before.entries, entries])
            if len(entries) > 1 + sum(sizes):
                raise DamagedError(f"{where}: more rows than channels; damaged")
            groups.append(Group(tensors, sizes, steps, exponents, entries))
        reader.end()
        depth = old.depth + 1 if old else 1
        return cls(turn, groups, parent_id, checksum(data), depth)

    @staticmethod
    def read_parent(data: memoryview, where: str) -> int:
        """The id of the basis that this one extends, or 0."""
        (parent,) = ByteReader(data, where).unpack("Q")
        return int(parent)

    # --- frames --------------------------------------------------------------------------------

    def frames(
        self, rows: Sequence[Rows], tensors: Sequence[TensorSpec], pos: NDArray[np.int32]
    ) -> list[Floats]:
        """Channels of each group in steps, less the mean: float32 ``[n, C]`` each."""
        return [
            channels_of(self.turn, [rows[i] for i in group.tensors],
                        [tensors[i] for i in group.tensors], pos) / group.channel_steps - group.mean
            for group in self.groups
        ]  # fmt: skip

    def rows(
        self, frames: Sequence[Floats], tensors: Sequence[TensorSpec], pos: NDArray[np.int32]
    ) -> list[Rows]:
        """Undo `frames`, rounding to each tensor's element type."""
        out: list[Rows] = [np.zeros((0, 0), np.uint8)] * len(tensors)
        for group, values in zip(self.groups, frames, strict=True):
            part = [tensors[i] for i in group.tensors]
            with np.errstate(over="ignore", invalid="ignore"):
                whole = (values + group.mean) * group.channel_steps
            found = rows_of(self.turn, whole, part, pos)
            for i, stored in zip(group.tensors, found, strict=True):
                out[i] = stored
        return out


_NO_ROPE = Rope(np.zeros(0, np.float32))


def channels_of(
    turn: KeyTurn | None, rows: Sequence[Rows], tensors: Sequence[TensorSpec],
    pos: NDArray[np.int32],
) -> Floats:  # fmt: skip
    """Real channels of some tensors, keys turned back: float32 ``[n, C]``."""
    with np.errstate(over="ignore", invalid="ignore"):
        return channels.to_frames(
            rows, tensors, pos, turn.rope if turn else _NO_ROPE, turn.head_dim if turn else 1,
            turn.pairing if turn else HALVES,
        )  # fmt: skip


def rows_of(
    turn: KeyTurn | None, frames: Floats, tensors: Sequence[TensorSpec], pos: NDArray[np.int32]
) -> list[Rows]:
    """Undo `channels_of`, rounding to the element type; ``frames`` is overwritten."""
    # Bytes that are damaged may say anything, and infinity is as good an answer as any.
    with np.errstate(over="ignore", invalid="ignore"):
        return channels.from_frames(
            frames, tensors, pos, turn.rope if turn else _NO_ROPE, turn.head_dim if turn else 1,
            turn.pairing if turn else HALVES,
        )  # fmt: skip


def _read_frame(
    reader: ByteReader,
) -> tuple[KeyTurn | None, list[tuple[list[int], list[int], Floats]]]:
    turned = reader.u8()
    if turned > 1:
        raise DamagedError(f"{reader.where}: keys are turned in an unknown way; damaged")
    turn = KeyTurn.read(reader) if turned else None
    frames = []
    for _ in range(reader.count(item_bytes=8)):
        n = reader.count(item_bytes=6)
        pairs = [(reader.uvarint(limit=1 << 20), reader.uvarint(limit=1 << 30)) for _ in range(n)]
        steps = np.frombuffer(reader.take(4 * n), "<f4").astype(np.float32)
        if not n or not all(size for _, size in pairs):
            raise DamagedError(f"{reader.where}: a tensor without channels; damaged")
        if not np.isfinite(steps).all() or (steps <= 0).any():
            raise DamagedError(f"{reader.where}: a step is no positive number; damaged")
        frames.append(([i for i, _ in pairs], [size for _, size in pairs], steps))
    return turn, frames


def _write_rows(writer: ByteWriter, group: Group, first: int) -> None:
    """Rows from ``first`` on: exponents, then tensor by tensor a matrix ``[channels, rows]``."""
    entries = group.entries[first:]
    writer.uvarint(len(entries) - (not first)).raw(group.exponents[first:].tobytes())
    parts = [
        np.ascontiguousarray(part.T)
        for part in np.split(entries, np.cumsum(group.sizes)[:-1], axis=1)
    ]
    chosen = [widths.choose(part)[0] for part in parts]
    # Row after row, so that a row's widths, which are alike, are neighbours.
    widths.write_widths(writer, np.stack(chosen, axis=1).ravel())
    for part, wide in zip(parts, chosen, strict=True):
        widths.encode(writer, part, wide)


def _read_rows(
    reader: ByteReader, sizes: Sequence[int], most_entries: int, is_extension: bool
) -> tuple[NDArray[np.int8], Ints]:
    n_channels = sum(sizes)
    n_rows = reader.uvarint(limit=n_channels) + (not is_extension)
    if n_rows * n_channels > most_entries:
        raise DamagedError(f"{reader.where}: more entries than its bytes can hold; damaged")
    exponents = np.frombuffer(reader.take(n_rows), np.int8)
    wide = widths.read_widths(reader, n_rows * len(sizes)).reshape(n_rows, len(sizes))
    parts = [
        widths.decode(reader, size, np.ascontiguousarray(wide[:, i])).T
        for i, size in enumerate(sizes)
    ]
    return exponents, np.concatenate(parts, axis=1)
