"""Which tokens are measured: windows of a text, chosen the same way every time.

The text is cut into documents at lines ``<|endoftext|>``. Each document offers as many disjoint
windows as fit in it; what is left over is put before the first one, a share of it that follows
from the seed. Of all windows on offer, in the order of the text, those are taken that are evenly
spread. Where too few fit inside documents, the documents are joined and windows may cross from
one into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ..errors import UsageError

SEPARATOR = "<|endoftext|>"
JOINED = -1


@dataclass(frozen=True)
class Text:
    """A text file: its name, BLAKE3 (hex) of its bytes, and its documents."""

    name: str
    digest: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Window:
    """``tokens``: int32 ``[length]``, from token ``start`` of document number ``document``
    (`JOINED` if all documents were joined)."""

    document: int
    start: int
    tokens: NDArray[np.int32]


def read_text(path: Path) -> Text:
    """Read a UTF-8 text; `UsageError` if it is none."""
    data = path.read_bytes()
    try:
        whole = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no UTF-8 text: {error}") from None
    parts = (part.strip("\n") for part in whole.split(f"{SEPARATOR}\n"))
    documents = tuple(part for part in parts if part.strip())
    return Text(path.name, blake3(data).hexdigest(), documents)


def choose_windows(
    documents: Sequence[NDArray[np.int32]], length: int, n_windows: int, seed: int
) -> list[Window]:
    """``n_windows`` disjoint windows of ``length`` tokens; see the module's first lines.

    ``documents``: int32 token ids of each. `UsageError` if the text is too short.

    >>> found = choose_windows([np.arange(25, dtype=np.int32)], 10, 2, seed=0)
    >>> [(window.start, len(window.tokens)) for window in found]
    [(4, 10), (14, 10)]
    """
    offers = _offers(documents, length, seed)
    if len(offers) < n_windows:
        joined = np.concatenate([np.zeros(0, np.int32), *documents])
        offers = [
            Window(JOINED, each.start, each.tokens) for each in _offers([joined], length, seed)
        ]
    if len(offers) < n_windows:
        raise UsageError(
            f"the text has room for {len(offers)} windows of {length} tokens and {n_windows} are "
            "wanted; give a longer text, fewer windows or fewer frames"
        )
    phase = draw(1 << 16, seed, "phase") / (1 << 16)
    return [offers[int((i + phase) * len(offers) / n_windows)] for i in range(n_windows)]


def draw(n: int, seed: int, *where: object) -> int:
    """A number from 0 to ``n - 1`` that depends on the seed and on where it is used.

    A hash, because generators of random numbers differ between versions of their libraries.
    """
    digest = blake3(repr((seed, *where)).encode()).digest(length=8)
    return int.from_bytes(digest, "little") % n


def _offers(documents: Sequence[NDArray[np.int32]], length: int, seed: int) -> list[Window]:
    windows = []
    for number, ids in enumerate(documents):
        n_fit, rest = divmod(len(ids), length)
        offset = draw(rest + 1, seed, "offset", number)
        for start in range(offset, offset + n_fit * length, length):
            windows.append(Window(number, start, ids[start : start + length]))
    return windows
