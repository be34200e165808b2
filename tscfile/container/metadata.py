"""Typed keys and values, and what most snapshots say with them (``spec/tsc.md``, sections 7.7 and
10)."""

from __future__ import annotations

from typing import Any

from ..bytestream import ByteReader, ByteWriter
from ..errors import DamagedError

# About what a value and an item of a list take in memory once they are read.
_VALUE_MEMORY, _ITEM_MEMORY = 256, 64

_DICTIONARY_BYTES = 1 << 16

# GGUF's value types (ggml/include/gguf.h), so that its users feel at home.
_U32, _I32, _BOOL, _STRING, _ARRAY, _U64, _I64, _F64 = 4, 5, 7, 8, 9, 10, 11, 12
_LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}


def write_metadata(writer: ByteWriter, values: dict[str, Any]) -> None:
    """Keys with typed values: bool, int, float, str, and lists of one of them."""
    writer.uvarint(len(values))
    for key, value in values.items():
        writer.string(key)
        _write_value(writer, value)


def read_metadata(reader: ByteReader) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(reader.count(item_bytes=3, item_memory=_VALUE_MEMORY)):
        key = reader.string()
        if key in values:
            raise DamagedError(f"{reader.where}: metadata key {key!r} occurs twice")
        values[key] = _read_value(reader)
    return values


def _value_type(value: object) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _I64 if value < 0 else _U64
    if isinstance(value, float):
        return _F64
    if isinstance(value, str):
        return _STRING
    raise TypeError(f"metadata cannot hold {type(value).__name__}")


def _write_value(writer: ByteWriter, value: object) -> None:
    if not isinstance(value, list):
        writer.u8(_value_type(value))
        _write_scalar(writer, _value_type(value), value)
        return
    types = {_value_type(item) for item in value} or {_U64}
    if types == {_U64, _I64}:
        types = {_I64}
    if len(types) != 1:
        raise TypeError("a metadata list holds values of one type")
    item_type = types.pop()
    writer.u8(_ARRAY).u8(item_type).uvarint(len(value))
    for item in value:
        _write_scalar(writer, item_type, item)


def _write_scalar(writer: ByteWriter, type_: int, value: Any) -> None:
    if type_ == _STRING:
        writer.string(value)
    elif type_ == _BOOL:
        writer.u8(value)
    else:
        writer.pack(_LAYOUTS[type_], value)


def _read_value(reader: ByteReader) -> Any:
    type_ = reader.u8()
    if type_ != _ARRAY:
        return _read_scalar(reader, type_)
    item_type = reader.u8()
    if item_type not in (_BOOL, _STRING, *_LAYOUTS):
        raise DamagedError(f"{reader.where}: metadata items of unknown type {item_type}; damaged")
    n_items = reader.count(item_memory=_ITEM_MEMORY)
    if item_type in _LAYOUTS:
        # All at once: a few bytes of zstd can stand for any number of them.
        return list(reader.unpack(f"{n_items}{_LAYOUTS[item_type]}"))
    return [_read_scalar(reader, item_type) for _ in range(n_items)]


def _read_scalar(reader: ByteReader, type_: int) -> Any:
    if type_ == _STRING:
        return reader.string()
    if type_ == _BOOL:
        return bool(reader.u8())
    if type_ in _LAYOUTS:
        return reader.unpack(_LAYOUTS[type_])[0]
    raise DamagedError(f"{reader.where}: metadata value of unknown type {type_}; damaged")


USUAL_METADATA: dict[str, Any] = {
    "has_outputs": False, "has_streams": True, "ext_bytes": 0, "has_rotation": False,
    "container": "sequence", "version": 9, "generation": "G", "parts": "kv", "kind": "plain",
    "n_stream": [1], "cell_counts": [0], "arch": "llama", "token_form": "plain", "v_trans": 0,
    "format": "llama.cpp", "attributes": "transformers", "layers": [0, 1, 2, 3, 4, 5, 6, 7],
    "sliding_window": 4096, "rope_scaling_factor": 1.0, "rope_scaling_original_context": 8192,
    "architecture": "qwen3", "name": "llama", "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
    "head_dim_k": 128, "head_dim_v": 128, "rope_base": 10000.0, "rope_dim": 128,
    "rope_scaling": "none", "vocab_size": 128256, "tokenizer_blake3": "0123456789abcdef",
    "weights_blake3": "0123456789abcdef", "book": "0123456789abcdef", "log_step": 0,
    "expected_kl": 0.01, "rope_pairing": "neox", "full": "norm", "keyframe": "balanced",
    "append": "lossless", "truncate+append": "session",
}  # fmt: skip
"""What the structure of a snapshot without parent is compressed against, as metadata. Part of the
format: it never changes."""


def dictionary_of(parent_structure: bytes) -> bytes:
    """What the structure of a snapshot is compressed against: the end of its parent's, or, without
    a parent, the metadata that most snapshots have."""
    if parent_structure:
        return parent_structure[-_DICTIONARY_BYTES:]
    writer = ByteWriter()
    write_metadata(writer, USUAL_METADATA)
    return writer.bytes()
