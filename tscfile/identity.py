"""Which model made a state: facts and fingerprints read from its GGUF file.

A state file does not name its model, and llama.cpp loads it into any model of the same shape. So
an archive records these facts, and a resume compares them (`compare`) before it loads anything.

Facts of `ModelIdentity.facts`; what the file does not say is absent:

=====================  ========================================================================
``architecture``       ``general.architecture``
``name``               ``general.name``; a label, never compared
``n_layers``           ``block_count``
``n_heads``            query heads; a list if they differ between layers
``n_kv_heads``         heads of the cache; a list if they differ between layers
``head_dim_k``         channels of one head's key
``head_dim_v``         channels of one head's value
``rope_base``          base of the rotary frequencies
``rope_dim``           how many channels of a key are rotated
``rope_scaling``       kind of frequency scaling, ``none`` if there is none
``rope_scaling_factor``, ``rope_scaling_original_context``  its parameters
``rope_pairing``       ``norm`` (neighbouring channels) or ``neox`` (halves), where known
``sliding_window``     positions a sliding-window layer sees
``vocab_size``         tokens in the vocabulary
``tokenizer_blake3``   `tokenizer_fingerprint`
``weights_blake3``     `weights_fingerprint`
=====================  ========================================================================

The file is parsed here and not with gguf-py, whose reader makes an array object of every token: it
takes seconds for a large vocabulary, and a damaged file raises whatever comes first.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bytestream import Allowance
from .errors import DamagedError, TruncatedError, TscError, UnsupportedError, UsageError
from .model import ModelIdentity

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # same layout; 3 only allows for big-endian files
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_KEPT_ARRAY = 1 << 16
"""Longest numeric array that is kept: facts per layer, never merges or scores."""
_HASH_CHUNK = 64 << 20
_SLACK_BYTES = 32 << 20
"""Metadata may take twice the size of the file in memory, and this."""
_VALUE_MEMORY, _NUMBER_MEMORY, _TENSOR_MEMORY = 256, 40, 512
_CHARACTER_MEMORY = 5
"""About what a key, an item of an array, a tensor and a byte of text take; see `Allowance`."""
_DEFAULT_ALIGNMENT = 32
_SHARD_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

ROPE_PAIRING: dict[str, str] = {
    **dict.fromkeys(
        """llama llada llama4 deci baichuan starcoder internlm2 minicpm xverse command-r cohere2
        olmo arctic deepseek deepseek2 plm chatglm granite granitemoe granitehybrid chameleon
        bailingmoe neo-bert smollm3 arcee ernie4_5 ernie4_5-moe""".split(),
        "norm",
    ),
    **dict.fromkeys(
        """falcon falcon-h1 grok dbrx stablelm bitnet qwen qwen2 dream qwen2moe qwen3 qwen3moe
        qwen3next llada-moe olmo2 olmoe phi2 phi3 phimoe plamo plamo2 gemma gemma2 gemma3 gemma3n
        starcoder2 openelm gptneox codeshell orion nemotron exaone exaone4 minicpm3 bailingmoe2
        dots1 hunyuan-moe hunyuan-dense gpt-oss lfm2 lfm2moe smallthinker glm4moe seed_oss
        grovemoe apertus""".split(),
        "neox",
    ),
}
"""Which channels a rotation pairs: llama.cpp fixes it per architecture, no file says it."""

_TEXTS = frozenset((
    "architecture", "name", "rope_scaling", "rope_pairing", "tokenizer_blake3", "weights_blake3",
))  # fmt: skip
_COUNTS = frozenset(("n_layers", "rope_dim", "sliding_window", "vocab_size"))
_COUNTS_OF_LAYERS = frozenset(("n_heads", "n_kv_heads", "head_dim_k", "head_dim_v"))
_NUMBERS = frozenset(("rope_base", "rope_scaling_factor", "rope_scaling_original_context"))

UNCOMPARED = frozenset({"name"})
"""Facts that may differ between two copies of one model."""


# --- what callers use ---------------------------------------------------------------------------


def identity_from_gguf(path: str | os.PathLike[str], *, weights: bool = True) -> ModelIdentity:
    """The identity of the model in the GGUF file ``path`` (of its shards, if it is split).

    ``weights=False`` leaves out ``weights_blake3``, the only fact that needs all bytes of the file.
    Raises `UsageError` if this is no model file, `DamagedError` if its structure contradicts
    itself, `UnsupportedError` for a version or tensor type this build does not know.
    """
    with _open_shards(Path(path)) as shards:
        facts = _model_facts(shards[0])
        if weights:
            facts["weights_blake3"] = weights_fingerprint(shards)
    # Where layers differ in what the facts have one number for, they say nothing of it.
    return ModelIdentity({key: value for key, value in facts.items() if is_fact(key, value)})


def read_identity(facts: Mapping[str, Any], where: str) -> ModelIdentity:
    """The identity that a file states; `DamagedError` for a known fact of another type.

    >>> read_identity({"n_layers": "many"}, "example")
    Traceback (most recent call last):
    tscfile.errors.DamagedError: example: the model's fact n_layers cannot be 'many'; damaged
    """
    for key, value in facts.items():
        if not is_fact(key, value):
            raise DamagedError(
                f"{where}: the model's fact {key} cannot be {_short(repr(value))}; damaged"
            )
    return ModelIdentity(dict(facts))


def is_fact(key: str, value: Any) -> bool:
    """May ``value`` stand for the fact ``key``? Any may for those that are not known here."""
    if key in _TEXTS:
        return isinstance(value, str)
    if key in _COUNTS_OF_LAYERS and isinstance(value, list):
        return bool(value) and all(_is_count(each) for each in value)
    if key in _COUNTS or key in _COUNTS_OF_LAYERS:
        return _is_count(value)
    return key not in _NUMBERS or (type(value) in (int, float) and math.isfinite(value))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def compare(recorded: ModelIdentity, actual: ModelIdentity) -> list[str]:
    """Differences in the facts that both have, one line each; empty if they agree.

    >>> compare(ModelIdentity({"rope_base": 10000.0}), ModelIdentity({"rope_base": 5e5}))
    ['rope_base: recorded 10000.0, model has 500000.0']
    """
    return [
        f"{name}: recorded {_short(value)}, model has {_short(actual.facts[name])}"
        for name, value in recorded.facts.items()
        if name in actual.facts and name not in UNCOMPARED and not _same(value, actual.facts[name])
    ]


def tokenizer_fingerprint(model: str, pre: str, tokens: list[str]) -> str:
    """BLAKE3 (64 hex digits) of a vocabulary, for checking the value read from a file.

    Hashed, little-endian: the string ``tokenizer.ggml.model``, the string ``tokenizer.ggml.pre``,
    u64 number of tokens, the tokens in order of their ids. A string is its u64 byte length and its
    UTF-8 bytes; an absent one is empty. Scores, merges and templates do not enter.

    >>> tokenizer_fingerprint("gpt2", "default", ["a", "b"])[:16]
    'c6850fa305ca2256'
    """
    hasher = _new_hasher()
    for text in (model, pre):
        hasher.update(_packed_string(text.encode()))
    hasher.update(struct.pack("<Q", len(tokens)))
    for token in tokens:
        hasher.update(_packed_string(token.encode()))
    return str(hasher.hexdigest())


def weights_fingerprint(shards: list[_Gguf]) -> str:
    """BLAKE3 (64 hex digits) of all tensors, whatever file and order they are stored in.

    Hashed, little-endian, for each tensor in ascending order of the bytes of its name: u64 name
    length, name, u32 ggml type, u32 number of dimensions, u64 of each dimension (fastest first),
    u64 number of data bytes, the data without padding.
    """
    located = [(tensor, shard) for shard in shards for tensor in shard.tensors]
    _check_apart(shards)
    located.sort(key=lambda pair: pair[0].name)
    for (first, shard), (second, _) in zip(located, located[1:], strict=False):
        if first.name == second.name:
            raise DamagedError(f"{shard.path}: two tensors are named {_printable(first.name)}")
    hasher = _new_hasher()
    for tensor, shard in located:
        _hash_tensor(hasher, tensor, shard)
    return str(hasher.hexdigest())


# --- facts --------------------------------------------------------------------------------------


def _model_facts(gguf: _Gguf) -> dict[str, Any]:
    architecture = gguf.values.get("general.architecture")
    kind = gguf.values.get("general.type", "model")
    if kind != "model" or not isinstance(architecture, str) or not architecture:
        raise UsageError(
            f"{gguf.path}: this GGUF file holds no language model (type {_short(kind)})"
        )
    facts: dict[str, Any] = {"architecture": architecture}
    if isinstance(gguf.values.get("general.name"), str):
        facts["name"] = gguf.values["general.name"]
    facts |= _attention_facts(gguf, architecture)
    facts |= _rope_facts(gguf, architecture, facts.get("head_dim_k"))
    facts |= _tokenizer_facts(gguf, architecture)
    return facts


def _attention_facts(gguf: _Gguf, architecture: str) -> dict[str, Any]:
    read = _NumberReader(gguf, architecture)
    n_heads = read.integer("attention.head_count")
    derived = _derived_head_dim(read.integer("embedding_length"), n_heads)
    found = {
        "n_layers": read.integer("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": read.integer("attention.head_count_kv", n_heads),
        "head_dim_k": read.integer("attention.key_length", derived),
        "head_dim_v": read.integer("attention.value_length", derived),
        "sliding_window": read.integer("attention.sliding_window") or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _derived_head_dim(embedding: Any, n_heads: Any) -> int | None:
    """What llama.cpp takes where the file has no head size."""
    most_heads = max(n_heads) if isinstance(n_heads, list) else n_heads
    return embedding // most_heads if isinstance(embedding, int) and most_heads else None


def _rope_facts(gguf: _Gguf, architecture: str, head_dim: Any) -> dict[str, Any]:
    read = _NumberReader(gguf, architecture)
    pairing = ROPE_PAIRING.get(architecture)
    if pairing is None and f"{architecture}.rope.freq_base" not in gguf.values:
        return {}
    scaling = gguf.values.get(f"{architecture}.rope.scaling.type")
    # Old files have only the factor of linear scaling, under another name.
    factor = read.number("rope.scaling.factor", read.number("rope.scale_linear"))
    if not isinstance(scaling, str):
        scaling = "linear" if factor not in (None, 0, 1) else "none"
    found = {
        "rope_base": read.number("rope.freq_base", 10000.0),
        "rope_dim": read.integer("rope.dimension_count", head_dim),
        "rope_scaling": scaling,
        "rope_pairing": pairing,
    }
    if scaling != "none":
        found["rope_scaling_factor"] = factor
        found["rope_scaling_original_context"] = read.integer(
            "rope.scaling.original_context_length"
        )
    return {name: value for name, value in found.items() if value is not None}


def _tokenizer_facts(gguf: _Gguf, architecture: str) -> dict[str, Any]:
    tokens = gguf.string_arrays.get("tokenizer.ggml.tokens")
    if tokens is None:
        size = _NumberReader(gguf, architecture).integer("vocab_size")
        return {} if size is None else {"vocab_size": size}
    hasher = _new_hasher()
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"):
        text = gguf.values.get(key, "")
        hasher.update(_packed_string(text.encode() if isinstance(text, str) else b""))
    hasher.update(struct.pack("<Q", tokens.count))
    # A GGUF string array is laid out as the fingerprint wants it: no need to split it.
    hasher.update(gguf.data[tokens.start : tokens.stop])
    return {"vocab_size": tokens.count, "tokenizer_blake3": hasher.hexdigest()}


class _NumberReader:
    """Numbers of one architecture: an int, a float, or a list where layers differ."""

    def __init__(self, gguf: _Gguf, architecture: str) -> None:
        self._gguf, self._prefix = gguf, architecture + "."

    def number(self, key: str, default: Any = None) -> Any:
        value = self._gguf.values.get(self._prefix + key)
        if isinstance(value, list):
            # One value for every layer, often the same one.
            value = None if not value else value if len(set(value)) > 1 else value[0]
        if value is None:
            return default
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str | bool) or not math.isfinite(each):
                raise self._wrong(key, each, "a finite number")
        return value

    def integer(self, key: str, default: Any = None) -> Any:
        value = self.number(key, default)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, float) or (each is not None and each < 0):
                raise self._wrong(key, each, "a count")
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> DamagedError:
        return DamagedError(
            f"{self._gguf.path}: {_short(self._prefix + key)} is {_short(value)}, which is not "
            f"{wanted}"
        )


# --- fingerprints -------------------------------------------------------------------------------


def _new_hasher() -> Any:
    import blake3

    return blake3.blake3(max_threads=blake3.blake3.AUTO)


def _packed_string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _check_apart(shards: list[_Gguf]) -> None:
    """Tensors that lie upon each other would take any time to hash."""
    for shard in shards:
        if sum(_extent(tensor, shard)[1] for tensor in shard.tensors) > len(shard.data):
            raise DamagedError(f"{shard.path}: its tensors overlap; damaged")


def _extent(tensor: _Tensor, shard: _Gguf) -> tuple[int, int]:
    """Where the data of a tensor start, and how many bytes they are."""
    start, n_bytes = shard.data_start + tensor.offset, _tensor_bytes(tensor, shard.path)
    if start + n_bytes > len(shard.data):
        raise TruncatedError(
            f"{shard.path}: tensor {_printable(tensor.name)} ends at byte {start + n_bytes} of a "
            f"file of {len(shard.data)}"
        )
    return start, n_bytes


def _hash_tensor(hasher: Any, tensor: _Tensor, shard: _Gguf) -> None:
    start, n_bytes = _extent(tensor, shard)
    hasher.update(_packed_string(tensor.name))
    hasher.update(struct.pack("<II", tensor.ggml_type, len(tensor.dims)))
    hasher.update(struct.pack(f"<{len(tensor.dims)}QQ", *tensor.dims, n_bytes))
    with memoryview(shard.data) as view:
        for offset in range(start, start + n_bytes, _HASH_CHUNK):
            with view[offset : min(offset + _HASH_CHUNK, start + n_bytes)] as chunk:
                hasher.update(chunk)


def _tensor_bytes(tensor: _Tensor, path: Path) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.ggml_type)]
    except (ValueError, KeyError):
        raise UnsupportedError(
            f"{path}: tensor {_printable(tensor.name)} has type {tensor.ggml_type}, which the "
            "installed gguf package does not know: upgrade it"
        ) from None
    row = tensor.dims[0] if tensor.dims else 1
    if row % block:
        raise DamagedError(
            f"{path}: tensor {_printable(tensor.name)} has rows of {row} elements, no whole number "
            f"of blocks of {block}"
        )
    return math.prod(tensor.dims) // block * block_bytes


# --- the file -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StringArray:
    """Where the elements of a string array lie in the file, and how many there are."""

    start: int
    stop: int
    count: int


@dataclass(frozen=True)
class _Tensor:
    name: bytes
    ggml_type: int
    dims: tuple[int, ...]
    offset: int


@dataclass
class _Gguf:
    """Metadata of one GGUF file and the file itself, mapped; ``allowance``: the memory that is left
    to what the metadata describe."""

    path: Path
    data: mmap.mmap
    allowance: Allowance
    values: dict[str, Any] = field(default_factory=dict)
    string_arrays: dict[str, _StringArray] = field(default_factory=dict)
    tensors: list[_Tensor] = field(default_factory=list)
    data_start: int = 0


@contextmanager
def _open_shards(path: Path) -> Iterator[list[_Gguf]]:
    """All files of the model that ``path`` is, or is a part of; the first one has the facts."""
    with ExitStack() as stack:
        first = _open_one(path, stack)
        count = first.values.get("split.count", 1)
        if not isinstance(count, int) or count <= 1:
            yield [first]
            return
        match = _SHARD_NAME.search(path.name)
        if match is None or int(match[2]) != count:
            raise UsageError(
                f"{path}: this is one of {count} parts of a model: rename it to end in "
                f"-00001-of-{count:05}.gguf so that the others can be found"
            )
        stem = path.name[: match.start()]
        names = [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
        yield [_open_one(path.with_name(name), stack) for name in names]


def _open_one(path: Path, stack: ExitStack) -> _Gguf:
    try:
        file = stack.enter_context(open(path, "rb"))
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise TruncatedError(f"{path}: the file is empty")
        mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{path}: no such model file") from None
    except (OSError, ValueError) as error:
        raise TscError(f"{path}: cannot be read: {error}") from None
    return _parse(path, mapped)


def _parse(path: Path, data: mmap.mmap) -> _Gguf:
    if data[:4] != _MAGIC:
        raise UsageError(f"{path}: not a GGUF model file (it starts with {data[:4]!r})")
    allowance = Allowance(2 * len(data) + _SLACK_BYTES)
    gguf, cursor = _Gguf(path, data, allowance), _Cursor(path, data, allowance)
    version = cursor.number("<I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(struct.pack("<I", version), "big") in _VERSIONS
        kind = "a big-endian GGUF file" if swapped else f"GGUF version {version}"
        raise UnsupportedError(f"{path}: {kind} cannot be read; convert it to version 3")
    n_tensors, n_values = cursor.number("<Q"), cursor.number("<Q")
    for _ in range(n_values):
        _parse_value(gguf, cursor)
    gguf.tensors.extend(_parse_tensor(cursor) for _ in range(n_tensors))
    alignment = gguf.values.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise DamagedError(f"{path}: general.alignment is {_short(alignment)}")
    gguf.data_start = -(-cursor.position // alignment) * alignment
    return gguf


def _parse_value(gguf: _Gguf, cursor: _Cursor) -> None:
    cursor.claim(_VALUE_MEMORY)
    key = cursor.string().decode("utf-8", "replace")
    if key in gguf.values or key in gguf.string_arrays:
        raise DamagedError(f"{gguf.path}: key {_short(key)} occurs twice")
    kind = cursor.number("<I")
    if kind == _STRING:
        gguf.values[key] = cursor.string().decode("utf-8", "replace")
    elif kind != _ARRAY:
        gguf.values[key] = cursor.number(cursor.scalar_format(kind))
    else:
        kind, count = cursor.number("<I"), cursor.number("<Q")
        if kind == _STRING:
            gguf.string_arrays[key] = cursor.skip_strings(count)
        else:
            gguf.values[key] = cursor.numbers(cursor.scalar_format(kind), count)


def _parse_tensor(cursor: _Cursor) -> _Tensor:
    cursor.claim(_TENSOR_MEMORY)
    name, n_dims = cursor.string(), cursor.number("<I")
    if n_dims > _MAX_DIMS:
        raise DamagedError(
            f"{cursor.path}: tensor {_printable(name)} has {n_dims} dimensions, more than "
            f"{_MAX_DIMS}"
        )
    dims = tuple(cursor.number("<Q") for _ in range(n_dims))
    return _Tensor(name, cursor.number("<I"), dims, cursor.number("<Q"))


class _Cursor:
    """Reads onwards through the file; a read past its end is a `TruncatedError`."""

    def __init__(self, path: Path, data: mmap.mmap, allowance: Allowance) -> None:
        self.path, self.data = path, data
        self.position = len(_MAGIC)
        self._allowance = allowance

    def claim(self, n_bytes: int) -> None:
        """`DamagedError` if what was read takes more memory than a file of this size may."""
        self._allowance.claim(n_bytes, str(self.path))

    def _take(self, n_bytes: int) -> int:
        start = self.position
        if n_bytes > len(self.data) - start:
            raise TruncatedError(
                f"{self.path}: {n_bytes} bytes are promised at byte {start} of a file of "
                f"{len(self.data)}"
            )
        self.position = start + n_bytes
        return start

    def number(self, fmt: str) -> Any:
        return struct.unpack_from(fmt, self.data, self._take(struct.calcsize(fmt)))[0]

    def string(self) -> bytes:
        length = self.number("<Q")
        start = self._take(length)
        self.claim(_CHARACTER_MEMORY * length)
        return self.data[start : start + length]

    def scalar_format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise DamagedError(
                f"{self.path}: value type {kind} before byte {self.position} does not exist"
            )
        return _SCALARS[kind]

    def numbers(self, fmt: str, count: int) -> list[Any] | None:
        """An array of ``count`` numbers; None if it is too long to be a fact about layers."""
        start = self._take(count * struct.calcsize(fmt))
        if count > _MAX_KEPT_ARRAY:
            return None
        self.claim(_NUMBER_MEMORY * count)
        return list(struct.unpack_from(f"<{count}{fmt[1]}", self.data, start))

    def skip_strings(self, count: int) -> _StringArray:
        start = position = self.position
        # Plain loop: a large vocabulary has a quarter of a million of these.
        data, length_at = self.data, struct.Struct("<Q").unpack_from
        last = len(data) - 8
        for _ in range(count):
            if position > last:
                raise TruncatedError(
                    f"{self.path}: the list of {count} strings at byte {start} does not end in a "
                    f"file of {len(data)} bytes"
                )
            position += 8 + length_at(data, position)[0]
        self._take(position - start)
        return _StringArray(start, position, count)


# --- words --------------------------------------------------------------------------------------


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) or isinstance(second, float):
        try:
            return math.isclose(first, second, rel_tol=1e-6)
        except TypeError:
            return False
    return bool(first == second)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else text[:16] + "…"


def _printable(name: bytes) -> str:
    return _short(name.decode("utf-8", "replace"))
