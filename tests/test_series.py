"""A conversation that is saved after every turn: what `tests/bench/series.py` measures, once."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import ROOT, SAMPLES

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tscfile.quality.codec import TierCodec  # noqa: E402
from tscfile.quality.engine import Engine  # noqa: E402
from tscfile.quality.windows import choose_windows, read_text  # noqa: E402

MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"


@pytest.mark.slow
def test_twenty_saves() -> None:
    """1000 times smaller as a series already in `balanced`, at a KL that its last save keeps to."""
    spec = importlib.util.spec_from_file_location("series", ROOT / "tests" / "bench" / "series.py")
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    engine, text = Engine(MODEL), read_text(SAMPLES / "texts" / "heldout.txt")
    (window,) = choose_windows([engine.tokenize(part) for part in text.documents], 2020, 1, 0)
    last = engine.prefill(window.tokens[:1800])
    saves = [last.head(90 * turn) for turn in range(1, 21)]
    feeds = [window.tokens[1800:1993], window.tokens[800:929]]
    row = bench.measure(engine, TierCodec("balanced", BOOK), saves, feeds, BOOK)
    assert row["series_ratio"] > 1000 > row["alone_ratio"] > row["snapshot_ratio"] > 100
    assert 0 < row["kl"] < 0.01 and 0 < row["recall_kl"] < 0.01
    # Frames keep the finer step that the newest of their save had: dearer, and no worse.
    assert row["kl"] < 1.2 * row["alone_kl"]
    tokens = bench.measure(engine, TierCodec("tokens", BOOK), saves, feeds, BOOK)
    assert tokens["series_ratio"] > 5 * row["series_ratio"] and tokens["chunk_bytes"] == 0
