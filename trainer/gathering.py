"""`trainer.gathered`: whole parameters outside of forward and backward, to read or to change."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from trainer import saved
from trainer.ema import averaged
from trainer.errors import ConfigError, ModifiedParameterError
from trainer.offload import OffloadedModel
from trainer.parameter import NOT_HERE, OffloadedParameter, offloaded
from trainer.writing import write_values

Fingerprint = tuple[int, ...]


@contextmanager
def gathered(
    params: nn.Module | torch.Tensor | Iterable[torch.Tensor], *, modify: bool = False, ema: bool = False
) -> Iterator[None]:
    """Context in which parameters are whole, at the job's present step.

    params: a module (all of its parameters), a parameter, or several. Those that are not offloaded are
        left alone. Contexts may nest and overlap.
    modify: keeps rank 0's changes, on the servers and on every rank; then every rank has to enter and
        leave together. What other ranks change is dropped. With `param_dtype` set only the elements
        that changed are replaced, so the fp32 masters of the others keep their precision.
    ema: what is whole is the moving average of the weights, and the rest of the model has it, too, as in
        `trainer.ema_weights`.

    Without `modify` ranks need not agree, and a change raises ModifiedParameterError on leaving, naming
    the parameter, after the change was dropped.
    """
    states = _states(params)
    if ema:
        if modify:
            raise ConfigError("trainer.gathered() takes modify=True or ema=True: the average of weights is not to edit")
        with ExitStack() as stack:
            for model in dict.fromkeys(state.model for state in states):
                stack.enter_context(averaged(model))
            stack.enter_context(gathered([state.param for state in states]))
            yield
        return
    models = dict.fromkeys(state.model for state in states)
    groups = [(model, [state for state in states if state.model is model]) for model in models]
    for model, group in groups:
        if modify:
            if model.job.read_only:
                raise ConfigError(
                    f"job {model.job.name!r} was opened with read_only=True, and gathered(modify=True) changes it; "
                    "connect without read_only, or leave modify=True away to look at the parameters"
                )
            model.announcement.check_none("gathered(modify=True)")
            model.job.barrier("entering gathered(modify=True)")
        model.coordinator.fetch(group, "trainer.gathered", private=not modify, exact=True)
    # Only when all are here: what failed for one model has to leave those of another as they were.
    for model, group in groups:
        for state in group:
            state.activate()
            # A loss may be computed here, and its backward may come after.
            model.gradients.watch(state)
    before = {state: (state.version, state.edition[0], _fingerprint(state)) for state in states}
    completed = False
    hooks_saved = not torch.is_inference_mode_enabled() and saved.push_hooks(always=True)
    try:
        yield
        completed = True
    finally:
        if hooks_saved:
            saved.pop_hooks()
        # What a step inside the context made anew is not an edit.
        changed = [
            state
            for state in states
            if state.version == before[state][0] and _fingerprint(state) != _expected(state, *before[state][1:])
        ]
        kept: list[OffloadedParameter] = []
        try:
            if modify and completed:
                for model, group in groups:
                    kept += _keep(model, group, changed)
        finally:
            for state in {*changed, *kept}:
                # Not ours to keep: the next use fetches what the servers have.
                state.version = NOT_HERE
            for state in states:
                state.deactivate()
            for model, group in groups:
                again = [state for state in group if state.active]
                model.coordinator.fetch(again, "trainer.gathered", private=not modify, exact=True)
                model.coordinator.release(group)
            for state in kept:
                # What contexts around this one, in which it is still whole, are to compare with.
                state.edition = (state.edition[0] + 1, _fingerprint(state) if state.active else ())
    if changed and not modify:
        names = ", ".join(repr(state.name) for state in changed)
        raise ModifiedParameterError(
            f"parameter {names} was changed inside trainer.gathered(); the change was dropped. Use "
            "gathered(..., modify=True), on every rank, to keep rank 0's changes"
        )


def _states(params: nn.Module | torch.Tensor | Iterable[torch.Tensor]) -> list[OffloadedParameter]:
    if isinstance(params, nn.Module):
        params = params.parameters()
    elif isinstance(params, torch.Tensor):
        params = (params,)
    return list(dict.fromkeys(state for param in params if (state := offloaded(param)) is not None))


def _expected(state: OffloadedParameter, edition: int, fingerprint: Fingerprint) -> Fingerprint:
    """What the values should look like: as on entry, unless a context inside this one changed them."""
    return fingerprint if state.edition[0] == edition else state.edition[1]


def _fingerprint(state: OffloadedParameter) -> Fingerprint:
    """Changes with the values: the version counter tells of in-place operations, the sums of the bytes
    of what went past it through `.data`."""
    param = state.param
    with torch.no_grad():
        data = param.detach().contiguous().reshape(-1).view(torch.uint8)
        whole = data.numel() // 8 * 8
        words = data[:whole].view(torch.int64)
        mixed = words ^ (words >> 29)
        sums = torch.stack([words.sum(), mixed.sum(), data[whole:].sum()])
        return (param._version, data.numel(), *sums.tolist())


def _keep(
    model: OffloadedModel, group: list[OffloadedParameter], changed: list[OffloadedParameter]
) -> list[OffloadedParameter]:
    """Sends rank 0's changes; returns, on every rank, the parameters that they are of."""
    job = model.job
    by_index = {state.remote.index: state for state in group if state.remote is not None}
    indices = [index for index, state in by_index.items() if state in changed]
    # Nobody may still be reading the old values when the first new one arrives.
    job.barrier("leaving gathered(modify=True)")
    if job.rank == 0:
        for index in indices:
            write_values(job, by_index[index], by_index[index].param.detach())
        job.transfer.flush()
    told = job.barrier("changes of gathered(modify=True)", ",".join(map(str, indices)).encode())[0]
    return [by_index[int(text)] for text in told.decode().split(",") if text]
