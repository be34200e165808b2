"""``tsc convert``"""

from __future__ import annotations

from pathlib import Path

import click

from tscfile.dtypes import DTYPES

from ..options import (
    check_apart,
    force_option,
    input_file,
    model_identity,
    model_option,
    progress,
    quiet_option,
    say,
    size,
)

_CONTAINERS = ("session", "sequence", "state-buffer", "sequence-buffer")


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--as", "container", type=click.Choice(_CONTAINERS), help="Kind of llama.cpp state.")
@click.option(
    "--llama-version", type=click.IntRange(9, 11), help="Session version of the target llama.cpp."
)
@click.option("--v-trans", type=click.Choice(["yes", "no"]), help="Values channel after channel.")
@click.option("--kv-type", type=click.Choice(list(DTYPES)), help="Element type of keys and values.")
@click.option("--head-dim", type=click.IntRange(min=1), help="Head size, if not recorded.")
@model_option
@force_option
@quiet_option
def command(
    source: Path, output: Path, container: str | None, llama_version: int | None,
    v_trans: str | None, kv_type: str | None, head_dim: int | None, model: Path | None,
    force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write the cache in SOURCE as the kind of file that OUTPUT's name ends in.

    .gguf, .safetensors and .npz are read by other programs; .kv is a llama.cpp state. What SOURCE
    is, is told by its content. Archives are made with pack and taken apart with unpack --as.
    """
    from tscfile.conversion import convert, identified
    from tscfile.sources import open_source
    from tscfile.unpacking import StateOptions

    options = StateOptions(
        container, llama_version, None if v_trans is None else v_trans == "yes", kv_type, head_dim
    )
    check_apart(source, output)
    identity = model_identity(model)
    with input_file(source) as path:
        snapshot = open_source(path)
        if identity is not None:
            snapshot = identified(snapshot, identity)
        with progress("converting", snapshot.raw_bytes, quiet) as advance:
            n_bytes = convert(snapshot, output, options=options, force=force, progress=advance)
    say(f"{output}: {size(n_bytes)}, {len(snapshot.tokens)} tokens", quiet)
