"""Trainers that move the model together: each has a part of every parameter and of every gradient to move.

In *group mode* a trainer pulls 1/W of a parameter from the servers and gets the rest from the other W - 1
trainers by an all-gather; of a gradient it gets the others' contributions to its part, adds them up and
pushes the sum. So the servers send and receive one copy of the model, however many trainers there are.

The trainers have to do the same in the same order. What is to be moved is queued by the thread that runs
the model, whose decisions in this mode depend on nothing but the order in which parameters are used, and
one thread works the queue off. Before each move the trainers compare what each of them is about to do: one
that took another way through its model is an error that names both, and not a deadlock or other bytes.
"""

import datetime
import queue
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.errors import ConfigError, TrainerLost, ZeroPsError
from trainer.session import Session

_NAME_BYTES = 512
"""How much of what they are about to do trainers tell each other where it differs."""

_FINE, _FAILED = 1, 2

_LOOK_SECONDS = 1.0
"""How often a trainer that waits for the others looks whether one of them is known to be lost. Gloo itself does not
notice one that was stopped."""


@dataclass(frozen=True)
class Whole:
    """A parameter that is to become whole.

    buffer: 1-d uint8 tensor of the whole parameter; this trainer's part of it is there already.
    """

    buffer: torch.Tensor
    numel: int
    itemsize: int


@dataclass(frozen=True)
class _Task:
    """what: the same on every rank. mine: done when this rank's part is there. run: moves the rest.
    done: hears how it went."""

    what: str
    mine: "Future[None]"
    run: Callable[[], None]
    done: Callable[[BaseException | None], None]


class TrainerGroup:
    """The ranks of a job as one group, over a process group of their own.

    ranks: of the trainers in torch's default group, by rank in the job.
    timeout: seconds that the slowest trainer may be behind the fastest.
    session: by which a trainer learns that another one is lost, and which.
    """

    def __init__(self, ranks: Sequence[int], rank: int, timeout: float, session: Session) -> None:
        self.rank = rank
        self.size = len(ranks)
        self._session = session
        self._timeout = datetime.timedelta(seconds=timeout)
        # Not the user's group: collectives of two threads would meet each other's there.
        self._process_group = dist.new_group(
            list(ranks), timeout=self._timeout, backend="gloo", use_local_synchronization=True
        )
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="zero-ps group", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ parts

    def part_elements(self, numel: int) -> int:
        """Elements of each part of a parameter but the last ones, which may be shorter or empty."""
        return -(-numel // self.size)

    def part(self, numel: int) -> tuple[int, int]:
        """The first element of this rank's part of a flattened parameter, and the one after its last."""
        each = self.part_elements(numel)
        return min(self.rank * each, numel), min((self.rank + 1) * each, numel)

    # ------------------------------------------------------------ moves

    def all_gather(
        self,
        what: str,
        parameters: list[Whole],
        mine: "Future[None]",
        done: Callable[[BaseException | None], None],
    ) -> None:
        """Makes parameters whole once this rank's parts of them are there.

        what: says which they are; the same on every rank, as the order of calls has to be.
        parameters: emptied before `done` is called: views of a parameter's memory tell that it is in use.
        done: called from another thread.
        """

        def run() -> None:
            if len(parameters) == 1 and parameters[0].numel % self.size == 0:
                buffer = parameters[0].buffer
                each = buffer.numel() // self.size
                self._wait(self._all_gather(buffer, buffer.narrow(0, self.rank * each, each)))
            else:
                self._gather_packed(parameters)

        def end(error: BaseException | None) -> None:
            parameters.clear()
            done(error)

        self._tasks.put(_Task(what, mine, run, end))

    def reduce_scatter(
        self, what: str, gradient: torch.Tensor, done: Callable[[torch.Tensor | None, BaseException | None], None]
    ) -> None:
        """Adds up the ranks' gradients of one parameter, each rank those of its part.

        gradient: flat, of `size` times `part_elements` elements; zeros where the parameter has fewer.
        done: called from another thread with the sum, in fp32 (fp64 for fp64), or with an error. The ranks'
            gradients are added in the order of ranks and in that dtype, as a server adds them up that gets
            them whole, so the mode makes no difference to the bits.
        """
        total: torch.Tensor | None = None

        def run() -> None:
            nonlocal total
            theirs = torch.empty_like(gradient)
            self._wait(dist.all_to_all_single(theirs, gradient, group=self._process_group, async_op=True))
            wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
            first, *others = theirs.chunk(self.size)
            total = first.to(wide, copy=True)
            for other in others:
                total += other

        mine: Future[None] = Future()
        mine.set_result(None)
        self._tasks.put(_Task(what, mine, run, lambda error: done(total, error)))

    def close(self) -> None:
        """Ends what is queued and leaves the group. Safe to call twice."""
        self._tasks.put(None)
        self._thread.join(self._timeout.total_seconds())

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        with torch.no_grad():
            while (task := self._tasks.get()) is not None:
                error = self._error
                if error is None:
                    try:
                        self._move(task)
                    except BaseException as raised:  # whoever waits has to hear of it
                        error = raised
                task.done(error)
        if dist.is_initialized():
            dist.destroy_process_group(self._process_group)

    def _move(self, task: _Task) -> None:
        failure: BaseException | None = None
        try:
            task.mine.result(self._timeout.total_seconds())
        except Exception as error:
            failure = error
        try:
            failed = self._agree(task.what, _FINE if failure is None else _FAILED)
            if failure is None and not failed:
                task.run()
        except ZeroPsError as error:
            self._error = error
            raise
        except RuntimeError as error:
            # Of the process group: one that is out of step cannot be used any more. It does not say who is gone.
            self._error = TrainerLost(
                f"rank {self.rank} cannot reach the other trainers to move {task.what}: "
                f"{self._session.find_lost() or error}. A trainer is gone or slower than the timeout; start the group "
                "again, and it goes on from memory if no update had begun, else from the last commit"
            )
            raise self._error from error
        if failure is not None:
            raise failure
        if failed:
            raise TrainerLost(f"rank {failed[0]} could not get its part of {task.what}; its own error says why")

    def _agree(self, what: str, status: int) -> list[int]:
        """Returns the ranks that failed. Raises ConfigError if a rank is about to do something else."""
        mine = torch.tensor([zlib.crc32(what.encode()), status])
        theirs = torch.empty(2 * self.size, dtype=mine.dtype)
        self._wait(self._all_gather(theirs, mine))
        by_rank = theirs.view(self.size, 2)
        if not bool((by_rank[:, 0] == mine[0]).all()):
            raise ConfigError(self._difference(what))
        return [int(rank) for rank in (by_rank[:, 1] == _FAILED).nonzero()]

    def _difference(self, what: str) -> str:
        text = what.encode()[:_NAME_BYTES]
        mine = torch.zeros(_NAME_BYTES, dtype=torch.uint8)
        mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        theirs = torch.empty(_NAME_BYTES * self.size, dtype=torch.uint8)
        self._wait(self._all_gather(theirs, mine))
        names = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in theirs.view(self.size, -1)]
        rank = next(rank for rank, name in enumerate(names) if name != names[self.rank])
        return (
            f"the trainers took different ways: rank {self.rank} is to move {names[self.rank]}, rank {rank} "
            f"{names[rank]}. In group mode every rank has to use the same parameters in the same order; with "
            "OffloadConfig(mode='direct') they need not"
        )

    def _gather_packed(self, parameters: Sequence[Whole]) -> None:
        """Several parameters, or one that is not a multiple of the ranks, by way of memory of their own."""
        sizes = [self.part_elements(p.numel) * p.itemsize for p in parameters]
        mine = torch.zeros(sum(sizes), dtype=torch.uint8)
        for place, size, parameter in zip(torch.split(mine, sizes), sizes, parameters, strict=True):
            start = min(self.rank * size, parameter.buffer.numel())
            part = parameter.buffer[start : start + size]
            place[: part.numel()] = part
        theirs = torch.empty(self.size * mine.numel(), dtype=torch.uint8)
        self._wait(self._all_gather(theirs, mine))
        for rows, parameter in zip(torch.split(theirs.view(self.size, -1), sizes, dim=1), parameters, strict=True):
            parameter.buffer.copy_(rows.reshape(-1)[: parameter.buffer.numel()])

    def _all_gather(self, output: torch.Tensor, part: torch.Tensor) -> "dist.Work":
        return _all_gather(output, part, group=self._process_group, async_op=True)

    def _wait(self, work: "dist.Work") -> None:
        """Raises RuntimeError when the process group fails or is too slow, ZeroPsError for a trainer that is lost."""
        end = time.monotonic() + self._timeout.total_seconds()
        while True:
            left = end - time.monotonic()
            try:
                # What was waited for in vain can be waited for again.
                work.wait(datetime.timedelta(seconds=max(0.0, min(_LOOK_SECONDS, left))))
                return
            except RuntimeError:
                if work.is_completed() or left <= _LOOK_SECONDS:
                    raise
                self._session.check()


# `all_gather_into_tensor` is what it is called before torch 2.13.
_all_gather: Callable[..., dist.Work] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
