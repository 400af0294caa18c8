"""What a trainer says a step is to do, and where two trainers say something else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protos.values import Option
from ps.gradient_edits import GradientEdit


@dataclass(frozen=True)
class StepWish:
    """What a trainer says a step is to do.

    groups: the options of each parameter group.
    edits: what is done to the averaged gradients before the update.
    """

    groups: tuple[Mapping[str, Option], ...]
    edits: tuple[GradientEdit, ...]


def difference(ours: StepWish, theirs: StepWish) -> tuple[str, object, object] | None:
    """The first option that differs: its name and both values."""
    if len(ours.groups) != len(theirs.groups):
        return "the number of parameter groups", len(ours.groups), len(theirs.groups)
    for number, (mine, other) in enumerate(zip(ours.groups, theirs.groups, strict=True)):
        for name in sorted(set(mine) | set(other)):
            if name not in mine or name not in other or not _same(mine[name], other[name]):
                return f"option {name!r} of group {number}", mine.get(name), other.get(name)
    if ours.edits != theirs.edits:
        return "what is done to the gradients", _described(ours.edits), _described(theirs.edits)
    return None


def _described(edits: Iterable[GradientEdit]) -> list[str]:
    return [f"{edit.kind} {edit.value:g}" for edit in edits]


def _same(ours: object, theirs: object) -> bool:
    """Equality under which NaN equals itself."""
    return ours == theirs or (ours != ours and theirs != theirs)
