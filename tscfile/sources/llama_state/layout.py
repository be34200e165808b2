"""Names and numbers of llama.cpp's state files, and the variants in which they were written.

llama.cpp saves a cache in four containers (session file, sequence file, state buffer, sequence
buffer) whose layout changed seven times, mostly without a new version number. What differs is
captured by the few switches of `Layout`; ``generation`` letters A to G are only labels for people.
"""

from __future__ import annotations

from dataclasses import dataclass

SESSION = "session"
SEQUENCE = "sequence"
STATE_BUFFER = "state-buffer"
SEQUENCE_BUFFER = "sequence-buffer"
CONTAINERS = (SESSION, SEQUENCE, STATE_BUFFER, SEQUENCE_BUFFER)

SESSION_MAGIC = 0x6767736E
SEQUENCE_MAGIC = 0x67677371
SEQUENCE_BUFFER_MAGIC = 0xAF143CD8
APPENDIX_MAGIC = 0x504B4353
DSV4_MAGIC = 0x34565344

MIN_VERSION = 9
MAX_VERSION = 11
SEQUENCE_VERSION_DELTA = 7
"""A sequence file's number is the session number less this: 9/2, 10/3, 11/4."""

MAX_SEQUENCES = 256
"""Bound for stream counts, sequence ids and sequences per cell (llama.cpp's ``LLAMA_MAX_SEQ``)."""
MAX_ARCH_LENGTH = 64
MAX_GGML_TYPE = 63
MAX_LAYERS = 1024
"""Bound for layer counts, twice llama.cpp's ``LLAMA_MAX_LAYERS``."""
MAX_ROW_BYTES = (1 << 31) - 1
"""Bound for one cell's row of a tensor; where a stream has no cells, no file size bounds it."""

KV = "kv"
REC = "rec"

KINDS: dict[tuple[str, ...], str] = {
    (): "none",
    (KV,): "plain",
    (KV, KV): "two-caches",
    (KV, KV, KV): "three-caches",
    (REC,): "recurrent",
    (KV, REC): "hybrid",
    (KV, KV, REC): "hybrid-two-caches",
    (KV, REC, KV): "hybrid-indexer",
}
"""The orders in which parts of a memory section occur, and what we call them."""

NO_MEMORY_ARCHS = frozenset(
    "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert "
    "t5encoder gemma-embedding dream llada llada-moe rnd1 wavtokenizer-dec".split()
)
"""Architectures whose memory section is empty; elsewhere an empty one is a cut file."""

RECURRENT_ARCHS = frozenset("mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7".split())
HYBRID_ARCHS = frozenset(
    "jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe nemotron_h nemotron_h_moe qwen3next "
    "qwen35 qwen35moe kimi-linear qwen4exp".split()
)
"""Architectures that always have a recurrent part, so that a file without it was cut."""

MLA_ARCHS = frozenset(
    "deepseek2 deepseek2-ocr deepseek32 glm-dsa kimi-linear mistral4 hy-v4 dots3note "
    "glm5-next minimax-m3".split()
)
"""Architectures that may have caches without values."""
MLA_CHANNELS = frozenset((320, 576))
"""Key channels of known latent caches (256 + 64, 512 + 64), where the file names no model."""

MROPE_ARCHS = frozenset(
    "qwen2vl paddleocr qwen3vl qwen3vlmoe qwen35 qwen35moe qwen4exp qwen3tts".split()
)
"""Architectures whose cells carry x and y from generation D on."""


@dataclass(frozen=True)
class Layout:
    """The switches in which generations of the same container differ.

    ``outputs``: an outputs section stands between arch and memory. ``streams``: a KV part starts
    with its number of streams. ``ext_bytes``: 0, 8 or 12 more bytes in each cell record.
    ``rotation``: the two rotation block sizes follow the layer count.
    """

    outputs: bool
    streams: bool
    ext_bytes: int
    rotation: bool


_OUTPUT_LAYOUTS = (
    Layout(True, True, 0, False),
    Layout(True, True, 8, False),
    Layout(True, False, 0, False),
)
_LAYOUT_9 = (Layout(False, True, 0, False), Layout(False, True, 8, False))
_LAYOUT_10 = (Layout(False, True, 0, False), Layout(False, True, 12, False))
_LAYOUT_11 = (Layout(False, True, 0, True), Layout(False, True, 12, True))


def layouts_of(
    container: str, version: int, buffer_magic: bool | None = None
) -> tuple[Layout, ...]:
    """The layouts to try; ``version`` is the session number, 0 if the container has none.

    ``buffer_magic`` says whether a sequence buffer has its prefix, which appeared during E.

    >>> [layout.ext_bytes for layout in layouts_of("session", 10)]
    [0, 12]
    """
    whole = container in (SESSION, STATE_BUFFER)
    oldest = _OUTPUT_LAYOUTS if whole else (Layout(False, False, 0, False),)
    known = {9: (*_LAYOUT_9, *oldest), 10: _LAYOUT_10, 11: _LAYOUT_11}
    if version:
        return known[version]
    if container == SEQUENCE_BUFFER:
        known = {9: _LAYOUT_9, 10: _LAYOUT_10, 11: _LAYOUT_11} if buffer_magic else {9: known[9]}
    return tuple(dict.fromkeys(layout for each in known.values() for layout in each))


@dataclass(frozen=True)
class _Generation:
    letter: str
    version: int
    outputs: bool
    streams: bool
    ext_bytes: int
    rotation: bool


_GENERATIONS = (
    _Generation("A", 9, True, False, 0, False),
    _Generation("B", 9, True, False, 0, False),
    _Generation("C", 9, True, True, 0, False),
    _Generation("D", 9, False, True, 8, False),
    _Generation("E", 9, False, True, 8, False),
    _Generation("F", 10, False, True, 12, False),
    _Generation("G", 11, False, True, 12, True),
)


def _is_wrong_age(generation: _Generation, buffer_magic: bool) -> bool:
    """Sequence buffers got their magic during generation E."""
    return generation.letter < "E" if buffer_magic else generation.letter > "E"


def generation_of(
    container: str,
    version: int,
    layout: Layout,
    *,
    kv_seen: bool,
    cells_seen: bool,
    layers_seen: bool,
    without_ids: bool,
    buffer_magic: bool | None = None,
) -> str:
    """The generations that write such a file, as ``F`` or ``D-F``; empty if none is known to.

    ``kv_seen``, ``cells_seen`` and ``layers_seen`` say which switches of the layout were put to
    the test; ``without_ids`` that the cells of a sequence save name no sequence, as only A does.
    """
    whole = container in (SESSION, STATE_BUFFER)

    def fits(generation: _Generation) -> bool:
        if version and generation.version != version:
            return False
        if buffer_magic is not None and _is_wrong_age(generation, buffer_magic):
            return False
        if whole and generation.outputs != layout.outputs:
            return False
        if not whole and cells_seen and (generation.letter == "A") != without_ids:
            return False
        if layout.ext_bytes and cells_seen and generation.ext_bytes != layout.ext_bytes:
            return False
        if layers_seen and generation.rotation != layout.rotation:
            return False
        return generation.streams == layout.streams or not kv_seen

    letters = [generation.letter for generation in _GENERATIONS if fits(generation)]
    return "-".join(dict.fromkeys((letters[0], letters[-1]))) if letters else ""
