"""Codecs by name: tiers of tscfile, and the peers they are measured against.

A list of names may hold the names of groups: ``peers`` is all of them, ``kvtc``, ``kivi``, … those
whose names begin so, ``pq`` and ``kl`` the points of two curves. ``delta`` is token-position delta,
by itself (`page_delta`) and before the coder of the tiers (`book_delta`). ``archive+balanced`` are
quality layers, read at the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..product_coding import ProductOptions
from ..tiers import TIERS as ALL_TIERS
from .calibration import Calibration
from .codec import Codec, TierCodec

PEERS = "peers"
PRODUCT_BYTES = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
"""Bytes of a frame that product quantization is measured with."""

PRODUCT_BYTES_NO_BOOK = (192, 384, 768)
"""The same without a book, for frames of 1536 channels."""

TARGET_KLS = (0.0005, 0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.022, 0.03, 0.05)
"""KLs that the transform of a book is asked for: points of its curve between the tiers."""
DELTA = "delta-"
"""How names of token-position deltas begin, which are no peers."""

NO_BOOK = "-nobook"
"""Behind the name of a tier: without the book that is given for the others."""

TIERS = {name: tier for name, tier in ALL_TIERS.items() if tier.codec is not None}
"""Those that keep frames."""


def _kvtc(ratio: int, window: int) -> Callable[[Calibration], Codec]:
    from .peers.kvtc import Kvtc

    return lambda calibration: Kvtc(ratio, calibration, window)


def _pca(step: float) -> Callable[[Calibration], Codec]:
    from .peers.pca import PcaUniform

    return lambda calibration: PcaUniform(step, calibration)


def fixed_peers() -> dict[str, Codec]:
    """Peers that learn nothing, by name."""
    from .peers import ggml, kivi, plain, rotated, turboquant

    codecs: list[Codec] = [
        plain.RawFp16(),
        plain.Zstd(),
        ggml.GgmlCache("q8_0"),
        ggml.GgmlCache("q4_0"),
        *(kivi.Kivi(bits, residual=residual) for residual in (128, 0) for bits in (4, 2)),
        rotated.RotatedUniform(),
        *(turboquant.TurboQuant(*bits) for bits in ((4, 4), (3, 3), (2, 2), (4, 2))),
    ]
    return {codec.name: codec for codec in codecs}


def learnt_peers() -> dict[str, Callable[[Calibration], Codec]]:
    """How to make the peers that need calibration text, by name."""
    from .peers import kvtc, pca

    makers: dict[str, Callable[[Calibration], Codec]] = {}
    for window in kvtc.WINDOWS:
        prefix = "kvtc" if window == kvtc.WINDOWS[0] else f"kvtc-w{window}"
        makers |= {f"{prefix}-{ratio}x": _kvtc(ratio, window) for ratio in kvtc.RATIOS}
    return makers | {f"pca-{step:g}": _pca(step) for step in pca.STEPS}


def deltas() -> dict[str, Callable[[Calibration | None, Path | None], Codec]]:
    """How to make the token-position deltas, by name."""
    from . import book_delta, page_delta

    literal = {name: _given(codec) for name, codec in page_delta.codecs().items()}
    return literal | {name: _book_delta(name) for name in book_delta.settings()}


def _given(codec: Codec) -> Callable[[Calibration | None, Path | None], Codec]:
    return lambda calibration, book: codec


def _book_delta(name: str) -> Callable[[Calibration | None, Path | None], Codec]:
    from .book_delta import BookDelta, settings

    def make(calibration: Calibration | None, book: Path | None) -> Codec:
        if book is None or calibration is None:
            raise UsageError(f"{name} needs a book and calibration text: --book, --calibration")
        tier, every, plain = settings()[name]
        return BookDelta(tier, book, calibration, every, plain)

    return make


def names() -> list[str]:
    """All names, tiers first."""
    return [
        *TIERS, *_without_book(), *_dials(), *fixed_peers(), *learnt_peers(), *deltas()
    ]  # fmt: skip


def _without_book() -> dict[str, str]:
    """Tiers that need no book but may have one, by the name of measuring them without."""
    return {f"{n}{NO_BOOK}": n for n, tier in TIERS.items() if tier.tolerance or tier.exact}


def _dials() -> dict[str, dict[str, Any]]:
    """Options of `tscfile.pack` beside the tiers: ``pq-4`` is product quantization at 4 bytes a
    frame, ``kl-0.01`` the step of which the book expects that KL."""
    products = {f"pq-{n:g}": {"product": ProductOptions(n)} for n in PRODUCT_BYTES}
    products |= {
        f"pq{NO_BOOK}-{n}": {"product": ProductOptions(n)} for n in PRODUCT_BYTES_NO_BOOK
    }
    return products | {f"kl-{kl:g}": {"target_kl": kl} for kl in TARGET_KLS}


def runnable(calibrated: bool, has_book: bool) -> list[str]:
    """Names of all codecs that can be made with, or without, calibration text and a book."""
    can = [name for name, tier in TIERS.items() if has_book or tier.exact or tier.tolerance]
    tiers = [*can, *(_without_book() if has_book else ())]
    return [*tiers, *fixed_peers(), *(learnt_peers() if calibrated else ())]


def make_codecs(
    wanted: Sequence[str], *, calibration: Calibration | None = None, book: Path | None = None
) -> list[Codec]:
    """The codecs called ``wanted``, each once, in this order.

    ``book``: for the tiers; those named with `NO_BOOK` do without. Raises
    `UsageError` for an unknown name, and where a peer learns from calibration text and there is
    none.
    """
    chosen = list(dict.fromkeys(name for each in wanted for name in _expand(each)))
    fixed, learnt, delta = fixed_peers(), learnt_peers(), deltas()
    codecs: list[Codec] = []
    for name in chosen:
        if name in TIERS:
            codecs.append(TierCodec(name, book))
        elif "+" in name:
            codecs.append(TierCodec(name.split("+"), book, name))
        elif name in _dials():
            if name.startswith(f"pq{NO_BOOK}"):
                codecs.append(TierCodec(None, None, name, **_dials()[name]))
                continue
            if book is None:
                raise UsageError(f"{name} needs a book; give one with --book")
            codecs.append(TierCodec(None, book, name, **_dials()[name]))
        elif name in _without_book():
            codecs.append(TierCodec(_without_book()[name], name=name))
        elif name in fixed:
            codecs.append(fixed[name])
        elif name in delta:
            codecs.append(delta[name](calibration, book))
        elif calibration is None:
            raise UsageError(f"{name} learns from calibration text; give one with --calibration")
        else:
            codecs.append(learnt[name](calibration))
    return codecs


def _expand(name: str) -> Iterator[str]:
    known = names()
    if name in known or ("+" in name and set(name.split("+")) <= set(TIERS)):
        yield name
        return
    found = [
        each for each in known
        if each not in TIERS and each not in _without_book()
        and (
            each.startswith(f"{name}-")
            or (name == PEERS and each not in _dials() and not each.startswith(DELTA))
        )
    ]  # fmt: skip
    if not found:
        raise UsageError(f"codec {name!r} is unknown; known are {', '.join(known)} and {PEERS}")
    yield from found
