"""What the TSC reports claim, in our words: public reports on solsticestudio.ai, 2026.

Numbers are the reports'. A ratio is what they state against the baseline they name; ``kl`` and
``top1`` are the quality that they state beside it. Where ``why_not`` is given, no experiment here
can answer. An id that ends in a letter is a second statement of the same claim.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """``stated``: the figures as the report has them, in words."""

    id: str
    report: str
    says: str
    stated: str
    ratio: float = 0.0
    kl: float | None = None
    top1: float | None = None
    why_not: str = ""


_NOT_LIKE = "compares a cache with the weights of a model (QuIP#); the two are not like for like"
_ONE_MODEL = "needs several models; this run has one"

CLAIMS = (
    # --- part I: GPT-2, WikiText-2, 128 to 1024 tokens ---
    Claim("I-1", "Part I", "The lossless mode at 1024 tokens, all bits kept.",
          "7.98× against fp32, exact", 7.98, kl=0.0, top1=1.0),
    Claim("I-2", "Part I", "A keyframe every 64 tokens, 4-bit differences in between.",
          "63× against fp32, KL < 0.0001, top-1 1.0000", 63.0, kl=1e-4, top1=1.0),
    Claim("I-3", "Part I", "The ratio grows with the length of the text, 128 to 1024 tokens.",
          "grows with length"),
    Claim("I-4", "Part I", "4-bit pages: no error is larger than a fifteenth of the page's largest "
          "value, at any length.", "error ≤ α/15"),
    Claim("I-4b", "Part I", "The largest error that was seen.", "0.05 to 0.09",
          why_not="a figure of GPT-2's caches; what it is here stands below"),
    Claim("I-5", "Part I", "Keys and values change smoothly from token to token, so a difference "
          "to a nearby frame is small. The premise of the codec.", "no figure"),
    Claim("I-6", "Part I", "Ten times better than QuIP#.", "10.5×", why_not=_NOT_LIKE),
    Claim("I-7", "Part I", "With the error bound of a difference set below the 4-bit error, every "
          "frame became a keyframe and nothing was saved; with a larger bound the savings came.",
          "1× before"),
    Claim("I-8", "Part I", "Sizes of raw caches: GPT-2 at 1024 tokens, LLaMA-2-7B at 4096.",
          "37.7 MB and 2.1 GB"),
    # --- part II: vector quantization of keyframes ---
    Claim("II-1", "Part II", "I-2, and a quarter of the tokens evicted.",
          "84× against fp32, KL 0.08", 84.0, kl=0.08),
    Claim("II-2", "Part II", "Naive vector quantization: 8 values in one byte.",
          "1034× against fp32, KL 1.09", 1034.0, kl=1.09),
    Claim("II-3", "Part II", "It fails because heads differ in magnitude (median largest value "
          "5.88 in GPT-2, 4.10 in TinyLlama).", "cause: magnitudes of heads"),
    Claim("II-4", "Part II", "Dividing heads by their size, fp16 for bad blocks and product "
          "quantization each improve it.", "no figures available"),
    Claim("II-5", "Part II", "Product quantization, 2 sub-vectors of 256 centroids.",
          "219× against fp32, KL 0.05", 219.0, kl=0.05),
    Claim("II-6", "Part II", "Vector quantization, 2 values in one byte.",
          "429× against fp32, KL 0.11", 429.0, kl=0.11),
    Claim("II-7", "Part II", "A KL below 0.1 is defensible.", "KL < 0.1",
          why_not="a choice and not a result; taken as the limit here where a claim names none"),
    Claim("II-8", "Part II", "Better than QuIP#.", "14× and 36×", why_not=_NOT_LIKE),
    # --- part III: TinyLlama-1.1B, 1024 tokens ---
    Claim("III-1", "Part III", "Vector quantization, 8 values in one byte.",
          "1705× against fp32, KL 3.08, top-1 0.2", 1705.0, kl=3.08, top1=0.2),
    Claim("III-2", "Part III", "Vector quantization, 4 values in one byte.",
          "854× against fp32, KL 2.11, top-1 0.4", 854.0, kl=2.11, top1=0.4),
    Claim("III-3", "Part III", "Vector quantization, 2 values in one byte.",
          "429× against fp32, KL 0.154, top-1 1.0", 429.0, kl=0.154, top1=1.0),
    Claim("III-4", "Part III", "A codebook for single values, one byte each.",
          "216× against fp32, KL 0.030, top-1 0.8", 216.0, kl=0.030, top1=0.8),
    Claim("III-5", "Part III", "Vector quantization, fp16 for blocks above a threshold of 0.05.",
          "125× against fp32, KL 0.057, top-1 1.0", 125.0, kl=0.057, top1=1.0),
    Claim("III-6", "Part III", "Caches of modern models (RoPE, RMSNorm) compress better than those "
          "of GPT-2.", "no figure", why_not=_ONE_MODEL),
    Claim("III-7", "Part III", "Differences of the weights of neighbouring layers are larger than "
          "the weights: not worth storing.", "1.25 to 1.44 of the weights"),
    Claim("III-8", "Part III", "Better than QuIP#.", "20.8×", why_not=_NOT_LIKE),
    Claim("III-9", "Part III", "A cache of 128,000 tokens of \"LLaMA-3-7B\" shrinks from 67 GB to "
          "537 MB; 150 users fit an A100.", "67 GB, 150 users"),
    Claim("III-10", "Part III", "Cache objects of newer transformers have to be read as well as "
          "the tuples of older ones.", "both are read"),
    # --- part IV and one-pager: TinyLlama-1.1B, 256 tokens, fp16 baseline ---
    Claim("IV-1", "Part IV", "Keys in 4 bits, values in 2, after a Hadamard rotation.",
          "5.7× against fp16, KL 0.01", 5.7, kl=0.01),
    Claim("IV-1b", "One-pager", "The same.", "6.4× against fp16, KL 0.01", 6.4, kl=0.01),
    Claim("IV-2", "Part IV", "IV-1 with eviction at \"30 %\"; the first fifth of the layers keeps "
          "all tokens.", "7.1× against fp16, KL 0.12", 7.1, kl=0.12),
    Claim("IV-3", "Part IV", "The same at \"10 %\".", "10.6× against fp16, KL 0.49, top-1 0.8",
          10.6, kl=0.49, top1=0.8),
    Claim("IV-4", "Part IV", "A prefix that users share is stored once.", "3 to 5×", 3.0),
    Claim("IV-5", "Part IV", "Of each turn only what is new is stored.", "2 to 3×", 2.0),
    Claim("IV-6", "Part IV", "Both together with IV-1, for a whole service.", "32 to 113×", 32.0),
    Claim("IV-7", "Part IV", "GPUs for 2,000, 5,000, 10,000 users, without compression and with.",
          "7, 17, 34 and 3, 3, 4"),
    Claim("IV-7b", "Part IV", "What that saves in a year at 2 $ an hour.",
          "504,000, 886,000 and 1,350,000 $"),
    Claim("IV-8", "Part IV", "Singular values: rejected.", "rejected"),
    Claim("IV-8b", "Part IV", "Because the errors of the layers compound.", "no figure"),
    Claim("IV-9", "Part IV", "One ranking of tokens for all layers: rejected, each layer's own is "
          "better.", "rejected"),
    Claim("IV-10", "Part IV", "Its own audit: the fp32 baseline of parts I to III doubled every "
          "ratio.", "2×"),
    # --- scale validation: Mistral 7B, Qwen2.5 32B, Qwen2 72B ---
    Claim("SV-1", "Scale validation", "The tier called lossless, on all three models.",
          "4.1×, probably against fp16", 4.1),
    Claim("SV-2", "Scale validation", "The conservative tier: 4-bit keys, 2-bit values, light "
          "eviction.", "6.2×, probably against fp16", 6.2),
    Claim("SV-3", "Scale validation", "The ratio does not depend on the architecture.", "equal"),
    Claim("SV-4", "Scale validation", "Larger models do better at the conservative end.",
          "figures not available", why_not=_ONE_MODEL),
    Claim("SV-5", "Scale validation", "Twelve configurations and their Pareto frontier.",
          "figures not available",
          why_not="the report's figures are not available; the twelve are measured below"),
    Claim("SV-6", "Scale validation", "6.2× becomes 19 to 62× in a service.", "19 to 62×", 19.0),
    Claim("SV-7", "Scale validation", "An enterprise saves 4.3 million dollars a year.", "4.3 M$",
          why_not="the fleet and the prices behind it are not available"),
    # --- delta storage article: not about KV caches ---
    Claim("D-1", "Delta storage", "Agent states, replay buffers and caches stored as differences.",
          "25 to 123×", why_not="not about KV caches; no method is given"),
    Claim("D-2", "Delta storage", "1365 states of a tree of branches, 1365 MB, in 2.3 MB.", "593×",
          593.0),
    Claim("D-3", "Delta storage", "One keyframe for 100 states.", "1 in 100",
          why_not="a setting and not a result; the cost of reading is not given"),
    # --- green dividend ---
    Claim("G-1", "Green dividend", "30 GPUs fewer save energy, CO2 and water in a year.",
          "102 MWh, 40 t (H100: 93 t, 20 cars), 184,500 L"),
    Claim("G-2", "Green dividend", "10 million users: 30,000 GPUs fewer.", "30,000"),
)  # fmt: skip

BY_ID = {claim.id: claim for claim in CLAIMS}
