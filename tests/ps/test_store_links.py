"""What a generation says of its files' bytes, and how unchanged chunks become links instead of copies."""

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import pytest
import torch

from ps.store import ChunkFile, ChunkState, CommitKey, DamagedError, JobStore, StateArray, StoredParameter, checksum
from ps.store.chunk_files import ChunkFiles, Span
from ps.store.testing import ADAM_STATE, Model

MODEL = Model(
    [
        StoredParameter("w", (4501, 500), torch.float32, "parameter", True),  # its last chunk is padded
        StoredParameter("b", (5,), torch.float32, "parameter", True),
        StoredParameter("mask", (700, 2001), torch.bfloat16, "buffer", False),
    ],
    ADAM_STATE,
)
KEY = "weight/w/c/1/0"


def write(store: JobStore, step: int, chunks=None) -> Path:
    return store.write(MODEL.header(step=step), MODEL.chunks() if chunks is None else chunks, ADAM_STATE).path


def files(generation: Path) -> dict[str, Path]:
    """The chunk files of a generation, by their place in it."""
    found = (p for p in generation.rglob("*") if p.is_file() and p.suffix != ".json")
    return {str(p.relative_to(generation)): p for p in found}


def listed(generation: Path) -> dict[str, int]:
    """The checksums that a generation states, by array and chunk."""
    arrays = json.loads((generation / "shard-0-of-1.json").read_text())["arrays"]
    return {
        f"{path} {chunk}": crc
        for path, array in arrays.items()
        for chunk, crc in zip(array["chunks"], array["crc32c"], strict=True)
    }


def same(store: JobStore, step: int) -> bool:
    """Whether a generation has the model's bits."""
    read = {(chunk.parameter, chunk.chunk): chunk for chunk in store.read_chunks(step)}
    return all(
        torch.equal(read[chunk.parameter, chunk.chunk].weight, chunk.weight)
        and all(torch.equal(read[chunk.parameter, chunk.chunk].state[n], t) for n, t in chunk.state.items())
        for chunk in MODEL.chunks()
    )


@pytest.fixture
def stored(tmp_path) -> tuple[JobStore, Path]:
    store = JobStore(tmp_path, "gpt", 0, 1)
    return store, write(store, 1)


# ---------------------------------------------------------------- checksums


def test_every_file_has_its_checksum(stored):
    _, path = stored
    expected = {}
    for key, file in files(path).items():
        array, index = key.split("/c/")
        expected[f"{array} {int(index.split('/')[0])}"] = google_crc32c.value(file.read_bytes())
    assert listed(path) == expected


@pytest.mark.parametrize("key", [KEY, "weight/w/c/0/0", "exp_avg/w/c/1/0", "step/b/c/0", "buffer/mask/c/0/0"])
def test_a_changed_bit_is_found_and_the_file_named(stored, key):
    store, path = stored
    content = bytearray((path / key).read_bytes())
    content[2] ^= 4
    (path / key).write_bytes(content)
    with pytest.raises(DamagedError, match=rf"{re.escape(str(path / key))} is damaged: its CRC32C is .* put the file"):
        list(store.read_chunks(1))


def test_a_generation_from_before_there_were_checksums_can_be_read(stored):
    store, path = stored
    file = path / "shard-0-of-1.json"
    document = json.loads(file.read_text())
    for array in document["arrays"].values():
        del array["crc32c"]
    file.write_text(json.dumps(document))
    assert same(store, 1)
    again = write(store, 2, store.chunk_files(1))
    assert same(store, 2)
    assert len(listed(again)) == len(files(again)), "what was not known was counted"


@pytest.mark.parametrize("checksums", [[], [-1, 0], [1 << 32, 0], ["0", 0], [0] * 9])
def test_checksums_that_cannot_be_are_refused(stored, checksums):
    store, path = stored
    file = path / "shard-0-of-1.json"
    document = json.loads(file.read_text())
    document["arrays"]["weight/w"]["crc32c"] = checksums
    file.write_text(json.dumps(document))
    with pytest.raises(DamagedError, match=r"shard-0-of-1\.json is damaged: arrays\.weight/w\.crc32c"):
        store.read_chunks(1)


# ---------------------------------------------------------------- links


def test_files_of_an_earlier_generation_are_linked_and_survive_it(stored):
    store, first = stored
    written = store.write(MODEL.header(step=2), store.chunk_files(1), ADAM_STATE)
    assert written.bytes_written == 0
    assert {k: f.stat().st_ino for k, f in files(first).items()} == {
        k: f.stat().st_ino for k, f in files(written.path).items()
    }
    assert listed(first) == listed(written.path)
    store.prune(keep=1, complete=CommitKey(2, "0"), current=CommitKey(2, "0"))
    assert not first.exists() and same(store, 2)


def test_tensors_and_files_may_be_mixed_within_a_chunk(stored):
    store, first = stored

    def mixed() -> Iterator[ChunkState]:
        for files_of, tensors in zip(store.chunk_files(1), MODEL.chunks(), strict=True):
            yield ChunkState(tensors.parameter, tensors.chunk, files_of.weight, tensors.state)

    second = write(store, 2, mixed())
    assert same(store, 2)
    assert (first / KEY).stat().st_ino == (second / KEY).stat().st_ino
    assert (first / "exp_avg/w/c/1/0").stat().st_ino != (second / "exp_avg/w/c/1/0").stat().st_ino


def test_a_link_reads_nothing_where_the_checksum_is_known(stored):
    """So what is said of the file is taken for true; `verify` and reading are what finds out."""
    store, first = stored
    (first / KEY).write_bytes(bytes((first / KEY).stat().st_size))
    second = write(store, 2, store.chunk_files(1))
    assert listed(first) == listed(second)
    with pytest.raises(DamagedError, match=re.escape(str(second / KEY))):
        list(store.read_chunks(2))


def test_the_checksum_of_a_file_is_counted_where_it_is_not_known(stored):
    store, first = stored
    unknown = (
        ChunkState(c.parameter, c.chunk, ChunkFile(c.weight.path), {n: ChunkFile(f.path) for n, f in c.state.items()})
        for c in store.chunk_files(1)
    )
    assert listed(write(store, 2, unknown)) == listed(first)


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EMLINK])
def test_what_cannot_be_linked_is_copied(stored, monkeypatch, reason):
    store, first = stored

    def refuse(source, target):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", refuse)
    written = store.write(MODEL.header(step=2), store.chunk_files(1), ADAM_STATE)
    assert written.bytes_written == sum(file.stat().st_size for file in files(first).values())
    assert (first / KEY).stat().st_ino != (written.path / KEY).stat().st_ino
    assert same(store, 2) and listed(first) == listed(written.path)


def test_files_on_another_disk_are_copied(tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    model = Model([StoredParameter("w", (3,), torch.float32, "parameter", True)], {})
    file = other / f"zero-ps-test-{os.getpid()}"
    file.write_bytes(model.values[0].numpy().tobytes())
    try:
        store = JobStore(tmp_path, "gpt", 0, 1)
        store.write(model.header(), [ChunkState(0, 0, ChunkFile(file))], {})
    finally:
        file.unlink()
    (chunk,) = store.read_chunks(0)
    assert torch.equal(chunk.weight, model.values[0])


def test_a_file_that_the_disk_cannot_read_fails_the_write_and_is_named(stored, monkeypatch):
    """Of a spill file whose checksum nobody knows, all of it is read."""
    store, first = stored
    sources = [
        ChunkState(c.parameter, c.chunk, ChunkFile(c.weight.path), {n: ChunkFile(f.path) for n, f in c.state.items()})
        for c in store.chunk_files(1)
    ]
    whole = checksum.of_file

    def failing(file: Path) -> int:
        if file == first / KEY:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(file)

    monkeypatch.setattr(checksum, "of_file", failing)
    with pytest.raises(
        DamagedError, match=rf"cannot read {re.escape(str(first / KEY))}: Input/output error; what was "
    ):
        write(store, 2, sources)
    assert store.committed_steps() == [1] and same(store, 1)


def test_a_file_that_is_gone_or_cut_fails_the_write_and_is_named(stored, tmp_path):
    store, first = stored
    sources = list(store.chunk_files(1))
    with (first / KEY).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DamagedError, match=rf"{re.escape(str(first / KEY))} has 100 bytes, and chunk 1 of weight/w "):
        write(store, 2, sources)
    (first / KEY).unlink()
    with pytest.raises(DamagedError, match=rf"{re.escape(str(first / KEY))}, which holds chunk 1 of weight/w, is gone"):
        write(store, 2, sources)
    assert [p.name for p in first.parent.iterdir()] == ["00000001"]


def test_nothing_writes_into_a_file_that_a_generation_links_to(tmp_path):
    """zarrs opens files that exist and writes into them."""
    working = tmp_path / "working"
    working.mkdir()
    chunk_files, spans = ChunkFiles(working), [Span("c/0", 100, 0, 100), Span("c/1", 100, 100, 100)]
    chunk_files.write(spans, torch.full((200,), 1, dtype=torch.uint8))
    model = Model([StoredParameter("w", (100,), torch.uint8, "parameter", False)], {})
    store = JobStore(tmp_path, "gpt", 0, 1)
    generation = store.write(model.header(), [ChunkState(0, 0, ChunkFile(working / "c/0"))], {}).path
    for value in (2, 0):
        chunk_files.write(spans, torch.full((200,), value, dtype=torch.uint8))
        assert (generation / "weight/w/c/0").read_bytes() == bytes([1]) * 100
        assert (working / "c/0").read_bytes() == (working / "c/1").read_bytes() == bytes([value]) * 100
    (chunk,) = store.read_chunks(0)
    assert (chunk.weight == 1).all()


def test_a_chunk_is_taken_only_once_all_of_it_is_with_the_operating_system(tmp_path):
    """Whoever changes a tensor as soon as it was taken changes nothing of the generation."""
    store = JobStore(tmp_path, "gpt", 0, 1)
    taken = []

    def spoil(chunk: ChunkState) -> None:
        taken.append((chunk.parameter, chunk.chunk))
        for tensor in (chunk.weight, *chunk.state.values()):
            tensor.zero_()

    store.write(MODEL.header(step=1), MODEL.chunks(), ADAM_STATE, spoil)
    assert sorted(taken) == [(chunk.parameter, chunk.chunk) for chunk in MODEL.chunks()]
    assert same(store, 1)


def test_state_that_is_no_longer_kept_is_not_linked(tmp_path):
    model = Model([StoredParameter("w", (9,), torch.float32, "parameter", True)], ADAM_STATE)
    store = JobStore(tmp_path, "gpt", 0, 1)
    store.write(model.header(step=1), model.chunks(), ADAM_STATE)
    with pytest.raises(ValueError, match="is not among"):
        store.write(model.header(step=2), store.chunk_files(1), {"m": StateArray("m", None, per_element=True)})
