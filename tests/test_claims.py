"""The claims of the TSC reports: codecs, accountings, calculators, rules and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tscfile_cli.main import main  # noqa: E402

from tscfile.errors import UsageError  # noqa: E402
from tscfile.quality import arrays  # noqa: E402
from tscfile.quality.arrays import KVArrays  # noqa: E402
from tscfile.quality.claims import calculators as calc  # noqa: E402
from tscfile.quality.claims import page  # noqa: E402
from tscfile.quality.claims import statistics as st  # noqa: E402
from tscfile.quality.claims.bit_widths import CONFIGURATIONS  # noqa: E402
from tscfile.quality.claims.catalogue import CLAIMS  # noqa: E402
from tscfile.quality.claims.eviction import Evicting, Ranking, kept_frames, n_early  # noqa: E402
from tscfile.quality.claims.growing import (  # noqa: E402
    FourBitRows,
    Fp32,
    KeyframesOnly,
    Run,
    records,
    restore,
    sizes,
)
from tscfile.quality.claims.lab import Lab  # noqa: E402
from tscfile.quality.claims.low_rank import LowRank, rank_of_bits  # noqa: E402
from tscfile.quality.claims.run import (  # noqa: E402
    EXPERIMENTS,
    ClaimsReport,
    choose,
    codecs_of,
    judge,
)
from tscfile.quality.claims.serving import joined  # noqa: E402
from tscfile.quality.claims.vector import VectorQuantizer  # noqa: E402
from tscfile.quality.claims.verdicts import (  # noqa: E402
    DEPENDS,
    NOT_ANSWERABLE,
    PLAIN,
    RATIO_ALONE,
    REFUTED,
    REPRODUCED,
    Measured,
    Reading,
    decide,
    near,
    note_of,
    reaches,
)
from tscfile.quality.codec import Codec  # noqa: E402
from tscfile.quality.engine import Engine  # noqa: E402
from tscfile.quality.metrics import compare  # noqa: E402
from tscfile.quality.peers.rotated import RotatedUniform  # noqa: E402
from tscfile.quality.windows import Text, read_text  # noqa: E402

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
HELD_OUT = SAMPLES / "texts" / "heldout.txt"
KEPT = Path(__file__).parent / "quality"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL)


@pytest.fixture(scope="module")
def text() -> Text:
    return read_text(HELD_OUT)


@pytest.fixture(scope="module")
def cache(engine: Engine, text: Text) -> KVArrays:
    return engine.prefill(engine.tokenize(text.documents[3])[:300])


@pytest.fixture(scope="module")
def lab(engine: Engine, text: Text) -> Lab:
    return Lab(engine, text, 512, 2)


def roundtrip(codec: Codec, cache: KVArrays) -> KVArrays:
    return codec.decode(codec.encode(cache), cache.shape)


def error(a: KVArrays, b: KVArrays) -> float:
    """Mean squared error over mean square."""
    pairs = [
        (x.astype(np.float64), y.astype(np.float64))
        for (_, old), (_, new) in zip(a.roles(), b.roles(), strict=True)
        for x, y in zip(old, new, strict=True)
    ]
    return sum(np.square(x - y).sum() for x, y in pairs) / sum(np.square(x).sum() for x, _ in pairs)


def same(a: KVArrays, b: KVArrays) -> bool:
    return error(a, b) == 0


# --- codecs -----------------------------------------------------------------------------------


def test_every_codec_of_the_report_comes_back(lab: Lab, cache: KVArrays) -> None:
    """All that the experiments measure: each is decoded from its bytes alone, at any length."""
    found = codecs_of(lab, EXPERIMENTS)
    assert len(found) > 60 and len({codec.name for codec in found}) == len(found)
    for codec in found:
        for n_tokens in (300, 40):
            part = cache.head(n_tokens)
            restored = roundtrip(codec, part)
            for (_, old), (_, new) in zip(part.roles(), restored.roles(), strict=True):
                for a, b in zip(old, new, strict=True):
                    assert a.shape == b.shape and b.dtype == np.float16, codec.name
                    assert np.isfinite(b).all(), codec.name


@pytest.mark.parametrize("block, parts", [(8, 1), (4, 1), (2, 1), (1, 1), (8, 2), (2, 2)])
def test_codebooks_are_counted(block: int, parts: int, cache: KVArrays) -> None:
    n_values = cache.shape.n_values
    for normalised in (False, True):
        data = VectorQuantizer(block, parts=parts, normalised=normalised).encode(cache)
        scales = 2 * 2 * 6 * 2 if normalised else 0
        assert len(data) == n_values // block * parts + 2 * 256 * block + scales


def test_errors_of_codebooks_fall_with_bits(cache: KVArrays) -> None:
    errors = [error(cache, roundtrip(VectorQuantizer(block), cache)) for block in (8, 4, 2, 1)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3


def test_lloyd_reaches_what_is_known_of_a_gaussian() -> None:
    """256 levels for single values of a Gaussian: distortion 10^-4.4 or so (Panter and Dite)."""
    rng = np.random.default_rng(0)
    layer = arrays.LayerShape(2, 64, 64)
    shape = arrays.CacheShape(np.zeros(300, np.int32), (layer,))
    noise = arrays.from_layers(
        shape, lambda role, i, n, dim: rng.standard_normal((n, 300, dim)).astype(np.float16)
    )
    bound = np.sqrt(3) * np.pi / 2 / 256**2
    assert error(noise, roundtrip(VectorQuantizer(1), noise)) < 1.5 * bound


def test_blocks_above_the_threshold_are_exact(cache: KVArrays) -> None:
    codec = VectorQuantizer(2, normalised=True, threshold=0.1)
    restored = roundtrip(codec, cache)
    share = codec.share_exact(cache)
    exact = [
        (a.reshape(-1, 2) == b.reshape(-1, 2)).all(axis=1)
        for (_, old), (_, new) in zip(cache.roles(), restored.roles(), strict=True)
        for a, b in zip(old, new, strict=True)
    ]
    # Some blocks hit a centroid.
    assert 0.05 < share <= np.concatenate(exact).mean() < 0.9
    n_blocks = cache.shape.n_values // 2
    left = round(share * n_blocks)
    assert len(codec.encode(cache)) == 2 * 24 + 1024 + n_blocks // 8 + 4 * left + n_blocks - left
    never = VectorQuantizer(2, normalised=True, threshold=1e9)
    assert never.share_exact(cache) == 0 and error(cache, roundtrip(never, cache)) > 0
    assert same(cache, roundtrip(VectorQuantizer(8, threshold=-1.0), cache))


def test_low_rank_is_the_best_of_its_rank(cache: KVArrays) -> None:
    codec = LowRank(20, range(2, 6))
    restored = roundtrip(codec, cache)
    for layer in (0, 1):
        assert np.array_equal(cache.keys[layer], restored.keys[layer])
    frames = arrays.rows(cache.values[3]).astype(np.float32)
    off = arrays.rows(restored.values[3]).astype(np.float32) - frames
    s = np.linalg.svd(frames, compute_uv=False)
    assert np.square(off).sum() == pytest.approx(np.square(s[20:]).sum(), rel=0.01)
    assert len(codec.encode(cache)) == 2 * (4 * 300 * 128 + 8 * 20 * (300 + 128))
    assert error(cache, roundtrip(LowRank(128, range(6)), cache)) < 1e-6
    assert rank_of_bits(16, 300, 128) * (300 + 128) <= 300 * 128


# --- eviction ---------------------------------------------------------------------------------


def test_attention_received_is_that_of_the_model(engine: Engine, text: Text) -> None:
    import torch

    tokens = engine.tokenize(text.documents[2])[:90]
    found = engine.attention_received(tokens)
    config = engine._model.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
            weights = engine._model(ids, output_attentions=True).attentions
    finally:
        config._attn_implementation = before
    expected = [each[0].sum(dim=(0, 1)).numpy() for each in weights]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-3, atol=1e-4)


def test_a_dropped_frame_is_not_seen(engine: Engine, cache: KVArrays, text: Text) -> None:
    feed = engine.tokenize(text.documents[3])[300:360]
    whole = engine.proceed(cache, feed, 300)
    all_kept = replace(cache, kept=[np.ones(300, bool)] * 6)
    assert compare(whole, engine.proceed(all_kept, feed, 300), feed).kl.max() < 1e-9
    sinks = np.arange(300) < 4
    broken = [np.where(sinks[None, :, None], each, np.float16(7)) for each in cache.keys]
    masked = KVArrays(cache.shape, broken, cache.values, [sinks] * 6)
    forgotten = engine.proceed(cache.head(4), feed, 300)
    assert compare(forgotten, engine.proceed(masked, feed, 300), feed).kl.max() < 1e-6
    assert compare(whole, forgotten, feed).kl.mean() > 0.05
    # A layer that keeps all is seen whole.
    partly = replace(cache, kept=[sinks] + [np.ones(300, bool)] * 5)
    middle = compare(whole, engine.proceed(partly, feed, 300), feed).kl.mean()
    assert 0 < middle < compare(whole, forgotten, feed).kl.mean()


def test_what_is_kept_is_what_got_most() -> None:
    rng = np.random.default_rng(0)
    received = rng.random((3, 200))
    masks = kept_frames(received, 0.4, early=1)
    assert [int(mask.sum()) for mask in masks] == [200, 80, 80]
    for row, mask in zip(received[1:], masks[1:], strict=True):
        assert mask[-32:].all()
        assert row[:-32][mask[:-32]].min() > row[:-32][~mask[:-32]].max()
    assert kept_frames(received, 0.0, 0)[0].sum() == 32


@pytest.mark.parametrize("key_bits, value_bits, kept", CONFIGURATIONS)
def test_configurations_have_the_predicted_size(
    key_bits: int, value_bits: int, kept: float, engine: Engine, cache: KVArrays
) -> None:
    """Within what indices and the rounding of a share of 300 frames take."""
    inner = RotatedUniform(key_bits, value_bits)
    early = n_early(6)
    codec = Evicting(inner, Ranking(engine), kept, early)
    ratio = cache.raw_bytes / len(codec.encode(cache))
    expected = calc.eviction_ratio(6, early, kept, key_bits, value_bits, 64)
    if kept == 0.1:
        assert ratio < expected, "the newest 32 frames are more than a tenth"
    else:
        assert ratio == pytest.approx(expected, rel=0.01) and ratio <= expected * 1.005
    restored = roundtrip(codec, cache)
    assert restored.kept is not None and restored.kept[0].all()
    dropped = ~restored.kept[5]
    assert int(dropped.sum()) == 300 - max(round(kept * 300), 32)


def test_predicted_ratios_of_three_shapes() -> None:
    for layers, g, expected in (
        (22, 64, (1.94, 3.76, 4.92, 3.16, 4.08, 4.90, 5.34, 5.82, 6.41, 7.13, 10.72, 16.17)),
        (32, 128, (1.97, 3.88, 5.12, 3.23, 4.21, 5.07, 5.55, 6.07, 6.69, 7.45, 11.30, 17.25)),
        (80, 128, (1.97, 3.88, 5.12, 3.28, 4.22, 5.10, 5.57, 6.10, 6.74, 7.53, 11.64, 18.29)),
    ):
        found = [
            calc.eviction_ratio(layers, n_early(layers), kept, k, v, g)
            for k, v, kept in CONFIGURATIONS
        ]
        np.testing.assert_allclose(found, expected, atol=0.006)


# --- growing snapshots ------------------------------------------------------------------------


def test_accountings_give_the_figures_of_the_reports() -> None:
    """The table of ratios against all saves in fp32: rows at 4 bits, and exact rows."""

    def ratio(run: Run, row: float) -> float:
        return 4 * run.sum_of_lengths / (4 * sum(run.whole) + row * run.n_rows)

    lengths = (128, 256, 512, 1024)
    lossy = [ratio(Run(32, n, 64), 0.5) for n in lengths]
    exact = [ratio(Run(1, n, 8), 4) for n in lengths]
    np.testing.assert_allclose(lossy, (55.5, 60.0, 62.1, 63.1), atol=0.06)
    np.testing.assert_allclose(exact, (7.59, 7.79, 7.89, 7.95), atol=0.006)
    run = Run(64, 1024, 64)
    factor = run.sum_of_lengths / (sum(run.whole) + run.n_rows)
    for bits, stated in ((1, 1705), (2, 854), (4, 429), (8, 216)):
        assert factor * 32 / bits == pytest.approx(stated, rel=0.02)


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_run_of_saves_comes_back_from_its_records(four_bit: bool, cache: KVArrays) -> None:
    whole, row = Fp32(), FourBitRows() if four_bit else Fp32()
    last = cache.head(30)
    run = Run(5, 30, 8)
    found = list(records(last, run, whole.encode, row.encode))
    restored = restore(iter(found), last.shape, whole.decode, row.decode)
    assert restored.shape.n_tokens == 30
    assert same(last.head(29), restored.head(29)) or four_bit
    assert (error(last, restored) == 0) is not four_bit
    assert error(last, restored) < 0.01
    size = sizes(last, run, whole.encode, row.encode)[30]
    assert size.stored == sum(len(record) for _, record in found)
    assert size.all_fp32 == sum(4 * 1536 * n for n in run.lengths)
    # Whole at 5, 13, 21, 29: the last save is that of 29 and one row.
    assert size.needed == sum(len(record) for length, record in found if length >= 29)
    assert size.one_cache_ratio < 0.53


def test_frames_left_out_are_not_seen(cache: KVArrays) -> None:
    restored = roundtrip(KeyframesOnly(64), cache)
    assert restored.kept is not None and restored.kept[2].sum() == 5
    assert np.array_equal(restored.keys[4][:, ::64], cache.keys[4][:, ::64])
    assert len(KeyframesOnly(64).encode(cache)) == 5 * 1536 * 4


def test_users_share_what_they_share(cache: KVArrays) -> None:
    other = replace(cache, keys=[-each for each in cache.keys])
    both = joined(cache, other, 100)
    assert np.array_equal(both.keys[3][:, :100], cache.keys[3][:, :100])
    assert np.array_equal(both.keys[3][:, 100:], -cache.keys[3][:, 100:])


# --- statistics -------------------------------------------------------------------------------


def test_unrelated_frames_are_root_two_apart() -> None:
    frames = [np.random.default_rng(0).standard_normal((500, 256)).astype(np.float32)]
    np.testing.assert_allclose(st.delta_norms(frames), np.sqrt(2), rtol=0.02)
    slow = [np.cumsum(np.full((500, 8), 1.0, np.float32), axis=0) + 1000]
    assert st.delta_norms(slow)[0] < 0.01


def test_the_error_bound_decides_how_many_keyframes(cache: KVArrays) -> None:
    kinds = st.frames_by_kind(cache)
    frames = [*kinds["keys as stored"], *kinds["values"]]
    shares = [st.rejected_deltas(frames, 64, 4, bound) for bound in (0.0, 0.2, 0.4, 1e9)]
    assert shares[0] == 1.0 and shares[-1] == 5 / 300
    assert shares == sorted(shares, reverse=True)


def test_unrelated_weights_are_root_two_apart() -> None:
    rng = np.random.default_rng(0)
    still = np.ones((2, 2), np.float32)
    noise = [rng.standard_normal((64, 64)).astype(np.float32) for _ in range(4)]
    weights = {"a": noise, "b": [still] * 3, "c": [still]}
    found = st.layer_steps(weights)
    assert found["a"] == pytest.approx(np.sqrt(2), rel=0.03)
    assert found["b"] == 0 and "c" not in found


# --- calculators ------------------------------------------------------------------------------


def test_the_fleet_of_the_reports() -> None:
    fleet = calc.Fleet.of_report()
    assert [fleet.without(n) for n in (2000, 5000, 10000)] == [7, 17, 34]
    assert [fleet.with_compression(n) for n in (2000, 5000, 10000)] == [3, 3, 4]
    assert [fleet.saving(n) for n in (2000, 5000, 10000)] == [70_080, 245_280, 525_600]
    stated = ((2000, 504e3), (5000, 886e3), (10000, 1.35e6))
    prices = [fleet.implied_price(*each) for each in stated]
    np.testing.assert_allclose(prices, (14.38, 7.22, 5.14), atol=0.006)
    assert [fleet.with_compression(n) for n in (10**5, 10**6, 10**7)] == [13, 107, 1051]
    assert fleet.without(10**7) == 33_555
    all_tokens = replace(fleet, prefix=0)
    assert [all_tokens.without(n) for n in (2000, 5000, 10000)] == [14, 34, 68]
    heads = replace(fleet, token_bytes=calc.cache_bytes(32, 32, 128, 1), prefix=0)
    assert [heads.without(n) for n in (2000, 5000, 10000)] == [54, 135, 269]
    weights = replace(fleet, weights=16e9)
    assert [weights.without(n) for n in (2000, 5000, 10000)] == [9, 21, 42]
    ours = calc.Fleet()
    assert ours.weights == 16e9 and ours.counts_prefix and ours.fixed == 0


def test_the_energy_of_the_reports() -> None:
    a, h = calc.REPORT_A100, calc.REPORT_H100
    assert [round(each.mwh(30), 2) for each in (a, h)] == [102.49, 239.15]
    assert [round(each.tonnes(30), 2) for each in (a, h)] == [39.97, 93.27]
    assert [round(each.litres(30)) for each in (a, h)] == [184_486, 430_466]
    assert [round(each.cars(30), 1) for each in (a, h)] == [8.7, 20.3]
    sxm = calc.Energy(400)
    assert (round(sxm.mwh(30), 1), round(sxm.tonnes(30), 1)) == (136.7, 53.3)
    assert round(replace(a, co2=0.367).tonnes(30), 1) in (37.6, 37.7)


# --- rules ------------------------------------------------------------------------------------

GOOD = Measured(0.01, 0.1, 0.996, 0.0, 2000)


@pytest.mark.parametrize(
    "ratio, stated, kl, top1, holds",
    [
        (10.0, 10.0, 0.01, 1.0, True),
        (9.0, 10.0, 0.01, 1.0, True),
        (8.9, 10.0, 0.01, 1.0, False),
        (50.0, 10.0, 0.009, 1.0, False),
        (50.0, 10.0, 0.01, None, True),
        (50.0, 10.0, None, 1.0, True),
    ],
)
def test_a_ratio_needs_its_quality(
    ratio: float, stated: float, kl: float | None, top1: float | None, holds: bool
) -> None:
    assert reaches(ratio, stated, GOOD, kl=kl, top1=top1) is holds
    worse = replace(GOOD, kl=0.11, top1=0.9)
    assert not reaches(ratio, stated, worse, kl=kl, top1=top1)


def test_numbers_are_near_within_a_tenth() -> None:
    assert near(0.9, 1.0) and near(1.1, 1.0) and not near(0.89, 1.0) and not near(1.11, 1.0)
    assert near(2.7, 3, 5) and near(5.5, 3, 5) and not near(2.6, 3, 5)


def test_verdicts_follow_from_readings() -> None:
    yes, no, shown = (Reading(PLAIN, "", 1.0, holds) for holds in (True, False, None))
    other, another = Reading("sum of saves", "", 9.0, True), Reading("fp32", "", 2.0, False)
    assert decide([yes, shown]).word == REPRODUCED
    assert decide([yes, no]).word == REFUTED and decide([no, shown]).word == REFUTED
    found = decide([no, other, another])
    assert found.word == DEPENDS and found.detail == "sum of saves"
    assert decide([no, other, replace(other, holds=False)]).word == REFUTED
    assert decide([yes, another]).word == REPRODUCED
    assert decide([shown], "no model").word == NOT_ANSWERABLE
    assert decide([], "no model").detail == "no model"
    lacking = decide([replace(no, value=64.0, quality=GOOD)], ratio=63.0)
    assert "0.9960 of 2000 predictions" in lacking.detail
    assert note_of(0.5, 0.2) == RATIO_ALONE and not note_of(0.1, 0.2) and not note_of(None, 0.2)
    assert decide([yes], note=RATIO_ALONE).detail == RATIO_ALONE


# --- the report -------------------------------------------------------------------------------


def kept() -> ClaimsReport:
    return page.from_json((KEPT / "claims.json").read_text())


def test_all_claims_are_there_once() -> None:
    ids = [claim.id for claim in CLAIMS]
    counts = {"I": 8, "II": 8, "III": 10, "IV": 10, "SV": 7, "D": 3}
    for part, n in counts.items():
        assert {f"{part}-{i}" for i in range(1, n + 1)} <= set(ids)
    assert len(ids) == len(set(ids))
    answered = [number for each in EXPERIMENTS for number in each.ids]
    assert len(answered) == len(set(answered))
    for claim in CLAIMS:
        assert claim.id in answered or claim.why_not, claim.id
    with pytest.raises(UsageError, match="claim 'I-99' is unknown"):
        choose(["I-2", "I-99"])


def test_kept_verdicts_follow_from_the_kept_readings() -> None:
    report = kept()
    assert [row.claim for row in report.rows] == list(CLAIMS)
    for row in report.rows:
        note = note_of(row.claim.kl, report.forgetting.kl)
        assert decide(row.readings, row.claim.why_not, note, row.claim.ratio) == row.verdict
    qualities = [each.quality for row in report.rows for each in row.readings if each.quality]
    assert all(each.n_predictions >= 1000 or each.kl == 0 for each in qualities)
    assert (KEPT / "claims.md").read_text() == page.markdown(report)


def test_kept_verdicts_say_what_they_should() -> None:
    """What arithmetic fixes in advance; everything else may turn out as it does."""
    report = kept()
    words = {row.claim.id: row.verdict.word for row in report.rows}
    for number in ("I-1", "I-2", "II-2", "II-6", "III-1", "III-9", "IV-7", "G-1"):
        assert words[number] in (DEPENDS, REFUTED), number
    for number in ("I-4", "I-8", "IV-10", "SV-3"):
        assert words[number] == REPRODUCED
    for number in ("I-6", "III-6", "SV-4", "D-1"):
        assert words[number] == NOT_ANSWERABLE
    assert words["IV-7b"] == REFUTED


def test_kept_numbers_are_those_of_a_fresh_run(engine: Engine, text: Text) -> None:
    old, only = kept(), ["IV-1", "IV-9", "III-7", "IV-7"]
    fresh = judge(engine, text, only=only)
    assert [row.claim.id for row in fresh.rows] == ["III-7", "IV-1", "IV-7", "IV-9"]
    assert fresh.conditions["weights_blake3"] == old.conditions["weights_blake3"]
    for row in fresh.rows:
        expected = old.row(row.claim.id)
        assert row.verdict == expected.verdict
        for new, before in zip(row.readings, expected.readings, strict=True):
            assert (new.basis, new.what, new.holds) == (before.basis, before.what, before.holds)
            assert new.value == pytest.approx(before.value, rel=0.05)


def test_another_model_can_be_asked(tmp_path: Path, engine: Engine, text: Text) -> None:
    """One without RoPE and with heads that are no power of two: it runs, and says what it can."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=4096, n_positions=512, n_embd=160, n_layer=3, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    engine._tokenizer.save_pretrained(tmp_path)
    only = ["I-2", "I-5", "II-2", "IV-1", "IV-2", "III-7"]
    report = judge(Engine(tmp_path), text, frames=200, n_windows=1, only=only)
    assert [row.claim.id for row in report.rows] == ["I-2", "I-5", "II-2", "III-7", "IV-1", "IV-2"]
    assert all(row.readings for row in report.rows)
    assert "prerope" not in page.to_json(report)


# --- command ----------------------------------------------------------------------------------

ARGUMENTS = ["eval", "--report", "claims", "--model", str(MODEL), "--text", str(HELD_OUT)]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, markdown = tmp_path / "out.json", tmp_path / "out.md"
    options = ["--only", "II-6,IV-1,IV-7,I-6", "--windows", "1", "--frames", "256"]
    files = ["--json", str(out), "--markdown", str(markdown)]
    assert main([*ARGUMENTS, *options, *files]) == 0
    printed = capsys.readouterr()
    assert "IV-1" in printed.out and "depends on" in printed.out and "loading" in printed.err
    plain = json.loads(out.read_text())
    assert [row["claim"]["id"] for row in plain["rows"]] == ["I-6", "II-6", "IV-1", "IV-7"]
    words = markdown.read_text()
    assert words.startswith("# What the TSC reports claim") and "| II-6 |" in words
    assert main([*ARGUMENTS, *options, "--markdown", str(markdown)]) == 2
    assert "-f replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--only", "X-1"], "claim 'X-1' is unknown"),
        (["--codecs", "fp16"], "not for --report claims"),
        (["--frames", "768,1792"], "one number of --frames"),
        (["--report", "codecs", "--only", "I-2"], "are for --report claims"),
        (["--calibration", str(HELD_OUT)], "shares"),
    ],
)
def test_wrong_arguments_are_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, "-q", *options]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("tsc: ") and words in line
