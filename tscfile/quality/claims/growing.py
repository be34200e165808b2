"""Growing snapshots: what a run of saves costs under the accountings that fit the TSC reports.

The cache is saved after every token from length ``first`` on. Every ``every``-th save is stored
whole, the others as the one row that they add. The reports divide by the bytes of all saves
together, in fp32. Of one cache, the last, nothing is saved: its whole save and the rows since then
are needed to have it back.

    record: 1 byte, 0 whole or 1 row; the frames of the save, or of its last row
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .. import arrays, pages
from ..arrays import CacheShape, KVArrays
from ..codec import ByteTaker, join
from ..peers import packing
from ..peers.per_array import PerArrayCodec

ROW_BITS = 4

GROW = "all saves in fp32"
GROW_8 = "all saves in fp32, every 8th whole"
AT_WHOLE = "all saves in fp32, quality of a whole one"
APPEND = "15 saves in fp32"
DROP = "differences left out"

_RUN = (
    "a save after each token; every 64th is stored whole, of the others only the new row; the "
    "fp32 bytes of all saves together over what is stored"
)
WAYS = {
    GROW: _RUN,
    GROW_8: _RUN.replace("64th", "8th"),
    AT_WHOLE: f"the same as *{GROW}*, but the quality is taken at a save that is stored whole, "
    "where nothing is lost yet",
    APPEND: "15 saves as far apart as one another; the fp32 bytes of all of them over each row "
    "stored once",
    DROP: "keyframes in fp32 and nothing else, against one fp32 cache",
}
"""What the accountings mean."""


@dataclass(frozen=True)
class Run:
    """Saves of lengths ``first`` to ``last``.

    >>> run = Run(64, 1024, 64)
    >>> run.sum_of_lengths, len(run.whole), run.n_rows
    (522784, 16, 945)
    """

    first: int
    last: int
    every: int

    @property
    def lengths(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def whole(self) -> range:
        """Lengths of the saves that are stored whole."""
        return range(self.first, self.last + 1, self.every)

    @property
    def sum_of_lengths(self) -> int:
        return sum(self.lengths)

    @property
    def n_rows(self) -> int:
        return len(self.lengths) - len(self.whole)


@dataclass(frozen=True)
class RunSize:
    """Bytes up to a save of ``length``: of all saves in fp32, and of all records; of this one save
    in fp16, and of the records needed to have it back."""

    length: int
    all_fp32: int
    stored: int
    one_fp16: int
    needed: int

    @property
    def ratio(self) -> float:
        """As the reports count: all saves in fp32 over the records."""
        return self.all_fp32 / self.stored

    @property
    def one_cache_ratio(self) -> float:
        """One fp16 cache over what has to be read for it."""
        return self.one_fp16 / self.needed


class Fp32(PerArrayCodec):
    """Whole saves in fp32."""

    name = family = "fp32"
    source = "TSC reports, part II: keyframes are fp32"

    def __init__(self) -> None:
        super().__init__({"k": 32, "v": 32})

    def quantize(self, x: NDArray[np.float32], bits: int) -> list[NDArray[np.generic]]:
        return [x]

    def take(self, taker: ByteTaker, role: str, *shape: int) -> NDArray[np.float16]:
        return taker.take("<f4", *shape).astype(np.float16)


class FourBitRows(PerArrayCodec):
    """Rows in pages of 4 bits (`tscfile.quality.pages`), the last ``age`` of a cache; those before
    them in fp32. Without ``age`` all rows."""

    family = "growing snapshots"
    source = "TSC reports, part I (prefer_append_for_growing)"

    def __init__(self, age: int | None = None) -> None:
        super().__init__({"k": ROW_BITS, "v": ROW_BITS})
        self.name = "rows-4bit" if age is None else f"grown-by-{age}"
        self._age = age

    def _n_exact(self, n: int) -> int:
        return 0 if self._age is None else max(n - self._age, 0)

    def quantize(self, x: NDArray[np.float32], bits: int) -> list[NDArray[np.generic]]:
        frames = arrays.rows(x)
        exact = self._n_exact(len(frames))
        size = pages.page_size(frames.shape[1])
        scales, codes = pages.quantize(frames[exact:].reshape(-1, size), bits)
        return [frames[:exact], scales, packing.pack(codes, bits)]

    def take(self, taker: ByteTaker, role: str, *shape: int) -> NDArray[np.float16]:
        n_heads, n, dim = shape
        width, exact, bits = n_heads * dim, self._n_exact(n), self.bits[role]
        size = pages.page_size(width)
        whole = taker.take("<f4", exact, width)
        n_pages = (n - exact) * width // size
        scales = taker.take("<f2", n_pages)
        codes = packing.take(taker, bits, n_pages, size)
        rows = pages.dequantize(scales, codes, bits).reshape(-1, width)
        return arrays.heads(np.concatenate([whole, rows]), n_heads).astype(np.float16)


Coder = Callable[[KVArrays], bytes]


def records(cache: KVArrays, run: Run, whole: Coder, row: Coder) -> Iterator[tuple[int, bytes]]:
    """Length of each save and its record."""
    for length in run.lengths:
        save = cache.head(length)
        if length in run.whole:
            yield length, b"\0" + whole(save)
        else:
            yield length, b"\1" + row(frames(save, length - 1, length))


def restore(
    found: Iterator[tuple[int, bytes]], shape: CacheShape,
    whole: Callable[[bytes, CacheShape], KVArrays], row: Callable[[bytes, CacheShape], KVArrays],
) -> KVArrays:  # fmt: skip
    """The last save of the records, which are those of `records`."""
    parts: list[KVArrays] = []
    for length, record in found:
        tokens = shape.tokens
        if record[0] == 0:
            parts = [whole(record[1:], replace(shape, tokens=tokens[:length]))]
        else:
            parts.append(row(record[1:], replace(shape, tokens=tokens[length - 1 : length])))
    keys, values = (
        [np.concatenate(layer, axis=1) for layer in zip(*role, strict=True)]
        for role in ([p.keys for p in parts], [p.values for p in parts])
    )
    return KVArrays(replace(shape, tokens=shape.tokens[: keys[0].shape[1]]), keys, values)


def sizes(cache: KVArrays, run: Run, whole: Coder, row: Coder) -> dict[int, RunSize]:
    """Sizes up to every save, by its length."""
    per_frame = cache.shape.n_values // cache.shape.n_tokens
    found: dict[int, RunSize] = {}
    all_fp32 = stored = needed = 0
    for length, record in records(cache, run, whole, row):
        all_fp32 += 4 * per_frame * length
        stored += len(record)
        needed = len(record) + (needed if record[0] else 0)
        found[length] = RunSize(length, all_fp32, stored, 2 * per_frame * length, needed)
    return found


def frames(cache: KVArrays, start: int, stop: int) -> KVArrays:
    """Frames ``start`` to ``stop`` of a cache, as a cache of their own."""
    part = slice(start, stop)
    return KVArrays(
        replace(cache.shape, tokens=cache.shape.tokens[part]),
        [k[:, part] for k in cache.keys], [v[:, part] for v in cache.values],
    )  # fmt: skip


class KeyframesOnly:
    """Every ``every``-th frame in fp32 and nothing of the others, which attention does not see."""

    family = "keyframes only"
    source = "TSC reports, part I, with the differences left out"
    book_bytes = 0

    def __init__(self, every: int) -> None:
        self.name, self._every = f"keyframes-only-{every}", every

    def encode(self, cache: KVArrays) -> bytes:
        roles = [each for _, role in cache.roles() for each in role]
        return join([each[:, :: self._every].astype("<f4") for each in roles])

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        taker, kept = ByteTaker(data), np.arange(shape.n_tokens) % self._every == 0

        def take(role: str, layer: int, n_heads: int, dim: int) -> NDArray[np.float16]:
            whole = np.zeros((n_heads, shape.n_tokens, dim), np.float16)
            whole[:, kept] = taker.take("<f4", n_heads, int(kept.sum()), dim)
            return whole

        return arrays.from_layers(shape, take, [kept] * len(shape.layers))
