"""How a client says who it is, and makes sure whom it talks to: trainers, and commands that ask servers."""

import argparse
import ipaddress
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc

from protos.credential_flags import INSECURE, TLS_CA, TLS_CERT, TLS_KEY, TOKEN_FILE, add_flags

_MAX_FILE_BYTES = 1 << 20
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")


@dataclass(frozen=True)
class Credentials:
    """What a trainer shows to servers, and what it asks of them.

    ca: PEM file of the authority whose certificate servers must have; with it, and only then, the connection is TLS.
    cert, key: PEM files of this client's own certificate, for servers that ask for one (`zero-ps serve --tls-ca`).
    token: for servers that ask for one (`zero-ps serve --tokens`), or token_file: the file that it stands in alone.
    insecure: sends the token also where it can be read on the way, to other machines without TLS.

    Raises ValueError for what does not go together and for files that cannot be used. No token and no key is ever
    part of an error, a log, or the representation of this object.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    token: str | None = field(default=None, repr=False)
    token_file: str | os.PathLike[str] | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a certificate and its key go together; give both cert and key, or neither")
        if self.cert is not None and self.ca is None:
            raise ValueError("a certificate is for TLS; name the authority of the servers, too: ca")
        if self.token is not None and self.token_file is not None:
            raise ValueError("give token or token_file, not both")
        if self.token is not None:
            _check_token(self.token, "the token")
        if self.tls:
            self.ssl_context()

    @classmethod
    def from_environment(
        cls,
        *,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        token_file: str | None = None,
        insecure: bool = False,
    ) -> Self:
        """Each one as given, else of the variable ZERO_PS_TLS_CA, ZERO_PS_TLS_CERT, ZERO_PS_TLS_KEY,
        ZERO_PS_TOKEN_FILE, or ZERO_PS_INSECURE=1."""
        return cls(
            ca=ca or os.environ.get(TLS_CA) or None,
            cert=cert or os.environ.get(TLS_CERT) or None,
            key=key or os.environ.get(TLS_KEY) or None,
            token_file=token_file or os.environ.get(TOKEN_FILE) or None,
            insecure=insecure or os.environ.get(INSECURE) == "1",
        )

    @staticmethod
    def add_flags(group: "argparse._ActionsContainer") -> None:
        """Adds --tls-ca, --tls-cert, --tls-key, --token-file and --insecure to a parser or a group of one."""
        add_flags(group)

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> Self:
        """What the flags of `add_flags` say, else the environment. Raises ValueError."""
        return cls.from_environment(
            ca=flags.tls_ca,
            cert=flags.tls_cert,
            key=flags.tls_key,
            token_file=flags.token_file,
            insecure=flags.insecure,
        )

    @property
    def tls(self) -> bool:
        return self.ca is not None

    def open_channel(self, address: str, options: Sequence[tuple[str, object]] = ()) -> grpc.Channel:
        """A channel to a server, which connects when it is used. Raises ValueError."""
        if not self.tls:
            return grpc.insecure_channel(address, options=options)
        files = [None if path is None else read_file(path) for path in (self.ca, self.key, self.cert)]
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), options=options)

    def metadata(self, address: str) -> tuple[tuple[str, str], ...]:
        """What every call to a server carries. Raises ValueError where a token would be seen by others."""
        token = self.token
        if self.token_file is not None:
            token = read_file(self.token_file).decode("ascii", "replace").strip()
            _check_token(token, f"what stands in {os.fspath(self.token_file)}")
        if token is None:
            return ()
        if not self.tls and not self.insecure and not is_loopback(address.rpartition(":")[0]):
            raise ValueError(
                f"the token would travel to {address} in plain text, for anybody on the way to read; name the servers' "
                f"authority (ca, --tls-ca or {TLS_CA}) so that it travels in TLS, or accept it: "
                f"Credentials(insecure=True), --insecure or {INSECURE}=1"
            )
        return (("authorization", f"Bearer {token}"),)

    def ssl_context(self) -> ssl.SSLContext:
        """The same for Python's own TLS. Raises ValueError for files that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        if self.ca is not None:
            read_file(self.ca)
            try:
                context.load_verify_locations(cafile=self.ca)
            except ssl.SSLError:
                raise ValueError(f"{os.fspath(self.ca)} has no certificate that can be read (PEM)") from None
        if self.cert is not None and self.key is not None:
            read_file(self.cert)
            read_file(self.key)
            try:
                context.load_cert_chain(self.cert, self.key, _no_password)
            except ssl.SSLError as error:
                mismatch = error.reason == "KEY_VALUES_MISMATCH"
                why = "do not belong together" if mismatch else "cannot be used as certificate and key (PEM)"
                raise ValueError(f"{os.fspath(self.cert)} and {os.fspath(self.key)} {why}") from None
        return context


def read_file(path: str | os.PathLike[str], flag: str = "") -> bytes:
    """A certificate, a key or tokens. Raises ValueError, which names the file behind the flag that it came with."""
    name = f"{flag} {os.fspath(path)}".strip()
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"{name} is larger than {_MAX_FILE_BYTES} bytes; name the file that is meant")
    return data


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach a host, IPv6 in brackets or not. No name but localhost is."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_token(token: str, what: str) -> None:
    if _TOKEN.fullmatch(token):
        return
    if _TOKEN.fullmatch(token.strip()):
        raise ValueError(
            f"{what} has white space around it, as what was read from a file has: give token.strip(), or the file's "
            "name as token_file"
        )
    raise ValueError(f"{what} is no token: it has to be 1 to 4096 visible ASCII characters in one line")


def _no_password() -> str:
    raise ValueError("the client's key is encrypted; give a key without a passphrase")
