"""Messages that no trainer would send, thousands of them: `python -m tests.garbage --cases 12000`.

Every call of the service, found in its descriptor, gets messages with anything in their fields, bytes that are no
message, messages that are too large, and messages of another time: repeated, late, too early. The port gets bytes
that are no HTTP/2, and connections that say nothing. Another job trains before and after; it has to have the very
same state, every answer has to have a proper status, and the server as much memory, threads and files as before.
"""

import argparse
import contextlib
import hashlib
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import hypothesis
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from protos import PROTOCOL_VERSION
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from tests.ps.client import Client

SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServer"]
UNARY = [method for method in SERVICE.methods if not method.client_streaming]
STREAMS = [method for method in SERVICE.methods if method.client_streaming]

IMPROPER = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE}
"""What says that the server is at fault."""

_OWN = "<its own session>"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CALL_SECONDS = 1.0

F = FieldDescriptor
_INTEGERS = {
    F.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    F.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    F.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    F.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
_WORDS = [
    "",
    "a",
    "zarr.json",
    "SGD",
    "AdamW",
    "lr",
    "betas",
    "exp_avg",
    "ema",
    "grpc",
    "shm",
    "gloo",
    "x" * 300,
    "../x",
    "a\0b",
]


_LIKELY: dict[str, list[Any]] = {
    "protocol_version": [PROTOCOL_VERSION] * 4 + [0, 99],
    "shard": [0] * 4 + [1, (1 << 32) - 1],
    "num_shards": [1] * 4 + [0, 2],
    "rank": [0, 0, 1, (1 << 32) - 1],
    "world_size": [1, 1, 2, 0, 100, (1 << 32) - 1],
    "class_name": ["SGD", "AdamW", "", "torch.optim.SGD", "__class__"],
    "kind": [0, 1, 2, 3, 4, 99],
}
"""So that what comes after the first checks is reached, too. A field of text or message is left alone."""


# ---------------------------------------------------------------- cases


def messages(descriptor: Any, sessions: Sequence[str], job: str, depth: int = 0) -> st.SearchStrategy[dict]:
    """Fields of a message, as its constructor takes them."""
    fields = {
        each.name: _values(each, sessions, job, depth)
        for each in descriptor.fields
        if each.message_type is None or depth < 4
    }
    some = st.fixed_dictionaries({}, optional=fields)
    if "session_id" in fields:
        # Most of what there is to find stands behind the check of the session.
        return st.builds(lambda known, id: {**known, "session_id": id}, some, fields["session_id"])
    return some


def _values(each: Any, sessions: Sequence[str], job: str, depth: int) -> st.SearchStrategy:
    entry = each.message_type
    if entry is not None and entry.GetOptions().map_entry:
        return st.dictionaries(
            _value(entry.fields_by_name["key"], sessions, job, depth),
            _value(entry.fields_by_name["value"], sessions, job, depth),
            max_size=3,
        )
    one = _value(each, sessions, job, depth)
    return st.lists(one, max_size=4) if each.is_repeated else one


def _value(each: Any, sessions: Sequence[str], job: str, depth: int) -> st.SearchStrategy:
    kind = each.cpp_type
    if each.name == "session_id":
        return st.sampled_from(sessions)
    if each.name in _LIKELY and (kind == F.CPPTYPE_STRING) == isinstance(_LIKELY[each.name][0], str):
        return st.sampled_from(_LIKELY[each.name])
    if each.name == "job":
        return st.sampled_from([job, f"{job}-2", "..", "x" * 101])
    if each.name == "timeout_seconds":
        return st.sampled_from([0.0, 0.01, 0.02, -1.0, float("nan"), float("-inf")])
    if kind in _INTEGERS:
        low, high = _INTEGERS[kind]
        return st.one_of(st.integers(0, 3), st.sampled_from([low, high, high - 1]), st.integers(low, high))
    if kind in (F.CPPTYPE_DOUBLE, F.CPPTYPE_FLOAT):
        return st.one_of(st.sampled_from([0.0, 0.1, 1.0, -1.0, 2.0]), st.floats())
    if kind == F.CPPTYPE_BOOL:
        return st.booleans()
    if kind == F.CPPTYPE_ENUM:
        return st.one_of(st.integers(0, 12), st.integers(-(1 << 31), (1 << 31) - 1))
    if kind == F.CPPTYPE_STRING:
        if each.type == F.TYPE_BYTES:
            return st.binary(max_size=64)
        return st.one_of(st.sampled_from(_WORDS), st.from_regex(r"[0-9a-f]{1,32}", fullmatch=True), st.text(_TEXT))
    return messages(each.message_type, sessions, job, depth + 1)


_TEXT = st.characters(exclude_categories=["Cs"])


@dataclass
class Tally:
    """What was sent, and what came of it."""

    cases: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.cases.items())
        codes = ", ".join(f"{code} {count}" for code, count in self.codes.most_common())
        return f"{self.cases.total()} cases: {kinds}; answered with {codes}"

    def answered(self, kind: str, code: grpc.StatusCode, what: str) -> None:
        self.cases[kind] += 1
        self.code(code, what)

    def code(self, code: grpc.StatusCode, what: str) -> None:
        self.codes[code.name] += 1
        assert code not in IMPROPER, what


# ---------------------------------------------------------------- what must not change


class Bystander:
    """A job that trains, is looked at, and trains again. It keeps the messages that it sent."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.address = cluster.addresses[0]
        first = self._begin()
        self._steps(first, 0, 2)
        first.call("Commit", step=2)
        self.ended = first.session_id
        first.close()
        self.client = self._begin()
        self._steps(self.client, 2, 2)
        self.client.call("Commit", step=4)

    def _begin(self) -> Client:
        client = Client(self.address, job="bystander")
        client.open_job({"w": torch.arange(3000.0), "b": torch.zeros(7)})
        if client.opened.step < 0:
            client.push_weight(0, torch.arange(3000.0))
            client.push_weight(1, torch.zeros(7))
        client.set_optimizer("AdamW", lr=0.1)
        return client

    def _steps(self, client: Client, first: int, count: int) -> None:
        for step in range(first, first + count):
            client.push_gradient(0, torch.full((3000,), 1.0 + step), step=step)
            client.push_gradient(1, torch.full((7,), 1.0 + step), step=step)
            client.step(step)
            client.pull(0, version=step + 1)
            client.call("ZeroGrad", step=step + 1)

    def goes_on(self, step: int) -> None:
        """It trains as if nothing had been."""
        self._steps(self.client, step, 1)

    def state(self) -> dict[str, Any]:
        status = self.client.stub.Status(pb.StatusRequest(), timeout=20)
        (job,) = [job for job in status.jobs if job.name == "bystander"]
        for session in job.sessions:
            session.seconds_since_heartbeat = 0.0
        folder = self._cluster.data_dirs[0] / "bystander"
        arrays = {"weight": self.client.pull(0, version=job.step), "bias": self.client.pull(1, version=job.step)}
        listed = self.client.call("ListState", version=job.step)
        return {
            "status": str(job),
            "arrays": {name: value.numpy().tobytes() for name, value in arrays.items()},
            "state": str(listed),
            "files": {
                str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
            },
            "folders": sorted(
                path.name for path in self._cluster.data_dirs[0].iterdir() if not path.name.startswith("g")
            ),
        }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Held:
    """What a process has: bytes in memory, threads, open files."""

    rss: int
    threads: int
    files: int

    @staticmethod
    def by(pid: int) -> "Held":
        status = Path(f"/proc/{pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return Held(
            int(lines["VmRSS"].split()[0]) << 10, int(lines["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir()))
        )

    def __str__(self) -> str:
        return f"{self.rss / (1 << 20):.0f} MiB, {self.threads} threads, {self.files} files"


# ---------------------------------------------------------------- sending


class Attack:
    """Sends cases to one server, of which it has a session in a job of its own."""

    def __init__(self, bystander: Bystander, seed: int) -> None:
        self.bystander = bystander
        self.address = bystander.address
        self.tally = Tally()
        self.random = random.Random(seed)
        self._seed = seed
        self.own = Client(self.address, job="garbage")
        self.own.open_job({"w": torch.zeros(100)})
        self.own.push_weight(0, torch.zeros(100))
        self.own.set_optimizer("SGD", lr=0.1)
        self.channel = self.own.channel

    def everything(self, cases: int) -> None:
        """At least so many, a share of each kind."""
        self.fields(cases * 4 // 10)
        self.streams(cases * 2 // 10)
        self.bytes(cases * 2 // 10)
        self.other_times(cases // 10)
        self.oversized()
        self.port(cases - self.tally.cases.total())

    # A session of the attacker's, one that has ended, none.
    def _sessions(self) -> list[str]:
        return [_OWN, _OWN, _OWN, _OWN, self.bystander.ended, "", "no-such-session", "x" * 5000]

    def _given(self, cases: int, strategy: st.SearchStrategy, send: Callable[[Any], None]) -> None:
        @hypothesis.seed(self._seed)
        @hypothesis.settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(strategy)
        def run(case: Any) -> None:
            send(case)

        run()

    def fields(self, cases: int) -> None:
        """Messages with anything in their fields."""
        for number, method in enumerate(UNARY):
            share = cases * (number + 1) // len(UNARY) - cases * number // len(UNARY)
            request = GetMessageClass(method.input_type)
            self._given(
                share,
                messages(method.input_type, self._sessions(), "garbage"),
                lambda fields, request=request, name=method.name: self._unary(
                    "fields", name, self._built(request, fields).SerializeToString()
                ),
            )

    def bytes(self, cases: int) -> None:
        """Bytes that are no message, or the beginning of one, for any session, the bystander's, too."""
        names = [method.name for method in SERVICE.methods]

        def send(case: tuple[str, bytes, bool]) -> None:
            name, raw, ours = case
            # No field has the wire type 7.
            raw += b"\x0f"
            named = pb.HeartbeatRequest(session_id=self.bystander.client.session_id).SerializeToString() + raw
            if ours and not _understood(name, named):
                raw = named
            if name in ("Pull", "Push"):
                self._stream("bytes", name, [raw])
            else:
                self._unary("bytes", name, raw)

        self._given(cases, st.tuples(st.sampled_from(names), st.binary(max_size=300), st.booleans()), send)

    def streams(self, cases: int) -> None:
        """Headers and data in any order, with anything in them."""
        pulls = st.lists(messages(pb.PullRequest.DESCRIPTOR, self._sessions(), "garbage"), min_size=1, max_size=4)
        headers = messages(pb.PushHeader.DESCRIPTOR, self._sessions(), "garbage")
        sizes = st.sampled_from([0, 1, 399, 400, 401, 5000])
        parts = st.one_of(
            headers.map(lambda fields: {"header": fields}), sizes.map(lambda size: {"data": bytes(size)}), st.just({})
        )
        pushes = st.lists(parts, min_size=1, max_size=5)
        self._given(
            cases // 2,
            pulls,
            lambda case: self._stream(
                "pulls", "Pull", [self._built(pb.PullRequest, f).SerializeToString() for f in case]
            ),
        )
        self._given(
            cases - cases // 2,
            pushes,
            lambda case: self._stream(
                "pushes", "Push", [self._built(pb.PushRequest, f).SerializeToString() for f in case]
            ),
        )

    def other_times(self, cases: int) -> None:
        """What the bystander's own session said, or could say at another step: repeated, late and too early."""
        client = self.bystander.client
        group = pb.OptimizerGroup(options=client.group.options)
        ids = {"session_id": client.session_id}
        late = [0, 1, 2, 3]
        early = [5, 6, 1 << 40]

        def push(step: int, sequence: int) -> list[bytes]:
            header = pb.PushHeader(
                kind=pb.PushHeader.KIND_GRADIENT, step=step, sequence=sequence, dtype=2, chunks=[pb.ChunkRef()], **ids
            )
            return [
                pb.PushRequest(header=header).SerializeToString(),
                pb.PushRequest(data=bytes(12_000)).SerializeToString(),
            ]

        for _ in range(cases):
            step = self.random.choice([*late, *early])
            choice = self.random.randrange(12)
            with_ended = self.random.random() < 0.3
            ids["session_id"] = self.bystander.ended if with_ended else client.session_id
            match choice:
                case 0:
                    self._unary("other times", "Step", _raw(pb.StepRequest(step=step, groups=[group], **ids)))
                case 1:
                    self._unary("other times", "ZeroGrad", _raw(pb.ZeroGradRequest(step=step, **ids)))
                case 2:
                    self._unary(
                        "other times",
                        "Commit",
                        _raw(pb.CommitRequest(step=step, commit_id="ab", timeout_seconds=0.01, **ids)),
                    )
                case 3:
                    self._unary(
                        "other times", "AnnounceStep", _raw(pb.AnnounceStepRequest(step=step, groups=[group], **ids))
                    )
                case 4:
                    self._unary(
                        "other times", "ClearState", _raw(pb.ClearStateRequest(step=step, parameters=[0], **ids))
                    )
                case 5:
                    self._unary(
                        "other times",
                        "GradNorm",
                        _raw(pb.GradNormRequest(step=step, norm_type=2.0, timeout_seconds=0.01, **ids)),
                    )
                case 6:
                    self._stream("other times", "Push", push(step, self.random.choice([0, 1, 5])))
                case 7:
                    # A gradient after one that was never sent.
                    self._stream("other times", "Push", push(4, self.random.choice([1, 5])))
                case 8:
                    request = pb.PullRequest(version=step, chunks=[pb.ChunkRef()], timeout_seconds=0.01, **ids)
                    self._stream("other times", "Pull", [_raw(request)])
                case 9:
                    # Data without a header, or after the last one's.
                    self._stream("other times", "Push", [_raw(pb.PushRequest(data=bytes(10)))] * 2)
                case 10:
                    header = pb.PushHeader(
                        kind=self.random.choice([2, 4]),
                        step=step,
                        dtype=2,
                        array="exp_avg",
                        chunks=[pb.ChunkRef()],
                        **ids,
                    )
                    data = _raw(pb.PushRequest(data=bytes(12_000)))
                    self._stream("other times", "Push", [_raw(pb.PushRequest(header=header)), data])
                case 11:
                    # Cut off in the middle.
                    self._stream("other times", "Push", push(4, 0)[:1])

    def oversized(self) -> None:
        for method in UNARY:
            self._unary("oversized", method.name, bytes(25 << 20))
        for name in ("OpenJob", "Heartbeat"):
            self._unary("oversized", name, bytes((64 << 20) + 1))
        for method in STREAMS:
            self._stream("oversized", method.name, [bytes(25 << 20)])

    def port(self, cases: int) -> None:
        """Connections that speak no HTTP/2, or stop speaking it."""
        host, port = self.address.rsplit(":", 1)
        held: list[socket.socket] = []
        settings = b"\0\0\0\x04\0\0\0\0\0"
        for number in range(cases):
            junk = self.random.randbytes(self.random.randrange(1, 400))
            start = self.random.choice(
                [b"", PREFACE, PREFACE[:7], PREFACE + settings, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01"]
            )
            # A frame of HTTP/2 of any type, whose length may be a lie.
            frame = self.random.randrange(1 << 14).to_bytes(3, "big") + bytes([self.random.randrange(12)]) + junk[:5]
            connection = socket.create_connection((host, int(port)), timeout=10)
            with contextlib.suppress(OSError):
                connection.sendall(start + (frame if number % 2 else b"") + junk)
            if number % 5 == 0:
                held.append(connection)
            else:
                connection.close()
            self.tally.cases["connections"] += 1
            if number % 50 == 0:
                self.own.call("Heartbeat")
        for connection in held:
            connection.close()

    def _built(self, kind: Any, fields: dict) -> Any:
        """A message, without what its fields cannot hold."""
        message = kind()
        for name, value in fields.items():
            if name == "header":
                value = self._built(pb.PushHeader, value)
            elif value == _OWN:
                # As it is by now: what was sent before may have ended the one before.
                value = self.own.session_id
            try:
                message.MergeFrom(kind(**{name: value}))
            except (ValueError, TypeError):
                continue
        return message

    def _unary(self, kind: str, name: str, raw: bytes) -> None:
        if name == "CloseSession" and self.own.session_id.encode() in raw:
            return
        call = self.channel.unary_unary(f"/{SERVICE.full_name}/{name}")
        code = grpc.StatusCode.OK
        what = ""
        try:
            call(raw, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            code, what = error.code(), f"{name}: {error.code()} {error.details()} for {raw[:300]!r}"  # type: ignore[attr-defined]
        self.tally.answered(kind, code, what)
        if name in ("OpenSession", "JoinGroup", "EndGroup", "Restore", "OpenJob", "SetOptimizer"):
            self._come_back()

    def _come_back(self) -> None:
        """Its own session may have been fenced by what it sent."""
        try:
            self.own.call("Heartbeat")
        except grpc.RpcError:
            self.own.drop()
            self.own = Client(self.address, job="garbage")
            self.channel = self.own.channel

    def _stream(self, kind: str, name: str, raw: Sequence[bytes]) -> None:
        response = GetMessageClass(SERVICE.methods_by_name[name].output_type)
        call = self.channel.stream_stream(f"/{SERVICE.full_name}/{name}", None, response.FromString)
        code, what = grpc.StatusCode.OK, ""
        codes = {each.value[0]: each for each in grpc.StatusCode}
        answers = call(iter(raw), timeout=CALL_SECONDS)
        try:
            for answer in answers:
                if answer.HasField("error"):
                    self.tally.code(codes[answer.error.code], f"{name}: {answer.error.message} for {raw!r:.600}")
        except grpc.RpcError as error:
            code, what = error.code(), f"{name}: {error.code()} {error.details()} for {raw!r:.600}"  # type: ignore[attr-defined]
        self.tally.answered(kind, code, what)


def _understood(name: str, raw: bytes) -> bool:
    """Whether this is a request all the same; what its session says is to be done."""
    try:
        GetMessageClass(SERVICE.methods_by_name[name].input_type).FromString(raw)
    except DecodeError:
        return False
    return True


def _raw(message: Any) -> bytes:
    return message.SerializeToString()


@contextlib.contextmanager
def nothing_changes(cluster: LocalCluster, bystander: Bystander, say: Callable[[str], None]) -> Iterator[None]:
    """State, memory, threads and files after the block are those from before it."""
    state, held = bystander.state(), Held.by(cluster.pid(0))
    yield
    deadline = time.monotonic() + 60
    while (now := Held.by(cluster.pid(0))).files > held.files + 8 and time.monotonic() < deadline:
        time.sleep(0.2)
    say(f"garbage: the server had {held}, and has {now}")
    assert now.files <= held.files + 8, (held, now)
    assert now.threads <= held.threads + 24, (held, now)
    assert now.rss <= held.rss + (192 << 20), (held, now)
    after = bystander.state()
    for what, before in state.items():
        assert after[what] == before, f"{what} changed"


def run(cases: int, seed: int, say: Callable[[str], None] = print) -> Tally:
    with LocalCluster(1, lease=600) as cluster:
        try:
            bystander = Bystander(cluster)
            attack = Attack(bystander, seed)
            # What is kept for next time, such as threads, is there.
            attack.everything(max(100, cases // 20))
            attack.tally = Tally()
            with nothing_changes(cluster, bystander, say):
                attack.everything(cases)
            bystander.goes_on(4)
            assert "Traceback" not in cluster.log(0), cluster.log(0)[-4000:]
            return attack.tally
        finally:
            while Client.connected:
                Client.connected.pop().drop()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=None, help="(default: one of its own)")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f"garbage: {options.cases} cases, --seed {seed}", flush=True)
    began = time.monotonic()
    tally = run(options.cases, seed)
    print(f"garbage: {tally}; in {time.monotonic() - began:.0f} s, and nothing came of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
