"""Runs an element-wise class of `torch.optim` on chunks. The arithmetic and the state are torch's own."""

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from protos.names import EMA
from protos.optimizers import check_optimizer
from protos.values import Option
from ps import averages
from ps.chunk import Chunk
from ps.errors import InvalidRequest
from ps.operands import Operands, SomeRows, Whole
from ps.store import OptimizerSpec, StateArray
from ps.tier import Part

_UNSUPPORTED_FLAGS = ("capturable", "differentiable")

_warm_lock = threading.Lock()


def warm_up() -> None:
    """Makes the first SetOptimizer quick: the first optimizer of a process loads torch._dynamo."""
    with _warm_lock:
        torch.optim.SGD([torch.zeros(1)])


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Raises InvalidRequest, saying why and naming the allowed classes."""
    try:
        check_optimizer(name)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    cls: type[torch.optim.Optimizer] = getattr(torch.optim, name)
    return cls


def resolve_options(class_name: str, options: Mapping[str, Option]) -> tuple[dict[str, Any], set[StateArray]]:
    """A group's options, complete and tried out, and what state the class keeps under them.

    Options that say nothing about the implementation get the fused one where the class has it on the CPU.
    Raises InvalidRequest for what torch refuses.
    """
    cls = optimizer_class(class_name)
    defaults = cls([torch.zeros(1)]).defaults  # type: ignore[call-arg]
    if unknown := sorted(set(options) - set(defaults)):
        raise InvalidRequest(
            f"torch.optim.{class_name} has no option {unknown[0]!r}; it has {', '.join(sorted(defaults))}"
        )
    resolved = {**defaults, **options}
    for flag in _UNSUPPORTED_FLAGS:
        if resolved.get(flag):
            raise InvalidRequest(f"option {flag}=True has no meaning on a parameter server")
    if "fused" in resolved and resolved["fused"] is None and resolved.get("foreach") is None:
        try:
            fused = {**resolved, "fused": True}
            return fused, _try(cls, fused)
        except InvalidRequest:
            pass  # Whatever is wrong shows again below, without fused.
    return resolved, _try(cls, resolved)


def state_arrays(class_name: str, options: Mapping[str, Option]) -> dict[str, StateArray]:
    """What a class keeps for each parameter under these options, by name."""
    return {array.name: array for array in resolve_options(class_name, options)[1]}


def _try(cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> set[StateArray]:
    """Steps a tensor of two elements; whatever torch has against the options is raised here."""
    weight = torch.zeros(2)
    weight.grad = torch.ones(2)
    try:
        optimizer = _build(cls, options, weight)
        optimizer.step()
    except Exception as error:
        raise InvalidRequest(f"torch.optim.{cls.__name__} refuses its options: {error}") from error
    return {
        StateArray(name, None if value.dim() else value.dtype, value.dim() > 0)
        for name, value in optimizer.state[weight].items()
        if isinstance(value, torch.Tensor)
    }


def _build(cls: type[torch.optim.Optimizer], options: Mapping[str, Any], weight: torch.Tensor) -> torch.optim.Optimizer:
    # Some defaults (Adam's decoupled_weight_decay) are no arguments of the class, only group options.
    accepted = inspect.signature(cls).parameters
    arguments = {name: value for name, value in options.items() if name in accepted}
    return cls([{"params": [weight], **options}], **arguments)


@dataclass(frozen=True)
class Options:
    """The options of each group: as the trainer stated them, completed, and what state they lead to."""

    stated: list[dict[str, Option]]
    resolved: list[dict[str, Any]]
    arrays: dict[str, StateArray]


class ChunkOptimizer:
    """One torch optimizer for a job; each call of `update` lends it some chunks and their state.

    options: those of the last step that ran.
    group_of: each parameter's group, by their numbers.
    arrays: every kind of state that the class has kept so far, by name, and the average of weights.
    ema_decay: of that average, or None if there is none.
    """

    def __init__(self, spec: OptimizerSpec, num_parameters: int) -> None:
        self._cls = optimizer_class(spec.class_name)
        self.class_name = spec.class_name
        if not spec.groups:
            raise InvalidRequest("an optimizer needs at least one parameter group")
        self.ema_decay = spec.ema_decay
        self.arrays: dict[str, StateArray] = {} if spec.ema_decay is None else {EMA: averages.ARRAY}
        self.group_of: dict[int, int] = {}
        for number, group in enumerate(spec.groups):
            for parameter in group.parameters:
                if parameter >= num_parameters:
                    raise InvalidRequest(f"parameter {parameter} is not in the manifest")
                if parameter in self.group_of:
                    raise InvalidRequest(f"parameter {parameter} is in more than one parameter group")
                self.group_of[parameter] = number
        self._latest: Options | None = None
        self.set_options(self.resolve([group.options for group in spec.groups]))
        self._optimizer = _build(self._cls, self.options.resolved[0], torch.zeros(1))

    def resolve(self, groups: Sequence[Mapping[str, Option]]) -> "Options":
        """Checks the options of each group. Raises InvalidRequest."""
        stated = [dict(options) for options in groups]
        latest = self._latest
        if latest is not None:
            if stated == latest.stated:
                return latest
            if len(stated) != len(latest.stated):
                raise InvalidRequest(
                    f"the step names {len(stated)} parameter groups, the optimizer has {len(latest.stated)}"
                )
        resolved = [resolve_options(self.class_name, options) for options in stated]
        arrays = {array.name: array for _, kept in resolved for array in kept}
        self._latest = Options(stated, [options for options, _ in resolved], arrays)
        return self._latest

    def set_options(self, options: "Options") -> None:
        """From here on updates run with these."""
        self.options = options
        self.arrays.update(options.arrays)

    @property
    def fused(self) -> bool:
        """Whether updates allocate nothing but new state."""
        return all(options.get("fused") for options in self.options.resolved)

    def new_state(self, chunk: Chunk) -> list[Part]:
        """Parts for state that the chunk has not got yet, and that an update may create."""
        for name, array in self.arrays.items():
            chunk.state_part(name, chunk.dtype if array.dtype is None else array.dtype, scalar=not array.per_element)
        return [part for part in chunk.state.values() if not part.filled]

    def update(
        self, chunks: Sequence[tuple[Chunk, torch.Tensor]], rows: Mapping[Chunk, torch.Tensor] = MappingProxyType({})
    ) -> None:
        """Steps chunks, each with its gradient (the weight's shape and dtype), in place.

        rows: of some of them the rows that are stepped, by their numbers; the others keep weight and state.

        Expects the chunks' locks to be held, and in a limited tier a lease of their weights and state and of
        `new_state`. All of them have to be in groups, and either all have optimizer state or none: torch's
        fused SGD takes a batch for one or the other.
        """
        optimizer = self._optimizer
        members: dict[int, list[torch.Tensor]] = {}
        operands: list[Operands] = []
        optimizer.state.clear()
        try:
            for chunk, gradient in chunks:
                some = rows.get(chunk)
                lent: Operands = Whole(chunk, gradient) if some is None else SomeRows(chunk, gradient, some)
                operands.append(lent)
                lent.weight.grad = lent.gradient
                optimizer.state[lent.weight] = lent.state
                members.setdefault(self.group_of[chunk.parameter], []).append(lent.weight)
            optimizer.param_groups = [
                {"params": weights, **self.options.resolved[number]} for number, weights in members.items()
            ]
            optimizer.step()
            for lent in operands:
                lent.keep(optimizer.state[lent.weight])
        finally:
            for lent in operands:
                lent.weight.grad = None
            optimizer.state.clear()
            optimizer.param_groups = []
