"""Norms of gradients that are on the servers, put together from those of their chunks."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from protos import zero_ps_pb2 as pb
from trainer.parameter import OffloadedParameter
from trainer.server import call_all

if TYPE_CHECKING:
    from trainer.offload import OffloadedModel


def gradient_norms(
    model: "OffloadedModel", states: Sequence[OffloadedParameter], norm_type: float
) -> list[torch.Tensor]:
    """The norm of each parameter's gradient, 0-d CPU tensors in the dtype of its master.

    The gradients are those averaged over trainers, with the edits that were made so far. Waits for those of
    the other ranks, every one of which has to ask for the same; no gradient may come after it. Of a parameter
    that no trainer has a gradient of, the norm is 0.

    A parameter of one chunk has the bits of `torch.linalg.vector_norm`, if that runs on as many threads as
    the server; of several, sums are taken in another order.
    """
    job = model.job
    job.check()
    model.announcement.check_none("taking the norm of gradients, as clipping does,")
    model.gradients.settle()
    job.transfer.flush()
    model.gradients.final = True
    indices = sorted({state.remote.index for state in states if state.remote is not None})
    responses: list[pb.GradNormResponse] = call_all(
        job.servers,
        "GradNorm",
        lambda server: pb.GradNormRequest(
            session_id=server.session_id,
            step=job.step,
            parameters=indices,
            norm_type=norm_type,
            timeout_seconds=job.timeout,
            edits=model.gradients.edits,
        ),
        job.timeout + 5,
    )
    # Each server answers with its chunks of these parameters, in the order of the manifest.
    answers = [iter(response.chunk_norms) for response in responses]
    shards = {state.remote.index: state.remote.shards for state in states if state.remote is not None}
    by_index = {index: [next(answers[shard]) for shard in shards[index]] for index in indices}
    norms = [
        _whole(by_index[state.remote.index], norm_type, state.remote.dtype)
        for state in states
        if state.remote is not None
    ]
    if norm_type > 0:
        model.gradients.known_finite.update(s for s, norm in zip(states, norms, strict=True) if norm.isfinite())
    return norms


def total_norm(norms: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of norms, as `torch.nn.utils.get_total_norm` takes it; 0 of none."""
    if not norms:
        return torch.tensor(0.0)
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), norm_type)
    return total


def _whole(chunk_norms: Sequence[float], norm_type: float, dtype: torch.dtype) -> torch.Tensor:
    """The norm of a parameter from those of its chunks."""
    parts = torch.tensor(chunk_norms, dtype=torch.float64)
    if len(parts) == 1:
        whole = parts[0]
    elif norm_type == 0:
        # Of each chunk it is how many elements are not 0.
        whole = parts.sum()
    elif math.isinf(norm_type):
        whole = parts.amax() if norm_type > 0 else parts.amin()
    else:
        whole = torch.linalg.vector_norm(parts, norm_type)
    return whole.to(torch.float64 if dtype == torch.float64 else torch.float32)
