"""How the commands of `zero-ps` say that an argument is wrong."""

import argparse
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")
