"""Make an archive smaller by leaving out its finer quality layers. Nothing is coded again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import files
from .archive import Archive
from .container.snapshots import SnapshotRecord
from .container.writer import ContainerWriter
from .errors import DamagedError, UsageError
from .rewriting import Copier
from .tiers import TIERS, TOKENS, tier_from_name
from .tokens_tier import check_never_shifted, check_recomputable

Progress = Callable[[int], None]


@dataclass(frozen=True)
class DemoteReport:
    """Sizes of the archive before and after, and how many snapshots lost a layer."""

    n_snapshots: int
    n_demoted: int
    bytes_before: int
    file_bytes: int


def demote(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tier: str,
    *,
    book: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> DemoteReport:
    """Write the archive ``path`` to ``out`` without the quality layers above ``tier``.

    Chunks are copied as they are. Snapshots of a coarser tier stay as they are. With "tokens" all
    frames are left out; that alone may need the ``book``, to read the tokens. `UsageError` for a
    snapshot of a finer tier without such a layer; ``out`` is then as it was. ``progress`` is called
    with the bytes of each chunk that is copied.
    """
    tier_from_name(tier)
    with Archive(path, book=book) as archive:
        if archive.torn_bytes:
            raise DamagedError(
                f"{archive.path}: the last {archive.torn_bytes} bytes are no whole commit; "
                "see tsc verify"
            )
        records = [archive.record(number) for number in range(len(archive))]
        tops = [_top(archive, record, tier) for record in records]
        kept = _layers_kept(archive, records, tops)
        with files.new_file(out, force=force) as fd:
            writer = ContainerWriter(fd)
            writer.copy_extras(archive.container)
            copier = Copier(archive, writer, progress)
            for number, n_layers in enumerate(kept):
                copier.block(number, n_layers)
            for record, top in zip(records, tops, strict=True):
                copier.snapshot(_demoted(record, top), record.number)
            size = writer.commit()
        n_demoted = sum(top is not None for top in tops)
        return DemoteReport(len(records), n_demoted, archive.size, size)


def _top(archive: Archive, record: SnapshotRecord, tier: str) -> int | None:
    """The last layer that a snapshot keeps, -1 for none; None if it stays as it is."""
    if tier_from_name(tier).codec is None and tier != record.tier:
        if "weights_blake3" not in record.identity:
            raise UsageError(
                f"{archive.path}: snapshot {record.number} does not name its model; only what was "
                "packed with --model can be computed again"
            )
        check_recomputable(archive.snapshot(record.number))
        check_never_shifted(archive, record.number)
        return -1
    if tier in record.layers[:-1]:
        return record.layers.index(tier)
    if tier == record.tier or tier_from_name(tier).exact or _is_coarser(record.tier, tier):
        return None
    raise UsageError(
        f"{archive.path}: snapshot {record.number} has no layer {tier}, only "
        f"{', '.join(record.layers)}; unpack it and pack it again"
    )


def _is_coarser(tier: str, other: str) -> bool:
    order = list(TIERS)
    return tier in order and order.index(tier) > order.index(other)


def _layers_kept(
    archive: Archive, records: list[SnapshotRecord], tops: list[int | None]
) -> list[int]:
    """How many layers of each block some snapshot still needs."""
    entries = archive.container.blocks
    kept = [0] * len(entries)
    for record, top in zip(records, tops, strict=True):
        for run in (run for track in record.tracks for run in track.runs):
            all_layers = entries[run.block].n_layers
            wanted = all_layers if top is None else min(top + 1, all_layers)
            kept[run.block] = max(kept[run.block], wanted)
    for number in reversed(range(len(entries))):
        # A difference is worth nothing without what it is one to.
        if entries[number].sources and kept[number] == entries[number].n_layers:
            for run in entries[number].sources:
                kept[run.block] = entries[run.block].n_layers
    return kept


def _demoted(record: SnapshotRecord, top: int | None) -> SnapshotRecord:
    if top is None:
        return record
    tier = record.layers[top] if top >= 0 else TOKENS
    return replace(record, tier=tier, coding=_coding(record, top))


def _coding(record: SnapshotRecord, top: int) -> dict[str, Any]:
    """What a snapshot says of its coding with layers 0 to ``top`` alone."""
    if top < 0:
        return {key: value for key, value in record.coding.items() if key == "book"}
    coding, layers = dict(record.coding), record.layers[: top + 1]
    del coding["layers"]
    # It was measured in steps of the finest layer.
    coding.pop("max_delta_error", None)
    for each, all_layers in (("log_step", "log_steps"), ("expected_kl", "expected_kls")):
        values = coding.pop(all_layers, None)
        if isinstance(values, list) and len(values) > top:
            coding[each] = values[top]
            if top:
                coding[all_layers] = values[: top + 1]
    if top:
        coding["layers"] = layers
    return coding
