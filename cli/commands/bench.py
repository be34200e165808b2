"""``tsc bench``"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tscfile.tiers import TIERS

from ..options import json_option, print_json, quiet_option, size, status

if TYPE_CHECKING:
    from tscfile.bench import BenchReport

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_LOSSY = [name for name, tier in TIERS.items() if not tier.exact and tier.codec is not None]


@click.command("bench")
@click.argument("state", required=False, type=_FILE)
@click.option("--book", type=_FILE, metavar="FILE", help="The book of the state's model.")
@click.option("--tier", type=click.Choice(_LOSSY), default="balanced", show_default=True)
@click.option("--model", type=_FILE, metavar="GGUF",
              help="The model: compare with computing the state again in llama.cpp.")  # fmt: skip
@click.option("--shape", metavar="NAME", help="In place of a state: a made-up book of the shape of "
              "llama-3-8b or llama-3-70b.")  # fmt: skip
@click.option("--frames", type=click.IntRange(min=1), default=512, show_default=True,
              help="Frames of a made-up state.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True,
              help="Threads of the matrix products.")  # fmt: skip
@quiet_option
@json_option
def command(
    state: Path | None, book: Path | None, tier: str, model: Path | None, shape: str | None,
    frames: int, threads: int, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure how fast STATE is coded with a book, stage by stage."""
    if (shape is None) == (state is None):
        raise click.UsageError("name a saved state and its --book, or a --shape")
    if state is not None and book is None:
        raise click.UsageError("a state needs its model's --book")
    from tscfile.bench import bench_shape, bench_state

    with _threads(threads), status(quiet or as_json) as tell:
        if shape is not None:
            report = bench_shape(shape, frames, tell)
        else:
            assert state is not None and book is not None
            report = bench_state(state, book, tier, model, tell)
    if as_json:
        print_json(report)
        return
    for line in _lines(report):
        click.echo(line)


def _threads(n: int) -> AbstractContextManager[object]:
    """Bound the threads of the matrix library."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise click.UsageError(
            "bounding threads needs threadpoolctl: pip install 'tscfile[bench]'"
        ) from None
    limits: AbstractContextManager[object] = threadpool_limits(n)
    return limits


def _lines(report: BenchReport) -> Iterator[str]:
    yield (
        f"{report.what}, tier {report.tier}: {report.n_frames} frames, {size(report.raw_bytes)} "
        f"in chunks of {size(report.stored_bytes)}"
    )
    for row in report.rows:
        yield f"  {row.name:<34}{row.seconds * 1e3:>10.2f} ms{row.mb_s:>10.1f} MB/s"
    share = report.seconds("matrix products alone") / report.seconds("decode")
    yield f"  matrix products are {share:.0%} of decoding"
    yield f"  entropy decoder alone {report.symbols_s:.0f} Msymbol/s"
    yield f"  {report.flops_frame / 1e6:.2f} MFLOP a frame" + (
        "" if report.flops_prefill is None else
        f"; prefill {report.flops_prefill / 1e6:.0f}, "
        f"{report.flops_prefill / report.flops_frame:.0f} times as many"
    )  # fmt: skip
    if report.prefill_ratio is not None:
        yield f"  restoring is {report.prefill_ratio:.1f} times as fast as computing again"
