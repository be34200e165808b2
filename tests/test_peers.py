"""Other people's codecs: that they store what they claim and lose what they must."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tscfile.quality.arrays import KVArrays  # noqa: E402
from tscfile.quality.calibration import Calibration  # noqa: E402
from tscfile.quality.codec import ByteTaker, Codec  # noqa: E402
from tscfile.quality.engine import Engine  # noqa: E402
from tscfile.quality.peers import packing  # noqa: E402
from tscfile.quality.peers.allocation import (  # noqa: E402
    BITS,
    Allocation,
    Group,
    dequantize,
    quantize,
    squared_error,
)
from tscfile.quality.peers.basis import N_SINKS, learn_bases, rows_of  # noqa: E402
from tscfile.quality.peers.kivi import Kivi  # noqa: E402
from tscfile.quality.peers.kvtc import Kvtc  # noqa: E402
from tscfile.quality.peers.turboquant import lloyd_max, rotation  # noqa: E402
from tscfile.quality.protocol import Plan, Report, evaluate  # noqa: E402
from tscfile.quality.registry import fixed_peers, learnt_peers, make_codecs  # noqa: E402
from tscfile.quality.report import from_json  # noqa: E402
from tscfile.quality.windows import read_text  # noqa: E402

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
TEXTS = SAMPLES / "texts"
KEPT = Path(__file__).parent / "quality"

FIXED, LEARNT = tuple(fixed_peers()), tuple(learnt_peers())
BITS_PER_VALUE = {
    "fp16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "kivi-4-r0": 5.0, "kivi-2-r0": 3.0,
    "turboquant-4": 4.25, "turboquant-3": 3.25, "turboquant-2": 2.25, "turboquant-k4v2": 3.25,
    "rotated-k4v2": 3.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL)


@pytest.fixture(scope="module")
def small(engine: Engine) -> Calibration:
    """Less than the kept numbers were made with, and quicker."""
    return Calibration(engine, read_text(TEXTS / "calibration.txt"), frames=512, n_windows=6)


@pytest.fixture(scope="module")
def cache(engine: Engine) -> KVArrays:
    document = read_text(TEXTS / "heldout.txt").documents[3]
    return engine.prefill(engine.tokenize(document)[:512])


def error(original: KVArrays, restored: KVArrays) -> float:
    """Mean squared error over mean square."""
    pairs = [
        (a.astype(np.float64), b.astype(np.float64))
        for (_, old), (_, new) in zip(original.roles(), restored.roles(), strict=True)
        for a, b in zip(old, new, strict=True)
    ]
    return sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(a).sum() for a, _ in pairs)


def roundtrip(codec: Codec, cache: KVArrays) -> KVArrays:
    return codec.decode(codec.encode(cache), cache.shape)


def check_fits(codec: Codec, cache: KVArrays) -> None:
    restored = roundtrip(codec, cache)
    for (_, old), (_, new) in zip(cache.roles(), restored.roles(), strict=True):
        for a, b in zip(old, new, strict=True):
            assert a.shape == b.shape and b.dtype == np.float16 and np.isfinite(b).all()
    assert codec.encode(cache) == codec.encode(cache)


# --- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("n_tokens", [1, 5, 129, 512])
def test_fixed_peers_bring_a_cache_back(name: str, n_tokens: int, cache: KVArrays) -> None:
    check_fits(make_codecs([name])[0], cache.head(n_tokens))


@pytest.mark.parametrize("name", ["kvtc-8x", "kvtc-64x", "kvtc-w16-24x", "pca-0.25", "pca-3"])
@pytest.mark.parametrize("n_tokens", [1, 5, 129, 512])
def test_learnt_peers_bring_a_cache_back(
    name: str, n_tokens: int, cache: KVArrays, small: Calibration
) -> None:
    [codec] = make_codecs([name], calibration=small)
    check_fits(codec, cache.head(n_tokens))
    assert codec.book_bytes > 0 or n_tokens == 0


@pytest.mark.parametrize("name", BITS_PER_VALUE)
def test_every_byte_is_counted(name: str, cache: KVArrays) -> None:
    data = make_codecs([name])[0].encode(cache)
    assert 8 * len(data) / cache.shape.n_values == BITS_PER_VALUE[name]


@pytest.mark.parametrize("name", ["fp16", "zstd-19"])
def test_exact_peers_are_exact(name: str, cache: KVArrays) -> None:
    assert error(cache, roundtrip(make_codecs([name])[0], cache)) == 0


def test_errors_fall_with_bits(cache: KVArrays, small: Calibration) -> None:
    for better, worse in [
        ("q8_0", "q4_0"), ("kivi-4", "kivi-2"), ("turboquant-4", "turboquant-3"),
        ("turboquant-3", "turboquant-2"), ("kvtc-8x", "kvtc-16x"), ("kvtc-w16-16x", "kvtc-w16-32x"),
        ("pca-0.25", "pca-1"),
    ]:  # fmt: skip
        first, second = make_codecs([better, worse], calibration=small)
        assert error(cache, roundtrip(first, cache)) < error(cache, roundtrip(second, cache))
        assert len(first.encode(cache)) > len(second.encode(cache))


# --- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (7, 13)).astype(np.uint8)
    data = packing.pack(codes, bits)
    assert len(data) == (91 if bits == 8 else 12 * bits)
    assert np.array_equal(packing.take(ByteTaker(data.tobytes()), bits, 7, 13), codes)


def test_kivi_keeps_its_residual_and_rounds_to_the_nearest(cache: KVArrays) -> None:
    part, codec = cache.head(300), Kivi(2, residual=128)
    restored = roundtrip(codec, part)
    for old, new in zip(part.keys, restored.keys, strict=True):
        assert np.array_equal(old[:, 256:], new[:, 256:]), "300 % 128 newest keys stay"
        self_range = np.ptp(old[:, :32].astype(np.float32), axis=1)
        off = np.abs(old[:, :32].astype(np.float32) - new[:, :32])
        assert (off <= self_range[:, None] / 6 * 1.01 + 2e-3).all()
    for old, new in zip(part.values, restored.values, strict=True):
        assert np.array_equal(old[:, 172:], new[:, 172:]), "the 128 newest values stay"
        assert not np.array_equal(old[:, :172], new[:, :172])


def test_turboquant_has_the_known_codebook() -> None:
    # Max, "Quantizing for minimum distortion", IRE Trans. IT-6 (1960), table I, N = 4 and 8.
    np.testing.assert_allclose(lloyd_max(2)[2:], [0.4528, 1.510], atol=5e-4)
    np.testing.assert_allclose(lloyd_max(3)[4:], [0.2451, 0.7560, 1.344, 2.152], atol=5e-4)
    turned = rotation(64) @ rotation(64).T
    np.testing.assert_allclose(turned, np.eye(64), atol=1e-5)


@pytest.mark.parametrize("bits, expected", [(4, 0.0095), (3, 0.0345), (2, 0.1175)])
def test_turboquant_reaches_its_distortion(bits: int, expected: float, cache: KVArrays) -> None:
    """Distortion of a Gaussian under Max's quantizers (the same table): rotation makes it one."""
    found = error(cache, roundtrip(make_codecs([f"turboquant-{bits}"])[0], cache))
    assert found == pytest.approx(expected, rel=0.08)


def test_principal_components_do_not_mix(small: Calibration) -> None:
    for basis in small.learn("pca", learn_bases).values():
        p = len(basis.mean)
        np.testing.assert_allclose(basis.vectors.T @ basis.vectors, np.eye(p), atol=1e-4)
        energy = np.square(basis.samples, dtype=np.float64).mean(axis=0)
        assert energy[:64].sum() > 0.5 * energy.sum()
        covariance = basis.samples.T @ basis.samples / len(basis.samples)
        off = covariance[:8, :8] - np.diag(np.diag(covariance[:8, :8]))
        assert np.abs(off).max() < 0.2 * energy[0]


def test_kvtc_keeps_sinks_and_window(cache: KVArrays, small: Calibration) -> None:
    restored = roundtrip(Kvtc(32, small, window=16), cache)
    for (_, old), (_, new) in zip(cache.roles(), restored.roles(), strict=True):
        for a, b in zip(old, new, strict=True):
            assert np.array_equal(a[:, :N_SINKS], b[:, :N_SINKS])
            assert np.array_equal(a[:, -16:], b[:, -16:])
            assert not np.array_equal(a[:, N_SINKS:-16], b[:, N_SINKS:-16])


def test_kvtc_plans_fit_their_budget(small: Calibration) -> None:
    for ratio in (8, 16, 64):
        for plan in Kvtc(ratio, small).plans.values():
            assert sum(group.cost for group in plan) <= 16 * 768 // ratio
            ends = [group.start + group.size for group in plan]
            assert all(a <= group.start for a, group in zip(ends, plan[1:], strict=False))


def test_keys_are_turned_back_before_the_transform(cache: KVArrays) -> None:
    plain = rows_of(cache)["k"][:, :128]
    tokens = cache.shape.tokens
    same = plain[tokens == np.bincount(tokens).argmax()]
    assert np.abs(same - same[0]).max() < 0.01 * np.abs(same).max()


def all_cuts(p: int, sizes: tuple[int, ...], start: int = 0) -> Iterator[list[Group]]:
    """Every way to cut ``p`` components into groups and to give each its bits."""
    if start == p:
        yield []
        return
    for size in sizes:
        if start + size <= p:
            for bits in BITS:
                for rest in all_cuts(p, sizes, start + size):
                    yield [Group(start, size, bits), *rest]


def test_allocation_is_the_best_there_is() -> None:
    p, sizes = 5, (1, 2, 4)
    rng = np.random.default_rng(0)
    samples = (rng.standard_normal((40, p)) * [9, 5, 3, 1, 0.3]).astype(np.float32)
    spent: dict[int, float] = {}
    for cut in all_cuts(p, sizes):
        cost = sum(group.cost for group in cut)
        total = sum(
            squared_error(samples[:, g.start : g.start + g.size], g.bits) for g in cut
        )
        spent[cost] = min(spent.get(cost, np.inf), total)
    allocation = Allocation(samples, 200, sizes)
    for budget in range(0, 201, 7):
        best = min(total for cost, total in spent.items() if cost <= budget)
        assert allocation.error(budget) == pytest.approx(best, rel=1e-9)
        plan = allocation.plan(budget)
        assert sum(group.cost for group in plan) <= budget
        coded = {i for group in plan for i in range(group.start, group.start + group.size)}
        dropped = [i for i in range(p) if i not in coded]
        found = float(np.square(samples[:, dropped], dtype=np.float64).sum())
        for group in plan:
            part = samples[:, group.start : group.start + group.size]
            found += float(np.square(part - dequantize(*quantize(part, group.bits))).sum())
        assert found == pytest.approx(best, rel=1e-5)


# --- kept numbers -----------------------------------------------------------------------------


def kept(frames: int) -> Report:
    return from_json((KEPT / f"peers-{frames}.json").read_text())


@pytest.mark.parametrize("frames", [768, 1792])
def test_kept_numbers_are_in_order(frames: int) -> None:
    report = kept(frames)
    assert {each.codec for each in report.results} == {*FIXED, *LEARNT}
    kl = {each.codec: each.continuation.kl_mean for each in report.results}
    assert kl["fp16"] == kl["zstd-19"] == 0
    assert kl["q8_0"] < kl["q4_0"] < kl["kivi-2"]
    assert kl["q4_0"] < kl["turboquant-2"] < report.references[0].forgetting.kl_mean
    assert kl["kvtc-8x"] < kl["kvtc-16x"] < kl["kvtc-32x"] < kl["kvtc-64x"]
    assert report.references[0].forgetting.n_predictions == 8 * 256


def test_kept_numbers_are_those_of_a_fresh_run(engine: Engine) -> None:
    check_fresh(engine, 768, ["q4_0", "kivi-2-r0"], None)


@pytest.mark.slow
def test_kept_numbers_of_learnt_peers(engine: Engine) -> None:
    calibration = Calibration(engine, read_text(TEXTS / "calibration.txt"))
    check_fresh(engine, 1792, ["kvtc-16x", "pca-1"], calibration)


def check_fresh(
    engine: Engine, frames: int, names: list[str], calibration: Calibration | None
) -> None:
    text = read_text(TEXTS / "heldout.txt")
    codecs = make_codecs(names, calibration=calibration)
    fresh = evaluate(engine, text, codecs, Plan((frames,)), calibration=calibration)
    old = kept(frames)
    for key in ("weights_blake3", "text_blake3", "seed", "n_windows", "n_continue", "n_recall"):
        assert fresh.conditions[key] == old.conditions[key]
    assert fresh.references[0].windows == old.references[0].windows
    by_name = {each.codec: each for each in old.results}
    for result in fresh.results:
        expected = by_name[result.codec]
        # Other processors round sums differently, which moves a few codes.
        assert result.continuation.kl_mean == pytest.approx(
            expected.continuation.kl_mean, rel=0.05
        )
        assert result.bits_per_value == pytest.approx(expected.bits_per_value, rel=0.005)
        assert result.continuation.perplexity_original == pytest.approx(
            expected.continuation.perplexity_original, rel=1e-4
        )
