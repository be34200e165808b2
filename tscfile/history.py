"""What is known of a frame without its payload: its position and the tokens up to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FrameContext:
    """What decoder and encoder know of each frame without the payload.

    ``pos``: int32 ``[n]``. ``history``: int32 ``[n, H]``, the frame's token and those before it.
    """

    pos: NDArray[np.int32]
    history: NDArray[np.int32]


def context_of(pos: NDArray[np.int32], tokens: NDArray[np.int32], n_history: int) -> FrameContext:
    """Tokens at positions ``pos``, ``pos - 1``, …; -1 where there is none."""
    at = pos[:, None].astype(np.int64) - np.arange(n_history)
    inside = (at >= 0) & (at < len(tokens))
    history = np.full(at.shape, -1, np.int32)
    history[inside] = tokens[at[inside]]
    return FrameContext(pos, history)
