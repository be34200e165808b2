"""``tsc book``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..options import (
    force_option,
    json_option,
    model_identity,
    model_option,
    print_json,
    quiet_option,
    say,
    size,
    status,
)

if TYPE_CHECKING:
    from tscfile.books.book import Book


@click.group("book")
def command() -> None:
    """Books: what is learnt once for a model, for the lossy tiers of all its files."""


@command.command("train")
@click.option(
    "--model", required=True, metavar="PATH", type=click.Path(path_type=Path),
    help="Transformers directory or GGUF file.",
)  # fmt: skip
@click.option(
    "--text", "texts", required=True, multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Calibration text, documents separated by lines <|endoftext|>; give it again for more.",
)  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The book.")
@click.option(
    "--metric", type=click.Choice(["fisher", "attention", "plain"]), default="fisher",
    show_default=True,
    help="What errors are weighed by: what the model's output feels, what its attention reads, "
    "or nothing.",
)  # fmt: skip
@click.option("--windows", type=click.IntRange(min=4), default=160, show_default=True,
              help="Windows of text to learn from.")  # fmt: skip
@click.option("--hidden", type=click.IntRange(min=0), default=1024, show_default=True,
              help="Hidden units of the prediction: more make files smaller.")  # fmt: skip
@click.option("--epochs", type=click.IntRange(min=0), default=8, show_default=True,
              help="How often the prediction sees the text.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--seed", type=int, default=0, show_default=True)
@force_option
@quiet_option
def train(
    model: Path, texts: tuple[Path, ...], output: Path, metric: str, windows: int, hidden: int,
    epochs: int, device: str, seed: int, force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Learn a book for a model from text (needs the extra hf; minutes for a small model).

    What is done is kept in a folder beside the output; the same command goes on from there after
    an interruption.
    """
    from tscfile import files
    from tscfile.books.train import TrainOptions
    from tscfile.books.train import train as learn
    from tscfile.quality.engine import Engine
    from tscfile.quality.windows import read_text

    calibration = [read_text(text) for text in texts]
    with files.new_file(output, force=force) as fd:
        with status(quiet) as tell:
            tell("loading the model")
            options = TrainOptions(
                metric=metric, n_windows=windows, n_hidden=hidden, epochs=epochs, seed=seed
            )
            keep = output.with_name(output.name + ".part")
            book = learn(Engine(model, device), calibration, options, tell, keep=keep)
        _write(fd, output, book, quiet)


@command.command("learn")
@click.argument("states", nargs=-1, required=True,
                type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The book.")
@model_option
@force_option
@quiet_option
def learn(
    states: tuple[Path, ...], output: Path, model: Path | None, force: bool, quiet: bool
) -> None:
    """Learn a plain book from saved STATES and archives of one model, without its weights.

    Its tiers are steps that held on the reference model; nothing is measured.
    """
    from contextlib import ExitStack

    from tscfile import files
    from tscfile.archive import Archive
    from tscfile.books.learn import learn as learn_book
    from tscfile.packing import identify
    from tscfile.sources import identity_for, open_source

    identity = model_identity(model)
    with ExitStack() as opened, files.new_file(output, force=force) as fd:
        snapshots = []
        for path in states:
            if path.suffix == ".tsc":
                snapshots.append(opened.enter_context(Archive(path)).snapshot())
            else:
                snapshots.append(open_source(path))
            identify(snapshots[-1], identity_for(snapshots[-1], identity))
        with status(quiet) as tell:
            book = learn_book(snapshots, tell)
        _write(fd, output, book, quiet)


def _write(fd: int, output: Path, book: Book, quiet: bool) -> None:
    data = book.to_bytes()
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    tiers = ", ".join(
        f"{t.name} {t.ratio:.0f}x at KL {t.kl:.4f}" if t.kl > 0 else t.name
        for t in book.tiers.values()
    )
    say(f"{output}: {size(len(data))}; {tiers or 'no tiers'}", quiet)


@command.command("info")
@click.argument("book", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def info(book: Path, as_json: bool) -> None:
    """Say what BOOK was learnt from and what its tiers measured."""
    from tscfile.books.book import load

    opened = load(book)
    tiers = [vars(tier) for tier in opened.book.tiers.values()]
    if as_json:
        print_json({"id": opened.id, "bytes": opened.n_bytes, "facts": opened.book.facts,
                    "tiers": tiers})  # fmt: skip
        return
    click.echo(f"{book}: book {opened.id[:16]}…, {size(opened.n_bytes)}")
    click.echo(
        f"  {opened.book.n_channels} channels, {opened.book.n_coefficients} coefficients, "
        f"prediction from {opened.book.facts['book.history']} tokens and "
        f"{len(opened.book.facts['book.decays'])} means, "
        f"{len(opened.book.hidden_bias)} hidden units"
    )
    for key, value in opened.book.facts.items():
        click.echo(f"  {key:<28}{value}")
    for tier in opened.book.tiers.values():
        click.echo(f"  tier {tier.name:<10} KL {tier.kl:.5f}  ratio {tier.ratio:.1f}")
