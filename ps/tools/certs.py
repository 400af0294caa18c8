"""`zero-ps certs`: what a test cluster needs to be closed to strangers."""

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from ps import arguments

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_EXAMPLES = """\
example:
  zero-ps certs security --host ps0.example --host 10.0.0.1
  zero-ps serve --listen 0.0.0.0:7070 --data-dir state --tokens security/tokens \\
      --tls-cert security/server.crt --tls-key security/server.key --tls-ca security/ca.crt
  zero-ps status ps0.example:7070 --token-file security/read.token \\
      --tls-ca security/ca.crt --tls-cert security/client.crt --tls-key security/client.key

The same files serve every server of a set, as long as --host names them all.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `certs` to the commands of `zero-ps`."""
    parser = commands.add_parser(
        "certs",
        help="make certificates and tokens for a test cluster",
        description="Make a certificate authority, a certificate for servers and one for clients, and a file of "
        "tokens. For clusters on trial: one key for all servers, one for all clients, and the authority's beside them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=arguments.path, metavar="OUT_DIR", help="a folder that does not exist yet")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="name or address under which trainers reach a server; give all of them. This machine's loopback "
        "addresses are there anyway",
    )
    parser.add_argument("--days", type=_days, default=365, help="how long the certificates hold (default: 365)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    try:
        make_certs(options.out, options.host, timedelta(days=options.days))
    except (ValueError, OSError) as error:
        text = error.strerror and f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        print(f"zero-ps certs: {text}", file=sys.stderr)
        return 2
    print(f"{options.out}/ has")
    for name, about in _CONTENTS:
        print(f"  {name:12} {about}")
    return 0


_CONTENTS = (
    ("ca.crt", "for clients (--tls-ca, ZERO_PS_TLS_CA), and for servers that ask for certificates (--tls-ca)"),
    ("ca.key", "signs more certificates; no server and no trainer needs it: keep it elsewhere, or delete it"),
    ("server.crt", "for servers (--tls-cert)"),
    ("server.key", "for servers (--tls-key)"),
    ("client.crt", "for clients (--tls-cert, ZERO_PS_TLS_CERT)"),
    ("client.key", "for clients (--tls-key, ZERO_PS_TLS_KEY)"),
    ("tokens", "for servers (--tokens): the three tokens, each with its right on all jobs"),
    ("read.token", "for clients (--token-file, ZERO_PS_TOKEN_FILE)"),
    ("train.token", "the same, for trainers"),
    ("admin.token", "the same, for who runs the servers"),
)


def make_certs(out: Path, hosts: Sequence[str], valid: timedelta) -> None:
    """Fills a new folder (mode 0700) with what `zero-ps certs` makes; files that hold secrets have mode 0600.

    Raises ValueError for hosts that are none and for a folder that has something in it, and OSError.
    """
    from ps.authority import Authority

    authority = Authority("zero-ps test cluster", valid)
    server = authority.server([*hosts, *(host for host in _LOOPBACK if host not in hosts)])
    client = authority.client("zero-ps client")
    tokens = {right: secrets.token_hex(32) for right in ("read", "train", "admin")}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already, and nothing in it is overwritten; name another folder")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    out.chmod(0o700)
    for name, issued in (("ca", authority.issued), ("server", server), ("client", client)):
        _write(out / f"{name}.crt", issued.certificate, 0o644)
        _write(out / f"{name}.key", issued.key, 0o600)
    rules = "".join(f"{token} {right} *\n" for right, token in tokens.items())
    _write(out / "tokens", f"# TOKEN RIGHT JOBS: see docs/security.md\n{rules}".encode(), 0o600)
    for right, token in tokens.items():
        _write(out / f"{right}.token", f"{token}\n".encode(), 0o600)


def _write(path: Path, data: bytes, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(data)


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 36500:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days, at least 1")
    return int(text)
