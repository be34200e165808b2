"""Whether names from early in the context are known: which are asked for, and who knows them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLES
from tscfile_cli.main import main

from tscfile.errors import UsageError
from tscfile.quality.codec import TierCodec
from tscfile.quality.names import (
    FORGOTTEN,
    N_CUE,
    N_EARLY,
    NAMES_OF_WINDOW,
    ORIGINAL,
    NameReport,
    evaluate_names,
    find_names,
)
from tscfile.quality.protocol import N_SINKS, Plan
from tscfile.quality.windows import Text, read_text

pytest.importorskip("torch")
pytest.importorskip("transformers")

MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"
TEXT = SAMPLES / "texts" / "heldout.txt"
PLAN = Plan(frames=(300,), n_windows=12)


@pytest.fixture(scope="module")
def report() -> NameReport:
    from tscfile.quality.engine import Engine

    codecs = [TierCodec("lossless"), TierCodec("archive", BOOK)]
    return evaluate_names(Engine(MODEL), read_text(TEXT), codecs, PLAN)


def names_of(words: list[str]) -> list[str]:
    ids = np.arange(len(words), dtype=np.int32)
    return [probe.text for probe in find_names(words, ids)]


def test_which_words_are_names() -> None:
    start, end = [" and"] * (N_SINKS + N_CUE), [" or"] * N_EARLY
    assert names_of([*start, " P", "et", "r", " said", *end]) == ["Petr"]
    assert names_of([*start, " Petr", *end]) == []  # of one token: nothing to finish
    assert names_of([*start, ".", " The", "se", *end]) == []  # begins a sentence
    assert names_of([*start[1:], " P", "etr", *end]) == []  # too early for a cue
    assert names_of([*start, " P", "etr", *end, " P", "etr"]) == []  # named later, too
    assert names_of([" and", " P", "etr", *start, " P", "etr", *end]) == []  # named before
    assert names_of([*end, *start, " P", "etr"]) == []  # not early
    several = [piece for n in range(8) for piece in (" Ab", "cdefghi"[n % 7] * (n + 2), " and")]
    assert len(names_of([*start, *several, *end])) == NAMES_OF_WINDOW


def test_who_knows_them(report: NameReport) -> None:
    scores = {score.codec: score for score in report.scores}
    assert set(scores) == {ORIGINAL, FORGOTTEN, "lossless", "archive"}
    original, forgotten, archive = (scores[n] for n in (ORIGINAL, FORGOTTEN, "archive"))
    n = len(report.names[300])
    assert {len(score.hits) for score in scores.values()} == {n} and n >= PLAN.n_windows
    assert original.kept == 1 and original.finished == original.hits.count("1") / n
    for key in ("hits", "called_log_probability", "finished_log_probability"):
        assert getattr(scores["lossless"], key) == getattr(original, key)
    # The cache is what helps to spell a name, and archive has it.
    gain = original.finished_log_probability - forgotten.finished_log_probability
    assert gain > 0.3
    assert archive.finished_log_probability > forgotten.finished_log_probability + gain / 2
    assert archive.snapshot_ratio is not None and archive.snapshot_ratio > 500
    assert forgotten.snapshot_ratio is None


def test_texts_without_names(report: NameReport) -> None:
    from tscfile.quality.engine import Engine

    engine = Engine(MODEL)
    plain = Text("plain", "0" * 64, ("nothing to see here, and so on. " * 200,))
    with pytest.raises(UsageError, match="0 windows of 300 tokens with a name"):
        evaluate_names(engine, plain, [], PLAN)
    with pytest.raises(UsageError, match="give more than 200"):
        evaluate_names(engine, plain, [], Plan(frames=(200,), n_windows=1))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "names.json"
    command = ["eval", "--model", str(MODEL), "--text", str(TEXT), "--report", "names", "--codecs",
               "fp16", "--frames", "300", "--windows", "3", "-q"]  # fmt: skip
    assert main([*command, "--json", str(out)]) == 0
    table = capsys.readouterr().out
    assert "forgotten" in table and "finished" in table
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [score["codec"] for score in found["scores"]][:2] == [ORIGINAL, FORGOTTEN]
    assert len(found["names"]["300"]) == found["scores"][0]["n_probes"]
    assert main([*command, "--plot", str(tmp_path / "a.png")]) == 2
