"""Requests that no trainer would send get a proper status, and change nothing."""

from collections.abc import Iterator

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import MAX_MANIFEST_PARAMETERS
from protos import zero_ps_pb2 as pb
from protos.values import encode_options
from ps import LocalCluster
from ps.plan import MAX_USES
from tests.ps.client import Client, StreamError, error_of, spec, start_job

INVALID = grpc.StatusCode.INVALID_ARGUMENT
SGD = {"class_name": "SGD", "groups": [pb.OptimizerGroup(parameters=[0])]}
W = {"w": torch.arange(4.0), "n": torch.arange(3)}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with LocalCluster(1, lease=60) as cluster:
        yield cluster.addresses[0]


def manifest(**changes) -> pb.Manifest:
    stated = spec("w", torch.zeros(4))
    for name, value in changes.items():
        if name == "shape":
            stated.shape[:] = value
        else:
            setattr(stated, name, value)
    return pb.Manifest(parameters=[stated])


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (manifest(name=""), "cannot be stored"),
        (manifest(name="../w"), "cannot be stored"),
        (manifest(name="a/b"), "cannot be stored"),
        (manifest(name="x" * 1000), "cannot be stored"),
        (manifest(shape=[-1]), "cannot have the shape"),
        (manifest(shape=[1 << 40, 1 << 40]), "cannot have the shape"),
        (manifest(shape=[1] * 65), "cannot have the shape"),
        (manifest(shape=[1 << 46]), "chunks"),
        (manifest(dtype=99), "dtype code 99"),
        (manifest(dtype=0), "dtype code 0"),
        (manifest(kind=0), "unknown kind"),
        (manifest(kind=9), "unknown kind"),
        (manifest(dtype=pb.DTYPE_BFLOAT16), "stored in float32 or float64"),
        (manifest(dtype=pb.DTYPE_INT64), "stored in float32 or float64"),
        (pb.Manifest(parameters=[spec("w", torch.zeros(1))] * 2), "in the manifest twice"),
        (
            pb.Manifest(parameters=[pb.ParameterSpec()] * (MAX_MANIFEST_PARAMETERS + 1)),
            "a manifest may have",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_manifests(address: str, job_name: str, stated: pb.Manifest, words: str) -> None:
    client = Client(address, job=job_name)
    code, message = error_of(lambda: client.call("OpenJob", manifest=stated))
    assert code == INVALID
    assert words in message
    assert Client(address, job=job_name).opened.step == -1


@pytest.fixture
def client(address: str, job_name: str) -> Client:
    (client,) = start_job(address, {"w": W["w"]}, job=job_name, lr=1.0)
    return client


@pytest.mark.parametrize(
    ("method", "fields", "code"),
    [
        ("ZeroGrad", {"parameters": [7]}, INVALID),
        ("ZeroGrad", {"step": -1}, grpc.StatusCode.FAILED_PRECONDITION),
        ("GradNorm", {"parameters": [1 << 31], "norm_type": 2.0}, INVALID),
        ("GradNorm", {"norm_type": float("nan")}, INVALID),
        ("GradNorm", {"norm_type": 2.0, "timeout_seconds": -1.0}, INVALID),
        ("GradNorm", {"norm_type": 2.0, "timeout_seconds": float("nan")}, INVALID),
        ("GradNorm", {"norm_type": 2.0, "step": 1 << 62}, grpc.StatusCode.FAILED_PRECONDITION),
        ("Step", {}, INVALID),
        ("Step", {"groups": [pb.OptimizerGroup(options=encode_options({"lr": -1.0}))]}, INVALID),
        ("Step", {"groups": [pb.OptimizerGroup(options=encode_options({"lr": "x"}))]}, INVALID),
        ("Step", {"groups": [pb.OptimizerGroup(options=encode_options({"__class__": 1}))]}, INVALID),
        ("Step", {"groups": [pb.OptimizerGroup()] * 2}, INVALID),
        ("Step", {"groups": [pb.OptimizerGroup()], "edits": [pb.GradEdit(parameters=[9])]}, INVALID),
        ("Step", {"groups": [pb.OptimizerGroup()], "edits": [pb.GradEdit()]}, INVALID),
        ("Step", {"groups": [pb.OptimizerGroup()], "step": -5}, grpc.StatusCode.FAILED_PRECONDITION),
        ("Plan", {"uses": [pb.PlannedUse(kind=pb.PlannedUse.KIND_PULL, parameter=2)]}, INVALID),
        ("Plan", {"uses": [pb.PlannedUse(parameter=0)]}, INVALID),
        ("Plan", {"uses": [pb.PlannedUse(kind=9, parameter=0)]}, INVALID),  # type: ignore[arg-type]
        ("Plan", {"uses": [pb.PlannedUse(kind=pb.PlannedUse.KIND_PULL)] * (MAX_USES + 1)}, INVALID),
        ("Commit", {"step": -1}, grpc.StatusCode.OUT_OF_RANGE),
        ("Commit", {"timeout_seconds": -1.0}, INVALID),
        ("Commit", {"commit_id": ""}, INVALID),
        ("Commit", {"commit_id": "A"}, INVALID),
        ("Commit", {"commit_id": "../a"}, INVALID),
        ("Commit", {"commit_id": "a" * 65}, INVALID),
        ("Commit", {"complete": pb.CommittedGeneration()}, INVALID),
        ("Commit", {"complete": pb.CommittedGeneration(step=1, commit_id="a")}, INVALID),
        ("Restore", {"commit_id": ""}, INVALID),
        ("Restore", {"commit_id": "a/b"}, INVALID),
        ("Restore", {"restore_id": ""}, INVALID),
        ("Restore", {"restore_id": "x"}, INVALID),
        ("Restore", {"step": -1}, grpc.StatusCode.FAILED_PRECONDITION),
        ("Restore", {"step": 1 << 62}, grpc.StatusCode.FAILED_PRECONDITION),
        ("Barrier", {"tag": ""}, INVALID),
        ("Barrier", {"tag": "x" * 1000}, INVALID),
        ("Barrier", {"tag": "t", "payload": bytes(17 << 20)}, INVALID),
        ("ListState", {"parameters": [9]}, INVALID),
        ("ListState", {"version": -1}, grpc.StatusCode.FAILED_PRECONDITION),
        ("ListState", {"version": 1, "timeout_seconds": 0.1}, grpc.StatusCode.DEADLINE_EXCEEDED),
        ("ListState", {"timeout_seconds": -1.0}, INVALID),
        ("ClearState", {}, INVALID),
        ("ClearState", {"parameters": [9]}, INVALID),
        ("ClearState", {"parameters": [0], "step": 5}, grpc.StatusCode.FAILED_PRECONDITION),
        ("GradNorm", {"norm_type": 2.0, "edits": [pb.GradEdit(parameters=[9], scale=1.0)]}, INVALID),
        ("GradNorm", {"norm_type": 2.0, "edits": [pb.GradEdit(parameters=[0])]}, INVALID),
        ("SetOptimizer", SGD | {"ema_decay": 1.5}, INVALID),
        ("SetOptimizer", SGD | {"ema_decay": float("nan")}, INVALID),
        ("SetOptimizer", SGD | {"gradient_reduction": 9}, INVALID),
        ("SetOptimizer", SGD | {"trained": [1]}, INVALID),
        ("SetOptimizer", {"class_name": "SGD"}, INVALID),
        ("SetOptimizer", {"class_name": "SGD", "groups": [pb.OptimizerGroup(parameters=[5])]}, INVALID),
    ],
)
def test_calls(client: Client, method: str, fields: dict, code: grpc.StatusCode) -> None:
    assert error_of(lambda: client.call(method, **fields))[0] == code
    assert torch.equal(client.pull(0), W["w"])


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": 0},
        {"kind": 77},
        {"kind": pb.PushHeader.KIND_GRADIENT, "dtype": 0},
        {"kind": pb.PushHeader.KIND_GRADIENT, "dtype": pb.DTYPE_INT64},
        {"kind": pb.PushHeader.KIND_GRADIENT, "dtype": 55},
        {"kind": pb.PushHeader.KIND_GRADIENT, "chunks": [pb.ChunkRef(parameter=4)]},
        {"kind": pb.PushHeader.KIND_GRADIENT, "chunks": [pb.ChunkRef(chunk=4)]},
        {"kind": pb.PushHeader.KIND_GRADIENT, "chunks": [pb.ChunkRef()] * 2},
        {"kind": pb.PushHeader.KIND_WEIGHT, "dtype": pb.DTYPE_BOOL},
        {"kind": pb.PushHeader.KIND_STATE},
        {"kind": pb.PushHeader.KIND_STATE, "array": "exp_avg"},
        {"kind": pb.PushHeader.KIND_STATE, "array": "../weight", "chunks": [pb.ChunkRef(chunk=4)]},
        {"kind": pb.PushHeader.KIND_STAGED},
        {"kind": pb.PushHeader.KIND_STAGED, "chunk_bytes": [3]},
        {"kind": pb.PushHeader.KIND_STAGED, "chunk_bytes": [1 << 60]},
        {"kind": pb.PushHeader.KIND_STAGED, "chunk_bytes": [4], "dtype": 0},
    ],
)
def test_pushes(client: Client, fields: dict) -> None:
    header = {"dtype": pb.DTYPE_FLOAT32, "chunks": [pb.ChunkRef()], "session_id": client.session_id, **fields}
    client.pushes.requests.put(pb.PushRequest(header=pb.PushHeader(request_id=5, **header)))
    client.pushes.requests.put(pb.PushRequest(data=bytes(16)))
    response = next(client.pushes.call)
    assert (response.request_id, response.error.code) == (5, INVALID.value[0])
    client.step(0)
    assert torch.equal(client.pull(0, version=1), W["w"])


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"version": -1}, INVALID),
        ({"dtype": pb.DTYPE_INT8}, INVALID),
        ({"dtype": 44}, INVALID),
        ({"timeout_seconds": -1.0}, INVALID),
        ({"chunks": [pb.ChunkRef(parameter=9)]}, INVALID),
        ({"chunks": [pb.ChunkRef(chunk=9)]}, INVALID),
        ({"chunks": [pb.ChunkRef()] * 2}, INVALID),
        ({"staged": True}, INVALID),
        ({"array": "exp_avg"}, INVALID),
        ({"array": "../weight"}, INVALID),
        ({"array": "ema"}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"session_id": "x"}, grpc.StatusCode.NOT_FOUND),
        ({"version": 1 << 62}, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_pulls(client: Client, fields: dict, code: grpc.StatusCode) -> None:
    request = {"session_id": client.session_id, "chunks": [pb.ChunkRef()], **fields}
    client.pulls.requests.put(pb.PullRequest(request_id=5, **request))
    response = next(client.pulls.call)
    assert (response.request_id, response.error.code) == (5, code.value[0])
    assert torch.equal(client.pull(0), W["w"])


def test_what_is_not_floating_travels_only_as_it_is(address: str, job_name: str) -> None:
    (client,) = start_job(address, W, job=job_name)
    assert torch.equal(client.pull(1), W["n"])
    with pytest.raises(StreamError, match="'n' is stored as int64 and cannot travel as float32"):
        client.pull(1, dtype=torch.float32)


def test_a_session_without_a_job(address: str, job_name: str) -> None:
    client = Client(address, job=job_name)
    client.manifest = manifest()
    for action in (
        lambda: client.pull(0),
        lambda: client.push_gradient(0, torch.zeros(4)),
        lambda: client.call("Step"),
        lambda: client.call("ZeroGrad"),
        lambda: client.call("GradNorm", norm_type=2.0),
        lambda: client.call("SetOptimizer", class_name="SGD"),
        lambda: client.call("Commit"),
    ):
        code, message = error_of(action)
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "has no state on this server yet" in message


METHODS = ("OpenSession", "Heartbeat", "CloseSession", "Barrier", "Restore", "OpenJob")
METHODS += ("SetOptimizer", "ZeroGrad", "GradNorm", "Step", "Commit")
SANE = set(grpc.StatusCode) - {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.OK}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(METHODS), raw=st.binary(max_size=200), ours=st.booleans())
def test_any_bytes_get_a_proper_status(client: Client, method: str, raw: bytes, ours: bool) -> None:
    """Raw bytes as a request, with or without the id of a living session before them."""
    prefix = getattr(pb, f"{method}Request")()
    if ours and method not in ("OpenSession", "CloseSession"):
        prefix.session_id = client.session_id
    call = client.channel.unary_unary(f"/zero_ps.v1.ParameterServer/{method}", _registered_method=False)
    try:
        call(prefix.SerializeToString() + raw, timeout=20)
    except grpc.RpcError as error:
        # What is no message at all fails in gRPC's own decoding, which calls that internal.
        decoding = error.code() == grpc.StatusCode.INTERNAL and "deserializing" in error.details()
        assert error.code() in SANE or decoding, error
    client.call("Heartbeat")
    assert client.pull(0).shape == (4,)
