"""tscfile: archive format and codec for what a language model remembers.

>>> import tempfile, tscfile
>>> path = tempfile.mkdtemp() + "/session.tsc"
>>> report = tscfile.pack("samples/session.kv", path)
>>> with tscfile.open(path) as archive:
...     keys, values = archive.read(layers=[0], frames=(0, 4))
>>> keys.tensor.role, keys.values.shape, str(keys.values.dtype)
('k', (4, 128), 'float16')
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .errors import (
    DamagedError,
    MismatchError,
    TruncatedError,
    TscError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from .archive import Archive, Frames
    from .compaction import CompactReport, compact
    from .demotion import DemoteReport, demote
    from .packing import PackReport, append, pack
    from .product_coding import ProductOptions
    from .sources.hf_cache import from_cache, to_cache
    from .unpacking import StateOptions, unpack
    from .verification import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "Archive",
    "CompactReport",
    "DamagedError",
    "DemoteReport",
    "Frames",
    "MismatchError",
    "PackReport",
    "ProductOptions",
    "StateOptions",
    "TruncatedError",
    "TscError",
    "UnsupportedError",
    "UsageError",
    "VerifyReport",
    "append",
    "compact",
    "demote",
    "from_cache",
    "open",
    "pack",
    "to_cache",
    "unpack",
    "verify",
]

_HOMES = {
    "Archive": "archive",
    "CompactReport": "compaction",
    "DemoteReport": "demotion",
    "Frames": "archive",
    "PackReport": "packing",
    "ProductOptions": "product_coding",
    "StateOptions": "unpacking",
    "VerifyReport": "verification",
    "append": "packing",
    "compact": "compaction",
    "demote": "demotion",
    "from_cache": "sources.hf_cache",
    "pack": "packing",
    "to_cache": "sources.hf_cache",
    "unpack": "unpacking",
    "verify": "verification",
}


def open(
    path: str | os.PathLike[str], *, book: str | os.PathLike[str] | None = None
) -> Archive:
    """Open an archive for reading; see `tscfile.archive.Archive`.

    Raises `DamagedError` or `UnsupportedError` if it is no archive this build can read.
    """
    from .archive import Archive

    return Archive(path, book=book)


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that `import tscfile` stays quick.
    if name not in _HOMES:
        raise AttributeError(f"module 'tscfile' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
