"""``tsc eval``"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..options import STDIO, force_option, quiet_option, say

if TYPE_CHECKING:
    from tscfile.quality.calibration import Calibration
    from tscfile.quality.engine import Engine
    from tscfile.quality.names import NameReport
    from tscfile.quality.protocol import Report
    from tscfile.quality.windows import Text


class _Numbers(click.ParamType):
    name = "numbers"

    def convert(self, value: object, parameter: object, context: object) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r} is no list of numbers such as 768,1792") from None


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("eval")
@click.option(
    "--model", required=True, type=click.Path(path_type=Path), metavar="DIR|GGUF",
    help="The model: a transformers directory or a GGUF file.",
)  # fmt: skip
@click.option("--text", required=True, type=_FILE, help="Held-out text; documents are separated "
              "by lines <|endoftext|>.")  # fmt: skip
@click.option("--calibration", type=_FILE, help="Text for codecs that learn; no part of --text.")
@click.option(
    "--codecs", "--tiers", "codecs", metavar="A,B,…",
    help="Tiers and peers, or groups of them: peers, kvtc, kivi, …; all by default. pq: product "
    "quantization, kl: the transform at KLs between the tiers, delta: differences between tokens. "
    "A+B: quality layers.",
)  # fmt: skip
@click.option("--report", type=click.Choice(["codecs", "names", "claims"]), default="codecs",
              show_default=True, help="Codecs side by side; whether they know names from early in "
              "the context; or the claims of the TSC reports, each with what was measured and a "
              "verdict.")  # fmt: skip
@click.option("--only", metavar="ID,…", help="Claims to look at, such as I-2,II-6; all by default.")
@click.option("--frames", type=_Numbers(), metavar="N[,N]",
              help="Tokens in the cache; 768,1792 by default, 768 for claims.")  # fmt: skip
@click.option("--windows", type=click.IntRange(min=1), default=8, show_default=True,
              help="Places of the text to measure at.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the places.")
@click.option("--book", type=_FILE, help="What the tiers have learnt about the model.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option(
    "--json", "json_path", metavar="OUT", help="Write all numbers as JSON; '-' to stdout.",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
)  # fmt: skip
@click.option("--markdown", "markdown_path", metavar="OUT.md", help="Write the claims as a page.",
              type=click.Path(dir_okay=False, path_type=Path))  # fmt: skip
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path),
              metavar="OUT.png", help="Draw KL against bits per value.")  # fmt: skip
@force_option
@quiet_option
def command(
    model: Path, text: Path, calibration: Path | None, codecs: str | None, report: str,
    only: str | None, frames: tuple[int, ...] | None, windows: int, seed: int, book: Path | None,
    device: str, json_path: Path | None, markdown_path: Path | None, plot_path: Path | None,
    force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure what lossy caches cost a model.

    The model reads held-out text; its cache goes through every codec, and the model continues from
    the original and from the restored cache. Reports KL, top-1 agreement and perplexity of the
    next 256 tokens and of a recalled passage, beside size and speed. With --report names the model
    is asked for names that stood in the first 100 tokens.
    """
    from tscfile.quality.calibration import Calibration, check_disjoint
    from tscfile.quality.engine import Engine
    from tscfile.quality.windows import read_text

    _check_options(report, codecs, only, frames, markdown_path, plot_path)
    for path in (json_path, markdown_path, plot_path):
        _check_free(path, force)
    if plot_path is not None:
        if plot_path.suffix not in (".png", ".svg", ".pdf"):
            raise click.UsageError(f"{plot_path}: a plot is a .png, .svg or .pdf file")
        _check_plot()
    held_out = read_text(text)
    say(f"loading {model}", quiet)
    engine = Engine(model, device)
    learning = Calibration(engine, read_text(calibration)) if calibration else None
    if learning is not None:
        check_disjoint(held_out, learning.text)
        say(f"learning from {calibration}", quiet)
    if report == "claims":
        _judge(
            engine, held_out, learning, (frames or CLAIMS_FRAMES)[0], windows, seed, only, book,
            json_path, markdown_path, force, quiet,
        )  # fmt: skip
        return
    _compare(
        engine, held_out, learning, codecs, frames or FRAMES, windows, seed, book, json_path,
        plot_path, force, quiet, names_only=report == "names",
    )  # fmt: skip


FRAMES, CLAIMS_FRAMES = (768, 1792), (768,)


def _check_options(
    report: str, codecs: str | None, only: str | None, frames: tuple[int, ...] | None,
    markdown_path: Path | None, plot_path: Path | None,
) -> None:  # fmt: skip
    """Options of one report are not for the others."""
    if report == "names" and plot_path:
        raise click.UsageError("--report names has no plot")
    if report == "claims":
        if codecs or plot_path:
            raise click.UsageError("--codecs and --plot are not for --report claims")
        if frames and len(frames) > 1:
            raise click.UsageError("--report claims takes one number of --frames")
    elif only or markdown_path:
        raise click.UsageError("--only and --markdown are for --report claims")


def _compare(
    engine: Engine, held_out: Text, learning: Calibration | None, codecs: str | None,
    frames: tuple[int, ...], windows: int, seed: int, book: Path | None, json_path: Path | None,
    plot_path: Path | None, force: bool, quiet: bool, *, names_only: bool,
) -> None:  # fmt: skip
    from tscfile.quality.names import evaluate_names
    from tscfile.quality.protocol import Plan, Report, evaluate
    from tscfile.quality.registry import make_codecs, runnable
    from tscfile.quality.report import tables, to_json

    names = codecs.split(",") if codecs else runnable(learning is not None, book is not None)
    chosen = make_codecs(names, calibration=learning, book=book)
    plan = Plan(frames=frames, n_windows=windows, seed=seed)
    with _steps(quiet) as (total, progress):
        total(plan.n_steps(len(chosen)))
        found: Report | NameReport
        if names_only:
            found = evaluate_names(engine, held_out, chosen, plan, progress=progress)
        else:
            found = evaluate(
                engine, held_out, chosen, plan, calibration=learning, progress=progress
            )
    if json_path is not None and str(json_path) != STDIO:
        _write(json_path, to_json(found).encode(), force)
    if plot_path is not None and isinstance(found, Report):
        _write_plot(found, plot_path, force)
    if str(json_path) == STDIO:
        click.echo(to_json(found), nl=False)
    else:
        _print(tables(found) if isinstance(found, Report) else found.tables())


def _judge(
    engine: Engine, held_out: Text, learning: Calibration | None, frames: int, windows: int,
    seed: int, only: str | None, book: Path | None, json_path: Path | None,
    markdown_path: Path | None, force: bool, quiet: bool,
) -> None:  # fmt: skip
    from tscfile.quality.claims.page import markdown, table, to_json
    from tscfile.quality.claims.run import judge

    chosen = only.split(",") if only else ()
    with _steps(quiet) as (total, progress):
        found = judge(
            engine, held_out, frames=frames, n_windows=windows, seed=seed, only=chosen,
            calibration=learning, book=book, steps=total, progress=progress,
        )  # fmt: skip
    if json_path is not None and str(json_path) != STDIO:
        _write(json_path, to_json(found).encode(), force)
    if markdown_path is not None:
        _write(markdown_path, markdown(found).encode(), force)
    if str(json_path) == STDIO:
        click.echo(to_json(found), nl=False)
    else:
        _print([table(found)])


def _check_free(path: Path | None, force: bool) -> None:
    """Minutes of work should not end at a file that is in the way."""
    if path is not None and str(path) != STDIO and path.exists() and not force:
        raise click.UsageError(f"{path} exists; -f replaces it")
    if path is not None and str(path) != STDIO and not path.absolute().parent.is_dir():
        raise click.UsageError(f"{path}: the folder {path.parent} does not exist")


def _check_plot() -> None:
    from importlib.util import find_spec

    from tscfile.errors import TscError

    if find_spec("matplotlib") is None:
        raise TscError("a plot needs matplotlib: pip install 'tscfile[plot]'")


def _write(path: Path, data: bytes, force: bool) -> None:
    import os

    from tscfile.files import new_file

    with new_file(path, force=force) as fd, os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)


def _write_plot(report: Report, path: Path, force: bool) -> None:
    import tempfile

    from tscfile.quality.plot import draw

    with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
        drawn = Path(folder) / path.name
        draw(report, drawn)
        _write(path, drawn.read_bytes(), force)


def _print(found: Sequence[object]) -> None:
    from rich.console import Console

    # A table that is redirected is not cut to the width of a terminal.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    for table in found:
        console.print(table)


@contextmanager
def _steps(quiet: bool) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """A bar on stderr that counts steps and names the present one: what sets the number of steps,
    and what takes one."""
    if quiet or not sys.stderr.isatty():
        yield lambda total: None, lambda words: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield (
            lambda total: bar.update(task, total=total),
            lambda words: bar.update(task, advance=1, description=words),
        )
