"""``tsc pack``"""

from __future__ import annotations

from pathlib import Path

import click

from tscfile.tiers import TIERS

from ..options import (
    STDIO,
    book_option,
    check_apart,
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
)


@click.command("pack")
@click.argument("source", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, allow_dash=True),
    help="The archive to make; the source's name with .tsc by default.",
)  # fmt: skip
@click.option(
    "--tier", type=click.Choice(list(TIERS)),
    help="Quality tier: lossless, or with a book balanced, by default; none needs a book.",
)  # fmt: skip
@book_option
@model_option
@force_option
@quiet_option
@json_option
def command(
    source: Path, output: Path | None, tier: str | None, book: Path | None, model: Path | None,
    force: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Pack SOURCE, a saved llama.cpp state or a cache in GGUF, safetensors or npz, into an archive.

    '-' reads from standard input, and as output writes to standard output. SOURCE is kept.
    """
    from tscfile.packing import pack
    from tscfile.sources import identity_for, open_source

    if source.is_dir():
        raise click.UsageError(f"{source or '.'} is a directory; name a saved state")
    if output is None:
        output = Path(STDIO) if str(source) == STDIO else source.with_suffix(".tsc")
    check_apart(source, output)
    identity = model_identity(model)
    with input_file(source) as path, output_file(output) as target:
        snapshot = open_source(path)
        identity = identity_for(snapshot, identity)
        with progress("packing", snapshot.raw_bytes, quiet) as advance:
            report = pack(
                snapshot, target, tier=tier, book=book, identity=identity, force=force,
                progress=advance, name="" if str(source) == STDIO else source.name,
            )  # fmt: skip
    if as_json and str(output) != STDIO:
        print_json(report)
    say(
        f"{output}: {report.n_tokens} tokens, {size(report.raw_bytes)} of keys and values "
        f"in {size(report.file_bytes)} ({report.raw_bytes / report.file_bytes:.4g}x, "
        f"{report.tier})",
        quiet or as_json,
    )

