"""`zero-ps verify`: whether commits are whole."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ps import arguments

if TYPE_CHECKING:
    from ps.tools.verification import Report

_EXAMPLES = """\
examples:
  zero-ps verify state/a state/b
      the newest commit that both servers have
  zero-ps verify state/a state/b --job gpt --all-steps
  zero-ps verify state/a/gpt/generations/00000120 state/b/gpt/generations/00000120
  zero-ps verify --json state/a state/b | jq -r '.problems[].file'

Servers may be running. Exit status: 0 if everything is as it was committed, 1 if not, 2 for wrong arguments.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `verify` to the commands of `zero-ps`."""
    parser = commands.add_parser(
        "verify",
        help="check that what servers committed is whole",
        description="Check a commit over the folders of all servers: every chunk of the model is there exactly once "
        "and has the size and the checksum with which it was committed, and all folders describe the same model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_folders(parser, "folders", "data folders of all servers of the set, in any order")
    arguments.add_job(parser)
    which = parser.add_mutually_exclusive_group()
    arguments.add_step(which)
    which.add_argument("--all-steps", action="store_true", help="every commit that is complete")
    parser.add_argument("--json", action="store_true", help="print what was found as one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from ps.store import StoreError
    from ps.tools.progress import shown, silent
    from ps.tools.verification import verify

    try:
        report = verify(
            options.folders,
            job=options.job,
            step=options.step,
            all_steps=options.all_steps,
            progress=silent if options.json else shown,
        )
    except StoreError as error:
        print(f"zero-ps verify: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zero-ps verify: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        _print(report)
    return 0 if report.ok else 1


def as_json(report: "Report") -> dict[str, object]:
    """What `--json` prints."""
    return {
        "ok": report.ok,
        "generations": [
            {
                "job": generation.job,
                "step": generation.key.step,
                "commit_id": generation.key.commit_id,
                "num_shards": generation.num_shards,
                "folders": list(map(str, generation.folders)),
                "files": generation.files,
                "bytes": generation.bytes,
                "files_without_checksum": generation.without_checksum,
                "ok": not generation.problems,
            }
            for generation in report.generations
        ],
        "problems": [{"file": str(problem.file), "message": str(problem)} for problem in report.problems],
        "notes": report.notes,
    }


def _print(report: "Report") -> None:
    from protos.sizes import format_bytes

    for problem in report.problems:
        print(problem)
    for note in report.notes:
        print(f"note: {note}")
    for generation in report.generations:
        count = len(generation.problems)
        result = f"{count} problem{'s' if count > 1 else ''}" if count else "ok"
        unchecked = ""
        if generation.without_checksum:
            unchecked = f"; {generation.without_checksum} files have no checksum, of these only the size was compared"
        print(
            f"job {generation.job!r}, {generation.key}, {generation.num_shards} servers: "
            f"{generation.files} chunk files, {format_bytes(generation.bytes)}: {result}{unchecked}"
        )
    if not report.ok:
        print(f"not ok: {len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}")
