"""A client that goes over a limit is refused; another one works on meanwhile."""

import queue
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
import torch

from protos import MAX_MESSAGE_BYTES
from protos import zero_ps_pb2 as pb
from ps import LocalCluster, opening, places, staging
from ps.barrier import Barriers
from ps.commits import MAX_TAGS
from ps.errors import InvalidRequest, ServerFull
from ps.home import IN_MEMORY
from ps.links import LinkRefused, gloo, pair
from ps.monitor import Monitor, Patience
from ps.runs import MAX_RUNS
from ps.sessions import Sessions
from ps.tier import Incoming
from tests.ps.client import Client, Stream, error_of, spec, start_job

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
INVALID = grpc.StatusCode.INVALID_ARGUMENT
SESSIONS = 10
W = {"w": torch.zeros(64)}
FLAGS = ["--max-sessions", str(SESSIONS), "--max-inflight", "64KiB"]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalCluster]:
    with LocalCluster(1, lease=60, flags=FLAGS) as cluster:
        yield cluster


@pytest.fixture
def address(server: LocalCluster) -> str:
    return server.addresses[0]


@pytest.fixture(autouse=True)
def _places_are_given_back() -> Iterator[None]:
    yield
    for client in Client.connected:
        with suppress(grpc.RpcError, ValueError):
            client.call("CloseSession")


@pytest.fixture
def other(address: str) -> Iterator[Client]:
    """Trains all the while, and has got on when the test ends."""
    client = Client(address, job="other")
    client.open_job({"o": torch.zeros(1000)})
    if client.opened.step < 0:
        client.push_weight(0, torch.zeros(1000))
    client.set_optimizer(lr=1.0)
    stop, steps, failed = threading.Event(), [max(0, client.opened.step)], []
    longest = [0.0]

    def train() -> None:
        try:
            while not stop.is_set():
                began = time.monotonic()
                client.push_gradient(0, torch.ones(1000), step=steps[0])
                client.step(steps[0])
                steps[0] += 1
                assert torch.equal(client.pull(0, version=steps[0]), torch.full((1000,), -float(steps[0])))
                client.call("ZeroGrad", step=steps[0])
                longest[0] = max(longest[0], time.monotonic() - began)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield client
        seen, deadline = steps[0], time.monotonic() + 20
        while steps[0] < seen + 3 and not failed:
            assert time.monotonic() < deadline, "the other client does not get on"
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(30)
    assert not failed, failed
    assert longest[0] < 10, "the other client was held up"


def open_session(address: str, job: str, rank: int = 0, world_size: int = 1, **fields) -> Client:
    return Client(address, job=job, rank=rank, world_size=world_size, heartbeat=False, **fields)


# ---------------------------------------------------------------- sessions and jobs


def test_sessions(address: str, other: Client, job_name: str) -> None:
    clients = [open_session(address, job_name, rank, SESSIONS, group=1) for rank in range(SESSIONS - 1)]
    code, message = error_of(lambda: open_session(address, job_name, SESSIONS - 1, SESSIONS, group=1))
    assert code == FULL
    assert f"this server has {SESSIONS} sessions, the most it may have" in message and "--max-sessions" in message
    clients[3].close()
    open_session(address, f"{job_name}-more").close()


def test_sessions_that_ended_take_no_place(address: str, other: Client, job_name: str) -> None:
    for _ in range(3 * SESSIONS):
        open_session(address, job_name).close()


def test_a_world_of_more_trainers_than_there_may_be(address: str, other: Client, job_name: str) -> None:
    code, message = error_of(lambda: open_session(address, job_name, 0, SESSIONS + 1))
    assert code == INVALID and f"world size has to be 1 to {SESSIONS}" in message


def test_readers_leave_places_for_trainers(address: str, other: Client, job_name: str) -> None:
    start_job(address, W, job=job_name)
    # A reader wants something to read.
    Client.connected[-1].call("Commit")
    for _ in range(SESSIONS // 2):
        open_session(address, job_name, read_only=True)
    code, message = error_of(lambda: open_session(address, job_name, read_only=True))
    assert code == FULL and f"{SESSIONS // 2} read-only sessions, the most it may have" in message


def test_jobs() -> None:
    with LocalCluster(1, lease=300, flags=["--max-jobs", "3"]) as cluster:
        (address,) = cluster.addresses
        (client,) = start_job(address, W, job="other")
        open_session(address, "first"), open_session(address, "second")
        code, message = error_of(lambda: open_session(address, "third"))
        assert code == FULL
        assert "3 jobs in memory, the most it may have; use one of them" in message and "--max-jobs" in message
        client.step(0)
        open_session(address, "second")


# ---------------------------------------------------------------- threads


def test_calls_of_one_session_that_wait(address: str, other: Client, job_name: str) -> None:
    client = open_session(address, job_name, 0, 2, group=1)
    waiting = []
    refused = None
    deadline = time.monotonic() + 30
    # Two streams are open.
    while refused is None or len(waiting) > places.PER_SESSION - 2:
        assert time.monotonic() < deadline
        request = pb.BarrierRequest(session_id=client.session_id, tag=f"t{len(waiting)}", timeout_seconds=60)
        waiting.append(client.stub.Barrier.future(request, timeout=60))
        time.sleep(0.1)
        over = [call for call in waiting if call.done()]
        waiting = [call for call in waiting if not call.done()]
        refused = refused or (error_of(over[0].result) if over else None)
    assert refused[0] == FULL
    assert f"this session has {places.PER_SESSION} calls and streams open, the most there may be" in refused[1]
    client.call("Heartbeat")
    for call in waiting:
        call.cancel()


def test_streams_of_one_session(address: str, other: Client, job_name: str) -> None:
    client = open_session(address, job_name)
    streams = [Stream(client.stub.Pull, client.session_id) for _ in range(2 * places.PER_SESSION)]
    deadline = time.monotonic() + 20
    while len(over := [s for s in streams if not s.call.is_active()]) < places.PER_SESSION + 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {stream.call.code() for stream in over} == {FULL}
    for stream in streams:
        stream.close()


def test_streams_of_nobody(server: LocalCluster, address: str, other: Client) -> None:
    """Clients without a session, over many connections, cannot take all threads."""
    most = places.MAX_MUTE
    channels = [
        grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(2 + most // 32)
    ]
    calls = []
    for channel in channels:
        method = channel.stream_stream("/zero_ps.v1.ParameterServer/Push")
        calls += [method(iter(queue.SimpleQueue().get, None)) for _ in range(32)]
    deadline = time.monotonic() + 20
    while len(over := [call for call in calls if not call.is_active()]) < len(calls) - most:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {call.code() for call in over} == {FULL}
    open_session(address, "other-one").close()
    for channel in channels:
        channel.close()


def test_connections_that_say_nothing(server: LocalCluster, address: str, other: Client, job_name: str) -> None:
    """Half-open ones, those that stop in their handshake, and more than there may be."""
    host, port = address.split(":")
    process = psutil.Process(server.pid(0))
    before = process.num_fds()
    held = []
    for number in range(2 * SESSIONS + 200):
        with suppress(OSError):
            held.append(connection := socket.create_connection((host, int(port)), timeout=10))
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: number % 25])
    deadline = time.monotonic() + 20
    while process.num_fds() > before + 2 * SESSIONS + 128 + 16:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 20
    while process.num_fds() > before + 8:
        assert time.monotonic() < deadline, (process.num_fds(), before)
        time.sleep(0.05)
    open_session(address, job_name).close()


def test_a_stream_that_says_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    held, ended = places.Places(1), threading.Event()
    monkeypatch.setattr(places, "_MUTE_SECONDS", 0.0)
    with held.stream(ended.set):
        time.sleep(0.01)
        held.expire()
    assert ended.is_set()


def test_streams_that_outlive_their_sessions_are_ended(address: str, other: Client, job_name: str) -> None:
    clients = []
    for _ in range(places.MAX_ENDED + 4):
        clients.append(client := open_session(address, job_name))
        client.pulls.requests.put(pb.PullRequest(session_id=client.session_id))
        next(client.pulls.call)
        client.call("CloseSession")
    deadline = time.monotonic() + 20
    while not any(not client.pulls.call.is_active() for client in clients):
        assert time.monotonic() < deadline, "all streams of sessions that ended are open"
        time.sleep(0.05)
    for client in clients:
        client.drop()


# ---------------------------------------------------------------- sizes


def _collect(responses: Iterable[pb.PushResponse], into: "queue.SimpleQueue[pb.PushResponse]") -> None:
    # The stream ends with its client.
    with suppress(grpc.RpcError):
        for response in responses:
            into.put(response)


def test_bytes_in_flight(address: str, other: Client, job_name: str) -> None:
    (client,) = start_job(address, W | {"large": torch.zeros(1)}, job=job_name)
    staged = {"kind": pb.PushHeader.KIND_STAGED, "dtype": pb.DTYPE_UINT8, "session_id": client.session_id}
    second = Stream(client.stub.Push, client.session_id)
    acknowledged: queue.SimpleQueue[pb.PushResponse] = queue.SimpleQueue()
    threading.Thread(target=lambda: _collect(client.pushes.call, acknowledged), daemon=True).start()

    def begin() -> None:
        """A push that goes on."""
        header = pb.PushHeader(chunks=[pb.ChunkRef()], chunk_bytes=[40 << 10], **staged)
        client.pushes.requests.put(pb.PushRequest(header=header))
        client.pushes.requests.put(pb.PushRequest(data=bytes(1)))

    begin()
    deadline = time.monotonic() + 30
    while True:
        header = pb.PushHeader(chunks=[pb.ChunkRef()], chunk_bytes=[30 << 10], **staged)
        second.requests.put(pb.PushRequest(header=header))
        second.requests.put(pb.PushRequest(data=bytes(30 << 10)))
        response = next(second.call)
        if response.error.code == FULL.value[0]:
            break
        assert not response.HasField("error") and time.monotonic() < deadline
        time.sleep(0.1)
        if not acknowledged.empty():
            # It came while one of these was arriving.
            assert acknowledged.get().error.code == FULL.value[0]
            begin()
    assert (
        "30.0 KiB were to be pushed at once, with 40.0 KiB of this session arriving already" in response.error.message
    )
    client.pushes.requests.put(pb.PushRequest(data=bytes((40 << 10) - 1)))
    assert not acknowledged.get(timeout=20).HasField("error")
    # The first has arrived, and there is room again.
    second.requests.put(pb.PushRequest(header=pb.PushHeader(chunks=[pb.ChunkRef()], chunk_bytes=[30 << 10], **staged)))
    second.requests.put(pb.PushRequest(data=bytes(30 << 10)))
    assert not next(second.call).HasField("error")
    second.requests.put(pb.PushRequest(header=pb.PushHeader(chunks=[pb.ChunkRef()], chunk_bytes=[65 << 10], **staged)))
    assert (
        "it may have 64.0 KiB on their way: start the server with a larger --max-inflight"
        in next(second.call).error.message
    )
    second.close()


@pytest.mark.parametrize("size", [30 << 20, MAX_MESSAGE_BYTES + 1])
def test_requests(address: str, other: Client, size: int) -> None:
    call = other.channel.unary_unary("/zero_ps.v1.ParameterServer/Heartbeat")
    assert error_of(lambda: call(bytes(size), timeout=30))[0] == FULL


def test_chunks(address: str, other: Client, job_name: str) -> None:
    client = open_session(address, job_name)
    large = pb.ParameterSpec(
        name="w", shape=[1 << 20, opening.MAX_CHUNKS + 1], dtype=1, kind=pb.ParameterSpec.KIND_PARAMETER
    )
    code, message = error_of(lambda: client.call("OpenJob", manifest=pb.Manifest(parameters=[large])))
    assert code == FULL, message
    assert f"of {opening.MAX_CHUNKS}; use more servers" in message


def test_staged_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_STAGED", 3)
    staged = staging.Staging(IN_MEMORY, ())
    for number in (0, 1, 2, 2):
        staged.put(7, number, Incoming(torch.zeros(1), None))
    with pytest.raises(ServerFull, match="3 chunks are staged, the most that a server may have of a job"):
        staged.put(7, 3, Incoming(torch.zeros(1), None))
    staged.clear()
    staged.put(7, 3, Incoming(torch.zeros(1), None))


def test_runs(address: str, other: Client, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    runs = pb.Runs(starts=[0] * (MAX_RUNS + 1), counts=[1] * (MAX_RUNS + 1))
    request_id = client.send_pull([0], parts=[runs])
    assert f"may name {MAX_RUNS} runs" in error_of(lambda: client.receive(request_id, 1))[1]


def test_what_was_gathered_at_barriers_is_forgotten() -> None:
    monitor = Monitor()
    sessions = Sessions("job", 60, SESSIONS, monitor, lambda session: None, lambda session: None)
    barriers = Barriers(sessions, monitor)
    with monitor:
        session = sessions.open(0, 1, "test", 1)
    payload = bytes(8 << 20)
    for number in range(20):
        barriers.gather(session, f"t{number}", payload, Patience.of(1))
    assert sum(len(payload) for each in barriers._gatherings.values() for payload in each.payloads.values()) <= 40 << 20
    assert barriers.gather(session, "t19", b"again", Patience.of(1)) == [payload]


def test_a_barrier_that_nobody_else_comes_to_goes_with_its_session(address: str, other: Client, job_name: str) -> None:
    for group in range(1, 4):
        client = open_session(address, job_name, 0, 2, group=group)
        for number in range(80):
            call = partial(client.call, "Barrier", tag=f"t{number}", timeout_seconds=0.0)
            code, _ = error_of(call)
            assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        client.close()
    both = [open_session(address, job_name, rank, 2, group=4) for rank in range(2)]
    first = both[0].stub.Barrier.future(
        pb.BarrierRequest(session_id=both[0].session_id, tag="t0", timeout_seconds=20, payload=b"0"), timeout=20
    )
    assert list(both[1].call("Barrier", tag="t0", timeout_seconds=20, payload=b"1").payloads) == [b"0", b"1"]
    first.result()


def test_links_that_are_prepared_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        kind = gloo.GlooKind("127.0.0.1")
    except LinkRefused as refused:
        pytest.skip(str(refused))

    def prepare(number: int) -> None:
        token = f"{number:032x}"
        kind.prepare(pb.PrepareLinkRequest(kind="gloo", token=token, host="127.0.0.1", address=b"nobody"))

    monkeypatch.setattr(pair, "_MAX_UNCLAIMED", 2)
    prepare(0)
    prepare(1)
    with pytest.raises(InvalidRequest, match="or too many are"):
        prepare(2)
    monkeypatch.setattr(pair, "_UNCLAIMED_SECONDS", 0.0)
    prepare(2)


def test_tags(server: LocalCluster, address: str, other: Client, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    path = Path(client.call("Commit", tag="first").path)
    for number in range(MAX_TAGS - 1):
        (path / f"tag-{number}").touch()
    code, message = error_of(lambda: client.call("Commit", tag="second"))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert f"has {MAX_TAGS} tags, the most it may have; take some away with 'zero-ps untag'" in message
    client.call("Commit", tag="7")


# ---------------------------------------------------------------- names


@contextmanager
def nothing_new_outside(folder: Path) -> Iterator[None]:
    def others() -> set[Path]:
        return {path for path in folder.parent.iterdir() if path != folder} | set(folder.glob("*"))

    before = others()
    yield
    assert others() == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/tmp/x",
        "a/b",
        "a\\b",
        "a\0b",
        "a\nb",
        ".hidden",
        "-x",
        "~",
        "%2e%2e",
        "x" * 101,
        "ä",
        "zero-ps.json",
    ],
)
def test_job_names(server: LocalCluster, address: str, other: Client, name: str) -> None:
    with nothing_new_outside(server.data_dirs[0]):
        code, message = error_of(lambda: open_session(address, name))
    assert code == INVALID and "is not valid" in message


@pytest.mark.parametrize("name", ["c", "0", "tag-x", "a b", "weight", "x" * 200])
def test_parameters_with_the_names_of_files_are_stored(address: str, other: Client, job_name: str, name: str) -> None:
    value = {name: torch.arange(8.0)}
    (client,) = start_job(address, value, job=job_name)
    client.call("Commit")
    client.call("Restore")
    client.set_optimizer()
    assert torch.equal(client.pull(0), value[name])
    assert client.opened.link == "grpc"
    client.close()


def test_names_in_a_manifest_are_of_limited_length(address: str, other: Client, job_name: str) -> None:
    client = open_session(address, job_name)
    for name in ("x" * 201, "é" * 130, "../w", "a/b", "zarr.json"):
        stated = spec("w", W["w"])
        stated.name = name
        call = partial(client.call, "OpenJob", manifest=pb.Manifest(parameters=[stated]))
        assert error_of(call)[0] == INVALID
