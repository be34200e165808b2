"""``tsc unpack``"""

from __future__ import annotations

from pathlib import Path

import click

from tscfile.dtypes import DTYPES

from ..options import (
    STDIO,
    archive_argument,
    book_option,
    check_apart,
    force_option,
    input_file,
    layer_option,
    output_file,
    progress,
    quiet_option,
    say,
    size,
    snapshot_option,
)

_FORMATS = (
    "session", "sequence", "state-buffer", "sequence-buffer", "state", "gguf", "safetensors", "npz"
)  # fmt: skip


@click.command("unpack")
@archive_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, allow_dash=True),
    help="The file to write; the archive's name with the format's ending by default.",
)  # fmt: skip
@snapshot_option
@layer_option
@book_option
@click.option(
    "--as", "container", type=click.Choice(_FORMATS),
    help="Kind of llama.cpp state ('state': the usual one), or a format that others read.",
)  # fmt: skip
@click.option(
    "--llama-version", type=click.IntRange(9, 11), help="Session version of the target llama.cpp."
)
@click.option("--v-trans", type=click.Choice(["yes", "no"]), help="Values channel after channel.")
@click.option("--kv-type", type=click.Choice(list(DTYPES)), help="Element type of keys and values.")
@click.option("--head-dim", type=click.IntRange(min=1), help="Head size, if not recorded.")
@force_option
@quiet_option
def command(
    archive: Path, output: Path | None, snapshot: int | None, tier: str | None,
    book: Path | None, container: str | None,
    llama_version: int | None, v_trans: str | None, kv_type: str | None, head_dim: int | None,
    force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write a snapshot of ARCHIVE as the file it was packed from, bit for bit if it is lossless.

    The other options write what another build or setting of llama.cpp, or another program, wants.
    """
    from tscfile.archive import Archive
    from tscfile.unpacking import StateOptions, choose_snapshot, suffix_of, write_snapshot

    options = StateOptions(
        container, llama_version, None if v_trans is None else v_trans == "yes", kv_type, head_dim
    )
    with input_file(archive) as path, Archive(path, book=book) as opened:
        state = choose_snapshot(opened, snapshot, tier)
        if output is None:
            ending = suffix_of(state, container)
            output = Path(STDIO) if str(archive) == STDIO else archive.with_suffix(ending)
        check_apart(archive, output)
        with (
            output_file(output) as target,
            progress("unpacking", state.raw_bytes, quiet) as advance,
        ):
            n_bytes = write_snapshot(state, target, options=options, force=force, progress=advance)
    say(f"{output}: {size(n_bytes)}, {len(state.tokens)} tokens", quiet)
