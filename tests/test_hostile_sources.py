"""Caches and models of strangers: an error of one line or a snapshot, whatever bytes claim."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import bounded_memory, rows_of, some_cache

import tscfile
from tscfile.conversion import convert
from tscfile.errors import DamagedError, TscError, UnsupportedError
from tscfile.identity import identity_from_gguf
from tscfile.sources import open_source, write_carrier
from tscfile.sources.hf_layout import as_llama_state
from tscfile.sources.llama_state import state_size, write_state

SESSION = Path(__file__).parents[1] / "samples" / "session.kv"
CARRIERS = ("gguf", "safetensors", "npz")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# --- cut and flipped ----------------------------------------------------------------------------


def attempt(path: Path) -> bool:
    """Open, read everything and make a state; whether that went well. Only `TscError` may not."""
    try:
        snapshot = open_source(path)
        rows_of(snapshot)
        snapshot = as_llama_state(snapshot)
        write_state(snapshot, bytearray(state_size(snapshot)))
    except TscError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return False
    return True


@pytest.fixture(params=CARRIERS)
def carrier_bytes(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    path = tmp_path / "whole"
    write_carrier(some_cache(n=9, window=4), path, request.param)
    return path.read_bytes()


def interesting(data: bytes) -> range:
    """Every byte of a small file's structure is reached; not every one of its numbers."""
    return range(0, len(data), max(1, len(data) // 800))


def test_cut_files_are_refused(carrier_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    cuts = [*interesting(carrier_bytes), *range(len(carrier_bytes) - 40, len(carrier_bytes))]
    for length in cuts:
        path.write_bytes(carrier_bytes[:length])
        whole = attempt(path)
        # The last tensor of a GGUF file is padded.
        assert not whole or carrier_bytes[length:].count(0) == len(carrier_bytes) - length


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_flipped_bytes_are_refused_or_harmless(
    carrier_bytes: bytes, mask: int, tmp_path: Path
) -> None:
    path = tmp_path / "flipped"
    for at in interesting(carrier_bytes):
        data = bytearray(carrier_bytes)
        data[at] ^= mask
        path.write_bytes(data)
        attempt(path)


def test_flipped_bytes_of_a_carried_state(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.gguf", tmp_path / "flipped"
    convert(SESSION, whole)
    data = whole.read_bytes()
    header = gguf.GGUFReader(whole).tensors[0].data_offset
    for at in range(0, header, 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
        attempt(path)


@pytest.mark.parametrize(
    "facts",
    [
        {"kind": "ring"}, {"layers": [0, 9]}, {"layers": [2, 0]}, {"layers": [0, 3]},
        {"layers": "0,2"}, {"n_kv_heads": [2, 0]}, {"n_kv_heads": [2, 5]}, {"n_kv_heads": [2]},
        {"kind": "sliding"}, {"kind": "sliding", "window": -3}, {"layers": []},
    ],
)  # fmt: skip
def test_facts_of_an_archive_are_checked(facts: dict[str, Any], tmp_path: Path) -> None:
    snapshot = some_cache()
    snapshot.tracks[0].attributes.update(facts)
    tscfile.pack(snapshot, tmp_path / "a.tsc")
    for name in ("a.safetensors", "a.npz", "a.kv"):
        with tscfile.open(tmp_path / "a.tsc") as archive, pytest.raises(TscError, match="damaged"):
            convert(archive.snapshot(), tmp_path / name)
    with pytest.raises(TscError, match="damaged"):
        tscfile.to_cache(tmp_path / "a.tsc")


# --- forged headers -----------------------------------------------------------------------------


def safetensors_file(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[Any], first: int, last: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


K = entry("F16", [1, 1, 2], 4, 8)
V = entry("F16", [1, 1, 2], 8, 12)
TOKENS = entry("I32", [1], 0, 4)
PLAIN = {"tokens": TOKENS, "layers.0.k": K, "layers.0.v": V}


def described(**changes: Any) -> dict[str, Any]:
    facts = {"format": "tscfile-kv", "version": "1", "n_seen": "1", "kinds": '["full"]',
             "windows": "[0]", "identity": "{}"}  # fmt: skip
    return {"__metadata__": {**facts, **changes}, **PLAIN}


@pytest.mark.parametrize(
    "entries",
    [
        b"{" * 100_000,
        b"[" * 2000 + b"]" * 2000,
        b'{"a":1,"a":2}',
        b'{"\xff": 1}',
        {"tokens": TOKENS},
        {**PLAIN, "layers.0.k": entry("F16", [1 << 40, 1, 2], 4, 8)},
        {**PLAIN, "layers.0.k": entry("F16", [1, 1, 2], 4, 1 << 60)},
        {**PLAIN, "layers.0.k": entry("F16", [-1, -1, 2], 4, 8)},
        {**PLAIN, "layers.0.k": entry("F16", [True, 1, 2], 4, 8)},
        {**PLAIN, "layers.0.k": entry("F16", [1, 1, "2"], 4, 8)},
        {**PLAIN, "layers.0.k": entry("F8_E4M3", [1, 1, 4], 4, 8)},
        {**PLAIN, "layers.0.k": entry("F16", [1, 1, 2], 0, 4)},
        {**PLAIN, "layers.0.k": [1, 2]},
        {**PLAIN, "layers.0.k": entry("F16", [2, 0, 2], 4, 4)},
        {**PLAIN, "layers.00.k": K},
        {**PLAIN, "weights": K},
        {"tokens": TOKENS, "layers.5000.k": K, "layers.5000.v": V},
        {"tokens": TOKENS, "layers.9.k": K, "layers.9.v": V},
        {"__metadata__": {"format": 1}, **PLAIN},
        described(version="2"),
        described(n_seen="-1"),
        described(n_seen="9" * 30),
        described(n_seen="5"),
        described(kinds='["full", "full"]', windows="[0, 0]"),
        described(kinds='["sliding"]', windows="[1]"),
        described(kinds='["ring"]'),
        described(kinds="7"),
        described(windows="[1e9]"),
        described(windows=json.dumps([1 << 80])),
        described(identity='{"n_layers": 1e999}'),
        described(identity='{"n_layers": {"a": 1}}'),
        described(identity='{"n_layers": [1, "2"]}'),
        described(identity=json.dumps({"n_layers": 1 << 70})),
        described(identity="[]"),
    ],
)
def test_hostile_headers_are_refused(entries: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_file(PLAIN, bytes(12)))
    assert len(rows_of(open_source(path))) == 2
    path.write_bytes(safetensors_file(entries, bytes(12)))
    with pytest.raises(TscError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_what_fuzzing_found_in_safetensors(tmp_path: Path) -> None:
    half = json.dumps({"name": "\ud800"})
    for entries in (
        {**PLAIN, "layers.0.k": {**K, "shape": {}}},
        {**PLAIN, "layers.0.k": entry("F16", [0, 1 << 62, 1 << 62], 4, 4)},
        {**PLAIN, "layers.0.k": entry("F16", [0, 1, 2], 4, 4)},
        described(identity=half),
        described(identity='{"architecture": ["llama"]}'),
        described(identity=half.replace("name", "\\udfff").replace("\\ud800", "a")),
    ):
        path = tmp_path / "a.safetensors"
        path.write_bytes(safetensors_file(entries, bytes(12)))
        with pytest.raises(DamagedError):
            open_source(path)


@pytest.mark.parametrize("item", [b"[],", b"{},", b"1.5,", b'"a",', b'{"a":{}},'])
def test_headers_of_many_small_things(item: bytes, tmp_path: Path) -> None:
    path, header = tmp_path / "a.safetensors", b'{"a":[' + item * ((5 << 20) // len(item))
    for size in (len(header), 2 << 20):
        path.write_bytes(safetensors_file(header[:size].rpartition(b",")[0] + b"]}"))
        with bounded_memory(path), pytest.raises(TscError):
            open_source(path)


def npy(shape: str, data: bytes = b"", descr: str = "'<f2'") -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


@pytest.mark.parametrize(
    "member",
    [
        npy("(1, 1, 1099511627776)"),
        npy("(1, 1, 2)", b"abc"),
        npy("(1, 1, -2)", b"abcd"),
        npy("(1, 1)", b"ab"),
        npy("(1, 1, 1)", b"ab", "'|O'"),
        npy("(1, 1, 1)", b"ab", "[('a', '<f2')]"),
        npy("(1, 1, 1)", b"abcdefgh", "'<f8'"),
        npy("(1, 1, 1, ", b"ab"),
        npy("__import__('os')", b"ab"),
        b"\x93NUMPY\x07\x00" + bytes(20),
        b"no array",
        b"",
    ],
)
def test_hostile_members_are_refused(member: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tokens.npy", npy("(1,)", bytes(4), "'<i4'"))
        archive.writestr("layers.0.k.npy", member)
        archive.writestr("layers.0.v.npy", npy("(1, 1, 2)", b"abcd"))
    with pytest.raises(TscError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("layers.0.k.npy", "w") as member:
            member.write(npy("(1, 100000000, 1)"))
            for _ in range(200):
                member.write(bytes(1_000_000))
    with pytest.raises(TscError, match="which no cache does"):
        open_source(path)


OPEN_LIMITED = """
import resource, sys
from tscfile.errors import DamagedError, TruncatedError, TscError, UnsupportedError
from tscfile.identity import identity_from_gguf
from tscfile.sources import open_source
import tscfile.sources.npz_cache
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[2:]:
    try:
        open_source(path)
        print(path, "opened")
    except TscError:
        pass
"""


def test_claims_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    """Counts of billions in a few bytes, in a process that may not grow by much."""
    paths = [tmp_path / name for name in ("a", "b", "c", "d")]
    big = 1 << 33
    paths[0].write_bytes(safetensors_file({**PLAIN, "layers.0.k": entry("F16", [1, big, 2], 4,
                                                                        4 + 4 * big)}))  # fmt: skip
    paths[1].write_bytes(struct.pack("<Q", 1 << 31) + b"{" + bytes(50))
    paths[2].write_bytes(b"GGUF" + struct.pack("<IQQ", 3, big, big) + bytes(100))
    whole = tmp_path / "whole"
    write_carrier(some_cache(), whole, "gguf")
    data = whole.read_bytes()
    count = data.index(b"kvcache.cell_count") + len(b"kvcache.cell_count") + 4 + 4
    paths[3].write_bytes(data[:count] + struct.pack("<Q", big) + data[count + 8 :])
    used = resource.getrusage(resource.RUSAGE_SELF)
    assert used.ru_maxrss > 0
    done = subprocess.run(
        [sys.executable, "-c", OPEN_LIMITED, str(3 << 30), *map(str, paths)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- claims in many small parts ------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_to_compress(method: int, tmp_path: Path) -> None:
    """They have no bound in the standard library: a kilobyte can stand for gigabytes."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("layers.0.k.npy", npy("(1, 1, 50000000)", bytes(100_000_000)))
    # Its entry says that it is small.
    data = path.read_bytes()
    at = data.rindex(b"PK\1\2") + 24
    path.write_bytes(data[:at] + struct.pack("<I", 100) + data[at + 4 :])
    with bounded_memory(path), pytest.raises(UnsupportedError, match="compressed in a way"):
        open_source(path)


def test_what_fuzzing_found_in_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for number in (0xD800, 0x110000, 0xFFFFFFFF):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.npy", npy("()", struct.pack("<I", number), "'<U1'"))
            archive.writestr("tokens.npy", npy("(1,)", bytes(4), "'<i4'"))
        with pytest.raises(DamagedError):
            open_source(path)


def test_a_zip_file_of_many_members(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    entry = b"PK\1\2" + bytes(24) + struct.pack("<HHHHHII", 1, 0, 0, 0, 0, 0, 0) + b"a"
    n = 400_000
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, n * len(entry), 30, 0)
    path.write_bytes(b"PK\3\4" + bytes(26) + entry * n + end)
    with bounded_memory(path), pytest.raises(DamagedError, match="list of members"):
        open_source(path)


def gguf_file(keys: bytes, n_keys: int, tensors: bytes = b"", n_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + keys + tensors


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize("what", ["keys", "numbers", "texts", "tensors"])
def test_gguf_metadata_of_many_small_things(what: str, tmp_path: Path) -> None:
    """Models and caches are read by the same parser."""
    n, path = 1 << 16, tmp_path / "a.gguf"
    numbers = struct.pack("<IIQ", 9, 6, n) + bytes(4 * n)
    wide = struct.pack("<I", 8) + text(b"a" * (1 << 20) + "\U0001f600".encode())
    values = {
        "keys": [b"\0\0\0\0\0"] * 400_000, "numbers": [numbers] * 32, "texts": [wide] * 30,
        "tensors": [],
    }[what]  # fmt: skip
    keys = b"".join(text(b"%06x" % i) + value for i, value in enumerate(values))
    n_tensors = 150_000 if what == "tensors" else 0
    tensor = text(b"") + struct.pack("<IIQ", 0, 0, 0)
    path.write_bytes(gguf_file(keys, len(values), tensor * n_tensors, n_tensors))
    with bounded_memory(path, slack=40 << 20), pytest.raises(DamagedError, match="describes more"):
        identity_from_gguf(path)


def test_gguf_tensors_upon_each_other(tmp_path: Path) -> None:
    """What a few bytes each describe again and again is neither copied nor hashed that often."""
    path = tmp_path / "a.gguf"
    write_carrier(some_cache(), path, "gguf")
    data, size = path.read_bytes(), 1 << 20
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    names = b"kvcache.tokens"
    at = data.index(text(names))
    more = b"".join(
        text(b"kvcache.opaque.%03d" % i) + struct.pack("<IQIQ", 1, size, 24, 0) for i in range(512)
    )
    head = data[:8] + struct.pack("<QQ", n_tensors + 512, n_keys) + data[24:at] + more
    path.write_bytes(head + data[at:] + bytes(size))
    with bounded_memory(path), pytest.raises(DamagedError, match="more than a file of its size"):
        open_source(path)
    keys = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    tensors = b"".join(
        text(b"%d" % i) + struct.pack("<IQIQ", 1, 8 << 20, 24, 0) for i in range(10_000)
    )
    path.write_bytes(gguf_file(keys, 1, tensors, 10_000) + bytes((8 << 20) + 32))
    before = time.process_time()
    with pytest.raises(DamagedError, match="overlap"):
        identity_from_gguf(path)
    assert time.process_time() - before < 5


def test_gguf_names_do_not_break_the_line(tmp_path: Path) -> None:
    path, value = tmp_path / "a.gguf", struct.pack("<II", 4, 1)
    for keys, n in (
        (2 * (text(b"a\nb") + value), 2),
        (text(b"general.type") + struct.pack("<I", 8) + text(b"x\ny"), 1),
        (text(b"general.architecture") + struct.pack("<I", 8) + text(b"a\nb")
         + text(b"a\nb.block_count") + struct.pack("<If", 6, 0.5), 2),
    ):  # fmt: skip
        path.write_bytes(gguf_file(keys, n))
        for read in (open_source, identity_from_gguf):
            with pytest.raises(TscError) as caught:
                read(path)
            assert "\n" not in str(caught.value)


def test_many_small_layers_that_differ(tmp_path: Path) -> None:
    """Each is a track of its own, with cells that are larger than its rows."""
    path, n, n_layers = tmp_path / "a.safetensors", 20_000, 300
    entries: dict[str, Any] = {"tokens": entry("I32", [n], 0, 4 * n)}
    at = 4 * n
    for layer in range(n_layers):
        for role in "kv":
            entries[f"layers.{layer}.{role}"] = entry("F16", [1, n, 1], at, at + 2 * n)
            at += 2 * n
    entries["__metadata__"] = {
        "format": "tscfile-kv", "version": "1", "n_seen": str(n), "identity": "{}",
        "kinds": json.dumps(["sliding"] * n_layers),
        "windows": json.dumps([n + 1 + layer for layer in range(n_layers)]),
    }  # fmt: skip
    path.write_bytes(safetensors_file(entries, bytes(at)))
    with bounded_memory(path, slack=4 << 20):
        assert len(open_source(path).tracks) == n_layers


# --- states --------------------------------------------------------------------------------------


def test_what_fuzzing_found_in_states(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    # Rows without end in a cache without cells, whose size no file bounds.
    layer = struct.pack("<iQ", 1, 0xF7 << 56)
    path.write_bytes(b"qsgg" + struct.pack("<5I", 2, 0, 0, 0, 1) + layer * 2)
    assert open_source(path).source["kind"] == "recurrent"
    cells = struct.pack("<3I", 1, 5, 0)
    full = struct.pack("<II", 0, 1) + struct.pack("<iQ", 1, 2) + b"ab"
    path.write_bytes(b"qsgg" + struct.pack("<II", 2, 0) + cells + full + layer)
    with pytest.raises(DamagedError):
        open_source(path)
    # A state without layers has rotation sizes all the same.
    rotated = b"\5\0\0\0other" + struct.pack("<10I", 1, 1, 2, 1, 1, 0, 0, 1, 1, 0)[:-4]
    path.write_bytes(rotated)
    snapshot = open_source(path)
    assert snapshot.tracks[0].attributes == {"v_trans": 0, "n_rot_k": 1, "n_rot_v": 1}
    out = bytearray(state_size(snapshot))
    write_state(snapshot, out)
    assert out == rotated


@pytest.mark.parametrize("most", [0, 1, 2, 256])
def test_cells_take_no_more_memory_than_twice_the_file(most: int, tmp_path: Path) -> None:
    """A file of nothing but cells, of the same number of sequences each or of any."""
    path, rng = tmp_path / "a.kv", np.random.default_rng(0)
    n = 4_000_000 // (12 + 2 * most)
    for counts in (np.full(n, max(most, 1)), rng.integers(1, max(most, 1) + 1, n)):
        words = np.zeros(2 * n + counts.sum(), "<i4")
        words[np.cumsum(counts + 2) - counts - 1] = counts
        head = b"nsgg" + struct.pack("<II", 11, 0) + b"\5\0\0\0llama" + struct.pack("<II", 1, n)
        path.write_bytes(head + words.tobytes() + struct.pack("<IIII", 0, 0, 0, 0))
        with bounded_memory(path, slack=1 << 18):
            assert len(open_source(path).tracks[0].cells) == n
