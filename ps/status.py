"""`zero-ps status`: what servers hold and who is connected, as a table."""

import sys
from collections import Counter
from collections.abc import Sequence

import grpc

from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc
from protos.credentials import Credentials
from protos.handshake import why_refused
from protos.sizes import format_bytes
from ps.address import split_address

_HEADINGS = (
    "ADDRESS",
    "SHARD",
    "MEMORY",
    "CHUNKS",
    "PULLED",
    "PUSHED",
    "JOB",
    "STEP",
    "COMMITTED",
    "TRAINERS",
    "LINKS",
)


def print_status(addresses: Sequence[str], credentials: Credentials, timeout_seconds: float) -> int:
    """Prints a line for each job of each server. Returns 1 if a server does not answer, else 0.

    addresses: "host:port", several of them also joined by commas. One that is none: 2, and no server is asked.
    """
    rows = []
    failed = False
    servers = [part.strip() for text in addresses for part in text.split(",")]
    try:
        calls = {}
        for address in servers:
            split_address(address)
            calls[address] = credentials.metadata(address)
    except ValueError as error:
        print(f"zero-ps status: {error}", file=sys.stderr)
        return 2
    for address in servers:
        try:
            with credentials.open_channel(address) as channel:
                stub = zero_ps_pb2_grpc.ParameterServerStub(channel)
                status = stub.Status(pb.StatusRequest(), timeout=timeout_seconds, metadata=calls[address])
                rows += _rows(address, status)
        except grpc.RpcError as error:
            failed = True
            # Errors of calls are calls too, which the types do not say.
            code = getattr(error, "code", lambda: grpc.StatusCode.UNKNOWN)()
            details = getattr(error, "details", lambda: None)() or ""
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                details = why_refused(address, credentials, timeout_seconds) or details
            details = " ".join(details.split())
            rows.append((address, f"no answer ({code.name}{details and ': ' + details})"))
    for row in _aligned([_HEADINGS, *rows]):
        print(row)
    return int(failed)


def _rows(address: str, status: pb.StatusResponse) -> list[tuple[str, ...]]:
    server = (
        address,
        f"{status.shard}/{status.num_shards}",
        format_bytes(status.rss_bytes),
        _chunks(status),
        format_bytes(status.bytes_pulled),
        format_bytes(status.bytes_pushed),
    )
    jobs = [
        (
            job.name,
            "-" if job.step < 0 else str(job.step),
            _committed(job),
            _trainers(job),
            _links(job),
        )
        for job in status.jobs
    ]
    return [(*server, *job) for job in jobs or [("-", "-", "-", "-", "-")]]


def _chunks(status: pb.StatusResponse) -> str:
    """Where the bytes of chunks are, if memory is limited."""
    if not status.memory_limit_bytes:
        return "in memory"
    resident, limit = format_bytes(status.resident_bytes), format_bytes(status.memory_limit_bytes)
    return f"{resident} of {limit}, {format_bytes(status.spilled_bytes)} on disk"


def _committed(job: pb.JobStatus) -> str:
    """Steps, each with its tags: '100(best),120'. A tagged one that was abandoned is listed, too."""
    tags: dict[int, list[str]] = {}
    for tag, step in sorted(job.tags.items()):
        tags.setdefault(step, []).append(tag)
    steps = sorted({*job.committed_steps, *tags})
    return ",".join(f"{step}({' '.join(tags[step])})" if step in tags else str(step) for step in steps) or "-"


def _trainers(job: pb.JobStatus) -> str:
    ranks = sorted(s.rank for s in job.sessions if not s.read_only)
    readers = sum(s.read_only for s in job.sessions)
    world_size = max((s.world_size for s in job.sessions if not s.read_only), default=0)
    parts = [f"{len(ranks)} of {world_size}"] if ranks else []
    parts += [f"{readers} reading"] if readers else []
    return ", ".join(parts) or "-"


def _links(job: pb.JobStatus) -> str:
    """'2 shm', or '1 shm, 1 grpc (shm: the trainer runs on another host)'."""
    kinds = Counter(
        (session.link, "; ".join(f"{reason.kind}: {reason.reason}" for reason in session.not_chosen))
        for session in job.sessions
    )
    return ", ".join(f"{count} {kind}{reasons and f' ({reasons})'}" for (kind, reasons), count in kinds.items()) or "-"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    # A row that is shorter than the headings is a message; it does not widen the columns.
    width = len(rows[0])
    widths = [max(len(row[i]) for row in rows if len(row) == width) for i in range(width)]
    widths[0] = max(len(row[0]) for row in rows)
    return ["  ".join(f"{text:<{widths[i]}}" for i, text in enumerate(row)).rstrip() for row in rows]
