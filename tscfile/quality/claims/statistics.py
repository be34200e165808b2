"""What is counted on caches and weights themselves, without a codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import arrays, pages
from ..arrays import KVArrays

DISTANCES = range(1, 64)

Floats = NDArray[np.float32]


def frames_by_kind(cache: KVArrays) -> dict[str, list[Floats]]:
    """Frames float32 ``[n_tokens, n_heads * dim]`` of every layer: keys as stored, keys before RoPE
    (where it is known) and values."""
    found = {"keys as stored": [arrays.rows(each).astype(np.float32) for each in cache.keys]}
    rope, positions = cache.shape.rope, cache.shape.positions
    if rope is not None:
        found["keys before RoPE"] = [
            arrays.rows(rope.undo(each.astype(np.float32), positions)) for each in cache.keys
        ]
    found["values"] = [arrays.rows(each).astype(np.float32) for each in cache.values]
    return found


def delta_norms(frames: Sequence[Floats]) -> NDArray[np.float64]:
    """D(k), the norm of a frame less the one k before it over its own norm, for each of
    `DISTANCES`: mean over frames and layers. Unrelated frames of equal norm give √2.

    >>> still = [np.ones((70, 4), np.float32)]
    >>> delta_norms(still)[:2].tolist()
    [0.0, 0.0]
    """
    found = []
    for k in DISTANCES:
        ratios = [
            np.linalg.norm(each[k:] - each[:-k], axis=1) / np.linalg.norm(each[k:], axis=1)
            for each in frames
        ]
        found.append(float(np.mean(np.concatenate(ratios), dtype=np.float64)))
    return np.array(found)


@dataclass(frozen=True)
class PageErrors:
    """Of 4-bit pages: the largest error, the median of the pages' largest magnitudes, and the
    largest error over what the bound a / (2^bits - 1) allows."""

    largest: float
    median_peak: float
    of_bound: float


def page_errors(frames: Sequence[Floats], bits: int, bound_of: int) -> PageErrors:
    """Errors of float32 ``[n, c]`` arrays in pages; ``bound_of``: 2^bits - 1 levels apart from -a
    to a."""
    largest, peaks, shares = 0.0, [], 0.0
    for each in frames:
        whole = each.reshape(-1, pages.page_size(each.shape[1]))
        scales, codes = pages.quantize(whole, bits)
        error = np.abs(pages.dequantize(scales, codes, bits) - whole).max(axis=1)
        peak = np.abs(whole).max(axis=1)
        peaks.append(peak)
        largest = max(largest, float(error.max()))
        # The scale is rounded to fp16, which moves every level by up to 2^-11 of it.
        allowed = peak / bound_of + peak * 2.0**-11 + 2.0**-24
        shares = max(shares, float((error / np.maximum(allowed, 1e-30)).max()))
    return PageErrors(largest, float(np.median(np.concatenate(peaks))), shares)


def head_peaks(cache: KVArrays) -> NDArray[np.float64]:
    """The largest magnitude of each head, keys of all layers first."""
    found = [np.abs(head).max() for _, role in cache.roles() for each in role for head in each]
    return np.array(found, np.float64)


def rejected_deltas(frames: Sequence[Floats], every: int, bits: int, bound: float) -> float:
    """Share of frames that are stored as keyframes where a difference is refused whose error is
    above ``bound`` in any channel of any layer."""
    n = len(frames[0])
    worst = np.zeros(n)
    for each in frames:
        left = each - each[::every].repeat(every, axis=0)[:n]
        size = pages.page_size(each.shape[1])
        scales, codes = pages.quantize(left.reshape(-1, size), bits)
        error = np.abs(pages.dequantize(scales, codes, bits).reshape(left.shape) - left)
        worst = np.maximum(worst, error.max(axis=1))
    is_keyframe = (np.arange(n) % every == 0) | (worst > bound)
    return float(is_keyframe.mean())


def layer_steps(weights: dict[str, list[Floats]]) -> dict[str, float]:
    """‖W(l+1) - W(l)‖ / ‖W(l)‖ of neighbouring layers, the mean of each kind of matrix."""
    found = {}
    for kind, layers in weights.items():
        pairs = [
            (a, b) for a, b in zip(layers, layers[1:], strict=False) if a.shape == b.shape
        ]
        if pairs:
            found[kind] = float(
                np.mean([np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in pairs])
            )
    return found
