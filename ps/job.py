"""One job on one server: its sessions, its shard, its steps, its generations."""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from protos import MAX_METADATA_BYTES
from ps.barrier import Barriers
from ps.budget import Budget
from ps.chunk import Chunk
from ps.errors import Conflict, InvalidRequest, JobFailed, NotFound, StorageFailed
from ps.monitor import Monitor, Patience
from ps.optimizer import ChunkOptimizer
from ps.sessions import Session, Sessions
from ps.shard import Shard, check_same_model
from ps.staging import Staging
from ps.steps import Steps, StepWish
from ps.store import (
    ChunkState,
    GenerationHeader,
    GenerationMissingError,
    JobStore,
    OptimizerSpec,
    StateArray,
    StoredParameter,
    StoreError,
    Written,
)
from ps.updater import Updater

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """index: of the shard that this server holds, out of num_shards.

    keep: how many committed generations stay. lease_seconds: how long a silent trainer counts as alive.
    """

    index: int
    num_shards: int
    keep: int = 2
    lease_seconds: float = 10.0


@dataclass(frozen=True)
class OpenedJob:
    """What a trainer is told about the job that it opened."""

    manifest: tuple[StoredParameter, ...]
    needs_weights: bool
    bound: tuple[Chunk, ...]
    step: int
    placement_digest: str


class Job:
    """One job. Its methods block; `Patience` says for how long."""

    def __init__(self, name: str, options: ServerOptions, store: JobStore, budget: Budget) -> None:
        self.name = name
        self._options = options
        self._store = store
        self._budget = budget
        self.monitor = Monitor()
        # Held by whoever reads or changes weights and optimizer state as a whole: updates, commits,
        # restores and writes of weights. Pulls do without; they lock one chunk.
        self.shard_lock = threading.RLock()
        self.shard: Shard | None = None
        self.sessions = Sessions(name, options.lease_seconds, self.monitor, self._leave)
        self.barriers = Barriers(self.sessions, self.monitor)
        self.updater = Updater(name, self.shard_lock, self.monitor)
        self.steps = Steps(name, self.sessions, self.monitor, self.updater)
        self._staging: dict[str, Staging] = {}

    # ------------------------------------------------------------ sessions

    def open_session(
        self, rank: int, world_size: int, incarnation: str, read_only: bool, patience: Patience
    ) -> Session:
        """A new session; see `Sessions.open`. Returns once updates that were running are done."""
        with self.monitor:
            session = self.sessions.open(rank, world_size, incarnation, read_only, patience)
            self.steps.join(session)
            self._staging[session.id] = Staging()
            if len(self.sessions.living()) == 1:
                self._drop_useless_state()
        _log.info("job %r: session of %s opened", self.name, session.who)
        shard = self.shard
        if shard is not None:
            self._wait_at_rest(shard, session, patience)
        return session

    def close_session(self, session: Session) -> None:
        with self.monitor:
            self.sessions.close(session)

    def living_sessions(self) -> list[Session]:
        with self.monitor:
            return self.sessions.living()

    def _leave(self, session: Session) -> None:
        _log.info("job %r: session of %s ended: %s", self.name, session.who, session.ended)
        self.steps.leave(session)
        self._staging.pop(session.id, None)

    def _drop_useless_state(self) -> None:
        """A shard that failed, or that never got all its weights, is of use only to those who know of it."""
        if self.shard is not None and (self.shard.failure is not None or self.shard.missing_weights()):
            self.shard = None
            self._budget.release(self.name)

    def expire(self) -> None:
        with self.monitor:
            self.sessions.expire()

    def close(self) -> None:
        self.updater.close()

    @property
    def usable_step(self) -> int:
        """The step from which training can go on without a restore, or -1."""
        shard = self.shard
        return -1 if shard is None or shard.failure is not None or shard.missing_weights() else shard.step

    def committed_steps(self) -> list[int]:
        return self._store.committed_steps()

    @property
    def resident_bytes(self) -> int:
        shard = self.shard
        staged = sum(staging.resident_bytes for staging in list(self._staging.values()))
        return (shard.resident_bytes if shard else 0) + self.steps.resident_bytes + staged

    def staging(self, session: Session) -> Staging:
        session.check()
        return self._staging[session.id]

    def open_shard(self) -> Shard:
        """The shard. Raises Conflict while the job has no state, JobFailed after a failed step."""
        shard = self.shard
        if shard is None:
            raise Conflict(f"job {self.name!r} has no state on this server yet; open or restore it first")
        if shard.failure is not None:
            raise JobFailed(f"{shard.failure}; restore a committed step to go on")
        return shard

    # ------------------------------------------------------------ manifest and optimizer

    def open(
        self, session: Session, manifest: Sequence[StoredParameter], staging_ids: Mapping[str, int]
    ) -> OpenedJob:
        """Creates the job, or checks that it holds this model. Takes over chunks that were staged for it.

        staging_ids: by parameter name. Raises Conflict naming the first parameter that differs.
        """
        with self.shard_lock, self.monitor:
            self.steps.of(session)
            shard = self.shard
            if shard is not None and shard.failure is not None and shard.failed_at < session.opened_at:
                shard = None
            created = shard is None
            if shard is None:
                shard = self._create(session, manifest)
            else:
                self.open_shard()
                check_same_model(self.name, shard.manifest, manifest)
                shard.set_trainable(manifest)
            needs_weights = created or shard.missing_weights() > 0
            if not needs_weights and len(shard):
                self._staging[session.id].clear()
            bound = self._bind(session, shard, staging_ids)
            self.monitor.changed()
            return OpenedJob(shard.manifest, needs_weights, tuple(bound), shard.step, shard.placement_digest)

    def _create(self, session: Session, manifest: Sequence[StoredParameter]) -> Shard:
        if steps := self.committed_steps():
            raise Conflict(
                f"job {self.name!r} has committed steps on shard {self._options.index} ({_list(steps)}) and none of "
                "them was restored; restore one, or move the job's folder away to begin anew"
            )
        shard = Shard(self._options.index, self._options.num_shards, manifest)
        self._reserve(shard, session.world_size, 0.0)
        self.shard = shard
        _log.info("job %r: created, %d parameters, %d chunks here", self.name, len(manifest), len(shard))
        return shard

    def _bind(self, session: Session, shard: Shard, staging_ids: Mapping[str, int]) -> list[Chunk]:
        staging = self._staging[session.id]
        bound = []
        for chunk in shard:
            staging_id = staging_ids.get(shard.manifest[chunk.parameter].name)
            if staging_id is None or chunk.weight is not None:
                continue
            values = staging.take(staging_id, chunk)
            if values is not None:
                with chunk.lock:
                    chunk.write(values, adopt=True)
                bound.append(chunk)
        return bound

    def _reserve(self, shard: Shard, world_size: int, state_bytes_per_element: float) -> None:
        needed = shard.needed_bytes(world_size, state_bytes_per_element)
        what = "weights and gradients" + (" and optimizer state" if state_bytes_per_element else "")
        self._budget.reserve(self.name, needed, what)

    def set_optimizer(self, session: Session, spec: OptimizerSpec, patience: Patience) -> None:
        """States the optimizer. Groups may change, the class may not. Raises Conflict, InvalidRequest."""
        self.steps.of(session)
        shard = self.open_shard()
        self._wait_at_rest(shard, session, patience)
        # Outside the locks: the first optimizer of a process takes a second or two.
        optimizer = ChunkOptimizer(spec, len(shard.manifest))
        for parameter in optimizer.group_of:
            if shard.manifest[parameter].kind != "parameter":
                raise InvalidRequest(f"buffer {shard.manifest[parameter].name!r} cannot be optimized")
        with self.shard_lock, self.monitor:
            self.steps.of(session)
            if shard.spec is not None and shard.spec.class_name != spec.class_name:
                raise Conflict(
                    f"job {self.name!r} was trained with torch.optim.{shard.spec.class_name} and cannot go on with "
                    f"{spec.class_name}; use the same class, or another job name"
                )
            if shard.optimizer is not None and shard.spec == spec:
                return
            self._reserve(shard, session.world_size, _state_bytes_per_element(optimizer.arrays))
            if shard.optimizer is not None:
                optimizer.arrays = {**shard.optimizer.arrays, **optimizer.arrays}
            shard.spec, shard.optimizer = spec, optimizer

    # ------------------------------------------------------------ weights and steps

    def write_weights(
        self, session: Session, shard: Shard, step: int, values: Sequence[tuple[Chunk, torch.Tensor]]
    ) -> None:
        """Replaces weights (flat tensors) of chunks that are at `step`. Raises Conflict if one is not."""
        with self.shard_lock, self.monitor:
            session.check()
            if self.shard is not shard:
                raise Conflict(f"job {self.name!r} was restored meanwhile")
            for chunk, _ in values:
                if chunk.version != step:
                    raise Conflict(
                        f"a weight for version {step} of {chunk.label} came at version {chunk.version}"
                    )
            for chunk, weight in values:
                # Buffers are written before every commit, mostly as they were. That is no change, and
                # a generation of this step stays good.
                if not chunk.holds(weight):
                    shard.generation = None
                    with chunk.lock:
                        chunk.write(weight, adopt=True)
            self.monitor.changed()

    def step_from(self, session: Session, step: int, wish: StepWish) -> None:
        """The session's word for a step; see `Steps.step`."""
        self.steps.step(session, self.open_shard(), step, wish)
        # Whatever was staged and fitted nowhere has been read back before training began.
        self.staging(session).clear()

    # ------------------------------------------------------------ generations

    def restore(self, session: Session, step: int, patience: Patience) -> str:
        """Loads a generation in place of whatever is in memory; returns its metadata. Raises NotFound."""
        self.steps.of(session)
        shard = self.shard
        if shard is not None:
            self._wait_at_rest(shard, session, patience)
        with self.shard_lock:
            if self.shard is None or self.shard.generation != step or self.shard.failure is not None:
                # Memory first: the old state and the new one need not be there together.
                with self.monitor:
                    self.shard = None
                loaded = self._load(step, session.world_size)
                with self.monitor:
                    self.shard = loaded
            assert self.shard is not None
            with self.monitor:
                session.check()
                self.steps.reset()
                self.monitor.changed()
            _log.info("job %r: restored step %d", self.name, step)
            return self.shard.metadata

    def _load(self, step: int, world_size: int) -> Shard:
        try:
            header = self._store.read_header(step)
            shard = Shard(self._options.index, self._options.num_shards, header.manifest, step)
            self._reserve(shard, world_size, 0.0)
            for state in self._store.read_chunks(step):
                chunk = shard.find(state.parameter, state.chunk)
                chunk.write(state.weight, adopt=True)
                chunk.state = dict(state.state)
            shard.check_weights()
        except GenerationMissingError as error:
            raise NotFound(str(error)) from error
        except StoreError as error:
            raise StorageFailed(str(error)) from error
        shard.spec = header.optimizer
        shard.metadata = header.metadata
        shard.generation = step
        return shard

    def commit(
        self, session: Session, step: int, metadata: str, complete_step: int, patience: Patience
    ) -> Written:
        """Writes a generation once every chunk is at `step`. Committing a step again changes nothing.

        metadata: a JSON object or "". complete_step: a step that every server is known to have committed.
        """
        _check_metadata(metadata)
        self.steps.of(session)
        shard = self.open_shard()
        self.monitor.wait_until(
            lambda: shard.updated_step >= step,
            patience,
            lambda: f"step {step} of job {self.name!r}, which is at {shard.updated_step}",
            lambda: self._check_version(session, shard, step),
        )
        with self.shard_lock:
            session.check()
            if shard.generation == step and step in self.committed_steps():
                return self._write(shard, step, shard.metadata)
            if any(chunk.version != step for chunk in shard) or shard.step < step:
                raise Conflict(
                    f"step {step} of job {self.name!r} is gone: updates to step {shard.step} have begun"
                )
            shard.check_weights()
            try:
                # Later generations are of a run that was abandoned when an earlier one was restored.
                self._store.discard_after(step - 1)
                written = self._write(shard, step, metadata)
                shard.generation, shard.metadata = step, metadata
                self._store.prune(keep=self._options.keep, complete_step=complete_step)
            except StoreError as error:
                raise StorageFailed(str(error)) from error
        _log.info("job %r: committed step %d, %d bytes", self.name, step, written.bytes_written)
        return written

    def _write(self, shard: Shard, step: int, metadata: str) -> Written:
        spec = shard.stated_optimizer()
        arrays: Mapping[str, StateArray] = {}
        if shard.optimizer is not None:
            arrays = shard.optimizer.arrays
        elif spec is not None:
            arrays = ChunkOptimizer(spec, len(shard.manifest)).arrays
        header = GenerationHeader(
            self.name, step, shard.index, shard.num_shards, shard.manifest, spec, metadata
        )
        chunks = (
            ChunkState(chunk.parameter, chunk.index, chunk.weight, dict(chunk.state))
            for chunk in shard
            if chunk.weight is not None
        )
        return self._store.write(header, chunks, arrays)

    # ------------------------------------------------------------ waiting

    def wait_for_version(
        self, session: Session, shard: Shard, chunk: Chunk, version: int, patience: Patience
    ) -> None:
        """Waits until a chunk is at `version` or beyond it."""
        self.monitor.wait_until(
            lambda: chunk.version >= version and self.shard is shard,
            patience,
            lambda: f"version {version} of {chunk.label} of job {self.name!r}, which is at {chunk.version}",
            lambda: self._check_version(session, shard, version),
        )

    def wait_for_weight(self, session: Session, shard: Shard, chunk: Chunk, patience: Patience) -> None:
        """Waits until rank 0 has written a chunk's first weight."""
        self.monitor.wait_until(
            lambda: chunk.weight is not None and self.shard is shard,
            patience,
            lambda: f"rank 0 to write {chunk.label} of job {self.name!r}, which has no weight yet",
            # As for a step that is still to come, it takes the other trainers to get there.
            lambda: self._check_version(session, shard, shard.step + 1),
        )

    def _wait_at_rest(self, shard: Shard, session: Session, patience: Patience) -> None:
        """Waits until no update is running or about to."""
        self.monitor.wait_until(
            lambda: shard.updated_step == shard.step or shard.failure is not None,
            patience,
            lambda: f"updates to step {shard.step} of job {self.name!r}, which is at {shard.updated_step}",
            session.check,
        )

    def _check_version(self, session: Session, shard: Shard, version: int) -> None:
        """Raises when there is no point in waiting for a version."""
        session.check()
        if self.shard is not shard:
            raise Conflict(f"job {self.name!r} was restored meanwhile")
        if shard.failure is not None:
            raise JobFailed(f"{shard.failure}; restore a committed step to go on")
        if version > shard.step:
            self.steps.check_progress(session)


def _state_bytes_per_element(arrays: Mapping[str, StateArray]) -> float:
    return float(
        sum((array.dtype.itemsize if array.dtype else 4) for array in arrays.values() if array.per_element)
    )


def _check_metadata(metadata: str) -> None:
    if len(metadata.encode()) > MAX_METADATA_BYTES:
        raise InvalidRequest(f"a commit's metadata may have {MAX_METADATA_BYTES} bytes")
    if metadata:
        try:
            is_object = isinstance(json.loads(metadata), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise InvalidRequest("a commit's metadata has to be a JSON object")


def _list(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[-5:]))
