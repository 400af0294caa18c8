"""How the commands of `zero-ps` read their arguments and say that one is wrong."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

DTYPES = ("bf16", "fp16", "fp32")
"""What `dtype` knows."""


class ArgumentParser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_folders(parser: argparse.ArgumentParser, name: str, about: str, flag: str | None = None) -> None:
    """Adds one or more data folders, positional or behind a flag; `name` is where they are in the options."""
    named: dict[str, Any] = {"dest": name, "required": True} if flag else {}
    parser.add_argument(flag or name, nargs="+", type=path, metavar="DIR", help=about, **named)


def add_commit(parser: argparse.ArgumentParser) -> None:
    """Adds which commit of which job."""
    add_job(parser)
    add_step(parser)


def add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--job", help="which job, where the folders hold several")


def add_step(parser: "argparse._ActionsContainer") -> None:
    parser.add_argument("--step", type=step, metavar="N", help="which commit (default: the newest)")


def size(text: str) -> int:
    """Bytes."""
    from protos.sizes import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def step(text: str) -> int:
    """The number of a step."""
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a step: write a number from 0")
    return int(text)


def path(text: str) -> Path:
    """A path, which need not exist."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; write . for the current folder")
    return Path(text)


def dtype(name: str | None) -> "torch.dtype | None":
    """The torch dtype of one of DTYPES. Not for argparse: importing torch takes seconds."""
    import torch

    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return None if name is None else known[name]
