"""Run block work on all cores: kernels release the GIL, so threads are enough."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def n_workers() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


_here = threading.local()


def _begin() -> None:
    _here.is_worker = True


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_workers(), "tscfile", initializer=_begin)


# A forked process has none of its parent's threads and would wait for them for ever.
os.register_at_fork(after_in_child=_pool.cache_clear)


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results of ``work`` on ``items`` in order, a few ahead, so that memory stays bounded.

    >>> list(in_order(lambda x: x * x, [3, 1, 2]))
    [9, 1, 4]
    """
    if getattr(_here, "is_worker", False):
        # Work that gives work would wait for a thread that waits for it.
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    ahead = 2 * n_workers()
    try:
        for item in items:
            waiting.append(_pool().submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def run(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do ``work`` on all items; the first exception is raised."""
    for _ in in_order(work, items):
        pass
