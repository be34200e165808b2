"""How a lossless tier codes with a book: exactly, wherever that makes a block smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import blocks, pipeline, registry
from .container.writer import EncodedChunk
from .context import FrameContext
from .model import ModelIdentity, Snapshot, TensorSpec, Track

if TYPE_CHECKING:
    from .book_codec import BookCodec
    from .entropy.token_ids import TokenCoder
    from .transforms.turning import Turn

Rows = NDArray[np.uint8]


class ExactCoder:
    """Codes tracks of a type that books take exactly; see `tscfile.lossy_coding.LossyCoder` for
    ``facts`` and ``token_coder``."""

    def __init__(self, codec: BookCodec) -> None:
        self._codec = codec
        self.token_coder: TokenCoder | None = codec.token_coder
        self.facts: dict[str, Any] = {"book": codec.id, "rope_pairing": codec.pairing}

    @classmethod
    def of(cls, codec: BookCodec, tracks: Sequence[Track]) -> ExactCoder | None:
        """None if the book has no tables for exact coding, or none of the tracks is of a type that
        is coded. `MismatchError` for a track of other shapes than the book's."""
        coder = cls(codec)
        taken = [coder.takes(track.tensors) for track in tracks]
        return coder if any(taken) else None

    def takes(self, tensors: Sequence[TensorSpec]) -> bool:
        exact = self._codec.exact
        if exact is None or not tensors or not exact.takes_types(tensors):
            return False
        self._codec.check(tensors, "pack")
        return True

    def begin(
        self, snapshot: Snapshot, track: Track
    ) -> Callable[[tuple[int, int], Sequence[Rows]], EncodedChunk] | None:
        """What codes frames ``start`` to ``stop`` of a track, given their rows; None if nothing
        does."""
        exact = self._codec.exact
        if exact is None or not self.takes(track.tensors):
            return None

        def encode(span: tuple[int, int], rows: Sequence[Rows]) -> EncodedChunk:
            context = FrameContext(track.cells.pos[slice(*span)], snapshot.tokens)
            return exact.encode(rows, track.tensors, context)

        return encode


def encode_exact(
    rows: Sequence[Rows], tensors: Sequence[TensorSpec], whole: EncodedChunk | None, layer: int
) -> list[EncodedChunk]:
    """The chunks of an exact quality layer: ``whole``, which codes all tensors with a book, where
    that is the smaller, else those of codec 1."""
    chunks = [
        pipeline.encode_chunk(
            rows[a:b], tensors[a].dtype, a, registry.FIELDS_CLASSED_RANS, layer
        )
        for a, b in blocks.chunk_ranges(tensors)
    ]  # fmt: skip
    if whole is not None and len(whole.body) < sum(len(chunk.body) for chunk in chunks):
        return [EncodedChunk(replace(whole.header, quality_layer=layer), whole.body)]
    return chunks


def encode_difference(
    rows: Sequence[Rows], base: Sequence[Rows], tensors: Sequence[TensorSpec],
    identity: ModelIdentity, shift: int, chunks: Sequence[EncodedChunk],
) -> EncodedChunk | None:  # fmt: skip
    """A chunk of all tensors as the difference to ``base``, frames that have moved by ``shift``
    positions; None unless it is smaller than ``chunks``, which stand for themselves."""
    from .difference_codec import encode_chunk
    from .turns import fit_turn, turn_of

    turns: list[Turn | None] = [None]
    if shift:
        # Keys that were saved before the engine turned them are as they were.
        turn = turn_of(identity, tensors, shift) or fit_turn(rows, base, tensors, identity)
        turns += [turn] if turn else []
    made = [encode_chunk(rows, base, tensors, each) for each in turns]
    best = min(made, key=lambda chunk: len(chunk.body))
    smallest = sum(len(chunk.body) for chunk in chunks)
    return best if len(best.body) < smallest else None
