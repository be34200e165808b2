"""Rate-distortion plot: KL against bits per value, both logarithmic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

from ..errors import TscError
from .protocol import CodecResult, Report

_OURS = "tscfile"
_COLOURS = (
    "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
    "#5f5f5f", "#7f7f00", "#393b79", "#ad494a",
)  # fmt: skip
_MARKERS = "osD^vP*X<>"
_BITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8, 16)


def draw(report: Report, path: Path) -> None:
    """Write the plot, one panel for each length of context; the suffix of ``path`` chooses the
    format. `TscError` if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise TscError("a plot needs matplotlib: pip install 'tscfile[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    n = len(report.references)
    figure, panels = pyplot.subplots(1, n, figsize=(9 * n, 7.5), squeeze=False, sharey=True)
    families = list(dict.fromkeys(each.family for each in report.results))
    for panel, reference in zip(panels[0], report.references, strict=True):
        results = [each for each in report.results if each.frames == reference.frames]
        _furnish(panel, reference.frames, reference.forgetting.kl_mean)
        labels: list[tuple[str, float, float, str]] = []
        for number, family in enumerate(families):
            points = [each for each in results if each.family == family]
            labels += _curve(panel, points, family, number, _floor(report.results))
        _ticks(panel, _floor(report.results))
        _label(panel, labels)
    panels[0][0].legend(loc="lower left", fontsize=8, framealpha=0.9)
    conditions = report.conditions
    figure.suptitle(
        f"{conditions['model']} on {conditions['text']}, {conditions['n_windows']} windows; "
        "books not counted"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _floor(results: Sequence[CodecResult]) -> float:
    """Where exact codecs are drawn: zero has no place on a logarithmic axis."""
    return min((kl for each in results if (kl := each.continuation.kl_mean)), default=1e-3) / 5


def _curve(
    panel: Any, points: Sequence[CodecResult], family: str, number: int, floor: float
) -> list[tuple[str, float, float, str]]:
    """Draw one family; returns the labels of its points, where they are and their colour."""
    points = sorted(points, key=lambda each: each.bits_per_value)
    x = [each.bits_per_value for each in points]
    y = [each.continuation.kl_mean or floor for each in points]
    ours = family == _OURS
    colour = "black" if ours else _COLOURS[number % len(_COLOURS)]
    marker = _MARKERS[number % len(_MARKERS)]
    # Lossless points are no part of a curve: between them and the others lies no rate.
    exact = [each.continuation.kl_mean == 0 for each in points]
    lossy = [i for i, each in enumerate(exact) if not each]
    panel.plot(
        [x[i] for i in lossy], [y[i] for i in lossy], color=colour, linewidth=2.2 if ours else 1.2
    )
    panel.plot(x, y, color=colour, marker=marker, label=family, markersize=5, linestyle="none")
    return list(zip(_names(points), x, y, [colour] * len(points), strict=True))


def _names(points: Sequence[CodecResult]) -> list[str]:
    """Names of the points of a curve; of three or more, all but one without what they share."""
    names = [each.codec for each in points]
    shared = commonprefix(names).rfind("-") + 1
    if len(names) < 3 or not shared:
        return names
    return [names[0], *(name[shared:] for name in names[1:])]


def _furnish(panel: Any, frames: int, forgetting: float) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.axhline(forgetting, color="grey", linestyle="--", linewidth=1)
    panel.annotate(
        "forgetting", (1, forgetting), xycoords=("axes fraction", "data"), xytext=(-4, 3),
        textcoords="offset points", ha="right", fontsize=8, color="grey",
    )  # fmt: skip
    panel.set_xlabel("bits per value, and ratio to fp16")
    panel.set_ylabel("mean KL(original ‖ restored), nats")
    panel.set_title(f"{frames} frames", fontsize=10)
    panel.grid(True, which="major", alpha=0.3)


def _ticks(panel: Any, floor: float) -> None:
    panel.margins(x=0.08)
    low, high = panel.get_xlim()
    shown = [bits for bits in _BITS if low <= bits <= high]
    panel.set_xticks(shown, [f"{bits:g}\n{16 / bits:g}×" for bits in shown])
    panel.set_xticks([], minor=True)
    panel.axhline(floor, color="grey", linestyle=":", linewidth=1)
    panel.annotate(
        "exact (KL 0)", (0.45, floor), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="center", fontsize=8, color="grey",
    )  # fmt: skip


# --- labels -----------------------------------------------------------------------------------


def _label(panel: Any, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Put each label where it hides no point and no other label, as near as can be."""
    panel.figure.canvas.draw()
    to_pixels, renderer = panel.transData.transform, panel.figure.canvas.get_renderer()
    taken = []
    for _, x, y, _ in labels:
        px, py = to_pixels((x, y))
        taken.append((px - 4, py - 4, px + 4, py + 4))
    for name, x, y, colour in labels:
        note = panel.annotate(
            name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=7.5, color=colour
        )
        for offset, horizontal, vertical in _places():
            note.set_position(offset)
            note.set_ha(horizontal)
            note.set_va(vertical)
            box = note.get_window_extent(renderer).extents
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(tuple(box))


def _places() -> Iterator[tuple[tuple[float, float], str, str]]:
    """Offsets in points around a marker, near ones first, and how text is aligned there."""
    for distance in (5, 12, 20, 30):
        for dx, dy in ((1, 0.6), (0, 1.2), (0, -1.2), (-1, -0.6), (1, -0.6), (-1, 0.6)):
            horizontal = {1: "left", -1: "right", 0: "center"}[dx]
            vertical = "bottom" if dy > 0 else "top"
            yield (dx * distance, dy * distance), horizontal, vertical


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
