"""How the commands of `zero-ps` read their arguments and say that one is wrong."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

DTYPES = ("bf16", "fp16", "fp32")
"""What `dtype` knows."""


class ArgumentParser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


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
