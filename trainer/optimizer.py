"""`trainer.RemoteOptimizer`: a torch optimizer whose arithmetic runs where the state is."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch.optim import Optimizer

from protos import values
from protos import zero_ps_pb2 as pb
from protos.optimizers import check_optimizer
from trainer.errors import ConfigError, JobMismatch, RequestRefused, ServerFull
from trainer.grad_scaling import all_finite
from trainer.job import Job
from trainer.offload import OffloadedModel
from trainer.parameter import offloaded
from trainer.server import call_all
from trainer.stateful_optimizer import StatefulOptimizer

_REDUCTIONS = {"mean": pb.GRADIENT_REDUCTION_MEAN, "sum": pb.GRADIENT_REDUCTION_SUM}


class RemoteOptimizer(StatefulOptimizer):
    """Runs an element-wise class of `torch.optim` on the job's servers.

    params: parameters of one offloaded model, or param groups of them.
    cls: the class, as `torch.optim.AdamW`; servers use its fused variant where torch has one, unless
        `fused=False` or `foreach` is given.
    skip_nonfinite: a step whose averaged gradients have a NaN or an infinity in them is not made, on any
        trainer or server: its gradients are dropped and `skipped_steps` counts it. For training in bf16;
        with fp16, `torch.amp.GradScaler` does the same and scales losses, too. Each step then waits for the
        gradients of all trainers.
    ema_decay: has servers keep an exponential moving average of the weights with this decay, as
        `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(ema_decay)` that is updated after every
        step. It is committed with the job; `trainer.ema_weights` evaluates with it. None keeps none.
    defaults: the class's own arguments.

    skipped_steps: how many steps were not made since this object is, for that reason or a GradScaler's.

    Groups and their options may be changed between steps, so learning rate schedulers work. `step` sends
    the options and returns; servers update chunk by chunk while the next forward already pulls.
    Gradients leave during backward and are averaged over trainers; a placeholder in `param.grad` shows
    that there is one. As in torch they add up until `zero_grad`, the optimizer's or the module's.

    Raises ConfigError for a class or an argument that cannot work, JobMismatch when the job's state
    belongs to another class, ServerFull when an update takes more memory than a server has.
    """

    def __init__(
        self,
        params: Iterable[Any],
        cls: type[Optimizer],
        *,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        **defaults: Any,
    ) -> None:
        name: str = getattr(cls, "__name__", str(cls))
        if getattr(torch.optim, name, None) is not cls:
            raise ConfigError(
                f"{name} is not a class of torch.optim; servers run its classes by name, as torch.optim.AdamW"
            )
        try:
            check_optimizer(name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if ema_decay is not None and not (isinstance(ema_decay, (int, float)) and 0 <= ema_decay <= 1):
            raise ConfigError(f"ema_decay has to be a number from 0 to 1, as 0.999, or None, not {ema_decay!r}")
        template = cls([torch.nn.Parameter(torch.zeros(1))], **defaults)
        self._class, self._class_name = cls, name
        self._model: OffloadedModel | None = None
        self._ready = False
        self._trained: list[int] = []
        self._skip_nonfinite = skip_nonfinite
        self.ema_decay = ema_decay
        self._skipped = 0
        super().__init__(params, template.defaults)
        self.job: Job = self._owner.job
        self._owner.announcement.check_none("another RemoteOptimizer for this model")
        self._send_groups()
        self._owner.optimizer = weakref.ref(self)
        self._ready = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its parameters have to be of the same offloaded model."""
        if self._model is not None:
            self._model.announcement.check_none("add_param_group()")
        super().add_param_group(param_group)
        try:
            self._take_group(self.param_groups[-1])
        except BaseException:
            # Later steps are to be those of the groups that servers know.
            self.param_groups.pop()
            raise

    def _take_group(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            state = offloaded(param)
            if state is None and param.numel() == 0:
                continue
            if state is None or not isinstance(state.owner, OffloadedModel):
                raise ConfigError(
                    f"a parameter of shape {tuple(param.shape)} is not offloaded; call trainer.offload(model, job) "
                    "before RemoteOptimizer, and give what stays local to an optimizer of torch"
                )
            if self._model is not None and state.owner is not self._model:
                raise ConfigError(
                    f"parameter {state.name!r} is of another offloaded model; make one RemoteOptimizer for each model"
                )
            self._model = state.owner
        if self._model is None:
            raise ConfigError("RemoteOptimizer got only empty parameters; there is nothing to optimize")
        if self._ready:
            self._send_groups()

    def _send_groups(self) -> None:
        job = self.job
        self._trained = self._find_trained()
        groups = [
            pb.OptimizerGroup(
                options=self._options(group),
                parameters=[s.remote.index for p in group["params"] if (s := offloaded(p)) is not None and s.remote],
            )
            for group in self.param_groups
        ]
        kept_rows = [
            state.remote.index
            for state in self.states()
            if state.remote is not None and state.by_rows and self._owner.config.untouched_rows == "keep"
        ]
        try:
            call_all(
                job.servers,
                "SetOptimizer",
                lambda server: pb.SetOptimizerRequest(
                    session_id=server.session_id,
                    class_name=self._class_name,
                    groups=groups,
                    trained=self._trained,
                    gradient_reduction=_REDUCTIONS[self._owner.config.gradient_reduction],
                    ema_decay=self.ema_decay,
                    max_staleness=self._owner.config.max_staleness,
                    kept_rows=kept_rows,
                ),
                job.timeout,
            )
        except ServerFull:
            raise
        except RequestRefused as error:
            raise JobMismatch(str(error)) from None

    def state_again(self) -> None:
        """Tells the servers of new sessions what those of before were told."""
        self._send_groups()

    def _state_thawed(self) -> None:
        """Tells the servers of parameters that take gradients since they were told last."""
        if not set(self._trained).issuperset(self._find_trained()):
            self._send_groups()

    def _find_trained(self) -> list[int]:
        """The parameters that take gradients by now; servers store others without optimizer state."""
        return [
            state.remote.index
            for state in self.states()
            if state.remote is not None
            and state.param.requires_grad
            and state.remote.dtype in (torch.float32, torch.float64)
        ]

    def _options(self, group: dict[str, Any]) -> dict[str, pb.Value]:
        try:
            # Schedulers keep notes of their own in the groups; only what the class knows goes out.
            return values.encode_options({name: group[name] for name in self.defaults})
        except TypeError as error:
            raise ConfigError(f"torch.optim.{self._class_name} cannot run on the servers: {error}") from None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Has the servers apply the gradients that all trainers pushed since the last `zero_grad`.

        Returns when every gradient of this trainer has arrived, not when the update is done: the next
        use of a parameter waits for its own. Parameters that got no gradient on any trainer stay as they
        are. A closure is refused with ConfigError.
        """
        if closure is not None:
            raise ConfigError(
                "RemoteOptimizer.step() takes no closure: the update runs on the servers and cannot call back. Compute "
                "the loss and its gradients before step()"
            )
        self._check_usable()
        job, model, groups = self.job, self._owner, self._encoded_groups()
        model.announcement.check_step(groups)
        model.between_passes()
        states = self.states()
        model.gradients.before_step(states)
        if self._skip_nonfinite and not all_finite(model, states):
            model.gradients.drop(states)
            self._skipped += 1
            return None
        if not model.announcement.made:
            self._state_thawed()
        job.transfer.flush()
        answers: list[pb.StepResponse] = call_all(
            job.servers,
            "Step",
            lambda server: pb.StepRequest(
                session_id=server.session_id,
                step=job.step,
                groups=groups,
                edits=model.gradients.edits,
            ),
            job.timeout,
        )
        job.regroup_at = answers[0].regroup_at
        # Made although somebody was told of gradients that are not finite.
        model.gradients.found_nonfinite = False
        job.step += 1
        model.gradients.stepped()
        model.coordinator.stepped()
        return None

    @contextmanager
    def last_backward(self, *, zero_grad: bool = False) -> Iterator[None]:
        """Context of the backward that completes the step's gradients; `step` follows.

        Servers then update parameters while this backward goes on for others, so that the next forward waits
        less. It states on entering that the step uses the options that the groups have now, with gradients as
        they come: until `step`, options may not change, and there can be no clipping, `zero_grad`, further
        backward or commit, which raise ConfigError. Results are the same bit for bit. Trainers need not all
        use it, but options have to be the same on all; nothing is updated before the last trainer's word.

        Which gradients are final at once is learned: in the first such backward none is. If one fails after
        that, the step is half done, and the job goes back to its last commit: StepHalfDone says so. A backward
        that fails sooner can be repeated.

        zero_grad: `step` drops the gradients, as `self.zero_grad()` right after it would. Servers keep none that they
        have used then; where their memory is limited it would go to the disk.
        """
        self._check_usable()
        model = self._owner
        if self.job.read_only:
            raise ConfigError(f"job {self.job.name!r} was opened with read_only=True and cannot step")
        if self._skip_nonfinite:
            raise ConfigError(
                "with skip_nonfinite=True servers look at all gradients before they use any, so that no update can "
                "begin during backward; leave last_backward() away"
            )
        model.announcement.check_none("another last_backward()")
        model.gradients.before_step(self.states())
        if model.gradients.final or model.gradients.edits:
            raise ConfigError(
                "gradients were clipped or unscaled already, so no backward can come before step(); call zero_grad() "
                "to begin anew"
            )
        self._state_thawed()
        model.announcement.begin(self._encoded_groups(), zero_grad=zero_grad)
        try:
            yield
        except BaseException as error:
            model.announcement.break_off(error)
            raise
        if model.announcement.running:
            model.announcement.end()

    def _check_usable(self) -> None:
        self.job.check()
        if self.job.transfer.weights:
            raise ConfigError("there is no step inside trainer.ema_weights(), which is for evaluation")
        self.job.last_commit.settle(block=False)
        if self._owner.optimizer != weakref.ref(self):
            raise ConfigError(
                f"another RemoteOptimizer was made for job {self.job.name!r} after this one; a job has one optimizer: "
                "use param groups for parameters that are to be treated differently"
            )

    def _encoded_groups(self) -> list[pb.OptimizerGroup]:
        return [pb.OptimizerGroup(options=self._options(group)) for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients that were pushed, for the parameters of this optimizer.

        set_to_none: False leaves gradients of 0 where there were some, with which a step is made, as in torch.
        """
        self._owner.between_passes()
        self._owner.gradients.drop(self.states(), keep_zeros=not set_to_none)

    @property
    def skipped_steps(self) -> int:
        return self._skipped + self._owner.gradients.skipped
