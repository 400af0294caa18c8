"""Messages to and from what the server works with. Everything that comes in is checked here first."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from protos import MAX_MANIFEST_PARAMETERS, MAX_STALENESS, dtypes
from protos import zero_ps_pb2 as pb
from protos.layout import ChunkGrid
from protos.names import check_id, check_parameter_name
from protos.values import decode_options
from ps.chunk import Chunk
from ps.errors import InvalidRequest
from ps.gradient_edits import GradientEdit
from ps.opening import OpenedJob
from ps.plan import Plan, PlannedUse
from ps.shard import Shard
from ps.step_wish import StepWish
from ps.store import CommitKey, OptimizerGroup, OptimizerSpec, StoredParameter
from ps.tier import Part

_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 1 << 48
_MAX_CHUNKS = 1 << 20
_MAX_GROUPS = 1 << 16
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TRAINED = (torch.float64, torch.float32)
_USES: dict[int, Literal["pull", "gradient"]] = {
    pb.PlannedUse.KIND_PULL: "pull",
    pb.PlannedUse.KIND_GRADIENT: "gradient",
}
_KINDS = {pb.ParameterSpec.KIND_PARAMETER: "parameter", pb.ParameterSpec.KIND_BUFFER: "buffer"}


def decode_manifest(manifest: pb.Manifest) -> tuple[list[StoredParameter], dict[str, int]]:
    """The parameters, and the staging ids by parameter name. Raises InvalidRequest naming the culprit."""
    if len(manifest.parameters) > MAX_MANIFEST_PARAMETERS:
        raise InvalidRequest(
            f"a manifest may have {MAX_MANIFEST_PARAMETERS} parameters, not {len(manifest.parameters)}"
        )
    parameters: dict[str, StoredParameter] = {}
    staging_ids: dict[str, int] = {}
    chunks = 0
    for spec in manifest.parameters:
        parameter = _decode_parameter(spec)
        if parameter.name in parameters:
            raise InvalidRequest(f"parameter {parameter.name!r} is in the manifest twice")
        chunks += ChunkGrid.of(parameter.shape).num_chunks
        if chunks > _MAX_CHUNKS:
            raise InvalidRequest(f"a job may have {_MAX_CHUNKS} chunks; this model has more")
        parameters[parameter.name] = parameter
        if spec.HasField("staging_id"):
            staging_ids[parameter.name] = spec.staging_id
    if len(set(staging_ids.values())) != len(staging_ids):
        raise InvalidRequest("two parameters of the manifest have the same staging id")
    return list(parameters.values()), staging_ids


def _decode_parameter(spec: pb.ParameterSpec) -> StoredParameter:
    try:
        check_parameter_name(spec.name)
        dtype = dtypes.to_torch(spec.dtype)
    except ValueError as error:
        raise InvalidRequest(f"parameter {spec.name!r}: {error}") from error
    shape = tuple(spec.shape)
    if len(shape) > _MAX_DIMENSIONS or any(n < 0 for n in shape) or math.prod(shape) > _MAX_ELEMENTS:
        raise InvalidRequest(f"parameter {spec.name!r} cannot have the shape {list(shape)[:8]}")
    kind = _KINDS.get(spec.kind)
    if kind is None:
        raise InvalidRequest(f"parameter {spec.name!r} has the unknown kind {spec.kind}")
    if spec.trainable and kind == "parameter" and dtype not in _TRAINED:
        raise InvalidRequest(
            f"parameter {spec.name!r} is trained, so it is stored in float32 or float64, not {_name(dtype)}"
        )
    return StoredParameter(spec.name, shape, dtype, kind, spec.trainable)  # type: ignore[arg-type]


def encode_opened_job(job: OpenedJob) -> pb.OpenJobResponse:
    return pb.OpenJobResponse(
        manifest=pb.Manifest(parameters=[_encode_parameter(p) for p in job.manifest]),
        needs_weights=job.needs_weights,
        bound=[pb.ChunkRef(parameter=c.parameter, chunk=c.index) for c in job.bound],
        step=job.step,
        placement_digest=job.placement_digest,
    )


def _encode_parameter(parameter: StoredParameter) -> pb.ParameterSpec:
    is_buffer = parameter.kind == "buffer"
    return pb.ParameterSpec(
        name=parameter.name,
        shape=parameter.shape,
        dtype=dtypes.from_torch(parameter.dtype),
        kind=pb.ParameterSpec.KIND_BUFFER if is_buffer else pb.ParameterSpec.KIND_PARAMETER,
        trainable=parameter.trainable,
    )


def decode_optimizer(request: pb.SetOptimizerRequest) -> OptimizerSpec:
    if len(request.groups) > _MAX_GROUPS:
        raise InvalidRequest(f"an optimizer may have {_MAX_GROUPS} parameter groups")
    groups = (OptimizerGroup(decode_options(group.options), tuple(group.parameters)) for group in request.groups)
    ema_decay = request.ema_decay if request.HasField("ema_decay") else None
    if ema_decay is not None and not 0 <= ema_decay <= 1:
        raise InvalidRequest(f"ema_decay has to be a number from 0 to 1, not {ema_decay}")
    return OptimizerSpec(request.class_name, tuple(groups), ema_decay)


def decode_reduction(request: pb.SetOptimizerRequest) -> Literal["mean", "sum"]:
    match request.gradient_reduction:
        case pb.GRADIENT_REDUCTION_UNSPECIFIED | pb.GRADIENT_REDUCTION_MEAN:
            return "mean"
        case pb.GRADIENT_REDUCTION_SUM:
            return "sum"
    raise InvalidRequest(f"there is no gradient reduction {request.gradient_reduction}")


def decode_staleness(request: pb.SetOptimizerRequest | pb.PullRequest) -> int:
    """Raises InvalidRequest for more than servers keep gradients for."""
    if request.max_staleness > MAX_STALENESS:
        raise InvalidRequest(f"max_staleness has to be 0 to {MAX_STALENESS}, not {request.max_staleness}")
    return request.max_staleness


def decode_step(request: pb.StepRequest | pb.AnnounceStepRequest) -> StepWish:
    edits = request.edits if isinstance(request, pb.StepRequest) else ()
    if len(request.groups) > _MAX_GROUPS:
        raise InvalidRequest(f"a step may have {_MAX_GROUPS} parameter groups")
    return StepWish(
        tuple(decode_options(group.options) for group in request.groups),
        decode_edits(edits),
    )


def decode_edits(edits: Sequence[pb.GradEdit]) -> tuple[GradientEdit, ...]:
    """Raises InvalidRequest for one that says nothing."""
    if len(edits) > _MAX_GROUPS:
        raise InvalidRequest(f"gradients may be edited {_MAX_GROUPS} times before their norm is taken")
    decoded = []
    for edit in edits:
        kind = edit.WhichOneof("kind")
        if kind is None:
            raise InvalidRequest("an edit of gradients has to say what is done to them")
        value = edit.scale if kind == "scale" else edit.max_value
        decoded.append(GradientEdit(tuple(edit.parameters), kind, value))
    return tuple(decoded)


def encode_state(chunk: Chunk, arrays: Iterable[tuple[str, Part]]) -> pb.ChunkArrays:
    return pb.ChunkArrays(
        chunk=pb.ChunkRef(parameter=chunk.parameter, chunk=chunk.index),
        arrays=[
            pb.ArraySpec(name=name, dtype=dtypes.from_torch(part.dtype), per_element=part.shape == chunk.shape)
            for name, part in arrays
        ],
    )


def decode_plan(request: pb.PlanRequest) -> Plan:
    uses = []
    for use in request.uses:
        kind = _USES.get(use.kind)
        if kind is None:
            raise InvalidRequest(f"a plan names the unknown kind {use.kind} of use")
        uses.append(PlannedUse(kind, use.parameter))
    return Plan(tuple(uses))


def decode_key(step: int, commit_id: str) -> CommitKey:
    """Raises InvalidRequest for an id that is none."""
    return CommitKey(step, decode_id(commit_id))


def decode_id(text: str) -> str:
    """Raises InvalidRequest unless this can be the id of a commit or a restore."""
    try:
        check_id(text)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return text


def decode_chunks(shard: Shard, references: Iterable[pb.ChunkRef]) -> list[Chunk]:
    """Raises InvalidRequest for a chunk that does not exist, is not here, or is named twice."""
    chunks = [shard.find(reference.parameter, reference.chunk) for reference in references]
    if len(set(chunks)) != len(chunks):
        raise InvalidRequest("a chunk is named twice in one request")
    return chunks


def decode_dtype(code: pb.DType, default: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype of a wire code; `default` where it is unspecified."""
    if code == pb.DTYPE_UNSPECIFIED:
        return default
    try:
        return dtypes.to_torch(code)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def check_convertible(chunks: Sequence[Chunk], dtype: torch.dtype | None) -> None:
    """Raises InvalidRequest unless the chunks can travel in `dtype`: floating in floating, else as stored."""
    for chunk in chunks:
        if dtype is None or dtype == chunk.dtype or (dtype in _FLOATING and chunk.dtype in _FLOATING):
            continue
        raise InvalidRequest(f"{chunk.label} is stored as {_name(chunk.dtype)} and cannot travel as {_name(dtype)}")


def check_gradient(shard: Shard, chunks: Sequence[Chunk], dtype: torch.dtype | None) -> torch.dtype:
    """The gradient's dtype. Raises InvalidRequest for what can have no gradient."""
    if dtype not in _FLOATING:
        raise InvalidRequest("a gradient has to state its dtype, and it has to be a floating one")
    for chunk in chunks:
        parameter = shard.manifest[chunk.parameter]
        if parameter.kind != "parameter" or parameter.dtype not in _TRAINED:
            raise InvalidRequest(
                f"{parameter.name!r} is a {parameter.kind} of dtype {_name(parameter.dtype)} and takes no gradient"
            )
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
