"""Opening a job with a model: manifest, placement, and the first weights."""

import torch
from torch import nn

from protos import dtypes
from protos import zero_ps_pb2 as pb
from protos.layout import ChunkGrid, digest, place_all
from trainer.errors import ConfigError, ConnectError, JobMismatch, RequestRefused, ServerFull
from trainer.job import Job
from trainer.links import PushKind
from trainer.manifest import Entry, entries, to_proto
from trainer.parameter import offloaded
from trainer.server import call_all
from trainer.transfer import Destination, RemoteParameter
from trainer.writing import MAX_INFLIGHT_BYTES


def open_job(model: nn.Module, job: Job) -> dict[str, RemoteParameter]:
    """States the model's manifest to all servers and, on a new job, sends rank 0's weights.

    Returns where each parameter and persistent buffer is, by name, once every weight is on the
    servers. Raises JobMismatch when the job holds another model, ServerFull when it is too large for a server.
    """
    found = entries(model)
    by_name = {entry.name: entry for entry in found}
    manifest = to_proto(found)
    try:
        responses: list[pb.OpenJobResponse] = call_all(
            job.servers,
            "OpenJob",
            lambda server: pb.OpenJobRequest(session_id=server.session_id, manifest=manifest),
            job.timeout,
        )
    except ServerFull:
        raise
    except RequestRefused as error:
        raise JobMismatch(str(error)) from None
    specs = responses[0].manifest.parameters
    shards = place_all([tuple(spec.shape) for spec in specs], len(job.servers))
    for server, response in zip(job.servers, responses, strict=True):
        if response.placement_digest != digest(shards):
            raise ConnectError(
                f"server {server.address} places the chunks of job {job.name!r} differently from this trainer; "
                "install the same zero-ps on all machines"
            )
    remotes = {
        spec.name: RemoteParameter(
            index=index,
            name=spec.name,
            dtype=dtypes.to_torch(spec.dtype),
            grid=ChunkGrid.of(spec.shape),
            shards=shards[index],
        )
        for index, spec in enumerate(specs)
    }
    if job.read_only:
        # It has no part in what the ranks agree on, and reads at the step where the job is now. A server
        # that has not heard of that step from all trainers yet is about to.
        job.step = max(response.step for response in responses)
        job.exists = True
        return remotes
    needs_weights = any(response.needs_weights for response in responses)
    if job.rank == 0:
        if needs_weights:
            bound = {(ref.parameter, ref.chunk) for response in responses for ref in response.bound}
            for name, remote in remotes.items():
                _write(job, by_name[name], remote, bound)
            job.transfer.flush()
        job.step = responses[0].step
    job.step = int(job.barrier("weights", str(job.step).encode())[0])
    job.exists = True
    return remotes


def _write(job: Job, entry: Entry, remote: RemoteParameter, bound: set[tuple[int, int]]) -> None:
    """Sends one parameter's first weights, but for the chunks that are in place already."""
    missing = [chunk for chunk in range(remote.grid.num_chunks) if (remote.index, chunk) not in bound]
    if not missing:
        return
    tensor = entry.tensor
    if tensor.is_meta:
        raise ConfigError(
            f"parameter {entry.name!r} is on the meta device and job {job.name!r} has no values for it; build the "
            "model under job.init(), or materialise and initialise it before trainer.offload"
        )
    state = None if entry.is_buffer else offloaded(tensor)
    if state is not None:
        # Sent ahead to another server than the one that the manifest gives the chunk to, or in another
        # dtype than is stored: fetched back, and on to its place.
        assert state.remote is not None
        data = torch.empty(state.nbytes, dtype=torch.uint8)
        job.transfer.pull([Destination(state.remote, data, state.dtype)], 0).wait()
        values = data.view(state.dtype)
    else:
        values = tensor.detach().to("cpu").contiguous()
    job.transfer.reserve(values.nbytes, MAX_INFLIGHT_BYTES)
    job.transfer.push(remote, values, PushKind.WEIGHT, step=0, chunks=missing)
