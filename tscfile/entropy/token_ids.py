"""Code the token ids of a session by a model of what people write.

Each id is a leaf of a binary tree, and every turn on the way to it is coded by a binary arithmetic
coder with a probability that is mixed, logistically, from what tables learnt from documents say
(what follows one token, and two), from what the session itself has done so far, and from the
longest passage that seems to repeat. Mixing as in Mahoney, "Adaptive weighing of context models for
lossless data compression" (2005). ``spec/codecs/token-ids.md`` gives every step; all arithmetic is
exact, so that every machine decodes the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from tscfile_kernels import ops

from ..errors import DamagedError
from . import token_tables
from .token_learning import learn as learn

MOST_CONTEXT = 1 << 12
"""Tokens before those that are coded that the model looks at."""

_MOST_TOKENS_PER_BYTE = 1 << 14


class TokenCoder:
    """Codes token ids with the ``tables`` that `learn` made, or, without any, with none.

    `DamagedError` if the tables are not sound; ``where`` names them.

    >>> coder = TokenCoder(None, "no book")
    >>> tokens = np.array([5, 6, 7, 5, 6, 7, 5, 6, 7, -1], np.int32)
    >>> nothing = np.zeros(0, np.int32)
    >>> data = coder.encode(tokens, nothing)
    >>> len(data), coder.decode(data, 10, nothing, "example").tolist()
    (8, [5, 6, 7, 5, 6, 7, 5, 6, 7, -1])
    """

    def __init__(self, tables: Mapping[str, NDArray[np.generic]] | None, where: str) -> None:
        self._model = None if tables is None else token_tables.expand(tables, where)

    def encode(self, tokens: NDArray[np.int32], context: NDArray[np.int32]) -> bytes:
        """``tokens``, any int32, behind ``context``, which `decode` must be given again."""
        if not len(tokens):
            return b""
        context = context[-MOST_CONTEXT:]
        ids = np.concatenate([context, tokens]).astype(np.int32, copy=False)
        model, head = self._model, b""
        if model is None:
            head = bytes([_id_bits(ids)])
            model = token_tables.plain(head[0])
        data = ops.encode_tokens(
            model.tables, model.weights.copy(), model.match.copy(),
            ids, model.leaves(ids), len(context),
        )  # fmt: skip
        return head + data.tobytes()

    def decode(
        self, data: bytes | memoryview, n: int, context: NDArray[np.int32], where: str
    ) -> NDArray[np.int32]:
        """The ``n`` tokens; `DamagedError` unless ``data`` are exactly what they are coded in.

        Takes about 40 bytes of memory a token, and a few MB. A byte can describe ten thousand
        tokens, so the caller should bound a count that a file states.
        """
        if n > _MOST_TOKENS_PER_BYTE * (len(data) + 4) or (not n and len(data)):
            raise DamagedError(f"{where}: {n} tokens do not take {len(data)} bytes; damaged")
        if not n:
            return np.zeros(0, np.int32)
        model, body = self._model, np.frombuffer(data, np.uint8)
        if model is None:
            if not len(body) or body[0] > token_tables.MOST_ID_BITS:
                raise DamagedError(f"{where}: ids of tokens are of an unknown size; damaged")
            model, body = token_tables.plain(int(body[0])), body[1:]
        context = context[-MOST_CONTEXT:].astype(np.int32, copy=False)
        ids = np.concatenate([context, np.zeros(n, np.int32)])
        leaves = np.zeros(len(ids), np.int32)
        leaves[: len(context)] = model.leaves(context)
        if not ops.decode_tokens(
            model.tables, model.weights.copy(), model.match.copy(),
            body, ids, leaves, len(context),
        ):  # fmt: skip
            raise DamagedError(f"{where}: coded tokens do not end as they should; damaged")
        escaped = leaves == len(model.id_of_leaf)
        escaped[: len(context)] = True
        ids = np.where(escaped, ids, model.id_of_leaf[np.where(escaped, 0, leaves)])
        # What has a leaf is never escaped, and the tree of a stream without tables is the least.
        if not np.array_equal(model.leaves(ids), leaves) or (
            self._model is None and data[0] != _id_bits(ids)
        ):
            raise DamagedError(f"{where}: tokens are not coded as they should be; damaged")
        return ids[len(context) :].astype(np.int32)


def _id_bits(ids: NDArray[np.int32]) -> int:
    """Bits of the largest id that may have a leaf."""
    in_tree = ids[(ids >= 0) & (ids < 1 << token_tables.MOST_ID_BITS)]
    return int(in_tree.max(initial=0)).bit_length()
