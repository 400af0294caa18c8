"""The training loop. Everything of zero-ps that a training script needs is in `train`."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

import trainer
from trainer.app import data, machine
from trainer.app.flags import Settings
from trainer.app.gpt import GPT
from trainer.app.report import Report, StepReport, say, write_summary


class TrainingFailed(Exception):
    """Training began and came to an end before its time; the message says why, where, and how to go on."""


def train(settings: Settings) -> int:
    """Trains until the job has made `settings.steps` steps; returns the exit status.

    Raises TrainingFailed once training has begun. Before that: ValueError for data or a device that cannot
    work, OSError for a file that cannot be read or written, and `trainer.ZeroPsError`.
    """
    optimizer_class = getattr(torch.optim, settings.optimizer, None)
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise ValueError(f"--optimizer {settings.optimizer}: torch.optim has no such class; AdamW is one")
    device = machine.pick_device(settings.device)
    dtype = machine.pick_dtype(settings.dtype, device)
    corpus = data.Corpus.read(data.find_files(settings.data) if settings.data else data.standard_library())
    corpus.check(settings.model.context)
    if settings.mode == "group":
        try:
            # From torchrun's environment.
            torch.distributed.init_process_group("gloo")
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--mode group is for trainers that torchrun starts: {error}") from None

    with trainer.connect(
        settings.servers,
        job=settings.job,
        links=settings.links,
        credentials=settings.credentials,
        connect_timeout=settings.connect_timeout,
    ) as job:
        torch.manual_seed(settings.seed)
        with job.init():
            model = GPT(settings.model)
        config = trainer.OffloadConfig(
            param_dtype=dtype,
            max_live_bytes=settings.max_live_bytes,
            max_staleness=settings.max_staleness,
            mode=settings.mode,
        )
        trainer.offload(model, job, config, device=device)
        optimizer = trainer.RemoteOptimizer(model.parameters(), optimizer_class, lr=settings.lr)

        interrupt = Interrupt()
        first_step = job.step
        if job.rank == 0:
            _introduce(settings, job, model, corpus, dtype, device)
        report = Report(first_step=first_step, steps=settings.steps, log=settings.step_log, shown=job.rank == 0)
        began = time.monotonic()
        committed = Committed()
        moved = Moved()
        # By which signal, to any of the ranks.
        stopped = 0
        ended = False
        everyone: list[dict[str, Any]] = []
        timeline = (
            nullcontext()
            if settings.timeline is None or job.rank
            else trainer.record_timeline(model, settings.timeline)
        )
        with timeline, closing(report), _ends_with_an_explanation(job, committed):
            if settings.recover_timeout and not job.complete:
                # What was never committed cannot survive the loss of a server.
                _commit(job, committed, settings, corpus)
            while not ended:
                with _recovers(job, settings, report, interrupt):
                    if job.step >= settings.steps or stopped:
                        if first_step < job.step != committed.step:
                            _commit(job, committed, settings, corpus)
                        # The last exchange also keeps every session open until rank 0's commit is done.
                        everyone = _exchange(job, peak_rss_bytes=machine.peak_rss_bytes(), **vars(job.stats))
                        ended = True
                        continue
                    started = time.monotonic()
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(job.step, settings)
                    x, y = corpus.batch(
                        seed=settings.seed,
                        step=job.step,
                        rank=job.rank,
                        size=settings.batch,
                        context=settings.model.context,
                    )
                    loss = model(x.to(device), y.to(device))
                    # Clipping takes the norm of all gradients: with it no update can begin before backward has ended.
                    with optimizer.last_backward(zero_grad=True) if settings.clip is None else nullcontext():
                        loss.backward()
                    if settings.clip is not None:
                        trainer.clip_grad_norm_(model.parameters(), settings.clip)
                    optimizer.step()
                    optimizer.zero_grad()

                    everyone = _exchange(
                        job, loss=loss.item(), stop=interrupt.stop, committed=committed.step, **vars(job.stats)
                    )
                    # Ranks stop together or not at all: one that went on alone would wait for the others.
                    stopped = max(one["stop"] for one in everyone)
                    committed.step = everyone[0]["committed"]
                    pulled, pushed = moved.since(everyone)
                    report.step(
                        StepReport(
                            step=job.step,
                            loss=sum(one["loss"] for one in everyone) / len(everyone),
                            seconds=time.monotonic() - started,
                            bytes_pulled=pulled,
                            bytes_pushed=pushed,
                        )
                    )
                    if settings.commit_every and job.step % settings.commit_every == 0:
                        _commit(job, committed, settings, corpus)
            report.close()

            if job.rank == 0:
                summary = {
                    "job": settings.job,
                    "first_step": first_step,
                    "steps": job.step,
                    "first_loss": report.first_loss,
                    "last_loss": report.loss,
                    "seconds": round(time.monotonic() - began, 3),
                    "bytes_pulled": sum(one["bytes_pulled"] for one in everyone),
                    "bytes_pushed": sum(one["bytes_pushed"] for one in everyone),
                    "peak_rss_bytes": {f"trainer-{rank}": one["peak_rss_bytes"] for rank, one in enumerate(everyone)},
                    "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    "dtype": "bf16" if dtype is torch.bfloat16 else "fp32",
                    "interrupted": bool(stopped) and job.step < settings.steps,
                }
                if settings.summary is not None:
                    write_summary(settings.summary, summary)
                _conclude(settings, summary)
                say(str(trainer.report(model)))
    return 128 + stopped if stopped and job.step < settings.steps else 0


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up to the peak, then half a cosine down to a tenth of it at `settings.steps`.

    A function of the step alone, so that it needs no state when a run goes on.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


class StoppedAtOnce(KeyboardInterrupt):
    """A signal ended training in the middle of a step. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a wish to stop after the running step; a second one, later, ends at once.

    torchrun passes on the signal that the terminal has already sent to all processes, so a second one
    that comes right after the first is the same Ctrl-C.

    stop: number of the signal that came, 0 before. waiting: for servers or trainers that are lost, so that no step is
    running: then the first one ends at once, too.
    """

    SAME_KEYSTROKE_SECONDS = 2.0

    def __init__(self) -> None:
        self.stop = 0
        self.waiting = False
        self._when = 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.waiting or (self.stop and now - self._when > self.SAME_KEYSTROKE_SECONDS):
            raise StoppedAtOnce(number)
        if not self.stop:
            self.stop = number
            self._when = now


@contextmanager
def _recovers(job: trainer.Job, settings: Settings, report: Report, interrupt: Interrupt) -> Iterator[None]:
    """Context of a step, after which the job goes on also where servers or trainers were lost; rank 0 says so.

    Batches and learning rates are functions of the step, so that nothing else has to be rewound.
    """

    def lost(error: trainer.ZeroPsError) -> None:
        if interrupt.stop:
            # Who is to stop waits for nobody.
            raise StoppedAtOnce(interrupt.stop)
        interrupt.waiting = True
        if job.rank == 0:
            say(f"lost at step {job.step}: {error}. Waiting up to {settings.recover_timeout:g} s")

    def rewind(step: int) -> None:
        report.rewind(step)
        if job.rank == 0:
            say(f"going on at step {step}, {'from a commit' if job.restored else 'from the memory of the servers'}")

    if not settings.recover_timeout:
        yield
        return
    try:
        with job.recovering(rewind, on_lost=lost, timeout=settings.recover_timeout):
            yield
    finally:
        interrupt.waiting = False


@dataclass
class Moved:
    """Turns every rank's totals into what all have moved since the last time."""

    pulled: int = 0
    pushed: int = 0

    def since(self, everyone: list[dict[str, Any]]) -> tuple[int, int]:
        before = self.pulled, self.pushed
        self.pulled = sum(one["bytes_pulled"] for one in everyone)
        self.pushed = sum(one["bytes_pushed"] for one in everyone)
        # A trainer that took the place of another one begins to count anew.
        return max(0, self.pulled - before[0]), max(0, self.pushed - before[1])


@dataclass
class Committed:
    """The newest step that this run has committed, as far as this rank knows; None before the first."""

    step: int | None = None


def _commit(job: trainer.Job, committed: Committed, settings: Settings, corpus: data.Corpus) -> None:
    job.commit(_metadata(settings, corpus))
    # On other ranks `commit` returns at once; they learn from rank 0 that it is done.
    if job.rank == 0:
        committed.step = job.step


@contextmanager
def _ends_with_an_explanation(job: trainer.Job, committed: Committed) -> Iterator[None]:
    """What ends training early says also after which step, what is safe, and how to go on."""
    try:
        yield
    except (trainer.ZeroPsError, OSError) as error:
        if committed.step is not None:
            state = f"the last commit is at step {committed.step}"
        else:
            state = "this run had committed nothing yet"
        raise TrainingFailed(
            f"{error}. Training ended after step {job.step}; {state}. The same command goes on from the newest "
            "step that all servers have"
        ) from error


def _exchange(job: trainer.Job, **values: object) -> list[dict[str, Any]]:
    """Every rank's values, by rank."""
    return [json.loads(payload) for payload in job.barrier("exchange", json.dumps(values).encode())]


def _metadata(settings: Settings, corpus: data.Corpus) -> dict[str, object]:
    """What makes the batches, beside the step: to tell a later run that would see other data."""
    return {"seed": settings.seed, "batch": settings.batch, "data_bytes": len(corpus)}


def _introduce(
    settings: Settings,
    job: trainer.Job,
    model: nn.Module,
    corpus: data.Corpus,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"job {job.name!r}: {parameters / 1e6:.1f} M parameters, {job.world_size} trainer(s) on {device.type} in "
        f"{'bf16' if dtype is torch.bfloat16 else 'fp32'}, {len(corpus) / 1e6:.1f} MB of text"
    )
    if job.step >= settings.steps:
        say(f"the job has made {job.step} steps already; to go on, give more than that with --steps")
    elif job.step > 0:
        say(f"going on at step {job.step}")
    now = _metadata(settings, corpus)
    changed = [name for name, value in job.metadata.items() if name in now and now[name] != value]
    if changed:
        say(f"not the same data as before: {', '.join(f'{n} {job.metadata[n]} -> {now[n]}' for n in changed)}")


def _conclude(settings: Settings, summary: dict[str, Any]) -> None:
    if summary["interrupted"]:
        say(
            f"interrupted: step {summary['steps']} of {settings.steps} is committed; the same command again goes "
            "on from there"
        )
    elif summary["last_loss"] is not None:
        say(f"committed step {summary['steps']}; loss {summary['first_loss']:.3f} -> {summary['last_loss']:.3f}")
