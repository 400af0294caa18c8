"""The contract between `ps` and `trainer`: messages, and what both sides must compute alike.

`zero_ps.proto` states the messages; `zero_ps_pb2` and `zero_ps_pb2_grpc` are generated from it when
the package is built (`make protos` in a working tree). The other modules hold the few rules that a
server and a trainer have to agree on without asking each other.
"""

import os

# gRPC writes remarks about connections to stderr, into whatever a program shows there. Errors reach
# callers as exceptions; who wants the remarks sets the variable.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

PROTOCOL_VERSION = 2
"""Raised with every incompatible change of `zero_ps.proto`; peers of another version are refused."""

MESSAGE_BYTES = 1 << 20
"""Payload of one stream message. Smaller ones cost much more for each byte; docs/links.md has figures for others."""

MAX_MESSAGE_BYTES = 64 << 20
"""The largest message that either side accepts; the manifest of a large model is the largest one."""

SESSION_METADATA = "zero-ps-session"
"""The metadata by which a stream of bytes says whose it is before its first request."""

MAX_MANIFEST_PARAMETERS = 1 << 20
"""The most parameters that a manifest may list."""

MAX_METADATA_BYTES = 1 << 20
"""The most bytes of JSON that a commit may carry."""

MAX_STALENESS = 64
"""The most steps that trainers may be ahead of updates: servers keep as many more sums of gradients."""

KEEPALIVE = (
    ("grpc.keepalive_time_ms", 4000),
    ("grpc.keepalive_timeout_ms", 8000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
"""Options of gRPC connections at both ends: one whose other end does not answer pings is given up after about 12
seconds, so that a cut cable or a host that is down is noticed on the scale of a lease. The pings are answered by
threads that need no Python, so that a busy process does not count as gone. A stopped one (SIGSTOP), whose system still
acknowledges what it gets, counts as gone after gRPC's own limit for pings, a minute."""
