"""`trainer.ema_weights`: a model that computes with the moving average of its weights, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from protos.names import EMA
from trainer.errors import ConfigError
from trainer.offload import OffloadedModel, find
from trainer.parameter import NOT_HERE


@contextmanager
def ema_weights(model: nn.Module) -> Iterator[None]:
    """Context in which an offloaded model has the average of its weights that `RemoteOptimizer(ema_decay=...)` keeps.

    Forwards, `trainer.gathered` and state dicts see it, wherever the model is used. For evaluation: gradients,
    steps and changes of parameters raise ConfigError inside. Ranks need not agree, unless they fetch as a
    group. Contexts may nest.

    Raises ConfigError where no average is kept, or inside `trainer.gathered` of this model.
    """
    offloaded_model = find(model)
    if offloaded_model is None:
        raise ConfigError("this model is not offloaded, so no server keeps an average of its weights")
    with averaged(offloaded_model):
        yield


@contextmanager
def averaged(model: OffloadedModel) -> Iterator[None]:
    """As `ema_weights`."""
    transfer = model.job.transfer
    if transfer.weights == EMA:
        yield
        return
    optimizer = None if model.optimizer is None else model.optimizer()
    if optimizer is not None and optimizer.ema_decay is None:
        raise ConfigError("no average of the weights is kept: give RemoteOptimizer an ema_decay, as 0.999")
    model.job.check()
    model.announcement.check_none("trainer.ema_weights()")
    _switch(model, EMA)
    try:
        yield
    finally:
        _switch(model, "")


def _switch(model: OffloadedModel, weights: str) -> None:
    if active := next((state for state in model.states if state.active), None):
        raise ConfigError(
            f"parameter {active.name!r} is whole inside trainer.gathered() or a forward; enter and leave "
            "trainer.ema_weights() outside of those"
        )
    model.between_passes()
    model.coordinator.discard_all()
    model.job.transfer.weights = weights
    for state in model.states:
        # What somebody holds a view of is fetched anew, and a graph of one side has no backward on the other.
        state.version = NOT_HERE
        state.edition = (-1 - state.edition[0], state.edition[1])
