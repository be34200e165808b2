"""A transformers cache becomes a snapshot and a cache again, or is refused for a good reason.

Each silent trap of transformers is shown first: what the plain library answers, then the guard.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

import tscfile
from tscfile.errors import MismatchError, TscError, UnsupportedError, UsageError
from tscfile.identity import identity_from_gguf
from tscfile.model import ModelIdentity
from tscfile.resume.transformers import check, prepare
from tscfile.sources.hf_layout import as_llama_state, as_transformers
from tscfile.sources.llama_state import open_state, parse_state, state_size, write_state

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL = SAMPLES / "model" / "reference-llama-6m-f16.gguf"
SESSION = SAMPLES / "session.kv"
WINDOW = 16
N_VOCAB = 97
N_CACHED, N_MORE = 50, 6
TINY = {
    "vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "pad_token_id": None,
}  # fmt: skip


def load_gguf(path: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_gguf(MODEL)


def tiny(kind: str) -> Any:
    torch.manual_seed(7)
    alternating = ["sliding_attention", "full_attention"] * 2
    if kind == "sliding":
        config = transformers.MistralConfig(**TINY, sliding_window=WINDOW)
    elif kind == "mixed":
        config = transformers.Gemma3TextConfig(
            **TINY, sliding_window=WINDOW, layer_types=alternating, query_pre_attn_scalar=16
        )
    else:
        config = transformers.LlamaConfig(**TINY)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


@pytest.fixture(scope="module", params=["full", "sliding", "mixed"])
def small(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


def some_ids(n: int, n_vocab: int = N_VOCAB, seed: int = 0) -> Any:
    return torch.randint(1, n_vocab, (1, n), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: Any, cache: Any = None, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options)


def pairs(cache: Any) -> list[tuple[Any, Any]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def largest_difference(first: Any, second: Any) -> float:
    return float((first - second).abs().max())


def assert_equal_layers(first: Any, second: Any) -> None:
    assert len(first.layers) == len(second.layers)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        assert a.keys.dtype == b.keys.dtype
        assert a.get_seq_length() == b.get_seq_length()
        assert type(b).__name__.startswith("Dynamic")


# --- there and back -----------------------------------------------------------------------------


def test_resumed_logits_are_those_of_the_live_cache(reference: Any, tmp_path: Path) -> None:
    ids, more = some_ids(200, 4000), some_ids(20, 4000, seed=1)
    live = run(reference, ids).past_key_values
    path = tmp_path / "session.tsc"
    tscfile.pack(tscfile.from_cache(live, tokens=ids, model=reference), path)
    restored = tscfile.to_cache(path, model=reference)
    assert_equal_layers(live, restored)
    ours, theirs = run(reference, more, restored).logits, run(reference, more, live).logits
    assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("n_cached", [5, WINDOW - 1, WINDOW, N_CACHED])
def test_small_models_resume_alike(small: Any, n_cached: int, tmp_path: Path) -> None:
    """Full, sliding and mixed layers, before and beyond the window."""
    ids, more = some_ids(n_cached), some_ids(N_MORE, seed=1)
    whole = run(small, torch.cat([ids, more], 1)).logits[:, -N_MORE:]
    live = run(small, ids).past_key_values
    path = tmp_path / "session.tsc"
    tscfile.pack(tscfile.from_cache(live, tokens=ids, model=small), path)
    for model in (small, small.config, None):
        restored = tscfile.to_cache(path, model=model)
        assert_equal_layers(live, restored)
        assert largest_difference(run(small, more, restored).logits, whole) < 1e-5


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_every_type_comes_back_bit_for_bit(small: Any, name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(small).to(getattr(torch, name))
    ids = some_ids(N_CACHED)
    live = run(model, ids).past_key_values
    path = tmp_path / "session.tsc"
    tscfile.pack(tscfile.from_cache(live, tokens=ids, model=model), path)
    assert_equal_layers(live, tscfile.to_cache(path, model=model))
    with tscfile.open(path) as archive:
        stored = {t.dtype.name for track in archive.snapshot().tracks for t in track.tensors}
        assert stored == {{"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[name]}
        assert_equal_layers(live, tscfile.to_cache(archive))
    wider = tscfile.to_cache(path, dtype=torch.float32)
    assert wider.layers[0].keys.dtype == torch.float32
    assert torch.equal(wider.layers[0].keys, live.layers[0].keys.float())


def test_a_longer_conversation_is_appended(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "session.tsc"
    ids = some_ids(N_CACHED + N_MORE)
    first = run(small, ids[:, :N_CACHED]).past_key_values
    tscfile.pack(tscfile.from_cache(first, tokens=ids[:, :N_CACHED], model=small), path)
    kept = tscfile.to_cache(path)
    second = run(small, ids[:, N_CACHED:], first).past_key_values
    report = tscfile.append(tscfile.from_cache(second, tokens=ids, model=small), path)
    assert report.n_frames_new < report.n_frames_kept or "sliding" in small.config.layer_types
    assert_equal_layers(second, tscfile.to_cache(path))
    assert_equal_layers(kept, tscfile.to_cache(path, snapshot=0))


@pytest.mark.parametrize("n_cached", [7, N_CACHED])
def test_a_static_cache_is_taken_too(small: Any, n_cached: int) -> None:
    ids, more = some_ids(n_cached), some_ids(N_MORE, seed=1)
    static = transformers.StaticCache(config=small.config, max_cache_len=96)
    run(small, ids, static)
    snapshot = tscfile.from_cache(static, tokens=ids, model=small)
    ours = run(small, more, tscfile.to_cache(snapshot, model=small)).logits
    theirs = run(small, torch.cat([ids, more], 1)).logits[:, -N_MORE:]
    assert largest_difference(ours, theirs) < 1e-5


def test_pairs_of_tensors_are_a_cache(reference: Any) -> None:
    ids = some_ids(30, 4000)
    live = run(reference, ids).past_key_values
    snapshot = tscfile.from_cache(tuple(pairs(live)), tokens=ids[0].tolist(), model=reference)
    assert_equal_layers(live, tscfile.to_cache(snapshot, model=reference))


def test_what_iterating_a_cache_gives_is_taken() -> None:
    """Triples with the window, as transformers' own data-parallel code passes them."""
    model = tiny("mixed")
    ids = some_ids(N_CACHED)
    live = run(model, ids).past_key_values
    snapshot = tscfile.from_cache(list(live), tokens=ids, model=model)
    assert_equal_layers(live, tscfile.to_cache(snapshot, model=model))


def test_a_cache_without_windows_fits_a_sliding_model() -> None:
    """Made without the config, it holds all positions of the sliding layers."""
    model = tiny("sliding")
    ids, more = some_ids(N_CACHED), some_ids(N_MORE, seed=1)
    plain = run(model, ids, transformers.DynamicCache()).past_key_values
    restored = tscfile.to_cache(tscfile.from_cache(plain, tokens=ids), model=model)
    whole = run(model, torch.cat([ids, more], 1)).logits[:, -N_MORE:]
    assert largest_difference(run(model, more, restored).logits, whole) < 1e-5


def test_identity_has_the_facts_of_the_configuration(reference: Any) -> None:
    ids = some_ids(5, 4000)
    live = run(reference, ids).past_key_values
    facts = tscfile.from_cache(live, tokens=ids, model=reference.config).identity.facts
    recorded = identity_from_gguf(MODEL).facts
    # Same model; only the order of channels is transformers' own.
    shared = facts.keys() & recorded.keys() - {"name", "rope_pairing"}
    assert {"architecture", "n_layers", "n_kv_heads", "head_dim_k", "rope_base"} <= shared
    assert {name: facts[name] for name in shared} == {name: recorded[name] for name in shared}
    assert (facts["rope_pairing"], recorded["rope_pairing"]) == ("neox", "norm")
    given = tscfile.from_cache(live, tokens=ids, model=ModelIdentity(recorded)).identity.facts
    assert given == {**recorded, "rope_pairing": "neox"}


def test_no_torch_is_imported_with_the_package() -> None:
    code = "import sys, tscfile.sources.hf_cache, tscfile.resume.transformers as t; " + (
        "print(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- what is refused ----------------------------------------------------------------------------


def full_cache(n: int = 4, **options: Any) -> Any:
    keys = torch.zeros((options.get("batch", 1), 2, n, 16), dtype=options.get("dtype"))
    return transformers.DynamicCache([(keys, keys)])


def linear_attention_cache() -> Any:
    cache = transformers.DynamicCache()
    cache.layers = [transformers.cache_utils.LinearAttentionLayer()]
    return cache


def quantized_cache() -> Any:
    cache = full_cache()
    layer = transformers.cache_utils.DynamicIndexedLayer()
    layer.update(*pairs(cache)[0])
    cache.layers = [layer]
    return cache


@pytest.mark.parametrize(
    ("cache", "tokens", "error", "words"),
    [
        (lambda: full_cache(batch=2), 4, UsageError, "2 sequences"),
        (lambda: full_cache(), 3, MismatchError, "seen 4 tokens and 3 are given"),
        (lambda: full_cache(dtype=torch.float64), 4, UnsupportedError, "float64"),
        (lambda: transformers.DynamicCache(), 4, UsageError, "empty"),
        (linear_attention_cache, 4, UnsupportedError, "LinearAttentionLayer"),
        (quantized_cache, 4, UnsupportedError, "DynamicIndexedLayer"),
        (lambda: object(), 4, UnsupportedError, "object"),
        (lambda: [(torch.zeros(2, 3), torch.zeros(2, 3))], 4, UnsupportedError, "2 dimensions"),
        (lambda: full_cache(), "text", UsageError, "list of integer ids"),
        (lambda: full_cache(), [[1, 2], [3, 4]], UsageError, "2 rows of tokens"),
    ],
)
def test_refused_caches_are_named(cache: Any, tokens: Any, error: type, words: str) -> None:
    ids = list(range(tokens)) if isinstance(tokens, int) else tokens
    with pytest.raises(error, match=words) as caught:
        tscfile.from_cache(cache(), tokens=ids)
    assert isinstance(caught.value, TscError) and "\n" not in str(caught.value)


def test_hybrid_models_are_refused_by_the_kind_of_their_layer() -> None:
    config = transformers.Lfm2Config(
        vocab_size=N_VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = some_ids(8)
    with pytest.raises(UnsupportedError, match="LinearAttention"):
        tscfile.from_cache(run(model, ids).past_key_values, tokens=ids, model=model)
    snapshot = tscfile.from_cache(full_cache(8), tokens=ids)
    with pytest.raises(UnsupportedError, match="layer 0 of the model is of kind conv"):
        tscfile.to_cache(snapshot, model=model)


def test_a_latent_cache_is_carried_and_stays_latent() -> None:
    torch.manual_seed(3)
    config = transformers.DeepseekV3Config(
        vocab_size=N_VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=2,
        n_routed_experts=4, moe_intermediate_size=32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    ids, more = some_ids(N_CACHED), some_ids(N_MORE, seed=1)
    live = run(model, ids).past_key_values
    snapshot = tscfile.from_cache(live, tokens=ids, model=model)
    assert [track.attributes["kind"] for track in snapshot.tracks] == ["latent"]
    assert "rope_pairing" not in snapshot.identity.facts  # keys are not keys after RoPE
    restored = tscfile.to_cache(snapshot, model=model)
    assert_equal_layers(live, restored)
    whole = run(model, torch.cat([ids, more], 1)).logits[:, -N_MORE:]
    assert largest_difference(run(model, more, restored).logits, whole) < 1e-5
    with pytest.raises(UnsupportedError, match="latent"):
        as_llama_state(snapshot, "deepseek2")


def test_another_model_is_refused(reference: Any) -> None:
    snapshot = tscfile.from_cache(
        run(reference, some_ids(9, 4000)).past_key_values, tokens=range(9), model=reference
    )
    with pytest.raises(MismatchError, match="n_layers: recorded 6, model has 4"):
        tscfile.to_cache(snapshot, model=tiny("full"))
    snapshot.identity = ModelIdentity()
    with pytest.raises(MismatchError, match="6 layers, the model 4"):
        tscfile.to_cache(snapshot, model=tiny("full"))
    sliding = tiny("sliding")
    held = tscfile.from_cache(run(sliding, some_ids(N_CACHED)).past_key_values, tokens=range(50))
    with pytest.raises(MismatchError, match="layer 0 of the cache is sliding"):
        tscfile.to_cache(held, model=tiny("full"))


# --- between the engines ------------------------------------------------------------------------


def llama_logits(state: bytes, kind: str, model: Path, ids: list[int], at: int, tmp: Path) -> Any:
    with tiny_models.Engine(model, kv_type=0) as engine:
        assert engine.load(kind, state, 0, tmp)
        return engine.decode(ids, at)


def as_state_bytes(snapshot: Any, **options: Any) -> bytes:
    out = np.empty(state_size(snapshot, **options), np.uint8)
    write_state(snapshot, out.data, **options)
    return out.tobytes()


def test_a_llama_cpp_session_goes_on_in_transformers(reference: Any) -> None:
    """Prefilled by llama.cpp in f16, continued here: the rows are those that transformers makes."""
    snapshot = open_state(SESSION)
    restored = tscfile.to_cache(snapshot, model=reference, dtype=torch.float32)
    ids = torch.tensor(snapshot.tokens[None].astype(np.int64))
    live = run(reference, ids).past_key_values
    for ours, theirs in zip(restored.layers, live.layers, strict=True):
        assert largest_difference(ours.keys, theirs.keys) < 5e-3  # a half has 11 bits
        assert largest_difference(ours.values, theirs.values) < 5e-3
    more = some_ids(20, 4000)
    difference = largest_difference(
        run(reference, more, restored).logits, run(reference, more, live).logits
    )
    assert difference < 1e-2


def test_without_the_order_of_channels_the_session_would_be_garbage(reference: Any) -> None:
    """What a copy of the rows as they are does: no error, other text."""
    snapshot = open_state(SESSION)
    ids = torch.tensor(snapshot.tokens[None].astype(np.int64))
    live = run(reference, ids).past_key_values
    [track] = snapshot.tracks
    rows = [torch.tensor(each.view(np.float16).astype(np.float32)) for each in track.read(0, 400)]
    heads = [each.reshape(400, 2, 64).transpose(0, 1)[None] for each in rows]
    copied = transformers.DynamicCache(list(zip(heads[:6], heads[6:], strict=True)))
    more = some_ids(20, 4000)
    difference = largest_difference(
        run(reference, more, copied).logits, run(reference, more, live).logits
    )
    assert difference > 1


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama.gguf"
    tiny_models.write_llama(path)
    return path


@pytest.fixture(scope="module")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gemma3.gguf"
    tiny_models.write_gemma3(path)
    return path


def test_a_transformers_cache_goes_on_in_llama_cpp(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_gguf(tiny_llama)
    ids, more = some_ids(60, 259), some_ids(5, 259, seed=1)
    live = run(model, ids).past_key_values
    snapshot = as_llama_state(tscfile.from_cache(live, tokens=ids, model=model))
    state = as_state_bytes(snapshot)
    ours = llama_logits(state, "session", tiny_llama, more[0].tolist(), 60, tmp_path)
    theirs = run(model, more, live).logits[0, -1].numpy()
    assert np.abs(ours - theirs).max() < 5e-3
    # The same rows come back, whatever engine holds them.
    back = tscfile.to_cache(parse_state(state), model=model)
    assert_equal_layers(run(model, ids).past_key_values, back)


def test_sliding_windows_go_both_ways(tiny_gemma: Path, tmp_path: Path) -> None:
    model = load_gguf(tiny_gemma)
    for layer in model.model.layers:
        layer.self_attn.scaling = tiny_models.HEAD_DIM**-0.5  # the file cannot say it
    ids, more = some_ids(200, 259), some_ids(5, 259, seed=1)
    tokens, feed = ids[0].tolist(), more[0].tolist()
    with tiny_models.Engine(tiny_gemma, kv_type=0) as engine:
        engine.decode(tokens)
        state = engine.save("sequence", tokens, 0, tmp_path)
        expected = engine.decode(feed, 200)
    snapshot = parse_state(state, arch="gemma3")
    with pytest.raises(UsageError, match="does not say which layers"):
        as_transformers(snapshot, ModelIdentity({"architecture": "gemma3"}))
    restored = tscfile.to_cache(snapshot, model=model)
    assert np.abs(run(model, more, restored).logits[0, -1].numpy() - expected).max() < 5e-3
    live = tscfile.from_cache(run(model, ids).past_key_values, tokens=ids, model=model)
    written = as_state_bytes(as_llama_state(live))
    resumed = llama_logits(written, "sequence", tiny_gemma, feed, 200, tmp_path)
    assert np.abs(resumed - expected).max() < 5e-3


def test_what_cannot_change_engines_is_refused(reference: Any) -> None:
    snapshot = open_state(SESSION)
    with pytest.raises(UsageError, match="head size is not known"):
        tscfile.to_cache(snapshot)
    with pytest.raises(MismatchError, match="float16 and the model computes in torch.float32"):
        tscfile.to_cache(snapshot, model=reference)
    with pytest.raises(MismatchError, match="not the model's 2 heads of 16"):
        tscfile.to_cache(snapshot, model=tiny("full"))
    snapshot.source["arch"] = snapshot.identity.facts["architecture"] = "mpt"
    with pytest.raises(UnsupportedError, match="mpt keys is not known"):
        tscfile.to_cache(snapshot, dtype=torch.float32)
    sliding = run(tiny("sliding"), some_ids(N_CACHED)).past_key_values
    held = tscfile.from_cache(sliding, tokens=range(50), model=tiny("sliding"))
    with pytest.raises(UnsupportedError, match="past their window"):
        as_llama_state(held)
    nameless = tscfile.from_cache(full_cache(), tokens=range(4))
    with pytest.raises(UsageError, match="names its model's architecture"):
        as_llama_state(nameless)


def test_quantized_states_are_dequantized_when_a_type_is_given(tmp_path: Path) -> None:
    from tscfile.retype import retype

    rotated = retype(open_state(SESSION), "q8_0", head_dim=64)
    rotated.identity = identity_from_gguf(MODEL, weights=False)
    with pytest.raises(UnsupportedError, match="q8_0"):
        tscfile.to_cache(rotated)
    coarse = tscfile.to_cache(rotated, dtype=torch.float32)
    fine = tscfile.to_cache(retype(open_state(SESSION), "f32", head_dim=64), dtype=torch.float32)
    for a, b in zip(coarse.layers, fine.layers, strict=True):
        assert largest_difference(a.keys, b.keys) < 0.2


# --- silent traps and their guards --------------------------------------------------------------


def fresh(model: Any, ids: Any) -> Any:
    return run(model, ids).past_key_values


def generate(model: Any, ids: Any, cache: Any = None) -> list[int]:
    out = model.generate(
        ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=4,
        do_sample=False,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def test_trap_other_tokens(reference: Any) -> None:
    ids = some_ids(40, 4000)
    other = torch.cat([some_ids(20, 4000, seed=5), ids[:, 20:], some_ids(3, 4000, seed=6)], 1)
    cache = fresh(reference, ids)
    assert generate(reference, other, copy.deepcopy(cache)) != generate(reference, other)
    with pytest.raises(MismatchError, match="token 0 of the input"):
        check(cache, reference, ids, other)
    with pytest.raises(MismatchError, match="token 0 of the input"):
        prepare(tscfile.from_cache(cache, tokens=ids), reference, other)
    right = torch.cat([ids, some_ids(3, 4000, seed=6)], 1)
    assert check(cache, reference, ids, right) < 1e-3
    prepared = prepare(tscfile.from_cache(cache, tokens=ids), reference, right)
    assert (prepared.n_reused, prepared.new_ids.shape[1]) == (40, 3)
    made = reference.generate(**prepared.inputs, max_new_tokens=4, do_sample=False)
    assert made[0, 43:].tolist() == generate(reference, right)


def test_trap_a_cache_as_long_as_the_prompt(reference: Any) -> None:
    ids = some_ids(40, 4000)
    whole = run(reference, ids)
    cache = whole.past_key_values
    again = run(reference, ids[:, -1:], copy.deepcopy(cache)).logits[0, -1]
    assert largest_difference(again, whole.logits[0, -1]) > 1
    with pytest.raises(MismatchError, match=r"crop\(-1\)"):
        check(cache, reference, ids, ids)
    prepared = prepare(tscfile.from_cache(cache, tokens=ids, model=reference), reference)
    assert prepared.n_reused == 39 and prepared.new_ids.tolist() == ids[:, -1:].tolist()
    logits = run(reference, prepared.new_ids, prepared.cache).logits[0, -1]
    assert largest_difference(logits, whole.logits[0, -1]) < 1e-4


def test_a_full_window_cannot_be_cut_back() -> None:
    for kind in ("sliding", "mixed"):
        model = tiny(kind)
        ids = some_ids(N_CACHED)
        snapshot = tscfile.from_cache(fresh(model, ids), tokens=ids, model=model)
        with pytest.raises(MismatchError, match="cannot step back; add at least one token"):
            prepare(snapshot, model)
        more = torch.cat([ids, some_ids(N_MORE, seed=1)], 1)
        prepared = prepare(snapshot, model, more)
        ours = run(model, prepared.new_ids, prepared.cache).logits
        assert largest_difference(ours, run(model, more).logits[:, -N_MORE:]) < 1e-5
        # Before the window is full it can.
        short = tscfile.from_cache(fresh(model, ids[:, :9]), tokens=ids[:, :9], model=model)
        assert prepare(short, model).n_reused == 8


def test_trap_types(reference: Any) -> None:
    ids = some_ids(40, 4000)
    halves = [(k.half(), v.half()) for k, v in pairs(fresh(reference, ids))]
    widened = transformers.DynamicCache(halves)
    run(reference, ids[:, :1], widened)
    assert widened.layers[0].keys.dtype == torch.float32  # without a word
    low = copy.deepcopy(reference).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        run(low, ids[:, :1], transformers.DynamicCache(halves))
    snapshot = tscfile.from_cache(halves, tokens=ids, model=reference)
    for model in (reference, low):
        with pytest.raises(MismatchError, match="float16 and the model computes"):
            check(transformers.DynamicCache(halves), model, ids)
        with pytest.raises(MismatchError, match=f"give dtype={model.dtype}"):
            tscfile.to_cache(snapshot, model=model)
        prepared = prepare(snapshot, model)
        assert prepared.cache.layers[0].keys.dtype == model.dtype
        assert any("converted from f16" in note for note in prepared.notes)
        run(model, prepared.new_ids, prepared.cache)


@pytest.mark.parametrize("kind", ["sliding", "mixed"])
def test_trap_a_sliding_layer_filled_by_hand(kind: str) -> None:
    model = tiny(kind)
    ids, more = some_ids(N_CACHED), some_ids(N_MORE, seed=1)
    live = fresh(model, ids)
    whole = run(model, torch.cat([ids, more], 1)).logits[:, -N_MORE:]
    rebuilt = transformers.DynamicCache(ddp_cache_data=pairs(live), config=model.config)
    sliding = rebuilt.layers[0]
    assert sliding.cumulative_length == WINDOW - 1  # of 50
    assert largest_difference(run(model, more, copy.deepcopy(rebuilt)).logits, whole) > 1e-3
    with pytest.raises(MismatchError, match="counts 15 tokens and 50 are given"):
        check(rebuilt, model, ids)
    with pytest.raises(MismatchError, match="cumulative_length"):
        tscfile.from_cache(rebuilt, tokens=ids)
    untold = transformers.DynamicCache(ddp_cache_data=pairs(live))  # no layer slides
    with pytest.raises(MismatchError, match="counts 15 tokens"):
        check(untold, model, ids)
    assert check(live, model, ids) is None if kind == "sliding" else check(live, model, ids) < 1e-3
    restored = tscfile.to_cache(tscfile.from_cache(live, tokens=ids), model=model)
    assert restored.layers[0].cumulative_length == N_CACHED
    assert largest_difference(run(model, more, restored).logits, whole) < 1e-5


def test_trap_left_padding(reference: Any) -> None:
    ids, more = some_ids(40, 4000), some_ids(4, 4000, seed=1)
    pad = torch.zeros((1, 5), dtype=torch.int64)
    padded = torch.cat([pad, ids], 1)
    mask = torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    made = run(reference, padded, attention_mask=mask, position_ids=positions).past_key_values
    whole = run(reference, torch.cat([ids, more], 1)).logits[:, -4:]
    assert largest_difference(run(reference, more, copy.deepcopy(made)).logits, whole) > 1
    with pytest.raises(MismatchError, match="hides 5 of 45 tokens"):
        tscfile.from_cache(made, tokens=padded, model=reference, attention_mask=mask)
    with pytest.raises(MismatchError, match="hides 5 of 45"):
        check(made, reference, padded, attention_mask=mask)
    # Nothing tells that it was padded: the first rows do.
    snapshot = tscfile.from_cache(made, tokens=padded, model=reference)
    with pytest.raises(MismatchError, match="no left padding"):
        prepare(snapshot, reference, torch.cat([padded, more], 1))
    with pytest.raises(MismatchError, match="padded on the left"):
        prepare(snapshot, reference, torch.cat([ids, more], 1))


def test_trap_other_weights(small: Any) -> None:
    ids, more = some_ids(12), some_ids(N_MORE, seed=1)
    torch.manual_seed(99)
    other = transformers.AutoModelForCausalLM.from_config(small.config).float().eval()
    cache = fresh(small, ids)
    run(other, more, copy.deepcopy(cache))  # takes it
    with pytest.raises(MismatchError, match="did not make this cache"):
        check(cache, other, ids)
    with pytest.raises(MismatchError, match="did not make this cache"):
        prepare(tscfile.from_cache(cache, tokens=ids, model=small), other)
    unchecked = prepare(tscfile.from_cache(cache, tokens=ids), other, probe=False)
    assert "switched off" in unchecked.notes[0]
