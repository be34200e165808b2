"""Token-position delta: the reports' own, and in front of the coder of the tiers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tscfile.errors import UsageError  # noqa: E402
from tscfile.quality import arrays, pages  # noqa: E402
from tscfile.quality.arrays import KVArrays  # noqa: E402
from tscfile.quality.book_delta import NONE, PREVIOUS, BookDelta, delta_name, waves  # noqa: E402
from tscfile.quality.calibration import Calibration  # noqa: E402
from tscfile.quality.codec import Codec, TierCodec  # noqa: E402
from tscfile.quality.engine import Engine  # noqa: E402
from tscfile.quality.page_delta import PageDelta, codecs  # noqa: E402
from tscfile.quality.protocol import Plan, evaluate  # noqa: E402
from tscfile.quality.registry import make_codecs, names, runnable  # noqa: E402
from tscfile.quality.report import from_json  # noqa: E402
from tscfile.quality.windows import read_text  # noqa: E402

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
BOOK = SAMPLES / "model" / "reference-llama-6m.tscbook"
TEXTS = SAMPLES / "texts"
KEPT = Path(__file__).parent / "quality"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL)


@pytest.fixture(scope="module")
def calibration(engine: Engine) -> Calibration:
    """Less than the kept numbers were made with, and quicker."""
    return Calibration(engine, read_text(TEXTS / "calibration.txt"), frames=512, n_windows=6)


@pytest.fixture(scope="module")
def cache(engine: Engine) -> KVArrays:
    document = read_text(TEXTS / "heldout.txt").documents[3]
    return engine.prefill(engine.tokenize(document)[:512])


def roundtrip(codec: Codec, cache: KVArrays) -> KVArrays:
    return codec.decode(codec.encode(cache), cache.shape)


def furthest(a: KVArrays, b: KVArrays) -> float:
    return max(
        float(np.abs(x.astype(np.float32) - y).max())
        for (_, old), (_, new) in zip(a.roles(), b.roles(), strict=True)
        for x, y in zip(old, new, strict=True)
    )


# --- as the reports define it -----------------------------------------------------------------


@pytest.mark.parametrize("name", codecs())
@pytest.mark.parametrize("n_tokens", [1, 5, 64, 65, 129])
def test_every_length_comes_back(name: str, n_tokens: int, cache: KVArrays) -> None:
    part = cache.head(n_tokens)
    restored = roundtrip(codecs()[name], part)
    for (_, old), (_, new) in zip(part.roles(), restored.roles(), strict=True):
        for a, b in zip(old, new, strict=True):
            assert a.shape == b.shape and b.dtype == np.float16 and np.isfinite(b).all()
    assert furthest(part, restored) < 3


@pytest.mark.parametrize("every", [8, 64])
@pytest.mark.parametrize("keyframe, width", [("fp32", 32), ("fp16", 16)])
def test_bits_are_those_of_the_definition(
    every: int, keyframe: str, width: int, cache: KVArrays
) -> None:
    data = PageDelta(every, keyframe).encode(cache)
    bits = (width + (every - 1) * (4 + 16 / 64)) / every
    assert 8 * len(data) / cache.shape.n_values == bits


def test_errors_stay_within_the_page_and_do_not_add_up(cache: KVArrays) -> None:
    restored = roundtrip(PageDelta(32, "fp32"), cache)
    for (_, old), (_, new) in zip(cache.roles(), restored.roles(), strict=True):
        for a, b in zip(old, new, strict=True):
            frames, back = (arrays.rows(each).astype(np.float32) for each in (a, b))
            assert np.array_equal(frames[::32], back[::32]), "fp32 holds an fp16 keyframe exactly"
            left = frames - frames[::32].repeat(32, axis=0)
            peak = np.abs(left).reshape(-1, 64).max(axis=1)
            error = np.abs(frames - back).reshape(-1, 64).max(axis=1)
            # fp16 rounds the scale and what comes back.
            largest = np.abs(frames).reshape(-1, 64).max(axis=1)
            assert (error <= peak / 15 + (peak + largest) * 2.0**-10).all()


def test_the_bound_of_pages_is_reached_and_kept() -> None:
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((4000, 64)).astype(np.float32)
    for bits in (2, 4):
        scales, codes = pages.quantize(whole, bits)
        error = np.abs(pages.dequantize(scales, codes, bits) - whole).max(axis=1)
        bound = np.abs(whole).max(axis=1) / (2**bits - 1)
        assert (error <= bound + 2.0**-9).all() and (error > 0.9 * bound).any()


# --- in front of the coder of the tiers -------------------------------------------------------


@pytest.mark.parametrize("every", [NONE, PREVIOUS, 8, 64])
def test_frames_come_after_those_they_refer_to(every: int) -> None:
    steps = np.array([5] * 4 + [9] * 190 + [5] * 6, np.int32)
    seen: set[int] = set()
    for wave in waves(steps, every):
        assert (steps[wave.frames] == wave.step).all()
        if wave.distance:
            assert {int(i) for i in wave.frames - wave.distance} <= seen
        assert not seen & set(wave.frames.tolist())
        seen |= set(wave.frames.tolist())
    assert seen == set(range(200))


@pytest.mark.parametrize("tier", ["near", "archive"])
def test_without_a_delta_it_is_the_tier(
    tier: str, cache: KVArrays, calibration: Calibration
) -> None:
    """The same integers: what comes back differs by the rounding of float32 sums alone, and the
    bytes are those of the archive but for its structure."""
    ours, theirs = BookDelta(tier, BOOK, calibration, NONE), TierCodec(tier, BOOK)
    assert furthest(roundtrip(ours, cache), roundtrip(theirs, cache)) < 0.02
    structure = len(theirs.encode(cache)) - len(ours.encode(cache))
    assert 500 < structure < 1300


@pytest.mark.parametrize("every", [PREVIOUS, 8, 64])
def test_the_decoder_arrives_where_the_encoder_was(
    every: int, cache: KVArrays, calibration: Calibration
) -> None:
    """Closed loop: the error of a frame is that of its own quantizer, however far the keyframe."""
    plain = roundtrip(BookDelta("near", BOOK, calibration, NONE), cache)
    delta = roundtrip(BookDelta("near", BOOK, calibration, every), cache)
    errors = [
        np.mean([
            np.square(a.astype(np.float32) - b).mean()
            for (_, old), (_, new) in zip(cache.roles(), each.roles(), strict=True)
            for a, b in zip(old, new, strict=True)
        ])
        for each in (plain, delta)
    ]  # fmt: skip
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_learnt_factors_are_better_than_ones(cache: KVArrays, calibration: Calibration) -> None:
    def size(every: int, plain: bool = False) -> int:
        return len(BookDelta("balanced", BOOK, calibration, every, plain).encode(cache))

    assert size(8) < size(8, plain=True) and size(PREVIOUS) < size(PREVIOUS, plain=True)
    assert size(NONE) < 0.95 * size(8, plain=True), "differences as they are cost bytes"


def test_names(calibration: Calibration) -> None:
    literal = [codec.name for codec in make_codecs(["delta-k64"], calibration=calibration,
                                                   book=BOOK)]  # fmt: skip
    assert literal[:4] == [
        "delta-k64-fp32", "delta-k64-fp16", "delta-k64-fp32-prerope", "delta-k64-fp16-prerope"
    ]  # fmt: skip
    assert delta_name("archive", 64) in literal and delta_name("near", 8, True) in names()
    assert not any(name.startswith("delta") for name in runnable(True, True))
    assert not any(codec.name.startswith("delta") for codec in make_codecs(
        ["peers"], calibration=calibration))  # fmt: skip
    with pytest.raises(UsageError, match="delta-k8-near needs a book and calibration text"):
        make_codecs(["delta-k8-near"], calibration=calibration)


# --- kept numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [768, 1792])
def test_what_the_kept_numbers_settle(frames: int) -> None:
    """A difference to a keyframe saves less than one percent of bytes, as it is it costs five to
    twenty; both at the KL of the coder without it."""
    report = from_json((KEPT / f"delta-{frames}.json").read_text())
    by_name = {each.codec: each for each in report.results}
    for tier in ("near", "balanced", "compact", "archive"):
        alone = by_name[delta_name(tier, NONE)]
        whole = by_name[tier].stored_bytes
        for every in (8, 16, 32, 64):
            found = by_name[delta_name(tier, every)]
            saved = alone.stored_bytes - found.stored_bytes
            assert -0.001 < saved / whole < 0.01
            kl = found.continuation.kl_mean
            assert kl == pytest.approx(alone.continuation.kl_mean, rel=0.15)
        plain = by_name[delta_name(tier, 8, True)]
        assert plain.stored_bytes > 1.03 * alone.stored_bytes
    literal = by_name["delta-k64-fp32"]
    assert literal.snapshot_ratio == pytest.approx(3.42, abs=0.01)
    # Rotation and no keyframes have fewer bits and no more KL than keyframes every 8.
    assert by_name["delta-k8-fp32"].bits_per_value > 2 * by_name["rotated-k4v2"].bits_per_value


def test_kept_numbers_are_those_of_a_fresh_run(engine: Engine) -> None:
    text = read_text(TEXTS / "heldout.txt")
    wanted = ["delta-k64-fp32", "delta-k64-fp16-prerope"]
    fresh = evaluate(engine, text, make_codecs(wanted), Plan((768,)))
    old = {each.codec: each for each in from_json((KEPT / "delta-768.json").read_text()).results}
    for result in fresh.results:
        expected = old[result.codec]
        assert result.bits_per_value == expected.bits_per_value
        assert result.continuation.kl_mean == pytest.approx(expected.continuation.kl_mean, rel=0.05)


def test_the_frame_before_saves_less_than_three_percent() -> None:
    """Over 48 windows: what a stage of the format would have had to reach."""
    report = from_json((KEPT / "delta-768-48-windows.json").read_text())
    by_name = {each.codec: each for each in report.results}
    assert report.references[0].forgetting.n_predictions == 48 * 256
    for tier in ("near", "balanced", "compact", "archive"):
        alone, found = by_name[delta_name(tier, NONE)], by_name[delta_name(tier, PREVIOUS)]
        saved = (alone.stored_bytes - found.stored_bytes) / by_name[tier].stored_bytes
        assert 0 < saved < 0.03
        kl = found.continuation.kl_mean
        assert kl == pytest.approx(alone.continuation.kl_mean, rel=0.05)
