"""A cache as plain arrays: what a codec is given and what it must give back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..model import ModelIdentity
from ..transforms.rope import Rope


@dataclass(frozen=True)
class LayerShape:
    """Heads of one layer's cache and their sizes."""

    n_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class CacheShape:
    """What the receiver knows without the payload: tokens (hence positions 0, 1, …), shape, RoPE.

    ``tokens``: int32 ``[n_tokens]``. ``rope`` is None where the keys' encoding is not known.
    ``identity``: what is known of the model (`tscfile.identity`).
    """

    tokens: NDArray[np.int32]
    layers: tuple[LayerShape, ...]
    rope: Rope | None = None
    identity: ModelIdentity = field(default_factory=ModelIdentity)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def positions(self) -> NDArray[np.int32]:
        return np.arange(self.n_tokens, dtype=np.int32)

    @property
    def n_values(self) -> int:
        """Keys and values of all layers, counted one by one."""
        per_token = sum(one.n_kv_heads * (one.key_dim + one.value_dim) for one in self.layers)
        return self.n_tokens * per_token


@dataclass(frozen=True)
class KVArrays:
    """Keys (after RoPE) and values of every layer, float16 ``[n_kv_heads, n_tokens, head_dim]``.

    ``kept``: of each layer the frames that are still there, bool ``[n_tokens]``; None for all.
    Attention does not see the others, whatever stands in their place.
    """

    shape: CacheShape
    keys: Sequence[NDArray[np.float16]]
    values: Sequence[NDArray[np.float16]]
    kept: Sequence[NDArray[np.bool_]] | None = None

    @property
    def raw_bytes(self) -> int:
        """Bytes of the cache in fp16: the numerator of the snapshot ratio."""
        return 2 * self.shape.n_values

    def head(self, n_tokens: int) -> KVArrays:
        """The first ``n_tokens`` frames."""
        shape = replace(self.shape, tokens=self.shape.tokens[:n_tokens])
        return KVArrays(
            shape, [k[:, :n_tokens] for k in self.keys], [v[:, :n_tokens] for v in self.values],
            self.kept and [each[:n_tokens] for each in self.kept],
        )  # fmt: skip

    def roles(self) -> list[tuple[str, Sequence[NDArray[np.float16]]]]:
        """``("k", keys)`` and ``("v", values)``."""
        return [("k", self.keys), ("v", self.values)]


Heads = NDArray[np.float16]


def from_layers(
    shape: CacheShape, make: Callable[[str, int, int, int], Heads],
    kept: Sequence[NDArray[np.bool_]] | None = None,
) -> KVArrays:  # fmt: skip
    """A cache of what ``make`` gives for a role, the number of a layer, its heads and their size,
    float16 ``[n_kv_heads, n_tokens, head_dim]``: keys of all layers first."""
    layers = list(enumerate(shape.layers))
    keys = [make("k", i, one.n_kv_heads, one.key_dim) for i, one in layers]
    values = [make("v", i, one.n_kv_heads, one.value_dim) for i, one in layers]
    return KVArrays(shape, keys, values, kept)


def rows(heads: NDArray[np.floating]) -> NDArray[np.floating]:
    """``[n_heads, n_tokens, dim]`` as one row a token, ``[n_tokens, n_heads * dim]``."""
    return np.ascontiguousarray(heads.transpose(1, 0, 2)).reshape(heads.shape[1], -1)


def heads(rows: NDArray[np.floating], n_heads: int) -> NDArray[np.floating]:
    """Undo `rows`."""
    return np.ascontiguousarray(rows.reshape(len(rows), n_heads, -1).transpose(1, 0, 2))
