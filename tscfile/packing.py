"""Put snapshots into archives: `pack` makes a new file, `append` adds to one."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import blocks, files, pipeline, temporal, tokens, workers
from .archive import Archive, ArchivedTrack, is_exact
from .container.records import (
    FrameRun,
    OpaqueEntry,
    SnapshotRecord,
    TrackRecord,
    common_prefix,
    logical_seed,
)
from .container.writer import ContainerWriter, EncodedChunk
from .entropy import zstd
from .errors import MismatchError, TscError, UsageError
from .exact_coding import ExactCoder, needs_book
from .identity import compare
from .lossy_coding import (
    BookCoder,
    LossyCoder,
    SessionCoder,
    Target,
    is_step,
    step_of_ratio,
)
from .model import ModelIdentity, Snapshot, Track
from .sources import open_source
from .tiers import CUSTOM, DEFAULT_BOOK_TIER, DEFAULT_TIER, Tier, tier_from_name

_MOST_DENSE = 4 << 20
"""Opaque bytes that may be packed to less than half."""

Source = str | os.PathLike[str] | Snapshot
Progress = Callable[[int], None]


@dataclass(frozen=True)
class PackReport:
    """What was stored and what it cost.

    ``n_frames_changed`` counts new frames of tokens that the parent has too: the source computed
    them again with other rows. ``bytes_added`` and ``file_bytes`` are
    sizes in the archive, ``raw_bytes`` the rows of the snapshot at their source types.
    """

    snapshot: int
    tier: str
    plan: str
    parent: int | None
    n_tokens: int
    n_tokens_common: int
    n_frames_kept: int
    n_frames_new: int
    n_frames_changed: int
    raw_bytes: int
    bytes_added: int
    file_bytes: int


def pack(
    source: Source,
    path: str | os.PathLike[str],
    *,
    tier: str | None = None,
    book: str | os.PathLike[str] | None = None,
    embed_book: bool = False,
    target_kl: float | None = None,
    target_ratio: float | None = None,
    identity: ModelIdentity | None = None,
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Make the archive ``path`` of one snapshot.

    ``source``: a cache file or a `Snapshot`. ``tier``: `tscfile.tiers.TIERS`; "balanced" by
    default where a ``book`` is given, else "lossless". Without a book a lossy tier learns from the
    snapshot itself. ``embed_book``: put the book into the archive, which then needs no other file.
    ``target_kl`` (nats), ``target_ratio``: in place of a tier, the step that the book expects to
    have this KL, or the finest that makes the archive so small. ``identity``: what is known of the
    model (`tscfile.identity.identity_from_gguf`). ``progress`` is called with the raw bytes done.
    Raises `UsageError` if ``path`` exists and ``force`` is not given, the source's errors, and
    `OSError`; whatever is raised, ``path`` is as it was.

    >>> import tempfile, tscfile
    >>> path = tempfile.mkdtemp() + "/session.tsc"
    >>> report = tscfile.pack("samples/session.kv", path)
    >>> report.plan, report.n_tokens, report.n_frames_new
    ('keyframe', 400, 400)
    """
    target = Target(target_kl, target_ratio)
    chosen = target.tier(tier) or tier_from_name(DEFAULT_BOOK_TIER if book else DEFAULT_TIER)
    snapshot, label = _open(source, name)
    identify(snapshot, identity)
    coder = _coder(chosen, book, snapshot, target)
    with files.new_file(path, force=force) as fd:
        writer = ContainerWriter(fd)
        planned = _Planned(None, None, [temporal.store_all(len(t.cells)) for t in snapshot.tracks])
        if coder is not None and book is not None and embed_book:
            writer.add_book(Path(book).read_bytes())
        number = _store(writer, snapshot, planned, chosen, coder, label, None, progress)
        size = writer.commit()
    return _report(number, chosen, snapshot, planned, size, size)


def append(
    source: Source,
    path: str | os.PathLike[str],
    *,
    tier: str | None = None,
    book: str | os.PathLike[str] | None = None,
    identity: ModelIdentity | None = None,
    name: str | None = None,
    wait: bool = True,
    progress: Progress | None = None,
) -> PackReport:
    """Add a later save of the same conversation to the archive ``path``.

    Only frames that are not in the file yet are stored; a lossless save takes nothing from lossy
    blocks. ``tier`` is that of the parent by default, ``book`` where a lossy tier's book is. The
    new commit goes behind what is there; if anything is raised the file is cut back to it.

    Raises `MismatchError` for a save of another conversation or another model, `TscError` if
    ``wait`` is False and another process is appending.
    """
    snapshot, label = _open(source, name)
    with _locked(path, wait) as fd, Archive(path, book=book) as archive:
        parent, n_common = _choose_parent(archive, snapshot.tokens)
        old = archive.record(parent) if parent is not None else None
        identify(snapshot, identity, ModelIdentity(dict(old.identity) if old else {}))
        chosen = tier_from_name(tier or (old.tier if old else DEFAULT_TIER))
        coder = _coder(chosen, book, snapshot, Target(), archive if old else None, old)
        planned = _plan(archive, snapshot, parent, n_common, coder)
        before = archive.container.whole_end
        try:
            writer = ContainerWriter(fd, archive.container)
            number = _store(writer, snapshot, planned, chosen, coder, label, archive, progress)
            size = writer.commit()
        except BaseException as error:
            os.ftruncate(fd, before)
            if isinstance(error, OSError):
                files.name_file(error, path)
            raise
    return _report(number, chosen, snapshot, planned, size, size - before)


@dataclass
class _Planned:
    """The parent, if there is one, and where each track's frames come from."""

    parent: int | None
    n_parent_cells: int | None
    tracks: list[temporal.TrackPlan]
    n_tokens_common: int = 0

    def __post_init__(self) -> None:
        # Counted now: storing a frame makes it one that the file has.
        self.n_new = sum(plan.n_new for plan in self.tracks)
        self.is_new = [plan.block < 0 for plan in self.tracks]
        self.name = temporal.name_plan(self.tracks, self.n_parent_cells or 0)


def _coder(
    tier: Tier,
    book: str | os.PathLike[str] | None,
    snapshot: Snapshot,
    target: Target,
    archive: Archive | None = None,
    parent: SnapshotRecord | None = None,
) -> LossyCoder | ExactCoder | None:
    """What a tier codes with: the book given, that of the ``parent`` in ``archive``, or, if it is
    lossy, what the snapshot itself teaches."""
    if tier.exact and book is None and (parent is None or parent.tier != tier.name):
        return None
    if book is not None:
        from .book_codec import BookCodec
        from .books.book import load

        codec = BookCodec(load(book), snapshot.identity, os.fspath(book))
    elif archive is not None and parent is not None and "book" in parent.coding:
        codec = archive.book_codec(parent)
    elif tier.exact:
        return None
    else:
        if target != Target():
            raise UsageError("a target KL or ratio needs a book: give it with --book")
        if not tier.tolerance:
            raise UsageError(f"tier {tier.name} needs a book: give it with --book")
        return SessionCoder(tier, archive, parent)
    if tier.exact:
        return ExactCoder.of(codec, snapshot.tracks)
    if tier is not CUSTOM:
        log_step = codec.book.tier(tier.name).log_step
    elif target.kl is not None:
        log_step = codec.book.step_of_kl(target.kl)
    elif target.ratio is not None:
        log_step = step_of_ratio(codec, snapshot, target.ratio)
    elif parent is not None and is_step(parent.coding.get("log_step")):
        log_step = parent.coding["log_step"]
    else:
        raise UsageError("tier custom says no step; give a tier, a target KL or a target ratio")
    return BookCoder(codec, log_step)


def _open(source: Source, name: str | None) -> tuple[Snapshot, str]:
    snapshot = source if isinstance(source, Snapshot) else open_source(source)
    if name is None:
        name = "" if isinstance(source, Snapshot) else Path(source).name
    # File names are bytes and need not be text.
    return snapshot, os.fsencode(name).decode(errors="replace")


def identify(
    snapshot: Snapshot, given: ModelIdentity | None, recorded: ModelIdentity | None = None
) -> None:
    """Give the snapshot the identity it is stored with; `MismatchError` if two disagree."""
    known = recorded or ModelIdentity()
    for other in (given, snapshot.identity):
        differences = compare(known, other) if other else []
        if differences:
            raise MismatchError(f"the model is another one: {'; '.join(differences)}")
        if other:
            known = ModelIdentity({**known.facts, **other.facts})
    snapshot.identity = known


# --- planning ---------------------------------------------------------------------------------


def _plan(
    archive: Archive, snapshot: Snapshot, parent: int | None, n_common: int,
    coder: LossyCoder | ExactCoder | None,
) -> _Planned:  # fmt: skip
    """Plan every track against ``parent``, which has ``n_common`` leading tokens in common."""
    if parent is None:
        return _Planned(None, None, [temporal.store_all(len(t.cells)) for t in snapshot.tracks])
    if not n_common and len(snapshot.tokens) and len(archive.record(parent).ids):
        raise MismatchError(
            f"{archive.path}: the save shares no first token with any of its snapshots; "
            "pack another conversation into a file of its own"
        )
    record = archive.record(parent)
    old_tracks = {
        (track.cache, track.stream): track
        for track in (ArchivedTrack(archive, part, record) for part in record.tracks)
    }
    n_cells = sum(len(track.cells) for track in old_tracks.values())
    plans = [_plan_one(archive, old_tracks, track, snapshot, coder) for track in snapshot.tracks]
    # Where the file has nothing yet, nothing can be in common.
    if n_cells and not n_common and all(plan.n_new == len(plan.block) for plan in plans):
        raise MismatchError(
            f"{archive.path}: the save has no tokens and no frame in common with the file; "
            "pack it into a file of its own"
        )
    return _Planned(parent, n_cells, plans, n_common)


def _choose_parent(archive: Archive, ids: NDArray[np.int32]) -> tuple[int | None, int]:
    """The snapshot with the most leading tokens in common, the newest of equals, and how many."""
    best: tuple[int | None, int] = (None, -1)
    for number in range(len(archive)):
        n_common = common_prefix(archive.tokens(number), ids)
        if n_common >= best[1]:
            best = (number, n_common)
    return best[0], max(best[1], 0)


def _plan_one(
    archive: Archive,
    old_tracks: dict[tuple[int, int], ArchivedTrack],
    track: Track,
    snapshot: Snapshot,
    coder: LossyCoder | ExactCoder | None,
) -> temporal.TrackPlan:
    old = old_tracks.get((track.cache, track.stream))
    if old is None or [_layout(t) for t in old.tensors] != [_layout(t) for t in track.tensors]:
        if old is not None and len(track.cells):
            raise MismatchError(
                f"{archive.path}: the save's layers or element types are not those of the file; "
                "pack it into a file of its own"
            )
        return temporal.store_all(len(track.cells))

    def same(start: int, stop: int, run: FrameRun) -> NDArray[np.bool_]:
        block = archive.block(run)
        if is_exact(block):
            if needs_book(block) and (coder is None or coder.facts.get("book") != old.codec().id):
                # What the snapshot names must decode all its frames.
                return np.zeros(stop - start, bool)
            return _same_rows(archive, old, track, start, stop, run)
        if coder is None or isinstance(coder, ExactCoder):
            # A lossless save takes nothing from a lossy one.
            return np.zeros(stop - start, bool)
        return coder.near(old, snapshot, track, start, stop, run, archive)

    return temporal.plan_track(old.cells, old.runs, track.cells, same)


def _layout(tensor: object) -> tuple[object, ...]:
    keys = ("layer", "role", "dtype", "row_bytes", "rotation")
    return tuple(getattr(tensor, key) for key in keys)


def _same_rows(
    archive: Archive, old: ArchivedTrack, track: Track, start: int, stop: int, run: FrameRun
) -> NDArray[np.bool_]:
    """Which frames ``start`` to ``stop`` of ``track`` are those of ``run``, row by row."""
    block = archive.block(run)
    new_rows = track.read(start, stop)
    if run.count == block.n_frames and blocks.content_id(new_rows) == block.content_id:
        # The usual case, settled without decoding.
        return np.ones(run.count, bool)
    equal = np.ones(run.count, bool)
    for chunk in block.chunks:
        for i, rows in enumerate(old.exact_rows(run.block, chunk), chunk.first_tensor):
            part = rows[run.first : run.first + run.count]
            equal &= (part == new_rows[i]).all(axis=1)
    return equal


# --- storing ----------------------------------------------------------------------------------


def _store(
    writer: ContainerWriter,
    snapshot: Snapshot,
    planned: _Planned,
    tier: Tier,
    coder: LossyCoder | ExactCoder | None,
    name: str,
    archive: Archive | None,
    progress: Progress | None,
) -> int:
    """Add the missing blocks and the snapshot record; returns the snapshot's number."""
    parent, before, structure = None, np.zeros(0, np.int32), b""
    if archive and planned.parent is not None:
        parent, structure = archive.record(planned.parent), archive.structure(planned.parent)
        if coder is not None or not parent.coding:
            # An exact snapshot must not need the book that its parent's tokens are coded with.
            before = archive.tokens(planned.parent)
    for track, plan in zip(snapshot.tracks, planned.tracks, strict=True):
        _store_frames(writer, snapshot, track, plan, tier, coder, progress)
    record = SnapshotRecord(
        number=writer.n_snapshots,
        parent=planned.parent,
        plan=planned.name,
        tier=tier.name,
        name=name,
        source=snapshot.source,
        identity=snapshot.identity.facts,
        coding=coder.facts if coder else {},
        ids=tokens.encode(snapshot.tokens, before, coder.token_coder if coder else None),
        tracks=[
            TrackRecord(
                track.cache, track.stream, track.attributes, tuple(track.tensors), plan.runs(),
                track.cells,
            )
            for track, plan in zip(snapshot.tracks, planned.tracks, strict=True)
        ],
        opaque=[
            _store_opaque(writer, key, content, parent) for key, content in snapshot.opaque.items()
        ],
    )  # fmt: skip
    ids = np.ascontiguousarray(snapshot.tokens, np.int32)
    return writer.add_snapshot(record.write(ids, structure))


def _store_frames(
    writer: ContainerWriter,
    snapshot: Snapshot,
    track: Track,
    plan: temporal.TrackPlan,
    tier: Tier,
    coder: LossyCoder | ExactCoder | None,
    progress: Progress | None,
) -> None:
    encode_whole = coder.begin(snapshot, track) if isinstance(coder, ExactCoder) else None
    lossy_coder = None if isinstance(coder, ExactCoder) else coder
    one_chunk = encode_whole is not None or lossy_coder is not None
    n_frames = blocks.block_frames(track.tensors, lossy=one_chunk)
    frame_bytes = sum(tensor.row_bytes for tensor in track.tensors)
    if encode_whole is not None:
        # What is coded takes some ten times a block's size before it is coded.
        n_frames = max(1, min(n_frames, blocks.MOST_CHUNK_BYTES // frame_bytes))
    ranges = [part for span in plan.new_ranges() for part in blocks.block_ranges(*span, n_frames)]
    ids = blocks.logical_ids(
        track.cells, snapshot.tokens, logical_seed(snapshot.identity.facts, track), ranges
    )
    chunk_ranges = blocks.chunk_ranges(track.tensors)

    def encode_exact(span: tuple[int, int]) -> tuple[bytes, list[EncodedChunk]]:
        rows = track.read(*span)
        chunks = [
            pipeline.encode_chunk(rows[a:b], track.tensors[a].dtype, a, tier.codec)
            for a, b in chunk_ranges
        ]
        if encode_whole is not None:
            whole = encode_whole(span, rows)
            if len(whole.body) < sum(len(chunk.body) for chunk in chunks):
                chunks = [whole]
        return blocks.content_id(rows), chunks

    encode_frames = lossy_coder.begin(writer, snapshot, track, ranges) if lossy_coder else None

    def encode_lossy(span: tuple[int, int]) -> tuple[bytes, list[EncodedChunk]]:
        assert encode_frames is not None
        chunk = encode_frames(span)
        return blocks.opaque_id(chunk.header.write() + chunk.body), [chunk]

    encode = encode_exact if encode_frames is None else encode_lossy
    encoded = workers.in_order(encode, ranges)
    for (start, stop), logical, (content, chunks) in zip(ranges, ids, encoded, strict=True):
        plan.store(start, stop, writer.add_block(stop - start, content, logical, chunks))
        if progress:
            progress((stop - start) * frame_bytes)


def _store_opaque(
    writer: ContainerWriter, name: str, content: bytes, parent: SnapshotRecord | None
) -> OpaqueEntry:
    """Bytes that the parent has too are not stored again."""
    content_id = blocks.opaque_id(content)
    for entry in parent.opaque if parent else ():
        if (entry.content_id, entry.raw_length) == (content_id, len(content)):
            return OpaqueEntry(name, entry.ref, entry.raw_length, content_id)
    body = zstd.compress(content)
    if len(content) > _MOST_DENSE and len(content) > 2 * len(body):
        # Readers do not unpack a large part from a small record.
        body = zstd.store(content)
    ref = writer.add_opaque(body)
    return OpaqueEntry(name, ref, len(content), content_id)


def _report(
    number: int, tier: Tier, snapshot: Snapshot, planned: _Planned, size: int, added: int
) -> PackReport:
    n_cells = sum(len(track.cells) for track in snapshot.tracks)
    return PackReport(
        snapshot=number,
        tier=tier.name,
        plan=planned.name,
        parent=planned.parent,
        n_tokens=len(snapshot.tokens),
        n_tokens_common=planned.n_tokens_common,
        n_frames_kept=n_cells - planned.n_new,
        n_frames_new=planned.n_new,
        n_frames_changed=sum(
            int((is_new & (track.cells.pos < planned.n_tokens_common)).sum())
            for track, is_new in zip(snapshot.tracks, planned.is_new, strict=True)
        ),
        raw_bytes=snapshot.raw_bytes,
        bytes_added=added,
        file_bytes=size,
    )


@contextmanager
def _locked(path: str | os.PathLike[str], wait: bool) -> Iterator[int]:
    """The archive opened for writing, held against every other appender.

    The lock is on the file itself: nothing is left beside it, and a killed process lets go of it.
    """
    where = os.fspath(path)
    if not stat.S_ISREG(os.stat(where).st_mode):
        raise UsageError(f"{where}: is not a regular file; an archive to append to is one")
    while True:
        fd = os.open(where, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The name may have been given to another file while this one was waited for.
            if os.path.samestat(os.fstat(fd), os.stat(where)):
                yield fd
                return
        except BlockingIOError:
            raise TscError(f"{where}: another process is appending; run it again later") from None
        finally:
            os.close(fd)
