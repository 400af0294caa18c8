"""Whatever instant a server is killed at, generations are complete or do not exist."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ps.store import ChunkState, DataDir, JobStore, StoredParameter
from ps.store.testing import ADAM_STATE, Model

ROOT = Path(__file__).parents[2]

# Writes generation after generation, each with its step as every value, until it is killed.
WRITER = """
import sys
from pathlib import Path
from tests_model import MODEL, chunks_of
from ps.store import CommitKey, DataDir
from ps.store.testing import ADAM_STATE
store = DataDir(Path(sys.argv[1]), 0, 1).job_store("gpt")
store.clean()
step = max(store.committed_steps(), default=0)
print("ready", flush=True)
while True:
    step += 1
    store.write(MODEL.header(step=step), chunks_of(step), ADAM_STATE)
    key = CommitKey(step, "0")
    store.prune(keep=2, complete=key, current=key)
"""

MODEL_SOURCE = """
import torch
from ps.store import StoredParameter
from ps.store.testing import ADAM_STATE, Model
MODEL = Model([StoredParameter("w", (3000, 500), torch.float32, "parameter", True),
               StoredParameter("b", (500,), torch.float32, "parameter", True)], ADAM_STATE)
def chunks_of(step):
    for chunk in MODEL.chunks():
        for tensor in (chunk.weight, *chunk.state.values()):
            tensor.fill_(step)
        yield chunk
"""


@pytest.fixture
def start_writer(tmp_path):
    (tmp_path / "tests_model.py").write_text(MODEL_SOURCE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    started: list[subprocess.Popen[str]] = []

    def start(data_dir: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(data_dir)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_server_killed_at_any_instant_leaves_complete_generations_only(tmp_path, start_writer):
    instants = random.Random(0)
    data_dir = tmp_path / "data"
    store, kills = JobStore(data_dir, "gpt", 0, 1), 0
    # On a busy machine it takes more kills until something was committed at all.
    while kills < 4 or (kills < 60 and not store.committed_steps()):
        kills += 1
        process = start_writer(data_dir)
        time.sleep(instants.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for step in store.committed_steps():
            for chunk in store.read_chunks(step):
                assert (chunk.weight == step).all()
                assert chunk.state.keys() == ADAM_STATE.keys()
                assert all((tensor == step).all() for tensor in chunk.state.values())
    assert store.committed_steps()


def test_a_write_killed_in_its_middle_is_no_generation_and_is_cleaned_up(tmp_path):
    """The child stops in the middle of its chunks, so the kill is certain to hit a half-written one."""
    (tmp_path / "tests_model.py").write_text(MODEL_SOURCE)
    script = """
import sys, time
from pathlib import Path
from tests_model import MODEL, chunks_of
from ps.store import DataDir
from ps.store.testing import ADAM_STATE
store = DataDir(Path(sys.argv[1]), 0, 1).job_store("gpt")
store.write(MODEL.header(step=1), chunks_of(1), ADAM_STATE)
def half():
    yield next(iter(chunks_of(2)))
    print("half", flush=True)
    time.sleep(600)
store.write(MODEL.header(step=2), half(), ADAM_STATE)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", script, str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        process.kill()
    generations = tmp_path / "data/gpt/generations"
    with DataDir(tmp_path / "data", 0, 1) as data_dir:  # the dead process's lock is gone
        store = data_dir.job_store("gpt")
        assert store.committed_steps() == [1]
        leftovers = [p.name for p in generations.iterdir() if p.name != "00000001"]
        assert len(leftovers) == 1 and leftovers[0].startswith(".00000002.tmp-")
        store.clean()
        assert [p.name for p in generations.iterdir()] == ["00000001"]
        assert all((chunk.weight == 1).all() for chunk in store.read_chunks(1))


@pytest.mark.parametrize("stop", [RuntimeError("optimizer"), KeyboardInterrupt()])
def test_a_failure_among_the_chunks_removes_the_half_written_folder(tmp_path, stop):
    model = Model([StoredParameter("w", (3000, 500), torch.float32, "parameter", True)], ADAM_STATE)
    store = JobStore(tmp_path, "gpt", 0, 1)

    def failing():
        yield next(model.chunks())
        raise stop

    with pytest.raises(type(stop)):
        store.write(model.header(step=1), failing(), ADAM_STATE)
    assert list((tmp_path / "gpt/generations").iterdir()) == []


def test_clean_leaves_generations_and_unknown_files_alone(tmp_path):
    model = Model([StoredParameter("w", (3,), torch.float32, "parameter", True)], {})
    store = JobStore(tmp_path, "gpt", 0, 1)
    store.clean()  # of a job that is not there yet
    store.write(model.header(step=1), model.chunks(), {})
    generations = tmp_path / "gpt/generations"
    (generations / ".00000002.tmp-abc/weight").mkdir(parents=True)
    (generations / "notes").mkdir()
    store.clean()
    assert {p.name for p in generations.iterdir()} == {"00000001", "notes"}
    assert store.committed_steps() == [1]


def test_a_step_that_another_shard_wrote_is_not_this_shards_generation(tmp_path):
    model = Model([StoredParameter("w", (3,), torch.float32, "parameter", True)], {})
    JobStore(tmp_path, "gpt", 0, 2).write(model.header(0, 2), model.chunks(0, 2), {})
    other = JobStore(tmp_path, "gpt", 1, 2)
    assert other.committed_steps() == []
    chunks: list[ChunkState] = []
    with pytest.raises(Exception, match=r"is not one of shard 1/2; move it away"):
        other.write(model.header(1, 2), chunks, {})
