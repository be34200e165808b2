"""Learn a plain book from state files alone, where no model is at hand.

The basis is that of the frames themselves, every tensor counting alike; nothing is predicted from
tokens. Quality cannot be measured without a model, so tiers are steps relative to the size of the
frames, as they were found to hold on the reference model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..context import FrameContext
from ..entropy import ladder, token_ids
from ..errors import MismatchError, UnsupportedError, UsageError
from ..identity import compare
from ..model import ModelIdentity, Snapshot, TensorSpec, Track
from ..transforms import channels
from ..transforms.prediction import N_POSITION
from ..transforms.rope import HALVES, Rope
from .basis import GROUP_CHANNELS, Progress, distributions, layer_groups, with_basis
from .book import Book, TierEntry
from .checkpoint import Checkpoint
from .metric import Metric

RELATIVE_STEPS = {"near": 0.18, "balanced": 0.5, "compact": 1.2}
"""Steps over the root mean square of a frame's channels, in the metric of the book."""

_WINDOW = 512
_LEAST_FRAMES = 64


def learn(
    snapshots: Sequence[Snapshot], progress: Progress = lambda words: None,
    *, group_channels: int = GROUP_CHANNELS,
) -> Book:  # fmt: skip
    """A plain book for the model that made ``snapshots``.

    Raises `MismatchError` if they are not of one model, `UnsupportedError` where books do not take
    their shape or their RoPE is not known, `UsageError` for too few frames.
    """
    source = _StateFrames(snapshots)
    groups = layer_groups(source.n_layers, source.width, group_channels)
    variances = np.mean([source.frames(i).var(axis=0) for i in range(len(source))], axis=0)
    metric = Metric.plain(variances.reshape(2 * groups.n_layers, -1).mean(axis=1), groups.width)
    documents = [np.ascontiguousarray(each.tokens, np.int32) for each in snapshots]
    largest = max((int(ids.max(initial=0)) for ids in documents), default=0)
    n_tokens = max(largest + 1, int(source.identity.facts.get("vocab_size", 0)))
    nothing = np.zeros(0, np.float32)
    facts = source.identity.facts | {
        "book.history": 0,
        "book.decays": [],
        "book.decay_dims": 0,
        "book.n_layers": groups.n_layers,
        "book.group_layers": groups.per_group,
        "book.group_predictions": [0] * groups.n_groups,
        "book.group_coefficients": [0] * groups.n_groups,
        "book.rope_pairing": HALVES,
        "book.rope_scale": float(source.rope.scale),
        "book.head_dim": source.head_dim,
        "book.metric": "plain",
        "book.text_blake3": [],
    }
    book = Book(facts, {
        "mean": np.zeros(2 * groups.n_layers * groups.width, np.float32),
        "token_vectors": np.zeros((1, 0), np.int8),
        "token_scales": np.zeros(1, np.float32),
        "hidden": np.zeros((N_POSITION, 0), np.int8),
        "hidden_scales": nothing,
        "hidden_bias": nothing,
        "linear": np.zeros((N_POSITION, 0), np.int8),
        "linear_scales": nothing,
        "output": np.zeros((0, 0), np.int8),
        "output_scales": nothing,
        "prediction": np.zeros((0, groups.n_channels), np.int8),
        "prediction_scales": nothing,
        "basis": np.zeros((0, groups.n_channels), np.int8),
        "basis_scales": nothing,
        "log_sigmas": np.zeros(0, np.int16),
        "metric": metric.blocks,
        "inv_freq": source.rope.inv_freq,
    })  # fmt: skip
    book = with_basis(book, source, metric, Checkpoint(None, ""), progress, shrink=True)
    book.arrays["frequencies"] = distributions(book, source, progress)
    book.arrays |= token_ids.learn(documents, n_tokens)
    power = float(np.exp2(2 * book.log_sigmas.astype(np.float64) / ladder.UNITS_PER_OCTAVE).sum())
    rms = math.sqrt(power / book.n_channels)
    for name, relative in RELATIVE_STEPS.items():
        log_step = round(ladder.UNITS_PER_OCTAVE * math.log2(relative * rms))
        book.tiers[name] = TierEntry(name, log_step, math.nan, math.nan)
    return book


@dataclass(frozen=True)
class _Window:
    track: Track
    start: int
    stop: int
    tokens: NDArray[np.int32]


class _StateFrames:
    """Frames of saved states, a few hundred at a time; see `basis.FrameSource`."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self.identity = ModelIdentity()
        self._windows: list[_Window] = []
        tensors: Sequence[TensorSpec] | None = None
        for snapshot in snapshots:
            differences = compare(self.identity, snapshot.identity)
            if differences:
                raise MismatchError(f"the states are of two models: {'; '.join(differences)}")
            self.identity.facts.update(snapshot.identity.facts)
            for track in snapshot.tracks:
                channels.check_floats(track.tensors)
                shapes = [(each.layer, each.role, each.n_channels) for each in track.tensors]
                if tensors is None:
                    tensors = track.tensors
                elif shapes != [(each.layer, each.role, each.n_channels) for each in tensors]:
                    raise MismatchError("the states have layers of different shapes")
                for start in range(0, len(track.cells), _WINDOW):
                    stop = min(start + _WINDOW, len(track.cells))
                    self._windows.append(_Window(track, start, stop, snapshot.tokens))
        n_frames = sum(each.stop - each.start for each in self._windows)
        if tensors is None or n_frames < _LEAST_FRAMES:
            raise UsageError(f"{n_frames} frames are too few to learn from; give more states")
        self._set_shape(tensors)

    def _set_shape(self, tensors: Sequence[TensorSpec]) -> None:
        sizes = {each.n_channels for each in tensors}
        roles = [sum(each.role == role for each in tensors) for role in "kv"]
        facts = self.identity.facts
        known = all(key in facts for key in ("rope_base", "rope_dim", "head_dim_k"))
        if len(sizes) > 1 or roles[0] != roles[1]:
            raise UnsupportedError("layers of different shapes are not supported by books yet")
        if not known or facts.get("rope_scaling", "none") != "none":
            raise UnsupportedError(
                "how the keys are turned is not known; name the model with --model"
            )
        self.n_layers, self.width = roles[0], sizes.pop()
        self.head_dim = int(facts["head_dim_k"])
        self.pairing = str(facts.get("rope_pairing", HALVES))
        at = np.arange(0, int(facts["rope_dim"]), 2, dtype=np.float64)
        inv_freq = float(facts["rope_base"]) ** -(at / int(facts["rope_dim"]))
        self.rope = Rope(inv_freq.astype(np.float32), HALVES)

    def __len__(self) -> int:
        return len(self._windows)

    def context(self, number: int) -> FrameContext:
        each = self._windows[number]
        return FrameContext(each.track.cells.pos[each.start : each.stop], each.tokens)

    def frames(self, number: int) -> NDArray[np.float32]:
        each = self._windows[number]
        rows = each.track.read(each.start, each.stop)
        pos = each.track.cells.pos[each.start : each.stop]
        return channels.to_frames(
            rows, each.track.tensors, pos, self.rope, self.head_dim, self.pairing
        )
