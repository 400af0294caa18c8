"""Optimizer state of single parameters: from the servers as torch keeps it, and back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from protos import dtypes
from protos import zero_ps_pb2 as pb
from protos.layout import ChunkGrid
from trainer.job import Job
from trainer.links import PushKind
from trainer.parameter import OffloadedParameter
from trainer.server import call_all
from trainer.transfer import Destination, RemoteParameter
from trainer.writing import MAX_INFLIGHT_BYTES


def kept_state(cls: Callable[..., Optimizer], options: Mapping[str, Any]) -> dict[str, bool]:
    """What a class keeps of a parameter under these options: of each name, whether it has an element for each of
    the parameter's."""
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = cls([{"params": [param], **options}])
    optimizer.step()
    return {n: v.dim() > 0 for n, v in optimizer.state[param].items() if isinstance(v, torch.Tensor)}


def initial_state(
    cls: Callable[..., Optimizer], options: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a class keeps of a parameter before its first update: nothing, but for Adagrad."""
    if not cls([torch.nn.Parameter(torch.zeros(1))]).state:
        return {}
    param = torch.nn.Parameter(torch.empty(tuple(shape), dtype=dtype))
    return {n: v for n, v in cls([{"params": [param], **options}]).state[param].items() if isinstance(v, torch.Tensor)}


def list_state(job: Job, states: Sequence[OffloadedParameter]) -> list[list[pb.ArraySpec]]:
    """What the servers have of each parameter at the job's present step; nothing of one that was never updated."""
    if not states:
        return []
    states[0].model.announcement.check_none("reading the optimizer's state")
    indices = [state.remote.index for state in states if state.remote is not None]
    responses: list[pb.ListStateResponse] = call_all(
        job.servers,
        "ListState",
        lambda server: pb.ListStateRequest(
            session_id=server.session_id, version=job.step, parameters=indices, timeout_seconds=job.timeout
        ),
        job.timeout + 5,
    )
    # All chunks of a parameter are updated together.
    found = {chunk.chunk.parameter: list(chunk.arrays) for response in responses for chunk in response.chunks}
    return [found[index] for index in indices]


def pull_state(job: Job, state: OffloadedParameter, arrays: Iterable[pb.ArraySpec]) -> dict[str, torch.Tensor]:
    """A parameter's state at the job's present step, as CPU tensors."""
    assert state.remote is not None
    pulled = {}
    arrivals = []
    for array in arrays:
        dtype = dtypes.to_torch(array.dtype)
        remote = state.remote if array.per_element else _per_chunk(state.remote)
        data = torch.empty(remote.grid.rows * remote.grid.row_elements * dtype.itemsize, dtype=torch.uint8)
        arrivals.append(job.transfer.pull([Destination(remote, data, dtype)], job.step, array.name))
        values = data.view(dtype)
        pulled[array.name] = values.view(state.shape) if array.per_element else values[0]
    for arrival in arrivals:
        arrival.wait()
    # Of what servers keep once for each chunk all are the same.
    return {name: value.clone() if value.dim() == 0 else value for name, value in pulled.items()}


def clear_state(job: Job, states: Sequence[OffloadedParameter]) -> None:
    """Has the servers forget the state of some parameters; for rank 0."""
    if not states:
        return
    states[0].model.announcement.check_none("changing the optimizer's state")
    indices = [state.remote.index for state in states if state.remote is not None]
    call_all(
        job.servers,
        "ClearState",
        lambda server: pb.ClearStateRequest(session_id=server.session_id, step=job.step, parameters=indices),
        job.timeout,
    )


def check_state(state: OffloadedParameter, values: Mapping[str, Any], kept: Mapping[str, bool]) -> None:
    """Raises ValueError unless this is what the class keeps of the parameter, or nothing."""
    if values and set(values) != set(kept):
        raise ValueError(
            f"the state of parameter {state.name!r} has {', '.join(sorted(values))}; under its options the optimizer "
            f"keeps {', '.join(sorted(kept)) or 'nothing'}"
        )
    for name, value in values.items():
        shape = tuple(torch.as_tensor(value).shape)
        if kept[name] and shape != state.shape:
            raise ValueError(f"{name} of parameter {state.name!r} has shape {shape}, the parameter {state.shape}")
        if not kept[name] and torch.as_tensor(value).numel() != 1:
            raise ValueError(f"{name} of parameter {state.name!r} has shape {shape}, and is one number")


def push_state(job: Job, state: OffloadedParameter, values: Mapping[str, Any], kept: Mapping[str, bool]) -> None:
    """Sends a parameter's state, of which the servers have none; for rank 0. `Transfer.flush` waits for it."""
    assert state.remote is not None
    for name, value in values.items():
        tensor = torch.as_tensor(value).detach().to("cpu")
        if not tensor.is_floating_point():
            tensor = tensor.to(torch.float32)
        remote = state.remote
        if kept[name]:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        else:
            remote = _per_chunk(remote)
            tensor = tensor.reshape(1).expand(len(remote.shards)).clone()
        job.transfer.reserve(tensor.nbytes, MAX_INFLIGHT_BYTES)
        job.transfer.push(remote, tensor, PushKind.STATE, step=job.step, array=name)


def _per_chunk(remote: RemoteParameter) -> RemoteParameter:
    """A parameter of one element for each chunk, which is how servers keep what torch keeps once."""
    chunks = len(remote.shards)
    return replace(remote, grid=ChunkGrid((chunks,), chunks, 1, 1))
