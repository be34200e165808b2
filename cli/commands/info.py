"""``tsc info``"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..options import archive_argument, json_option, print_json, printable, size
from ..tree import draw

if TYPE_CHECKING:
    from tscfile.description import ArchiveInfo, TensorGroup
    from tscfile.explanation import PlanInfo


@click.command("info")
@archive_argument
@click.option("--tree", is_flag=True, help="Draw the snapshots by their parents: branches show.")
@click.option("--plan", is_flag=True, help="Say how each snapshot was stored, and what that saved.")
@json_option
def command(archive: Path, tree: bool, plan: bool, as_json: bool) -> None:
    """Say what ARCHIVE holds: model, layers, snapshots, tiers and ratios."""
    from tscfile.archive import Archive
    from tscfile.description import describe
    from tscfile.explanation import explain

    if tree and plan:
        raise click.UsageError("give one of --tree and --plan")
    with Archive(archive) as opened:
        if plan:
            plans = explain(opened)
            if as_json:
                print_json(plans)
            for line in () if as_json else _plans(opened.path, plans):
                click.echo(printable(line))
            return
        info = describe(opened)
    if as_json:
        print_json(info)
        return
    for line in _tree(info) if tree else _lines(info):
        click.echo(printable(line))


def _tree(info: ArchiveInfo) -> Iterator[str]:
    """One line for each snapshot: what it shares with its parent, what it has beyond that."""
    graph = list(draw([row.parent for row in info.snapshots]))
    width = max((len(before) for before, _ in graph), default=0)
    yield f"{info.path}: {len(graph)} snapshots"
    if graph:
        yield f"  {'':<{width}}{'#':>4}  {'plan':<16}{'tokens shared + new':>20}{'added':>10}  name"
    for before, number in graph:
        row = info.snapshots[number]
        common = row.n_tokens_common
        shared = f"{'?' if common is None else common} + {row.n_tokens - (common or 0)}"
        yield f"  {before:<{width}}{number:>4}  {row.plan:<16}{shared:>20}" + (
            f"{size(row.added_bytes):>10}  {row.name}"
        )


def _plans(path: str, plans: list[PlanInfo]) -> Iterator[str]:
    """How each snapshot was stored: frames, their positions, how far they moved, bytes."""
    yield f"{path}: {len(plans)} snapshots"
    for info in plans:
        against = "" if info.parent is None else f" to snapshot {info.parent}"
        apart = ""
        if info.max_delta_error is not None:
            apart = f"; max delta error {info.max_delta_error:.3g}"
        stored = f"{info.tier}: {size(info.frame_bytes)} of frames"
        yield f"  {info.number}: {info.plan}{against}, {stored}"
        yield f"     stored anew they would take about {size(info.keyframe_bytes)}{apart}"
        several = len({(part.cache, part.stream) for part in info.parts}) > 1
        for part in info.parts:
            place = f"cache {part.cache} stream {part.stream}, " if several else ""
            moved = f", moved by {part.moved:+d}" if part.moved else ""
            cost = f", {size(part.n_bytes)}" if part.n_bytes else ""
            positions = f"{part.first}-{part.last}" if part.last > part.first else str(part.first)
            yield f"     {part.kind:<11}{part.n_frames:>7} frames, {place}positions {positions}" + (
                f"{moved}{cost}"
            )


def _lines(info: ArchiveInfo) -> Iterator[str]:
    yield f"{info.path}: tsc {info.format_version}, {size(info.file_bytes)}, {info.n_blocks} blocks"
    if info.torn_bytes:
        yield f"  torn       the last {info.torn_bytes} bytes are no whole commit"
    if info.source:
        yield f"  source     {_facts(info.source)}"
    yield f"  model      {_facts(info.identity) or 'not recorded (pack --model records it)'}"
    for group in info.tensors:
        yield f"  tensors    {_tensors(group)}"
    yield f"  codecs     {', '.join(info.codecs) or 'none'}"
    for coding in _codings(info):
        yield f"  coding     {_facts(coding)}"
    if not info.snapshots:
        return
    absent = [row for row in info.snapshots if row.n_absent]
    if absent:
        yield (
            f"  recompute  {absent[-1].n_absent} frames of snapshot {absent[-1].number} are not "
            "stored: resume or unpack with --recompute and --model"
        )
    yield ""
    yield f"  {'#':>3}  {'plan':<16}{'parent':>6}  {'tier':<10}{'tokens':>8}{'frames':>8}" + (
        f"{'raw':>10}{'restore':>10}{'ratio':>10}  name"
    )
    for row in info.snapshots:
        parent = "-" if row.parent is None else str(row.parent)
        yield f"  {row.number:>3}  {row.plan:<16}{parent:>6}  {row.tier:<10}{row.n_tokens:>8}" + (
            f"{row.n_frames:>8}{size(row.raw_bytes):>10}{size(row.restore_bytes):>10}"
            f"{row.ratio:>9.2f}x  {row.name}"
        )
        for layer in row.layers if len(row.layers) > 1 else ():
            yield " " * 31 + f"{layer.tier:<10}{'':>26}{size(layer.restore_bytes):>10}" + (
                f"{layer.ratio:>9.2f}x"
            )
    yield ""
    yield f"  snapshot ratio {info.snapshot_ratio:.3f}x   series ratio {info.series_ratio:.3f}x"


def _codings(info: ArchiveInfo) -> list[dict[str, object]]:
    """What the lossy snapshots need and promise, each once."""
    found: list[dict[str, object]] = []
    for row in info.snapshots:
        # Lists are for decoders and appenders, and differ from save to save.
        coding = {key: value for key, value in row.coding.items() if not isinstance(value, list)}
        if coding and coding not in found:
            found.append(coding)
    return found


def _facts(facts: dict[str, object]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in facts.items())


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text[:16]}…" if len(text) == 64 else text


def _tensors(group: TensorGroup) -> str:
    last = group.first_layer + group.n_layers - 1
    rotation = {0: "", -1: ", rotation unknown"}.get(group.rotation, f", rotated {group.rotation}")
    return (
        f"cache {group.cache} stream {group.stream}: {group.role} of layers {group.first_layer}"
        f"-{last}, {group.n_channels} x {group.dtype}{rotation}"
    )
