"""Optimizer hyperparameters on the wire: plain numbers, flags, names and tuples, never pickles."""

from collections.abc import Mapping

import torch

from protos import zero_ps_pb2 as pb

Option = float | int | bool | str | tuple[float, ...] | None


def encode_options(options: Mapping[str, object]) -> dict[str, pb.Value]:
    """A param group's options as messages. A tensor of one element counts as its number.

    Raises TypeError, naming the option, for a value of any other type.
    """
    return {name: _encode(name, value) for name, value in options.items()}


def decode_options(options: Mapping[str, pb.Value]) -> dict[str, Option]:
    """The inverse of `encode_options`; sequences come back as tuples of floats."""
    return {name: _decode(value) for name, value in options.items()}


def _encode(name: str, value: object) -> pb.Value:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is None:
        return pb.Value()
    if isinstance(value, bool):
        return pb.Value(flag=value)
    if isinstance(value, int):
        return pb.Value(integer=value)
    if isinstance(value, float):
        return pb.Value(number=value)
    if isinstance(value, str):
        return pb.Value(text=value)
    if isinstance(value, (tuple, list)):
        numbers = [v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in value]
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
            return pb.Value(numbers=pb.Numbers(values=[float(v) for v in numbers]))
    raise TypeError(
        f"optimizer option {name}={value!r} has type {type(value).__name__}; "
        "numbers, flags, strings, None and tuples of numbers can be sent to the servers"
    )


def _decode(value: pb.Value) -> Option:
    match value.WhichOneof("kind"):
        case "number":
            return value.number
        case "integer":
            return value.integer
        case "flag":
            return value.flag
        case "text":
            return value.text
        case "numbers":
            return tuple(value.numbers.values)
    return None
