"""What is done by all ranks of a job or by none."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.job import Job

Result = TypeVar("Result")

_MAX_CHARACTERS = 4000


def on_every_rank(job: "Job", what: str, action: Callable[[], Result]) -> Result:
    """Every rank calls this; returns, once all are through, what the action returned here.

    Where it fails on a rank, that one gets its error, and all others a ConfigError with its text, at once.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    text = "" if failure is None else f"{type(failure).__name__}: {failure}"[:_MAX_CHARACTERS]
    failures = job.barrier(what, text.encode())
    if failure is not None:
        raise failure
    for rank, other in enumerate(failures):
        if other:
            raise ConfigError(f"{what} failed on rank {rank}, and so on all: {other.decode(errors='replace')}")
    return result
