"""Take a snapshot out of an archive and write it as its source, or another engine, wants it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from . import files
from .archive import Archive
from .errors import DamagedError, UsageError
from .model import ModelIdentity, Snapshot

Progress = Callable[[int], None]

STATE = "state"
"""The container of a llama.cpp state that keeps, or gets, its usual one."""


@dataclass(frozen=True)
class StateOptions:
    """How to write a llama.cpp state; None keeps what the source had.

    ``container``: "session", "sequence", "state-buffer" or "sequence-buffer", "state" for the
    usual one of these, or another format: "gguf", "safetensors", "npz"; ``llama_version``: the
    session number of the build that is to read it (9, 10, 11); ``v_trans``: values channel after
    channel; ``kv_type``: element type of keys and values; ``head_dim``: head size, needed to
    convert to or from quantized types and transformers' order where the archive does not know it.
    """

    container: str | None = None
    llama_version: int | None = None
    v_trans: bool | None = None
    kv_type: str | None = None
    head_dim: int | None = None


def unpack(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    snapshot: int | None = None,
    tier: str | None = None,
    book: str | os.PathLike[str] | None = None,
    options: StateOptions = StateOptions(),  # noqa: B008 - frozen
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write snapshot number ``snapshot`` (the last by default) to ``out``; returns its size.

    ``tier``: of a snapshot with quality layers the one to write, the finest by default. ``book``:
    the book of a lossy snapshot, where it is not beside the archive or in ``TSC_BOOKS``.

    Without options ``out`` has the identical bytes of the file that was packed. Raises
    `UsageError` if ``out`` exists and ``force`` is not given; `DamagedError` if what is asked for
    cannot be had whole, and also where no snapshot is named and the newest commit of the archive
    is torn, because the last whole snapshot may not be the one that is meant.

    >>> import tempfile, tscfile
    >>> folder = tempfile.mkdtemp()
    >>> report = tscfile.pack("samples/session.kv", folder + "/session.tsc")
    >>> size = tscfile.unpack(folder + "/session.tsc", folder + "/session.kv")
    >>> open(folder + "/session.kv", "rb").read() == open("samples/session.kv", "rb").read()
    True
    """
    with Archive(path, book=book) as archive:
        state = choose_snapshot(archive, snapshot, tier)
        return write_snapshot(state, out, options=options, force=force, progress=progress)


def choose_snapshot(archive: Archive, number: int | None, tier: str | None = None) -> Snapshot:
    """Snapshot ``number`` in ``tier``, see `Archive.snapshot`; without a number the last, unless a
    torn commit makes that doubtful."""
    if not len(archive):
        raise UsageError(f"{archive.path}: holds no snapshot")
    if number is None and archive.torn_bytes:
        last = len(archive) - 1
        raise DamagedError(
            f"{archive.path}: the last {archive.torn_bytes} bytes are no whole commit; "
            f"the newest whole snapshot is {last}: ask for it with --snapshot {last}"
        )
    return archive.snapshot(-1 if number is None else number, tier)


def write_snapshot(
    snapshot: Snapshot,
    out: str | os.PathLike[str],
    *,
    options: StateOptions = StateOptions(),  # noqa: B008 - frozen
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write ``snapshot`` as ``options`` want it; returns the size of the file. See `unpack`.

    Without a container a state of llama.cpp is written as what it was, and a transformers cache,
    which was no file, as safetensors.
    """
    from .sources import SUFFIXES, write_carrier
    from .sources.hf_layout import as_llama_state
    from .sources.llama_state import state_size, write_state
    from .sources.llama_state.facts import check_facts

    snapshot.need_frames()
    container = options.container or default_container(snapshot)
    if container in SUFFIXES:
        if options.llama_version is not None or options.v_trans is not None:
            raise UsageError(f"a {container} file has no llama.cpp version and no layout of values")
        snapshot = _with_head_size(_retyped(snapshot, options), options.head_dim)
        return write_carrier(snapshot, out, container, force=force, progress=progress)
    snapshot = as_llama_state(snapshot)
    if snapshot.source.get("format") == "llama.cpp":
        check_facts(snapshot)
    snapshot = _retyped(snapshot, options)
    layout = {
        "container": None if container == STATE else container,
        "llama_version": options.llama_version,
        "v_trans": options.v_trans,
    }
    size = state_size(snapshot, **layout)  # type: ignore[arg-type]
    with files.new_mapped_file(out, size, force=force) as view:
        write_state(snapshot, view, progress=progress, **layout)  # type: ignore[arg-type]
    return size


def suffix_of(snapshot: Snapshot, container: str | None) -> str:
    """What the name of a file ends in that `write_snapshot` makes of ``snapshot``."""
    from .sources import SUFFIXES

    return SUFFIXES.get(container or default_container(snapshot) or "", ".kv")


def default_container(snapshot: Snapshot) -> str | None:
    """What a snapshot that was no file is written as; None for a llama.cpp state."""
    from .sources.hf_layout import FORMAT

    return "safetensors" if snapshot.source.get("format") == FORMAT else None


def _retyped(snapshot: Snapshot, options: StateOptions) -> Snapshot:
    if options.kv_type is None:
        return snapshot
    from .retype import retype

    return retype(snapshot, options.kv_type, head_dim=options.head_dim)


def _with_head_size(snapshot: Snapshot, head_dim: int | None) -> Snapshot:
    if head_dim is None:
        return snapshot
    from .sources.hf_layout import with_identity

    facts = {"head_dim_k": head_dim, "head_dim_v": head_dim}
    return with_identity(snapshot, ModelIdentity(facts))
