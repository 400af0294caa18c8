"""New values for a parameter, from a trainer to the servers."""

import torch

from trainer.errors import ConfigError
from trainer.job import Job
from trainer.links import PushKind
from trainer.parameter import OffloadedParameter
from trainer.transfer import Destination

MAX_INFLIGHT_BYTES = 64 << 20
"""How many bytes of new values may wait to be sent."""


def write_values(job: Job, state: OffloadedParameter, values: torch.Tensor) -> None:
    """Replaces a parameter's values on the servers, at the job's present step, by rank 0's.

    values: of a shape that broadcasts to the parameter's, of any dtype and device. Where they are of
        the dtype that is computed with and the servers store another one, elements that are equal to
        what the servers would send stay as they are, so fp32 masters keep their precision.

    Returns before the servers have them; `Transfer.flush` waits for that.
    """
    remote = state.remote
    assert remote is not None
    if job.read_only:
        raise ConfigError(
            f"job {job.name!r} was opened with read_only=True; parameter {state.name!r} cannot be changed"
        )
    if job.transfer.weights:
        raise ConfigError(f"parameter {state.name!r} cannot be changed inside trainer.ema_weights()")
    if job.rank != 0:
        return
    values = values.detach().to("cpu").broadcast_to(state.shape).contiguous()
    if values.dtype == state.dtype != remote.dtype:
        data = torch.empty(state.numel * remote.dtype.itemsize, dtype=torch.uint8)
        job.transfer.pull([Destination(remote, data, remote.dtype)], job.step).wait()
        stored = data.view(remote.dtype).reshape(state.shape)
        values = torch.where(stored.to(values.dtype) == values, stored, values.to(remote.dtype))
    else:
        # A copy: whoever assigned may change theirs before it is sent.
        values = values.to(remote.dtype, copy=True)
    job.transfer.reserve(values.nbytes, MAX_INFLIGHT_BYTES)
    job.transfer.push(remote, values, PushKind.WEIGHT, step=job.step)
