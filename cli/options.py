"""Options and habits that commands share."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tscfile.tiers import TIERS

if TYPE_CHECKING:
    from tscfile.model import ModelIdentity
    from tscfile.packing import PackReport

F = TypeVar("F", bound=Callable[..., Any])

STDIO = "-"
_UNITS = ("B", "kB", "MB", "GB", "TB")
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?(?:([kmgt])(i?)b?|b)?", re.IGNORECASE | re.ASCII)


def archive_argument(function: F) -> F:
    # Whether it can be read is found out by reading: no usage error.
    kind = click.Path(dir_okay=False, readable=False, path_type=Path)
    return click.argument("archive", type=kind)(function)


def force_option(function: F) -> F:
    return click.option("-f", "--force", is_flag=True, help="Replace an existing output.")(function)


def quiet_option(function: F) -> F:
    return click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def model_option(function: F) -> F:
    return click.option(
        "--model",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="GGUF",
        help="Record the fingerprint of the model that made the state.",
    )(function)


def model_identity(model: Path | None) -> ModelIdentity | None:
    """Identity of the model at ``model``, if one was given."""
    from tscfile.identity import identity_from_gguf

    return identity_from_gguf(model) if model else None


def book_option(function: F) -> F:
    return click.option(
        "--book", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
        help="The model's book; looked for beside the archive and in TSC_BOOKS.",
    )(function)  # fmt: skip


def tier_options(help_text: str) -> Callable[[F], F]:
    """``--tier`` for one tier, ``--tiers`` for quality layers; `chosen_tiers` joins them."""

    def decorate(function: F) -> F:
        layers = click.option(
            "--tiers", metavar="A,B,…",
            help="Several, the coarsest first: each is stored as what the one before lacks.",
        )  # fmt: skip
        return click.option("--tier", type=click.Choice(list(TIERS)), help=help_text)(
            layers(function)
        )

    return decorate


def chosen_tiers(tier: str | None, tiers: str | None) -> str | list[str] | None:
    if tier is not None and tiers is not None:
        raise click.UsageError("give --tier or --tiers, not both")
    return tier if tiers is None else [name.strip() for name in tiers.split(",")]


def layer_option(function: F) -> F:
    return click.option(
        "--tier", type=click.Choice(list(TIERS)),
        help="Of a save with quality layers the one to read; the finest by default.",
    )(function)  # fmt: skip


def snapshot_option(function: F) -> F:
    return click.option(
        "--snapshot", type=int, metavar="N", help="Which save; -1 is the last (default)."
    )(function)


def print_json(value: Any) -> None:
    """A plain value with dataclasses in it, or one of those, as indented JSON on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=dataclasses.asdict)
    # Paths are bytes and need not be text.
    click.echo(text.encode(errors="replace").decode())


def printable(text: str) -> str:
    """Text with a mark for whatever a terminal would obey or could not show."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def say(message: str, quiet: bool) -> None:
    """Words go to stderr; stdout is for data."""
    if not quiet:
        click.echo(printable(message), err=True)


def size(n_bytes: float) -> str:
    """
    >>> size(1019328)
    '1.02 MB'
    """
    unit = 0
    while n_bytes >= 1000 and unit < len(_UNITS) - 1:
        n_bytes, unit = n_bytes / 1000, unit + 1
    return f"{n_bytes:.3g} {_UNITS[unit]}" if unit else f"{n_bytes:.0f} B"


class SizeType(click.ParamType):
    """A number of bytes: 500, 10G (thousands), 1.5GiB (1024s).

    >>> [SizeType().convert(text, None, None) for text in ("500", "10G", "1.5 GiB", "2kB")]
    [500, 10000000000, 1610612736, 2000]
    """

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        found = _SIZE.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no size; give bytes or a number with k, M, G, T", param, ctx)
        number, unit, binary = found.groups()
        power = " kmgt".index(unit.lower()) if unit else 0
        return int(float(number) * (1024 if binary else 1000) ** power)


def fallback(report: PackReport) -> str:
    """What is said of frames that product quantization kept exact."""
    if report.n_frames_exact is None:
        return ""
    share = report.n_frames_exact / max(report.n_frames_new, 1)
    return f", {share:.2%} of the new frames exact in {size(report.exact_bytes or 0)}"


@contextmanager
def progress(label: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; gives the function that moves it by n bytes."""
    if quiet or not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total or None)
        yield lambda n: bar.advance(task, n)


@contextmanager
def status(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda words: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as line:
        yield line.update


def check_apart(source: Path, output: Path) -> None:
    """A source is kept, so it cannot be the output too, not even with ``-f``."""
    if source.exists() and output.exists() and source.samefile(output):
        raise click.UsageError(f"{output} is the source itself; name another output")


@contextmanager
def input_file(path: Path) -> Iterator[Path]:
    """``path`` itself, or for ``-`` a temporary file that holds standard input."""
    if str(path) != STDIO:
        yield path
        return
    import shutil

    with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
        spooled = Path(folder) / "stdin"
        with spooled.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        yield spooled


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """``path`` itself, or for ``-`` a temporary file whose content goes to standard output."""
    if str(path) != STDIO:
        yield path
        return
    import shutil

    if sys.stdout.isatty():
        raise click.UsageError("binary data is not written to a terminal; redirect it or use -o")
    with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
        spooled = Path(folder) / "stdout"
        yield spooled
        with spooled.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
        sys.stdout.buffer.flush()
