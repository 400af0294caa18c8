"""`zero-ps import`: a checkpoint as the first commit of a job."""

import argparse
import sys
from pathlib import Path

from ps import arguments

_EXAMPLES = """\
examples:
  zero-ps import --from gpt/ --to state/a state/b --job gpt
      then: zero-ps serve --shard 0/2 --data-dir state/a, and --shard 1/2 --data-dir state/b
  zero-ps import --from tuned/ --to state --job tune --map 'model.*=*' --frozen 'layers.*' --dtype bf16
      without "model." before the names; the layers stay as they are, in bf16, and the rest is trained
  zero-ps import --from pytorch.safetensors --to state --job net --buffers '*.running_*' '*.num_batches_tracked'

names:
  --map OLD=NEW          one name
  --map 'OLD*=NEW*'      the beginning of names
  --map 're:PATTERN=NEW' names that are all of a regular expression, with \\1 in NEW for its groups
  The first rule that fits a name is used; what fits none keeps its name. --map-file has a rule a line.

The model that opens the job has to have the same names, shapes, dtypes and kinds; what differs is named then.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `import` to the commands of `zero-ps`."""
    parser = commands.add_parser(
        "import",
        help="write a safetensors checkpoint into the data folders of servers",
        description="Write a safetensors checkpoint into the data folders of servers, chunk by chunk, as the first "
        "commit of a job: servers that are started with them have it, and trainers go on from there.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=arguments.path,
        required=True,
        metavar="PATH",
        help="a .safetensors file, an index (.index.json), or a folder with one of them",
    )
    arguments.add_folders(
        parser, "folders", "one data folder for each server, the first for shard 0; they need not exist", flag="--to"
    )
    parser.add_argument("--job", required=True, help="the job's name, which must be new in these folders")
    parser.add_argument("--map", nargs="+", action="extend", default=[], metavar="OLD=NEW", help="see below")
    parser.add_argument("--map-file", type=Path, metavar="FILE", help="more of these, one a line")
    for flag, about in (
        ("--skip", "names in the checkpoint to leave out"),
        ("--frozen", "names in the model that are not trained: they keep their dtype. All others get fp32 masters"),
        ("--buffers", "names in the model that are persistent buffers"),
    ):
        parser.add_argument(flag, nargs="+", action="extend", default=[], metavar="PATTERN", help=about)
    parser.add_argument(
        "--dtype",
        choices=arguments.DTYPES,
        help="in which the model has its parameters, where that is not the checkpoint's. It matters for frozen ones, "
        "and for fp64",
    )
    parser.add_argument(
        "--step", type=arguments.step, default=0, metavar="N", help="of the commit, from which training goes on (0)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from protos.sizes import format_bytes
    from ps.process import return_freed_blocks
    from ps.store import StoreError
    from ps.tools.errors import ToolError
    from ps.tools.import_model import ImportOptions, import_model
    from ps.tools.progress import shown
    from ps.tools.renaming import Rule, read_rules

    return_freed_blocks()
    try:
        rules = [*options.map, *(read_rules(options.map_file) if options.map_file else ())]
        try:
            parsed = tuple(map(Rule.parse, rules))
        except ValueError as error:
            raise ToolError(f"--map {error}") from error
        wanted = ImportOptions(
            job=options.job,
            rules=parsed,
            skip=tuple(options.skip),
            frozen=tuple(options.frozen),
            buffers=tuple(options.buffers),
            dtype=arguments.dtype(options.dtype),
            step=options.step,
        )
        done = import_model(options.source, options.folders, wanted, shown)
    except (ToolError, StoreError) as error:
        print(f"zero-ps import: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zero-ps import: interrupted; what was written is removed again", file=sys.stderr)
        return 130
    trained = sum(parameter.trainable for parameter in done.manifest)
    print(
        f"job {options.job!r}, {done.key}: {len(done.manifest)} tensors, {trained} of them trained, "
        f"{format_bytes(done.bytes)}. Start the servers:"
    )
    for shard, folder in enumerate(options.folders):
        print(f"  zero-ps serve --shard {shard}/{len(options.folders)} --data-dir {folder}")
    return 0
