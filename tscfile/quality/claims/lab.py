"""What experiments share: the model, caches of the text, and every codec measured once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ...errors import UsageError
from ..arrays import KVArrays
from ..calibration import Calibration
from ..codec import Codec
from ..engine import Engine
from ..pages import page_size
from ..protocol import CodecResult, Plan, Report
from ..windows import Text, choose_windows
from .eviction import Ranking
from .verdicts import Measured, Reading

REPORT_LENGTH = 1024
"""Tokens at which parts I and III state their figures."""

N_CACHES = 4
"""Windows that what needs no model is counted on."""


@dataclass
class Lab:
    """``report``: what `evaluate` found, of all codecs that the chosen experiments asked for.

    With ``calibration`` and ``book`` differences are also tried before the coder of the tiers.
    """

    engine: Engine
    text: Text
    frames: int
    n_windows: int
    seed: int = 0
    calibration: Calibration | None = None
    book: Path | None = None
    report: Report | None = None
    _kept: dict[str, object] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The continuation protocol alone: no passage fits behind so long a recall."""
        return Plan((self.frames,), self.n_windows, n_recall=self.frames, seed=self.seed)

    @cached_property
    def ranking(self) -> Ranking:
        return Ranking(self.engine)

    @cached_property
    def page(self) -> int:
        """Values of a page inside a head: 64, or what divides the heads of this model."""
        first = self.caches[0].shape.layers[0]
        return min(page_size(first.key_dim), page_size(first.value_dim))

    @property
    def n_layers(self) -> int:
        return len(self.caches[0].shape.layers)

    @cached_property
    def length(self) -> int:
        """Tokens of `caches`."""
        return min(REPORT_LENGTH, self.engine.max_positions)

    @cached_property
    def caches(self) -> list[KVArrays]:
        """Caches of `length` tokens of the text, as many of `N_CACHES` as it has room for."""
        documents = [self.engine.tokenize(document) for document in self.text.documents]
        opening = [] if self.engine.bos is None else [self.engine.bos]
        for n in range(N_CACHES, 0, -1):
            try:
                windows = choose_windows(documents, self.length - len(opening), n, self.seed)
            except UsageError:
                if n == 1:
                    raise
                continue
            break
        tokens = [np.concatenate([opening, each.tokens]).astype(np.int32) for each in windows]
        return [self.engine.prefill(each) for each in tokens]

    # --- results ------------------------------------------------------------------------------

    def result(self, name: str) -> CodecResult:
        assert self.report is not None
        return next(each for each in self.report.results if each.codec == name)

    def ratio(self, name: str) -> float:
        """One fp16 cache over all bytes stored."""
        return self.result(name).snapshot_ratio

    def bits(self, name: str) -> float:
        return self.result(name).bits_per_value

    def quality(self, name: str) -> Measured:
        return Measured.of(self.result(name).continuation)

    def mean_quality(self, names: Sequence[str]) -> Measured:
        """The mean over several codecs; of the 99th percentiles too."""
        found = [self.quality(name) for name in names]
        columns = [(q.kl, q.kl_p99, q.top1, q.perplexity_delta) for q in found]
        kl, kl_p99, top1, perplexity_delta = np.mean(columns, axis=0).tolist()
        n_predictions = sum(each.n_predictions for each in found)
        return Measured(kl, kl_p99, top1, perplexity_delta, n_predictions)

    def remember(self, name: str, make: Callable[[], object]) -> object:
        """``make()``, computed once for each name."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


Answers = dict[str, list[Reading]]


@dataclass(frozen=True)
class Experiment:
    """``ids``: claims that it answers. ``codecs``: what has to be measured before ``answer``."""

    name: str
    title: str
    ids: tuple[str, ...]
    codecs: Callable[[Lab], Sequence[Codec]]
    answer: Callable[[Lab], Answers]


def no_codecs(lab: Lab) -> Sequence[Codec]:
    return ()
