"""`zero-ps plan`: what a step would cost on a cluster, and how many servers it takes."""

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING

from ps import arguments

if TYPE_CHECKING:
    from ps.tools.capacity import Cluster, Estimate
    from ps.tools.hf_config import ModelSize

_EXAMPLES = """\
examples:
  zero-ps plan --parameters 70e9 --tokens 4M --servers 8 --hosts 8 --trainers 64
  zero-ps plan --config llama/config.json --tokens 4M --servers 8 --server-memory 256GiB --disk-read 12GB

Each resource takes a while for what one step asks of it; the step takes as long as the slowest, as long as all else
is hidden behind it. docs/planning.md has the arithmetic, what was measured, and how far off it is.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `plan` to the commands of `zero-ps`."""
    parser = commands.add_parser(
        "plan",
        help="estimate what a step costs on a cluster",
        description="Estimate, from a model and a cluster, what moves in one step, how long each resource takes for "
        "it, which one is the bottleneck, and how many servers remove it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--parameters", type=_count, metavar="N", help="of the model, such as 70e9 or 70B")
    which.add_argument("--config", type=arguments.path, metavar="FILE", help="a Hugging Face config.json")
    parser.add_argument("--tokens", type=_count, required=True, metavar="N", help="of one step, all trainers together")
    servers = parser.add_argument_group("storage hosts, one server each")
    servers.add_argument("--servers", type=_positive, default=8, metavar="N", help="(default: %(default)s)")
    _size(servers, "--server-memory", "512GiB", "of each, for chunks: what serve --memory gets")
    servers.add_argument("--server-cores", type=_positive, default=32, metavar="N", help="(default: %(default)s)")
    _size(servers, "--server-network", "25GB", "of each, in a second, each way")
    _size(servers, "--disk-read", "12GB", "all disks of one server together, in a second")
    _size(servers, "--disk-write", "6GB", "all disks of one server together, in a second")
    hosts = parser.add_argument_group("compute hosts")
    hosts.add_argument("--hosts", type=_positive, default=8, metavar="N", help="(default: %(default)s)")
    hosts.add_argument("--trainers", type=_positive, default=64, metavar="N", help="in all (default: %(default)s)")
    _size(hosts, "--host-network", "50GB", "of each host, in a second, each way")
    _size(hosts, "--interconnect", "100GB", "between trainers, for each of them, in a second")
    hosts.add_argument(
        "--flops", type=_count, default=4e14, metavar="N", help="of one trainer in a second, as reached (default: 4e14)"
    )
    _size(hosts, "--live", "16GiB", "of parameters, what a trainer may hold: max_live_bytes")
    parser.add_argument("--link", choices=("gloo", "grpc", "shm"), default="gloo", help="(default: %(default)s)")
    parser.add_argument("--mode", choices=("group", "direct"), default="group", help="(default: %(default)s)")
    parser.add_argument(
        "--one-machine",
        type=_positive,
        default=0,
        metavar="CORES",
        help="all servers and trainers share one machine of so many cores, and --flops is of a trainer's part of them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from ps.tools import hf_config
    from ps.tools.capacity import Cluster, estimate, servers_needed

    try:
        model = (
            hf_config.ModelSize(int(options.parameters), int(options.parameters), 0)
            if options.config is None
            else hf_config.read(options.config)
        )
    except (OSError, ValueError) as error:
        print(f"zero-ps plan: {error}", file=sys.stderr)
        return 2
    cluster = Cluster(
        servers=options.servers,
        server_memory=options.server_memory,
        server_cores=options.server_cores,
        server_network=options.server_network,
        disk_read=options.disk_read,
        disk_write=options.disk_write,
        hosts=options.hosts,
        trainers=options.trainers,
        host_network=options.host_network,
        interconnect=options.interconnect,
        flops=options.flops,
        live=options.live,
        link=options.link,
        group=options.mode == "group",
        one_machine=options.one_machine,
    )
    tokens = int(options.tokens)
    found = estimate(model, tokens, cluster)
    needed = servers_needed(model, tokens, cluster)
    print(_as_json(model, found, needed) if options.json else _as_text(model, tokens, cluster, found, needed))
    return 0


def _as_json(model: "ModelSize", found: "Estimate", needed: int | None) -> str:
    resources = [
        {"name": each.resource, "amount": each.amount, "unit": each.unit, "rate": each.rate, "seconds": each.seconds}
        for each in found.demands
    ]
    document = {
        "parameters": model.parameters,
        "step_seconds": found.seconds,
        "bottleneck": found.bottleneck.resource,
        "servers_needed": needed,
        "server_bytes": round(found.server_bytes),
        "on_disk": found.on_disk,
        "bytes_pulled": round(found.pulled),
        "bytes_pushed": round(found.pushed),
        "resources": resources,
        "notes": list(found.notes),
    }
    return json.dumps(document, indent=2)


def _as_text(model: "ModelSize", tokens: int, cluster: "Cluster", found: "Estimate", needed: int | None) -> str:
    step = found.seconds
    lines = [
        f"{model.parameters / 1e9:.4g} B parameters, {tokens:,} tokens a step; {cluster.servers} servers, "
        f"{cluster.trainers} trainers on {cluster.hosts} hosts, {'group' if cluster.group else 'direct'} mode",
        f"state: {_short(found.server_bytes)}B a server, {found.on_disk:.0%} of it on disk",
        "",
        f"{'resource':<32}{'in a step':>14}{'rate':>14}{'seconds':>10}{'of the step':>13}",
    ]
    for each in sorted(found.demands, key=lambda demand: -demand.seconds):
        unit = each.unit
        lines.append(
            f"{each.resource:<32}{_short(each.amount) + unit:>14}{_rate(each.rate, unit):>14}{each.seconds:>10.2f}"
            f"{each.seconds / step:>13.0%}"
        )
    lines += ["", f"a step takes {step:.2f} s: the bottleneck is {found.bottleneck.resource}"]
    if cluster.one_machine and found.bottleneck.where == "between":
        lines.append("trainers and servers share it")
    elif found.bottleneck.where != "servers":
        lines.append(f"servers are not: {needed} would do")
    elif needed is None:
        lines.append("no number of servers removes it")
    else:
        lines.append(f"{needed} servers remove it")
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _rate(rate: float, unit: str) -> str:
    return f"{rate:g} cores" if unit == "core s" else f"{_short(rate)}{unit}/s"


def _short(value: float) -> str:
    for factor, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {name}"
    return f"{value:.3g} "


def _size(group: "argparse._ArgumentGroup", flag: str, default: str, about: str) -> None:
    group.add_argument(flag, type=arguments.size, default=default, metavar="SIZE", help=f"{about} (default: {default})")


_FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def _count(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d{1,2})?)([kKMBGT]?)", text)
    value = float(match[1]) * _FACTORS[match[2].upper()] if match else 0.0
    if not 1 <= value < 1e21:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 1e21: write 70e9, 70B or 4M")
    return value


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {1 << 20}")
    return int(text)
