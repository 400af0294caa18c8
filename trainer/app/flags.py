"""The training application's command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import trainer
from protos.sizes import parse_bytes
from trainer.app.gpt import GPTConfig


@dataclass(frozen=True)
class Settings:
    """What the flags say, checked as far as that is possible without servers."""

    servers: str
    job: str
    model: GPTConfig
    data: tuple[Path, ...]
    steps: int
    batch: int
    lr: float
    warmup: int
    optimizer: str
    clip: float | None
    dtype: str
    device: str
    seed: int
    commit_every: int
    links: list[str] | None
    mode: Literal["direct", "group"]
    connect_timeout: float
    recover_timeout: float
    credentials: trainer.Credentials
    max_live_bytes: int | None
    max_staleness: int
    timeline: Path | None
    step_log: Path | None
    summary: Path | None


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Parses a command line; prints what is wrong and exits with status 2 when it cannot work."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        model = GPTConfig(
            layers=flags.layers, width=flags.width, heads=flags.heads, context=flags.context, tied=flags.tied
        )
        credentials = trainer.Credentials.from_flags(flags)
    except ValueError as error:
        parser.error(str(error))
    if missing := [path for path in flags.data if not path.exists()]:
        parser.error(f"--data {missing[0]}: there is no such file or folder")
    return Settings(
        servers=flags.servers,
        job=flags.job,
        model=model,
        data=tuple(flags.data),
        steps=flags.steps,
        batch=flags.batch,
        lr=flags.lr,
        warmup=flags.warmup,
        optimizer=flags.optimizer,
        clip=flags.clip,
        dtype=flags.dtype,
        device=flags.device,
        seed=flags.seed,
        commit_every=flags.commit_every,
        links=flags.links,
        mode=flags.mode,
        connect_timeout=flags.connect_timeout,
        recover_timeout=flags.recover_timeout,
        credentials=credentials,
        max_live_bytes=flags.max_live_bytes,
        max_staleness=flags.max_staleness,
        timeline=flags.timeline,
        step_log=flags.step_log,
        summary=flags.summary,
    )


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage before it, as the other commands of zero-ps do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of a flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="zero-ps train",
        description="Trains a byte-level GPT whose parameters live on zero-ps servers. A job that the servers "
        "know already goes on where it is. Several trainers: torchrun --nproc-per-node 2 -m trainer ...",
        epilog="Ctrl-C and SIGTERM stop it after the running step, which is committed; a second one ends it at once. "
        "Exit status: 0 when the job has made its steps; 130 after Ctrl-C and 143 after SIGTERM, with steps still to "
        "make; 1 when training failed; 2 for arguments that cannot work.",
        formatter_class=_Defaults,
    )
    add = parser.add_argument_group("job").add_argument
    add("--servers", required=True, metavar="HOST:PORT,...", help="every server of the set, in any order")
    add("--job", default="gpt", help="the job's name on the servers")
    add("--commit-every", type=_count, default=50, metavar="STEPS", help="0: only at the end")
    add(
        "--links",
        type=_names,
        default=None,
        metavar="KIND,...",
        help="kinds of link that may be used, such as gloo,grpc; none: all. Each server gets the best one that works",
    )
    add(
        "--mode",
        choices=("direct", "group"),
        default="direct",
        help="group: each trainer pulls and pushes a part, and they share it among themselves; for trainers that "
        "torchrun starts and that reach servers over a network (docs/groups.md)",
    )
    add("--connect-timeout", type=_positive, default=20.0, metavar="SECONDS", help="for servers and trainers")
    add(
        "--recover-timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="to wait for servers and trainers that are lost; 0: end instead",
    )

    trainer.Credentials.add_flags(parser.add_argument_group("security"))

    add = parser.add_argument_group("model").add_argument
    add("--layers", type=_at_least_one, default=4, help="transformer blocks")
    add("--width", type=_at_least_one, default=512, help="size of the residual stream")
    add("--heads", type=_at_least_one, default=8, help="attention heads; have to divide the width")
    add("--context", type=_at_least_one, default=64, metavar="BYTES", help="length of a sequence")
    add("--tied", action="store_true", help="use the embedding as output projection")

    add = parser.add_argument_group("training").add_argument
    add("--data", type=Path, nargs="+", default=[], metavar="PATH", help="files or folders; none: Python's own sources")
    add("--steps", type=_at_least_one, default=200, help="train until the job has made this many steps in all")
    add("--batch", type=_at_least_one, default=16, metavar="SEQUENCES", help="of each trainer at each step")
    add("--lr", type=_positive, default=5e-4, help="peak learning rate; a tenth of it at the last step")
    add("--warmup", type=_count, default=10, metavar="STEPS", help="steps until the peak")
    add("--optimizer", default="AdamW", metavar="CLASS", help="an element-wise class of torch.optim")
    add("--clip", type=_positive, default=None, metavar="NORM", help="clip gradients to this global norm")
    add("--seed", type=_count, default=0, help="of initial weights and batches")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto: this rank's GPU, else the CPU")
    add(
        "--max-live-bytes",
        type=_size,
        default=None,
        metavar="SIZE",
        help="limit for the parameters that are in memory at once, as 512MiB; none: a fixed number of elements",
    )
    add(
        "--max-staleness",
        type=_count,
        default=0,
        metavar="STEPS",
        help="by how many steps trainers may be ahead of the slowest update; docs/optimizer.md says what it costs",
    )
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is fast")

    add = parser.add_argument_group("reports, written by rank 0").add_argument
    # Not --log: torchrun takes that for an abbreviation of its own flags, even after the module.
    add("--step-log", type=Path, default=None, metavar="PATH", help="one JSON line for each step")
    add("--timeline", type=Path, default=None, metavar="PATH", help="when parameters moved, for ui.perfetto.dev")
    add("--summary", type=Path, default=None, metavar="PATH", help="JSON, at the end")
    return parser


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _count(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"has to be at least 0, not {value}")
    return value


def _at_least_one(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1, not {value}")
    return value


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(text: str) -> list[str]:
    return text.split(",")


def _seconds(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else _positive(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"has to be a number above 0, not {text}")
    return value
