"""Codecs by name: tiers of tscfile, and the peers they are measured against.

A list of names may hold the names of groups: ``peers`` is all of them, ``kvtc``, ``kivi``, … those
whose names begin so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import UsageError
from ..tiers import TIERS
from .calibration import Calibration
from .codec import Codec, TierCodec

PEERS = "peers"
NO_BOOK = "-nobook"
"""Behind the name of a tier: without the book that is given for the others."""


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


def names() -> list[str]:
    """All names, tiers first."""
    return [*TIERS, *_without_book(), *fixed_peers(), *learnt_peers()]


def _without_book() -> dict[str, str]:
    """Tiers that need no book but may have one, by the name of measuring them without."""
    able = [name for name, tier in TIERS.items() if tier.tolerance or tier.exact]
    return {f"{name}{NO_BOOK}": name for name in able}


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
    fixed, learnt = fixed_peers(), learnt_peers()
    codecs = []
    for name in chosen:
        if name in TIERS:
            codecs.append(TierCodec(name, book))
        elif name in _without_book():
            codecs.append(TierCodec(_without_book()[name], name=name))
        elif name in fixed:
            codecs.append(fixed[name])
        elif calibration is None:
            raise UsageError(f"{name} learns from calibration text; give one with --calibration")
        else:
            codecs.append(learnt[name](calibration))
    return codecs


def _expand(name: str) -> Iterator[str]:
    known = names()
    if name in known:
        yield name
        return
    found = [
        each for each in known
        if each not in TIERS and each not in _without_book()
        and (name == PEERS or each.startswith(f"{name}-"))
    ]  # fmt: skip
    if not found:
        raise UsageError(f"codec {name!r} is unknown; known are {', '.join(known)} and {PEERS}")
    yield from found
