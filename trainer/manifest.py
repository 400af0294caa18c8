"""What a model asks the servers to keep: its parameters and persistent buffers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from protos import dtypes, names
from protos import zero_ps_pb2 as pb
from trainer.errors import ConfigError
from trainer.parameter import offloaded


@dataclass(frozen=True)
class Entry:
    """A tensor of the model as the manifest lists it."""

    name: str
    tensor: torch.Tensor
    is_buffer: bool

    @property
    def storage_dtype(self) -> torch.dtype:
        return dtypes.storage_dtype(self.tensor.dtype, trainable=not self.is_buffer and self.tensor.requires_grad)

    @property
    def staging_id(self) -> int | None:
        """Under which id the parameter was sent ahead while the model was built."""
        state = None if self.is_buffer else offloaded(self.tensor)
        if state is None or state.remote is None or not state.remote.staged:
            return None
        return state.remote.index


def entries(model: nn.Module) -> list[Entry]:
    """The model's parameters, then its persistent buffers; what is shared is listed once, by its first name.

    Parameters that `Job.init()` sent ahead come in the order of their making, which is the order in
    which they were placed, so that they stay where they are.

    Raises ConfigError, naming it, for one that cannot be stored.
    """
    found = [Entry(name, param, False) for name, param in model.named_parameters()]
    found.sort(key=lambda entry: entry.staging_id if entry.staging_id is not None else len(found) + 1 << 30)
    found += [Entry(name, buffer, True) for name, buffer in persistent_buffers(model)]
    for entry in found:
        what = "buffer" if entry.is_buffer else "parameter"
        if is_lazy(entry.tensor):
            raise ConfigError(
                f"{what} {entry.name!r} is not initialised: run the lazy module once on a sample input before "
                "trainer.offload, or give its sizes when it is made"
            )
        try:
            names.check_parameter_name(entry.name)
            dtypes.from_torch(entry.tensor.dtype)
        except ValueError as error:
            raise ConfigError(f"{what} {entry.name!r}: {error}") from None
    return found


def to_proto(found: list[Entry]) -> pb.Manifest:
    """The entries as the message that opens a job."""
    return pb.Manifest(
        parameters=[
            pb.ParameterSpec(
                name=entry.name,
                shape=list(entry.tensor.shape),
                dtype=dtypes.from_torch(entry.storage_dtype),
                kind=pb.ParameterSpec.KIND_BUFFER if entry.is_buffer else pb.ParameterSpec.KIND_PARAMETER,
                trainable=not entry.is_buffer and entry.tensor.requires_grad,
                staging_id=entry.staging_id,
            )
            for entry in found
        ]
    )


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that are part of a state dict; one that is shared comes once, by its first name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            yield (f"{prefix}.{name}" if prefix else name), buffer
