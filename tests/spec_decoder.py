"""The decoder of the specification, and how what it reads is compared with what tscfile reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tscfile import registry
from tscfile.archive import Archive

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "spec"
VALID = SPEC / "vectors" / "valid"


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decoder = load(SPEC / "reference_decoder.py")


def assert_same(path: Path, book: Path | None = None, tier: str | None = None) -> Any:
    """Every snapshot of the archive, by the decoder of the specification and by tscfile."""
    file = decoder.File(path.read_bytes(), book and book.read_bytes(), tier)
    with Archive(path, book=book) as archive:
        assert len(file.snapshots) == len(archive) > 0
        for number, found in enumerate(file.snapshots):
            record = archive.record(number)
            expected: Any = archive.snapshot(number, tier)
            for key in ("parent", "plan", "tier", "name", "source", "identity", "coding"):
                assert found[key] == getattr(record, key), key
            assert found["structure"] == archive.structure(number)
            assert found["tokens"].tolist() == expected.tokens.tolist()
            assert found["opaque"] == expected.opaque
            for track, reference in zip(found["tracks"], expected.tracks, strict=True):
                _assert_same_track(track, reference, exact=expected.exact)
                if not expected.exact:
                    _assert_same_integers(file, reference)
                else:
                    assert {run.block for run in reference.runs}.isdisjoint(lossy_blocks(file))
    return file


def _assert_same_track(track: dict[str, Any], reference: Any, exact: bool) -> None:
    for key in ("cache", "stream", "attributes"):
        assert track[key] == getattr(reference, key)
    assert [(layer, "kv"[role], *rest) for layer, role, *rest in track["tensors"]] == [
        (t.layer, t.role, t.dtype.ggml_id, t.row_bytes, t.rotation) for t in reference.tensors
    ]
    cells = reference.cells
    for key in ("pos", "seq_counts", "seq_ids"):
        assert np.array_equal(track[key], getattr(cells, key))
    assert np.array_equal(np.reshape(track["columns"], (-1, len(cells))), cells.ext.T)
    assert [cells.pos[cell] for cell in track["absent"]] == reference.absent_positions().tolist()
    if track["absent"]:
        return
    rows = reference.read(0, len(cells))
    assert len(rows) == len(track["rows"]) > 0
    if not exact:
        types = [tensor.dtype.name for tensor in reference.tensors]
        assert_near(track["rows"], rows, types)
        return
    for mine, theirs in zip(track["rows"], rows, strict=True):
        assert mine.tobytes() == theirs.tobytes()


def assert_near(mine: Any, theirs: Any, types: list[str]) -> None:
    """Within the tolerance of book-transform.md: 2^-15 of the frame's largest and one place."""
    a, b = (
        np.concatenate([_values(*pair) for pair in zip(rows, types, strict=True)], axis=1)
        for rows in (mine, theirs)
    )
    largest = np.abs(a).max(axis=1, keepdims=True)
    bits = 8 if types[0] == "bf16" else 11
    place = 2.0 ** (np.frexp(np.maximum(np.abs(a), np.abs(b)))[1] - bits)
    assert (np.abs(a - b) <= largest * 2.0**-15 + place).all()
    # What the page says was measured.
    assert (np.abs(a - b) <= largest * 2.0**-20 + place).all()
    assert (a != b).sum() <= 2 + 0.005 * a.size


def _values(rows: np.ndarray, type_: str) -> np.ndarray:
    rows = np.ascontiguousarray(rows)
    if type_ == "bf16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(float)
    return rows.view({"f16": "<f2", "f32": "<f4"}[type_]).astype(float)


def _assert_same_integers(file: Any, reference: Any) -> None:
    for run in reference.runs:
        number, chunks = run.block, reference.chunks(run)
        if not chunks or chunks[0].codec not in registry.LOSSY:
            continue
        (chunk,) = chunks
        where, payloads = reference.lossy_payloads(number, chunk)
        held = file.decoded[number, chunk.quality_layer]
        if chunk.codec == registry.SESSION_TRANSFORM:
            codec = reference.session_codec(payloads[0], where)
            integers, shifts, _ = codec.integers(payloads[0], where)
            assert np.array_equal(integers, held["integers"])
            assert np.array_equal(shifts, held["shifts"])
        elif chunk.codec == registry.PRODUCT:
            stored = reference.product_codec(payloads[0], where).read(payloads[0], where)
            frames = [bytes(frame) for frame in held["frames"]]
            assert [len(frame) for frame in frames] == stored.sizes.tolist()
            assert b"".join(frames) == stored.data.tobytes()
        else:
            _assert_same_segments(held, reference.codec(), payloads, where)


def _assert_same_segments(held: Any, codec: Any, payloads: Any, where: str) -> None:
    log_steps, integers = held["log_steps"], held["integers"]
    stop = 0
    for segment in codec.read(payloads, where):
        assert segment.start == stop
        stop = segment.stop
        whole = np.zeros((stop - segment.start, codec.book.n_coefficients), np.int32)
        whole[:, codec.book.columns(segment.counts)] = segment.values
        assert np.array_equal(whole, integers[segment.start : stop])
        assert (2.0 ** (log_steps[segment.start : stop] / 256) == segment.step).all()
    assert stop == len(integers) == len(log_steps)


def lossy_blocks(file: Any) -> set[int]:
    return {number for (number, _), held in file.decoded.items() if "rows" not in held}


def snapshot_refs(file: Any) -> list[tuple[int, int]]:
    refs: list[tuple[int, int]] = file._read_chain(file._find_trailer()[0])[1]
    return refs


def token_coding(payload: bytes) -> int:
    cursor = decoder.Cursor(payload)
    for _ in range(5):
        cursor.uvarint()
    return int(cursor.u8())
