"""Errors of the project and the exit code each one stands for.

Every error message is one line that says what is wrong, where, and what to do.
"""

from __future__ import annotations


class TscError(Exception):
    """Something that the user can act on; ``exit_code`` is what ``tsc`` returns."""

    exit_code = 1


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
