"""The instrument of `tscfile.quality`: what it measures, that it repeats, and what it catches."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tscfile_cli.main import main  # noqa: E402

from tscfile.errors import TscError, UnsupportedError, UsageError  # noqa: E402
from tscfile.quality.arrays import CacheShape, KVArrays  # noqa: E402
from tscfile.quality.calibration import Calibration, check_disjoint  # noqa: E402
from tscfile.quality.codec import TierCodec  # noqa: E402
from tscfile.quality.engine import Engine  # noqa: E402
from tscfile.quality.metrics import compare  # noqa: E402
from tscfile.quality.peers.plain import RawFp16  # noqa: E402
from tscfile.quality.protocol import N_RECENT, N_SINKS, Plan, Report, evaluate  # noqa: E402
from tscfile.quality.registry import make_codecs, names  # noqa: E402
from tscfile.quality.report import from_json, markdown, tables, to_json  # noqa: E402
from tscfile.quality.windows import JOINED, Text, choose_windows, read_text  # noqa: E402
from tscfile.transforms.rope import HALVES, NEIGHBOURS, Rope  # noqa: E402

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
HELD_OUT = SAMPLES / "texts" / "heldout.txt"
CALIBRATION = SAMPLES / "texts" / "calibration.txt"
SMALL = Plan(frames=(512,), n_windows=3)


class Identity(RawFp16):
    """Gives back what it was given."""

    name = family = "identity"


class BrokenKeys(RawFp16):
    """Turns the sign of the keys of one layer."""

    name = family = "broken"

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
        whole = super().decode(data, shape)
        keys = [-k if i == self._layer else k for i, k in enumerate(whole.keys)]
        return KVArrays(shape, keys, whole.values)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL)


@pytest.fixture(scope="module")
def text() -> Text:
    return read_text(HELD_OUT)


@pytest.fixture(scope="module")
def cache(engine: Engine, text: Text) -> KVArrays:
    return engine.prefill(engine.tokenize(text.documents[0])[:300])


@pytest.fixture(scope="module")
def report(engine: Engine, text: Text) -> Report:
    found = make_codecs(["lossless", "fp16", "q8_0", "q4_0", "turboquant-2"])
    return evaluate(engine, text, [Identity(), BrokenKeys(3), *found], SMALL)


def kl_of(report: Report, codec: str) -> float:
    [result] = [each for each in report.results if each.codec == codec]
    return result.continuation.kl_mean


# --- what it measures -------------------------------------------------------------------------


def test_the_same_cache_scores_nothing(report: Report) -> None:
    result = report.results[0]
    assert result.codec == "identity"
    assert result.continuation.kl_mean < 1e-6 and result.continuation.kl_p99 < 1e-6
    assert result.continuation.top1 == 1.0 and result.continuation.perplexity_delta == 0.0
    assert result.recall is not None and result.recall.kl_mean < 1e-6
    assert result.snapshot_ratio == 1.0 and result.bits_per_value == 16.0


def test_fewer_bits_cost_more(report: Report) -> None:
    assert 0 < kl_of(report, "q8_0") < kl_of(report, "q4_0") < kl_of(report, "turboquant-2")
    assert kl_of(report, "turboquant-2") < report.references[0].forgetting.kl_mean


def test_a_broken_codec_is_caught(report: Report) -> None:
    assert kl_of(report, "broken") > 1000 * kl_of(report, "q8_0")
    assert kl_of(report, "broken") > 0.1 * report.references[0].forgetting.kl_mean


def test_lossless_is_as_good_as_raw_and_counts_its_file(report: Report) -> None:
    by_name = {each.codec: each for each in report.results}
    lossless, raw = by_name["lossless"], by_name["fp16"]
    assert lossless.continuation == raw.continuation and lossless.recall == raw.recall
    assert 1.1 < lossless.snapshot_ratio < 1.5
    assert lossless.raw_bytes == raw.stored_bytes == 3 * 512 * 3072


def test_lossless_brings_every_bit_back(cache: KVArrays) -> None:
    codec = TierCodec("lossless")
    restored = codec.decode(codec.encode(cache), cache.shape)
    for (_, old), (_, new) in zip(cache.roles(), restored.roles(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))


def test_shares_and_curves(report: Report) -> None:
    forgetting = report.references[0].forgetting
    for result in report.results:
        quality = result.continuation
        assert result.kl_of_forgetting == pytest.approx(quality.kl_mean / forgetting.kl_mean)
        assert quality.n_predictions == 3 * 256 and len(quality.kl_curve) == 256
        assert np.mean(quality.kl_windows) == pytest.approx(quality.kl_mean)
        assert np.mean(quality.kl_curve) == pytest.approx(quality.kl_mean, rel=1e-3)
        assert quality.perplexity_original == forgetting.perplexity_original
        assert result.recall is not None and result.recall.n_predictions == 3 * 128


def test_recall_suffers_from_forgetting(report: Report) -> None:
    recall = report.references[0].forgetting_recall
    assert recall is not None
    assert recall.perplexity > 1.2 * recall.perplexity_original
    assert recall.accuracy < recall.accuracy_original


def test_continuation_is_what_one_pass_over_all_tokens_gives(engine: Engine, text: Text) -> None:
    import torch

    tokens = engine.tokenize(text.documents[1])[:400]
    behind = engine.proceed(engine.prefill(tokens[:300]), tokens[300:], 300)
    with torch.no_grad():
        whole = engine._model(torch.as_tensor(tokens, dtype=torch.int64)[None]).logits[0, 300:]
    # The cache was rounded to fp16; nothing else may differ.
    assert compare(whole, behind, np.roll(tokens[300:], -1)).kl.max() < 1e-4


def test_forgetting_keeps_positions(engine: Engine, text: Text) -> None:
    tokens = engine.tokenize(text.documents[1])[:300]
    sinks = engine.prefill(tokens).head(N_SINKS)
    kept, moved = (engine.proceed(sinks, tokens[-50:], at) for at in (300, N_SINKS))
    assert float((kept - moved).abs().max()) > 0.1
    again = engine.proceed(sinks, tokens[-50:-40], 300)
    assert float((kept[:10] - again).abs().max()) < 1e-3, "a token sees one that follows it"


def test_metrics_are_those_of_the_textbook() -> None:
    import torch

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 70, 11))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    targets = rng.integers(0, 11, 70).astype(np.int32)
    found = compare(torch.as_tensor(a), torch.as_tensor(b), targets)
    np.testing.assert_allclose(found.kl, (p * np.log(p / q)).sum(1), rtol=1e-9)
    np.testing.assert_allclose(found.nll_restored, -np.log(q[np.arange(70), targets]), rtol=1e-9)
    assert (found.same_top1 == (p.argmax(1) == q.argmax(1))).all()
    assert (found.hit_original == (p.argmax(1) == targets)).all()


# --- that it repeats --------------------------------------------------------------------------


def test_two_runs_agree_to_the_digit(engine: Engine, text: Text, report: Report) -> None:
    found = make_codecs(["lossless", "fp16", "q8_0", "q4_0", "turboquant-2"])
    again = evaluate(engine, text, [Identity(), BrokenKeys(3), *found], SMALL)
    assert again.repeatable() == report.repeatable()
    assert to_json(again) != "" and "encode_mb_s" not in json.dumps(again.repeatable())


def test_conditions_name_everything(report: Report, text: Text) -> None:
    conditions = report.conditions
    assert conditions["text_blake3"] == text.digest and len(conditions["weights_blake3"]) == 64
    assert conditions["seed"] == 0 and conditions["n_windows"] == 3
    assert {"tscfile", "torch", "transformers", "numpy"} <= set(conditions["versions"])
    assert str(SAMPLES) not in to_json(report), "a report names no machine's folders"


def test_a_transformers_directory_gives_the_same(
    engine: Engine, text: Text, report: Report, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    options = engine._model.config.to_dict()
    del options["quantization_config"]
    copy = LlamaForCausalLM(LlamaConfig(**options))
    copy.load_state_dict(engine._model.state_dict())
    copy.save_pretrained(tmp_path)
    engine._tokenizer.save_pretrained(tmp_path)
    other = evaluate(Engine(tmp_path), text, make_codecs(["q4_0"]), SMALL)
    assert kl_of(other, "q4_0") == pytest.approx(kl_of(report, "q4_0"), rel=1e-6)


def test_sliding_windows_are_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=16,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    engine._tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="DynamicSlidingWindowLayer"):
        Engine(tmp_path)


# --- windows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [768, 1792])
def test_windows_are_disjoint_and_inside_documents(
    engine: Engine, text: Text, frames: int
) -> None:
    documents = [engine.tokenize(document) for document in text.documents]
    windows = choose_windows(documents, frames + 257, 8, seed=0)
    assert len(windows) == 8 and all(len(window.tokens) == frames + 257 for window in windows)
    assert len({window.document for window in windows}) > 4, "not spread over the text"
    for first, second in zip(windows, windows[1:], strict=False):
        later = second.start - first.start if first.document == second.document else frames + 257
        assert later >= frames + 257
    for window in windows:
        part = documents[window.document][window.start : window.start + frames + 257]
        assert np.array_equal(part, window.tokens)
    starts = [(window.document, window.start) for window in windows]
    again = choose_windows(documents, frames + 257, 8, seed=0)
    assert starts == [(window.document, window.start) for window in again]
    other = choose_windows(documents, frames + 257, 8, seed=1)
    assert starts != [(window.document, window.start) for window in other]


def test_windows_share_nothing_with_the_calibration_text(engine: Engine, text: Text) -> None:
    n = 64
    learnt = read_text(CALIBRATION)
    check_disjoint(text, learnt)
    runs = set()
    for document in learnt.documents:
        ids = engine.tokenize(document)
        runs |= {ids[i : i + n].tobytes() for i in range(len(ids) - n + 1)}
    documents = [engine.tokenize(document) for document in text.documents]
    for window in choose_windows(documents, 1792 + 257, 8, seed=0):
        found = (window.tokens[i : i + n].tobytes() for i in range(len(window.tokens) - n + 1))
        assert not any(run in runs for run in found)


def test_overlap_with_the_calibration_text_is_refused(engine: Engine, text: Text) -> None:
    overlapping = Text("other.txt", "", ("something else", text.documents[3] + "\n"))
    with pytest.raises(UsageError, match="shares 1 documents"):
        evaluate(engine, text, [], SMALL, calibration=Calibration(engine, overlapping))


def test_short_documents_are_joined() -> None:
    documents = [np.arange(i, i + 30, dtype=np.int32) for i in range(0, 120, 30)]
    windows = choose_windows(documents, 50, 2, seed=0)
    assert [window.document for window in windows] == [JOINED, JOINED]
    assert np.array_equal(windows[0].tokens, np.arange(50) + windows[0].start)
    with pytest.raises(UsageError, match="room for 2 windows of 50 tokens and 3 are wanted"):
        choose_windows(documents, 50, 3, seed=0)


def test_recalled_passages_lie_in_the_middle(report: Report) -> None:
    for place in report.references[0].windows:
        assert place.recall_start is not None
        assert N_SINKS <= place.recall_start <= 512 - N_RECENT - 129


def test_short_contexts_have_no_recall(engine: Engine, text: Text) -> None:
    short = evaluate(engine, text, [RawFp16()], Plan((64,), n_windows=1, n_continue=8))
    assert short.results[0].recall is None and short.references[0].forgetting_recall is None
    assert from_json(to_json(short)) == short
    assert list(tables(short))


def test_contexts_that_do_not_fit_are_refused(engine: Engine, text: Text) -> None:
    with pytest.raises(UsageError, match="4096 positions"):
        evaluate(engine, text, [], Plan((4000,)))


# --- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", [HALVES, NEIGHBOURS])
def test_rope_is_undone(pairing: str) -> None:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 50, 24)).astype(np.float32)
    positions = np.arange(2000, 2050, dtype=np.int32)
    rope = Rope((0.5 ** np.arange(8)).astype(np.float32), pairing, 1.3)
    turned = rope.apply(keys, positions)
    assert np.array_equal(turned[..., 16:], keys[..., 16:]), "channels behind the rope are turned"
    np.testing.assert_allclose(rope.undo(turned, positions), keys, atol=1e-5)


def test_rope_of_the_model_is_found(engine: Engine, cache: KVArrays) -> None:
    assert engine.rope is not None and engine.rope.pairing == HALVES
    keys = engine.rope.undo(cache.keys[0].astype(np.float32), cache.shape.positions)
    tokens = cache.shape.tokens
    token = np.bincount(tokens).argmax()
    same = keys[:, tokens == token]
    assert same.shape[1] > 5
    assert np.abs(same - same[:, :1]).max() < 0.01 * np.abs(same).max()


def test_a_wrong_shape_is_no_result(engine: Engine, text: Text) -> None:
    class Short(Identity):
        def decode(self, data: bytes, shape: CacheShape) -> KVArrays:
            whole = super().decode(data, shape)
            return replace(whole, values=[each[:, 1:] for each in whole.values])

    with pytest.raises(TscError, match="identity: V of layer 0 came back"):
        evaluate(engine, text, [Short()], SMALL)


def test_names_and_groups() -> None:
    assert [codec.name for codec in make_codecs(["kivi", "kivi-2", "fp16"])] == [
        "kivi-4", "kivi-2", "kivi-4-r0", "kivi-2-r0", "fp16",
    ]  # fmt: skip
    assert len(set(names())) == len(names())
    with pytest.raises(UsageError, match="codec 'q9_9' is unknown"):
        make_codecs(["q9_9"])
    with pytest.raises(UsageError, match="--calibration"):
        make_codecs(["kvtc-8x"])


def test_json_is_the_report(report: Report) -> None:
    assert from_json(to_json(report)) == report
    table = markdown(report, 512)
    assert table.count("\n") == len(report.results) + 2 and "| q8_0 | 8.500 | 1.88 |" in table


def test_importing_is_light() -> None:
    program = (
        "import sys, tscfile.quality, tscfile_cli.commands.eval; "
        "assert not {'torch', 'transformers', 'matplotlib', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- command ----------------------------------------------------------------------------------

ARGUMENTS = ["eval", "--model", str(MODEL), "--text", str(HELD_OUT)]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--tiers", "lossless,q8_0,kivi", "--frames", "512", "--windows", "2"]
    assert main([*ARGUMENTS, *options, "--json", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr()
    assert "kivi-2-r0" in printed.out and "loading" in printed.err
    found = from_json(out.read_text())
    assert [each.codec for each in found.results][:2] == ["lossless", "q8_0"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*ARGUMENTS, *options, "--json", str(out)]) == 2
    assert "-f replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, code, words",
    [
        (["--codecs", "q9_9"], 2, "codec 'q9_9' is unknown"),
        (["--codecs", "kvtc"], 2, "--calibration"),
        (["--codecs", "fp16", "--frames", "x"], 2, "no list of numbers"),
        (["--codecs", "fp16", "--frames", "99999"], 2, "4096 positions"),
        (["--codecs", "fp16", "--windows", "999"], 2, "room for"),
        (["--calibration", str(HELD_OUT)], 2, "shares"),
    ],
)
def test_wrong_arguments_are_one_line(
    options: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, "-q", *options]) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("tsc: ") and words in line


def test_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        assert main(["eval", "--model", str(path), "--text", str(HELD_OUT), "-q"]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert str(path) in line
