"""The flags and variables that name a client's credentials, for commands that should start without gRPC."""

import argparse

TLS_CA, TLS_CERT, TLS_KEY = "ZERO_PS_TLS_CA", "ZERO_PS_TLS_CERT", "ZERO_PS_TLS_KEY"
TOKEN_FILE, INSECURE = "ZERO_PS_TOKEN_FILE", "ZERO_PS_INSECURE"


def add_flags(group: "argparse._ActionsContainer") -> None:
    """Those that `Credentials.from_flags` reads."""
    add = group.add_argument
    add("--tls-ca", metavar="FILE", help=f"the servers' authority, for TLS; else {TLS_CA}")
    add("--tls-cert", metavar="FILE", help=f"a certificate of one's own; else {TLS_CERT}")
    add("--tls-key", metavar="FILE", help=f"its key; else {TLS_KEY}")
    add("--token-file", metavar="FILE", help=f"has the token; else {TOKEN_FILE}")
    add("--insecure", action="store_true", help="send the token also without TLS to other machines")
