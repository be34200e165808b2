"""What is known of a frame without its payload: its position and the tokens up to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FrameContext:
    """What decoder and encoder know of each frame without the payload.

    ``pos``: int32 ``[n]``, position of each frame where it was computed. ``tokens``: int32
    ``[n_tokens]``, those of then; the token of position ``p`` is ``tokens[p]``, where there is one.
    ``shift``: how far frames have moved since: their keys are turned to ``key_pos``.
    """

    pos: NDArray[np.int32]
    tokens: NDArray[np.int32]
    shift: int = 0

    @property
    def key_pos(self) -> NDArray[np.int32]:
        """Where the keys are turned to, int32 ``[n]``."""
        return (self.pos.astype(np.int64) + self.shift).astype(np.int32)

    def history(self, n_history: int) -> NDArray[np.int32]:
        """Tokens at ``pos``, ``pos - 1``, …, int32 ``[n, n_history]``; -1 where there is none.

        >>> FrameContext(np.array([0, 2]), np.array([7, 8, 9], np.int32)).history(2).tolist()
        [[7, -1], [9, 8]]
        """
        at = self.pos[:, None].astype(np.int64) - np.arange(n_history)
        inside = (at >= 0) & (at < len(self.tokens))
        history = np.full(at.shape, -1, np.int32)
        history[inside] = self.tokens[at[inside]]
        return history
