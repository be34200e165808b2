"""``tsc watch``"""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..options import (
    book_option,
    chosen_tiers,
    json_option,
    model_identity,
    model_option,
    quiet_option,
    say,
    tier_options,
)
from ..saves import min_common_option, tell_one

if TYPE_CHECKING:
    from tscfile.collecting import SaveReport


@click.command("watch")
@click.argument("slot_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--into", "archive_dir", required=True, metavar="ARCHIVE_DIR",
              type=click.Path(file_okay=False, path_type=Path),
              help="Folder of the archives, one for each conversation; made if need be.",
              )  # fmt: skip
@tier_options("Quality tier; that of the save before, if any.")
@book_option
@model_option
@min_common_option
@click.option("--delete-source", is_flag=True,
              help="Remove a save once it is on disk in an archive.")  # fmt: skip
@click.option("--once", is_flag=True, help="Take what is there and stop.")
@click.option("--interval", type=float, default=1.0, show_default=True,
              metavar="SECONDS", help="How often to look.")  # fmt: skip
@click.option("--settle", type=float, default=2.0, show_default=True,
              metavar="SECONDS",
              help="How long a file must have been left alone to be taken.")  # fmt: skip
@quiet_option
@json_option
def command(
    slot_dir: Path, archive_dir: Path, tier: str | None, tiers: str | None, book: Path | None,
    model: Path | None, min_common: int | None, delete_source: bool, once: bool, interval: float,
    settle: float, quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    """Pack the saves that a server writes to SLOT_DIR, as it writes them.

    Each is appended to the archive in ARCHIVE_DIR whose conversation it continues, or starts one.
    It may be killed at any instant and goes on when it is started again; Ctrl-C or SIGTERM stop
    it. With --json every save is one line of JSON.
    """
    from contextlib import closing

    from tscfile.collecting import PackOptions
    from tscfile.conversations import MIN_COMMON
    from tscfile.watching import Watcher

    if slot_dir.resolve() == archive_dir.resolve():
        raise click.UsageError(f"{archive_dir} holds the saves; name another folder for archives")
    options = PackOptions(chosen_tiers(tier, tiers), book, identity=model_identity(model))
    watcher = Watcher(
        slot_dir, archive_dir, options, min_common=min_common or MIN_COMMON, settle=settle,
        interval=interval, delete_source=delete_source,
    )  # fmt: skip
    if threading.current_thread() is threading.main_thread():
        # Both are the usual way to end it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 0
    try:
        with closing(watcher.run(once=once)) as reports:
            code = _tell(reports, quiet, as_json)
    except KeyboardInterrupt:
        say("stopped", quiet or as_json)
    return code


def _tell(reports: Iterable[SaveReport], quiet: bool, as_json: bool) -> int:
    code = 0
    for report in reports:
        tell_one(report, quiet or as_json)
        if as_json:
            text = json.dumps(dataclasses.asdict(report), ensure_ascii=False)
            click.echo(text.encode(errors="replace").decode())
        code = code if report.problem is None else 1
    return code
