"""Element types of cached keys and values, and how many bytes they take.

Names, ids and block layouts are ggml's (``ggml/include/ggml.h``, ``ggml-common.h``), because
they are what state files hold; see ``spec/registry.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UnsupportedError


@dataclass(frozen=True)
class DType:
    """One element type.

    ``block_elements`` consecutive channels of one frame share ``block_bytes`` bytes; for plain
    floats a block is one element.

    >>> DTYPES["q8_0"].row_bytes(128)
    136
    """

    name: str
    ggml_id: int
    block_elements: int
    block_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.block_elements > 1

    def row_bytes(self, n_channels: int) -> int:
        """Bytes of one frame of ``n_channels`` elements; `ValueError` if blocks do not fit."""
        n_blocks, rest = divmod(n_channels, self.block_elements)
        if rest:
            raise ValueError(f"{n_channels} channels are no whole number of {self.name} blocks")
        return n_blocks * self.block_bytes

    def n_channels(self, row_bytes: int) -> int:
        """Channels in a row of ``row_bytes`` bytes; `ValueError` if blocks do not fit."""
        n_blocks, rest = divmod(row_bytes, self.block_bytes)
        if rest:
            raise ValueError(f"{row_bytes} bytes are no whole number of {self.name} blocks")
        return n_blocks * self.block_elements


_ALL = (
    DType("f32", 0, 1, 4),
    DType("f16", 1, 1, 2),
    DType("q4_0", 2, 32, 18),
    DType("q4_1", 3, 32, 20),
    DType("q5_0", 6, 32, 22),
    DType("q5_1", 7, 32, 24),
    DType("q8_0", 8, 32, 34),
    DType("iq4_nl", 20, 32, 18),
    DType("bf16", 30, 1, 2),
)
DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _ALL}
_BY_GGML_ID: dict[int, DType] = {dtype.ggml_id: dtype for dtype in _ALL}


def opaque_dtype(ggml_id: int) -> DType:
    """An element type this build does not know: its rows are carried as bytes."""
    return DType(f"ggml-{ggml_id}", ggml_id, 1, 1)


def dtype_from_ggml(ggml_id: int) -> DType:
    """The type with this ggml id; an unknown id gives an opaque type of one-byte elements."""
    return _BY_GGML_ID.get(ggml_id) or opaque_dtype(ggml_id)


def dtype_from_name(name: str) -> DType:
    """The type with this name; `UnsupportedError` if there is none.

    >>> dtype_from_name("bf16").ggml_id
    30
    """
    if name in DTYPES:
        return DTYPES[name]
    if name.startswith("ggml-") and name[5:].isdigit():
        return dtype_from_ggml(int(name[5:]))
    raise UnsupportedError(f"element type {name!r} is unknown; known are {', '.join(DTYPES)}")
