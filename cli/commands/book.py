"""``tsc book``"""

from __future__ import annotations

from pathlib import Path

import click

from ..options import force_option, json_option, print_json, quiet_option, say, size, status


@click.group("book")
def command() -> None:
    """Books: what is learnt once for a model, for the lossy tiers of all its files."""


@command.command("train")
@click.option(
    "--model", required=True, metavar="PATH", type=click.Path(path_type=Path),
    help="Transformers directory or GGUF file.",
)  # fmt: skip
@click.option(
    "--text", required=True, type=click.Path(dir_okay=False, path_type=Path),
    help="Calibration text, documents separated by lines <|endoftext|>.",
)  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The book.")
@click.option(
    "--metric", type=click.Choice(["fisher", "plain"]), default="fisher", show_default=True,
    help="What errors are weighed by: what the model's output feels, or nothing.",
)  # fmt: skip
@click.option("--windows", type=click.IntRange(min=4), default=160, show_default=True,
              help="Windows of text to learn from.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@force_option
@quiet_option
def train(
    model: Path, text: Path, output: Path, metric: str, windows: int, seed: int,
    force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Learn a book for a model from text (needs the extra hf; minutes for a small model)."""
    from tscfile import files
    from tscfile.books.train import TrainOptions
    from tscfile.books.train import train as learn
    from tscfile.quality.engine import Engine
    from tscfile.quality.windows import read_text

    calibration = read_text(text)
    with files.new_file(output, force=force) as fd:
        with status(quiet) as tell:
            tell("loading the model")
            options = TrainOptions(metric=metric, n_windows=windows, seed=seed)
            book = learn(Engine(model), calibration, options, tell)
        data = book.to_bytes()
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
    tiers = ", ".join(f"{t.name} {t.ratio:.0f}x at KL {t.kl:.4f}" for t in book.tiers.values())
    say(f"{output}: {size(len(data))}; {tiers}", quiet)


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
        f"prediction from {opened.book.history} tokens"
    )
    for key, value in opened.book.facts.items():
        click.echo(f"  {key:<28}{value}")
    for tier in opened.book.tiers.values():
        click.echo(f"  tier {tier.name:<10} KL {tier.kl:.5f}  ratio {tier.ratio:.1f}")
