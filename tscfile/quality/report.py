"""A report as JSON and as a table for people."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from .protocol import CodecResult, Quality, Reference, Report, WindowPlace

if TYPE_CHECKING:
    from rich.table import Table

    from .names import NameReport


def to_json(report: Report | NameReport) -> str:
    """Indented JSON with every list of numbers on one line; full precision."""
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def from_json(text: str) -> Report:
    """Undo `to_json`."""
    plain = json.loads(text)
    references = [_reference(each) for each in plain["references"]]
    return Report(plain["conditions"], references, [_result(each) for each in plain["results"]])


def _reference(plain: dict[str, Any]) -> Reference:
    places = [WindowPlace(**place) for place in plain["windows"]]
    return Reference(
        plain["frames"], places, _quality(plain["forgetting"]),  # type: ignore[arg-type]
        _quality(plain["forgetting_recall"]),
    )  # fmt: skip


def _result(plain: dict[str, Any]) -> CodecResult:
    measured = {name: _quality(plain[name]) for name in ("continuation", "recall")}
    rest = {each.name: plain[each.name] for each in fields(CodecResult)}
    return CodecResult(**{**rest, **measured})


def _quality(plain: dict[str, Any] | None) -> Quality | None:
    return None if plain is None else Quality(**plain)


# --- tables -----------------------------------------------------------------------------------

_COLUMNS = (
    "codec", "bits/value", "ratio", "series", "KL", "KL p99", "of forgetting", "top-1", "Δ ppl",
    "recall ppl", "recall acc", "enc MB/s", "dec MB/s", "book",
)  # fmt: skip


def tables(report: Report) -> list[Table]:
    """A rich table for each length of context."""
    from rich.table import Table

    found = []
    for reference in report.references:
        table = Table(title=_title(report, reference), title_justify="left")
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name == "codec" else "right", no_wrap=True)
        for row in rows(report, reference.frames):
            table.add_row(*row)
        found.append(table)
    return found


def markdown(report: Report, frames: int) -> str:
    """The table of one length of context for a README."""
    lines = [_COLUMNS, ("---", *["--:"] * (len(_COLUMNS) - 1)), *rows(report, frames)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows(report: Report, frames: int) -> list[tuple[str, ...]]:
    """Cells under `_COLUMNS`: forgetting first, then every codec."""
    reference = report.reference(frames)
    forgetting = ("(forgetting)", "-", "-", "-", *_quality_cells(reference.forgetting, 1.0),
                  *_recall_cells(reference.forgetting_recall), "-", "-", "-")  # fmt: skip
    return [forgetting] + [
        (
            each.codec, f"{each.bits_per_value:.3f}", f"{each.snapshot_ratio:.2f}",
            "-" if each.series_ratio is None else f"{each.series_ratio:.2f}",
            *_quality_cells(each.continuation, each.kl_of_forgetting),
            *_recall_cells(each.recall), f"{each.encode_mb_s:.0f}", f"{each.decode_mb_s:.0f}",
            f"{each.book_bytes / 1e6:.2f} MB" if each.book_bytes else "-",
        )
        for each in report.results
        if each.frames == frames
    ]  # fmt: skip


def _quality_cells(quality: Quality, share: float) -> tuple[str, ...]:
    return (
        _kl(quality.kl_mean), _kl(quality.kl_p99), f"{100 * share:.2f} %", f"{quality.top1:.4f}",
        f"{quality.perplexity_delta:+.3f}",
    )  # fmt: skip


def _recall_cells(quality: Quality | None) -> tuple[str, str]:
    if quality is None:
        return "-", "-"
    return f"{quality.perplexity:.2f}", f"{quality.accuracy:.3f}"


def _kl(value: float) -> str:
    """
    >>> _kl(0.0), _kl(2.8e-6), _kl(0.00512)
    ('0', '2.8e-06', '0.0051')
    """
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-4 else f"{value:.4f}"


def _title(report: Report, reference: Reference) -> str:
    forgetting, recall = reference.forgetting, reference.forgetting_recall
    words = (
        f"{report.conditions['model']}, {reference.frames} frames, {len(reference.windows)} "
        f"windows, {forgetting.n_predictions} predictions, "
        f"perplexity {forgetting.perplexity_original:.2f}"
    )
    if recall is None:
        return words
    return (
        f"{words}; recall: perplexity {recall.perplexity_original:.2f}, "
        f"accuracy {recall.accuracy_original:.3f}"
    )
