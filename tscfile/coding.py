"""How the frames of a new snapshot are coded: its tiers, and what does the work for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .archive import Archive
from .container.snapshots import SnapshotRecord
from .errors import UsageError
from .exact_coding import ExactCoder
from .lossy_coding import BookCoder, LossyCoder, SessionCoder, Target, is_step, step_of_ratio
from .model import Snapshot
from .product_coding import BookProductCoder, ProductOptions, SessionProductCoder
from .tiers import CUSTOM, Tier
from .tokens_tier import TokensCoder, check_recomputable

if TYPE_CHECKING:
    from .book_codec import BookCodec
    from .entropy.token_ids import TokenCoder

Book = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Coding:
    """``tiers``: one, or those of the quality layers, the base first. ``lossy``: what codes the
    lossy ones, if there are any; ``exact``: what codes the exact one with a book, if it has one."""

    tiers: Sequence[Tier]
    lossy: LossyCoder | None = None
    exact: ExactCoder | None = None

    @property
    def finest(self) -> Tier:
        return self.tiers[-1]

    @property
    def names(self) -> list[str]:
        return [tier.name for tier in self.tiers]

    @cached_property
    def token_coder(self) -> TokenCoder | None:
        """What token ids are coded with, if there are tables for them."""
        coder = self.lossy or self.exact
        return coder.token_coder if coder else None

    def facts(self) -> dict[str, Any]:
        """What the snapshot records; complete once all tracks are stored."""
        facts: dict[str, Any] = {}
        for coder in (self.lossy, self.exact):
            facts |= coder.facts if coder else {}
        if len(self.tiers) > 1:
            facts["layers"] = self.names
        return facts


def choose(
    tiers: Sequence[Tier], book: Book, snapshot: Snapshot, target: Target,
    archive: Archive | None = None, parent: SnapshotRecord | None = None,
) -> Coding:  # fmt: skip
    """The coding in these tiers with the ``book`` given, that of the ``parent`` in ``archive``, or
    what the snapshot itself teaches."""
    lossy = [tier for tier in tiers if not tier.exact]
    if lossy and lossy[0].codec is None:
        check_recomputable(snapshot)
    inherits = parent is not None and "book" in parent.coding
    if not lossy:
        # An exact save has no need of the book of a lossy one.
        inherits = inherits and parent is not None and parent.tier == tiers[-1].name
    codec: BookCodec | None = None
    if book is not None:
        from .book_codec import BookCodec
        from .books.book import load

        codec = BookCodec(load(book), snapshot.identity, os.fspath(book))
    elif inherits:
        assert archive is not None and parent is not None
        codec = archive.book_codec(parent)
    exact = None
    if tiers[-1].exact and codec is not None:
        # Frames that are shared with the parent's may need its book.
        exact = ExactCoder.of(codec, snapshot.tracks) or (ExactCoder(codec) if inherits else None)
    if not lossy:
        return Coding(tiers, None, exact)
    if lossy[0].codec is None:
        return Coding(tiers, TokensCoder(codec))
    product = target.product
    if product is None and CUSTOM in lossy and parent is not None:
        product = ProductOptions.of(parent.coding)
    if codec is None:
        return Coding(tiers, _without_book(lossy, target, product, archive, parent))
    if product is not None:
        return Coding(tiers, BookProductCoder(codec, product, f"book {codec.id[:16]}"))
    return Coding(tiers, BookCoder(codec, _steps(codec, lossy, snapshot, target, parent)), exact)


def _without_book(
    lossy: Sequence[Tier], target: Target, product: ProductOptions | None,
    archive: Archive | None, parent: SnapshotRecord | None,
) -> LossyCoder:  # fmt: skip
    if product is not None:
        return SessionProductCoder(product, archive, parent)
    if target != Target():
        raise UsageError("a target KL or ratio needs a book: give it with --book")
    if len(lossy) > 1:
        raise UsageError("more than one lossy tier needs a book: give it with --book")
    if not lossy[0].tolerance:
        raise UsageError(f"tier {lossy[0].name} needs a book: give it with --book")
    return SessionCoder(lossy[0], archive, parent)


def _steps(
    codec: BookCodec, lossy: Sequence[Tier], snapshot: Snapshot, target: Target,
    parent: SnapshotRecord | None,
) -> list[int]:  # fmt: skip
    """The step of each lossy tier."""
    if CUSTOM not in lossy:
        return [codec.book.tier(tier.name).log_step for tier in lossy]
    if target.kl is not None:
        return [codec.book.step_of_kl(target.kl)]
    if target.ratio is not None:
        return [step_of_ratio(codec, snapshot, target.ratio)]
    if parent is not None and is_step(parent.coding.get("log_step")):
        return [parent.coding["log_step"]]
    raise UsageError("tier custom says no step; give a tier, a target KL or a target ratio")
