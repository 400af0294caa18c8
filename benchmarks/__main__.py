"""`python -m benchmarks`: every measurement, one after the other."""

import importlib
import sys

from benchmarks import report

MODULES = (
    "step",
    "profile",
    "scale",
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


def _all(quick: bool) -> list[report.Row]:
    rows = []
    for name in MODULES:
        found: list[report.Row] = importlib.import_module(f"benchmarks.{name}").run(quick)
        print(f"\n{name}\n{report.table(found)}", flush=True)
        rows += found
    return rows


if __name__ == "__main__":
    sys.exit(report.main(__doc__, _all, shown=True))
