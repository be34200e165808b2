"""Tier ``tokens``: no frames are stored, only what they can be computed again from.

That is the token ids and the model's fingerprint. A snapshot is taken only if a prefill of its
tokens leads to it: one sequence, every token known, no position left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .archived_track import ArchivedTrack, is_absent
from .container.records import FrameRun
from .container.writer import ContainerWriter, EncodedChunk
from .context import FrameContext
from .errors import UnsupportedError, UsageError
from .model import Snapshot, Track
from .temporal import SHIFT

if TYPE_CHECKING:
    from .archive import Archive
    from .book_codec import BookCodec

Rows = NDArray[np.uint8]
Span = tuple[int, int]


class TokensCoder:
    """A `tscfile.lossy_coding.LossyCoder` that leaves the frames out."""

    from_tokens = True

    def __init__(self, codec: BookCodec | None = None) -> None:
        """``codec``: of a book whose tables make the token ids shorter."""
        self.token_coder = codec.token_coder if codec else None
        self.facts: dict[str, Any] = {}
        if codec is not None and self.token_coder is not None:
            self.facts["book"] = codec.id

    def begin(
        self, writer: ContainerWriter, snapshot: Snapshot, track: Track, ranges: Sequence[Span]
    ) -> Callable[[Span], list[EncodedChunk]]:
        return _encode_nothing

    def takes(self, old: ArchivedTrack, run: FrameRun) -> bool:
        return is_absent(old.archive.block(run))

    def distance(
        self, old: ArchivedTrack, run: FrameRun, rows: Sequence[Rows], context: FrameContext
    ) -> NDArray[np.float64]:
        """Frames that are not stored either, and come from the same tokens, are the same."""
        return np.full(len(context.pos), np.inf if context.shift else 0.0)


def _encode_nothing(span: Span) -> list[EncodedChunk]:
    raise AssertionError("this tier stores no frames")


def check_recomputable(snapshot: Snapshot) -> None:
    """`UsageError` or `UnsupportedError` unless a prefill of its tokens gives the snapshot again,
    in the model that its identity names; `MismatchError` if that one has other shapes."""
    from .resume.guards import check_shape

    tier = "tier tokens stores what frames are recomputed from"
    if not len(snapshot.tokens):
        raise UsageError(f"{tier}, and the save has no token list; take another tier")
    if "weights_blake3" not in snapshot.identity.facts:
        raise UsageError(f"{tier}, so the model must be known; name it with --model")
    # Once the rows are gone nothing else tells that another model was named.
    check_shape(snapshot, snapshot.identity, "the model named")
    tracks = [track for track in snapshot.tracks if len(track.cells)]
    if not tracks:
        raise UnsupportedError(f"{tier}, and the save has none; take another tier")
    last = max(int(track.cells.pos.max()) for track in tracks)
    for track in tracks:
        _check_cells(track, len(snapshot.tokens), tier)
    if not any(len(track.cells) == last + 1 for track in tracks):
        raise UnsupportedError(
            f"{tier}, and the save lacks positions before {last}; take another tier"
        )
    if int(snapshot.tokens[: last + 1].min()) < 0:
        raise UnsupportedError(f"{tier}, and the save has images or sound; take another tier")


def _check_cells(track: Track, n_tokens: int, tier: str) -> None:
    cells = track.cells
    if (cells.seq_counts != 1).any() or len(np.unique(cells.seq_ids)) > 1:
        raise UnsupportedError(
            f"{tier}, and the save has cells of several sequences; take another tier"
        )
    inside = (cells.pos >= 0) & (cells.pos < n_tokens)
    if not inside.all() or len(np.unique(cells.pos)) < len(cells):
        raise UnsupportedError(
            f"{tier}, and the save has cells without a token of their own; take another tier"
        )


def check_never_shifted(archive: Archive, number: int) -> None:
    """`UsageError` for a snapshot that goes back to a context shift: frames that have moved are not
    what a prefill of its tokens gives."""
    ancestor: int | None = number
    while ancestor is not None:
        if archive.record(ancestor).plan == SHIFT:
            raise UsageError(
                f"{archive.path}: snapshot {number} has frames that have moved, which its tokens "
                "do not lead to; drop it with tsc compact first"
            )
        ancestor = archive.head(ancestor).parent
