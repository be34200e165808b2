"""Next-token distributions of the original and the restored cache, compared by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_POSITIONS_AT_ONCE = 32


@dataclass(frozen=True)
class Comparison:
    """One entry for each position fed.

    ``kl``: KL(original ‖ restored) in nats. ``same_top1``: both find the same token likeliest.
    ``nll_original``, ``nll_restored``: -log p of the true next token, nats. ``hit_original``,
    ``hit_restored``: the likeliest token is the true one.
    """

    kl: NDArray[np.float64]
    same_top1: NDArray[np.bool_]
    nll_original: NDArray[np.float64]
    nll_restored: NDArray[np.float64]
    hit_original: NDArray[np.bool_]
    hit_restored: NDArray[np.bool_]


def compare(original: Tensor, restored: Tensor, targets: NDArray[np.int32]) -> Comparison:
    """Compare logits float32 ``[n, vocabulary]`` given the true next tokens int32 ``[n]``.

    Softmax and sums in float64.
    """
    import torch

    wanted = torch.as_tensor(targets, dtype=torch.int64, device=original.device)
    columns: list[list[NDArray[Any]]] = []
    for start in range(0, len(wanted), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        columns.append(_compare(original[part], restored[part], wanted[part]))
    return Comparison(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _compare(original: Tensor, restored: Tensor, wanted: Tensor) -> list[NDArray[Any]]:
    p, q = original.double().log_softmax(-1), restored.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    top_p, top_q = p.argmax(-1), q.argmax(-1)
    at = wanted[:, None]
    found = [kl, top_p == top_q, -p.gather(1, at)[:, 0], -q.gather(1, at)[:, 0],
             top_p == wanted, top_q == wanted]  # fmt: skip
    return [each.cpu().numpy() for each in found]


def stack(comparisons: Sequence[Comparison]) -> Comparison:
    """Comparisons of equal length as one with arrays ``[n_comparisons, n]``."""
    names = Comparison.__dataclass_fields__
    return Comparison(**{name: np.stack([getattr(c, name) for c in comparisons]) for name in names})


def perplexity(nll: NDArray[np.float64]) -> float:
    return float(np.exp(nll.mean()))
