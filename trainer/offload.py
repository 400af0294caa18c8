"""`trainer.offload` and `trainer.remove`: from a plain model to one whose parameters live on servers, and back."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from trainer import saved, sparse_rows
from trainer.announcement import Announcement
from trainer.config import OffloadConfig
from trainer.coordinator import Coordinator, in_backward
from trainer.errors import ConfigError, ReleasedParameterError
from trainer.gradients import Gradients
from trainer.hooks import Unit, current_frame, end_abandoned
from trainer.job import Job
from trainer.links import PushKind
from trainer.manifest import persistent_buffers
from trainer.memory import MemoryPool, empty_of
from trainer.mode import open_group
from trainer.opening import open_job
from trainer.parameter import NOT_HERE, OffloadedParameter, materialise, offloaded
from trainer.residency import cost, cost_of
from trainer.saved import SavedParameter
from trainer.transfer import Destination, RemoteParameter
from trainer.units import choose_units, runs
from trainer.writing import write_values

if TYPE_CHECKING:
    from trainer.optimizer import RemoteOptimizer

_ATTRIBUTE = "_zero_ps_model"
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def offload(
    model: nn.Module,
    job: Job,
    config: OffloadConfig | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Hands a model's parameters to the job's servers and hooks its submodules; returns the same model.

    A new job takes rank 0's values; a job that has state gives the model its own. Afterwards every
    parameter is released: it has its shape and dtype but no memory, and is gathered around each use.
    Works on a model that was built under `job.init()` as on one that was not.

    device: where parameters are gathered and buffers are; None leaves each where it is ("meta" becomes
        the CPU).

    Raises ConfigError for a model that cannot be offloaded, JobMismatch when the job is another model's.
    """
    config = config or OffloadConfig()
    job.check()
    if find(model) is not None or any(hasattr(module, _ATTRIBUTE) for module in model.modules()):
        raise ConfigError("this model is offloaded already; call trainer.remove(model) first")
    for name, param in model.named_parameters():
        state = offloaded(param)
        if state is not None and isinstance(state.owner, OffloadedModel):
            raise ConfigError(
                f"parameter {name!r} is offloaded already, as {state.name!r} of job {state.owner.job.name!r}; a "
                "parameter is one job's: offload a model that holds all of what shares it"
            )
    _check_overlaps(model)
    if job.model is not None:
        raise ConfigError(
            f"job {job.name!r} has a model already; a job is one model's state: connect another job for another model"
        )
    model.__dict__[_ATTRIBUTE] = OffloadedModel(model, job, config, None if device is None else torch.device(device))
    return model


def remove(model: nn.Module) -> nn.Module:
    """Takes the hooks off and leaves a plain model with whole parameters, at the job's present step.

    The job stays on the servers; the model can be offloaded to it again. Returns the model.
    """
    offloaded_model = find(model)
    if offloaded_model is None:
        raise ConfigError("this model is not offloaded")
    offloaded_model.remove()
    del model.__dict__[_ATTRIBUTE], model.__dict__[_DDP_IGNORES]
    return model


def release(model: nn.Module) -> None:
    """Gives back the memory of everything that stays gathered between uses, until it is used again."""
    offloaded_model = find(model)
    if offloaded_model is None:
        raise ConfigError("this model is not offloaded")
    offloaded_model.release()


def find(model: nn.Module) -> "OffloadedModel | None":
    """What `offload` made of the model, or None."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, OffloadedModel) else None


class OffloadedModel:
    """A model, its parameters' states and the hooks on it. The owner of released parameters."""

    def __init__(self, model: nn.Module, job: Job, config: OffloadConfig, device: torch.device | None) -> None:
        self._module = weakref.ref(model)
        self.job = job
        self.config = config
        self.memory = MemoryPool()
        self.group = open_group(job, config)
        self.announcement = Announcement(job, self.group)
        self.coordinator = Coordinator(job, config, self.memory, self.announcement, self.group)
        self.gradients = Gradients(job, config, self.memory, self.coordinator, self.announcement, self.group)
        # Autograd's tasks that gather parameters of this model, each within the one before it.
        self._backwards: list[int] = []
        # The optimizer that was made last; see `RemoteOptimizer.step`.
        self.optimizer: weakref.ref[RemoteOptimizer] | None = None
        # Whatever may be wrong with the settings comes out before anything has changed.
        units = list(choose_units(model, config))
        tables = [module for _, module in sparse_rows.choose(model, config)]
        largest = self._check_units(units, {id(module.weight) for module in tables}, device)
        remotes = open_job(model, job)
        self.states: list[OffloadedParameter] = []
        for name, param in model.named_parameters():
            self._take(name, param, remotes[name], device)
        self.buffers = [(_materialised(model, name, device), remotes[name]) for name, _ in persistent_buffers(model)]
        self._move_buffers(model, device)
        self._lookups = [
            sparse_rows.RowLookup(module, state) for module in tables if (state := offloaded(module.weight)) is not None
        ]
        self._choose_persistent(*largest)
        self._read_buffers()
        self.units = [Unit(module, name, self, leaf) for name, module, leaf in units]
        # DistributedDataParallel reads parameters below Python, where nothing gathers them; asked to ignore
        # them it says that it has nothing to do.
        model.__dict__[_DDP_IGNORES] = [state.name for state in self.states]
        job.model = self

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        module = self._module()
        if module is None:
            raise ConfigError(f"the model of job {self.job.name!r} does not exist any more; connect again for another")
        return module

    def __deepcopy__(self, memo: object) -> "OffloadedModel":
        raise TypeError(
            "an offloaded model cannot be copied or pickled: its parameters are on the servers; call "
            "trainer.remove(model) for a plain model first"
        )

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        self.__deepcopy__(None)
        raise AssertionError

    # ------------------------------------------------------------ taking over and giving back

    def _take(self, name: str, param: nn.Parameter, remote: RemoteParameter, device: torch.device | None) -> None:
        """Releases a parameter for the first time."""
        if param.numel() == 0:
            return
        if param.is_meta:
            materialise(param)
        state = offloaded(param) or OffloadedParameter(param, name, self)
        state.name, state.owner, state.remote = name, self, remote
        state.detach_class()
        # A storage of its own, in C order: the one it has may be shared with tensors that stay.
        param.grad = None
        state.convert(empty_of(state.shape, self._dtype(param), device or param.device))
        state.guard()
        self.states.append(state)

    def _move_buffers(self, model: nn.Module, device: torch.device | None) -> None:
        if device is None:
            return
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def _check_units(
        self, units: Sequence[tuple[str, nn.Module, bool]], by_rows: set[int], device: torch.device | None
    ) -> tuple[int, int]:
        """The most bytes and the most elements that a unit has to gather.

        by_rows: ids of parameters that are never whole.
        Raises OutOfBudget for a unit that alone exceeds a limit.
        """
        most_bytes, most_elements = 0, 0
        for name, module, leaf in units:
            # What never runs, as a list of parameters, is never gathered at once.
            params = [
                p for p in module.parameters(recurse=leaf) if runs(module) and not is_lazy(p) and id(p) not in by_rows
            ]
            nbytes = sum(cost_of(p.numel() * self._dtype(p).itemsize, _device(p, device)) for p in params)
            elements = sum(p.numel() for p in params)
            self.coordinator.residency.check(nbytes, elements, name)
            most_bytes, most_elements = max(most_bytes, nbytes), max(most_elements, elements)
        return most_bytes, most_elements

    def _dtype(self, param: nn.Parameter) -> torch.dtype:
        """In which a parameter is gathered."""
        wanted = self.config.param_dtype
        return wanted if wanted is not None and param.dtype.is_floating_point else param.dtype

    def _choose_persistent(self, unit_bytes: int, unit_elements: int) -> None:
        """Half of what the limits leave beside the largest unit, and the next one that is asked for ahead of
        it, may stay taken."""
        self.persistent: list[OffloadedParameter] = []
        residency = self.coordinator.residency
        left_bytes = (residency.max_bytes - 2 * unit_bytes) / 2
        left = min(self.config.model_persistence_threshold, (residency.max_elements - 2 * unit_elements) / 2)
        for state in sorted(self.states, key=lambda state: state.numel):
            if state.by_rows:
                continue
            if state.numel >= self.config.param_persistence_threshold or state.numel > left or cost(state) > left_bytes:
                break
            state.persistent = True
            self.persistent.append(state)
            left -= state.numel
            left_bytes -= cost(state)

    def remove(self) -> None:
        self.job.check()
        self.coordinator.sweep()
        for unit in self.units:
            unit.remove()
        for lookup in self._lookups:
            lookup.remove()
        self.coordinator.fetch_for_good(self.states)
        for state in self.states:
            saved.unregister(state)
            state.detach()
        self.leave()
        self.job.model = None

    def leave(self) -> None:
        """Ends the group of trainers, if there is one."""
        if self.group is not None:
            self.group.close()

    def release(self) -> None:
        self.coordinator.sweep()
        self.coordinator.discard_all()
        self.memory.shrink(0)

    def forget(self) -> None:
        """The sessions have ended: nothing that is here or on its way counts any more, nor what servers were told."""
        self._forget_backwards()
        end_abandoned(self)
        self.announcement.forget()
        self.gradients.forget()
        self.coordinator.forget()
        for state in self.states:
            state.version, state.stale = NOT_HERE, False
            # A graph of before has no backward any more.
            state.edition = (state.edition[0] + 1, ())

    def reopen(self) -> None:
        """States to the servers of new sessions what those of before were told: the model and its optimizer."""
        # As a trainer does that comes for the first time, which some of the others may be.
        open_group(self.job, self.config)
        remotes = open_job(self.module, self.job)
        for state in self.states:
            state.remote = remotes[state.name]
        self.buffers = [(buffer, remotes[remote.name]) for buffer, remote in self.buffers]
        if self.job.restored:
            self._read_buffers()
        optimizer = None if self.optimizer is None else self.optimizer()
        if optimizer is not None:
            optimizer.state_again()

    def between_passes(self) -> None:
        """Releases what a pass left that did not come to its end."""
        self._forget_backwards()
        end_abandoned(self)
        self.coordinator.sweep()

    # ------------------------------------------------------------ forward

    def before_root_forward(self, unit: Unit, inputs: object) -> None:
        """Called when a forward begins that is not part of another one."""
        if in_backward():
            # Computed once more, by activation checkpointing: a part of the backward.
            self._enter_backward()
        else:
            self._forget_backwards()
            self.coordinator.begin_forward(unit.module, unit.name, inputs)

    def after_root_forward(self, *, complete: bool) -> None:
        if not in_backward():
            self.coordinator.end_forward(complete=complete)

    def touch(self, states: Sequence[OffloadedParameter], func: Callable[..., Any]) -> None:
        """Something uses released parameters.

        In a forward: parameters of other modules; they are gathered until it ends, and from then on
        before it begins. In a backward: gathered until it ends. Elsewhere: an error.
        """
        frame = current_frame()
        if frame is not None:
            frame.use(states)
            for state in states:
                frame.unit.add_external(state)
                self.gradients.watch(state)
            return
        if in_backward():
            for state in states:
                self._fetch_for_backward(state)
            return
        listed = ", ".join(repr(state.name) for state in states)
        raise ReleasedParameterError(
            f"parameter {listed} is released, and {getattr(func, '__name__', func)!s} uses it outside of a forward or "
            "backward pass; use it inside 'with trainer.gathered(param):' (modify=True to change it)"
        )

    def in_pass(self) -> bool:
        return current_frame() is not None or in_backward()

    def assign(self, state: OffloadedParameter, values: torch.Tensor) -> bool:
        """`param.copy_(values)` outside of a pass, as `load_state_dict` does: goes to the servers.

        Rank 0's values count; the next fetch waits until every rank is past the assignments.
        """
        if self.in_pass():
            return False
        self.announcement.check_none(f"assigning to parameter {state.name!r}")
        self.coordinator.discard(state)
        write_values(self.job, state, values)
        state.version = NOT_HERE
        state.edition = (state.edition[0] + 1, ())
        self.coordinator.assigned = True
        return True

    def converting(self, state: OffloadedParameter) -> None:
        self.coordinator.disown(state)
        saved.unregister(state)

    def converted(self, state: OffloadedParameter) -> None:
        saved.register(state)

    # ------------------------------------------------------------ backward

    def fetch_saved(self, note: SavedParameter) -> None:
        state = note.state
        if note.version != self.job.step:
            raise RuntimeError(
                f"parameter {state.name!r} is needed for gradient computation as it was at step {note.version}, but "
                f"the job is at step {self.job.step}: an optimizer step came between forward and backward"
            )
        if note.edition != state.edition[0]:
            raise RuntimeError(
                f"parameter {state.name!r} is needed for gradient computation, but its values were replaced between "
                "forward and backward, by gathered(modify=True), load_state_dict() or a recovery"
            )
        if in_backward():
            self._fetch_for_backward(state)
        else:
            self.coordinator.fetch_for_a_look(state)

    def _fetch_for_backward(self, state: OffloadedParameter) -> None:
        self._enter_backward()
        self.coordinator.fetch((state,), state.module_name)

    def _enter_backward(self) -> None:
        # By the task's number: a backward that failed never called back.
        task = torch._C._current_graph_task_id()
        if task in self._backwards:
            return
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._end_of_backward, task))
        if not self._backwards:
            self.coordinator.begin_backward()
        # Else a part of the one that it is in, as what reentrant checkpoints compute.
        self._backwards.append(task)

    def _end_of_backward(self, task: int) -> None:
        if task in self._backwards:
            del self._backwards[self._backwards.index(task) :]
        if not self._backwards:
            self.coordinator.end_backward()

    def _forget_backwards(self) -> None:
        """Of backwards that failed."""
        if not in_backward():
            self._backwards.clear()

    def unsaved(self, state: OffloadedParameter) -> None:
        self.coordinator.unsaved(state)

    # ------------------------------------------------------------ buffers

    def write_buffers(self) -> None:
        """Sends the persistent buffers as they are, to become part of a commit."""
        for buffer, remote in self.buffers:
            data = buffer().detach().to("cpu").contiguous()
            if tuple(data.shape) != remote.grid.shape:
                raise ConfigError(
                    f"buffer {remote.name!r} has shape {tuple(data.shape)} and had {remote.grid.shape} when the job "
                    "was made; a buffer whose shape changes cannot be committed: register it with persistent=False"
                )
            self.job.transfer.push(remote, data, PushKind.WEIGHT, step=self.job.step)
        self.job.transfer.flush()

    def _read_buffers(self) -> None:
        if not self.buffers:
            return
        targets = [(buffer(), remote) for buffer, remote in self.buffers]
        landed = [torch.empty(t.numel() * t.element_size(), dtype=torch.uint8) for t, _ in targets]
        self.job.transfer.pull(
            [Destination(remote, data, t.dtype) for (t, remote), data in zip(targets, landed, strict=True)],
            self.job.step,
        ).wait()
        with torch.no_grad():
            for (target, _), data in zip(targets, landed, strict=True):
                target.copy_(data.view(target.dtype).reshape(target.shape))


def _device(param: nn.Parameter, wanted: torch.device | None) -> torch.device:
    """On which a parameter will be gathered."""
    device = wanted or param.device
    return torch.device("cpu") if device.type == "meta" else device


def _check_overlaps(model: nn.Module) -> None:
    """Raises ConfigError for two parameters that share memory: each would get memory of its own."""
    ranges: dict[int, list[tuple[int, int, str]]] = {}
    for name, param in model.named_parameters():
        if is_lazy(param) or offloaded(param) is not None or param.is_meta or not param.numel():
            continue
        start = param.storage_offset() * param.element_size()
        stop = start + (sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True)) + 1) * (
            param.element_size()
        )
        others = ranges.setdefault(param.untyped_storage()._cdata, [])
        for other_start, other_stop, other in others:
            if start < other_stop and other_start < stop:
                raise ConfigError(
                    f"parameters {other!r} and {name!r} are different parameters over the same memory; tie them by "
                    "assigning one Parameter to both modules"
                )
        others.append((int(start), int(stop), name))


def _materialised(model: nn.Module, name: str, device: torch.device | None) -> Callable[[], torch.Tensor]:
    """A getter for a buffer, which modules may assign anew; a meta buffer becomes a real one first."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    buffer = module._buffers[leaf]
    assert buffer is not None
    if buffer.is_meta:
        module._buffers[leaf] = torch.empty_like(buffer, device=device or "cpu")

    def get() -> torch.Tensor:
        found = module._buffers[leaf]
        if found is None:
            raise ConfigError(f"buffer {name!r} is None now and was a tensor when the job was made")
        return found

    return get
