"""Continuing a snapshot in llama.cpp.

`resume` does it all: guards, load, prompt, generation. `restore` stops once the state is in the
engine and logits for the next token are there, for callers who want to go on by themselves.

A state has no logits, so its last token is decoded again in any case. That row is computed anew
from all others and compared with the stored one (`guards`).

    result = resume(snapshot, "model.gguf", " And so", 64)
    print(result.text, result.n_reused, result.n_computed)

With ``recompute`` no stored row goes into the engine: it reads all tokens again. The result is what
the model makes of them on this machine, in this build and with this batch size, which is not bit
for bit what another one made (``tests/bench/recompute.py`` measures that).
"""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, DType
from ..errors import MismatchError, TscError, UnsupportedError, UsageError
from ..model import Snapshot
from ..sources.hf_layout import as_llama_state
from . import guards
from .engine import Context, Model

CELL_MULTIPLE = 256
"""llama.cpp rounds the size of a cache up to this."""


@dataclass(frozen=True)
class ResumeResult:
    """What was generated, and what it took.

    ``text``, ``tokens``: the continuation, without prompt and end-of-text token. ``n_reused``:
    positions that came from the snapshot, ``n_computed``: positions the engine decoded for the
    conversation; both are asked of the engine's memory. ``n_probe``: tokens decoded on the side to
    prove that model and state belong together. ``load_seconds``: writing the state into the
    engine, without loading the model. ``probe_error``: largest relative error of a recomputed
    tensor row, None if none was computed. ``n_recomputed``, ``compute_seconds``: the snapshot's
    tokens that were read again in place of its rows, and how long that took. ``notes``: guards that
    were skipped, and why.
    """

    text: str
    tokens: list[int]
    n_reused: int
    n_computed: int
    n_probe: int
    load_seconds: float
    probe_error: float | None
    n_recomputed: int = 0
    compute_seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass
class Restored:
    """A snapshot in the engine. Close it, or use it as a context manager.

    ``first``: position of the first cell. ``logits``: float32 ``[n_vocab]`` for the token after the
    last, None where there is none that could be decoded again: no token list, or a recurrent part,
    which cannot step back. Other fields: see `ResumeResult`.
    """

    model: Model
    context: Context
    first: int = 0
    logits: NDArray[np.float32] | None = None
    n_reused: int = 0
    n_probe: int = 0
    load_seconds: float = 0.0
    probe_error: float | None = None
    n_recomputed: int = 0
    compute_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __enter__(self) -> Restored:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache and the weights."""
        self.context.close()
        self.model.close()

    @property
    def n_positions(self) -> int:
        """Positions in the engine's memory.

        The engine itself tells the last one only: its first is that of the sliding windows.
        """
        return max(self.context.position_range()[1] - self.first + 1, 0)

    @property
    def n_computed(self) -> int:
        """Positions in memory that did not come from the snapshot."""
        return self.n_positions - self.n_reused

    def decode(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Continue with ``tokens``; their last one's logits, which are kept as ``logits``."""
        logits = self.context.decode(tokens, self.context.position_range()[1] + 1)
        if np.isnan(logits).any():
            raise TscError("llama.cpp computed logits that are no numbers: the state is unusable")
        self.logits = logits
        return logits


def resume(
    snapshot: Snapshot,
    model_path: str | os.PathLike[str],
    prompt: str,
    n_predict: int,
    *,
    n_ctx: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    identity_check: bool = True,
    probe: bool = True,
    recompute: bool = False,
    on_text: Callable[[str], None] | None = None,
    verbose: bool = False,
) -> ResumeResult:
    """Load ``snapshot`` into the model at ``model_path`` and continue with ``prompt``.

    Up to ``n_predict`` tokens are generated, the likeliest ones at ``temperature`` 0, otherwise
    drawn with ``seed``. The prompt is tokenised as a continuation, without a start token.
    ``n_ctx``: cells of the context, as many as needed by default. ``on_text`` receives the text as
    it grows. ``identity_check`` and ``probe`` switch guards off; ``verbose`` shows llama.cpp's log.
    ``recompute``: read the snapshot's tokens again in place of loading its rows, which the archive
    need not have then; those it has are compared.

    Raises `MismatchError` if the state is not this model's, `UsageError` if llama-cpp-python or the
    model file is missing or the context too small, `DamagedError` for a damaged model file.
    """
    if n_predict < 0 or temperature < 0:
        raise UsageError("neither the number of tokens nor the temperature can be negative")
    notes: list[str] = []
    snapshot, extent = _check(snapshot, model_path, identity_check, recompute, notes)
    model = Model(model_path, verbose=verbose)
    with _closing_on_error(model):
        prompt_tokens = model.tokenize(prompt) if prompt else []
        n_cells = _context_size(extent, len(prompt_tokens) + n_predict, n_ctx)
        restored = _restore_into(model, snapshot, extent, n_cells, probe, recompute, notes)
    with restored:
        if prompt_tokens:
            restored.decode(prompt_tokens)
        tokens, text = _generate(restored, n_predict, temperature, seed, on_text)
        return ResumeResult(
            text=text,
            tokens=tokens,
            n_reused=restored.n_reused,
            n_computed=restored.n_computed,
            n_probe=restored.n_probe,
            load_seconds=restored.load_seconds,
            probe_error=restored.probe_error,
            n_recomputed=restored.n_recomputed,
            compute_seconds=restored.compute_seconds,
            notes=tuple(notes),
        )


def restore(
    snapshot: Snapshot,
    model_path: str | os.PathLike[str],
    *,
    n_more: int = 0,
    n_ctx: int | None = None,
    identity_check: bool = True,
    probe: bool = True,
    recompute: bool = False,
    verbose: bool = False,
) -> Restored:
    """Guard, load or recompute, and compute the logits after the last token; see `resume`.

    ``n_more``: tokens that the context must have room for beside the snapshot's.
    """
    notes: list[str] = []
    snapshot, extent = _check(snapshot, model_path, identity_check, recompute, notes)
    n_cells = _context_size(extent, n_more, n_ctx)
    model = Model(model_path, verbose=verbose)
    with _closing_on_error(model):
        return _restore_into(model, snapshot, extent, n_cells, probe, recompute, notes)


def _check(
    snapshot: Snapshot,
    model_path: str | os.PathLike[str],
    identity_check: bool,
    recompute: bool,
    notes: list[str],
) -> tuple[Snapshot, guards.Extent]:
    """The guards that need no engine; the snapshot as llama.cpp has it."""
    if not recompute:
        snapshot.need_frames()
    snapshot = replace(as_llama_state(snapshot), n_absent=snapshot.n_absent)
    extent = guards.check_tokens(snapshot)
    if recompute and not extent.n_tokens:
        raise UsageError("the state has no token list: there is nothing to recompute it from")
    if identity_check:
        identity = guards.check_identity(snapshot, model_path)
        guards.check_shape(snapshot, identity, model_path)
    else:
        notes.append("model facts and shapes were not compared: switched off")
    return snapshot, extent


def _restore_into(
    model: Model,
    snapshot: Snapshot,
    extent: guards.Extent,
    n_cells: int,
    probe: bool,
    recompute: bool,
    notes: list[str],
) -> Restored:
    type_k, type_v = _cache_types(snapshot)
    context = Context(
        model,
        n_cells,
        type_k=type_k,
        type_v=type_v,
        flash_attention=_flash_attention(snapshot, type_v),
        n_sequences=2,  # the second one is for the probe
    )
    restored = Restored(model, context, extent.first, notes=notes)
    with _closing_on_error(restored):
        if recompute:
            _recompute(restored, snapshot, extent, probe)
            return restored
        _load(restored, snapshot, extent)
        reason = guards.can_probe(context, extent) if probe else "switched off"
        if reason:
            notes.append(f"rows were not computed again for comparison: {reason}")
        else:
            restored.probe_error = guards.probe_start(context, snapshot.tokens.tolist(), extent)
            restored.n_probe = min(guards.PROBE_TOKENS, extent.n_cells)
        _replay(restored, snapshot.tokens.tolist(), extent, probe=not reason)
    return restored


@contextmanager
def _closing_on_error(resource: Model | Restored) -> Iterator[None]:
    try:
        yield
    except BaseException:
        resource.close()
        raise


# --- the context --------------------------------------------------------------------------------


def _context_size(extent: guards.Extent, n_more: int, wanted: int | None) -> int:
    held = max(extent.last + 1, extent.n_tokens)
    needed = max(held + n_more, extent.n_cells + guards.PROBE_TOKENS)
    if wanted is None:
        return -(-needed // CELL_MULTIPLE) * CELL_MULTIPLE
    if wanted < needed:
        raise UsageError(
            f"a context of {wanted} cells is too small: {held} tokens of the snapshot, prompt and "
            f"continuation take {needed}"
        )
    return wanted


def _cache_types(snapshot: Snapshot) -> tuple[DType, DType]:
    """Types of keys and values; one each, because a context has one each."""
    tensors = [tensor for track in snapshot.tracks for tensor in track.tensors]
    found = {}
    for role in ("k", "v"):
        types = {tensor.dtype.name: tensor.dtype for tensor in tensors if tensor.role == role}
        if len(types) > 1 or not types.keys() <= DTYPES.keys():
            raise UnsupportedError(
                f"the {role} rows have types {', '.join(sorted(types))}; llama.cpp makes a cache "
                f"of one of {', '.join(DTYPES)}"
            )
        found[role] = next(iter(types.values()), None)
    keys = found["k"] or DTYPES["f16"]
    return keys, found["v"] or keys


def _flash_attention(snapshot: Snapshot, type_v: DType) -> bool:
    """As at the save, so that sums run in the same order; needed for quantized values anyway."""
    return type_v.is_quantized or not any(
        track.attributes.get("v_trans") for track in snapshot.tracks
    )


# --- loading ------------------------------------------------------------------------------------


def _load(restored: Restored, snapshot: Snapshot, extent: guards.Extent) -> None:
    """Put the state into sequence 0 and check that the engine then holds its positions."""
    from ..sources.llama_state import state_size, write_state

    context = restored.context
    started = time.perf_counter()
    target: dict[str, Any] = {
        "container": "sequence-buffer",
        "llama_version": context.session_version(),
        "v_trans": int(context.v_trans),
        "arch": restored.model.architecture,
    }
    state = np.empty(state_size(snapshot, **target), np.uint8)
    write_state(snapshot, state.data, **target)
    context.set_sequence_state(state)
    restored.load_seconds = time.perf_counter() - started
    first, last = context.position_range()
    # Windows and summaries begin later than the cache they accompany.
    exact = not (restored.model.sliding_window or restored.model.is_recurrent)
    if last != extent.last or (exact and first != extent.first):
        raise MismatchError(
            f"after the load the engine holds positions {first} to {last} instead of "
            f"{extent.first} to {extent.last}: this build reads the state in another way"
        )


def _replay(restored: Restored, tokens: list[int], extent: guards.Extent, *, probe: bool) -> None:
    """Decode the last token in memory again, then what the token list has beyond it."""
    context, last = restored.context, extent.last
    if not tokens:
        restored.notes.append("the last token was not decoded again: the state has no token list")
    if not tokens or restored.model.is_recurrent:
        restored.n_reused = restored.n_positions
        if tokens[extent.n_cells :]:
            restored.decode(tokens[extent.n_cells :])
        return
    stored = guards.take_rows(context, last, last + 1) if probe else None
    if not context.remove(0, last):
        raise MismatchError("the engine cannot take back the last token of this state")
    restored.n_reused = restored.n_positions
    restored.decode(tokens[last : last + 1])
    if stored is not None:
        computed = guards.take_rows(context, last, last + 1)
        what = "the last token in memory"
        error = guards.check_rows(stored, computed, what, exact=extent.exact)
        restored.probe_error = max(restored.probe_error or 0.0, error)
    if tokens[last + 1 :]:
        restored.decode(tokens[last + 1 :])


# --- recomputing --------------------------------------------------------------------------------


def _recompute(
    restored: Restored, snapshot: Snapshot, extent: guards.Extent, probe: bool
) -> None:
    """Read all tokens again; rows that the snapshot has must be near those that come out."""
    tokens, n_held = snapshot.tokens.tolist(), extent.last + 1
    started = time.perf_counter()
    restored.decode(tokens[:n_held])
    restored.compute_seconds = time.perf_counter() - started
    restored.n_recomputed = n_held
    reason = guards.can_probe(restored.context, extent) if probe else "switched off"
    if snapshot.n_absent:
        reason = reason or "the archive does not hold them"
    if reason:
        restored.notes.append(f"no stored rows were compared with the recomputed ones: {reason}")
    else:
        count = min(guards.PROBE_TOKENS, extent.n_cells)
        for start, stop in ((0, count), (extent.last, extent.last + 1)):
            computed = guards.take_rows(restored.context, start, stop)
            stored, what = guards.stored_rows(snapshot, start, stop), "all tokens"
            error = guards.check_rows(stored, computed, what, exact=extent.exact)
            restored.probe_error = max(restored.probe_error or 0.0, error)
    if tokens[n_held:]:
        restored.decode(tokens[n_held:])


# --- continuing ---------------------------------------------------------------------------------


def _generate(
    restored: Restored,
    n_predict: int,
    temperature: float,
    seed: int,
    on_text: Callable[[str], None] | None,
) -> tuple[list[int], str]:
    """Tokens and text of the continuation. The last token is not decoded: nothing needs it."""
    if n_predict and restored.logits is None:
        raise UsageError("the state cannot be continued by itself: give a prompt")
    random = np.random.default_rng(seed)
    # Tokens may end inside a character.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens: list[int] = []
    pieces: list[str] = []
    while len(tokens) < n_predict:
        assert restored.logits is not None
        token = choose(restored.logits, temperature, random)
        if restored.model.ends_text(token):
            break
        tokens.append(token)
        _emit(decoder.decode(restored.model.piece(token)), pieces, on_text)
        if len(tokens) < n_predict:
            restored.decode([token])
    _emit(decoder.decode(b"", final=True), pieces, on_text)
    return tokens, "".join(pieces)


def _emit(text: str, pieces: list[str], on_text: Callable[[str], None] | None) -> None:
    if text:
        pieces.append(text)
        if on_text is not None:
            on_text(text)


def choose(logits: NDArray[np.float32], temperature: float, random: np.random.Generator) -> int:
    """The likeliest token at ``temperature`` 0, otherwise one drawn from the softmax.

    >>> choose(np.float32([0, 3, 1]), 0.0, np.random.default_rng(0))
    1
    """
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return int(random.choice(len(weights), p=weights / weights.sum()))
