"""`python -m benchmarks`: every measurement, each in a process of its own, one after the other.

    python -m benchmarks --quick --out runs/bench
    python -m benchmarks --only step,links

What each has found is in `<out>/<name>.json`, pictures of it in `<out>`; `python -m benchmarks.tables <out>` writes it
as tables. The exit status is 1 if a bar does not hold, 2 if a measurement has failed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import plots, report, sampling
from benchmarks.peers import python_with

MODULES = (
    "step",
    "profile",
    "scale",
    "plan",
    "coordinator",
    "hooks",
    "memory",
    "storage",
    "commit",
    "optimizer",
    "staleness",
    "group",
    "links",
)

OUT = Path("runs/bench")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, under a minute each")
    parser.add_argument("--out", type=report.folder_to_write, default=OUT, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--only", type=_modules, default=MODULES, metavar="NAME,...", help=f"of {', '.join(MODULES)}")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for missing in _missing():
        print(f"missing: {missing}", flush=True)
    missed, failed = [], []
    for name in arguments.only:
        print(f"\n{name}", flush=True)
        began = time.monotonic()
        measured = _measure(name, arguments.out / f"{name}.json", arguments.quick)
        if measured is None:
            failed.append(name)
        elif any(row.holds is False for row in measured.rows):
            missed.append(name)
        print(f"({name} took {time.monotonic() - began:.0f} s)", flush=True)
    for picture in plots.draw_all(arguments.out, arguments.out):
        print(f"drawn: {picture}")
    for what, names in (("bars missed in", missed), ("failed", failed)):
        if names:
            print(f"{what}: {', '.join(names)}")
    return 2 if failed else 1 if missed else 0


def _measure(name: str, path: Path, quick: bool) -> report.Measured | None:
    """None where it failed."""
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path), *(["--quick"] if quick else [])]
    subprocess.run(command, check=False)
    return report.read(path) if path.exists() else None


def _missing() -> list[str]:
    """What is not there to compare with or to look with, and where to get it."""
    found = []
    if python_with("deepspeed") is None:
        found.append("DeepSpeed, so its sides are left out; `make bench-peers` installs it")
    if not sampling.available():
        found.append("perf, so profiles do not say what processors did; it is in the package linux-perf or the like")
    return found


def _modules(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in MODULES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(MODULES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
