"""Errors of the project and the exit code each one stands for.

Every error message is one line that says what is wrong, where, and what to do.
"""

from __future__ import annotations


class TscError(Exception):
    """Something that the user can act on; ``exit_code`` is what ``tsc`` returns.

    Messages quote names from files of strangers, so what would break the line or steer a terminal
    is taken out of them here.

    >>> str(TscError("model a\\nb"))
    'model a\ufffdb'
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        shown = (c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message)
        super().__init__("".join(shown))


class UsageError(TscError):
    """An argument or a combination of arguments that cannot be meant."""

    exit_code = 2


class DamagedError(TscError):
    """Bytes that contradict their own structure or checksum."""

    exit_code = 3


class TruncatedError(DamagedError):
    """A file that ends before what it promises."""


class MismatchError(TscError):
    """State that does not belong to this model, these tokens or this snapshot."""

    exit_code = 4


class UnsupportedError(TscError):
    """A version, kind or type this build does not know."""

    exit_code = 5
