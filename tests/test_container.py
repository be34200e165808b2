"""The container: what a crash, another version or an unknown record does to a file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import make_snapshot, same_state, state_bytes
from tscfile_cli.main import main

import tscfile
from tscfile.container.reader import Container
from tscfile.container.records import (
    ALIGNED_FROM,
    CHUNK,
    CRITICAL,
    INDEX,
    PAYLOAD_ALIGNMENT,
    RECORD_ALIGNMENT,
    ExtraEntry,
    Header,
    RecordHeader,
    RecordRef,
    Trailer,
    checksum,
)
from tscfile.container.writer import ContainerWriter
from tscfile.errors import DamagedError, TruncatedError, UnsupportedError, UsageError

TINY = {"n_layers": 1, "n_channels": 8}


def tiny(n_frames: int, **options: object):  # type: ignore[no-untyped-def]
    return make_snapshot(n_frames, **(TINY | options))  # type: ignore[arg-type]


# Crashes ----------------------------------------------------------------------------------------


def cut_lengths(old: int, new: int) -> list[int]:
    """Every length near both ends, where the structure is, and some of those between."""
    middle = np.linspace(old, new, 60).astype(int).tolist()
    near = [*range(old, min(old + 40, new)), *range(max(new - 140, old), new)]
    return sorted({*near, *middle} - {new})


def test_crash_at_any_byte_of_an_append(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = tiny(30), tiny(50)
    path, torn, out = tmp_path / "a.tsc", tmp_path / "torn.tsc", tmp_path / "out.kv"
    old_size = tscfile.pack(first, path).file_bytes
    new_size = tscfile.append(second, path).file_bytes
    whole = path.read_bytes()
    assert len(whole) == new_size
    for length in cut_lengths(old_size, new_size):
        torn.write_bytes(whole[:length])
        with tscfile.open(torn) as archive:
            assert (len(archive), archive.torn_bytes) == (1, length - old_size)
            assert same_state(archive.snapshot(0), first)
        report = tscfile.verify(torn)
        assert bool(report.problems) == (length > old_size)
        capfd.readouterr()
        if length > old_size:
            assert main(["unpack", str(torn), "-o", str(out)]) == 3
            message = capfd.readouterr().err
            assert message.count("\n") == 1 and "--snapshot 0" in message
            assert not out.exists()
        assert main(["unpack", str(torn), "-o", str(out), "-q", "-f", "--snapshot", "0"]) == 0
        assert out.read_bytes() == state_bytes(first)
        out.unlink()
        # A new append repairs the file.
        tscfile.append(second, torn)
        assert torn.read_bytes() == whole


def test_bytes_behind_the_last_commit_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    size = tscfile.pack(tiny(10), path).file_bytes
    with path.open("ab") as file:
        # More than the reader looks at in one go.
        file.write(os.urandom((1 << 20) + 12345))
    with tscfile.open(path) as archive:
        assert archive.container.whole_end == size and archive.torn_bytes == (1 << 20) + 12345
    tscfile.append(tiny(12), path)
    assert path.stat().st_size < size + 4000
    assert not tscfile.verify(path).problems


@pytest.mark.parametrize("shift", [0, 1, 7, 8, 24, 31, 32, 40])
def test_trailer_at_the_edge_of_a_search_window(tmp_path: Path, shift: int) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(tiny(10), path)
    with path.open("ab") as file:
        file.write(bytes((1 << 20) - 32 + shift))
    with tscfile.open(path) as archive:
        assert len(archive) == 1


def test_an_archive_within_an_archive_is_not_taken_for_it(tmp_path: Path) -> None:
    inner, path = tmp_path / "inner.tsc", tmp_path / "a.tsc"
    tscfile.pack(tiny(10), inner)
    with path.open("wb") as file:
        writer = ContainerWriter(file.fileno())
        writer.add_opaque(inner.read_bytes())
        writer.commit()
    whole = path.read_bytes()
    assert inner.read_bytes() in whole
    # The outer end is lost: there is no whole commit, though there is a trailer.
    path.write_bytes(whole[:-1])
    with pytest.raises(TruncatedError):
        tscfile.open(path)


# Growth -----------------------------------------------------------------------------------------


def test_hundred_appends(tmp_path: Path) -> None:
    """An append writes its own frames and a constant, however long the file; indices are few."""
    path = tmp_path / "a.tsc"
    tscfile.pack(tiny(16), path)
    added, chunk_bytes = [], []
    for turn in range(1, 101):
        report = tscfile.append(tiny(16 + 8 * turn), path)
        assert (report.plan, report.n_frames_new) == ("append", 8)
        added.append(report.bytes_added)
        with tscfile.open(path) as archive:
            assert len(archive.container.segments) <= 8
            chunks = archive.container.blocks[-1].chunks
            chunk_bytes.append(sum(chunk.ref.length for chunk in chunks))
    overhead = np.array(added) - chunk_bytes
    # Merging indices writes old entries again now and then; on average it must not show.
    assert overhead.mean() < 2048
    assert overhead[:50].mean() * 2 > overhead[50:].mean()
    with tscfile.open(path) as archive:
        assert len(archive) == 101
        assert same_state(archive.snapshot(37), tiny(16 + 8 * 37))
        assert sum(s.n_snapshots for s in archive.container.segments) == 101
    assert not tscfile.verify(path).problems


@pytest.mark.parametrize("old_frames", [64, 512, 2048])
def test_append_costs_the_new_frames_only(tmp_path: Path, old_frames: int) -> None:
    path = tmp_path / "a.tsc"
    shape = {"n_layers": 2, "n_channels": 64}
    tscfile.pack(make_snapshot(old_frames, **shape), path)
    report = tscfile.append(make_snapshot(old_frames + 40, **shape), path)
    with tscfile.open(path) as archive:
        coded = sum(chunk.ref.length for chunk in archive.container.blocks[-1].chunks)
    assert coded < 40 * 4 * 128 + 256
    assert report.bytes_added < coded + 2048


# Layout -----------------------------------------------------------------------------------------


def test_records_are_where_they_should_be(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(300, n_channels=64), path)
    tscfile.append(make_snapshot(310, n_channels=64), path)
    data = path.read_bytes()
    with Container(path) as container:
        refs = [chunk.ref for block in container.blocks for chunk in block.chunks]
        refs += container.snapshots
        refs += [segment.ref for segment in container.segments]
        for ref in refs:
            header = RecordHeader.read(data[ref.offset : ref.offset + ref.length], "test")
            start = ref.offset + RecordHeader.SIZE + header.padding
            assert ref.offset % RECORD_ALIGNMENT == 0
            assert header.flags == CRITICAL
            if header.length >= ALIGNED_FROM:
                assert start % PAYLOAD_ALIGNMENT == 0
            payload = data[start : start + header.length]
            assert checksum(payload) == header.payload_checksum
        assert any(ref.length > ALIGNED_FROM for ref in refs)
    assert data.startswith(Header.MAGIC) and data.endswith(Trailer.MAGIC)


def test_constants_fit_their_fields() -> None:
    """Packing fails where a constant does not fit, and reading gives the same back."""
    header = Header(65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF)
    assert len(header.write()) == Header.SIZE
    with pytest.raises(UnsupportedError):
        Header.read(header.write(), "test")
    record = RecordHeader(255, 255, 65535, (1 << 64) - 1, (1 << 64) - 1)
    assert RecordHeader.read(record.write(), "test") == record
    assert len(record.write()) == RecordHeader.SIZE
    trailer = Trailer((1 << 64) - 1, (1 << 64) - 1)
    assert Trailer.read(trailer.write(96), 96) == trailer
    assert Trailer.read(trailer.write(96), 104) is None
    for offset in range(200):
        padding = RecordHeader.padding_at(offset, ALIGNED_FROM)
        assert (offset + RecordHeader.SIZE + padding) % PAYLOAD_ALIGNMENT == 0 and padding < 64
        assert RecordHeader.padding_at(offset, ALIGNED_FROM - 1) == 0


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(tiny(20), path)
    with Container(path) as container:
        [chunk] = container.blocks[0].chunks
        size, good = container.size, chunk.ref
        assert container.read(good, CHUNK, chunk.payload_checksum)
        for ref, type_, payload_checksum in [
            (good, INDEX, None),
            (good, CHUNK, chunk.payload_checksum ^ 1),
            (RecordRef(good.offset, good.length + 1), CHUNK, None),
            (RecordRef(good.offset, good.length - 1), CHUNK, None),
            (RecordRef(good.offset + 8, good.length), CHUNK, None),
            (RecordRef(good.offset, 23), CHUNK, None),
            (RecordRef(size - 24, 25), CHUNK, None),
            (RecordRef(1 << 63, 1 << 63), CHUNK, None),
        ]:
            with pytest.raises(DamagedError):
                container.read(ref, type_, payload_checksum)


# Versions and unknown records -------------------------------------------------------------------


def with_header(path: Path, **fields: int) -> None:
    with path.open("r+b") as file:
        file.write(Header(**fields).write())


def test_versions_and_features(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.tsc"
    state = tiny(20)
    tscfile.pack(state, path)
    for newer in ({"minor": 7}, {"optional_features": 1 << 31}):
        with_header(path, **newer)
        with tscfile.open(path) as archive:
            assert same_state(archive.snapshot(), state)
        assert main(["verify", str(path), "-q"]) == 0
    for foreign in ({"major": 2}, {"major": 0}, {"required_features": 4}):
        with_header(path, **foreign)
        with pytest.raises(UnsupportedError):
            tscfile.open(path)
        capfd.readouterr()
        for command in ("info", "verify", "unpack"):
            assert main([command, str(path)]) == 5
            assert capfd.readouterr().err.count("\n") == 1
    with path.open("r+b") as file:
        # A version that is not protected by its checksum is damage and not a newer version.
        file.seek(8)
        file.write(b"\x02")
    with pytest.raises(DamagedError):
        tscfile.open(path)


def add_extra(path: Path, flags: int) -> ExtraEntry:
    """Commit a record of a kind that is not known to the file, as a later version may."""
    with Container(path) as container, path.open("r+b") as file:
        writer = ContainerWriter(file.fileno(), container)
        ref = writer._add_record(200, b"from the future" * 20)
        extra = ExtraEntry(200, flags, ref)
        writer._segments[-1] = type(writer._segments[-1])(
            writer._segments[-1].ref, 0, 0, (extra,)
        )
        # Counted as empty, so that the commit takes the segment and its extra in.
        container_blocks, container_snapshots = writer._old_blocks, writer._old_snapshots
        writer._old_blocks, writer._old_snapshots = (), ()
        writer._blocks, writer._snapshots = list(container_blocks), list(container_snapshots)
        writer.commit()
    return extra


def extras_of(path: Path) -> list[ExtraEntry]:
    with Container(path) as container:
        return [extra for segment in container.segments for extra in segment.extras]


def test_unknown_record_that_may_be_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    state = tiny(20)
    tscfile.pack(state, path)
    extra = add_extra(path, flags=0)
    assert extras_of(path) == [extra]
    with tscfile.open(path) as archive:
        assert same_state(archive.snapshot(), state)
    assert not tscfile.verify(path).problems
    for turn in range(1, 6):
        # Indices are merged on the way; the extra is carried on.
        tscfile.append(tiny(20 + turn), path)
        assert extras_of(path) == [extra]
    with Container(path) as container:
        data = path.read_bytes()[extra.ref.offset : extra.ref.offset + extra.ref.length]
        assert data.endswith(b"from the future") and len(container.segments) <= 3
    assert not tscfile.verify(path).problems


def test_unknown_record_that_must_be_understood(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tsc"
    tscfile.pack(tiny(20), path)
    add_extra(path, flags=CRITICAL)
    data = path.read_bytes()
    with pytest.raises(UnsupportedError, match="record type 200"):
        tscfile.open(path)
    with pytest.raises(UnsupportedError):
        tscfile.append(tiny(21), path)
    for command in ("info", "verify", "unpack"):
        assert main([command, str(path)]) == 5
        assert capfd.readouterr().err.count("\n") == 1
    assert path.read_bytes() == data


# What is no archive -----------------------------------------------------------------------------


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.tsc"
    for content in (b"", b"x", b"\x89TSC", b"GGUF" * 20, Header.MAGIC[::-1] * 8):
        path.write_bytes(content)
        with pytest.raises(DamagedError):
            tscfile.open(path)
    # Text-mode transfer.
    tscfile.pack(tiny(5), path, force=True)
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))
    with pytest.raises(DamagedError, match="magic"):
        tscfile.open(path)
    with pytest.raises(UsageError, match="regular file"):
        tscfile.open(tmp_path)
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    with pytest.raises(UsageError, match="regular file"):
        tscfile.open(fifo)
    with pytest.raises(FileNotFoundError):
        tscfile.open(tmp_path / "none.tsc")
