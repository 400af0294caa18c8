"""What is written comes back, and old generations go when they may."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ps.store import (
    ChunkState,
    CommitKey,
    JobStore,
    OptimizerGroup,
    OptimizerSpec,
    StateArray,
    StoredParameter,
    direct,
)
from ps.store.testing import ADAM_STATE, Model

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def param(name: str, *shape: int, dtype: torch.dtype = torch.float32, trainable: bool = True):
    return StoredParameter(name, shape, dtype, "parameter", trainable)


# Sizes with several chunks, with a last chunk that is shorter, and none at all.
MANIFEST = [
    param("blocks.0.attn.q_proj.weight", 2600, 1031),
    param("blocks.0.bias", 7),
    param("scale"),
    param("empty.rows", 0, 5),
    param("empty.columns", 5, 0),
    param("wide.double", 3, 2, 5, dtype=torch.float64),
    param("frozen.weight", 4100, 601, dtype=torch.bfloat16, trainable=False),
    StoredParameter("norm.running_mean", (13,), torch.float32, "buffer", False),
    StoredParameter("norm.num_batches_tracked", (), torch.int64, "buffer", False),
]


def write(folder: Path, model: Model, *, step: int = 0, shard: int = 0, num_shards: int = 1) -> JobStore:
    store = JobStore(folder, "gpt", shard, num_shards)
    store.write(model.header(shard, num_shards, step=step), model.chunks(shard, num_shards), model.state_arrays)
    return store


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same_chunks(found, expected) -> None:
    found, expected = list(found), list(expected)
    assert [(c.parameter, c.chunk) for c in found] == [(c.parameter, c.chunk) for c in expected]
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a.weight, b.weight)
        assert a.state.keys() == b.state.keys()
        for name in b.state:
            assert_same_bits(a.state[name], b.state[name])


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_every_shard_reads_back_what_it_wrote(tmp_path, num_shards):
    model = Model(MANIFEST, ADAM_STATE)
    for shard in range(num_shards):
        store = write(tmp_path / str(shard), model, step=12, shard=shard, num_shards=num_shards)
        assert store.committed_steps() == [12]
        assert_same_chunks(store.read_chunks(12), model.chunks(shard, num_shards))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    manifest = [param(f"w{i}", *shape, dtype=dtype, trainable=False) for i, shape in
                enumerate([(), (1,), (17, 3), (0,), (3, 700_001)])]  # fmt: skip
    model = Model(manifest, {})
    assert_same_chunks(write(tmp_path, model).read_chunks(0), model.chunks())


def test_special_floats_keep_their_bits(tmp_path):
    model = Model([param("w", 4), param("b", 4, dtype=torch.bfloat16, trainable=False)], {})
    for value in model.values:
        value.copy_(torch.tensor([math.nan, -0.0, math.inf, 1e-45]))
    assert_same_chunks(write(tmp_path, model).read_chunks(0), model.chunks())


def test_the_header_comes_back(tmp_path):
    model = Model(MANIFEST, ADAM_STATE)
    options = {
        "lr": 3e-4, "betas": (0.9, 0.999), "maximize": False, "foreach": None, "mode": "x", "n": 3,
        "limit": math.inf, "whole": 1.0, "range": (-math.inf, 1.0),
    }  # fmt: skip
    optimizer = OptimizerSpec("AdamW", (OptimizerGroup(options, (0, 2)), OptimizerGroup({}, ())))
    header = model.header(step=120, optimizer=optimizer, metadata='{"epoch":  3, "x": "é"}')
    store = JobStore(tmp_path, "gpt", 0, 1)
    store.write(header, model.chunks(), ADAM_STATE)
    found = store.read_header(120)
    assert found == header
    types = {name: type(option) for name, option in found.optimizer.groups[0].options.items()}
    assert types == {name: type(option) for name, option in options.items()}


def test_chunks_that_were_never_stepped_have_no_state(tmp_path):
    model = Model([param("a", 9), param("b", 9)], ADAM_STATE)
    first, second = model.chunks()
    second = ChunkState(second.parameter, second.chunk, second.weight)
    store = JobStore(tmp_path, "gpt", 0, 1)
    store.write(model.header(), iter([second, first]), ADAM_STATE)
    assert_same_chunks(store.read_chunks(0), [first, second])


def test_state_that_is_all_zeros_is_written(tmp_path):
    model = Model([param("a", 9)], ADAM_STATE)
    (chunk,) = model.chunks()
    for tensor in (chunk.weight, *chunk.state.values()):
        tensor.zero_()
    store = JobStore(tmp_path, "gpt", 0, 1)
    store.write(model.header(), [chunk], ADAM_STATE)
    assert_same_chunks(store.read_chunks(0), [chunk])


def test_strided_tensors_and_parameters_that_need_gradients_are_written(tmp_path):
    model = Model([param("a", 1500, 900)], {})
    (chunk,) = model.chunks()
    strided = torch.nn.Parameter(chunk.weight.t().contiguous()).t()
    assert not strided.is_contiguous()
    store = JobStore(tmp_path, "gpt", 0, 1)
    store.write(model.header(), [ChunkState(0, 0, strided)], {})
    assert_same_chunks(store.read_chunks(0), [chunk])


@pytest.mark.parametrize("awaited", [False, True])
def test_large_tensors_are_written_past_the_page_cache_unless_somebody_waits(tmp_path, monkeypatch, awaited):
    model = Model([param("a", 513, 1021)], {})
    (chunk,) = model.chunks()
    direct_files = []
    write_file = direct.write_file

    def record(path, *arguments):
        direct_files.append(path)
        write_file(path, *arguments)

    monkeypatch.setattr(direct, "write_file", record)
    store = JobStore(tmp_path, "gpt", 0, 1)
    store.write(model.header(), [ChunkState(0, 0, chunk.weight, awaited=awaited)], {})
    assert len(direct_files) == (0 if awaited else 1)
    assert_same_chunks(store.read_chunks(0), [chunk])


def test_a_model_without_chunks_on_this_shard_is_a_generation(tmp_path):
    model = Model([param("a", 3), param("e", 0)], ADAM_STATE)
    store = write(tmp_path, model, shard=1, num_shards=2)
    assert store.committed_steps() == [0] and list(store.read_chunks(0)) == []


def test_an_existing_commit_is_left_as_it_is(tmp_path):
    old, new = Model(MANIFEST[:2], ADAM_STATE, seed=1), Model(MANIFEST[:2], ADAM_STATE, seed=2)
    store = write(tmp_path, old)
    again = store.write(new.header(), new.chunks(), ADAM_STATE)
    assert again.bytes_written == 0 and again.path == tmp_path / "gpt/generations/00000000"
    assert_same_chunks(store.read_chunks(0), old.chunks())


def test_bytes_written_are_those_of_the_chunk_files(tmp_path):
    model = Model(MANIFEST, ADAM_STATE)
    written = JobStore(tmp_path, "gpt", 0, 1).write(model.header(), model.chunks(), ADAM_STATE)
    names = {"zarr.json", "shard-0-of-1.json"}
    files = [p for p in written.path.rglob("*") if p.is_file() and p.name not in names]
    assert written.bytes_written == sum(p.stat().st_size for p in files)


def test_a_reader_that_stops_early_leaves_no_thread(tmp_path):
    import threading

    store = write(tmp_path, Model(MANIFEST, ADAM_STATE))
    chunks = store.read_chunks(0)
    next(chunks)
    chunks.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("store-")]


@pytest.mark.parametrize(
    ("keep", "complete", "left"),
    [(1, 40, [40, 50]), (3, 40, [30, 40, 50]), (9, 40, [10, 20, 30, 40, 50]), (1, 50, [50]),
     (0, 20, [20, 30, 40, 50]), (1, 10, [10, 20, 30, 40, 50]), (1, 45, [10, 20, 30, 40, 50])],
)  # fmt: skip
def test_prune_keeps_the_newest_and_all_from_the_complete_step_on(tmp_path, keep, complete, left):
    model = Model([param("a", 3)], ADAM_STATE)
    for step in (10, 20, 30, 40, 50):
        store = write(tmp_path, model, step=step)
    deleted = store.prune(keep=keep, complete=CommitKey(complete, "0"), current=CommitKey(50, "0"))
    assert store.committed_steps() == left
    assert sorted([*(key.step for key in deleted), *left]) == [10, 20, 30, 40, 50]
    assert {p.name for p in (tmp_path / "gpt/generations").iterdir()} == {f"{s:08d}" for s in left}


def test_discard_after_deletes_what_an_abandoned_run_left(tmp_path):
    model = Model([param("a", 3)], ADAM_STATE)
    for step in (10, 20, 30):
        store = write(tmp_path, model, step=step)
    assert store.discard_after(10) == [30, 20]
    assert store.committed_steps() == [10]


def test_steps_of_more_than_eight_digits_count(tmp_path):
    store = write(tmp_path, Model([param("a", 3)], {}), step=123_456_789_012)
    assert store.committed_steps() == [123_456_789_012]
    assert len(list(store.read_chunks(123_456_789_012))) == 1


names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/\\\x7f"), max_size=40
).map(lambda text: "p" + text)
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), max_size=5),
    num_shards=st.integers(1, 3),
    data=st.data(),
)
def test_any_manifest_comes_back(tmp_path_factory, entries, num_shards, data):
    manifest = [
        StoredParameter(name, shape, dtype, "parameter" if train else "buffer", train)
        for name, (shape, dtype, train) in entries.items()
    ]
    states = {"momentum_buffer": StateArray("momentum_buffer", None, per_element=True)}
    model = Model(manifest, states)
    shard = data.draw(st.integers(0, num_shards - 1))
    store = write(tmp_path_factory.mktemp("any"), model, shard=shard, num_shards=num_shards)
    assert store.read_header(0) == model.header(shard, num_shards)
    assert_same_chunks(store.read_chunks(0), model.chunks(shard, num_shards))
