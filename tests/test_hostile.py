"""Every foreign byte is suspect: cut, flipped and forged files give an error or the truth."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import bounded_memory, make_snapshot, same_state, write_kv
from mending import ids_of, packed, structure_of
from tscfile_cli.main import main

import tscfile
from tscfile import registry
from tscfile.bytestream import ByteWriter
from tscfile.container.metadata import write_metadata
from tscfile.container.reader import Container
from tscfile.container.records import (
    CHUNK,
    ID_BYTES,
    INDEX,
    OPAQUE,
    SNAPSHOT,
    BlockEntry,
    ChunkEntry,
    ChunkHeader,
    ExtraEntry,
    FrameRun,
    Header,
    Index,
    RecordRef,
    Trailer,
    checksum,
)
from tscfile.container.snapshots import OpaqueEntry, SnapshotRecord
from tscfile.container.writer import ContainerWriter
from tscfile.description import describe
from tscfile.entropy import zstd
from tscfile.errors import DamagedError, TscError, UnsupportedError, UsageError
from tscfile.model import Snapshot, TensorSpec

TINY = {"n_layers": 1, "n_channels": 8, "opaque": {"appendix": b"checkpoint" * 4}}
SAVES = (make_snapshot(6, **TINY), make_snapshot(9, **TINY))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two snapshots in two commits."""
    path = tmp_path_factory.mktemp("small") / "small.tsc"
    tscfile.pack(SAVES[0], path)
    tscfile.append(SAVES[1], path)
    assert path.stat().st_size < 4096
    return path


def check_damaged(path: Path) -> tuple[bool, int]:
    """Read all there is: damaged, or what was packed. Returns whether `verify` finds something and
    how many snapshots were read."""
    n_right = 0
    try:
        with tscfile.open(path) as archive:
            for number in range(len(archive)):
                try:
                    assert same_state(archive.snapshot(number), SAVES[number])
                    n_right += 1
                except DamagedError:
                    pass
        return bool(tscfile.verify(path).problems), n_right
    except DamagedError:
        return True, n_right


# Cut and flipped --------------------------------------------------------------------------------


def test_cut_at_every_length(small: Path, tmp_path: Path) -> None:
    whole, path = small.read_bytes(), tmp_path / "cut.tsc"
    with Container(small) as container:
        assert len(container.segments) == 1
    first_commit = whole.index(Trailer.MAGIC) + len(Trailer.MAGIC)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        noticed, n_right = check_damaged(path)
        assert noticed == (length != first_commit)
        assert n_right == (length >= first_commit)


def flips(small: Path) -> Iterator[tuple[int, int]]:
    """One bit in every byte; in header, indices and trailers all of them."""
    whole = small.read_bytes()
    dense = {*range(Header.SIZE), *range(len(whole) - Trailer.SIZE, len(whole))}
    with Container(small) as container:
        for ref in [container.segments[-1].ref, *container.snapshots]:
            dense |= set(range(ref.offset, min(ref.offset + 40, ref.offset + ref.length)))
    rng = np.random.default_rng(0)
    for at in range(len(whole)):
        for bit in range(8) if at in dense else [int(rng.integers(8))]:
            yield at, bit


def test_every_flipped_bit_is_noticed(small: Path, tmp_path: Path) -> None:
    whole, path = small.read_bytes(), tmp_path / "flipped.tsc"
    for at, bit in flips(small):
        data = bytearray(whole)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        noticed, _ = check_damaged(path)
        assert noticed, f"bit {bit} of byte {at}"


def test_damaged_archives_on_the_command_line(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, path, out = small.read_bytes(), tmp_path / "bad.tsc", tmp_path / "out.kv"
    good = tmp_path / "good.kv"
    assert main(["unpack", str(small), "-o", str(good), "-q"]) == 0
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(whole), 60).tolist():
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        capfd.readouterr()
        assert main(["verify", str(path)]) == 3
        said = capfd.readouterr().err.splitlines()
        assert all(line.startswith(("tsc: ", "whole as they are: ")) for line in said)
        code = main(["unpack", str(path), "-o", str(out), "-q"])
        assert code in (0, 3) and out.exists() == (code == 0)
        if code == 0:
            assert out.read_bytes() == good.read_bytes()
            out.unlink()
        else:
            assert capfd.readouterr().err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["bad.tsc", "good.kv"]


@pytest.mark.parametrize("container", ["session", "sequence"])
@pytest.mark.parametrize("v_trans", [0, 1])
def test_source_cut_at_every_length(
    container: str, v_trans: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"n_layers": 1, "n_channels": 8, "container": container, "v_trans": v_trans}
    whole = write_kv(tmp_path / "a.kv", 6, **options).read_bytes()
    cut, out = tmp_path / "cut.kv", tmp_path / "cut.tsc"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        code = main(["pack", str(cut)])
        message = capfd.readouterr().err
        assert code in (0, 3) and message.count("\n") == 1, length
        assert out.exists() == (code == 0)
        if code == 0:
            # Cut where another state is whole, which then comes back.
            assert main(["unpack", str(out), "-o", str(tmp_path / "b.kv"), "-q"]) == 0
            assert (tmp_path / "b.kv").read_bytes() == whole[:length]
            out.unlink()
            (tmp_path / "b.kv").unlink()
    assert sorted(os.listdir(tmp_path)) == ["a.kv", "cut.kv"]


# Forged: every checksum is right ----------------------------------------------------------------


@dataclass
class Forgery:
    """The parts of an archive, to be changed before it is put together with right checksums.

    ``chunks``: payloads of the chunks of each block. ``edit_index`` gets the index as it should
    be; what it returns is stored.
    """

    blocks: list[BlockEntry]
    chunks: list[list[bytes]]
    snapshots: list[bytes]
    opaque: bytes
    opaque_ref: RecordRef
    edit_index: Callable[[Index], Index | bytes] = field(default=lambda index: index)

    @classmethod
    def of(cls, path: Path) -> Forgery:
        with Container(path) as container:
            chunks = [
                [bytes(container.read(c.ref, CHUNK)) for c in b.chunks] for b in container.blocks
            ]
            snapshots = [bytes(container.read(ref, SNAPSHOT)) for ref in container.snapshots]
        with tscfile.open(path) as archive:
            [entry] = archive.record(0).opaque
            opaque = bytes(archive.container.read(entry.ref, OPAQUE))
        return cls(container.blocks, chunks, snapshots, opaque, entry.ref)

    def write(self, path: Path) -> Path:
        with path.open("w+b") as file:
            writer = ContainerWriter(file.fileno())
            # First, so that snapshots that name it need not change with what comes before it.
            assert writer._add_record(OPAQUE, self.opaque).offset == Header.SIZE
            blocks = [self._write_block(writer, *b) for b in zip(self.blocks, self.chunks)]  # noqa: B905
            snapshots = [writer._add_record(SNAPSHOT, payload) for payload in self.snapshots]
            index = self.edit_index(Index(RecordRef(0, 0), 0, blocks, 0, snapshots))
            ref = writer._add_record(INDEX, index if isinstance(index, bytes) else index.write())
            writer._write(Trailer(ref.offset, ref.length).write(writer._offset))
        return path

    def _write_block(
        self, writer: ContainerWriter, block: BlockEntry, payloads: list[bytes]
    ) -> BlockEntry:
        chunks = tuple(
            replace(
                chunk, ref=writer._add_record(CHUNK, payload), payload_checksum=checksum(payload)
            )
            for chunk, payload in zip(block.chunks, payloads, strict=True)
        )
        return replace(block, chunks=chunks)


@pytest.fixture
def forgery(tmp_path: Path) -> Forgery:
    """One snapshot whose opaque part is the first record."""
    path = tmp_path / "good.tsc"
    tscfile.pack(SAVES[0], path)
    forgery = Forgery.of(path)
    # Its reference is written anew, as records are in another order here.
    record = read_record(path)
    [entry] = record.opaque
    moved = RecordRef(Header.SIZE, entry.ref.length)
    forgery.snapshots = [with_changes(record, opaque=[replace(entry, ref=moved)])]
    with tscfile.open(forgery.write(tmp_path / "same.tsc")) as archive:
        assert same_state(archive.snapshot(), SAVES[0])
    assert not tscfile.verify(tmp_path / "same.tsc").problems
    return forgery


def read_record(path: Path) -> SnapshotRecord:
    with tscfile.open(path) as archive:
        return archive.record(0)


def with_changes(record: SnapshotRecord, **changes: Any) -> bytes:
    """The record's payload, with ``changes`` of it and of its head; cells of these tests do not
    refer to tokens."""
    names = {each.name for each in fields(record.head)}
    head = replace(record.head, **{key: changes.pop(key) for key in names & changes.keys()})
    record = replace(record, head=head, **changes)
    return record.write(record.structure(np.zeros(0, np.int32)), b"")


def read_all(path: Path) -> None:
    with tscfile.open(path) as archive:
        for number in range(len(archive)):
            snapshot = archive.snapshot(number)
            for track in snapshot.tracks:
                track.read(0, len(track.cells))


def outcome(path: Path) -> TscError | None:
    """The error of reading and verifying everything; memory stays within bounds."""
    with bounded_memory(path):
        try:
            read_all(path)
            problems = tscfile.verify(path).problems
            return DamagedError(problems[0]) if problems else None
        except TscError as error:
            return error


def mutations(data: bytes, n_bits: int, seed: int = 0) -> Iterator[bytes]:
    """Bits flipped, bytes set to extremes, and large numbers in place of every byte."""
    rng = np.random.default_rng(seed)
    huge = [b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x0f", b"\xff\xff\x03"]
    for at in range(len(data)):
        for bit in rng.choice(8, n_bits, replace=False):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        for byte in (b"\0", b"\x7f", b"\xff", huge[at % len(huge)]):
            yield data[:at] + byte + data[at + 1 :]
        yield data[:at]


def test_forged_index(forgery: Forgery, tmp_path: Path) -> None:
    indices: list[bytes] = []

    def keep(index: Index) -> Index:
        indices.append(index.write())
        return index

    forgery.edit_index = keep
    forgery.write(tmp_path / "a.tsc")
    errors: list[TscError | None] = []
    for payload in mutations(indices[0], n_bits=3):
        forgery.edit_index = lambda index, payload=payload: payload  # type: ignore[misc]
        errors.append(outcome(forgery.write(tmp_path / "a.tsc")))
    # Only the logical id can be anything: three bits and four bytes in each place.
    assert sum(error is None for error in errors) <= 7 * ID_BYTES < len(errors) / 4


def test_forged_snapshot(forgery: Forgery, tmp_path: Path) -> None:
    """Most of it may be another truth; then it can also be unpacked or is refused."""
    path, out = tmp_path / "a.tsc", tmp_path / "out.kv"
    codes = set()
    payload = forgery.snapshots[0]
    structure = structure_of(payload)
    forged = [ids_of(payload) + packed(each) for each in mutations(structure, n_bits=2)]
    for changed in [*forged, *mutations(payload, n_bits=1)]:
        forgery.snapshots = [changed]
        error = outcome(forgery.write(path))
        code = main(["unpack", str(path), "-o", str(out), "-q", "-f"])
        assert code in (0, 1, 2, 3, 4, 5) and (code or error is None)
        codes.add(code)
    assert {0, 3} <= codes


def test_forged_chunk(forgery: Forgery, tmp_path: Path) -> None:
    """The content id of the block tells, whatever the codec made of the bytes."""
    [[payload]] = forgery.chunks
    for changed in mutations(payload, n_bits=1):
        if changed != payload:
            forgery.chunks = [[changed]]
            error = outcome(forgery.write(tmp_path / "a.tsc"))
            assert isinstance(error, (DamagedError, UnsupportedError))


def test_forged_opaque(forgery: Forgery, tmp_path: Path) -> None:
    payload = forgery.opaque
    for changed in mutations(payload, n_bits=1):
        if len(changed) == len(payload) and changed != payload:
            forgery.opaque = changed
            error = outcome(forgery.write(tmp_path / "a.tsc"))
            # Some bits of a frame's header mean nothing to its content.
            assert error is None or isinstance(error, DamagedError)


# Forged on purpose ------------------------------------------------------------------------------


def is_refused(path: Path, kind: type[TscError] = DamagedError) -> bool:
    return isinstance(outcome(path), kind)


def test_chains_that_are_not_chains(forgery: Forgery, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    size = forgery.write(path).stat().st_size
    for offset in (size - 100, size, 32, 1, 1 << 63):
        forgery.edit_index = lambda index, at=offset: replace(  # type: ignore[misc]
            index, previous=RecordRef(at, 64)
        )
        assert is_refused(forgery.write(path))
    with Container(forgery_of(forgery, path, lambda index: index)) as container:
        itself = container.segments[-1].ref
    forgery.edit_index = lambda index: replace(index, previous=itself)
    assert is_refused(forgery.write(path))
    for changes in (
        {"first_block": 1}, {"first_snapshot": 1}, {"first_block": 1 << 62},
    ):  # fmt: skip
        forgery.edit_index = lambda index, changes=changes: replace(index, **changes)  # type: ignore[misc]
        assert is_refused(forgery.write(path))


def forgery_of(forgery: Forgery, path: Path, edit: Callable[[Index], Index | bytes]) -> Path:
    forgery.edit_index = edit
    return forgery.write(path)


@pytest.mark.parametrize(
    "parents", [(0, None), (1, None), (1, 0), (None, 1), (5, None), (None, 7)], ids=str
)
def test_parents_that_come_later(
    parents: tuple[int | None, ...], forgery: Forgery, tmp_path: Path
) -> None:
    record = read_record(tmp_path / "same.tsc")
    for kind in ("parent", "dictionary"):
        forgery.snapshots = [
            with_changes(record, number=number, **{kind: other})
            for number, other in enumerate(parents)
        ]
        assert is_refused(forgery.write(tmp_path / "a.tsc"))


def test_snapshots_that_do_not_fit(forgery: Forgery, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    record = read_record(tmp_path / "same.tsc")
    [track] = record.tracks
    [tensor, other] = track.tensors

    def refused(kind: type[TscError] = DamagedError, **changes: Any) -> bool:
        forgery.snapshots = [with_changes(record, tracks=[replace(track, **changes)])]
        return is_refused(forgery.write(path), kind)

    for run in (FrameRun(1, 0, 6), FrameRun(0, 1, 6), FrameRun(1 << 60, 0, 6), FrameRun(0, 6, 6)):
        assert refused(runs=(run,))
    # The same frames twice: more cells than frames.
    assert refused(
        runs=(FrameRun(0, 0, 6), FrameRun(0, 0, 6)), cells=make_snapshot(12).tracks[0].cells
    )
    assert refused(tensors=(tensor,))
    assert refused(tensors=(tensor, other, other))
    assert refused(tensors=(tensor, replace(other, row_bytes=18)))
    assert refused(tensors=(replace(tensor, row_bytes=8), replace(other, row_bytes=24)))
    bf16 = make_snapshot(6, dtype="bf16", n_layers=1, n_channels=8).tracks[0].tensors
    assert refused(tensors=tuple(bf16))
    forgery.snapshots = [with_changes(record, number=1)]
    assert is_refused(forgery.write(path))


def test_blocks_that_do_not_fit(forgery: Forgery, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    [block] = forgery.blocks
    [chunk] = block.chunks

    def refused(kind: type[TscError], changed: BlockEntry) -> bool:
        forgery.blocks = [changed]
        forgery.chunks = [forgery.chunks[0][:1] * len(changed.chunks)]
        return is_refused(forgery.write(path), kind)

    def with_chunk(**changes: Any) -> BlockEntry:
        return replace(block, chunks=(replace(chunk, **changes),))

    good = list(forgery.chunks)
    for changed in (
        replace(block, n_frames=7),
        replace(block, n_frames=65536),
        replace(block, n_frames=0),
        replace(block, content_id=bytes(16)),
        replace(block, chunks=block.chunks * 2),
        with_chunk(codec=registry.RAW if chunk.codec else registry.FIELDS_CLASSED_RANS),
        with_chunk(first_tensor=1),
        with_chunk(n_tensors=1),
        with_chunk(n_tensors=1 << 63),
        with_chunk(raw_length=chunk.raw_length + 1),
        with_chunk(quality_layer=1),
        with_chunk(quality_layer=255),
        replace(block, chunks=(chunk, replace(chunk, quality_layer=1))),
        replace(block, chunks=(replace(chunk, quality_layer=1), chunk)),
    ):
        assert refused(DamagedError, changed)
        forgery.chunks = list(good)


def test_a_lacking_tensor_is_not_made_up(tmp_path: Path) -> None:
    """Part of a block is not checked by its content id: the tensors must be there all the same."""
    path = tmp_path / "a.tsc"
    tscfile.pack(make_snapshot(6, n_layers=2, n_channels=4096), path)
    with Container(path) as container:
        [block] = container.blocks
        assert len(block.chunks) > 1
        changed = replace(block, chunks=block.chunks[:-1])
        index = Index(RecordRef(0, 0), 0, [changed], 0, container.snapshots)
    with path.open("r+b") as file, Container(path) as container:
        writer = ContainerWriter(file.fileno(), container)
        ref = writer._add_record(INDEX, index.write())
        writer._write(Trailer(ref.offset, ref.length).write(writer._offset))
    with pytest.raises(DamagedError), tscfile.open(path) as archive:
        archive.read(layers=[1], frames=(2, 3))


# Bombs ------------------------------------------------------------------------------------------


def test_claims_of_a_snapshot_are_bounded(forgery: Forgery, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    n = 60_000_000
    runs = coded_run(n)

    def refused(*parts: bytes, ids: bytes = b"\0\0\0\0") -> bool:
        structure = snapshot_start() + b"".join(parts)
        forgery.snapshots = [varints(0, 0, 0) + ids + b"\0" + packed(structure)]
        return is_refused(forgery.write(path))

    # Tokens: one run of equal numbers, and coded ones by the hundred million.
    assert refused(varints(0, 0), ids=varints(0, n) + runs)
    assert refused(varints(0, 0), ids=varints(0, n) + b"\x03\x08\x0c1234567")
    # A structure that says it is larger than it is, and one that is too large.
    small = packed(snapshot_start() + varints(0, 0))
    for length in (1, 1 << 29):
        forgery.snapshots = [no_tokens() + varints(length) + small[1:]]
        assert is_refused(forgery.write(path))
    # Tensors: runs of 65535 layers in seven bytes each.
    tensors = varints(0, 65535, 0, 1, 2, 1) * 3000
    assert refused(varints(1, 0, 0, 0, 3000), tensors, varints(0))
    # Tracks, frame runs and opaque parts that hold nothing.
    assert refused(varints(500_000), varints(0, 0, 0, 0, 0) * 500_000)
    empty_runs = varints(0, 0, 0, 0) * 1_000_000
    assert refused(varints(1, 0, 0, 0, 0, 1_000_000), empty_runs)
    assert refused(varints(0, 1_000_000), bytes(20) * 1_000_000)
    # Metadata: many keys, long arrays.
    keys = b"".join(b"\x03%03x\x07\x01" % i for i in range(4096))
    assert not refused_metadata(forgery, path, varints(4096) + keys)
    # One character of four bytes makes a text of as many bytes for each.
    wide = ByteWriter().uvarint(1).string("k").u8(8).string("a" * (13 << 20) + "\U0001f600")
    assert refused_metadata(forgery, path, wide.bytes())
    items = varints(1, 1) + b"k\x09\x00" + varints(5_000_000) + bytes(5_000_000)
    assert refused_metadata(forgery, path, items)


@pytest.mark.parametrize("what", ["source", "coding", "tracks"])
def test_claims_of_many_snapshots_do_not_add_up(what: str, tmp_path: Path) -> None:
    """What each may take is not taken for all at once: a hundred bytes a snapshot would do."""
    path, n_items, n_frames = tmp_path / "a.tsc", 100_000, 65_000
    items = varints(1, 1) + b"k\x09\x00" + varints(n_items) + bytes([200]) * n_items
    with path.open("w+b") as file:
        writer = ContainerWriter(file.fileno())
        for number in range(80):
            writer.add_block(n_frames, bytes(16), bytes(16), [])
            tracks = varints(0)
            if what == "tracks":
                cells = coded_run(n_frames) + coded_run(n_frames, start=1) + coded_run(n_frames)
                tracks = varints(1, 0, 0, 0, 0, 1, 2 * number, 0, n_frames, 0) + cells + varints(4)
                tracks += b"\1" * 4
            facts = [items if name == what else b"\0" for name in ("source", "identity", "coding")]
            structure = varints(0, 0, 0) + b"".join(facts) + tracks + varints(0)
            writer.add_snapshot(varints(number) + no_tokens()[1:] + packed(structure))
        writer.commit()
    assert path.stat().st_size < 16_000
    with bounded_memory(path):
        if what == "coding":
            with tscfile.open(path) as archive, pytest.raises(DamagedError, match="more than"):
                describe(archive)
        else:
            with tscfile.open(path) as archive:
                assert len(describe(archive).snapshots) == 80
        tscfile.verify(path, quick=True)
        tscfile.verify(path)


def test_claims_of_cells_are_bounded(forgery: Forgery, tmp_path: Path) -> None:
    """Blocks of 65536 frames cost 34 bytes, so the number of cells proves nothing."""
    path = tmp_path / "a.tsc"
    many = [BlockEntry(65536, bytes(16), bytes(16), ())] * 400
    n = 65536 * 400
    runs = varints(0, 0, 65536, 0) * 400
    start = snapshot_start() + varints(1, 0, 0, 0, 0, 400) + runs
    one_each = coded_run(n, start=1)
    few_cells = snapshot_start() + varints(1, 0, 0, 0, 0, 1, 0, 0, 50_000, 0)
    cases = [
        start + coded_run(n) + one_each + coded_run(n) + varints(0),
        start + coded_run(n),
        # Sequence ids: 256 for each of few cells.
        few_cells + coded_run(50_000) + coded_run(50_000, start=256) + coded_run(12_800_000),
    ]
    for structure in cases:
        forgery.snapshots = [no_tokens() + packed(structure)]
        forgery.edit_index = lambda index: replace(index, blocks=many)
        assert is_refused(forgery.write(path))


def test_claims_of_an_index_are_bounded(forgery: Forgery, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    nothing = RecordRef(0, 0)
    block = BlockEntry(1, bytes(16), bytes(16), ())
    chunk = ChunkEntry(nothing, 0, 0, 0, 0, 0, 0)
    for edited in (
        lambda index: replace(index, snapshots=[nothing] * 1_000_000),
        lambda index: replace(index, blocks=[block] * 300_000),
        lambda index: replace(index, blocks=[replace(block, chunks=(chunk,) * 300_000)]),
        lambda index: replace(index, extras=[ExtraEntry(9, 0, nothing)] * 600_000),
    ):
        forgery.edit_index = edited
        assert is_refused(forgery.write(path))


def test_opaque_bombs(forgery: Forgery, tmp_path: Path) -> None:
    path = tmp_path / "a.tsc"
    record = read_record(tmp_path / "same.tsc")
    content = bytes(200 << 20)
    forgery.opaque = zstd.compress(content, 1)
    length = RecordRef(Header.SIZE, 24 + len(forgery.opaque))
    for raw_length in (len(content), 1 << 50, 10):
        entry = OpaqueEntry("appendix", length, raw_length, bytes(16))
        forgery.snapshots = [with_changes(record, opaque=[entry])]
        assert is_refused(forgery.write(path))
    # Many that are allowed one by one.
    forgery.opaque = zstd.compress(bytes(20 << 20))
    length = RecordRef(Header.SIZE, 24 + len(forgery.opaque))
    from tscfile.blocks import opaque_id

    entries = [
        OpaqueEntry(f"part {i}", length, 20 << 20, opaque_id(bytes(20 << 20))) for i in range(50)
    ]
    forgery.snapshots = [with_changes(record, opaque=entries)]
    assert is_refused(forgery.write(path))


def test_chunk_bombs(forgery: Forgery, tmp_path: Path) -> None:
    """One symbol of probability one codes any number of values in no bits at all."""
    path = tmp_path / "a.tsc"
    record = read_record(tmp_path / "same.tsc")
    [track] = record.tracks
    n_frames, row_bytes = 65536, 16384
    tables = ByteWriter().uvarint(1).raw(b"\0\0").uvarint(1).raw(bytes(row_bytes // 2))
    tables.raw(b"\x00\x10")
    packed = zstd.compress(tables.bytes())
    lanes = np.full(32, 2, "<u4").tobytes() + np.array([1, 0] * 32, "<u2").tobytes()
    silent = ByteWriter().u8(0).uvarint(len(packed)).raw(packed).raw(lanes).bytes()
    planes = ByteWriter().u8(16)
    for _ in range(2):
        plane = zstd.compress(bytes(100 << 20), 1)
        planes.u8(1).uvarint(len(plane)).raw(plane)
    for body in (silent, planes.bytes()):
        header = ChunkHeader(registry.FIELDS_CLASSED_RANS, 0, n_frames, 0, 1, (row_bytes,))
        forgery.chunks = [[header.write() + ByteWriter().uvarint(len(body)).raw(body).bytes()]]
        [chunk] = forgery.blocks[0].chunks
        entry = replace(chunk, codec=header.codec, n_tensors=1, raw_length=header.raw_length)
        forgery.blocks = [replace(forgery.blocks[0], n_frames=n_frames, chunks=(entry,))]
        # A few of the frames, so that what is asked for is small.
        spec = TensorSpec(0, "k", track.tensors[0].dtype, row_bytes)
        few = replace(track, tensors=(spec,))
        forgery.snapshots = [with_changes(record, tracks=[few])]
        assert is_refused(forgery.write(path))
    # The same with a size that is allowed: it is what it says.
    small = replace(header, n_frames=128)
    forgery.chunks = [[small.write() + ByteWriter().uvarint(len(silent)).raw(silent).bytes()]]
    entry = replace(entry, raw_length=small.raw_length)
    forgery.blocks = [replace(forgery.blocks[0], n_frames=128, chunks=(entry,))]
    with tscfile.open(forgery.write(path)) as archive:
        [keys] = archive.read()
        assert keys.values.shape == (6, row_bytes // 2) and not keys.values.any()


def test_trailers_by_the_thousand(tmp_path: Path) -> None:
    """Looking for the newest whole commit takes time in proportion to the file: four times as much
    of it, not sixteen times."""
    path = tmp_path / "a.tsc"

    def seconds(trailers: bytes) -> float:
        path.write_bytes(Header().write() + trailers + b"end")
        start = time.process_time()
        with pytest.raises(DamagedError, match="no whole index"):
            tscfile.open(path)
        return time.process_time() - start

    def right_ones(n: int) -> bytes:
        """That name all of the file before them as the index."""
        at = range(Header.SIZE, Header.SIZE + n * Trailer.SIZE, Trailer.SIZE)
        return b"".join(Trailer(Header.SIZE, offset - Header.SIZE).write(offset) for offset in at)

    n = 1 << 15
    assert seconds(Trailer.MAGIC * 16 * n) < 9 * seconds(Trailer.MAGIC * 4 * n)
    assert seconds(right_ones(4 * n)) < 9 * seconds(right_ones(n))


def varints(*values: int) -> bytes:
    writer = ByteWriter()
    for value in values:
        writer.uvarint(value)
    return writer.bytes()


def coded_run(n: int, start: int = 0) -> bytes:
    """``n`` equal integers."""
    body = varints(2 * start, 0, n)
    return ByteWriter().u8(0).uvarint(len(body)).raw(body).bytes()


def snapshot_start(source: bytes = b"\0") -> bytes:
    """A structure up to its tracks: empty plan, tier and name, the source, no other metadata."""
    return varints(0, 0, 0) + source + varints(0, 0)


def no_tokens() -> bytes:
    """The start of a payload: number 0, no parent and dictionary, no tokens and contexts."""
    return varints(0, 0, 0) + varints(0, 0) + b"\0\0" + b"\0"



def refused_metadata(forgery: Forgery, path: Path, source: bytes) -> bool:
    forgery.snapshots = [no_tokens() + packed(snapshot_start(source) + varints(0, 0))]
    return is_refused(forgery.write(path))


# What a snapshot says of its source -------------------------------------------------------------


def sources() -> Iterator[dict[str, Any]]:
    good = SAVES[0].source
    for key in good:
        yield {k: v for k, v in good.items() if k != key}
        for value in ("", "x", -1, 1 << 40, True, 0.5, [], [1, 2], ["kv"], [1 << 40]):
            yield {**good, key: value}


def test_forged_facts_of_the_source(
    forgery: Forgery, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They choose what is written: a state or an error of one line."""
    path, out = tmp_path / "a.tsc", tmp_path / "out.kv"
    record = read_record(tmp_path / "same.tsc")
    for source in sources():
        forgery.snapshots = [with_changes(record, source=source)]
        forgery.write(path)
        capfd.readouterr()
        code = main(["unpack", str(path), "-o", str(out), "-q", "-f"])
        assert code in (0, 2, 3, 4, 5)
        assert capfd.readouterr().err.count("\n") == (code != 0)


@pytest.mark.parametrize(
    "identity",
    [{"architecture": ["llama"]}, {"n_layers": "1"}, {"n_heads": []}, {"n_heads": [True]},
     {"head_dim_k": -1}, {"rope_base": float("nan")}, {"rope_pairing": 1}, {"vocab_size": 1.5}],
    ids=str,
)  # fmt: skip
def test_forged_facts_of_the_model(
    identity: dict[str, Any], forgery: Forgery, tmp_path: Path
) -> None:
    record = read_record(tmp_path / "same.tsc")
    forgery.snapshots = [with_changes(record, identity=identity)]
    error = outcome(forgery.write(tmp_path / "a.tsc"))
    assert isinstance(error, DamagedError) and f"fact {next(iter(identity))}" in str(error)
    with pytest.raises(UsageError):
        tscfile.pack(make_snapshot(3, identity=identity), tmp_path / "b.tsc")
    assert not (tmp_path / "b.tsc").exists()
    forgery.snapshots = [with_changes(record, identity={"unknown": ["anything"]})]
    assert outcome(forgery.write(tmp_path / "a.tsc")) is None


def test_terminal_codes_are_not_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    snapshot: Snapshot = make_snapshot(3, identity={"name": "\x1b[2J\nfoo"})
    tscfile.pack(snapshot, tmp_path / "a.tsc", name="\x1b]0;x\x07")
    assert main(["info", str(tmp_path / "a.tsc")]) == 0
    printed = capfd.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "foo" in printed


def test_metadata_writer_makes_what_is_forged_here() -> None:
    writer = ByteWriter()
    write_metadata(writer, {})
    assert writer.bytes() == b"\0"
