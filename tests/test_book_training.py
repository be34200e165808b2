"""Learning a book: from a model, after an interruption, by each metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLES

from tscfile.books import product
from tscfile.books import train as training
from tscfile.books.book import Book
from tscfile.books.checkpoint import Checkpoint
from tscfile.books.train import TrainOptions, train
from tscfile.errors import UsageError
from tscfile.quality.engine import Engine
from tscfile.quality.windows import Text, read_text

MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
SMALL = TrainOptions(
    n_windows=6, frames=256, n_fisher=3, fisher_frames=128, n_continue=32, n_draws=1, n_hidden=16,
    n_predicted=32, epochs=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL)


@pytest.fixture(scope="module")
def text() -> Text:
    whole = read_text(SAMPLES / "texts" / "calibration.txt")
    return replace(whole, documents=whole.documents[:24])


@pytest.fixture(autouse=True)
def no_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding tiers is the slow part, and is tried on the whole book (`test_lossy`)."""
    monkeypatch.setattr(product, "_LEAST_FRAMES", 512)
    monkeypatch.setattr(product, "N_STAGES", 2)
    monkeypatch.setattr(training, "measure_tiers", lambda *args, **options: {})


class Interrupted(Exception):
    pass


def test_an_interrupted_training_goes_on(engine: Engine, text: Text, tmp_path: Path) -> None:
    said: list[str] = []
    whole = train(engine, [text], SMALL, said.append).to_bytes()
    keep = tmp_path / "book.part"
    for stop in ("metric: window 2", "network: epoch 2", "residual: window 3"):

        def until(words: str, stop: str = stop) -> None:
            if words.startswith(stop):
                raise Interrupted

        with pytest.raises(Interrupted):
            train(engine, [text], SMALL, until, keep=keep)
        assert keep.is_dir()
    again: list[str] = []
    resumed = train(engine, [text], SMALL, again.append, keep=keep)
    assert not keep.exists()
    assert not any(words.startswith(("metric", "frames")) for words in again) and said != again
    book = Book.from_bytes(whole, "test")
    # Sums of a run that starts elsewhere may round another way.
    counts = "book.group_coefficients"
    assert resumed.facts | {counts: 0} == book.facts | {counts: 0}
    (n_resumed,), (n_whole,) = resumed.facts[counts], book.facts[counts]
    assert abs(n_resumed - n_whole) <= 4
    n = min(n_resumed, n_whole)
    for name in ("metric", "prediction", "hidden", "log_sigmas"):
        found, kept = (each.arrays[name] for each in (resumed, book))
        if name == "log_sigmas":
            found, kept = found[:n], kept[:n]
        close = np.isclose(found.astype(float), kept, rtol=0.02, atol=2)
        assert close.mean() > 0.98, name


def test_other_options_begin_anew(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path / "x", "a")
    first.put("stage", {"done": np.array(3)})
    assert Checkpoint(tmp_path / "x", "a").get("stage") == {"done": 3}
    assert Checkpoint(tmp_path / "x", "b").get("stage") is None
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter").write_text("mine")
    with pytest.raises(UsageError, match="in the way"):
        Checkpoint(tmp_path / "own", "b")
    assert (tmp_path / "own" / "letter").exists()
    (tmp_path / "x" / "stage.npz").write_bytes(b"torn")
    assert Checkpoint(tmp_path / "x", "b").get("stage") is None


@pytest.mark.parametrize("metric", ["attention", "plain"])
def test_other_metrics_make_books(engine: Engine, text: Text, metric: str) -> None:
    book = train(engine, [text], replace(SMALL, metric=metric, epochs=0))
    assert Book.from_bytes(book.to_bytes(), "test").facts["book.metric"] == metric
    diagonal = np.trace(book.metric.astype(float), axis1=1, axis2=2)
    assert (diagonal > 0).all() and np.isfinite(book.metric.astype(float)).all()


def test_several_texts_are_one(engine: Engine, text: Text) -> None:
    halves = [replace(text, documents=text.documents[k::2], digest=str(k)) for k in (0, 1)]
    book = train(engine, halves, replace(SMALL, epochs=0))
    assert book.facts["book.text_blake3"] == ["0", "1"]
    with pytest.raises(UsageError, match="at least 8"):
        train(engine, [replace(text, documents=text.documents[:3])], SMALL)
