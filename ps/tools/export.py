"""`zero-ps export`: a commit as files that other tools read."""

import argparse
import sys

from ps import arguments

FORMATS = ("safetensors", "torch", "zarr")

_EXAMPLES = """\
examples:
  zero-ps export state/a state/b --format safetensors --out gpt
      the newest commit of two servers, as Hugging Face's tools read it
  zero-ps export state/a state/b --format safetensors --dtype bf16 --max-shard-size 2GB --out gpt
  zero-ps export state/a state/b --format torch --state --step 1000 --out gpt-1000
      gpt-1000/model.pt for load_state_dict, gpt-1000/optimizer.pt for the optimizer's,
      gpt-1000/ema.pt with the average of each weight, where one is kept
  zero-ps export state/a state/b --format zarr --out gpt.zarr

OUT is a folder in every case. Tied parameters are stored once, under the first of their names in the model, so
load with strict=False, or with safetensors.torch.load_model, a model that has some. Servers may be running.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `export` to the commands of `zero-ps`."""
    parser = commands.add_parser(
        "export",
        help="write a commit as safetensors, for torch, or as one zarr group",
        description="Write a commit as files that other tools read, chunk by chunk: memory stays small however large "
        "the model is.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_folders(parser, "folders", "data folders of all servers of the set, in any order")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what to write")
    parser.add_argument("--out", type=arguments.path, required=True, metavar="OUT", help="the folder to create")
    parser.add_argument(
        "--dtype",
        choices=arguments.DTYPES,
        help="convert what is floating point in the model (default: as stored, which is fp32 for what is trained)",
    )
    arguments.add_commit(parser)
    parser.add_argument("--state", action="store_true", help="also the optimizer's state, in files of its own")
    parser.add_argument(
        "--max-shard-size",
        type=arguments.size,
        default="5GB",
        metavar="SIZE",
        help="of one safetensors file (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote to OUT")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from protos.sizes import format_bytes
    from ps.process import return_freed_blocks
    from ps.store import StoreError
    from ps.tools.errors import ToolError
    from ps.tools.export_model import ExportOptions, export
    from ps.tools.progress import shown

    return_freed_blocks()
    wanted = ExportOptions(
        format=options.format,
        out=options.out,
        dtype=arguments.dtype(options.dtype),
        state=options.state,
        max_shard_bytes=options.max_shard_size,
        overwrite=options.overwrite,
    )
    try:
        done = export(options.folders, wanted, job=options.job, step=options.step, progress=shown)
    except (ToolError, StoreError) as error:
        print(f"zero-ps export: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zero-ps export: interrupted; what was written is removed again", file=sys.stderr)
        return 130
    print(f"job {done.job!r}, {done.key}: {done.tensors} tensors, {format_bytes(done.bytes)}, in {options.out}:")
    for name in done.files:
        print(f"  {name}")
    return 0
