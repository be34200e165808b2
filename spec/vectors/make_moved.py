"""Frames that moved or were changed a little: `moved`, of a book tier, and `difference`, exact.

Of the first tscfile finds out what has moved; the second is made block by block, as what turns keys
best would be found by sums in floating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from draft import Draft, plain_cells, snapshot_record, track_record
from numpy.typing import NDArray
from toy import COEFFICIENTS, MadeUpTrack, as_ids, tensors_of, toy_book

import tscfile
from tscfile import difference_codec, pipeline, registry
from tscfile.blocks import content_id
from tscfile.container.records import FrameRun
from tscfile.context import FrameContext
from tscfile.dtypes import DTYPES
from tscfile.model import ModelIdentity, Snapshot, TensorSpec
from tscfile.transforms import channels
from tscfile.transforms.turning import Turn, turn_rows

Rows = NDArray[np.uint8]

# --- moved ------------------------------------------------------------------------------------

LONG = [2, 0, 1, 0, 7, 1, 0, 1, 1, 2, 0, 0, 2, 1, 2, 0, 2, 2, 1, 0, 0, 1, 2, 0, 1, 1, 1, 2, 0, 2,
        1, 0, 2, 1, 0, 0, 0, 1, 2, 2]  # fmt: skip
LATER = [1, 0, 2, 0, 1, 1]
N_KEEP, N_CUT = 4, 10


@dataclass
class Stretch:
    """Frames that the model computed at positions ``first`` to ``last`` of ``tokens``, their keys
    turned by ``shift`` positions since; ``number``: that of the first one's coefficients."""

    tokens: list[int]
    first: int
    last: int
    shift: int = 0
    number: int = 0

    def rows(self) -> list[Rows]:
        book, tensors = toy_book(), tensors_of(2)
        there = np.arange(self.first, self.last, dtype=np.int32)
        context = FrameContext(there, as_ids(self.tokens), self.shift)
        chosen = np.array(COEFFICIENTS, np.float32)
        chosen = chosen[(self.number + np.arange(len(there))) % len(chosen)]
        frames = book.synthesize(book.network(context), chosen, [2, 1])
        return channels.from_frames(frames, tensors, context.key_pos, book.rope, 4, "norm")


def session_of(tokens: list[int], stretches: Sequence[Stretch]) -> Snapshot:
    parts = zip(*(each.rows() for each in stretches), strict=True)
    track = MadeUpTrack([np.concatenate(part).view("<f2") for part in parts], {})
    identity = ModelIdentity({"architecture": "toy", "rope_pairing": "norm"})
    return Snapshot(as_ids(tokens), [track], {"format": "example"}, {}, identity)


def make_moved(path: Path) -> None:
    """A session whose oldest tokens but the first are cut out twice, with an append between."""
    without = LONG[:N_KEEP] + LONG[N_KEEP + N_CUT :]
    longer = without + LATER
    last = longer[:N_KEEP] + longer[N_KEEP + N_CUT :]
    kept = Stretch(LONG, 0, N_KEEP)
    new = Stretch(longer, len(without), len(longer), 0, len(LONG))
    n, cut = len(LONG), N_KEEP + N_CUT
    saves = {
        "first": (LONG, [Stretch(LONG, 0, n)]),
        "cut": (without, [kept, Stretch(LONG, cut, n, -N_CUT, cut)]),
        "longer": (longer, [kept, Stretch(LONG, cut, n, -N_CUT, cut), new]),
        "cut again": (last, [
            kept, Stretch(LONG, cut + N_CUT, n, -2 * N_CUT, cut + N_CUT),
            Stretch(longer, new.first, new.last, -N_CUT, new.number),
        ]),
    }  # fmt: skip
    book = path.with_suffix(".book")
    book.write_bytes(toy_book().to_bytes())
    path.unlink(missing_ok=True)
    for name, (tokens, stretches) in saves.items():
        snapshot = session_of(tokens, stretches)
        if path.exists():
            tscfile.append(snapshot, path, name=name)
        else:
            tscfile.pack(snapshot, path, tier="near", book=book, embed_book=True, name=name)
    book.unlink()


# --- difference -------------------------------------------------------------------------------

TENSORS = [
    *(TensorSpec(layer, "k", DTYPES["f16"], 8, 0) for layer in range(2)),
    *(TensorSpec(layer, "v", DTYPES["q8_0"], 34, 0) for layer in range(2)),
]
COSINES, SINES = [145036296, 235574275], [-225880648, -128694813]
TURN = Turn(4, "norm", np.array(COSINES, np.int32), np.array(SINES, np.int32))
"""By −1 position, or nearly: the angles are −1 and −0.5."""


def make_difference() -> Draft:
    """Six tokens; the same save with three frames patched; then the token at position 2 is cut out,
    which moves the frames behind it: those that were patched, and one that was not."""
    draft, ids = Draft(), as_ids([5, 6, 7, 8, 9, 10])
    first, saves = first_rows(), Saves(draft)
    chunks = [
        pipeline.encode_chunk(first[a:b], TENSORS[a].dtype, a, registry.RAW)
        for a, b in ((0, 2), (2, 4))
    ]  # fmt: skip
    number = draft.block(chunks, content_id(first))
    saves.add(ids, [(number, 0, 6)], name="first")
    patched = [part[2:5].copy() for part in first]
    patched[0][1, 2] += 3  # of key 0 the second channel, by 3 patterns
    patched[1][2, 1] ^= 0x80  # of key 1 the sign of the first one: far away
    patched[3][0, 5] -= 2  # a code of value 1
    second = add_difference(draft, patched, first, [FrameRun(number, 2, 3)])
    runs = [(number, 0, 2), (second, 0, 3), (number, 5, 1)]
    saves.add(ids, runs, name="patched", plan="patch")
    moved = [np.concatenate([part[1:], whole[5:]])
             for part, whole in zip(patched, first, strict=True)]  # fmt: skip
    turned = [turn_rows(part, tensor.dtype, TURN) if TURN.takes(tensor) else part.copy()
              for part, tensor in zip(moved, TENSORS, strict=True)]  # fmt: skip
    turned[1][1, 0] += 1
    sources = [FrameRun(second, 1, 2), FrameRun(number, 5, 1)]
    third = add_difference(draft, turned, first, sources, TURN, moved)
    shorter = np.delete(ids, 2)
    saves.add(shorter, [(number, 0, 2), (third, 0, 3)], name="shifted", plan="shift")
    return draft


def first_rows() -> list[Rows]:
    keys = [np.arange(1, 25).reshape(6, 4) / 4 - layer for layer in range(2)]
    rows = [part.astype("<f2").view(np.uint8) for part in keys]
    scales = np.full((6, 1), 0.0625).astype("<f2").view(np.uint8)
    codes = np.add.outer(7 * np.arange(6), 5 * np.arange(32)) % 251 - 125
    rows += [np.concatenate([scales, (codes + layer).astype(np.int8).view(np.uint8)], axis=1)
             for layer in range(2)]  # fmt: skip
    return rows


def add_difference(
    draft: Draft, rows: list[Rows], first: list[Rows], sources: list[FrameRun],
    turn: Turn | None = None, base: list[Rows] | None = None,
) -> int:  # fmt: skip
    """A block of ``rows`` as the difference to ``sources``; ``base``: their rows, by default those
    of the first block."""
    if base is None:
        (run,) = sources
        base = [part[run.first : run.first + run.count] for part in first]
    chunk = difference_codec.encode_chunk(rows, base, TENSORS, turn)
    return draft.block([chunk], content_id(rows), sources)


@dataclass
class Saves:
    """Snapshots of a draft, each the parent and dictionary of the next."""

    draft: Draft
    ids: NDArray[np.int32] | None = None
    structure: bytes = b""

    def add(self, ids: NDArray[np.int32], runs: list[tuple[int, int, int]], **facts: str) -> None:
        number = len(self.draft.snapshots)
        before = ids[:0] if self.ids is None else self.ids
        record = snapshot_record(
            ids, [track_record(TENSORS, runs, plain_cells(len(ids)))], number=number,
            parent=number - 1 if number else None, before=before, **facts,
        )  # fmt: skip
        self.structure = self.draft.snapshot(record, ids, self.structure)
        self.ids = ids
