"""What an archive holds, as plain values: the library's side of ``tsc info``.

Nothing of the payload is read, so that it costs the same for any size of file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .archive import Archive
from .archived_track import is_absent
from .container.records import BASIS, RecordRef
from .container.snapshots import SnapshotRecord, TrackRecord
from .model import TensorSpec, tensor_runs
from .registry import CODEC_NAMES


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one role and type in consecutive layers of a track."""

    cache: int
    stream: int
    role: str
    first_layer: int
    n_layers: int
    dtype: str
    n_channels: int
    row_bytes: int
    rotation: int


@dataclass(frozen=True)
class LayerInfo:
    """A quality layer: what it and those below it take, with all else that restoring needs, and
    the snapshot ratio of that."""

    tier: str
    restore_bytes: int
    ratio: float


@dataclass(frozen=True)
class SnapshotInfo:
    """One save. ``restore_bytes``: what of the file is needed to restore it, all layers;
    ``ratio``: ``raw_bytes / restore_bytes``, the snapshot ratio. ``coding``: of a lossy tier the
    book it needs (``book``), the step, and the KL measured when the book was made. ``layers``:
    the base first; one without quality layers. ``n_absent``: frames that are not stored and must be
    computed again from the tokens. ``n_tokens_common``: leading tokens that the parent has too,
    None where only the payload says it; ``added_bytes``: records that no earlier snapshot
    needs."""

    number: int
    name: str
    plan: str
    parent: int | None
    tier: str
    n_tokens: int
    n_frames: int
    n_absent: int
    raw_bytes: int
    restore_bytes: int
    ratio: float
    coding: dict[str, Any]
    layers: list[LayerInfo]
    n_tokens_common: int | None
    added_bytes: int


@dataclass(frozen=True)
class ArchiveInfo:
    """The whole file. ``snapshot_ratio`` is that of the last snapshot; ``series_ratio`` is the raw
    bytes of all snapshots over the size of the file."""

    path: str
    format_version: str
    file_bytes: int
    torn_bytes: int
    n_blocks: int
    codecs: list[str]
    source: dict[str, Any]
    identity: dict[str, Any]
    tensors: list[TensorGroup]
    snapshots: list[SnapshotInfo]
    snapshot_ratio: float
    series_ratio: float


def describe(archive: Archive) -> ArchiveInfo:
    """Describe an open archive; `DamagedError` if its structure is damaged."""
    # One record after another: each may take as much memory as a file of this size may.
    seen: set[RecordRef] = set()
    bases = archive.container.by_checksum(BASIS)
    allowance = archive.container.allowance()
    snapshots = []
    for number in range(len(archive)):
        record = archive.record(number)
        allowance.claim(_memory_of(record), f"{archive.path}: snapshot {number}")
        needed = _needed(archive, record, bases)
        added = sum(ref.length for ref in needed - seen)
        seen |= needed
        snapshots.append(_describe_snapshot(archive, record, added))
    header, entries = archive.container.header, archive.container.blocks
    codecs = {chunk.codec for entry in entries for chunk in entry.chunks}
    last = archive.record() if snapshots else None
    return ArchiveInfo(
        path=archive.path,
        format_version=f"{header.major}.{header.minor}",
        file_bytes=archive.size,
        torn_bytes=archive.torn_bytes,
        n_blocks=len(entries),
        codecs=[CODEC_NAMES.get(codec, str(codec)) for codec in sorted(codecs)],
        source=dict(last.source) if last else {},
        identity=dict(last.identity) if last else {},
        tensors=[
            _group(track, run)
            for track in (last.tracks if last else [])
            for run in tensor_runs(track.tensors)
        ],
        snapshots=snapshots,
        snapshot_ratio=snapshots[-1].ratio if snapshots else 0.0,
        series_ratio=sum(info.raw_bytes for info in snapshots) / archive.size,
    )


def _describe_snapshot(archive: Archive, record: SnapshotRecord, added: int) -> SnapshotInfo:
    raw = sum(
        len(track.cells) * sum(tensor.row_bytes for tensor in track.tensors)
        for track in record.tracks
    )
    restore = archive.restore_bytes(record.number)
    return SnapshotInfo(
        number=record.number,
        name=record.name,
        plan=record.plan,
        parent=record.parent,
        tier=record.tier,
        n_tokens=len(record.ids),
        n_frames=sum(len(track.cells) for track in record.tracks),
        n_absent=sum(
            run.count for track in record.tracks for run in track.runs
            if is_absent(archive.block(run))
        ),
        raw_bytes=raw,
        restore_bytes=restore,
        ratio=raw / restore,
        coding=dict(record.coding),
        layers=[_describe_layer(archive, record, raw, i) for i in range(len(record.layers))],
        n_tokens_common=_n_tokens_common(archive, record),
        added_bytes=added,
    )


def _n_tokens_common(archive: Archive, record: SnapshotRecord) -> int | None:
    if record.parent is not None and archive.record(record.parent).coding and not record.coding:
        # It keeps no tokens of a parent whose tokens may need a book; decoding both is not quick.
        return record.ids.kept or None
    return record.ids.kept


def _memory_of(record: SnapshotRecord) -> int:
    """About what is kept of a record once it is described."""
    texts = [record.name, record.plan, record.tier]
    n_items = 0
    for key, value in record.coding.items():
        items = value if isinstance(value, list) else [value]
        n_items += len(items)
        texts += [key, *(item for item in items if isinstance(item, str))]
    return 1024 + 64 * n_items + 4 * sum(map(len, texts))


def _needed(
    archive: Archive, record: SnapshotRecord, bases: dict[int, RecordRef]
) -> set[RecordRef]:
    """All records that a snapshot needs, its own too."""
    container = archive.container
    blocks = {run.block for track in record.tracks for run in track.runs}
    refs = {chunk.ref for block in blocks for chunk in container.blocks[block].chunks}
    refs |= {entry.ref for entry in record.opaque}
    refs |= {bases[basis] for basis in archive.bases(record) if basis in bases}
    return refs | {container.snapshots[record.number]}


def _describe_layer(archive: Archive, record: SnapshotRecord, raw: int, layer: int) -> LayerInfo:
    restore = archive.restore_bytes(record.number, layer)
    return LayerInfo(record.layers[layer], restore, raw / restore)


def _group(track: TrackRecord, tensors: Sequence[TensorSpec]) -> TensorGroup:
    first = tensors[0]
    return TensorGroup(
        track.cache, track.stream, first.role, first.layer, len(tensors), first.dtype.name,
        first.n_channels, first.row_bytes, first.rotation,
    )  # fmt: skip
