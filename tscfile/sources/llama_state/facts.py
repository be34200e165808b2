"""What an archive says of a llama.cpp state is checked before it decides what is written.

The facts are those that `reader` finds in a state; an archive may have been made by anybody.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ...errors import DamagedError
from ...model import Snapshot
from .layout import (
    CONTAINERS,
    KINDS,
    KV,
    MAX_ARCH_LENGTH,
    MAX_SEQUENCES,
    MAX_VERSION,
    MIN_VERSION,
)
from .tokens import PACKED, PLAIN, VERBATIM

_MAX_ROTATION = 1 << 16


def check_facts(snapshot: Snapshot) -> None:
    """`DamagedError` if the facts of a state of llama.cpp are not such as the reader finds."""
    facts = snapshot.source
    for key, is_right in _NEEDED.items():
        _check(key in facts and is_right(facts[key]), key)
    for key, is_right in _OPTIONAL.items():
        _check(key not in facts or is_right(facts[key]), key)
    _check(facts.get("token_form") != VERBATIM or "token_field" in snapshot.opaque, "token_form")
    _check(_is_arch(snapshot.identity.facts.get("architecture", "llama")), "architecture")
    n_stream = facts["n_stream"]
    _check(len(n_stream) == _kinds(facts["parts"]).count(KV), "n_stream")
    places = [(track.cache, track.stream) for track in snapshot.tracks]
    _check(len(set(places)) == len(places), "tracks")
    for track in snapshot.tracks:
        _check(track.cache < len(n_stream) and track.stream < n_stream[track.cache], "tracks")
        for key, is_right in _OF_TRACKS.items():
            _check(key not in track.attributes or is_right(track.attributes[key]), key)


def _check(is_right: bool, key: str) -> None:
    if not is_right:
        raise DamagedError(
            f"the archive's facts about its llama.cpp state cannot be ({key}); it is damaged"
        )


def _kinds(parts: str) -> tuple[str, ...]:
    return tuple(part for part in parts.split(",") if part)


def _is_arch(value: Any) -> bool:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ARCH_LENGTH:
        return False
    return value.isascii() and value.isprintable()


def _is_flag(value: Any) -> bool:
    return isinstance(value, int) and value in (0, 1)


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and low <= value <= high


_NEEDED: dict[str, Callable[[Any], bool]] = {
    "container": lambda value: isinstance(value, str) and value in CONTAINERS,
    "version": lambda value: (
        _is_integer(value, MIN_VERSION, MAX_VERSION) or _is_integer(value, 0, 0)
    ),
    "generation": lambda value: (
        isinstance(value, str) and re.fullmatch("([A-G](-[A-G])?)?", value) is not None
    ),
    "parts": lambda value: isinstance(value, str) and _kinds(value) in KINDS,
    "n_stream": lambda value: (
        isinstance(value, list) and all(_is_integer(n, 0, MAX_SEQUENCES) for n in value)
    ),
    "has_outputs": _is_flag,
    "has_streams": _is_flag,
    "ext_bytes": lambda value: isinstance(value, int) and value in (0, 8, 12),
    "has_rotation": _is_flag,
}
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "token_form": lambda value: isinstance(value, str) and value in (PLAIN, PACKED, VERBATIM),
    "arch": _is_arch,
    "buffer_magic": _is_flag,
    "seq_id": lambda value: _is_integer(value, -(1 << 31), (1 << 31) - 1),
}
_OF_TRACKS: dict[str, Callable[[Any], bool]] = {
    "v_trans": _is_flag,
    "n_rot_k": lambda value: _is_integer(value, 0, _MAX_ROTATION),
    "n_rot_v": lambda value: _is_integer(value, 0, _MAX_ROTATION),
}
