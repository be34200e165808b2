"""Foreign files to `Snapshot` and back. Only this package knows other projects' formats."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from ..errors import UsageError
from ..model import ModelIdentity, Snapshot

SUFFIXES = {"gguf": ".gguf", "safetensors": ".safetensors", "npz": ".npz"}
"""Carriers by name, and the names their files end in."""

_ARCHIVE = b"\x89TSC"
_BOOK = b"\x89TSCBOOK"


def open_source(path: str | os.PathLike[str]) -> Snapshot:
    """Open a cache file of any kind: a llama.cpp state, a GGUF, safetensors or npz carrier.

    Its first bytes say which. Raises the errors of the kind's reader, `UsageError` for
    an archive.
    """
    from . import gguf_cache, npz_cache, safetensors_cache
    from .llama_state import open_state

    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise UsageError(f"{path}: is a pipe, which cannot be mapped; give it as standard input, -")
    with open(path, "rb") as file:
        head, size = file.read(16), os.fstat(file.fileno()).st_size
    if head.startswith(_BOOK):
        raise UsageError(f"{path}: is a book and holds no state; give it with --book")
    if head.startswith(_ARCHIVE):
        raise UsageError(f"{path}: is an archive already; take a snapshot out with unpack")
    if head.startswith(gguf_cache.MAGIC):
        return gguf_cache.open_gguf(path)
    if head.startswith(npz_cache.MAGIC):
        return npz_cache.open_npz(path)
    if safetensors_cache.is_safetensors(head, size):
        return safetensors_cache.open_safetensors(path)
    return open_state(path)


def write_carrier(
    snapshot: Snapshot,
    out: str | os.PathLike[str],
    name: str,
    *,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write ``snapshot`` as the carrier ``name`` (a key of `SUFFIXES`); returns the file's size."""
    from . import gguf_cache, npz_cache, safetensors_cache

    write = {
        "gguf": gguf_cache.write_gguf,
        "safetensors": safetensors_cache.write_safetensors,
        "npz": npz_cache.write_npz,
    }[name]
    return write(snapshot, out, force=force, progress=progress)


def identity_for(snapshot: Snapshot, identity: ModelIdentity | None) -> ModelIdentity | None:
    """The identity of a GGUF file as it holds for the rows of ``snapshot``.

    Rows of a transformers cache may pair other channels than the model's GGUF file does.
    """
    from .hf_layout import FORMAT, in_transformers

    if identity is None or snapshot.source.get("format") != FORMAT:
        return identity
    return in_transformers(identity)
