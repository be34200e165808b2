"""Snapshots drawn as the tree of their parents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def draw(parents: Sequence[int | None]) -> Iterator[tuple[str, int]]:
    """Lines of a tree: what is drawn before a snapshot, and its number.

    ``parents``: of each snapshot, an earlier one or None. The line that leads to the newest goes
    straight down, what branches off it is drawn first and further in.

    >>> for graph, number in draw([None, 0, 1, 1, 2, 3]):
    ...     print(graph, number)
    * 0
    * 1
    |-* 2
    | * 4
    * 3
    * 5
    """
    children: list[list[int]] = [[] for _ in parents]
    newest = list(range(len(parents)))
    # Parents come first, so that backwards every child is done before its parent.
    for number, parent in reversed(list(enumerate(parents))):
        if parent is not None:
            children[parent].append(number)
            newest[parent] = max(newest[parent], newest[number])
    roots = [number for number, parent in enumerate(parents) if parent is None]
    stack = [("", "", root) for root in reversed(roots)]
    while stack:
        first, rest, number = stack.pop()
        yield f"{first}*", number
        if children[number]:
            straight = max(children[number], key=newest.__getitem__)
            stack.append((rest, rest, straight))
            # They are listed from the last to the first, which is the first to come.
            stack += [(f"{rest}|-", f"{rest}| ", c) for c in children[number] if c != straight]
