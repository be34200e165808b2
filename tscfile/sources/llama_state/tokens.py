"""The token field of session and sequence files: a plain list, or llama-server's packed blob.

The blob (since August 2026) holds ``-1, 1, n, tokens…, k, starts…``, then ``k`` media chunks of
``length, bytes`` and zeros up to the next word. Without media it follows from the tokens alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PLAIN = "plain"
PACKED = "packed"
VERBATIM = "verbatim"

_PACKED_MARKER = -1
_PACKED_VERSION = 1


def decode_token_field(field: memoryview) -> tuple[NDArray[np.int32], str]:
    """Token ids in a field (a whole number of 4-byte words) and the form they were in.

    Returns int32 ``[n_tokens]``, -1 where media sits, and ``plain``, ``packed`` or ``verbatim``;
    the last means that the field cannot be made again from the tokens.

    >>> decode_token_field(memoryview(encode_packed(np.array([5, 6], np.int32))))[1]
    'packed'
    """
    words = np.frombuffer(field, dtype="<i4")
    tokens = _packed_tokens(words, field)
    if tokens is None:
        return words.astype(np.int32), PLAIN
    form = PACKED if len(words) == len(tokens) + 4 else VERBATIM
    return tokens.astype(np.int32), form


def _packed_tokens(words: NDArray[np.int32], field: memoryview) -> NDArray[np.int32] | None:
    """The tokens of a packed blob that is sound to its last byte, else None."""
    if len(words) < 4 or words[0] != _PACKED_MARKER or words[1] != _PACKED_VERSION:
        return None
    n_tokens = int(words[2])
    if not 0 <= n_tokens <= len(words) - 4:
        return None
    n_chunks = int(words[3 + n_tokens])
    offset = 4 * (4 + n_tokens + n_chunks)
    if n_chunks < 0 or offset > len(field):
        return None
    for _ in range(n_chunks):
        if offset + 4 > len(field):
            return None
        offset += 4 + int.from_bytes(field[offset : offset + 4], "little")
    padding = field[min(offset, len(field)) :]
    if offset > len(field) or len(padding) > 3 or any(padding):
        return None
    return words[3 : 3 + n_tokens]


def encode_packed(tokens: NDArray[np.int32]) -> bytes:
    """The blob of tokens without media."""
    head = np.array([_PACKED_MARKER, _PACKED_VERSION, len(tokens)], dtype="<i4")
    return head.tobytes() + tokens.astype("<i4").tobytes() + bytes(4)


def encode_token_field(tokens: NDArray[np.int32], form: str) -> bytes:
    """A field in ``plain`` or ``packed`` form."""
    return encode_packed(tokens) if form == PACKED else tokens.astype("<i4").tobytes()
