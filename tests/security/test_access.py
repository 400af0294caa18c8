"""Every call, by everybody who may come."""

import itertools
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import PROTOCOL_VERSION, SESSION_METADATA, zero_ps_pb2_grpc
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from ps.access import CALLS, Of
from tests.security.conftest import Files
from tests.security.tokens import TOKENS, WRONG

TIMEOUT = 20.0
DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["ParameterServer"].methods]

READERS_MAY = {
    *("Status", "PrepareLink", "OpenSession", "Heartbeat", "CloseSession"),
    *("OpenJob", "Restore", "Pull", "Plan", "ListState"),
}
TRAINERS_ALONE_MAY = {
    *(
        "JoinGroup",
        "EndGroup",
        "Barrier",
        "SetOptimizer",
        "Push",
        "ZeroGrad",
        "GradNorm",
        "Step",
        "AnnounceStep",
        "Commit",
        "ClearState",
    ),
}

_incarnations, _groups = itertools.count(), itertools.count(1, 1000)


class Caller:
    """One who calls a server, with the token of somebody or another."""

    def __init__(self, channel: grpc.Channel, token: str | None) -> None:
        self.channel = channel
        self.stub = zero_ps_pb2_grpc.ParameterServerStub(channel)
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)

    def open(self, job: str, *, read_only: bool = False) -> str:
        """The id of a session."""
        return self.stub.OpenSession(opening(job, read_only), timeout=TIMEOUT, metadata=self.metadata).session_id

    def call(self, method: str, session_id: str, job: str = "open-a", **fields: object) -> grpc.StatusCode:
        """The status of a call that is well-formed as far as rights go. A stream's error is its own or an answer's."""
        if method == "OpenSession":
            request = opening(job, bool(fields.get("read_only")))
        elif method == "JoinGroup":
            request = joining(job)
        elif method == "Push":
            request = pb.PushRequest(header=pb.PushHeader(session_id=session_id, kind=1, **fields))
        else:
            message = getattr(pb, f"{method}Request")
            named = {"session_id": session_id} if "session_id" in message.DESCRIPTOR.fields_by_name else {}
            request = message(**named, **fields)
        try:
            if method in ("Pull", "Push"):
                call = getattr(self.stub, method)(iter([request]), timeout=TIMEOUT, metadata=self.metadata)
                for response in call:
                    if response.HasField("error"):
                        return next(code for code in grpc.StatusCode if code.value[0] == response.error.code)
            else:
                getattr(self.stub, method)(request, timeout=TIMEOUT, metadata=self.metadata)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def opening(job: str, read_only: bool) -> pb.OpenSessionRequest:
    return pb.OpenSessionRequest(
        protocol_version=PROTOCOL_VERSION,
        job=job,
        rank=0,
        world_size=1,
        incarnation=f"test-{next(_incarnations)}",
        read_only=read_only,
        shard=0,
        num_shards=2,
        timeout_seconds=5,
        group=0 if read_only else next(_groups),
    )


def joining(job: str) -> pb.JoinGroupRequest:
    return pb.JoinGroupRequest(
        protocol_version=PROTOCOL_VERSION,
        job=job,
        rank=0,
        world_size=1,
        incarnation=f"test-{next(_incarnations)}",
        shard=0,
        num_shards=2,
        timeout_seconds=5,
    )


@pytest.fixture(scope="module")
def callers(secured: LocalCluster, files: Files) -> Iterator[dict[str, Caller]]:
    with files.credentials().open_channel(secured.addresses[0]) as channel:
        found = {who: Caller(channel, token) for who, (token, _) in TOKENS.items()}
        found["nobody"] = Caller(channel, None)
        found["wrong"] = Caller(channel, WRONG)
        # Jobs that others may read.
        for job in ("open-a", "closed-a"):
            found["admin"].open(job)
        yield found


def test_every_call_has_a_row() -> None:
    assert set(CALLS) == set(METHODS)
    assert set(METHODS) == READERS_MAY | TRAINERS_ALONE_MAY, "say here, too, who may make a new call"


@pytest.mark.parametrize("method", METHODS)
def test_what_a_row_looks_at_is_in_the_request(method: str) -> None:
    field = {Of.SOME_JOB: None, Of.NEW_SESSION: "job", Of.SESSION: "session_id"}[CALLS[method].of]
    request = pb.PushHeader if method == "Push" else getattr(pb, f"{method}Request")
    named = {name for name in ("session_id", "job") if name in request.DESCRIPTOR.fields_by_name}
    assert named == ({field} if field else set())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("who", ["nobody", "wrong"])
def test_without_a_token_that_is_known_nothing_is_answered(callers: dict[str, Caller], method: str, who: str) -> None:
    session = callers["train"].open("open-b")
    assert callers[who].call(method, session) == UNKNOWN
    assert callers[who].call(method, "no such session") == UNKNOWN


@pytest.mark.parametrize("method", METHODS)
def test_a_reader_may_read(callers: dict[str, Caller], method: str) -> None:
    session = callers["reader"].open("open-a", read_only=True)
    code = callers["reader"].call(method, session, read_only=True) if method == "OpenSession" else None
    code = code or callers["reader"].call(method, session)
    assert (code not in (DENIED, UNKNOWN)) == (method in READERS_MAY), code


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("who", ["train", "admin"])
def test_a_trainer_may_train(callers: dict[str, Caller], method: str, who: str) -> None:
    session = callers[who].open("open-c")
    assert callers[who].call(method, session, job="open-c") not in (DENIED, UNKNOWN)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "JoinGroup"])
def test_a_read_only_session_reads_whatever_its_token_could_do(callers: dict[str, Caller], method: str) -> None:
    session = callers["admin"].open("open-a", read_only=True)
    code = callers["admin"].call(method, session, job="open-d")
    assert (code not in (DENIED, UNKNOWN)) == (method in READERS_MAY), code


@pytest.mark.parametrize("method", [name for name in METHODS if CALLS[name].of is Of.SESSION])
@pytest.mark.parametrize("thief", ["reader", "other", "admin"])
def test_a_session_is_of_no_use_to_another_token(callers: dict[str, Caller], method: str, thief: str) -> None:
    session = callers["train"].open("open-e")
    assert callers[thief].call(method, session) == DENIED
    # And it is still there.
    assert callers["train"].call("Heartbeat", session) == grpc.StatusCode.OK


def test_a_session_that_was_begun_in_a_group_is_completed_with_the_same_token(callers: dict[str, Caller]) -> None:
    train, admin = callers["train"], callers["admin"]
    asked = joining("open-g")
    joined = train.stub.JoinGroup(asked, timeout=TIMEOUT, metadata=train.metadata)
    request = opening("open-g", read_only=False)
    request.incarnation, request.group = asked.incarnation, joined.group
    with pytest.raises(grpc.RpcError) as error:
        admin.stub.OpenSession(request, timeout=TIMEOUT, metadata=admin.metadata)
    assert error.value.code() == DENIED and "was begun with another token" in error.value.details()
    assert train.call("Heartbeat", joined.session_id) == grpc.StatusCode.OK
    assert admin.call("Heartbeat", joined.session_id) == DENIED


@pytest.mark.parametrize("method", ["Pull", "Push"])
def test_a_stream_cannot_be_begun_in_the_name_of_anothers_session(callers: dict[str, Caller], method: str) -> None:
    """Nor take one of the places that a session has for its streams."""
    session = callers["train"].open("open-f")
    thief = callers["other"]
    with pytest.raises(grpc.RpcError) as error:
        call = getattr(thief.stub, method)
        next(call(iter([]), timeout=TIMEOUT, metadata=[*thief.metadata, (SESSION_METADATA, session)]))
    assert error.value.code() == DENIED


def test_what_cannot_be_read_is_refused_before_it_is_looked_at(callers: dict[str, Caller]) -> None:
    """Who has no token learns nothing of it; who has one learns what is wrong."""
    raw = callers["nobody"].channel.unary_unary("/zero_ps.v1.ParameterServer/OpenJob", bytes, bytes)
    for who, code in (("nobody", UNKNOWN), ("train", grpc.StatusCode.INVALID_ARGUMENT)):
        with pytest.raises(grpc.RpcError) as error:
            raw(b"\xff" * 100, timeout=TIMEOUT, metadata=callers[who].metadata)
        assert error.value.code() == code


def test_a_call_that_does_not_exist_is_said_not_to(callers: dict[str, Caller]) -> None:
    for service, codes in (
        ("zero_ps.v1.ParameterServer", {"train": grpc.StatusCode.UNIMPLEMENTED}),
        ("zero_ps.v1.Other", {"train": DENIED, "admin": grpc.StatusCode.UNIMPLEMENTED}),
    ):
        raw = callers["nobody"].channel.unary_unary(f"/{service}/Nothing", bytes, bytes)
        for who, code in {"nobody": UNKNOWN, **codes}.items():
            with pytest.raises(grpc.RpcError) as error:
                raw(b"", timeout=TIMEOUT, metadata=callers[who].metadata)
            assert error.value.code() == code


@pytest.mark.parametrize(
    ("who", "job", "read_only", "allowed"),
    [
        ("reader", "open-a", True, True),
        ("reader", "open-a", False, False),
        ("reader", "closed-a", True, False),
        ("reader", "Open-a", True, False),
        ("reader", "xopen-a", True, False),
        ("reader", "../open-a", True, False),
        ("other", "other-a", False, True),
        ("other", "open-a", False, False),
        ("other", "open-a", True, False),
        ("other", "", False, False),
        ("other", "other-*", False, None),
        ("other", "other-/../open-a", False, None),
    ],
)
def test_rights_are_for_jobs_that_match(
    callers: dict[str, Caller], who: str, job: str, read_only: bool, allowed: bool | None
) -> None:
    """None: the token has the right, and no job can have the name."""
    code = callers[who].call("OpenSession", "", job=job, read_only=read_only)
    assert code == {True: grpc.StatusCode.OK, False: DENIED, None: grpc.StatusCode.INVALID_ARGUMENT}[allowed]


def test_status_lists_what_the_caller_may_read(callers: dict[str, Caller]) -> None:
    def jobs(who: str) -> set[str]:
        status = callers[who].stub.Status(pb.StatusRequest(), timeout=TIMEOUT, metadata=callers[who].metadata)
        assert status.protocol_version == PROTOCOL_VERSION
        return {job.name for job in status.jobs}

    callers["admin"].open("closed-a")
    callers["admin"].open("open-a")
    assert {"open-a", "closed-a"} <= jobs("admin")
    assert "open-a" in jobs("reader") and not [name for name in jobs("reader") if not name.startswith("open-")]
    assert not [name for name in jobs("other") if not name.startswith("other-")]


def test_errors_say_what_is_missing_and_no_token(callers: dict[str, Caller]) -> None:
    with pytest.raises(grpc.RpcError) as error:
        callers["reader"].open("open-a")
    assert "OpenSession takes the right 'train' on job 'open-a'" in error.value.details()
    with pytest.raises(grpc.RpcError) as error:
        callers["nobody"].open("open-a")
    assert "token_file" in error.value.details() and "--token-file" in error.value.details()
    with pytest.raises(grpc.RpcError) as error:
        callers["wrong"].open("open-a")
    assert "does not know this token" in error.value.details() or "does not know the token" in error.value.details()
    assert WRONG not in error.value.details()


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", TOKENS["admin"][0])],
        [("authorization", f"Basic {TOKENS['admin'][0]}")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {TOKENS['admin'][0]} {TOKENS['admin'][0]}")],
        [("authorization", f"Bearer {TOKENS['admin'][0]}x")],
        [("authorization", f"Bearer {TOKENS['admin'][0][:-1]}")],
        [("authorization", f"Bearer {TOKENS['admin'][0]}"), ("authorization", f"Bearer {TOKENS['train'][0]}")],
        [("authorization-bin", TOKENS["admin"][0].encode())],
        [("token", TOKENS["admin"][0])],
    ],
)
def test_what_is_nearly_a_token_is_none(callers: dict[str, Caller], metadata: list) -> None:
    with pytest.raises(grpc.RpcError) as error:
        callers["admin"].stub.Status(pb.StatusRequest(), timeout=TIMEOUT, metadata=metadata)
    assert error.value.code() == UNKNOWN


def test_to_watch_health_takes_any_token(callers: dict[str, Caller]) -> None:
    """Unlike a check it goes on, and takes a place among the server's calls meanwhile."""
    for who, code in (("nobody", UNKNOWN), ("wrong", UNKNOWN), ("other", None)):
        watch = health_pb2_grpc.HealthStub(callers[who].channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=TIMEOUT, metadata=callers[who].metadata
        )
        if code is None:
            assert next(watch).status == 1
            watch.cancel()
            continue
        with pytest.raises(grpc.RpcError) as error:
            next(watch)
        assert error.value.code() == code


def test_health_needs_no_token_and_reflection_an_administrator(callers: dict[str, Caller]) -> None:
    channel = callers["nobody"].channel
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT).status == 1
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    def services(who: str) -> list[str]:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT, metadata=callers[who].metadata)
        return [service.name for service in answer.list_services_response.service]

    assert "zero_ps.v1.ParameterServer" in services("admin")
    for who, code in (("nobody", UNKNOWN), ("wrong", UNKNOWN), ("reader", DENIED), ("train", DENIED)):
        with pytest.raises(grpc.RpcError) as error:
            services(who)
        assert error.value.code() == code


def test_the_log_tells_of_strangers_and_no_token(callers: dict[str, Caller], secured: LocalCluster) -> None:
    for who in ("nobody", "wrong"):
        callers[who].call("Status", "")
    log = secured.log(0)
    assert "without a valid token" in log
    assert not [token for token, _ in TOKENS.values() if token in log] and WRONG not in log


@pytest.mark.parametrize("method", METHODS)
def test_a_certificate_that_has_expired_lets_nobody_in(
    expired: Caller, callers: dict[str, Caller], method: str
) -> None:
    assert expired.call(method, "") == grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def expired(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """An administrator whose certificate is over; another one of the same authority is let in."""
    folder = tmp_path_factory.mktemp("expired")
    for name in ("ca.crt", "server.crt", "server.key"):
        (folder / name).write_bytes((files.other / name).read_bytes())
    (folder / "server.key").chmod(0o600)
    with LocalCluster(1, tls=folder, tokens=files.tokens) as cluster:
        ours = {"ca": folder / "ca.crt", "cert": files.other / "client.crt", "key": files.other / "client.key"}
        with files.credentials("admin", **ours).open_channel(cluster.addresses[0]) as channel:
            assert Caller(channel, TOKENS["admin"][0]).call("Status", "") == grpc.StatusCode.OK
        ours |= {"cert": files.other / "expired-client.crt", "key": files.other / "expired-client.key"}
        with files.credentials("admin", **ours).open_channel(cluster.addresses[0]) as channel:
            yield Caller(channel, TOKENS["admin"][0])
