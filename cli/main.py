"""Entry point: the group of commands, and how errors become one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

import click

from tscfile import __version__
from tscfile.errors import TscError

from .options import printable

_COMMANDS = {
    "pack": "Put a saved session away.",
    "append": "Add a later save of the same conversation.",
    "watch": "Pack saves as a server writes them.",
    "unpack": "Take a session out again.",
    "convert": "Turn one cache file into another kind.",
    "info": "Say what an archive holds.",
    "verify": "Check an archive; salvage a damaged one.",
    "compact": "Write an archive again: without some saves, in full blocks.",
    "demote": "Make an archive smaller by dropping its finer layers.",
    "prune": "Remove old archives from a folder.",
    "resume": "Continue a conversation in llama.cpp.",
    "book": "Learn what lossy tiers need to know of a model.",
    "eval": "Measure what lossy caches cost a model.",
    "bench": "Measure the speed of a book's tiers.",
}

INTERRUPTED, TERMINATED = 130, 143


class _Terminated(BaseException):
    """SIGTERM as an exception, so that what is half done is undone."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _open_streams() -> None:
    """A command may be run with standard streams closed; they then lead nowhere."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


class _Commands(click.Group):
    """Imports a command's module when the command is used: `tsc info` stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"tscfile_cli.commands.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tsc")
def tsc() -> None:
    """Archive what a language model remembers: its KV cache.

    Exit codes: 0 ok, 1 failure, 2 usage, 3 damaged file, 4 model or token mismatch, 5 unsupported
    version or kind.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tsc``; returns the exit code and prints at most one line for an error."""
    _open_streams()
    # What supervisors send is to leave as little behind as Ctrl-C.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        result = tsc.main(arguments, prog_name="tsc", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        hint = f" (see '{error.ctx.command_path} -h')" if error.ctx else ""
        return _fail(f"{error.format_message().rstrip('.')}{hint}", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except _Terminated:
        return _fail("terminated; nothing was changed", TERMINATED)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted; nothing was changed", INTERRUPTED)
    except TscError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone; that is its right, and Python must not say more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        from tscfile.files import describe_os_error

        return _fail(str(describe_os_error(error, "")), 1)
    except MemoryError:
        return _fail("out of memory; nothing was changed", 1)


def _fail(message: str, code: int) -> int:
    print(f"tsc: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
