"""Token ids of a snapshot: how its record stores them, and what they are.

Three ways, the shortest is taken: `entropy.ints`, the token coder alone, or the token coder with
the tables of the snapshot's book.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .bytestream import Allowance, ByteReader, ByteWriter
from .container.snapshots import TokenIds, common_prefix
from .entropy import ints
from .errors import DamagedError

if TYPE_CHECKING:
    from .entropy.token_ids import TokenCoder

ADAPTIVE, OF_BOOK = 3, 4
"""Codings beyond those of `entropy.ints`."""

_FEW = 8
"""New tokens up to which the token coder is not worth loading."""

Tokens = NDArray[np.int32]


def encode(tokens: Tokens, parent: Tokens, coder: TokenCoder | None) -> TokenIds:
    """``parent``: tokens of the parent, empty without one; ``coder``: that of the book."""
    kept = common_prefix(parent, tokens)
    new = np.ascontiguousarray(tokens[kept:], np.int32)
    writer = ByteWriter()
    ints.write(writer, new)
    reader = ByteReader(writer.bytes(), "tokens")
    coding, plain = reader.u8(), bytes(reader.take(reader.uvarint()))
    choices = [(coding, plain)]
    if len(new) > _FEW:
        choices.append((ADAPTIVE, adaptive().encode(new, tokens[:kept])))
        if coder is not None:
            choices.append((OF_BOOK, coder.encode(new, tokens[:kept])))
    coding, data = min(choices, key=lambda choice: len(choice[1]))
    return TokenIds(kept, len(new), coding, data)


def decode(ids: TokenIds, parent: Tokens, coder: TokenCoder | None, where: str) -> Tokens:
    """int32 ``[len(ids)]``; `DamagedError` if ``ids`` are not what `encode` makes."""
    kept = parent[: ids.kept]
    if ids.coding == ADAPTIVE:
        new = adaptive().decode(ids.data, ids.count, kept, where)
    elif ids.coding == OF_BOOK:
        if coder is None:
            raise DamagedError(f"{where}: tokens are coded with tables that its book lacks")
        new = coder.decode(ids.data, ids.count, kept, where)
    else:
        # The record's reader has claimed the memory.
        framed = ByteWriter().u8(ids.coding).uvarint(len(ids.data)).raw(ids.data)
        new = ints.read(ByteReader(framed.bytes(), where, Allowance(1 << 40)), ids.count)
    return np.concatenate([kept, new])


@cache
def adaptive() -> TokenCoder:
    """The coder that knows nothing beforehand."""
    from .entropy.token_ids import TokenCoder

    return TokenCoder(None, "tokens")
