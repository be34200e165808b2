"""``tsc pack``"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..options import (
    STDIO,
    book_option,
    check_apart,
    chosen_tiers,
    fallback,
    force_option,
    input_file,
    json_option,
    model_identity,
    model_option,
    output_file,
    print_json,
    progress,
    quiet_option,
    say,
    size,
    tier_options,
)
from ..saves import check_many, min_common_option, sources_argument, tell

if TYPE_CHECKING:
    from tscfile.collecting import PackOptions


@click.command("pack")
@sources_argument
@click.option(
    "-o", "--output", type=click.Path(allow_dash=True),
    help="The archive to make; the source's name with .tsc by default. With a slash at its end a "
    "folder, for an archive of each conversation.",
)  # fmt: skip
@tier_options("Quality tier: lossless, or with a book balanced, by default; none needs a book.")
@book_option
@click.option("--embed-book", is_flag=True, help="Put the book into the archive.")
@click.option("--target-kl", type=float, metavar="NATS",
              help="In place of a tier: the KL to be expected.")  # fmt: skip
@click.option("--target-ratio", type=float, metavar="X",
              help="In place of a tier: how many times smaller the archive is to be.")  # fmt: skip
@click.option("--quantizer", type=click.Choice(["product"]),
              help="In place of a tier, for experts: product quantization.")  # fmt: skip
@click.option("--code-bytes", type=click.FloatRange(min=0, min_open=True), metavar="N",
              help="Of --quantizer: about how many bytes a frame takes.")  # fmt: skip
@click.option(
    "--fallback-above", type=click.FloatRange(min=0), metavar="T",
    help="Of --quantizer: keep frames exact whose error is more than T times the usual one.",
)  # fmt: skip
@min_common_option
@model_option
@force_option
@quiet_option
@json_option
def command(
    sources: tuple[Path, ...], output: str | None, tier: str | None, tiers: str | None,
    book: Path | None, embed_book: bool, target_kl: float | None, target_ratio: float | None,
    quantizer: str | None, code_bytes: float | None, fallback_above: float | None,
    min_common: int | None, model: Path | None, force: bool, quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    """Pack SOURCES, saved llama.cpp states or caches in GGUF, safetensors or npz, into an archive.

    Several, or a folder of them, are put in order by their tokens and stored as the saves of one
    conversation; of many conversations with -o DIR/. '-' reads from standard input, and as output
    writes to standard output. SOURCES are kept.
    """
    from tscfile.collecting import PackOptions
    from tscfile.product_coding import ProductOptions

    if book is None and (embed_book or target_kl is not None or target_ratio is not None):
        raise click.UsageError("--embed-book, --target-kl and --target-ratio need --book")
    if (quantizer is None) != (code_bytes is None):
        raise click.UsageError("--quantizer and --code-bytes go together: give both")
    if fallback_above is not None and quantizer is None:
        raise click.UsageError("--fallback-above is for --quantizer product")
    options = PackOptions(
        chosen_tiers(tier, tiers), book, embed_book, target_kl, target_ratio,
        None if code_bytes is None else ProductOptions(code_bytes, fallback_above),
        model_identity(model),
    )  # fmt: skip
    into_folder = output is not None and output.endswith(os.sep)
    if len(sources) > 1 or sources[0].is_dir() or into_folder:
        return _pack_many(sources, output, options, min_common, force, quiet, as_json)
    _pack_one(sources[0], Path(output) if output else None, options, force, quiet, as_json)
    return 0


def _pack_one(
    source: Path, output: Path | None, options: PackOptions, force: bool, quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from tscfile.packing import pack
    from tscfile.sources import identity_for, open_source

    if output is None:
        output = Path(STDIO) if str(source) == STDIO else source.with_suffix(".tsc")
    check_apart(source, output)
    with input_file(source) as path, output_file(output) as target:
        snapshot = open_source(path)
        with progress("packing", snapshot.raw_bytes, quiet) as advance:
            report = pack(
                snapshot, target, tier=options.tier, book=options.book,
                embed_book=options.embed_book, target_kl=options.target_kl,
                target_ratio=options.target_ratio, product=options.product,
                identity=identity_for(snapshot, options.identity), force=force,
                progress=advance, name="" if str(source) == STDIO else source.name,
            )  # fmt: skip
    if as_json and str(output) != STDIO:
        print_json(report)
    say(
        f"{output}: {report.n_tokens} tokens, {size(report.raw_bytes)} of keys and values "
        f"in {size(report.file_bytes)} ({report.raw_bytes / report.file_bytes:.4g}x, "
        f"{report.tier})" + fallback(report),
        quiet or as_json,
    )


def _pack_many(
    sources: tuple[Path, ...], output: str | None, options: PackOptions, min_common: int | None,
    force: bool, quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    from itertools import chain

    from tscfile.collecting import pack_saves, read_saves, saves_in
    from tscfile.conversations import MIN_COMMON

    check_many(sources)
    if output is None:
        one = f"{sources[0] or '.'} is a directory" if sources[0].is_dir() else "several saves"
        raise click.UsageError(f"{one}: name the archive with -o, or a folder with -o DIR/")
    if output == STDIO:
        raise click.UsageError("an archive of several saves is not written to standard output")
    paths = saves_in(sources)
    for source in paths:
        check_apart(source, Path(output))
    saves, broken = read_saves(paths, options.identity)
    if not paths:
        raise click.UsageError(f"{sources[0]}: holds no saves")
    with progress("packing", sum(save.raw_bytes for save in saves), quiet) as advance:
        reports = pack_saves(
            saves, output, options, into_folder=output.endswith(os.sep),
            min_common=min_common or MIN_COMMON, force=force, progress=advance,
        )  # fmt: skip
        return tell(chain(broken, reports), len(paths), as_json, quiet)
