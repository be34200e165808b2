"""Progress of a long training on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

T = TypeVar("T")
State = dict[str, NDArray[Any]]

_EVERY_SECONDS = 30.0


class Checkpoint:
    """Named states of arrays in a folder, kept as ``.npz`` (never pickled).

    States of another ``key`` (another model, text or choice of options) are thrown away;
    `UsageError` for a folder that no training made. With no ``folder`` nothing is kept.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = folder
        if folder is None:
            return
        note = folder / "key"
        if folder.exists() and not note.is_file():
            raise UsageError(f"{folder}: is in the way of what training keeps there; move it")
        if folder.exists() and note.read_text() != key:
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        note.write_text(key)

    def get(self, stage: str) -> State | None:
        """The state last put for ``stage``; None if there is none that can be read."""
        path = self._path(stage)
        if path is None or not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError, EOFError):
            return None

    def put(self, stage: str, state: State) -> None:
        path = self._path(stage)
        if path is None:
            return
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            np.savez(file, **state)  # type: ignore[arg-type]
        os.replace(new, path)

    def accumulate(
        self, stage: str, items: Sequence[T], start: Callable[[], State],
        add: Callable[[State, int, T], None],
    ) -> State:  # fmt: skip
        """``start()`` with every item added by ``add(state, number, item)``, in order.

        The state is put now and then and at the end; what is there of it is not done again.
        """
        state = self.get(stage) or {"done": np.array(0), **start()}
        saved = time.monotonic()
        first = int(state["done"])
        for number in range(first, len(items)):
            add(state, number, items[number])
            state["done"] = np.array(number + 1)
            if time.monotonic() - saved > _EVERY_SECONDS:
                self.put(stage, state)
                saved = time.monotonic()
        if first < len(items):
            self.put(stage, state)
        return state

    def done(self) -> None:
        """The training is finished: nothing is kept any more."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, stage: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{stage}.npz"
