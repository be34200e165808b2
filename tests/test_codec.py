"""The lossless codec: every pattern of every element type comes back, and small."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import ALL_DTYPES, SESSION, SESSION_BF16, gaussian_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tscfile
from tscfile import pipeline, registry
from tscfile.bytestream import Allowance, ByteReader, ByteWriter
from tscfile.container.metadata import read_metadata, write_metadata
from tscfile.container.records import ChunkHeader
from tscfile.dtypes import DTYPES, DType, dtype_from_ggml, dtype_from_name, opaque_dtype
from tscfile.entropy import classed_rans, classes, ints, zstd
from tscfile.errors import DamagedError, TruncatedError, UnsupportedError
from tscfile.transforms import fields

Rows = NDArray[np.uint8]
by_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda dtype: dtype.name)
few = settings(max_examples=60, deadline=None, derandomize=True)

# Signed zeros, the largest and smallest, denormals, infinities, NaNs quiet and signalling with
# payloads, of both signs.
SPECIAL = {
    "f16": [
        0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF,
    ],
    "bf16": [
        0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF,
    ],
    "f32": [
        0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000,
        0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF,
    ],
}  # fmt: skip


def round_trip(rows: list[Rows], dtype: DType, first_tensor: int = 0) -> int:
    """Check that the rows come back and do not grow; returns the codec that was taken."""
    chunk = pipeline.encode_chunk(rows, dtype, first_tensor, registry.FIELDS_CLASSED_RANS)
    payload = chunk.header.write() + chunk.body
    header, decoded = pipeline.decode_chunk(memoryview(payload), "test")
    assert header == chunk.header
    assert (header.first_tensor, header.dtype_id) == (first_tensor, dtype.ggml_id)
    assert len(decoded) == len(rows)
    for ours, theirs in zip(rows, decoded, strict=True):
        assert theirs.dtype == np.uint8 and theirs.shape == ours.shape
        assert np.array_equal(theirs, ours)
    # The header is the constant: a dozen bytes and five for each tensor.
    assert len(payload) <= sum(part.nbytes for part in rows) + 16 + 5 * len(rows)
    return header.codec


def width(dtype: DType, n_blocks: int) -> int:
    return n_blocks * dtype.block_bytes


# Patterns ---------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("n_frames", [1, 2, 31, 256])
@pytest.mark.parametrize("n_blocks", [1, 3, 32])
def test_random_bytes(dtype: DType, n_frames: int, n_blocks: int) -> None:
    rng = np.random.default_rng(n_frames)
    rows = rng.integers(0, 256, (n_frames, width(dtype, n_blocks)), np.uint8)
    round_trip([rows], dtype)


@by_dtype
@pytest.mark.parametrize("n_frames", [1, 5, 256])
def test_values_like_those_of_a_cache(dtype: DType, n_frames: int) -> None:
    rng = np.random.default_rng(1)
    rows = [gaussian_rows(rng, dtype, n_frames, 256) for _ in range(4)]
    codec = round_trip(rows, dtype, first_tensor=7)
    assert codec == registry.FIELDS_CLASSED_RANS or n_frames < 256


@by_dtype
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80])
@pytest.mark.parametrize("shape", [(1, 1), (256, 64), (3, 33)], ids=str)
def test_constants(dtype: DType, byte: int, shape: tuple[int, int]) -> None:
    rows = np.full((shape[0], width(dtype, shape[1])), byte, np.uint8)
    codec = round_trip([rows], dtype)
    if rows.nbytes > 1000:
        assert codec == registry.FIELDS_CLASSED_RANS


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("n_frames", [1, 64])
def test_special_values(name: str, n_frames: int) -> None:
    dtype = DTYPES[name]
    patterns = np.array(SPECIAL[name], f"<u{dtype.block_bytes}")
    rng = np.random.default_rng(2)
    special = rng.choice(patterns, (n_frames, 96))
    round_trip([special.view(np.uint8)], dtype)
    # A few of them among ordinary values.
    mixed = gaussian_rows(rng, dtype, n_frames, 96).view(f"<u{dtype.block_bytes}").copy()
    mixed[rng.random(mixed.shape) < 0.02] = patterns[8]
    round_trip([mixed.view(np.uint8)], dtype)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_every_pattern_of_sixteen_bits(name: str) -> None:
    patterns = np.random.default_rng(3).permutation(1 << 16).astype("<u2")
    round_trip([patterns.reshape(256, 256).view(np.uint8)], DTYPES[name])


@by_dtype
def test_every_byte_of_a_block(dtype: DType) -> None:
    """Each bit of a block set alone: nothing is masked off or swapped."""
    n_bytes = dtype.block_bytes
    bits = np.eye(8 * n_bytes, dtype=np.uint8)
    rows = np.packbits(bits, axis=1, bitorder="little")
    round_trip([rows], dtype)
    parts = fields.split(rows, dtype)
    assert np.array_equal(fields.join(parts, dtype), rows)
    for field, part in zip(fields.fields_of(dtype), parts, strict=True):
        assert part.shape == (len(rows), fields.n_columns(field, dtype, n_bytes))
        assert int(part.max()) < 1 << field.bits


@pytest.mark.parametrize("shape", [(1, 1), (256, 1), (1, 4096), (256, 31), (255, 128)], ids=str)
def test_tensors_of_different_widths(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    widths = (shape[1], 1, 2 * shape[1])
    rows = [gaussian_rows(rng, DTYPES["f16"], shape[0], n) for n in widths]
    round_trip(rows, DTYPES["f16"])


def test_longest_block_of_all_one_value() -> None:
    """65536 frames: counts of one symbol are at their largest."""
    rows = np.zeros((65536, 2), np.uint8)
    rows[::1000] = 1
    round_trip([rows], DTYPES["f16"])


@few
@given(
    st.sampled_from(ALL_DTYPES), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1),
    st.sampled_from(["bytes", "few", "cache"]),
)  # fmt: skip
def test_anything_comes_back(
    dtype: DType, n_frames: int, n_blocks: int, seed: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    shape = (n_frames, width(dtype, n_blocks))
    if kind == "bytes":
        rows = rng.integers(0, 256, shape, np.uint8)
    elif kind == "few":
        rows = rng.choice(rng.integers(0, 256, 3).astype(np.uint8), shape)
    else:
        rows = gaussian_rows(rng, dtype, n_frames, n_blocks * max(dtype.block_elements, 1))
    round_trip([rows, rows[:, : dtype.block_bytes].copy()], dtype)


@few
@given(
    st.sampled_from([(4, 0), (5, 0), (8, 0), (16, 6), (16, 8), (32, 22), (16, 16), (8, 3)]),
    st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 32),
)  # fmt: skip
def test_any_matrix_comes_back(
    widths: tuple[int, int], n_rows: int, n_columns: int, seed: int, used_bits: int
) -> None:
    bits, low_bits = widths
    dtype = np.dtype(f"<u{1 if bits <= 8 else bits // 8}")
    top = 1 << min(used_bits, bits)
    matrix = np.random.default_rng(seed).integers(0, top, (n_rows, n_columns)).astype(dtype)
    coded = classed_rans.encode(matrix, bits, low_bits)
    assert len(coded) <= -(-matrix.size // 8) * bits + 32
    out = classed_rans.decode(memoryview(coded), bits, n_rows, n_columns, dtype, "test")
    assert out.dtype == dtype and np.array_equal(out, matrix)


def test_more_than_256_symbols() -> None:
    """High bits of which more occur than the coder sees: some are taken as low bits."""
    matrix = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    coded = classed_rans.encode(matrix, 16, 4)
    out = classed_rans.decode(memoryview(coded), 16, 256, 256, np.dtype("<u2"), "test")
    assert np.array_equal(out, matrix)


# Size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "ratio"), [(SESSION, 1.18), (SESSION_BF16, 1.50)], ids=lambda x: str(x)[-15:]
)
def test_ratio_of_real_sessions(path: Path, ratio: float, tmp_path: Path) -> None:
    """The whole file counts, as do only the rows of keys and values."""
    report = tscfile.pack(path, tmp_path / "session.tsc")
    assert (tmp_path / "session.tsc").stat().st_size == report.file_bytes
    assert report.raw_bytes / report.file_bytes >= ratio


@by_dtype
def test_noise_is_stored_raw(dtype: DType) -> None:
    rows = np.random.default_rng(6).integers(0, 256, (256, width(dtype, 64)), np.uint8)
    assert round_trip([rows], dtype) == registry.RAW


def coded_bits(counts: NDArray[np.uint32], one_class: bool) -> float:
    """What the symbols take under the classes that are chosen, or under one for all."""
    if one_class:
        _, frequencies = classes.choose(counts.sum(axis=0, keepdims=True, dtype=np.uint32))
        of_column = np.zeros(len(counts), np.uint8)
    else:
        of_column, frequencies = classes.choose(counts)
    assert (frequencies.sum(axis=1) == 4096).all()
    bits = 12 - np.log2(np.maximum(frequencies, 1))[of_column]
    return float((counts * bits).sum()) + 8 * 2 * frequencies.size


def test_classes_pay_for_their_tables() -> None:
    """Channels of two kinds are told apart; channels of one kind lose nothing by it."""
    rng = np.random.default_rng(7)
    alike = rng.multinomial(256, [0.5, 0.3, 0.2], 512).astype(np.uint32)
    apart = np.concatenate([alike, rng.multinomial(256, [0.1, 0.1, 0.8], 512).astype(np.uint32)])
    assert coded_bits(alike, False) <= coded_bits(alike, True)
    assert coded_bits(apart, False) < 0.9 * coded_bits(apart, True)
    of_column, _ = classes.choose(apart)
    assert not set(of_column[:512]) & set(of_column[512:])


def test_no_symbol_in_use_is_left_without_frequency() -> None:
    counts = np.zeros((1, 256), np.uint32)
    counts[0, :] = 1
    counts[0, 7] = 60000
    _, frequencies = classes.choose(counts)
    assert frequencies.min() == 1 and frequencies.sum() == 4096


# Integers ---------------------------------------------------------------------------------------

INT_ARRAYS = {
    "none": [],
    "one": [5],
    "limits": [-(1 << 31), (1 << 31) - 1, 0, -1, (1 << 31) - 1, -(1 << 31)],
    "rising": range(1000),
    "falling": range(1000, -1000, -2),
    "largest steps": [-(1 << 31), (1 << 31) - 1] * 40,
    "equal": [7] * 500,
    "holes": [*range(100), *range(150, 300), *range(290, 310)],
    "random": np.random.default_rng(8).integers(-(1 << 31), 1 << 31, 700).tolist(),
    "small": np.random.default_rng(9).integers(0, 50, 700).tolist(),
    "walk": np.random.default_rng(10).integers(-5, 5, 700).cumsum().tolist(),
}


@pytest.mark.parametrize("values", INT_ARRAYS.values(), ids=INT_ARRAYS)
def test_integers_come_back(values: list[int]) -> None:
    array = np.array(values, np.int32)
    writer = ByteWriter()
    ints.write(writer, array)
    reader = ByteReader(writer.bytes(), "test")
    out = ints.read(reader, len(array))
    reader.end()
    assert out.dtype == np.int32 and np.array_equal(out, array)
    assert len(writer) <= 4 * len(array) + 32


@few
@given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=80))
def test_any_integers_come_back(values: list[int]) -> None:
    writer = ByteWriter()
    ints.write(writer, np.array(values, np.int32))
    assert ints.read(ByteReader(writer.bytes(), "test"), len(values)).tolist() == values


@few
@given(st.binary(max_size=60), st.integers(0, 50))
def test_any_bytes_are_integers_or_damaged(data: bytes, n_values: int) -> None:
    try:
        assert len(ints.read(ByteReader(data, "test"), n_values)) == n_values
    except DamagedError:
        pass


def coded_ints(coding: int, body: bytes) -> bytes:
    return ByteWriter().u8(coding).uvarint(len(body)).raw(body).bytes()


def run_of(*numbers: int) -> bytes:
    writer = ByteWriter()
    for number in numbers:
        writer.uvarint(number)
    return writer.bytes()


@pytest.mark.parametrize(
    ("data", "n_values"),
    [
        (coded_ints(0, run_of(0, 2, 3)), 4),
        (coded_ints(0, run_of(0, 2, 5)), 4),
        (coded_ints(0, run_of(0, 2, 0)), 0),
        (coded_ints(0, run_of(0, 2)), 4),
        (coded_ints(0, run_of(1 << 33, 0, 4)), 4),
        (coded_ints(0, run_of((1 << 32) - 2, 2, 2)), 2),
        (coded_ints(1, zstd.compress(bytes(15))), 4),
        (coded_ints(1, zstd.compress(bytes(17))), 4),
        (coded_ints(2, b"nonsense"), 4),
        (coded_ints(3, b""), 4),
        (b"", 0),
    ],
    ids="few many empty cut start last short long zstd kind end".split(),
)
def test_damaged_integers(data: bytes, n_values: int) -> None:
    with pytest.raises(DamagedError):
        ints.read(ByteReader(data, "test"), n_values)


def test_claimed_integers_are_bounded() -> None:
    data = coded_ints(0, run_of(0, 0, 1 << 40))
    with pytest.raises(DamagedError, match="describes more"):
        ints.read(ByteReader(data, "test", Allowance(1 << 20)), 1 << 40)


# Bytes ------------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20), st.text(max_size=20))
def test_bytestream_comes_back(numbers: list[int], text: str) -> None:
    writer = ByteWriter()
    for number in numbers:
        writer.uvarint(number)
    data = writer.string(text).u8(255).pack("Qi", 1 << 63, -5).bytes()
    reader = ByteReader(data, "test")
    assert [reader.uvarint() for _ in numbers] == numbers
    assert (reader.string(), reader.u8(), reader.unpack("Qi")) == (text, 255, (1 << 63, -5))
    reader.end()
    with pytest.raises(TruncatedError):
        reader.u8()


@pytest.mark.parametrize(
    "data",
    [b"\x80\x00", b"\x80" * 9 + b"\x02", b"\xff" * 10, b"\x80" * 11, b"\x81\x80\x00"],
    ids=["padded", "65 bits", "endless", "long", "padded twice"],
)
def test_damaged_varints(data: bytes) -> None:
    with pytest.raises(DamagedError):
        ByteReader(data, "test").uvarint()


def test_bytestream_limits() -> None:
    assert ByteReader(b"\xff" * 9 + b"\x01", "test").uvarint() == (1 << 64) - 1
    for data, read in (
        (b"\x05", lambda r: r.uvarint(limit=4)),
        (b"\x05abcd", lambda r: r.string()),
        (b"\x02\xff\xfe", lambda r: r.string()),
        (b"\x03\0\0", lambda r: r.count()),
        (b"\x02\0\0\0", lambda r: r.count(item_bytes=2)),
        (b"\0", lambda r: r.end()),
        (b"\0\0\0", lambda r: r.unpack("I")),
    ):
        with pytest.raises(DamagedError):
            read(ByteReader(data, "test"))
    with pytest.raises(ValueError):
        ByteWriter().uvarint(-1)


# Metadata ---------------------------------------------------------------------------------------

METADATA = {
    "bool": [True, False], "yes": True, "no": False, "zero": 0, "largest": (1 << 64) - 1,
    "smallest": -(1 << 63), "mixed": [-1, (1 << 63) - 1], "float": 0.1, "tiny": 5e-324,
    "infinite": float("inf"), "text": "καλημέρα\n", "": "", "empty": [], "texts": ["a", ""],
    "floats": [1.5, -0.0], "numbers": [0, 1, 1 << 63],
}  # fmt: skip


def metadata_bytes(values: dict) -> bytes:  # type: ignore[type-arg]
    writer = ByteWriter()
    write_metadata(writer, values)
    return writer.bytes()


def test_metadata_comes_back() -> None:
    reader = ByteReader(metadata_bytes(METADATA), "test")
    values = read_metadata(reader)
    reader.end()
    assert values == METADATA and list(values) == list(METADATA)
    assert {key: type(value) for key, value in values.items()} == {
        key: type(value) for key, value in METADATA.items()
    }


def test_metadata_of_every_gguf_type() -> None:
    """A reader takes the widths that this writer does not use."""
    cases = {
        0: ("B", 255), 1: ("b", -128), 2: ("H", 65535), 3: ("h", -9), 4: ("I", 1), 5: ("i", -1),
        6: ("f", 0.5), 10: ("Q", 7), 11: ("q", -7), 12: ("d", 0.1),
    }  # fmt: skip
    for type_, (layout, value) in cases.items():
        raw = struct.pack("<" + layout, value)
        scalar = b"\x01\x01k" + bytes([type_]) + raw
        assert read_metadata(ByteReader(scalar, "test")) == {"k": value}
        array = b"\x01\x01k\x09" + bytes([type_]) + b"\x02" + raw + raw
        assert read_metadata(ByteReader(array, "test")) == {"k": [value, value]}


@pytest.mark.parametrize("value", [None, b"x", [1, "a"], [1, 1.0], [True, 2], {"a": 1}, [[1]]])
def test_metadata_that_cannot_be_held(value: object) -> None:
    with pytest.raises(TypeError):
        metadata_bytes({"key": value})


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1])
def test_metadata_integers_out_of_range(value: int) -> None:
    with pytest.raises(struct.error):
        metadata_bytes({"key": value})


@pytest.mark.parametrize(
    "data",
    [b"\x01\x01k\x0d", b"\x01\x01k\x09\x09\x00", b"\x02\x01k\x07\x01\x01k\x07\x01",
     b"\x7f\x01k\x07\x01", b"\x01\x01k\x09\x00\x05\x01"],
    ids=["type", "array of arrays", "twice", "count", "array count"],
)  # fmt: skip
def test_damaged_metadata(data: bytes) -> None:
    with pytest.raises(DamagedError):
        read_metadata(ByteReader(data, "test"))


@few
@given(st.binary(max_size=60))
def test_any_bytes_are_metadata_or_damaged(data: bytes) -> None:
    try:
        read_metadata(ByteReader(data, "test"))
    except DamagedError:
        pass


# Damaged chunks ---------------------------------------------------------------------------------


@by_dtype
def test_damaged_chunks(dtype: DType) -> None:
    """No checksum here: whatever the bytes are, there are rows or a project error."""
    rng = np.random.default_rng(12)
    rows = gaussian_rows(rng, dtype, 64, 128)
    chunk = pipeline.encode_chunk([rows], dtype, 0, registry.FIELDS_CLASSED_RANS)
    payload = chunk.header.write() + chunk.body
    for at in rng.integers(0, len(payload), 150):
        damaged = bytearray(payload)
        damaged[at] ^= 1 << rng.integers(8)
        decodes_or_refuses(bytes(damaged))
    for length in {0, 1, 5, *rng.integers(0, len(payload), 100).tolist()}:
        assert decodes_or_refuses(payload[:length])
    assert decodes_or_refuses(payload + b"\0")


def decodes_or_refuses(payload: bytes) -> bool:
    try:
        header, rows = pipeline.decode_chunk(memoryview(payload), "test", 1 << 24)
    except (DamagedError, UnsupportedError):
        return True
    assert [part.shape for part in rows] == [(header.n_frames, n) for n in header.row_bytes]
    return False


def test_chunk_headers_that_cannot_be() -> None:
    good = ChunkHeader(registry.RAW, 0, 2, 0, 1, (4,))
    assert pipeline.decode_chunk(memoryview(good.write() + bytes(8)), "test")[1][0].shape == (2, 4)
    for bad in (
        ChunkHeader(registry.RAW, 0, 0, 0, 1, (4,)),
        ChunkHeader(registry.RAW, 0, 2, 0, 1, ()),
        ChunkHeader(registry.RAW, 0, 2, 0, 1, (4, 0)),
        ChunkHeader(registry.RAW, 0, 2, 0, 1, (3,)),
        ChunkHeader(registry.RAW, 0, 65537, 0, 1, (4,)),
        ChunkHeader(registry.RAW, 0, 65536, 0, 1, (1 << 30,)),
        ChunkHeader(registry.RAW, 0, 2, 0, 1 << 20, (4,)),
        ChunkHeader(registry.RAW, 0, 1, 0, 1, (2,) * 40000 + (4,) * 40000),
        ChunkHeader(registry.FIELDS_CLASSED_RANS, 0, 2, 0, 1, (4,)),
    ):
        with pytest.raises(DamagedError):
            pipeline.decode_chunk(memoryview(bad.write() + bytes(8)), "test")
    with pytest.raises(UnsupportedError):
        unknown = ChunkHeader(77, 0, 2, 0, 1, (4,))
        pipeline.decode_chunk(memoryview(unknown.write() + bytes(8)), "test")
    with pytest.raises(DamagedError):
        pipeline.decode_chunk(memoryview(good.write() + bytes(8)), "test", max_raw=7)


# zstd and types ---------------------------------------------------------------------------------


def test_zstd_is_bounded() -> None:
    frame = zstd.compress(bytes(1000))
    assert zstd.decompress(frame, 1000, "test") == bytes(1000)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    for bad in (frame[:-1], frame[:3], b"", frame + b"\0", frame + frame, silent):
        with pytest.raises(DamagedError):
            zstd.decompress(bad, 1000, "test")
    with pytest.raises(DamagedError, match="at most 999"):
        zstd.decompress(frame, 999, "test")


@pytest.mark.parametrize("n", [0, 1, 131072, 131073, 262144])
def test_zstd_store(n: int) -> None:
    data = np.random.default_rng(n).integers(0, 256, n, np.uint8).tobytes()
    stored = zstd.store(data)
    assert zstd.decompress(stored, n, "test") == data
    assert n <= len(stored) <= n + 24


def test_types_by_name_and_id() -> None:
    for dtype in ALL_DTYPES:
        assert dtype_from_name(dtype.name) == dtype == dtype_from_ggml(dtype.ggml_id)
        assert dtype.n_channels(dtype.row_bytes(96)) == 96
    assert dtype_from_name("ggml-1") == DTYPES["f16"]
    assert opaque_dtype(99).row_bytes(3) == 3
    for name in ("q9", "ggml-", "ggml-x"):
        with pytest.raises(UnsupportedError):
            dtype_from_name(name)
    with pytest.raises(ValueError):
        DTYPES["q8_0"].row_bytes(33)
    with pytest.raises(ValueError):
        DTYPES["q8_0"].n_channels(35)
