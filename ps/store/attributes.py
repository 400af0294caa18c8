"""A generation's header as the attributes of its zarr group, and back.

They are the same on every server: what differs between servers is in `shard_file.py`.
"""

import math
from collections.abc import Mapping

import torch

from protos import MAX_MANIFEST_PARAMETERS
from protos.names import check_id
from protos.values import Option
from ps.store.arrays import check_names, dtype_from_name, dtype_name
from ps.store.codecs import check_codec
from ps.store.contents import (
    CommitKey,
    GenerationHeader,
    OptimizerGroup,
    OptimizerSpec,
    ParameterKind,
    StateArray,
    StoredParameter,
)
from ps.store.errors import check_format
from ps.store.fields import LARGEST, Fields

FORMAT = 2
"""The newest layout: raised when older versions would misread a generation. 2 has something compressed."""

KEY = "zero_ps"
"""The attribute under which all of it stands."""


def encode(header: GenerationHeader, state_arrays: Mapping[str, StateArray]) -> dict[str, object]:
    """The group's attributes. Raises ValueError for what cannot be stored."""
    optimizer = header.optimizer
    return {
        KEY: {
            "format": FORMAT if _compressed(header, state_arrays) else 1,
            "job": header.job,
            "step": header.key.step,
            "commit_id": header.key.commit_id,
            "num_shards": header.num_shards,
            "metadata": header.metadata,
            "manifest": [
                {
                    "name": p.name,
                    "shape": list(p.shape),
                    "dtype": dtype_name(p.dtype),
                    "kind": p.kind,
                    "trainable": p.trainable,
                    **_encode_codec(p.codec),
                }
                for p in header.manifest
            ],
            "optimizer": optimizer
            and {
                "class_name": optimizer.class_name,
                "groups": [
                    {
                        "options": {name: _encode_option(option) for name, option in g.options.items()},
                        "parameters": list(g.parameters),
                    }
                    for g in optimizer.groups
                ],
                **({} if optimizer.ema_decay is None else {"ema_decay": optimizer.ema_decay}),
            },
            "state": {
                name: {
                    "dtype": None if state.dtype is None else dtype_name(state.dtype),
                    "per_element": state.per_element,
                    **_encode_codec(state.codec),
                }
                for name, state in state_arrays.items()
            },
        }
    }


def decode(document: Fields, shard: int) -> tuple[GenerationHeader, dict[str, StateArray]]:
    """The header and the kinds of optimizer state in a group's `zarr.json`.

    Raises DamagedError or NewerFormatError, naming the file.
    """
    fields = document.child("attributes").child(KEY)
    check_format(fields.integer("format", smallest=1), FORMAT, fields.file)
    manifest = tuple(_parameter(entry) for entry in fields.children("manifest"))
    if len(manifest) > MAX_MANIFEST_PARAMETERS:
        fields.refuse("manifest", f"has {len(manifest)} entries, more than {MAX_MANIFEST_PARAMETERS}")
    states = fields.child("state")
    state_arrays = {name: _state_array(name, states.child(name)) for name in states.names()}
    try:
        check_names(manifest, list(state_arrays))
    except ValueError as error:
        fields.refuse("manifest", f"is not valid ({error})")
    num_shards = fields.integer("num_shards", smallest=1)
    header = GenerationHeader(
        job=fields.text("job"),
        key=_key(fields),
        shard=shard,
        num_shards=num_shards,
        manifest=manifest,
        optimizer=_optimizer(fields, len(manifest)),
        metadata=fields.text("metadata"),
    )
    return header, state_arrays


def decode_key(document: Fields) -> CommitKey:
    """Which commit a group's `zarr.json` is of. Raises DamagedError, naming the file."""
    return _key(document.child("attributes").child(KEY))


def decode_job(document: Fields) -> str:
    """Which job a group's `zarr.json` is of. Raises DamagedError, naming the file."""
    return document.child("attributes").child(KEY).text("job")


def _key(fields: Fields) -> CommitKey:
    commit_id = fields.text("commit_id")
    try:
        check_id(commit_id)
    except ValueError as error:
        fields.refuse("commit_id", f"is not valid ({error})")
    return CommitKey(fields.integer("step"), commit_id)


_KINDS: dict[str, ParameterKind] = {"parameter": "parameter", "buffer": "buffer"}


def _parameter(fields: Fields) -> StoredParameter:
    kind = _KINDS.get(fields.text("kind"))
    if kind is None:
        fields.refuse("kind", "is neither 'parameter' nor 'buffer'")
    shape = fields.integers("shape")
    if math.prod(max(1, n) for n in shape) > LARGEST or len(shape) > 64:
        fields.refuse("shape", f"{list(shape)} is too large")
    return StoredParameter(
        name=fields.text("name"),
        shape=shape,
        dtype=_dtype(fields),
        kind=kind,
        trainable=fields.flag("trainable"),
        codec=_codec(fields),
    )


def _compressed(header: GenerationHeader, state_arrays: Mapping[str, StateArray]) -> bool:
    return any(p.codec for p in header.manifest) or any(state.codec for state in state_arrays.values())


def _encode_codec(codec: str | None) -> dict[str, object]:
    return {} if codec is None else {"codec": codec}


def _codec(fields: Fields) -> str | None:
    if "codec" not in fields.names():
        return None
    codec = fields.text("codec")
    try:
        check_codec(codec)
    except ValueError as error:
        fields.refuse("codec", f"is not valid ({error})")
    return codec


def _dtype(fields: Fields) -> torch.dtype:
    try:
        return dtype_from_name(fields.text("dtype"))
    except ValueError as error:
        fields.refuse("dtype", f"is not valid ({error})")


def _state_array(name: str, fields: Fields) -> StateArray:
    dtype = None if fields.value("dtype") is None else _dtype(fields)
    return StateArray(name, dtype, fields.flag("per_element"), _codec(fields))


def _optimizer(fields: Fields, num_parameters: int) -> OptimizerSpec | None:
    if fields.value("optimizer") is None:
        return None
    optimizer = fields.child("optimizer")
    groups = []
    for group in optimizer.children("groups"):
        options = group.child("options")
        groups.append(
            OptimizerGroup(
                options={name: _decode_option(options, name) for name in options.names()},
                parameters=group.integers("parameters", largest=num_parameters - 1),
            )
        )
    ema_decay = _decode_option(optimizer, "ema_decay") if "ema_decay" in optimizer.names() else None
    if ema_decay is not None and not (isinstance(ema_decay, float) and 0 <= ema_decay <= 1):
        optimizer.refuse("ema_decay", f"is {ema_decay!r}, not a number from 0 to 1")
    return OptimizerSpec(optimizer.text("class_name"), tuple(groups), ema_decay)


# JSON has no infinities and no NaN, so these stand as objects. Lists are tuples of floats.
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _encode_option(option: Option) -> object:
    if isinstance(option, tuple):
        return [_encode_option(float(number)) for number in option]
    if isinstance(option, float) and not math.isfinite(option):
        return {"number": str(option)}
    return option


def _decode_option(fields: Fields, name: str) -> Option:
    value = fields.value(name)
    if isinstance(value, list):
        return tuple(_decode_float(fields, name, number) for number in value)
    if isinstance(value, dict):
        return _decode_float(fields, name, value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    fields.refuse(name, f"is {value!r}, which no option can be")


def _decode_float(fields: Fields, name: str, value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, dict) and value.get("number") in _NOT_FINITE:
        return _NOT_FINITE[value["number"]]
    fields.refuse(name, f"has {value!r} where a number belongs")
