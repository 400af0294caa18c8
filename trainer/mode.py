"""Whether the trainers of a job move parameters together or each on its own."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trainer.config import OffloadConfig
from trainer.errors import ConfigError
from trainer.group import TrainerGroup
from trainer.job import Job


def open_group(job: Job, config: OffloadConfig) -> TrainerGroup | None:
    """The group in which a job's trainers move parameters, or None in direct mode.

    With `mode="auto"` trainers are a group where the way to the servers is a network and they have a process
    group. All ranks have to call this; they get the same answer. Raises ConfigError, saying what is missing,
    where `mode="group"` cannot be, and for a `process_group` that is none.
    """
    if job.read_only:
        return None
    ranks, hindrance = _ranks(job, config)
    if job.elastic and config.mode == "group":
        raise ConfigError(
            "OffloadConfig(mode='group') is for a fixed set of trainers, and this job was connected with elastic=True; "
            "use mode='direct' or 'auto', or connect without elastic"
        )
    if job.elastic:
        hindrance = "the job is elastic"
    elif config.mode == "direct":
        hindrance = "it has mode='direct'"
    elif config.max_staleness:
        hindrance = "it has max_staleness, with which each trainer pulls on its own"
    elif config.mode == "auto" and not hindrance and not _is_remote(job):
        hindrance = "it is on a server's host, and has mode='auto'"
    hindrances = [answer.decode() for answer in job.barrier("the mode of offloading", hindrance.encode())]
    if not any(hindrances):
        # With one trainer there is nobody to share the work with.
        return TrainerGroup(ranks, job.rank, job.timeout, job.connection.session) if job.world_size > 1 else None
    if config.mode == "group":
        rank, why = next((rank, why) for rank, why in enumerate(hindrances) if why)
        raise ConfigError(
            f"rank {job.rank} has OffloadConfig(mode='group'), and rank {rank} cannot be in a group: {why}. Give every "
            "rank the same mode and process group"
        )
    return None


def _ranks(job: Job, config: OffloadConfig) -> tuple[list[int], str]:
    """The job's trainers as ranks of torch's default group; none, and why, where they are no process group."""
    if not dist.is_available() or not dist.is_initialized():
        return [], "torch.distributed is not initialised; call torch.distributed.init_process_group() before offload"
    group = config.process_group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            return [], f"process_group is a mesh of {group.ndim} dimensions; give one of them, as mesh['dp']"
        group = group.get_group()
    # To a process that is not in a group, torch gives a number in its place.
    if not isinstance(group, (dist.ProcessGroup, int, type(None))):
        raise ConfigError(
            f"OffloadConfig.process_group has to be a process group or a DeviceMesh of one dimension, not {group!r}"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        return [], "this process is not in the process group that it gave; give each the group of which it is a rank"
    if (rank, size) != (job.rank, job.world_size):
        return [], (
            f"this is rank {rank} of {size} in the process group and rank {job.rank} of {job.world_size} in job "
            f"{job.name!r}; connect with rank= and world_size= of the group, and with a job of its own for each group"
        )
    return dist.get_process_group_ranks(group), ""


def _is_remote(job: Job) -> bool:
    return all(link.kind != "shm" for link in job.links)
