"""What is measured: anything that turns a cache into bytes and back.

A peer is a class with the members of `Codec`. A tier of tscfile is a codec too: `TierCodec` packs
a real archive and counts every byte of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..tiers import tier_from_name
from .arrays import CacheShape, KVArrays

if TYPE_CHECKING:
    from ..model import Snapshot


class Codec(Protocol):
    """``name`` is unique; codecs of one ``family`` are one curve of the plot.

    ``source`` says where it is described. ``book_bytes``: what encoder and decoder share beyond
    the payload and beyond the program; it is reported beside the ratio, not in it.
    """

    name: str
    family: str
    source: str
    book_bytes: int

    def encode(self, cache: KVArrays) -> bytes:
        """Everything that `decode` needs, except what `CacheShape` says."""
        ...

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        """The cache again, as far as it was kept."""
        ...


class ByteTaker:
    """Cuts arrays off a byte string, in the order in which they were joined to it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, dtype: Any, *shape: int) -> NDArray[Any]:
        count = int(np.prod(shape, dtype=np.int64))
        part = np.frombuffer(self._data, dtype, count, self._at)
        self._at += part.nbytes
        return part.reshape(shape)


def join(parts: Sequence[NDArray[Any]]) -> bytes:
    """The bytes of arrays, one after another; `ByteTaker` takes them apart."""
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


# --- tiers of tscfile -------------------------------------------------------------------------


class TierCodec:
    """A tier: packed into an archive in a temporary folder, token ids and all structure counted.

    Times include writing and reading the file. ``book``: file with what the tier has learnt.
    """

    family = "tscfile"
    source = "this project"

    def __init__(
        self, tier: str | Sequence[str] | None, book: Path | None = None, name: str | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        """``name``: where it is not to be that of the tier. ``options``: of `tscfile.pack`, in
        place of a tier."""
        self.name = name or str(tier)
        if "product" in options:
            self.family = "product quantization"
        if book is None and not (isinstance(tier, str) and tier_from_name(tier).exact):
            self.family += ", no book"
        self._options: dict[str, Any] = {"tier": tier, **options}
        if book is not None:
            self._options["book"] = book
        from ..books.book import load

        opened = None if book is None else load(book)
        self.book_bytes = opened.n_bytes if opened else 0
        self.book_blake3 = opened.id if opened else None

    def encode(self, cache: KVArrays) -> bytes:
        from ..packing import pack

        with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
            path = Path(folder) / "cache.tsc"
            pack(snapshot_from_arrays(cache), path, **self._options)
            return path.read_bytes()

    def series_bytes(self, saves: Sequence[KVArrays]) -> int:
        """Size of what `encode_series` makes."""
        return len(self.encode_series(saves))

    def encode_series(self, saves: Sequence[KVArrays]) -> bytes:
        """One archive of growing saves of a conversation: the first packed, the others appended.
        `decode` gives the last of them."""
        from ..packing import append, pack

        with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
            path = Path(folder) / "series.tsc"
            pack(snapshot_from_arrays(saves[0]), path, **self._options)
            for save in saves[1:]:
                # As the save before it was packed.
                append(snapshot_from_arrays(save), path, book=self._options.get("book"))
            return path.read_bytes()

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        from ..archive import Archive
        from ..sources.hf_cache import to_cache

        with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
            path = Path(folder) / "cache.tsc"
            path.write_bytes(data)
            with Archive(path, book=self._options.get("book")) as archive:
                # How a kind of layer holds its keys is not in its declared type.
                layers: list[Any] = list(to_cache(archive).layers)
        keys = [layer.keys[0].numpy() for layer in layers]
        return KVArrays(shape, keys, [layer.values[0].numpy() for layer in layers])


def snapshot_from_arrays(cache: KVArrays) -> Snapshot:
    """The cache as the snapshot that `tscfile.sources.hf_cache.from_cache` makes of it."""
    import torch

    from ..sources.hf_cache import from_cache

    pairs = [
        tuple(torch.from_numpy(np.array(each))[None] for each in pair)
        for pair in zip(cache.keys, cache.values, strict=True)
    ]
    return from_cache(pairs, tokens=cache.shape.tokens, model=cache.shape.identity)
