"""From one cache file to another, without an archive between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .errors import MismatchError, UsageError
from .identity import compare
from .model import ModelIdentity, Snapshot
from .unpacking import STATE, StateOptions, write_snapshot

Progress = Callable[[int], None]

STATE_SUFFIXES = (".kv", ".bin", ".state", ".session")


def convert(
    source: str | os.PathLike[str] | Snapshot,
    out: str | os.PathLike[str],
    *,
    options: StateOptions = StateOptions(),  # noqa: B008 - frozen
    identity: ModelIdentity | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the cache in the file ``source`` as the kind that the name of ``out`` ends in.

    ``.gguf``, ``.safetensors`` and ``.npz`` are the carriers, ``.kv`` and ``.bin`` a llama.cpp
    state. ``identity``: facts of the model, which a llama.cpp state lacks. Returns the size of the
    file. Raises `UsageError` for another suffix, and what reading and writing raise.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> size = convert("samples/session.kv", folder + "/session.gguf")
    >>> size = convert(folder + "/session.gguf", folder + "/session.kv")
    >>> open(folder + "/session.kv", "rb").read() == open("samples/session.kv", "rb").read()
    True
    """
    from .sources import open_source

    container = container_of(out, options.container)
    snapshot = source if isinstance(source, Snapshot) else open_source(source)
    if identity is not None:
        snapshot = identified(snapshot, identity)
    wanted = replace(options, container=container)
    return write_snapshot(snapshot, out, options=wanted, force=force, progress=progress)


def container_of(out: str | os.PathLike[str], wanted: str | None = None) -> str:
    """What to write by the name of the file: a carrier, ``wanted``, or "state"."""
    from .sources import SUFFIXES

    suffix = Path(out).suffix.lower()
    carrier = {ending: name for name, ending in SUFFIXES.items()}.get(suffix)
    if carrier is not None:
        if wanted not in (None, carrier):
            raise UsageError(f"{out}: a {wanted} is not named {suffix}")
        return carrier
    if suffix == ".tsc":
        raise UsageError(f"{out}: an archive is made with pack")
    if suffix not in STATE_SUFFIXES:
        known = ", ".join((*SUFFIXES.values(), *STATE_SUFFIXES))
        raise UsageError(f"{out}: the name does not say what to write; end it in one of {known}")
    return wanted or STATE


def identified(snapshot: Snapshot, identity: ModelIdentity) -> Snapshot:
    """The snapshot with the facts of its model; `MismatchError` if it is another one's."""
    from .sources import identity_for
    from .sources.hf_layout import with_identity

    known = identity_for(snapshot, identity)
    assert known is not None
    differences = compare(snapshot.identity, known)
    if differences:
        raise MismatchError(f"the model is another one: {'; '.join(differences)}")
    return with_identity(snapshot, known)
