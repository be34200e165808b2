"""A book: basis, predictor, distributions and measured tiers of one model, named by its BLAKE3.

A frame is taken as one vector ``x`` of all channels: keys before RoPE and values, tensor after
tensor. The book holds

- ``mean`` and a predictor: what the frame's token and the tokens before it say of ``x``, linear in
  a table of token vectors;
- the basis: ``x = mean + prediction + sum of coefficient * basis row``. Rows are the eigenvectors
  of the prediction's residual, measured by what the model's output feels (``metric``);
- the scale of each coefficient, and frequency tables for coefficients of every scale;
- tiers: the quantizer step that meets each one's quality, and what was measured.

Large tables are stored as 8-bit integers with one scale a row or column; the encoder works with
what is stored, so that this costs rate and not drift. ``spec/book.md`` gives the bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from tscfile_kernels.ops import PROBABILITY_BITS

from ..bytestream import ByteReader, ByteWriter
from ..container.records import read_metadata, write_metadata
from ..entropy import ladder, zstd
from ..errors import DamagedError, TscError, UnsupportedError, UsageError
from ..transforms.rope import HALVES, Rope

MAGIC = b"\x89TSCBOOK\r\n\x1a\n"
VERSION = 1
HASH_BYTES = 32
SUFFIX = ".tscbook"

_DTYPES = {"f4": "<f4", "i1": "<i1", "i2": "<i2", "u2": "<u2", "i4": "<i4", "f2": "<f2"}
_MAX_ELEMENTS = 1 << 31
_MAX_HISTORY = 64
_MAX_LOG_STEP = 1 << 14


@dataclass(frozen=True)
class TierEntry:
    """A tier and what was measured of it, on text that the book did not learn from: ``log_step`` in
    1/256 octaves, mean KL in nats, and the ratio of whole archives."""

    name: str
    log_step: int
    kl: float
    ratio: float


@dataclass
class Book:
    """Arrays of a book; C channels, R coefficients, V tokens, D numbers a token vector, H tokens
    of history, K distribution classes, S symbols.

    ``mean`` f32 [C] · ``token_vectors`` i8 [V, D] with ``token_scales`` f32 [V] ·
    ``predictor`` i8 [H*D, C] with ``predictor_scales`` f32 [C] · ``basis`` i8 [R, C] with
    ``basis_scales`` f32 [R] · ``metric`` f2 [n_blocks, c, c], block-diagonal, tensor after tensor ·
    ``log_sigmas`` i2 [R], 1/256 octaves · ``frequencies`` u2 [K, S] · ``inv_freq`` f4, half the
    rotated channels of a head. Arrays of other names are ignored.
    """

    facts: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    tiers: dict[str, TierEntry] = field(default_factory=dict)

    def __getattr__(self, name: str) -> NDArray[Any]:
        arrays: dict[str, NDArray[Any]] = self.__dict__.get("arrays", {})
        if name in arrays:
            return arrays[name]
        raise AttributeError(name)

    @property
    def n_channels(self) -> int:
        return len(self.arrays["mean"])

    @property
    def n_coefficients(self) -> int:
        return len(self.arrays["basis"])

    @property
    def history(self) -> int:
        return int(self.facts["book.history"])

    @cached_property
    def rope(self) -> Rope:
        return Rope(
            self.arrays["inv_freq"], str(self.facts["book.rope_pairing"]),
            float(self.facts["book.rope_scale"]),
        )  # fmt: skip

    @cached_property
    def synthesis(self) -> NDArray[np.float32]:
        """Float32 ``[R, C]``: basis rows as the decoder uses them."""
        basis = self.arrays["basis"].astype(np.float32)
        return basis * self.arrays["basis_scales"][:, None]

    @cached_property
    def analysis(self) -> NDArray[np.float32]:
        """Float32 ``[C, R]``: the coefficients whose synthesis is nearest in the metric."""
        metric = self.arrays["metric"].astype(np.float32)
        size = metric.shape[1]
        weighted = self.synthesis.reshape(-1, len(metric), size)
        weighted = np.einsum("rbi,bij->rbj", weighted, metric, optimize=True)
        weighted = weighted.reshape(len(self.synthesis), -1)
        # The stored rows are not quite orthonormal in the metric: solve for them jointly.
        gram = (weighted @ self.synthesis.T).astype(np.float64)
        return np.linalg.solve(gram, weighted.astype(np.float64)).T.astype(np.float32)

    @cached_property
    def _vectors(self) -> NDArray[np.float32]:
        vectors = self.arrays["token_vectors"].astype(np.float32)
        return vectors * self.arrays["token_scales"][:, None]

    @cached_property
    def _predictor(self) -> NDArray[np.float32]:
        return self.arrays["predictor"].astype(np.float32) * self.arrays["predictor_scales"]

    def predict(self, history: NDArray[np.int32]) -> NDArray[np.float32]:
        """Mean and prediction, float32 ``[n, C]``.

        ``history``: int32 ``[n, H]``, the token of each frame, then those before it; -1 for none.
        """
        predicted = np.repeat(self.arrays["mean"][None], len(history), axis=0)
        width = self._vectors.shape[1]
        for k, tokens in enumerate(history.T):
            # Text repeats its tokens: each one's share is computed once.
            each, which = np.unique(tokens, return_inverse=True)
            known = (each >= 0) & (each < len(self._vectors))
            vectors = self._vectors[np.where(known, each, 0)] * known[:, None]
            predicted += (vectors @ self._predictor[k * width : (k + 1) * width])[which]
        return predicted

    # --- bytes --------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        body = ByteWriter().uvarint(VERSION)
        write_metadata(body, self.facts)
        body.uvarint(len(self.tiers))
        for tier in self.tiers.values():
            body.string(tier.name).pack("idd", tier.log_step, tier.kl, tier.ratio)
        body.uvarint(len(self.arrays))
        for name, array in self.arrays.items():
            code = f"{array.dtype.kind}{array.dtype.itemsize}"
            body.string(name).string(code).uvarint(array.ndim)
            for size in array.shape:
                body.uvarint(size)
            packed = zstd.compress(np.ascontiguousarray(array, _DTYPES[code]).tobytes())
            body.uvarint(len(packed)).raw(packed)
        data = MAGIC + body.bytes()
        return data + blake3(data).digest()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Book:
        """`DamagedError` for anything but a whole book."""
        if data[: len(MAGIC)] != MAGIC:
            raise DamagedError(f"{where}: not a tscfile book: the first bytes are not its magic")
        whole = len(data) >= len(MAGIC) + HASH_BYTES
        if not whole or blake3(data[:-HASH_BYTES]).digest() != book_id(data):
            raise DamagedError(f"{where}: the book's hash is wrong; it is damaged or cut short")
        reader = ByteReader(memoryview(data)[len(MAGIC) : -HASH_BYTES], where)
        version = reader.uvarint()
        if version != VERSION:
            raise UnsupportedError(f"{where}: book version {version}; this build reads {VERSION}")
        facts = read_metadata(reader)
        tiers = {}
        for _ in range(reader.count(21)):
            name = reader.string()
            tiers[name] = TierEntry(name, *reader.unpack("idd"))
        arrays = {}
        for _ in range(reader.count(4)):
            name, array = _read_array(reader)
            arrays[name] = array
        reader.end()
        _check(facts, arrays, tiers, where)
        return cls(facts, arrays, tiers)


_SHAPES = {
    "mean": ("f4", "C"), "token_vectors": ("i1", "VD"), "token_scales": ("f4", "V"),
    "predictor": ("i1", "PC"), "predictor_scales": ("f4", "C"), "basis": ("i1", "RC"),
    "basis_scales": ("f4", "R"), "metric": ("f2", "Ncc"), "log_sigmas": ("i2", "R"),
    "frequencies": ("u2", "KS"), "inv_freq": ("f4", "r"),
}  # fmt: skip
_FACTS = {
    "book.history": int, "book.head_dim": int, "book.rope_scale": float, "book.rope_pairing": str
}  # fmt: skip


def _check(
    facts: dict[str, Any], arrays: dict[str, NDArray[Any]], tiers: dict[str, TierEntry], where: str
) -> None:
    """`DamagedError` unless everything a decoder uses is there and fits together."""
    sizes = {"K": ladder.N_CLASSES, "S": ladder.N_SYMBOLS}
    for name, (code, axes) in _SHAPES.items():
        array = arrays.get(name)
        fits = array is not None and array.dtype == _DTYPES[code] and array.ndim == len(axes)
        if not fits or any(sizes.setdefault(a, n) != n for a, n in zip(axes, array.shape)):  # type: ignore[union-attr] # noqa: B905
            raise DamagedError(f"{where}: the book's array {name!r} is missing or does not fit")
    for key, kind in _FACTS.items():
        if not isinstance(facts.get(key), kind):
            raise DamagedError(f"{where}: the book does not say {key!r}")
    if facts["book.rope_pairing"] != HALVES:
        raise UnsupportedError(f"{where}: a book of keys paired in another way than by halves")
    whole = sizes["N"] * sizes["c"] == sizes["C"] and 0 < 2 * sizes["r"] <= facts["book.head_dim"]
    sums = arrays["frequencies"].sum(axis=1, dtype=np.uint32)
    if (
        not whole
        or sizes["P"] != facts["book.history"] * sizes["D"]
        or not 1 <= facts["book.history"] <= _MAX_HISTORY
        or sizes["C"] % (2 * facts["book.head_dim"])
        or (sums != 1 << PROBABILITY_BITS).any()
        or not arrays["frequencies"].all()
        or any(abs(tier.log_step) > _MAX_LOG_STEP for tier in tiers.values())
    ):
        raise DamagedError(f"{where}: the book's arrays contradict each other; damaged")


def _read_array(reader: ByteReader) -> tuple[str, NDArray[Any]]:
    name, code = reader.string(), reader.string()
    if code not in _DTYPES:
        raise DamagedError(f"{reader.where}: array {name!r} has unknown type {code!r}; damaged")
    shape = tuple(reader.uvarint(limit=_MAX_ELEMENTS) for _ in range(reader.uvarint(limit=4)))
    dtype = np.dtype(_DTYPES[code])
    n_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    content = zstd.decompress(reader.take(reader.uvarint()), n_bytes, reader.where)
    if len(content) != n_bytes:
        raise DamagedError(f"{reader.where}: array {name!r} has the wrong size; damaged")
    return name, np.frombuffer(content, dtype).reshape(shape)


def book_id(data: bytes) -> bytes:
    """The hash that names a book: its last 32 bytes, BLAKE3 of all before them."""
    return data[-HASH_BYTES:]


@dataclass(frozen=True)
class OpenBook:
    """A book and its name."""

    id: str
    book: Book
    n_bytes: int


def load(path: str | os.PathLike[str]) -> OpenBook:
    """Read a book file; `DamagedError`, `UnsupportedError` or `OSError` if that cannot be."""
    found = os.stat(path)
    return _load(os.fspath(path), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _load(path: str, modified: int, size: int) -> OpenBook:
    """Books are large and their bases take work to prepare, so the last ones are kept."""
    data = Path(path).read_bytes()
    return OpenBook(book_id(data).hex(), Book.from_bytes(data, path), len(data))


def find(wanted: str, given: str | os.PathLike[str] | None, beside: str) -> OpenBook:
    """The book with id ``wanted``: the file ``given``, or any ``*.tscbook`` in the folder of the
    archive ``beside`` or in the folders of the environment variable ``TSC_BOOKS``."""
    if given is not None:
        opened = load(given)
        if opened.id != wanted:
            raise UsageError(
                f"{os.fspath(given)}: is book {opened.id[:16]}, the archive needs {wanted[:16]}"
            )
        return opened
    folders = [Path(beside).parent, *map(Path, filter(None, _book_path().split(os.pathsep)))]
    damaged: TscError | None = None
    for folder in folders:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            if _tail(path) == wanted:
                try:
                    return load(path)
                except TscError as error:
                    damaged = error
    if damaged is not None:
        raise damaged
    raise UsageError(
        f"{beside}: needs book {wanted[:16]}…; give it with --book, or put it beside the archive"
    )


def _book_path() -> str:
    return os.environ.get("TSC_BOOKS", "")


def _tail(path: Path) -> str:
    """The id that a book file claims, without reading it all."""
    try:
        with path.open("rb") as file:
            file.seek(-HASH_BYTES, os.SEEK_END)
            return file.read().hex()
    except OSError:
        return ""
