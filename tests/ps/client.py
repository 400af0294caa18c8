"""A trainer reduced to its messages, for tests of the protocol."""

import itertools
import queue
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import grpc
import torch

from protos import MAX_MESSAGE_BYTES, MESSAGE_BYTES, PROTOCOL_VERSION, SESSION_METADATA, dtypes, zero_ps_pb2_grpc
from protos import zero_ps_pb2 as pb
from protos.layout import ChunkGrid
from protos.values import encode_options

TIMEOUT = 20.0


class StreamError(Exception):
    """An error inside a Pull or Push stream."""

    def __init__(self, error: pb.Error) -> None:
        super().__init__(error.message)
        self.code = next(code for code in grpc.StatusCode if code.value[0] == error.code)


class Stream:
    """A bidirectional stream: requests are put, responses are taken."""

    def __init__(self, method, session_id: str) -> None:
        self.requests: queue.SimpleQueue = queue.SimpleQueue()
        self.call = method(iter(self.requests.get, None), metadata=((SESSION_METADATA, session_id),))

    def close(self) -> None:
        self.requests.put(None)
        self.call.cancel()


class Client:
    """One rank of a job on one server."""

    _ids = itertools.count()
    connected: ClassVar[list["Client"]] = []
    # By job and step: what was committed last, by any client.
    commits: ClassVar[dict[tuple[str, int], str]] = {}

    def __init__(
        self,
        address: str,
        *,
        job: str = "job",
        rank: int = 0,
        world_size: int = 1,
        shard: int = 0,
        num_shards: int = 1,
        read_only: bool = False,
        version: int = PROTOCOL_VERSION,
        timeout: float = TIMEOUT,
        heartbeat: bool = True,
        group: int = 0,
        incarnation: str = "",
    ) -> None:
        """Opens a session, in a group that it joins first: with several ranks all have to come (`connect_all`).

        group: the number of one that is not to be asked for. Servers that are not shard 0 take what they are told.
        """
        self._silent = threading.Event()
        self.job = job
        self.channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                # Every client its own connection, as trainers have.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.stub = zero_ps_pb2_grpc.ParameterServerStub(self.channel)
        self.rank, self.world_size = rank, world_size
        incarnation = incarnation or f"test-{next(self._ids)}"
        if not group and not read_only and shard:
            group = self._known_group() + 1
        elif not group and not read_only:
            join = pb.JoinGroupRequest(
                protocol_version=version,
                job=job,
                rank=rank,
                world_size=world_size,
                incarnation=incarnation,
                num_shards=num_shards,
                timeout_seconds=timeout,
            )
            group = self.stub.JoinGroup(join, timeout=TIMEOUT + timeout).group
        self.opened = self.stub.OpenSession(
            pb.OpenSessionRequest(
                protocol_version=version,
                job=job,
                rank=rank,
                world_size=world_size,
                incarnation=incarnation,
                group=group,
                read_only=read_only,
                shard=shard,
                num_shards=num_shards,
                timeout_seconds=timeout,
            ),
            timeout=TIMEOUT + timeout,
        )
        self.session_id = self.opened.session_id
        self.pulls = Stream(self.stub.Pull, self.session_id)
        self.pushes = Stream(self.stub.Push, self.session_id)
        self.manifest: pb.Manifest | None = None
        self.connected.append(self)
        if heartbeat:
            threading.Thread(target=self._beat, daemon=True).start()

    def _known_group(self) -> int:
        jobs = self.stub.Status(pb.StatusRequest(), timeout=TIMEOUT).jobs
        return max((each.group for each in jobs if each.name == self.job), default=0)

    def _beat(self) -> None:
        while not self._silent.wait(self.opened.lease_seconds / 3):
            try:
                self.call("Heartbeat")
            except (grpc.RpcError, ValueError):  # ValueError: the channel is closed.
                return

    def call(self, method: str, timeout: float = TIMEOUT, **fields):
        """A unary call with this client's session id filled in.

        Unless stated, commits and restores have new ids, and what is restored is the step's last commit.
        """
        place = (self.job, fields.get("step", 0))
        if method == "Commit":
            fields.setdefault("commit_id", uuid.uuid4().hex)
        elif method == "Restore":
            fields.setdefault("commit_id", self.commits.get(place, "0"))
            fields.setdefault("restore_id", uuid.uuid4().hex)
        request = getattr(pb, f"{method}Request")(session_id=self.session_id, **fields)
        response = getattr(self.stub, method)(request, timeout=timeout)
        if method == "Commit":
            self.commits[place] = response.commit_id
        return response

    @property
    def committed_steps(self) -> list[int]:
        """Of the commits that the server had when this client came, replaced ones included."""
        return [commit.step for commit in self.opened.committed]

    def close(self) -> None:
        """Ends the session and the connection."""
        self.call("CloseSession")
        self.drop()

    def stop_beating(self) -> None:
        """Falls silent with the connection open, as a stopped process would."""
        self._silent.set()

    def drop(self) -> None:
        """Ends the connection without a word, as a killed process would."""
        self.stop_beating()
        self.pulls.close()
        self.pushes.close()
        self.channel.close()

    def open_job(self, parameters: Mapping[str, torch.Tensor]) -> pb.OpenJobResponse:
        manifest = pb.Manifest(parameters=[spec(name, tensor) for name, tensor in parameters.items()])
        response = self.call("OpenJob", manifest=manifest)
        self.manifest = response.manifest
        return response

    def set_optimizer(
        self, name: str = "SGD", parameters: Sequence[int] | None = None, max_staleness: int = 0, **options
    ) -> None:
        """One group of all parameters, with torch's defaults for what is not said."""
        parameters = range(len(self.manifest.parameters)) if parameters is None else parameters
        group = pb.OptimizerGroup(options=encode_options(options), parameters=parameters)
        self.call("SetOptimizer", class_name=name, groups=[group], max_staleness=max_staleness)
        self.group = group

    def chunks(self, parameter: int) -> list[pb.ChunkRef]:
        grid = ChunkGrid.of(tuple(self.manifest.parameters[parameter].shape))
        return [pb.ChunkRef(parameter=parameter, chunk=chunk) for chunk in range(grid.num_chunks)]

    def push(
        self,
        kind: pb.PushHeader.Kind,
        chunks: Sequence[pb.ChunkRef],
        data: bytes,
        *,
        step: int = 0,
        dtype: torch.dtype = torch.float32,
        sequence: int = 0,
        chunk_bytes: Sequence[int] = (),
        parts: Sequence[pb.Runs] = (),
        final: bool = False,
    ) -> None:
        """Sends a push and waits for its acknowledgement. Raises StreamError."""
        request_id = next(self._ids)
        header = pb.PushHeader(
            session_id=self.session_id,
            request_id=request_id,
            kind=kind,
            step=step,
            dtype=dtypes.from_torch(dtype),
            chunks=chunks,
            sequence=sequence,
            chunk_bytes=chunk_bytes,
            parts=parts,
            final=final,
        )
        self.pushes.requests.put(pb.PushRequest(header=header))
        for start in range(0, len(data), MESSAGE_BYTES):
            self.pushes.requests.put(pb.PushRequest(data=data[start : start + MESSAGE_BYTES]))
        response = next(self.pushes.call)
        assert response.request_id == request_id
        if response.HasField("error"):
            raise StreamError(response.error)

    def push_gradient(
        self, parameter: int, gradient: torch.Tensor, *, step: int = 0, sequence: int = 0, final: bool = False
    ) -> None:
        self.push(
            pb.PushHeader.KIND_GRADIENT,
            self.chunks(parameter),
            to_bytes(gradient),
            step=step,
            dtype=gradient.dtype,
            sequence=sequence,
            final=final,
        )

    def push_weight(self, parameter: int, weight: torch.Tensor, *, step: int = 0) -> None:
        self.push(pb.PushHeader.KIND_WEIGHT, self.chunks(parameter), to_bytes(weight), step=step, dtype=weight.dtype)

    def send_pull(
        self,
        parameters: Sequence[int],
        *,
        version: int = 0,
        dtype: pb.DType = pb.DTYPE_UNSPECIFIED,
        timeout: float = TIMEOUT,
        chunks: Sequence[pb.ChunkRef] | None = None,
        staged: bool = False,
        parts: Sequence[pb.Runs] = (),
        max_staleness: int = 0,
    ) -> int:
        request_id = next(self._ids)
        if chunks is None:
            chunks = [chunk for parameter in parameters for chunk in self.chunks(parameter)]
        self.pulls.requests.put(
            pb.PullRequest(
                session_id=self.session_id,
                request_id=request_id,
                version=version,
                dtype=dtype,
                chunks=chunks,
                timeout_seconds=timeout,
                staged=staged,
                parts=parts,
                max_staleness=max_staleness,
            )
        )
        return request_id

    def receive(self, request_id: int, num_bytes: int) -> bytes:
        """The answer to a pull. Raises StreamError."""
        data = b""
        for response in self.pulls.call:
            assert response.request_id == request_id
            if response.HasField("error"):
                raise StreamError(response.error)
            assert len(response.data) <= MESSAGE_BYTES
            data += response.data
            if len(data) >= num_bytes:
                break
        assert len(data) == num_bytes
        return data

    def pull(self, parameter: int, *, version: int = 0, dtype: torch.dtype | None = None, **options):
        """A parameter at a version, as a tensor."""
        stated = self.manifest.parameters[parameter]
        code = pb.DTYPE_UNSPECIFIED if dtype is None else dtypes.from_torch(dtype)
        dtype = dtype or dtypes.to_torch(stated.dtype)
        elements = torch.Size(stated.shape).numel()
        request_id = self.send_pull([parameter], version=version, dtype=code, **options)
        data = self.receive(request_id, elements * dtype.itemsize)
        if not data:
            return torch.empty(tuple(stated.shape), dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(tuple(stated.shape))

    def announce(self, step: int = 0, **fields) -> None:
        fields.setdefault("groups", [pb.OptimizerGroup(options=self.group.options)])
        self.call("AnnounceStep", step=step, **fields)

    def step(self, step: int = 0, **fields) -> pb.StepResponse:
        fields.setdefault("groups", [pb.OptimizerGroup(options=self.group.options)])
        return self.call("Step", step=step, **fields)


def spec(name: str, tensor: torch.Tensor, *, buffer: bool = False) -> pb.ParameterSpec:
    kinds = pb.ParameterSpec
    return pb.ParameterSpec(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtypes.from_torch(tensor.dtype),
        kind=kinds.KIND_BUFFER if buffer else kinds.KIND_PARAMETER,
        trainable=not buffer and tensor.dtype in (torch.float32, torch.float64),
    )


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def connect_all(address: str, *, job: str = "job", world_size: int = 2) -> list[Client]:
    """All ranks of a job, which come together."""
    with ThreadPoolExecutor(world_size) as pool:
        coming = [pool.submit(Client, address, job=job, rank=rank, world_size=world_size) for rank in range(world_size)]
        return [each.result() for each in coming]


def start_job(
    address: str,
    parameters: Mapping[str, torch.Tensor],
    optimizer: str = "SGD",
    *,
    job: str = "job",
    world_size: int = 1,
    **options,
) -> list[Client]:
    """All ranks of a job that is ready for its first step."""
    clients = connect_all(address, job=job, world_size=world_size)
    for client in clients:
        client.open_job(parameters)
    for number, tensor in enumerate(parameters.values()):
        clients[0].push_weight(number, tensor)
    for client in clients:
        client.set_optimizer(optimizer, **options)
    return clients


def error_of(call) -> tuple[grpc.StatusCode, str]:
    """Code and message of the error that `call` raises."""
    try:
        result = call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    except StreamError as error:
        return error.code, str(error)
    raise AssertionError(f"no error but {result}")
