"""How the commands of `zero-ps` read their arguments and say that one is wrong."""

import argparse
from pathlib import Path
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


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
