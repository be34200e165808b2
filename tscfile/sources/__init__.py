"""Foreign files to `Snapshot` and back. Only this package knows other projects' formats."""

from __future__ import annotations

import os

from ..model import Snapshot


def open_source(path: str | os.PathLike[str]) -> Snapshot:
    """Open a foreign cache file of any kind that is supported (now: llama.cpp states).

    Raises the errors of `tscfile.sources.llama_state.open_state`.
    """
    from .llama_state import open_state

    return open_state(path)
