"""``tsc pack``"""

from __future__ import annotations

from pathlib import Path

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


@click.command("pack")
@click.argument("source", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, allow_dash=True),
    help="The archive to make; the source's name with .tsc by default.",
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
@model_option
@force_option
@quiet_option
@json_option
def command(
    source: Path, output: Path | None, tier: str | None, tiers: str | None, book: Path | None,
    embed_book: bool, target_kl: float | None, target_ratio: float | None,
    quantizer: str | None, code_bytes: float | None, fallback_above: float | None,
    model: Path | None, force: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Pack SOURCE, a saved llama.cpp state or a cache in GGUF, safetensors or npz, into an archive.

    '-' reads from standard input, and as output writes to standard output. SOURCE is kept.
    """
    from tscfile.packing import pack
    from tscfile.product_coding import ProductOptions
    from tscfile.sources import identity_for, open_source

    if book is None and (embed_book or target_kl is not None or target_ratio is not None):
        raise click.UsageError("--embed-book, --target-kl and --target-ratio need --book")
    if (quantizer is None) != (code_bytes is None):
        raise click.UsageError("--quantizer and --code-bytes go together: give both")
    if fallback_above is not None and quantizer is None:
        raise click.UsageError("--fallback-above is for --quantizer product")
    if source.is_dir():
        raise click.UsageError(f"{source or '.'} is a directory; name a saved state")
    if output is None:
        output = Path(STDIO) if str(source) == STDIO else source.with_suffix(".tsc")
    check_apart(source, output)
    product = None if code_bytes is None else ProductOptions(code_bytes, fallback_above)
    identity = model_identity(model)
    with input_file(source) as path, output_file(output) as target:
        snapshot = open_source(path)
        identity = identity_for(snapshot, identity)
        with progress("packing", snapshot.raw_bytes, quiet) as advance:
            report = pack(
                snapshot, target, tier=chosen_tiers(tier, tiers), book=book, embed_book=embed_book,
                target_kl=target_kl, target_ratio=target_ratio, product=product,
                identity=identity, force=force, progress=advance,
                name="" if str(source) == STDIO else source.name,
            )  # fmt: skip
    if as_json and str(output) != STDIO:
        print_json(report)
    say(
        f"{output}: {report.n_tokens} tokens, {size(report.raw_bytes)} of keys and values "
        f"in {size(report.file_bytes)} ({report.raw_bytes / report.file_bytes:.4g}x, "
        f"{report.tier})" + fallback(report),
        quiet or as_json,
    )

