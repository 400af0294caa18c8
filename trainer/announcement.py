"""The step that `optimizer.last_backward()` announces, and which gradients it may use before backward ends.

Servers update a parameter as soon as its gradient is final on every trainer. That is more than to be whole:
nothing in this backward may give it another gradient, as reentrant checkpoints do, and nothing may pull the
parameter as it was before the step. What a backward does is known when it has ended. So a parameter's
gradient is sent as final only if in every such backward so far it came exactly once and the parameter was
not asked for after that; all others become final with `optimizer.step()`.

In group mode a trainer has parts of a gradient to send, which it has once all ranks have theirs. A chunk is final
when those who send its parts have said so; the others announce that they have nothing to send to it.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from protos import zero_ps_pb2 as pb
from protos.values import decode_options
from trainer.errors import ConfigError, StepHalfDone, ZeroPsError
from trainer.group import TrainerGroup
from trainer.parameter import OffloadedParameter
from trainer.selection import elements
from trainer.server import call_all

if TYPE_CHECKING:
    from trainer.job import Job

_REMEDY = "call optimizer.step() first"


class Announcement:
    """What the next step of one model will do, once that is announced.

    running: whether the backward that completes the step's gradients is under way.
    zero_grad: whether the step drops the gradients that it uses.
    """

    def __init__(self, job: "Job", group: TrainerGroup | None = None) -> None:
        self.running = False
        self.zero_grad = False
        self._job = job
        self._group = group
        self._groups: Sequence[pb.OptimizerGroup] | None = None
        # Parameters whose gradients were sent as final in this step.
        self._final: set[OffloadedParameter] = set()
        # How many gradients each parameter got in the running backward, and whether it was asked for after one.
        self._came: dict[OffloadedParameter, int] = {}
        self._needed: set[OffloadedParameter] = set()
        # Whether each parameter was done with its first gradient in every such backward so far.
        self._done_at_once: dict[OffloadedParameter, bool] = {}
        # Those that had a sparse gradient, which no group shares out.
        self._sparse: set[OffloadedParameter] = set()

    @property
    def made(self) -> bool:
        """Whether the next step is announced."""
        return self._groups is not None

    def check_none(self, what: str) -> None:
        """Raises ConfigError for what would change a step that is announced, or needs values from before it."""
        if self.made:
            raise ConfigError(
                f"{what} between optimizer.last_backward() and optimizer.step() cannot work: servers may have updated "
                f"some parameters already; {_REMEDY}, or do it before last_backward()"
            )

    # ------------------------------------------------------------ from announcement to step

    def begin(self, groups: Sequence[pb.OptimizerGroup], *, zero_grad: bool) -> None:
        """Announces a step with these options, which drops its gradients as it uses them if `zero_grad`.

        Raises what servers have against it.
        """
        self._groups, self.zero_grad = groups, zero_grad
        try:
            self._tell_servers()
        except BaseException:
            # Some may have taken it.
            self._withdraw()
            raise
        self.running = True

    def end(self) -> None:
        """The backward is over: remembers what it did."""
        self.running = False
        for state, count in self._came.items():
            at_once = count == 1 and state not in self._needed
            self._done_at_once[state] = at_once and self._done_at_once.get(state, True)
        self._forget_backward()

    def break_off(self, error: BaseException) -> None:
        """The backward failed. Takes the announcement back if nothing was final; else the job cannot go on."""
        if not self.running:
            return
        self.running = False
        self._forget_backward()
        self._take_back(
            f"its last backward failed ({type(error).__name__}: {error}) after servers got final gradients, so that "
            "some parameters may have been updated and others not"
        )

    def gradients_dropped(self) -> None:
        """Gradients of the announced step were taken away, so that it cannot be made as it was announced.

        Takes the announcement back if nothing was final; else the job cannot go on: raises StepHalfDone.
        """
        if not self.made:
            return
        self._take_back(
            "gradients were dropped, as by model.zero_grad(), between optimizer.last_backward() and optimizer.step(), "
            "when servers may have used some already"
        )
        if self._job.broken is not None:
            raise self._job.broken

    def check_step(self, groups: Sequence[pb.OptimizerGroup]) -> None:
        """Raises ConfigError if the options of a step are not those that were announced."""
        if self._groups is None:
            return
        for number, (announced, now) in enumerate(zip(self._groups, groups, strict=True)):
            if announced != now:
                name, before, after = _first_difference(decode_options(announced.options), decode_options(now.options))
                raise ConfigError(
                    f"option {name!r} of group {number} was {before} at optimizer.last_backward() and is {after} now. "
                    "Servers may have used the former already; set it back, call step(), and change it for the next one"
                )

    def stepped(self) -> None:
        """The servers have been asked for the step."""
        if self.running:
            self.end()
        self._unmake()

    def forget(self) -> None:
        """Servers know of no announcement any more."""
        self.running = False
        self._unmake()
        self._forget_backward()

    def _unmake(self) -> None:
        """No step is announced any more."""
        self._groups = None
        self.zero_grad = False
        self._final.clear()

    def _forget_backward(self) -> None:
        self._came.clear()
        self._needed.clear()

    def _take_back(self, why: str) -> None:
        """The step cannot be made as announced. If something was final the job cannot go on; why: says so."""
        if not self._final:
            self._withdraw()
            return
        self._job.broken = StepHalfDone(
            f"step {self._job.step} of job {self._job.name!r} is half done: {why}; close the job and connect again, "
            "which goes back to the last commit"
        )

    def _withdraw(self) -> None:
        # Servers that cannot be told have forgotten it, or say so to the next call.
        with contextlib.suppress(ZeroPsError):
            self._tell_servers(withdraw=True)
        self._unmake()

    def _tell_servers(self, *, withdraw: bool = False) -> None:
        left = {} if withdraw else self._left_to_others()
        call_all(
            self._job.servers,
            "AnnounceStep",
            lambda server: pb.AnnounceStepRequest(
                session_id=server.session_id,
                step=self._job.step,
                groups=() if withdraw else self._groups,
                withdraw=withdraw,
                done=left.get(self._job.servers.index(server), ()),
                zero_grad=self.zero_grad and not withdraw,
            ),
            self._job.timeout,
        )

    def _left_to_others(self) -> dict[int, list[pb.ChunkRef]]:
        """By server, the chunks of whose gradients the other ranks send every part."""
        found: dict[int, list[pb.ChunkRef]] = {}
        if self._group is None:
            return found
        for state, at_once in self._done_at_once.items():
            remote = state.remote
            if at_once and remote is not None and state not in self._sparse:
                mine = {part.chunk for part in elements(remote.grid, *self._group.part(state.numel))}
                for chunk, shard in enumerate(remote.shards):
                    if chunk not in mine:
                        found.setdefault(shard, []).append(pb.ChunkRef(parameter=remote.index, chunk=chunk))
        return found

    # ------------------------------------------------------------ during backward

    def check_expected(self, state: OffloadedParameter) -> None:
        """Raises ConfigError for a gradient that comes after the last backward."""
        if not self.running:
            self.check_none(f"a backward that gives parameter {state.name!r} a gradient")

    def gradient_came(self, state: OffloadedParameter, *, sparse: bool) -> bool:
        """A gradient is about to be sent; whether it is final.

        Raises StepHalfDone for one that was not expected.
        """
        if sparse and self._group is not None:
            self._sparse.add(state)
        if not self.made:
            return False
        if state in self._final:
            self._done_at_once[state] = False
            raise StepHalfDone(
                f"parameter {state.name!r} got another gradient in this backward after one that was sent as final: it "
                f"got one in every optimizer.last_backward() before. {self._half_done()}"
            )
        self._came[state] = self._came.get(state, 0) + 1
        # As long as a graph needs the parameter it may be pulled once more.
        if self._done_at_once.get(state) and not state.saved and state.request is None:
            self._final.add(state)
            return True
        return False

    def is_final(self, state: OffloadedParameter) -> bool:
        """Whether the parameter may be past this step's version on the servers."""
        return state in self._final

    def pulled(self, states: Sequence[OffloadedParameter]) -> None:
        """Parameters are about to be asked for at the job's step. Raises if that may not exist any more."""
        if not self.made:
            return
        for state in states:
            if state in self._final:
                if not self.running:
                    self.check_none(f"using parameter {state.name!r}")
                self._done_at_once[state] = False
                raise StepHalfDone(
                    f"parameter {state.name!r} is needed in this backward after its gradient was sent as final: it was "
                    f"not in any optimizer.last_backward() before. {self._half_done()}"
                )
            if state in self._came:
                self._needed.add(state)

    def _half_done(self) -> str:
        return (
            "The step cannot be completed: close the job and connect again, which goes back to the last commit, and "
            "use a plain backward() where gradients come in other ways from step to step"
        )


def _first_difference(ours: Mapping[str, object], theirs: Mapping[str, object]) -> tuple[str, object, object]:
    name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    return name, ours.get(name), theirs.get(name)
