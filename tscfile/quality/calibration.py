"""Caches of the calibration text, for codecs that learn from a model before they are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ..errors import UsageError
from .windows import Text, choose_windows

if TYPE_CHECKING:
    from .arrays import KVArrays
    from .engine import Engine

T = TypeVar("T")

FRAMES, WINDOWS = 2048, 16


@dataclass
class Calibration:
    """What codecs may learn from: ``n_windows`` caches of ``frames`` tokens of a text.

    Computed when first asked for and kept for the codecs that follow.
    """

    engine: Engine
    text: Text
    frames: int = FRAMES
    n_windows: int = WINDOWS
    seed: int = 0
    _learnt: dict[str, object] = field(default_factory=dict)

    def caches(self) -> Iterator[KVArrays]:
        """The caches, one after another (they are not kept)."""
        documents = [self.engine.tokenize(document) for document in self.text.documents]
        frames = min(self.frames, self.engine.max_positions)
        for window in choose_windows(documents, frames, self.n_windows, self.seed):
            yield self.engine.prefill(window.tokens)

    def learn(self, name: str, function: Callable[[Calibration], T]) -> T:
        """``function(self)``, computed once for each name."""
        if name not in self._learnt:
            self._learnt[name] = function(self)
        return self._learnt[name]  # type: ignore[return-value]


def check_disjoint(text: Text, calibration: Text) -> None:
    """`UsageError` if a document is in both texts: codecs are tried on what they have not seen."""
    shared = set(_stripped(text.documents)) & set(_stripped(calibration.documents))
    if shared:
        first = min(shared)[:40].replace("\n", " ")
        raise UsageError(
            f"{calibration.name}: shares {len(shared)} documents with {text.name} (one begins "
            f"{first!r}); calibrate on other text"
        )


def _stripped(documents: Sequence[str]) -> Iterator[str]:
    return (document.strip() for document in documents)
