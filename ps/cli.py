"""The command `zero-ps`."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# gRPC's own lines about a port in use, or about a server that is not there, would stand beside ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from protos.credential_flags import add_flags
from protos.links import KINDS, parse_kinds
from ps.arguments import ArgumentParser, path, size
from ps.options import COMPRESSIBLE, MAX_INFLIGHT_BYTES, MAX_JOBS, MAX_SESSIONS
from ps.tools import certs, export, import_, plan, reshard, verify

_DESCRIPTION = "ZeRO-3 parameter offload: parameter servers keep the model, trainers compute with it."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 2 for what the caller has to put right."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Both pass on whatever follows, which argparse does not do well with options.
    match arguments[:1]:
        case ["train"]:
            os.execv(sys.executable, [sys.executable, "-m", "trainer", *arguments[1:]])
        case ["demo"]:
            from ps.demo import main as demo

            status: int = demo(arguments[1:])
            return status
    options = _parser().parse_args(arguments)
    match options.command:
        case "serve":
            return _serve(options)
        case "untag":
            from ps.untag import untag

            return untag(options.folders, options.job, options.tag)
        case "status":
            return _status(options)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="zero-ps", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="run a parameter server",
        description="Run a parameter server: one shard of the jobs that trainers open. It says on stdout, in "
        "one line of JSON, when and where it listens; its log goes to stderr.",
    )
    serve.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="which of how many shards, from 0 (default: 0/1)",
    )
    serve.add_argument(
        "--data-dir",
        type=_folder,
        required=True,
        action="append",
        metavar="DIR",
        help="where committed generations are kept. Several, on several disks, share them by bytes; once a server "
        "has them, it needs all of them, and more may be added",
    )
    serve.add_argument(
        "--listen",
        type=_address,
        default="127.0.0.1:7070",
        metavar="HOST:PORT",
        help="address to listen on; port 0 chooses a free one (default: %(default)s)",
    )
    serve.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="keep at most this much of chunks in memory, such as 8GiB, and the rest in --data-dir (default: no "
        "limit). The process takes some 0.5 GiB besides; see docs/storage.md",
    )
    serve.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="threads of one optimizer update (default: half the cores)",
    )
    serve.add_argument(
        "--keep",
        type=_positive,
        default=2,
        metavar="N",
        help="committed generations to keep (default: %(default)s)",
    )
    serve.add_argument(
        "--lease",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="how long a trainer may be silent before it counts as lost (default: %(default)s)",
    )
    serve.add_argument(
        "--links",
        type=_links,
        default=KINDS,
        metavar="KIND,...",
        help=f"kinds of link that trainers may use, of {','.join(KINDS)} (default: all). Each trainer gets the best "
        "one that works; 'zero-ps status' shows which, and why no better one",
    )
    serve.add_argument(
        "--compress",
        type=_codecs,
        default=(),
        metavar="KIND=CODEC,...",
        help="compress chunk files of commits, by kind of array: weight, buffer or state (the optimizer's); the codec "
        "is zstd. The same for all servers of a set (default: none)",
    )
    serve.add_argument(
        "--advertise",
        metavar="HOST",
        help="name or address of this machine under which trainers reach it, where that is not the one that they "
        "connect to: gloo links listen there (default: the one that each trainer uses)",
    )
    serve.add_argument(
        "--device",
        type=_device,
        metavar="cuda:N",
        help="a GPU of this server: trainers on other hosts that have one, too, get nccl links, which takes 48 MiB of "
        "its memory and of pinned memory for each (default: none)",
    )
    serve.add_argument(
        "--max-sessions",
        type=_positive,
        default=MAX_SESSIONS,
        metavar="N",
        help="how many trainers and readers may be connected, of all jobs together; a restarted group needs no more "
        "(default: %(default)s)",
    )
    serve.add_argument(
        "--max-jobs",
        type=_positive,
        default=MAX_JOBS,
        metavar="N",
        help="how many jobs may be in memory (default: %(default)s)",
    )
    serve.add_argument(
        "--max-inflight",
        type=size,
        default=MAX_INFLIGHT_BYTES,
        metavar="SIZE",
        help="how much one trainer may push at once: at least its largest parameter. Without --memory it is kept in "
        "memory until it has arrived whole (default: 4GiB)",
    )
    add = serve.add_argument_group("security (docs/security.md)").add_argument
    add("--tls-cert", type=path, metavar="FILE", help="this server's certificate, PEM: speak TLS and nothing else")
    add("--tls-key", type=path, metavar="FILE", help="its key")
    add("--tls-ca", type=path, metavar="FILE", help="let in clients with a certificate of this CA only (mutual TLS)")
    add("--tokens", type=path, metavar="FILE", help="let in clients with a token only; a line 'TOKEN RIGHT JOBS' each")
    add(
        "--insecure",
        action="store_true",
        help="listen where others reach it, though there is no TLS, or nothing to tell who comes",
    )
    add("--plaintext-links", action="store_true", help="allow links beside TLS whose bytes are not encrypted")
    serve.add_argument("--eviction", choices=("plan", "lru"), default="plan", help=argparse.SUPPRESS)
    serve.add_argument("--late-updates", action="store_true", help=argparse.SUPPRESS)
    serve.add_argument("--stop-on-stdin-eof", action="store_true", help=argparse.SUPPRESS)

    status = commands.add_parser(
        "status", help="show what servers hold", description="Show what servers hold and who is connected."
    )
    status.add_argument("addresses", nargs="+", metavar="ADDRESS", help="HOST:PORT, several also joined by commas")
    status.add_argument("--timeout", type=_seconds, default=5.0, metavar="SECONDS", help="(default: %(default)s)")
    add_flags(status.add_argument_group("security (docs/security.md)"))

    untag = commands.add_parser(
        "untag",
        help="let a tagged commit go",
        description="Take a tag away that job.commit(tag=...) gave. What nothing else keeps is deleted with the job's "
        "next commit. Servers may run meanwhile.",
    )
    untag.add_argument("tag", metavar="TAG")
    untag.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="every --data-dir of every server")
    untag.add_argument("--job", default="default", metavar="NAME", help="(default: %(default)s)")

    for tool in (verify, reshard, export, import_, plan, certs):
        tool.add_parser(commands)

    # Here only for the list of commands; `main` has taken them before.
    commands.add_parser("train", help="run the training application (zero-ps train --help)", add_help=False)
    commands.add_parser("demo", help="two servers, two trainers, one training run", add_help=False)
    return parser


def _status(options: argparse.Namespace) -> int:
    from protos.credentials import Credentials
    from ps.status import print_status

    try:
        credentials = Credentials.from_flags(options)
    except ValueError as error:
        print(f"zero-ps status: {error}", file=sys.stderr)
        return 2
    return print_status(options.addresses, credentials, options.timeout)


def _serve(options: argparse.Namespace) -> int:
    from ps.errors import StartError
    from ps.options import ServerOptions
    from ps.security import SecurityOptions
    from ps.server import ServeOptions, serve
    from ps.store import StoreError

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    index, num_shards = options.shard
    server = ServerOptions(
        index,
        num_shards,
        keep=options.keep,
        lease_seconds=options.lease,
        eviction=options.eviction,
        codecs=options.compress,
        links=options.links,
        advertise=options.advertise,
        device=options.device,
        max_jobs=options.max_jobs,
        max_sessions=options.max_sessions,
        max_inflight_bytes=options.max_inflight,
        late_updates=options.late_updates,
    )
    try:
        serve(
            ServeOptions(
                server,
                tuple(options.data_dir),
                options.listen,
                options.memory,
                options.threads,
                options.stop_on_stdin_eof,
                SecurityOptions(
                    options.tls_cert,
                    options.tls_key,
                    options.tls_ca,
                    options.tokens,
                    options.insecure,
                    options.plaintext_links,
                ),
            )
        )
    except (StartError, StoreError) as error:
        print(f"zero-ps serve: {error}", file=sys.stderr)
        return 2
    return 0


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard: write I/N with I from 0 to N-1, such as 0/2")
    return int(match[1]), int(match[2])


def _address(text: str) -> str:
    from ps.address import split_address

    try:
        split_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _codecs(text: str) -> tuple[tuple[str, str], ...]:
    from ps.store.codecs import check_codec

    found: dict[str, str] = {}
    for entry in text.split(","):
        kind, equals, codec = entry.partition("=")
        if not equals or kind not in COMPRESSIBLE or kind in found:
            raise argparse.ArgumentTypeError(
                f"{entry!r} does not say how to compress what: write KIND=CODEC, once for each of "
                f"{', '.join(COMPRESSIBLE)}, such as weight=zstd"
            )
        try:
            check_codec(codec)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        found[kind] = codec
    return tuple(sorted(found.items()))


def _device(text: str) -> str:
    if re.fullmatch(r"cuda(:\d{1,3})?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no GPU; name one as in cuda:0")
    return text if ":" in text else f"{text}:0"


def _links(text: str) -> tuple[str, ...]:
    try:
        return parse_kinds(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; write . for the current folder")
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file; name a folder, which need not exist yet")
    return path


def _positive(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.05 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds, at least 0.05")
    return value
