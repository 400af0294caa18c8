"""How a model is offloaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from protos import MAX_STALENESS
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class OffloadConfig:
    """Settings of `trainer.offload`. Names and units are DeepSpeed's where DeepSpeed has the knob.

    param_persistence_threshold: parameters with fewer elements than this stay gathered between uses and
        are refreshed together after each step: fetching a bias costs a round trip and frees nothing.
    model_persistence_threshold: the most elements that stay gathered for that reason; smaller
        parameters are preferred. Bounds what persistence may cost in memory.
    max_live_parameters, max_live_bytes: the most elements, and bytes, of parameters that are resident at
        any instant: whole, on their way, or staged for a device; small ones that stay, too. Gathering waits
        and evicts to keep both. None for `max_live_bytes` means that only the elements count.
    prefetch_bucket_size: the most elements that are asked for together ahead of time; a larger parameter
        is asked for alone. 0 asks for nothing ahead of time.
    max_reuse_distance: a parameter stays after its use if it is used again before this many elements of
        other parameters are, and its room is not needed before that. 0 releases at once.
    leaf_modules: submodules that are gathered and released as one unit, with everything below them: classes,
        or fully qualified names. For subtrees whose parts run too often or too irregularly to be hooked
        one by one, as the experts of a mixture.
    sparse_rows: which `nn.Embedding`s gather only the rows that their inputs name, and send only those rows of
        their gradients: True for all, or classes and fully qualified names. For tables that are large beside
        a batch.
    untouched_rows: what a step does to rows of these tables that no trainer's batch named. "step" is what it does
        with a dense gradient that is zero there: moments decay, and weights move by them and by weight decay.
        "keep" leaves them alone, weights and moments, as `torch.optim.SparseAdam` does. The same on every rank.
    module_granularity_threshold: subtrees with at most this many elements are such units too. Gathers small
        modules together; 0 hooks every module.
    param_dtype: dtype in which parameters are gathered and computed with; None keeps the model's own.
        Servers keep fp32 masters of what is trained, so 16 bits halve the bytes pulled.
    reduce_dtype: dtype in which gradients travel; None keeps that of the gradient. Servers add up in
        fp32 in any case.
    mode: "group" has the trainers of a job, as ranks of a `torch.distributed` group, each pull 1/W of a
        parameter and all-gather the rest, and of gradients push 1/W of their sum; "direct" has each pull and
        push on its own, in whatever order it likes. "auto" is "group" where no server is on this host and
        there is a process group of the job's trainers.
    process_group: of the job's trainers, for group mode: a process group or a one-dimensional `DeviceMesh`;
        None for the default group. Ranks in it have to be those of the job.
    max_staleness: how many steps this trainer may be ahead of the servers' updates. 0 computes each step with the
        values that the last one made; k with those that servers have, which may lack the last k steps. Forwards
        and backwards wait less for slow updates, and training is another one than torch's: docs/optimizer.md says
        what it costs. Servers keep k more sums of gradients for each trainer. Not in group mode. The same on every
        rank.
    gradient_reduction: "mean" or "sum": how the trainers' gradients become one. The same on every rank.
    max_inflight_push_bytes: how many bytes of gradients may wait to be sent. Backward waits beyond
        that, so a slow network does not gather a whole model's gradients here.
    """

    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = 16_000_000
    max_live_parameters: int = 1_000_000_000
    max_live_bytes: int | None = None
    prefetch_bucket_size: int = 4_000_000
    max_reuse_distance: int = 1_000_000_000
    leaf_modules: tuple[type[nn.Module] | str, ...] = ()
    sparse_rows: bool | tuple[type[nn.Module] | str, ...] = False
    untouched_rows: Literal["step", "keep"] = "step"
    module_granularity_threshold: int = 0
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    gradient_reduction: Literal["mean", "sum"] = "mean"
    max_staleness: int = 0
    mode: Literal["auto", "group", "direct"] = "auto"
    process_group: "ProcessGroup | DeviceMesh | None" = None
    max_inflight_push_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        for name in (
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "prefetch_bucket_size",
            "max_reuse_distance",
            "module_granularity_threshold",
            "max_inflight_push_bytes",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"OffloadConfig.{name} has to be a whole number of at least 0, not {value!r}")
        limit = self.max_live_bytes
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ConfigError(f"OffloadConfig.max_live_bytes has to be a whole number of bytes or None, not {limit!r}")
        if self.mode not in ("auto", "group", "direct"):
            raise ConfigError(f"OffloadConfig.mode has to be 'auto', 'group' or 'direct', not {self.mode!r}")
        for name in ("leaf_modules", "sparse_rows"):
            chosen = getattr(self, name)
            if isinstance(chosen, bool) and name == "sparse_rows":
                continue
            if not isinstance(chosen, (tuple, list)):
                raise ConfigError(
                    f"OffloadConfig.{name} takes a tuple of classes of modules and names, not {chosen!r}; one of them "
                    "is a tuple, too: (nn.Embedding,)"
                )
            for each in chosen:
                if not isinstance(each, str) and not (isinstance(each, type) and issubclass(each, nn.Module)):
                    raise ConfigError(f"OffloadConfig.{name} takes classes of modules and names, not {each!r}")
        if self.untouched_rows not in ("step", "keep"):
            raise ConfigError(f"OffloadConfig.untouched_rows has to be 'step' or 'keep', not {self.untouched_rows!r}")
        if self.untouched_rows == "keep" and not self.sparse_rows:
            raise ConfigError(
                "OffloadConfig(untouched_rows='keep') is about the tables of sparse_rows, and there are none; name "
                "them with sparse_rows"
            )
        k = self.max_staleness
        if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k <= MAX_STALENESS:
            raise ConfigError(
                f"OffloadConfig.max_staleness has to be a whole number from 0 to {MAX_STALENESS}, not {k!r}"
            )
        if k and self.mode == "group":
            raise ConfigError(
                "OffloadConfig(max_staleness=...) does not go with mode='group': there each trainer pulls a part of a "
                "chunk, and the parts could be of different versions; leave one of them away"
            )
        if self.gradient_reduction not in ("mean", "sum"):
            raise ConfigError(
                f"OffloadConfig.gradient_reduction has to be 'mean' or 'sum', not {self.gradient_reduction!r}"
            )
        for name in ("param_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ConfigError(f"OffloadConfig.{name} has to be a floating-point torch.dtype, not {dtype!r}")
