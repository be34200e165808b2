"""Put snapshots into archives: `pack` makes a new file, `append` adds to one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import files
from .archive import Archive
from .coding import Coding, choose
from .container.writer import ContainerWriter
from .errors import MismatchError, UsageError
from .identity import compare, is_fact
from .locking import locked
from .lossy_coding import Target
from .model import ModelIdentity, Snapshot
from .planning import Planned, choose_parent, plan, store_all
from .product_coding import ProductOptions
from .sources import open_source
from .storing import store
from .tiers import DEFAULT_BOOK_TIER, DEFAULT_TIER, tiers_from_names

Source = str | os.PathLike[str] | Snapshot
Progress = Callable[[int], None]


@dataclass(frozen=True)
class PackReport:
    """What was stored and what it cost.

    ``n_frames_changed`` counts new frames of tokens that the parent has too: the source computed
    them again with other rows. ``n_frames_moved``: of all frames those that the parent has at other
    positions; they are kept, or in a lossless tier stored as differences to those.
    ``bytes_added`` and ``file_bytes`` are sizes in the archive, ``raw_bytes`` the rows of the
    snapshot at their source types.
    ``n_frames_exact``, ``exact_bytes``: new frames that product quantization kept as they are, and
    their bytes; None where it was given no threshold.
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
    n_frames_moved: int
    raw_bytes: int
    bytes_added: int
    file_bytes: int
    n_frames_exact: int | None = None
    exact_bytes: int | None = None


def pack(
    source: Source,
    path: str | os.PathLike[str],
    *,
    tier: str | Sequence[str] | None = None,
    book: str | os.PathLike[str] | None = None,
    embed_book: bool = False,
    target_kl: float | None = None,
    target_ratio: float | None = None,
    product: ProductOptions | None = None,
    identity: ModelIdentity | None = None,
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Make the archive ``path`` of one snapshot.

    ``source``: a cache file or a `Snapshot`. ``tier``: `tscfile.tiers.TIERS`; "balanced" by
    default where a ``book`` is given, else "lossless". Several, the coarsest first, are stored as
    quality layers, each as what the one below lacks. Without a book a lossy tier learns from the
    snapshot itself; "tokens" stores no frames and needs the fingerprint of the weights.
    ``embed_book``: put the book into the archive, which then needs no other file.
    ``target_kl`` (nats), ``target_ratio``: in place of a tier, the step that the book expects to
    have this KL, or the finest that makes the archive so small. ``product``: in place of a tier,
    product quantization. ``identity``: what is known of the
    model (`tscfile.identity.identity_from_gguf`). ``progress`` is called with the raw bytes done.
    Raises `UsageError` if ``path`` exists and ``force`` is not given, the source's errors, and
    `OSError`; whatever is raised, ``path`` is as it was.

    >>> import tempfile, tscfile
    >>> path = tempfile.mkdtemp() + "/session.tsc"
    >>> report = tscfile.pack("samples/session.kv", path)
    >>> report.plan, report.n_tokens, report.n_frames_new
    ('keyframe', 400, 400)
    """
    target = Target(target_kl, target_ratio, product)
    default = DEFAULT_BOOK_TIER if book else DEFAULT_TIER
    chosen = target.tiers(tier) or tiers_from_names(default)
    snapshot, label = _open(source, name)
    identify(snapshot, identity)
    coding = choose(chosen, book, snapshot, target)
    with files.new_file(path, force=force) as fd:
        writer = ContainerWriter(fd)
        planned = store_all(snapshot)
        if coding.facts() and book is not None and embed_book:
            writer.add_book(Path(book).read_bytes())
        number = store(writer, snapshot, planned, coding, label, None, progress)
        size = writer.commit()
    return _report(number, coding, snapshot, planned, size, size)


def append(
    source: Source,
    path: str | os.PathLike[str],
    *,
    tier: str | Sequence[str] | None = None,
    book: str | os.PathLike[str] | None = None,
    identity: ModelIdentity | None = None,
    name: str | None = None,
    wait: bool = True,
    same_conversation: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Add a later save of the same conversation to the archive ``path``.

    Only frames that are not in the file yet are stored; a lossless save takes nothing from lossy
    blocks, and only one of tier "tokens" goes without frames that the file does not have. ``tier``
    is that of the parent by default, ``book`` where a lossy tier's book is.
    ``same_conversation``: the save is of the file's, even where no token or frame tells. The new
    commit goes behind what is there; if anything is raised the file is cut back to it.

    Raises `MismatchError` for a save of another conversation or another model, `TscError` if
    ``wait`` is False and another process is appending.
    """
    snapshot, label = _open(source, name)
    with locked(path, wait) as fd, Archive(path, book=book) as archive:
        parent, n_common = choose_parent(archive, snapshot.tokens)
        old = archive.record(parent) if parent is not None else None
        identify(snapshot, identity, ModelIdentity(dict(old.identity) if old else {}))
        chosen = tiers_from_names(tier or (old.layers if old else DEFAULT_TIER))
        coding = choose(chosen, book, snapshot, Target(), archive, old)
        planned = plan(archive, snapshot, parent, n_common, coding, same_conversation)
        before = archive.container.whole_end
        try:
            writer = ContainerWriter(fd, archive.container)
            number = store(writer, snapshot, planned, coding, label, archive, progress)
            size = writer.commit()
        except BaseException as error:
            # Where that fails too, what is left is torn; the first error is the one to be told.
            with suppress(OSError):
                os.ftruncate(fd, before)
            if isinstance(error, OSError):
                files.name_file(error, path)
            raise
    return _report(number, coding, snapshot, planned, size, size - before)


def _open(source: Source, name: str | None) -> tuple[Snapshot, str]:
    snapshot = source if isinstance(source, Snapshot) else open_source(source)
    snapshot.need_frames()
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
    for key, value in known.facts.items():
        if not is_fact(key, value):
            raise UsageError(f"the model's fact {key} cannot be {str(value)[:40]!r}")
    snapshot.identity = known


def _report(
    number: int, coding: Coding, snapshot: Snapshot, planned: Planned, size: int, added: int
) -> PackReport:
    facts = coding.facts()
    n_cells = sum(len(track.cells) for track in snapshot.tracks)
    return PackReport(
        snapshot=number,
        tier=",".join(coding.names),
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
        n_frames_moved=planned.n_moved,
        raw_bytes=snapshot.raw_bytes,
        bytes_added=added,
        file_bytes=size,
        n_frames_exact=facts.get("fallback_frames"),
        exact_bytes=facts.get("fallback_bytes"),
    )
