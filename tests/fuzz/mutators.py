"""Mutations that keep what random bytes would break first: lengths, checksums, compression."""

from __future__ import annotations

from collections.abc import Callable

Mutator = Callable[[bytes, int, int], bytes]

MUTATORS: dict[str, Mutator] = {}
