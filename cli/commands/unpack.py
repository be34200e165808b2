"""``tsc unpack``"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from tscfile.model import Snapshot

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
@click.option("--recompute", is_flag=True,
              help="Compute the rows again from the tokens, with --model.")  # fmt: skip
@click.option(
    "--model", metavar="GGUF", type=click.Path(dir_okay=False, path_type=Path),
    help="The model that made the state, for --recompute.",
)  # fmt: skip
@click.option("--head-dim", type=click.IntRange(min=1), help="Head size, if not recorded.")
@force_option
@quiet_option
def command(
    archive: Path, output: Path | None, snapshot: int | None, tier: str | None,
    book: Path | None, container: str | None,
    llama_version: int | None, v_trans: str | None, kv_type: str | None, head_dim: int | None,
    recompute: bool, model: Path | None, force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write a snapshot of ARCHIVE as the file it was packed from, bit for bit if it is lossless.

    With --recompute the rows are what llama.cpp makes of the saved tokens: the model's own cache
    from any tier, faithful, but not bit for bit that of the save.

    The other options write what another build or setting of llama.cpp, or another program, wants.
    """
    from tscfile.archive import Archive
    from tscfile.unpacking import (
        StateOptions,
        choose_snapshot,
        default_container,
        suffix_of,
        write_snapshot,
    )

    if recompute != (model is not None):
        raise click.UsageError("--recompute and --model go together")
    if recompute and tier is not None:
        raise click.UsageError("give --tier or --recompute, which needs no frames")
    options = StateOptions(
        container, llama_version, None if v_trans is None else v_trans == "yes", kv_type, head_dim
    )
    with input_file(archive) as path, Archive(path, book=book) as opened:
        state = choose_snapshot(opened, snapshot, tier)
        if output is None:
            ending = suffix_of(state, container)
            output = Path(STDIO) if str(archive) == STDIO else archive.with_suffix(ending)
        check_apart(archive, output)
        if model is not None:
            if output.exists() and not force and str(output) != STDIO:
                raise click.UsageError(f"{output} exists; -f replaces it")
            options = replace(options, container=container or default_container(state))
            state = _recomputed(state, model, quiet)
        with (
            output_file(output) as target,
            progress("unpacking", state.raw_bytes, quiet) as advance,
        ):
            n_bytes = write_snapshot(state, target, options=options, force=force, progress=advance)
    say(f"{output}: {size(n_bytes)}, {len(state.tokens)} tokens", quiet)


def _recomputed(state: Snapshot, model: Path, quiet: bool) -> Snapshot:
    from tscfile.resume.recompute import recompute

    made = recompute(state, model)
    for note in made.notes:
        say(f"note: {note}", quiet)
    near = "" if made.error is None else f"; the stored rows are within {made.error:.2g} of them"
    say(f"recomputed {made.n_tokens} tokens in {made.seconds:.2f} s{near}", quiet)
    return made.snapshot
