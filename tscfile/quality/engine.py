"""A transformers causal language model that fills caches and goes on from them, in fp32."""

from __future__ import annotations

import io
import re
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TscError, UnsupportedError, UsageError
from ..identity import identity_from_gguf
from ..model import ModelIdentity
from ..transforms.rope import HALVES, NEIGHBOURS, Rope
from .arrays import CacheShape, KVArrays, LayerShape, rows
from .codec import snapshot_from_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

_PROBE_TOKENS = 8
_CHANGING_ROPE = ("dynamic", "longrope")
"""Kinds whose frequencies depend on the length: keys cannot be turned back by one table."""


class Engine:
    """A model and its tokenizer, loaded from a transformers directory or a GGUF file.

    Weights and sums are float32. Only caches of plain attention layers are taken; others are an
    `UnsupportedError` that names the kind.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path = path
        self.device = device
        self._model, self._tokenizer = _load(path, device)
        self.bos = self._leading_token()
        self.rope = self._find_rope()
        self.identity = self._identify()

    @property
    def architecture(self) -> str:
        return str(self._model.config.model_type)

    @property
    def max_positions(self) -> int:
        return int(getattr(self._model.config, "max_position_embeddings", 0) or 1 << 30)

    def fingerprint(self) -> str:
        """BLAKE3 (hex) of the weights: of a GGUF file's tensors as `tscfile.identity` counts them,
        of a directory's ``*.safetensors`` files in the order of their names."""
        if "weights_blake3" in self.identity.facts:
            return str(self.identity.facts["weights_blake3"])
        from blake3 import blake3

        hasher = blake3()
        for file in sorted(self.path.glob("*.safetensors")):
            hasher.update_mmap(file)
        return str(hasher.hexdigest())

    def tokenize(self, document: str) -> NDArray[np.int32]:
        """Ids of a text, int32, without the tokens that open a text (`bos`)."""
        ids = self._tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, np.int32)

    def pieces(self, tokens: NDArray[np.int32]) -> list[str]:
        """The text of each token, a space before those that begin a word in a line."""
        marked = self._tokenizer.convert_ids_to_tokens(tokens.tolist())
        return [piece.replace("Ġ", " ").replace("▁", " ") for piece in marked]

    def prefill(self, tokens: NDArray[np.int32]) -> KVArrays:
        """The cache of ``tokens`` (int32 ``[n]``), computed in fp32 and rounded to fp16.

        `UnsupportedError` if a key or a value is beyond the range of fp16.
        """
        keys, values = self._fill(tokens)
        with np.errstate(over="ignore"):
            halves = [[each.astype(np.float16) for each in role] for role in (keys, values)]
        if not all(np.isfinite(each).all() for role in halves for each in role):
            raise UnsupportedError(
                f"{self.path}: the cache of this model exceeds the range of fp16; "
                "quality is measured on fp16 caches"
            )
        layers = tuple(
            LayerShape(k.shape[0], k.shape[2], v.shape[2]) for k, v in zip(*halves, strict=True)
        )
        shape = CacheShape(np.asarray(tokens, np.int32), layers, self.rope, self.identity)
        return KVArrays(shape, *halves)

    def proceed(self, cache: KVArrays, feed: NDArray[np.int32], position: int) -> Tensor:
        """Logits float32 ``[n, vocabulary]`` after each of the ``n`` tokens fed behind ``cache``.

        Teacher-forced, in one pass. ``position`` is that of the first token fed: more than the
        length of the cache where frames were dropped from it. Where the cache has ``kept``,
        attention of each layer sees only the frames that it still has.
        """
        import torch

        ids = torch.as_tensor(feed, dtype=torch.int64, device=self.device)[None]
        where = torch.arange(position, position + len(feed), device=self.device)[None]
        with torch.no_grad(), self._seeing(cache.kept):
            logits: Tensor = self._model(
                input_ids=ids, past_key_values=self._dynamic_cache(cache), position_ids=where,
                use_cache=True,
            ).logits[0]  # fmt: skip
            return logits

    # --- what books are learnt from -----------------------------------------------------------

    def embeddings(self) -> NDArray[np.float32]:
        """Input embedding of every token, float32 ``[vocabulary, width]``."""
        weights: NDArray[np.float32] = (
            self._model.get_input_embeddings().weight.detach().float().cpu().numpy()
        )
        return weights

    def gradient_moments(
        self, cached: NDArray[np.int32], fed: NDArray[np.int32], n_draws: int, seed: int
    ) -> NDArray[np.float64]:
        """Second moments of d log p(y) / d(keys before RoPE, values) of the cache of ``cached``.

        For each of ``n_draws`` draws one y per fed token is drawn from the model, with a random
        sign. Returns float64 ``[2 * n_layers, c, c]``, summed over cached frames and averaged over
        draws and fed tokens: first the keys' matrices, then the values'.
        """
        import torch
        from transformers import DynamicCache

        filled = self.prefill(cached)
        leaves = [
            torch.as_tensor(each.astype(np.float32), device=self.device)[None].requires_grad_(True)
            for each in (*filled.keys, *filled.values)
        ]
        n_layers = len(filled.keys)
        pairs = list(zip(leaves[:n_layers], leaves[n_layers:], strict=True))
        made = DynamicCache(ddp_cache_data=pairs, config=self._model.config)
        ids = torch.as_tensor(fed, dtype=torch.int64, device=self.device)[None]
        self._model.requires_grad_(False)
        logits = self._model(input_ids=ids, past_key_values=made, use_cache=True).logits[0]
        chances = torch.log_softmax(logits.float(), -1)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        moments: NDArray[np.float64] | None = None
        for draw in range(n_draws):
            drawn = torch.multinomial(chances.detach().exp().cpu(), 1, generator=generator)[:, 0]
            signs = torch.randint(0, 2, (len(fed),), generator=generator) * 2.0 - 1
            picked = chances[torch.arange(len(fed)), drawn.to(self.device)]
            total = (picked * signs.to(self.device)).sum()
            found = torch.autograd.grad(total, leaves, retain_graph=draw + 1 < n_draws)
            parts = []
            for i, gradient in enumerate(found):
                heads = gradient[0].float().cpu().numpy()
                if i < n_layers and self.rope is not None:
                    # RoPE is a rotation, so gradients turn back as the keys do.
                    heads = self.rope.undo(heads, filled.shape.positions)
                flat = rows(heads)
                parts.append(flat.T.astype(np.float64) @ flat)
            part = np.stack(parts) / (n_draws * len(fed))
            moments = part if moments is None else moments + part
        assert moments is not None
        return moments

    def attention_moments(
        self, tokens: NDArray[np.int32], n_draws: int, seed: int
    ) -> NDArray[np.float64]:
        """What errors in keys (before RoPE) and values do to the outputs of attention.

        With a_ts the weight that query q_t gives to frame s, an error d of value s moves the
        output of layer and head by a_ts O d, one of key s by a_ts O (v_s - o_t) (q_ts . d) / √n,
        where O is the output projection, o_t the output and q_ts the query as the key before RoPE
        meets it. Sums of the squares over t and s, s drawn ``n_draws`` times for each t with the
        chances a_ts. Shapes as for `gradient_moments`; needs no gradients.
        """
        import torch

        found: dict[int, tuple[Any, Any]] = {}
        generator = torch.Generator(device="cpu").manual_seed(seed)
        rope = self.rope
        assert rope is not None

        def probe(
            plain: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
        ) -> Any:
            found[module.layer_idx] = _attention_costs(
                module, query[0], key[0], value[0], rope, n_draws, generator
            )
            return plain(module, query, key, value, mask, **options)

        self._read(tokens, probe)
        layers = [found[i] for i in sorted(found)]
        return np.stack([key for key, _ in layers] + [value for _, value in layers])

    # --- attention ----------------------------------------------------------------------------

    def attention_received(self, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """How much attention each frame gets in each layer while ``tokens`` are read, float64
        ``[n_layers, n]``: its weights summed over heads and over all tokens from its own on."""
        import torch

        found: dict[int, NDArray[np.float64]] = {}

        def probe(
            plain: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
        ) -> Any:
            n = query.shape[2]
            causal = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
            scaling = options.get("scaling") or query.shape[3] ** -0.5
            total = np.zeros(n)
            for head in range(query.shape[1]):
                keys = key[0, head * key.shape[1] // query.shape[1]].float()
                scores = query[0, head].float() @ keys.T * scaling
                chances = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
                total += chances.double().sum(0).cpu().numpy()
            found[module.layer_idx] = total
            return plain(module, query, key, value, mask, **options)

        self._read(tokens, probe)
        return np.stack([found[i] for i in sorted(found)])

    def _read(self, tokens: NDArray[np.int32], attention: Callable[..., Any]) -> None:
        """Run the model over ``tokens`` with its attention done by ``attention``."""
        import torch

        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)[None]
        with torch.no_grad(), self._attending(attention):
            self._model(input_ids=ids, use_cache=False, logits_to_keep=1)

    @contextmanager
    def _attending(self, attention: Callable[..., Any]) -> Iterator[None]:
        """Attention is done by ``attention(plain, module, query, key, value, mask, …)``, which is
        given what it would otherwise be done by."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config, name = self._model.config, "tscfile_probe"
        before = config._attn_implementation
        ALL_ATTENTION_FUNCTIONS[name] = partial(attention, ALL_ATTENTION_FUNCTIONS["sdpa"])
        try:
            config._attn_implementation = name
            yield
        finally:
            config._attn_implementation = before
            del ALL_ATTENTION_FUNCTIONS[name]

    @contextmanager
    def _seeing(self, kept: Sequence[NDArray[np.bool_]] | None) -> Iterator[None]:
        """Attention of each layer sees the ``kept`` frames of the cache and all that follow it."""
        import torch

        if kept is None:
            yield
            return
        masks: dict[int, Any] = {}

        def see(
            plain: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
        ) -> Any:
            layer, n, n_all = module.layer_idx, query.shape[2], key.shape[2]
            if layer not in masks:
                seen = torch.ones(n, n_all, dtype=torch.bool).tril(n_all - n)
                seen[:, : len(kept[layer])] &= torch.from_numpy(kept[layer])
                masks[layer] = seen[None, None].to(query.device)
            return plain(module, query, key, value, masks[layer], **options)

        with self._attending(see):
            yield

    def layer_weights(self) -> dict[str, list[NDArray[np.float32]]]:
        """Matrices of each kind, float32, layer after layer: those whose names differ only in the
        number of the layer."""
        found: dict[str, dict[int, NDArray[np.float32]]] = {}
        for name, tensor in self._model.state_dict().items():
            parts = re.fullmatch(r".*?\.(\d+)\.(.+)\.weight", name)
            if parts and tensor.ndim == 2:
                layers = found.setdefault(parts[2], {})
                layers[int(parts[1])] = tensor.detach().float().cpu().numpy()
        return {kind: [layers[i] for i in sorted(layers)] for kind, layers in found.items()}

    # --- caches -------------------------------------------------------------------------------

    def _fill(self, tokens: NDArray[np.int32]) -> tuple[list[Any], list[Any]]:
        """Float32 keys and values ``[n_kv_heads, n, head_dim]`` of each layer."""
        import torch

        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)[None]
        with torch.no_grad():
            cache = self._model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        self._check_layers(cache)
        keys = [layer.keys[0].float().cpu().numpy() for layer in cache.layers]
        return keys, [layer.values[0].float().cpu().numpy() for layer in cache.layers]

    def _dynamic_cache(self, cache: KVArrays) -> Any:
        import torch

        from ..sources.hf_cache import to_cache

        state = snapshot_from_arrays(cache)
        return to_cache(state, device=self.device, dtype=torch.float32, model=self._model)

    def _check_layers(self, cache: Any) -> None:
        from transformers.cache_utils import DynamicLayer

        for number, layer in enumerate(getattr(cache, "layers", [cache])):
            if type(layer) is not DynamicLayer:
                raise UnsupportedError(
                    f"{self.path}: layer {number} has a cache of kind {type(layer).__name__}; "
                    "quality is measured on plain attention caches (DynamicLayer) only"
                )

    # --- facts about the model ----------------------------------------------------------------

    def _identify(self) -> ModelIdentity:
        if self.path.is_file():
            return identity_from_gguf(self.path)
        from ..sources.hf_layout import identity_of_config

        return identity_of_config(self._model.config)

    def _leading_token(self) -> int | None:
        """The token with which the tokenizer opens every text, if it does."""
        bos = self._tokenizer.bos_token_id
        opened = self._tokenizer("a")["input_ids"]
        return bos if bos is not None and opened and opened[0] == bos else None

    def _find_rope(self) -> Rope | None:
        """How keys are turned, proved on the model: before RoPE, layer 0 has the same key for the
        same token wherever it stands. None if no known way passes."""
        module = getattr(getattr(self._model, "base_model", None), "rotary_emb", None)
        inv_freq = getattr(module, "inv_freq", None)
        if inv_freq is None or getattr(module, "rope_type", "default") in _CHANGING_ROPE:
            return None
        table = inv_freq.float().cpu().numpy()
        scale = float(getattr(module, "attention_scaling", 1.0))
        keys = self._fill(np.full(_PROBE_TOKENS, 1, np.int32))[0][0]
        positions = np.arange(_PROBE_TOKENS, dtype=np.int32)
        for pairing in (HALVES, NEIGHBOURS):
            rope = Rope(table, pairing, scale)
            turned = rope.undo(keys, positions)
            if np.abs(turned - turned[:, :1]).max() < 1e-3 * np.abs(turned).max():
                return rope
        return None


_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What models call the projection behind attention."""


def _attention_costs(
    module: Any, query: Any, key: Any, value: Any, rope: Rope, n_draws: int, generator: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One layer's part of `Engine.attention_moments`: keys' and values' matrix, ``[w, w]``."""
    import torch

    n_heads, n, dim = query.shape
    n_kv_heads = key.shape[0]
    projection = next((getattr(module, name) for name in _OUTPUTS if hasattr(module, name)), None)
    weight = None if projection is None else projection.weight.float()
    costs = np.zeros((2, n_kv_heads, dim, dim))
    causal = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
    for head in range(n_heads):
        kv = head * n_kv_heads // n_heads
        scores = query[head].float() @ key[kv].float().T * module.scaling
        chances = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
        drawn = torch.multinomial(chances.cpu(), n_draws, replacement=True, generator=generator)
        drawn = drawn.to(query.device)
        share = chances.gather(1, drawn)
        if weight is None or weight.shape[1] != n_heads * dim:
            out = torch.eye(dim, device=query.device)
        else:
            out = weight[:, head * dim : (head + 1) * dim]
        values = value[kv].float()
        moved = (values[drawn] - (chances @ values)[:, None]) @ out.T
        loss = share * moved.square().sum(-1) * module.scaling**2
        costs[1, kv] += float(share.sum()) * (out.T @ out).cpu().double().numpy()
        for k in range(n_draws):
            places = drawn[:, k].cpu().numpy().astype(np.int32)
            met = rope.undo(query[head : head + 1].float().cpu().numpy(), places)[0]
            costs[0, kv] += (met * loss[:, k : k + 1].cpu().numpy()).T @ met
    both = np.zeros((2, n_kv_heads * dim, n_kv_heads * dim))
    for kv in range(n_kv_heads):
        span = slice(kv * dim, (kv + 1) * dim)
        both[:, span, span] = costs[:, kv]
    return both[0], both[1]


def _load(path: Path, device: str) -> tuple[Any, Any]:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise TscError(f"measuring quality needs {error.name}: pip install 'tscfile[hf]'") from None
    if not path.exists():
        raise UsageError(f"{path}: no such model; give a transformers directory or a GGUF file")
    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    with _silence():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, **options
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(f"{path}: transformers cannot load this model: {first}") from None
    return model.to(device).eval(), tokenizer


@contextmanager
def _silence() -> Iterator[None]:
    """Keep bars and hints off stderr while a model is loaded; what goes wrong is raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
