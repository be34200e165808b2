"""Names: does the model still know a name that stood early in the context?

A *name* is a word of two tokens or more with a capital letter inside a sentence, among the first
100 tokens of a window and nowhere behind them. It is asked for behind the whole context: the 8
tokens that stood before it are fed once more. Does the model *call* the name, that is expect its
first token; and, given that one, does it *finish* the name as it was spelled? Names are told by the
text alone, never by what the model answers; a document gives each of its names once.

The same is asked of the original cache, of what each codec gives back, and of the cache dropped but
for its first 4 frames (*forgotten*): a share that is no higher with the original than with that one
says that the model cannot do it, whatever the cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .arrays import KVArrays
from .protocol import N_SINKS, Plan
from .windows import Text, draw

if TYPE_CHECKING:
    from rich.table import Table

    from .codec import Codec
    from .engine import Engine

N_EARLY = 100
N_CUE = 8
"""Chosen on the calibration text: more tokens help the forgetful as much as the others."""
NAMES_OF_WINDOW = 4
ORIGINAL, FORGOTTEN = "original", "forgotten"

Progress = Callable[[str], None]

_NAME = re.compile(r" [A-Z][A-Za-z]{2,}")
_BEFORE = re.compile(r".*[A-Za-z,(]")
"""What a name stands behind: a word, and no full stop, heading or item of a list."""


@dataclass(frozen=True)
class NameProbe:
    """``cue``, ``name``: int32 token ids; ``text``: the name; ``place``: of its first token."""

    text: str
    place: int
    cue: NDArray[np.int32]
    name: NDArray[np.int32]


@dataclass(frozen=True)
class NameScore:
    """Of all probes at one length of context.

    ``called_top1``, ``called_top5``: share of probes where the name's first token is the
    likeliest, one of the five likeliest; ``called_log_probability``: the mean of its log p, nats.
    ``finished``: share where every further token is the likeliest behind those before it;
    ``finished_log_probability``: the mean of their log p, summed over the name. ``kept``: share
    finished of those that the original cache finishes. ``hits``: for each probe whether it is
    finished, as ``1`` and ``0``.
    """

    codec: str
    frames: int
    snapshot_ratio: float | None
    n_probes: int
    called_log_probability: float
    called_top1: float
    called_top5: float
    finished_log_probability: float
    finished: float
    kept: float
    hits: str


@dataclass(frozen=True)
class NameReport:
    """``names``: those asked for, by length of context."""

    conditions: dict[str, Any]
    names: dict[int, list[str]]
    scores: list[NameScore]

    def tables(self) -> list[Table]:
        """A rich table for each length of context."""
        from rich.table import Table

        found = []
        for frames, names in self.names.items():
            title = f"{self.conditions['model']}, {frames} frames, {len(names)} names"
            table = Table(title=title, title_justify="left")
            for name in _COLUMNS:
                table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
            for each in self.scores:
                if each.frames == frames:
                    table.add_row(*_cells(each))
            found.append(table)
        return found


_COLUMNS = (
    "cache", "ratio", "called", "in five", "log p", "finished", "log p", "of the original's"
)  # fmt: skip


def _cells(score: NameScore) -> tuple[str, ...]:
    return (
        score.codec, "-" if score.snapshot_ratio is None else f"{score.snapshot_ratio:.4g}",
        f"{score.called_top1:.3f}", f"{score.called_top5:.3f}",
        f"{score.called_log_probability:.3f}", f"{score.finished:.3f}",
        f"{score.finished_log_probability:.3f}", f"{score.kept:.3f}",
    )  # fmt: skip


def evaluate_names(
    engine: Engine,
    text: Text,
    codecs: Sequence[Codec],
    plan: Plan,
    *,
    progress: Progress | None = None,
) -> NameReport:
    """Ask for names behind every cache. Of ``plan`` lengths, number of windows and seed count.

    Raises `UsageError` if the text is too short or has too few names in the right places.
    """
    say = progress or (lambda words: None)
    documents = [engine.tokenize(document) for document in text.documents]
    names: dict[int, list[str]] = {}
    scores: list[NameScore] = []
    for frames in plan.frames:
        if frames <= 2 * N_EARLY or frames + N_CUE + N_EARLY > engine.max_positions:
            raise UsageError(f"{frames} frames: give more than {2 * N_EARLY} that fit the model")
        windows = _windows(engine, documents, frames, plan)
        names[frames] = [probe.text for _, probes in windows for probe in probes]
        answers: dict[str, list[_Answer]] = {}
        sizes: dict[str, int] = {}
        raw_bytes = 0
        for number, (tokens, probes) in enumerate(windows):
            say(f"{frames} frames, window {number + 1}: reading")
            original = engine.prefill(tokens)
            raw_bytes += original.raw_bytes
            caches = {ORIGINAL: original, FORGOTTEN: original.head(N_SINKS)}
            for codec in codecs:
                say(f"{frames} frames, window {number + 1}: {codec.name}")
                data = codec.encode(original)
                sizes[codec.name] = sizes.get(codec.name, 0) + len(data)
                caches[codec.name] = codec.decode(data, original.shape)
            for name, cache in caches.items():
                answers.setdefault(name, []).extend(
                    _ask(engine, cache, probe, frames) for probe in probes
                )
        scores += [
            _score(
                name, frames, found, answers[ORIGINAL],
                raw_bytes / sizes[name] if name in sizes else None,
            )  # fmt: skip
            for name, found in answers.items()
        ]
    conditions = {
        "model": engine.path.name, "weights_blake3": engine.fingerprint(), "text": text.name,
        "text_blake3": text.digest, "n_windows": plan.n_windows, "seed": plan.seed,
        "n_early": N_EARLY, "n_cue": N_CUE,
    }  # fmt: skip
    return NameReport(conditions, names, scores)


_Window = tuple[NDArray[np.int32], list[NameProbe]]


def _windows(
    engine: Engine, documents: Sequence[NDArray[np.int32]], frames: int, plan: Plan
) -> list[_Window]:
    """Evenly spread windows that have names. They overlap, but not in the part with the names."""
    offers: list[_Window] = []
    for number, ids in enumerate(documents):
        known: set[str] = set()
        for start in range(draw(N_EARLY, plan.seed, number), len(ids) - frames + 1, N_EARLY):
            tokens = ids[start : start + frames]
            found = find_names(engine.pieces(tokens), tokens)
            probes = [probe for probe in found if probe.text not in known]
            known |= {probe.text for probe in probes}
            offers += [(tokens, probes)] if probes else []
    if len(offers) < plan.n_windows:
        raise UsageError(
            f"the text has {len(offers)} windows of {frames} tokens with a name early in them and "
            f"{plan.n_windows} are wanted; give a longer text or fewer windows"
        )
    return [offers[i * len(offers) // plan.n_windows] for i in range(plan.n_windows)]


def find_names(pieces: Sequence[str], tokens: NDArray[np.int32]) -> list[NameProbe]:
    """Names of one window, evenly taken, at most `NAMES_OF_WINDOW`.

    ``pieces``: the text of each token. Only the first place of a name counts.

    >>> pieces = [" x"] * 30 + [" M", "ary", ","] + [" and"] * 70 + ["!"]
    >>> [(probe.text, probe.place, len(probe.cue), len(probe.name))
    ...  for probe in find_names(pieces, np.arange(len(pieces), dtype=np.int32))]
    [('Mary', 30, 8, 2)]
    """
    later = "".join(pieces[N_EARLY:])
    found: dict[str, NameProbe] = {}
    seen: set[str] = set()
    for start in range(1, N_EARLY):
        stop = start + 1
        while stop < len(pieces) and pieces[stop][:1].isalpha():
            stop += 1
        word = "".join(pieces[start:stop])
        if not _NAME.fullmatch(word) or not _BEFORE.fullmatch(pieces[start - 1]) or word in seen:
            continue
        seen.add(word)
        in_place = N_SINKS + N_CUE <= start and start + 1 < stop <= N_EARLY
        if not in_place or word.strip() in later:
            continue
        cue, name = tokens[start - N_CUE : start], tokens[start:stop]
        found[word] = NameProbe(word.strip(), start, cue, name)
    every = list(found.values())
    n = min(NAMES_OF_WINDOW, len(every))
    return [every[i * len(every) // n] for i in range(n)]


@dataclass(frozen=True)
class _Answer:
    """log p and rank of the name's first token; log p of the others, and are all likeliest?"""

    first: float
    rank: int
    rest: float
    finished: bool


def _ask(engine: Engine, cache: KVArrays, probe: NameProbe, frames: int) -> _Answer:
    """Feed cue and name; the tokens behind the cue's last say what the model expects."""
    feed = np.concatenate([probe.cue, probe.name])[:-1]
    logits = engine.proceed(cache, feed, frames)[N_CUE - 1 :].double().cpu()
    chances = logits.log_softmax(-1).numpy()
    of_name = chances[np.arange(len(probe.name)), probe.name]
    return _Answer(
        float(of_name[0]),
        int((chances[0] > of_name[0]).sum()),
        float(of_name[1:].sum()),
        bool((chances[1:].argmax(-1) == probe.name[1:]).all()),
    )


def _score(
    name: str, frames: int, found: Sequence[_Answer], before: Sequence[_Answer],
    ratio: float | None,
) -> NameScore:  # fmt: skip
    kept = [a.finished for a, b in zip(found, before, strict=True) if b.finished]
    return NameScore(
        codec=name,
        frames=frames,
        snapshot_ratio=ratio,
        n_probes=len(found),
        called_log_probability=float(np.mean([each.first for each in found])),
        called_top1=float(np.mean([each.rank == 0 for each in found])),
        called_top5=float(np.mean([each.rank < 5 for each in found])),
        finished_log_probability=float(np.mean([each.rest for each in found])),
        finished=float(np.mean([each.finished for each in found])),
        kept=float(np.mean(kept)) if kept else 0.0,
        hits="".join(str(int(each.finished)) for each in found),
    )
