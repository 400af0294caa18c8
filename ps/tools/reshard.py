"""`zero-ps reshard`: from one number of servers to another."""

import argparse
import sys

from ps import arguments

_EXAMPLES = """\
examples:
  zero-ps reshard --from old/a old/b --to new/a new/b new/c
      from two servers to three; then: zero-ps serve --shard 0/3 --data-dir new/a, and so on
  zero-ps reshard --from a b c --to /mnt/whole --job gpt --step 1000
  zero-ps reshard --from old/a old/b --to new/a new/b new/c --move

Servers of the folders have to be stopped. The order of --to is that of the shards. Files are linked, so that they
take no room and no time; on another file system they are copied, and then compared. What was interrupted goes on
when the same command is run again. Exit status: 0, 1 for what failed, 2 for what could not begin.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `reshard` to the commands of `zero-ps`."""
    parser = commands.add_parser(
        "reshard",
        help="bring a commit from one number of servers to another",
        description="Fill the data folders of new servers, as many as --to names, with a commit of others. Weights, "
        "buffers and optimizer state stay the same files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_folders(
        parser, "sources", "data folders of all servers that have the commit, in any order", flag="--from"
    )
    arguments.add_folders(
        parser, "targets", "data folders of the new servers, that of shard 0 first; new or empty", flag="--to"
    )
    arguments.add_commit(parser)
    parser.add_argument(
        "--move",
        action="store_true",
        help="delete the commit from the source, once all checksums of the target were compared",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from protos.sizes import format_bytes
    from ps.store import DataDirError, GenerationMissingError, StoreError
    from ps.tools.errors import ToolError
    from ps.tools.progress import shown
    from ps.tools.resharding import reshard

    try:
        done = reshard(
            options.sources,
            options.targets,
            job=options.job,
            step=options.step,
            move=options.move,
            progress=shown,
        )
    except (ToolError, DataDirError, GenerationMissingError) as error:
        print(f"zero-ps reshard: {error}", file=sys.stderr)
        return 2
    except (StoreError, OSError) as error:
        print(f"zero-ps reshard: {error}. Run it again to go on; the source is whole", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("zero-ps reshard: interrupted; run it again to go on", file=sys.stderr)
        return 130
    how = f"{format_bytes(done.copied_bytes)} copied and compared" if done.copied_bytes else "all files linked"
    print(f"job {done.job!r}, {done.key}, in {done.num_shards} folders: {how if done.filled else 'was there already'}")
    for folder in done.removed:
        print(f"removed {folder}")
    if done.left:
        print(f"the source still has steps {', '.join(map(str, done.left))} of the job")
    for shard, folder in enumerate(options.targets):
        print(f"  zero-ps serve --shard {shard}/{done.num_shards} --data-dir {folder}")
    return 0
