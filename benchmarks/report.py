"""What measurements have in common: their rows, the table on screen, the JSON on disk, the flags."""

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Case = dict[str, str | int | float]
"""What identifies a figure besides its name."""


@dataclass(frozen=True)
class Row:
    """One figure.

    value, unit: what was measured.
    against: what it is compared with, in words.
    ratio: value divided by that.
    at_most, at_least: the bar for the ratio, where there is one; not both.
    case: what else identifies the figure, as the size of a model.
    """

    name: str
    value: float
    unit: str
    against: str | None = None
    ratio: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    case: Case = field(default_factory=dict)

    @property
    def bar(self) -> str | None:
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return None if self.at_least is None else f">= {self.at_least:g}"

    @property
    def holds(self) -> bool | None:
        """Whether the ratio is on the right side of the bar; None where there is no bar."""
        if self.bar is None or self.ratio is None:
            return None
        return (self.at_most is None or self.ratio <= self.at_most) and (
            self.at_least is None or self.ratio >= self.at_least
        )

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "case": self.case,
            "value": self.value,
            "unit": self.unit,
            "against": self.against,
            "ratio": self.ratio,
            "bar": self.bar,
            "holds": self.holds,
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Row":
        """The row that `as_json` has given. Raises KeyError or ValueError for what is none."""
        found: dict[str, Any] = {key: fields[key] for key in ("name", "value", "unit", "against", "ratio", "case")}
        if fields["bar"] is not None:
            sign, number = fields["bar"].split()
            found[{"<=": "at_most", ">=": "at_least"}[sign]] = float(number)
        return Row(**found)


def table(rows: Sequence[Row]) -> str:
    """The rows as text in columns."""
    header = ("name", "case", "value", "unit", "ratio", "against", "bar", "holds")
    lines = [header] + [
        (
            row.name,
            ", ".join(f"{key} {value}" for key, value in row.case.items()),
            f"{row.value:.4g}",
            row.unit,
            "" if row.ratio is None else f"{row.ratio:.3g}",
            row.against or "",
            row.bar or "",
            "" if row.holds is None else ("yes" if row.holds else "NO"),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def machine() -> dict[str, str | int | float]:
    """What the figures were measured on, of what, when, and how busy it was at the end of it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 1),
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """With a `+` where files differ from it; empty outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@dataclass(frozen=True)
class Measured:
    """What a measurement has written: see `machine`, whether it was quick, and its rows."""

    machine: Mapping[str, str | int | float]
    rows: Sequence[Row]


def read(path: Path) -> Measured:
    """What `--json` wrote. Raises OSError, and ValueError for another file."""
    try:
        content = json.loads(path.read_text())
        return Measured(content["machine"], [Row.from_json(fields) for fields in content["rows"]])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not what a measurement wrote with --json; measure again, or delete it") from None


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every measurement has."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="fewer and smaller cases, under a minute")
    found.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the rows to FILE")
    return found


def file_to_write(text: str) -> Path:
    """A flag's file, in a folder that there is from here on: what cannot be kept is not measured first."""
    path = Path(text)
    folder_to_write(str(path.parent))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written; name another file")
    return path


def folder_to_write(text: str) -> Path:
    """A flag's folder, which there is from here on."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"the folder {text!r} cannot be made: {error.strerror}") from None
    return path


def folder_of_rows(text: str) -> Path:
    """A flag's folder, in which measurements have left their rows."""
    path = Path(text)
    if not any(path.glob("*.json")):
        raise argparse.ArgumentTypeError(
            f"{text!r} has no .json file; measure first, as with python -m benchmarks --out {text}"
        )
    return path


def at_least_one(text: str) -> int:
    """A flag's number."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def conclude(rows: Sequence[Row], arguments: argparse.Namespace, *, shown: bool = False) -> int:
    """Says and keeps what was measured; exit status 1 when a bar does not hold.

    shown: whether the table was printed already.
    """
    if not shown:
        print(table(rows))
    if arguments.json is not None:
        content = {"machine": {**machine(), "quick": arguments.quick}, "rows": [row.as_json() for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 1 if any(row.holds is False for row in rows) else 0


def main(description: str | None, run: Callable[[bool], list[Row]], *, shown: bool = False) -> int:
    """The command line of a measurement without flags of its own.

    run: takes whether to be quick and returns the rows. shown: whether it has printed its table already.
    """
    arguments = parser(description).parse_args()
    return conclude(run(arguments.quick), arguments, shown=shown)
