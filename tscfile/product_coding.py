"""How packing codes tracks by product quantization: with a book's codebooks, or the file's own."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import registry
from .archive import Archive
from .archived_track import ArchivedTrack
from .container.records import FrameRun
from .container.snapshots import SnapshotRecord
from .container.writer import ContainerWriter, EncodedChunk
from .context import FrameContext
from .errors import UsageError
from .model import Snapshot, Track

if TYPE_CHECKING:
    from .book_codec import BookCodec
    from .entropy.token_ids import TokenCoder
    from .product_session import SessionCodes
    from .session_basis import KeyTurn

Rows = NDArray[np.uint8]
Span = tuple[int, int]


@dataclass(frozen=True)
class ProductOptions:
    """``code_bytes``: about what frames take in the mean; with a book each takes what it is worth,
    the first and the newest ones more. ``fallback_above``: frames are kept exact whose error is
    more than so many times that of calibration frames, or without a book of the session's own; None
    for no frame."""

    code_bytes: float
    fallback_above: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.code_bytes < math.inf:
            raise UsageError("code bytes of a frame are a positive number")
        if self.fallback_above is not None and not 0 <= self.fallback_above < math.inf:
            raise UsageError("a fallback threshold is a number from 0 on")

    @classmethod
    def of(cls, coding: dict[str, Any]) -> ProductOptions | None:
        """Those that a snapshot was packed with; None if it was packed otherwise."""
        code_bytes, above = coding.get("code_bytes"), coding.get("fallback_above")
        if not isinstance(code_bytes, float | int):
            return None
        return cls(float(code_bytes), float(above) if isinstance(above, float | int) else None)

    def facts(self) -> dict[str, Any]:
        above = {} if self.fallback_above is None else {"fallback_above": self.fallback_above}
        return {"code_bytes": self.code_bytes, **above}


class BookProductCoder:
    """Codes with the codebooks of a book; a `tscfile.lossy_coding.LossyCoder`."""

    from_tokens = True

    def __init__(self, codec: BookCodec, options: ProductOptions, where: str) -> None:
        """`UsageError` if the book has no codebooks, or does not give so many code bytes."""
        from .books.product import RATES
        from .product_codec import BookDomain, ProductCodec

        self._domain = BookDomain(codec, where)
        self._codec, self._options = ProductCodec(self._domain), options
        if not RATES[0] <= options.code_bytes <= RATES[-1]:
            raise UsageError(
                f"{options.code_bytes:g} code bytes a frame: a book gives {RATES[0]:g} to "
                f"{RATES[-1]:g}"
            )
        self.token_coder: TokenCoder | None = codec.token_coder
        self._count = _Count({
            "book": codec.id, "rope_pairing": codec.pairing, **options.facts()
        })  # fmt: skip
        self.facts = self._count.facts

    def begin(
        self, writer: ContainerWriter, snapshot: Snapshot, track: Track, ranges: Sequence[Span]
    ) -> Callable[[Span], list[EncodedChunk]]:
        from .book_codec import steps_of
        from .entropy import ladder

        self._codec.check(track.tensors, "pack")
        n_positions = int(track.cells.pos.max(initial=-1)) + 1
        codes, above = self._domain.codes, self._options.fallback_above

        def encode(span: Span) -> list[EncodedChunk]:
            pos = track.cells.pos[slice(*span)]
            # What an error costs grows with the square of how much finer a step would be.
            finer = steps_of(pos, n_positions, 0) / ladder.UNITS_PER_OCTAVE
            worth = codes.worth_of(self._options.code_bytes) * np.exp2(2 * finer)
            limits = np.full(len(pos), math.inf)
            if above is not None:
                limits = above * codes.error_of(worth)
            coded = self._codec.encode(
                track.read(*span), track.tensors, FrameContext(pos, snapshot.tokens), worth, limits
            )
            self._count.add(coded.n_exact, track)
            return [coded.chunk]

        return encode

    def takes(self, old: ArchivedTrack, run: FrameRun) -> bool:
        _, payload, codebooks = _stored(old, run)
        return payload is not None and not codebooks and self._domain.codec.reads(old.codec())

    def distance(
        self, old: ArchivedTrack, run: FrameRun, rows: Sequence[Rows], context: FrameContext
    ) -> NDArray[np.float64]:
        where, payload, _ = _stored(old, run)
        assert payload is not None
        return self._codec.distance(payload, run.first, rows, old.tensors, context, where)


def _stored(old: ArchivedTrack, run: FrameRun) -> tuple[str, memoryview | None, int]:
    """The chunk of codec 6 that holds a run, None if it is of another codec; where it is, and the
    id of its codebooks, 0 for those of the book."""
    from .product_codec import codebook_of

    (chunk,) = old.archive.block(run).layer(-1)
    if chunk.codec != registry.PRODUCT:
        return "", None, 0
    where, (payload, *_) = old.lossy_payloads(run.block, chunk)
    return where, payload, codebook_of(payload, where)


class _Count:
    """Facts of a snapshot, with the frames that are kept exact counted by any thread."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        if "fallback_above" in facts:
            self.facts |= {"fallback_frames": 0, "fallback_bytes": 0}
        self._lock = threading.Lock()

    def add(self, n_exact: int, track: Track) -> None:
        if not n_exact:
            return
        n_bytes = n_exact * sum(tensor.row_bytes for tensor in track.tensors)
        with self._lock:
            for key, value in (("fallback_frames", n_exact), ("fallback_bytes", n_bytes)):
                self.facts[key] += value


class SessionProductCoder:
    """Codes with codebooks learnt from the new frames, or with the parent's; a
    `tscfile.lossy_coding.LossyCoder`."""

    from_tokens = False

    def __init__(
        self, options: ProductOptions, archive: Archive | None = None,
        parent: SnapshotRecord | None = None,
    ) -> None:  # fmt: skip
        """``parent``: the snapshot of ``archive`` that the new one is planned against."""
        self._options, self._archive = options, archive
        self.token_coder: TokenCoder | None = None
        self._old = archive.codebooks(parent) if archive and parent else []
        self._count = _Count(
            {**options.facts(), "keys": "as they stand", "codebooks": []}
        )
        self.facts = self._count.facts

    def begin(
        self, writer: ContainerWriter, snapshot: Snapshot, track: Track, ranges: Sequence[Span]
    ) -> Callable[[Span], list[EncodedChunk]]:
        from .product_codec import ProductCodec
        from .session_basis import key_turn
        from .session_codec import check

        check(track.tensors, "pack")
        turn = key_turn(snapshot.identity, track.tensors)
        if turn is not None:
            self.facts["keys"] = "turned back to position 0"
        if not ranges:
            return _nothing_to_encode
        codes = self._parents(track, turn) or self._learn(snapshot, track, turn, ranges)
        if not codes.id:
            codes.id = writer.add_codebooks(codes.write())
        self._note(codes.id)
        codec, above = ProductCodec(codes), self._options.fallback_above
        limit = math.inf if above is None else above * codes.error

        def encode(span: Span) -> list[EncodedChunk]:
            pos = track.cells.pos[slice(*span)]
            context, alike = FrameContext(pos, snapshot.tokens), np.zeros(len(pos))
            rows = track.read(*span)
            coded = codec.encode(rows, track.tensors, context, alike, alike + limit)
            self._count.add(coded.n_exact, track)
            return [coded.chunk]

        return encode

    def _parents(self, track: Track, turn: KeyTurn | None) -> SessionCodes | None:
        """The last of the parent's codebooks that are for these tensors."""
        from .product_session import SessionCodes
        from .session_basis import same_turn

        for number in reversed(self._old):
            assert self._archive is not None
            codes = self._archive.session_product(number, self._archive.path).domain
            assert isinstance(codes, SessionCodes)
            if same_turn(codes.turn, turn) and codes.fits(track.tensors):
                return codes
        return None

    def _learn(
        self, snapshot: Snapshot, track: Track, turn: KeyTurn | None, ranges: Sequence[Span]
    ) -> SessionCodes:
        from .product_session import learn_session
        from .session_learning import Sample

        cells = np.concatenate([np.arange(*span) for span in ranges])
        facts = snapshot.identity.facts
        head_dims = [
            int(facts[key]) for key in ("head_dim_k", "head_dim_v") if isinstance(
                facts.get(key), int) and facts[key] > 0
        ]  # fmt: skip
        sample = Sample(track, cells, turn)
        return learn_session(
            sample, track.tensors, turn, head_dims, self._options.code_bytes, len(cells)
        )

    def _note(self, codebooks: int) -> None:
        name = f"{codebooks:016x}"
        if name not in self.facts["codebooks"]:
            self.facts["codebooks"].append(name)

    def takes(self, old: ArchivedTrack, run: FrameRun) -> bool:
        _, _, codebooks = _stored(old, run)
        if codebooks:
            self._note(codebooks)
        return bool(codebooks)

    def distance(
        self, old: ArchivedTrack, run: FrameRun, rows: Sequence[Rows], context: FrameContext
    ) -> NDArray[np.float64]:
        where, payload, _ = _stored(old, run)
        assert payload is not None
        codec = old.product_codec(payload, where)
        return codec.distance(payload, run.first, rows, old.tensors, context, where)


def _nothing_to_encode(span: Span) -> list[EncodedChunk]:
    raise AssertionError("no frames were announced")
