"""Where DeepSpeed is: in an environment of its own, which `make bench-peers` creates."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ENVIRONMENT = Path(".venv-peers")


EXTENSIONS = "torch_extensions"
"""Where in the environment DeepSpeed keeps what it compiles."""


@cache
def python_with(package: str) -> str | None:
    """An interpreter that has a package besides torch and zero-ps; None if there is none.

    ZERO_PS_PEERS names the environment where it is not `.venv-peers`.
    """
    peers = Path(os.environ.get("ZERO_PS_PEERS", ENVIRONMENT)) / "bin" / "python"
    for python in (sys.executable, str(peers)):
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        try:
            if subprocess.run([python, "-c", look], check=False, timeout=60).returncode == 0:
                return python
        except OSError:
            continue
    return None


def deepspeed_environment(python: str) -> dict[str, str]:
    """What DeepSpeed has to find in its environment to run on a CPU."""
    folder = Path(python).parent
    return {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder.parent / EXTENSIONS),
        # It looks there for ninja, also for what is compiled already.
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def not_compiled(python: str, operator: str) -> str | None:
    """Why DeepSpeed could not use an operator at once, such as `cpu_adam`; None if it can."""
    folder = Path(python).parent.parent / EXTENSIONS / operator
    if (folder / "lock").exists():
        return f"compiling it was interrupted, and DeepSpeed would wait for {folder / 'lock'} to go"
    return None if (folder / f"{operator}.so").exists() else f"{operator} is not compiled"
