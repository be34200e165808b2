"""Codec 7: rows come back bit for bit, whatever they are the difference to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ALL_DTYPES, ROOT, gaussian_rows
from numpy.typing import NDArray
from spec_decoder import decoder

from tscfile import pipeline, registry
from tscfile.bytestream import ByteReader, ByteWriter
from tscfile.container.records import ChunkHeader
from tscfile.difference_codec import ALONE, DIFFERENCES, SAME, decode, encode, encode_chunk
from tscfile.dtypes import DTYPES, DType
from tscfile.errors import DamagedError, TruncatedError
from tscfile.identity import identity_from_gguf
from tscfile.model import ModelIdentity, TensorSpec
from tscfile.sources.llama_state import open_state
from tscfile.transforms.block_floats import BLOCK_FLOATS
from tscfile.transforms.rope import HALVES, NEIGHBOURS
from tscfile.transforms.turning import FLOATS, MOST_TURN, Turn, turn_rows, write_turn
from tscfile.turns import fit_turn, turn_of

Rows = NDArray[np.uint8]
N_CHANNELS = 128
TURNED = sorted(FLOATS | BLOCK_FLOATS)


def specs(dtypes: Sequence[DType], n_channels: int = N_CHANNELS) -> list[TensorSpec]:
    """Two layers of keys and values of each type."""
    return [
        TensorSpec(layer, role, dtype, dtype.row_bytes(n_channels))
        for dtype in dtypes for role in "kv" for layer in range(2)
    ]  # fmt: skip


def made(rng: np.random.Generator, tensors: Sequence[TensorSpec], n_frames: int) -> list[Rows]:
    return [gaussian_rows(rng, t.dtype, n_frames, t.n_channels) for t in tensors]


def nearly(rng: np.random.Generator, rows: Rows) -> Rows:
    """Some bytes changed a little."""
    changed = rng.random(rows.shape) < 0.05
    return np.where(changed, rows + rng.integers(-2, 3, rows.shape).astype(np.uint8), rows)


def some_turn(seed: int, head_dim: int = 64, n_pairs: int = 32, **options: object) -> Turn:
    angles = np.random.default_rng(seed).uniform(-np.pi, np.pi, n_pairs)
    pairing = (HALVES, NEIGHBOURS)[seed % 2]
    turn = Turn.of(head_dim, pairing, np.cos(angles), np.sin(angles))
    return replace(turn, **options)  # type: ignore[arg-type]


def round_trip(
    rows: list[Rows], base: list[Rows], tensors: list[TensorSpec], turn: Turn | None = None
) -> bytes:
    body = encode(rows, base, tensors, turn)
    found = decode(ByteReader(body, "chunk"), base, tensors)
    cursor = decoder.Cursor(body)
    named = [("kv".index(t.role), t.dtype.ggml_id) for t in tensors]
    reference = decoder.difference_rows(cursor, base, named)
    cursor.end()
    for part, out, other in zip(rows, found, reference, strict=True):
        assert out.dtype == np.uint8 and np.array_equal(out, part)
        assert np.array_equal(other, part)
    return body


def modes_of(body: bytes) -> list[tuple[int, int]]:
    """Runs of a body without a turn."""
    assert not body[0]
    return [(body[i], body[i + 1]) for i in range(1, len(body) - 1, 2)]


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("n_frames", [1, 37])
def test_round_trip(dtype: DType, n_frames: int) -> None:
    rng = np.random.default_rng(1)
    tensors = specs([dtype])
    base = made(rng, tensors, n_frames)
    round_trip([nearly(rng, part) for part in base], base, tensors)
    round_trip(made(rng, tensors, n_frames), base, tensors, some_turn(1))
    noise = [rng.integers(0, 256, part.shape, np.uint8) for part in base]
    turned = [nearly(rng, part) for part in noise]
    round_trip(turned, noise, tensors)


def test_all_types_in_one_chunk() -> None:
    rng = np.random.default_rng(2)
    tensors = specs(ALL_DTYPES)
    base = made(rng, tensors, 5)
    rows = [nearly(rng, part) if i % 3 else part for i, part in enumerate(base)]
    round_trip(rows, base, tensors, some_turn(2))


@pytest.mark.parametrize("name", ["f16", "f32", "q8_0"])
def test_differences_about_the_escape(name: str) -> None:
    """All from −300 to 300, some of which wrap around."""
    dtype, kind = DTYPES[name], np.dtype("<u4" if name == "f32" else "<u2")
    tensors = [TensorSpec(0, "v", dtype, 4 * dtype.block_bytes)]
    base = np.random.default_rng(13).integers(0, 256, (601, tensors[0].row_bytes), np.uint8)
    base[:100, :] = 0xFF
    rows = base.reshape(601, 4, -1).copy()
    patterns = np.ascontiguousarray(rows[:, :, : kind.itemsize]).view(kind)
    patterns += np.arange(-300, 301).astype(kind)[:, None, None]
    rows[:, :, : kind.itemsize] = patterns.view(np.uint8)
    body = round_trip([rows.reshape(base.shape)], [base], tensors)
    assert modes_of(body[:3]) == [(1, DIFFERENCES)]


def test_full_block_of_two_types() -> None:
    rng = np.random.default_rng(3)
    tensors = [replace(t, dtype=DTYPES["q8_0"], row_bytes=136) if t.role == "v" else t
               for t in specs([DTYPES["f16"]])]  # fmt: skip
    base, turn = made(rng, tensors, 256), some_turn(3)
    rows = [turn_rows(part, t.dtype, turn) if turn.takes(t) else part
            for part, t in zip(base, tensors, strict=True)]  # fmt: skip
    rows[-1] = rows[-1].copy()
    rows[-1][-1, -1] ^= 1  # the last number of the last frame
    body = round_trip(rows, base, tensors, turn)
    assert len(body) < 600
    chunk = encode_chunk(rows, base, tensors, turn, 2)
    assert chunk.body == body
    assert chunk.header == ChunkHeader(
        registry.DIFFERENCE, 2, 256, 0, DTYPES["f16"].ggml_id, (256, 256, 136, 136)
    )


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_numbers_that_are_none(name: str) -> None:
    """Every pattern of the upper 16 bits, NaN, infinity, −0 and subnormals among them."""
    dtype = DTYPES[name]
    patterns = np.arange(1 << 16, dtype=np.uint16)
    if name == "f32":
        patterns = patterns.astype(np.uint32) << 16 | patterns[::-1]
    base = [patterns.view(np.uint8).reshape(512, -1)]
    tensors = [TensorSpec(0, "k", dtype, dtype.row_bytes(N_CHANNELS))]
    turn = some_turn(4, n_pairs=24)
    expected = decoder.turn_rows(base[0][::7], dtype.ggml_id, decoder_turn(turn))
    assert np.array_equal(turn_rows(base[0], dtype, turn)[::7], expected)
    body = encode([turn_rows(base[0], dtype, turn)], base, tensors, turn)
    assert len(body) == 4 + 8 * 24 + 2
    rng = np.random.default_rng(4)
    shuffled = rng.permutation(patterns).view(np.uint8).reshape(512, -1)
    for rows in (shuffled, nearly(rng, base[0])):
        body = encode([rows], base, tensors, turn)
        (found,) = decode(ByteReader(body, "chunk"), base, tensors)
        assert np.array_equal(found, rows)


# --- modes --------------------------------------------------------------------------------------


def test_modes() -> None:
    rng = np.random.default_rng(5)
    tensors = specs([DTYPES["f16"]])
    base, others = made(rng, tensors, 64), made(rng, tensors, 64)
    assert encode(base, base, tensors) == bytes([0, 4, SAME])
    body = encode([*others[:2], *base[2:]], base, tensors)
    assert modes_of(body[:5]) == [(2, ALONE), (2, SAME)]
    alone = pipeline.encode_fields(others[:2], DTYPES["f16"])
    assert body[5:] == alone
    body = encode([nearly(rng, base[0]), *base[1:]], base, tensors)
    assert modes_of(body[:5]) == [(1, DIFFERENCES), (3, SAME)]
    assert len(body) < len(pipeline.encode_fields(base[:1], DTYPES["f16"])) / 4


def test_useless_turn_is_left_out() -> None:
    rng = np.random.default_rng(6)
    tensors = specs([DTYPES["f16"]])
    rows, base = made(rng, tensors, 64), made(rng, tensors, 64)
    assert encode(rows, base, tensors, some_turn(6)) == encode(rows, base, tensors)


def test_example_of_the_page() -> None:
    page = (ROOT / "spec" / "codecs" / "difference.md").read_text(encoding="utf-8")
    example = page[page.index("## Example") :]
    cells = re.findall(r"^\| ((?:`[0-9a-f ]+` ?)+) \| .* \|$", example, re.M)
    body = bytes.fromhex("".join(cells).replace("`", ""))
    frames = re.findall(r"`((?:[0-9a-f]{2} ?){4})`", example)
    base, predicted, rows = (
        [np.frombuffer(bytes.fromhex("".join(pair)), np.uint8).reshape(2, 4)]
        for pair in (frames[:2], frames[2:4], frames[4:6])
    )
    tensors = [TensorSpec(0, "k", DTYPES["f16"], 4)]
    turn = Turn(2, NEIGHBOURS, np.zeros(1, np.int32), np.full(1, 1 << 28, np.int32))
    assert np.array_equal(turn_rows(base[0], DTYPES["f16"], turn), predicted[0])
    assert not np.array_equal(rows[0], predicted[0])
    assert round_trip(rows, base, tensors, turn) == body


# --- turning ------------------------------------------------------------------------------------


def decoder_turn(turn: Turn) -> object:
    writer = ByteWriter()
    write_turn(writer, turn)
    return decoder.read_key_turn(decoder.Cursor(writer.bytes()))


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("mixed", [1, 32, 64])
def test_turns_are_those_of_the_page(name: str, mixed: int) -> None:
    """Against fractions, rounded number by number; cosines at their limits, too."""
    dtype = DTYPES[name]
    rng = np.random.default_rng(7)
    base = gaussian_rows(rng, dtype, 6, N_CHANNELS)
    base[4:] = rng.integers(0, 256, base[4:].shape, np.uint8)
    base[5, : base.shape[1] // 2] = 0
    if dtype.is_quantized:
        # Zeros of both signs, which have no smallest.
        zeros = base[3].reshape(-1, dtype.block_bytes)
        zeros[:] = 0
        zeros[:, 1] = zeros[:, 3 if name.endswith("_1") else 1] = 0x80
    for seed in (7, 8):
        turn = some_turn(seed, n_pairs=32 - seed, mixed=mixed)
        turn.cos[:4] = MOST_TURN, -MOST_TURN, 0, 1
        turn.sin[:3] = 0, 1, -MOST_TURN
        expected = decoder.turn_rows(base, dtype.ggml_id, decoder_turn(turn))
        assert np.array_equal(turn_rows(base, dtype, turn), expected)


@pytest.mark.parametrize(("name", "fraction", "one"), [("bf16", 7, 0x3F80), ("f16", 10, 0x3C00)])
@pytest.mark.parametrize(
    ("halves", "sine", "steps"), [(1, -1, 1), (1, 1, 0), (3, 1, 1), (3, -1, 2)]
)
def test_rounding_once(
    name: str, fraction: int, one: int, halves: int, sine: int, steps: int
) -> None:
    """1·c − 1·s, 2^-28 beside the middle of two neighbours: in f32 it would be the middle."""
    cosine = (1 << 28) + halves * (1 << (27 - fraction))
    turn = Turn(2, NEIGHBOURS, np.array([cosine], np.int32), np.array([sine], np.int32))
    row = np.array([[one, one]], np.uint16).view(np.uint8)
    found = turn_rows(row, DTYPES[name], turn).view(np.uint16)
    assert found[0, 0] == one + steps


def test_turn_out_of_range() -> None:
    writer = ByteWriter()
    write_turn(writer, some_turn(9, 4, 2))
    good = writer.bytes() + bytes([1, SAME])
    base, tensors = [np.zeros((1, 8), np.uint8)], [TensorSpec(0, "k", DTYPES["f16"], 8)]
    decode(ByteReader(good, "chunk"), base, tensors)
    changes = [(at, bytes([value])) for at, value in ((0, 3), (1, 17), (1, 255), (2, 0), (3, 3))]
    for value in (MOST_TURN + 1, -MOST_TURN - 1, -(1 << 31)):
        changes += [(at, value.to_bytes(4, "little", signed=True)) for at in (4, 16)]
    for at, change in changes:
        forged = good[:at] + change + good[at + len(change) :]
        with pytest.raises(DamagedError):
            decode(ByteReader(forged, "chunk"), base, tensors)


# --- hostile bytes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[bytes, list[Rows], list[Rows], list[TensorSpec]]:
    """Two types, a turn and all modes."""
    rng = np.random.default_rng(10)
    tensors = specs([DTYPES["f32"], DTYPES["q8_0"]], 32)
    base = made(rng, tensors, 9)
    turn = some_turn(10, 32, 4)
    rows = [turn_rows(part, t.dtype, turn) if turn.takes(t) else part
            for part, t in zip(base, tensors, strict=True)]  # fmt: skip
    rows[0] = nearly(rng, rows[0])
    rows[2] = made(rng, tensors, 9)[2]
    return encode(rows, base, tensors, turn), rows, base, tensors


def test_cut_at_every_length(small: tuple[bytes, list[Rows], list[Rows], list[TensorSpec]]) -> None:
    body, rows, base, tensors = small
    assert {mode for mode in (SAME, DIFFERENCES, ALONE)} <= set(body[37:51])
    for length in range(len(body)):
        with pytest.raises((TruncatedError, DamagedError)):
            decode(ByteReader(body[:length], "chunk"), base, tensors)
    with pytest.raises(DamagedError, match="left over"):
        decode(ByteReader(body + b"\0", "chunk"), base, tensors)


def test_runs_that_are_none() -> None:
    base, tensors = [np.zeros((1, 8), np.uint8)], [TensorSpec(0, "k", DTYPES["f16"], 8)]
    for runs in ([0, SAME, 1, SAME], [2, SAME], [1, 3]):
        with pytest.raises(DamagedError, match=r"damaged|out of range"):
            decode(ByteReader(bytes([0, *runs]), "chunk"), base, tensors)


def test_flipped_bits(small: tuple[bytes, list[Rows], list[Rows], list[TensorSpec]]) -> None:
    body, rows, base, tensors = small
    shapes = [part.shape for part in rows]
    for at in range(8 * len(body)):
        forged = bytearray(body)
        forged[at // 8] ^= 1 << at % 8
        try:
            found = decode(ByteReader(bytes(forged), "chunk"), base, tensors)
        except DamagedError:
            continue
        assert [part.shape for part in found] == shapes


# --- llama.cpp ----------------------------------------------------------------------------------

N_KEEP, N_DISCARD = 32, 256


def moved_frames(
    folder: Path, kv_type: str | tuple[str, str]
) -> tuple[list[Rows], list[Rows], list[TensorSpec]]:
    """Rows of the moved cells after and before a shift, by position."""
    from shifted_states import heldout_tokens, shifted_pair

    paths = shifted_pair(folder, heldout_tokens(701), N_KEEP, N_DISCARD, kv_type)
    tracks = [open_state(path).tracks[0] for path in paths]
    order = [np.argsort(track.cells.pos) for track in tracks]
    read = [track.read(0, len(track.cells)) for track in tracks]
    before = [part[order[0][N_KEEP + N_DISCARD :]] for part in read[0]]
    after = [part[order[1][N_KEEP:-1]] for part in read[1]]
    return after, before, list(tracks[0].tensors)


# Bytes of 412 frames: measured 777, 57553, 565, 563, 798; the turn takes 260 of them.
SHIFTS = {
    ("f16", "f16"): 1600,
    ("f32", "f32"): 80000,
    ("q8_0", "q8_0"): 1600,
    ("q4_0", "f16"): 1600,
    ("f16", "q8_0"): 1600,
}


@pytest.mark.parametrize(("kv_type", "most"), SHIFTS.items(), ids=lambda v: str(v))
def test_context_shift(tmp_path: Path, kv_type: tuple[str, str], most: int) -> None:
    pytest.importorskip("llama_cpp")
    from shifted_states import MODEL

    rows, base, tensors = moved_frames(tmp_path, kv_type)
    for part, old, tensor in zip(rows, base, tensors, strict=True):
        assert np.array_equal(part, old) == (tensor.role == "v")
    turn = turn_of(identity_from_gguf(MODEL, weights=False), tensors, -N_DISCARD)
    assert turn is not None and turn.mixed == (64 if kv_type[0][0] == "q" else 1)
    body = encode(rows, base, tensors, turn)
    found = decode(ByteReader(body, "chunk"), base, tensors)
    assert all(np.array_equal(part, out) for part, out in zip(rows, found, strict=True))
    assert len(body) < most
    fitted = fit_turn(rows, base, tensors)
    assert fitted is not None
    assert (fitted.head_dim, fitted.pairing, fitted.mixed) == (64, NEIGHBOURS, turn.mixed)
    assert np.abs(fitted.cos - turn.cos).max() < 2**28 / 100
    alone = pipeline.encode_fields(rows[:6], tensors[0].dtype)
    assert len(encode(rows, base, tensors, fitted)) < len(alone) / 10


def test_turns_that_are_not_known() -> None:
    rng = np.random.default_rng(11)
    tensors = specs([DTYPES["f16"]])
    facts = {"rope_base": 1e4, "rope_dim": 64, "rope_scaling": "none", "rope_pairing": "neox",
             "head_dim_k": 64}  # fmt: skip
    assert turn_of(ModelIdentity(facts), tensors, 5) is not None
    for key in facts:
        lacking = {name: value for name, value in facts.items() if name != key}
        assert turn_of(ModelIdentity(lacking), tensors, 5) is None
    scaled = facts | {"rope_scaling": "linear", "rope_scaling_factor": 4.0}
    found, plain = turn_of(ModelIdentity(scaled), tensors, 20), turn_of(ModelIdentity(facts), [], 5)
    assert found is not None and plain is not None and np.array_equal(found.cos, plain.cos)
    assert turn_of(ModelIdentity(facts | {"rope_scaling": "yarn"}), tensors, 5) is None
    base = made(rng, tensors, 64)
    assert fit_turn(made(rng, tensors, 64), base, tensors) is None
    for name, pairs in (("f16", 32), ("bf16", 16), ("f32", 8)):
        tensors = specs([DTYPES[name]], 192)
        base, turn = made(rng, tensors, 64), some_turn(12, 64, pairs)
        rows = [turn_rows(part, t.dtype, turn) if turn.takes(t) else part
                for part, t in zip(base, tensors, strict=True)]  # fmt: skip
        fitted = fit_turn(rows, base, tensors)
        assert fitted is not None and (fitted.head_dim, fitted.pairing) == (64, HALVES)
        assert len(fitted.cos) == pairs
