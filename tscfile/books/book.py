"""A book: predictor, bases, distributions and measured tiers of one model, named by its BLAKE3.

A frame is taken as one vector ``x`` of all channels: keys before RoPE and values, tensor after
tensor. The book holds

- ``mean``, a network (`transforms.prediction`) and a prediction basis: what the tokens up to the
  frame say of ``x``;
- the basis: ``x = mean + prediction + sum of coefficient * basis row``. Rows are the eigenvectors
  of the prediction's residual, measured by what the model's output feels (``metric``);
- the scale of each coefficient, and frequency tables for coefficients of every scale;
- how token ids are coded (`entropy.token_ids`);
- tiers: the quantizer step that meets each one's quality, and what was measured.

Large tables are stored as 8-bit integers with one scale a row or column; the encoder works with
what is stored, so that this costs rate and not drift. ``spec/book.md`` gives the bytes.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from tscfile_kernels.ops import PROBABILITY_BITS

from ..bytestream import Allowance, ByteReader, ByteWriter
from ..container.metadata import read_metadata, write_metadata
from ..context import FrameContext
from ..entropy import ladder, zstd
from ..errors import DamagedError, TscError, UnsupportedError, UsageError
from ..transforms.exact_frames import ExactOrder
from ..transforms.grouped_basis import GroupedBasis, LayerGroups
from ..transforms.prediction import N_POSITION, Features, Network
from ..transforms.rope import HALVES, Rope

if TYPE_CHECKING:
    from ..entropy.token_ids import TokenCoder

MAGIC = b"\x89TSCBOOK\r\n\x1a\n"
VERSION = 2
HASH_BYTES = 32
SUFFIX = ".tscbook"
IDS_PREFIX = "ids_"
_OPTIONAL = (IDS_PREFIX, "exact_", "product_")
"""How the names of arrays begin that a book may lack."""

_MEMORY_PER_BYTE, _MEMORY_SLACK = 2, 1 << 25
"""Bytes that the arrays of a book may take for each of its own, and beside."""
_TIER_MEMORY, _ARRAY_MEMORY = 384, 256

_DTYPES = {
    "f4": "<f4", "f2": "<f2", "i1": "<i1", "u1": "<u1", "i2": "<i2", "u2": "<u2", "i4": "<i4",
    "u4": "<u4",
}  # fmt: skip
_MAX_ELEMENTS = 1 << 31
_MAX_HISTORY = 64
_MAX_DECAYS = 16
_MAX_LOG_STEP = 1 << 14

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TierEntry:
    """A tier and what was measured of it, on text that the book did not learn from: ``log_step`` in
    1/256 octaves, mean KL in nats, and the ratio of whole archives. KL and ratio are NaN in a book
    made without a model."""

    name: str
    log_step: int
    kl: float
    ratio: float


@dataclass
class Book:
    """Arrays of a book; C channels in G groups of c, R coefficients, P predicted coordinates, V
    tokens, D numbers a token vector, F features, M hidden units, K distribution classes, S symbols.

    ``mean`` f4 [C] · ``token_vectors`` i1 [V, D] with ``token_scales`` f4 [V] · ``hidden`` i1
    [F, M] with ``hidden_scales`` and ``hidden_bias`` f4 [M] · ``linear`` i1 [F, P] with
    ``linear_scales`` f4 [P] · ``output`` i1 [M, P] with ``output_scales`` f4 [P] · ``prediction``
    i1 [P, c] with ``prediction_scales`` f4 [P] · ``basis`` i1 [R, c] with ``basis_scales`` f4 [R] ·
    ``metric`` f2 [N, w, w], block-diagonal, tensor after tensor · ``log_sigmas`` i2 [R], 1/256
    octaves, falling in each group · ``frequencies`` u2 [K, S] · ``inv_freq`` f4, half the rotated
    channels of a head · ``ids_*``: tables of `entropy.token_ids` · ``product_*``:
    codebooks of `books.product`. Others are ignored.
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

    @cached_property
    def rope(self) -> Rope:
        return Rope(
            self.arrays["inv_freq"], str(self.facts["book.rope_pairing"]),
            float(self.facts["book.rope_scale"]),
        )  # fmt: skip

    @cached_property
    def groups(self) -> LayerGroups:
        n_layers = int(self.facts["book.n_layers"])
        width = self.n_channels // (2 * n_layers)
        return LayerGroups(n_layers, width, int(self.facts["book.group_layers"]))

    @cached_property
    def network(self) -> Network:
        features = Features(
            self._scaled("token_vectors", "token_scales", axis=0), int(self.facts["book.history"]),
            tuple(self.facts["book.decays"]), int(self.facts["book.decay_dims"]),
        )  # fmt: skip
        first = [self._scaled("hidden", "hidden_scales"), self._scaled("linear", "linear_scales")]
        return Network(
            features, np.concatenate(first, axis=1), self.arrays["hidden_bias"],
            self._scaled("output", "output_scales"),
        )  # fmt: skip

    @cached_property
    def basis(self) -> GroupedBasis:
        rows = self._scaled("basis", "basis_scales", axis=0)
        return GroupedBasis(self.groups, rows, self.facts["book.group_coefficients"])

    @cached_property
    def prediction(self) -> GroupedBasis:
        rows = self._scaled("prediction", "prediction_scales", axis=0)
        return GroupedBasis(self.groups, rows, self.facts["book.group_predictions"])

    @property
    def exact_order(self) -> ExactOrder:
        """The order in which exact coding takes the channels."""
        groups, head_dim = self.groups, int(self.facts["book.head_dim"])
        return ExactOrder(groups.n_layers, groups.width, head_dim, len(self.arrays["inv_freq"]))

    def _scaled(self, name: str, scales: str, axis: int = 1) -> Floats:
        """An array of 8-bit integers times its scales, one for each index of ``axis``."""
        factor = self.arrays[scales][:, None] if axis == 0 else self.arrays[scales]
        scaled: Floats = self.arrays[name].astype(np.float32) * factor
        return scaled

    # --- the transform ------------------------------------------------------------------------

    def stored(self, log_step: int) -> list[int]:
        """How many coefficients of each group are stored at a step: the first ones, as scales
        fall within a group."""
        kept = ladder.class_of(self.arrays["log_sigmas"], log_step) >= 0
        return [int(kept[span].sum()) for span in self.basis.spans()]

    def columns(self, counts: Sequence[int]) -> NDArray[np.int64]:
        """Indices of the first ``counts[g]`` coefficients of each group g."""
        starts = self.basis.edges
        spans = [np.arange(n) + start for start, n in zip(starts, counts, strict=False)]
        columns: NDArray[np.int64] = np.concatenate(spans).astype(np.int64)
        return columns

    def predict(self, context: FrameContext) -> Floats:
        """Mean and prediction of each frame, float32 ``[n, C]``."""
        none = [0] * self.groups.n_groups
        return self.synthesize(self.network(context), np.zeros((len(context.pos), 0)), none)

    def synthesize(
        self, predicted: Floats, coefficients: NDArray[Any], counts: Sequence[int],
        step: float = 1.0,
    ) -> Floats:  # fmt: skip
        """Frames float32 ``[n, C]`` of predicted coordinates ``[n, P]`` and the coefficients at
        `columns` of ``counts``, in units of ``step``."""
        n, at = len(predicted), 0
        frames = np.empty((n, self.n_channels), np.float32)
        for g, (count, span) in enumerate(zip(counts, self.prediction.spans(), strict=True)):
            above = predicted[:, span]
            left = np.empty((n, above.shape[1] + count), np.float32)
            left[:, : above.shape[1]] = above
            np.multiply(
                coefficients[:, at : at + count], np.float32(step),
                out=left[:, above.shape[1] :], casting="unsafe",
            )  # fmt: skip
            self.groups.put(left @ self.stacked[g][: left.shape[1]], g, frames)
            at += count
        frames += self.arrays["mean"]
        return frames

    def analyse(self, residual: Floats, counts: Sequence[int]) -> Floats:
        """Coefficients at `columns` of ``counts`` whose synthesis is nearest in the metric."""
        parts = [
            self.groups.take(residual, g) @ self._analysis[g][:, :count]
            for g, count in enumerate(counts)
        ]
        return np.concatenate(parts, axis=1)

    @cached_property
    def stacked(self) -> list[Floats]:
        """Of each group the rows of prediction and basis, one above the other."""
        pairs = zip(self.prediction.spans(), self.basis.spans(), strict=True)
        return [
            np.concatenate([self.prediction.rows[above], self.basis.rows[below]])
            for above, below in pairs
        ]

    @cached_property
    def _analysis(self) -> list[Floats]:
        """Of each group ``[c, R_g]``."""
        metric = self.arrays["metric"].astype(np.float32)
        found = []
        for g, span in enumerate(self.basis.spans()):
            rows = self.basis.rows[span]
            blocks = metric[self.groups.tensors(g)]
            weighted = np.matmul(
                rows.reshape(len(rows), len(blocks), -1).transpose(1, 0, 2), blocks
            )
            weighted = weighted.transpose(1, 0, 2).reshape(len(rows), -1)
            # The stored rows are not quite orthonormal in the metric: solve for them jointly.
            gram = (weighted @ rows.T).astype(np.float64)
            try:
                solved = np.linalg.solve(gram, weighted.astype(np.float64))
            except np.linalg.LinAlgError:
                raise DamagedError("the book's basis rows depend on each other; damaged") from None
            found.append(solved.T.astype(np.float32))
        return found

    # --- tiers --------------------------------------------------------------------------------

    def tier(self, name: str) -> TierEntry:
        """`UsageError` if the book has no such tier."""
        if name not in self.tiers:
            known = ", ".join(self.tiers) or "none"
            raise UsageError(f"the book has no step for tier {name}; it has {known}")
        return self.tiers[name]

    def kl_of_step(self, log_step: int) -> float | None:
        """The mean KL to be expected at a step, drawn through the tiers measured (both in
        logarithms); None where nothing was measured."""
        measured = self._measured()
        if not measured:
            return None
        steps, kls = zip(*measured, strict=True)
        return float(2.0 ** min(_through(steps, kls, float(log_step)), 64.0))

    def step_of_kl(self, kl: float) -> int:
        """The coarsest step that should have at most this KL; `UsageError` if it lies more than
        a factor of 8 beyond what was measured."""
        measured = self._measured()
        if not measured:
            raise UsageError("the book was made without a model, so no KL is known for its steps")
        steps, kls = zip(*measured, strict=True)
        if not kls[0] - 3 <= math.log2(kl) <= kls[-1] + 3:
            raise UsageError(
                f"a KL of {kl:g} is too far from what the book measured, "
                f"{2.0 ** kls[0]:.2g} to {2.0 ** kls[-1]:.2g}"
            )
        step = math.floor(_through(kls, steps, math.log2(kl)))
        return min(max(step, -_MAX_LOG_STEP), _MAX_LOG_STEP)

    def _measured(self) -> list[tuple[float, float]]:
        """Steps and binary logarithms of KL, rising in both."""
        found = sorted((t.log_step, t.kl) for t in self.tiers.values() if t.kl > 0)
        rising: list[tuple[float, float]] = []
        for step, kl in found:
            point = float(step), math.log2(kl)
            if not rising or (point[0] > rising[-1][0] and point[1] > rising[-1][1]):
                rising.append(point)
        if len(rising) == 1:
            # KL grows about as the step to the power 1.6.
            rising.append((rising[0][0] + ladder.UNITS_PER_OCTAVE, rising[0][1] + 1.6))
        return rising

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
    def from_bytes(cls, data: bytes | memoryview, where: str) -> Book:
        """`DamagedError` for anything but a whole book."""
        data = memoryview(data)
        if data[: len(MAGIC)] != MAGIC:
            raise DamagedError(f"{where}: not a tscfile book: the first bytes are not its magic")
        whole = len(data) >= len(MAGIC) + HASH_BYTES
        if not whole or blake3(data[:-HASH_BYTES]).digest() != book_id(data):
            raise DamagedError(f"{where}: the book's hash is wrong; it is damaged or cut short")
        allowance = Allowance(_MEMORY_PER_BYTE * len(data) + _MEMORY_SLACK)
        reader = ByteReader(data[len(MAGIC) : -HASH_BYTES], where, allowance)
        version = reader.uvarint()
        if version != VERSION:
            raise UnsupportedError(f"{where}: book version {version}; this build reads {VERSION}")
        facts = read_metadata(reader)
        tiers: dict[str, TierEntry] = {}
        for _ in range(reader.count(21, _TIER_MEMORY)):
            name = reader.string()
            _once(name, tiers, where)
            tiers[name] = TierEntry(name, *reader.unpack("idd"))
        arrays: dict[str, NDArray[Any]] = {}
        for _ in range(reader.count(4)):
            _read_array(reader, arrays)
        reader.end()
        _check(facts, arrays, tiers, where)
        return cls(facts, arrays, tiers)


def _through(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """The line through neighbouring points, and beyond them at the slope of the nearest two.

    >>> _through([0, 1, 3], [0, 2, 4], 5)
    6.0
    """
    i = min(max(int(np.searchsorted(xs, x)), 1), len(xs) - 1)
    return float(ys[i - 1] + (x - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1]))


_SHAPES = {
    "mean": ("f4", "C"), "token_vectors": ("i1", "VD"), "token_scales": ("f4", "V"),
    "hidden": ("i1", "FM"), "hidden_scales": ("f4", "M"), "hidden_bias": ("f4", "M"),
    "linear": ("i1", "FP"), "linear_scales": ("f4", "P"), "output": ("i1", "MP"),
    "output_scales": ("f4", "P"), "prediction": ("i1", "Pc"), "prediction_scales": ("f4", "P"),
    "basis": ("i1", "Rc"), "basis_scales": ("f4", "R"), "metric": ("f2", "Nww"),
    "log_sigmas": ("i2", "R"), "frequencies": ("u2", "KS"), "inv_freq": ("f4", "r"),
}  # fmt: skip
_FACTS = {
    "book.history": int, "book.decays": list, "book.decay_dims": int, "book.head_dim": int,
    "book.n_layers": int, "book.group_layers": int, "book.group_coefficients": list,
    "book.group_predictions": list, "book.rope_scale": float, "book.rope_pairing": str,
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
    if not (
        _layers_fit(facts, sizes)
        and _features_fit(facts, sizes)
        and (arrays["frequencies"].sum(axis=1, dtype=np.uint32) == 1 << PROBABILITY_BITS).all()
        and arrays["frequencies"].all()
        and _falling(arrays["log_sigmas"], facts["book.group_coefficients"])
        and all(_is_measured(tier) for tier in tiers.values())
        and all(np.isfinite(arrays[name]).all() for name in _SHAPES if _SHAPES[name][0][0] == "f")
    ):
        raise DamagedError(f"{where}: the book's arrays contradict each other; damaged")


def _layers_fit(facts: dict[str, Any], sizes: dict[str, int]) -> bool:
    n_layers, per_group = facts["book.n_layers"], facts["book.group_layers"]
    if not 0 < per_group <= n_layers or n_layers % per_group or facts["book.head_dim"] < 1:
        return False
    counts = facts["book.group_coefficients"], facts["book.group_predictions"]
    return (
        sizes["C"] % (2 * n_layers * facts["book.head_dim"]) == 0
        and (sizes["N"], sizes["w"]) == (2 * n_layers, sizes["C"] // (2 * n_layers))
        and 0 < sizes["c"] == sizes["C"] // n_layers * per_group
        and 0 < 2 * sizes["r"] <= facts["book.head_dim"]
        and 0 < facts["book.rope_scale"] < math.inf
        and all(len(each) == n_layers // per_group for each in counts)
        and all(isinstance(n, int) and 0 <= n <= sizes["c"] for each in counts for n in each)
        and (sum(counts[0]), sum(counts[1])) == (sizes["R"], sizes["P"])
    )


def _features_fit(facts: dict[str, Any], sizes: dict[str, int]) -> bool:
    history, decays, dims = (facts[f"book.{key}"] for key in ("history", "decays", "decay_dims"))
    return (
        0 <= history <= _MAX_HISTORY
        and len(decays) <= _MAX_DECAYS
        and all(isinstance(each, float) and 0 < each <= 0.999 for each in decays)
        and sizes["V"] > 0
        and 0 <= dims <= sizes["D"]
        and sizes["F"] == history * sizes["D"] + len(decays) * dims + N_POSITION
    )


def _falling(log_sigmas: NDArray[np.int16], counts: Sequence[int]) -> bool:
    edges = np.cumsum(counts, dtype=np.int64)
    parts = np.split(log_sigmas.astype(np.int32), edges[:-1])
    return all(bool((np.diff(part) <= 0).all()) for part in parts)


def _is_measured(tier: TierEntry) -> bool:
    """Is what was measured of it possible? NaN stands for nothing."""
    return abs(tier.log_step) <= _MAX_LOG_STEP and all(
        math.isnan(each) or 0 <= each < math.inf for each in (tier.kl, tier.ratio)
    )


def _once(name: str, among: Mapping[str, object], where: str) -> None:
    if name in among:
        raise DamagedError(f"{where}: the book names {name!r} twice; damaged")


def _read_array(reader: ByteReader, arrays: dict[str, NDArray[Any]]) -> None:
    """Add the next array to ``arrays``; one that is not known here is passed over."""
    name, code = reader.string(), reader.string()
    _once(name, arrays, reader.where)
    if code not in _DTYPES:
        raise DamagedError(f"{reader.where}: array {name!r} has unknown type {code!r}; damaged")
    shape = tuple(reader.uvarint(limit=_MAX_ELEMENTS) for _ in range(reader.uvarint(limit=4)))
    dtype = np.dtype(_DTYPES[code])
    n_bytes = math.prod(shape) * dtype.itemsize
    packed = reader.take(reader.uvarint())
    if name not in _SHAPES and not name.startswith(_OPTIONAL):
        return
    reader.claim(n_bytes + _ARRAY_MEMORY)
    content = zstd.decompress(packed, n_bytes, reader.where)
    if len(content) != n_bytes:
        raise DamagedError(f"{reader.where}: array {name!r} has the wrong size; damaged")
    arrays[name] = np.frombuffer(content, dtype).reshape(shape)


def book_id(data: bytes | memoryview) -> bytes:
    """The hash that names a book: its last 32 bytes, BLAKE3 of all before them."""
    return bytes(data[-HASH_BYTES:])


@dataclass(frozen=True)
class OpenBook:
    """A book and its name."""

    id: str
    book: Book
    n_bytes: int

    @cached_property
    def token_coder(self) -> TokenCoder | None:
        """What token ids are coded with; None in a book without tables for them."""
        from ..entropy.token_ids import TokenCoder

        tables = {k: v for k, v in self.book.arrays.items() if k.startswith(IDS_PREFIX)}
        return TokenCoder(tables, f"book {self.id[:16]}") if tables else None


def load(path: str | os.PathLike[str]) -> OpenBook:
    """Read a book file; `DamagedError`, `UnsupportedError` or `OSError` if that cannot be."""
    found = os.stat(path)
    return _load(os.fspath(path), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _load(path: str, modified: int, size: int) -> OpenBook:
    """Books are large and their bases take work to prepare, so the last ones are kept."""
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if found else b""
    return open_bytes(memoryview(data), path)


def open_bytes(data: bytes | memoryview, where: str) -> OpenBook:
    """A whole book file in memory; `DamagedError` or `UnsupportedError` if it is none."""
    return OpenBook(book_id(data).hex(), Book.from_bytes(data, where), len(data))


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
