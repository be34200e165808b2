"""What is known of a frame without its payload: its position and the tokens up to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FrameContext:
    """What decoder and encoder know of each frame without the payload.

    ``pos``: int32 ``[n]``, position of each frame. ``tokens``: int32 ``[n_tokens]``, the whole
    snapshot's; the token of position ``p`` is ``tokens[p]``, where there is one.
    """

    pos: NDArray[np.int32]
    tokens: NDArray[np.int32]

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
