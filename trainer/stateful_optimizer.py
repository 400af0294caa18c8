"""The state of a remote optimizer as torch gives and takes it: state dicts, and single parameters' state."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from protos import zero_ps_pb2 as pb
from trainer.agreement import on_every_rank
from trainer.errors import ConfigError
from trainer.job import Job
from trainer.offload import OffloadedModel
from trainer.optimizer_state import (
    check_state,
    clear_state,
    initial_state,
    kept_state,
    list_state,
    pull_state,
    push_state,
)
from trainer.parameter import OffloadedParameter, offloaded

_Loaded = tuple[OffloadedParameter, Mapping[str, Any], Mapping[str, bool]]
"""A parameter, the state that it gets, and what of that has an element for each of the parameter's."""


class StatefulOptimizer(Optimizer):
    """What `RemoteOptimizer` offers of its state. The state itself is on the servers."""

    job: Job
    _class: type[Optimizer]
    _model: OffloadedModel | None
    # Parameters that servers know to be trained, as indices into the manifest.
    _trained: list[int]

    def _send_groups(self) -> None:
        """States the groups to the servers."""
        raise NotImplementedError

    def state_for(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """A parameter's optimizer state, under torch's names, as CPU tensors; empty if it was never updated.

        Waits for the update of the last step.
        """
        state = self._state_of(param)
        if state is None:
            return {}
        return next((pull_state(self.job, state, arrays) for state, arrays in self._listed([state])), {})

    def state_items(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The name and state of each parameter that has any, one at a time, so that they need not all fit here.

        No step may come in between: the state is that of the job's present step.
        """
        for state, arrays in self._listed(self.states()):
            yield state.name, pull_state(self.job, state, arrays)

    def state_dict(self) -> dict[str, Any]:
        """What the class's own `state_dict` gives, all of it here: a plain optimizer of the class can load it.

        Ranks need not agree to call this.
        """
        try:
            for state, arrays in self._listed(self.states()):
                self.state[state.param] = pull_state(self.job, state, arrays)
            for group in self.param_groups:
                self._fill_in(group)
            return super().state_dict()
        finally:
            self.state.clear()

    def _fill_in(self, group: dict[str, Any]) -> None:
        """Adds what torch keeps of parameters that were never updated."""
        options = {name: group[name] for name in self.defaults}
        for param in group["params"]:
            state = self._state_of(param)
            if param in self.state or state is None or state.remote is None:
                continue
            if values := initial_state(self._class, options, state.shape, state.remote.dtype):
                self.state[param] = values

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` of this or of a plain optimizer of the class gave; every rank calls it.

        Options of the groups become those of each rank's argument, the servers' state that of rank 0's. Raises
        ValueError where it does not fit, on the rank where that is so, and ConfigError on the others; nothing is
        changed then.
        """
        state_dict = state_dict.copy()

        def check() -> tuple[list[dict[str, Any]], list[_Loaded]]:
            nonlocal state_dict
            self._owner.announcement.check_none("load_state_dict()")
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = before(self, state_dict) or state_dict
            return self._fitting(state_dict)

        groups, loaded = on_every_rank(self.job, "load_state_dict()", check)

        def take_options() -> None:
            for group, own in zip(groups, self.param_groups, strict=True):
                own.update({name: value for name, value in group.items() if name != "params"})
            self._send_groups()

        on_every_rank(self.job, "stating the options that were loaded", take_options)
        self._replace_state(loaded)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _fitting(self, state_dict: dict[str, Any]) -> tuple[list[dict[str, Any]], list[_Loaded]]:
        """The groups and the state of parameters in a state dict. Raises ValueError if it is another optimizer's."""
        groups = copy.deepcopy(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        loaded: list[_Loaded] = []
        for group, own in zip(groups, self.param_groups, strict=True):
            if len(group["params"]) != len(own["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
                )
            options = {name: group.get(name, default) for name, default in self.defaults.items()}
            kept = kept_state(self._class, options)
            for number, param in zip(group["params"], own["params"], strict=True):
                if (state := self._state_of(param)) is not None:
                    values = state_dict["state"].get(number, {})
                    check_state(state, values, kept)
                    if state.param.requires_grad or (state.remote and state.remote.index in self._trained):
                        loaded.append((state, values, kept))
        return groups, loaded

    def load_state_for(self, param: torch.Tensor, values: Mapping[str, Any]) -> None:
        """Replaces one parameter's optimizer state by that of rank 0; every rank calls it.

        values: as `state_for` gives it; empty to have the parameter begin anew. Raises ValueError for what
            the class does not keep, and ConfigError on the other ranks; nothing is changed then.
        """

        def check() -> list[_Loaded]:
            state = self._state_of(param)
            if state is None:
                return []
            group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
            kept = kept_state(self._class, {name: group[name] for name in self.defaults})
            check_state(state, values, kept)
            return [(state, values, kept)]

        self._replace_state(on_every_rank(self.job, "load_state_for()", check))

    def _replace_state(self, loaded: Sequence[_Loaded]) -> None:
        def prepare() -> None:
            self._owner.announcement.check_none("replacing optimizer state")
            self._owner.between_passes()
            self.job.check()

        def replace() -> None:
            if self.job.rank == 0:
                clear_state(self.job, [state for state, _, _ in loaded])
                for state, values, kept in loaded:
                    push_state(self.job, state, values, kept)
                self.job.transfer.flush()

        # Nobody may still be reading what is replaced.
        on_every_rank(self.job, "getting ready to replace optimizer state", prepare)
        on_every_rank(self.job, "replacing optimizer state", replace)

    def _listed(self, states: Sequence[OffloadedParameter]) -> Iterator[tuple[OffloadedParameter, list[pb.ArraySpec]]]:
        """Those of the parameters that have state, and what."""
        self._owner.announcement.check_none("reading optimizer state")
        self.job.check()
        self.job.transfer.flush()
        for state, arrays in zip(states, list_state(self.job, states), strict=True):
            if arrays:
                yield state, arrays

    def _state_of(self, param: torch.Tensor) -> OffloadedParameter | None:
        """None for one without elements."""
        if not any(param is own for group in self.param_groups for own in group["params"]):
            raise ConfigError(f"a parameter of shape {tuple(param.shape)} is in no group of this optimizer")
        return offloaded(param)

    def states(self) -> list[OffloadedParameter]:
        """Of the parameters in all groups."""
        return [s for group in self.param_groups for p in group["params"] if (s := offloaded(p)) is not None]

    @property
    def _owner(self) -> OffloadedModel:
        assert self._model is not None
        return self._model
