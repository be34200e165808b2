"""``tsc resume``"""

from __future__ import annotations

from pathlib import Path

import click

from ..options import (
    archive_argument,
    book_option,
    json_option,
    layer_option,
    print_json,
    quiet_option,
    say,
    snapshot_option,
)


@click.command("resume")
@archive_argument
@click.option(
    "--model", required=True, metavar="GGUF", type=click.Path(dir_okay=False, path_type=Path),
    help="The model that made the state.",
)  # fmt: skip
@click.option("--prompt", default="", help="Text to add before the model goes on.")
@click.option(
    "-n", "n_predict", type=click.IntRange(min=0), default=64, show_default=True,
    help="Tokens to generate.",
)  # fmt: skip
@snapshot_option
@layer_option
@book_option
@click.option(
    "--recompute", is_flag=True,
    help="Read the saved tokens again in place of loading their rows: the model's own cache, from "
    "any tier.",
)  # fmt: skip
@click.option("--ctx", "n_ctx", type=click.IntRange(min=1), help="Cells of the context.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--no-identity", is_flag=True, help="Do not compare the model with the one recorded."
)
@click.option(
    "--no-probe", is_flag=True, help="Do not recompute a few tokens to prove that the model fits."
)
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log.")
@quiet_option
@json_option
def command(
    archive: Path, model: Path, prompt: str, n_predict: int, snapshot: int | None, tier: str | None,
    book: Path | None, recompute: bool, n_ctx: int | None, temperature: float, seed: int,
    no_identity: bool, no_probe: bool, verbose: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Load a snapshot of ARCHIVE into llama.cpp and continue the conversation.

    A model that is not the one that made the state is refused with exit code 4. The continuation
    goes to standard output; how much was reused and computed is said at the end.
    """
    from tscfile.archive import Archive
    from tscfile.resume.llama_cpp import resume
    from tscfile.unpacking import choose_snapshot

    if recompute and tier is not None:
        raise click.UsageError("give --tier or --recompute, which needs no frames")
    with Archive(archive, book=book) as opened:
        state = choose_snapshot(opened, snapshot, tier)
        if state.n_absent and not recompute:
            say(f"note: {state.n_absent} frames are not stored: recomputing them", quiet)
            recompute = True
        result = resume(
            state, model, prompt, n_predict, n_ctx=n_ctx, temperature=temperature, seed=seed,
            identity_check=not no_identity, probe=not no_probe, recompute=recompute,
            verbose=verbose,
            on_text=None if as_json else lambda text: click.echo(text, nl=False),
        )  # fmt: skip
    if as_json:
        print_json(result)
    else:
        click.echo()
    for note in result.notes:
        say(f"note: {note}", quiet)
    if recompute:
        n_more = result.n_computed - result.n_recomputed
        say(
            f"recomputed {result.n_recomputed} tokens in {result.compute_seconds:.2f} s, computed "
            f"{n_more} more (the prompt and the answer)",
            quiet,
        )
        return
    say(
        f"reused {result.n_reused} tokens, computed {result.n_computed} "
        f"(the last saved one, the prompt and the answer); "
        f"state loaded in {result.load_seconds:.2f} s",
        quiet,
    )
