"""Who may reach a server, and how: checked before it listens, so that it is never open by mistake."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos.credentials import is_loopback, read_file
from protos.links import KINDS
from ps.access import Access
from ps.address import split_address
from ps.certificates import TlsFiles, load_server_certificates, warn_if_others_may_read
from ps.errors import StartError
from ps.tokens import Tokens, parse_tokens
from ps.watched import Watched

PLAIN_LINKS_REASON = "the server keeps bytes within TLS (zero-ps serve --plaintext-links)"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SecurityOptions:
    """What `zero-ps serve` was told.

    tls_cert, tls_key: PEM files of this server. tls_ca: of the CA whose certificates clients have to have.
    tokens: the file of tokens and rights; see `ps/tokens.py`.
    insecure: listens on any address with less than TLS and a check of who comes.
    plaintext_links: allows, beside TLS, links whose bytes are not encrypted.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    tokens: Path | None = None
    insecure: bool = False
    plaintext_links: bool = False


class Security:
    """How a server listens, and whom it serves.

    links: the kinds of link that --links allows.
    access: who may do what; None where everybody who can connect may do everything.
    kept_in_tls: the kinds of link that TLS rules out.

    Raises StartError for options that do not fit each other or the address, and for files that cannot be used.
    """

    def __init__(self, options: SecurityOptions, listen: str, links: Sequence[str] = KINDS) -> None:
        self._certificates: Watched[grpc.ServerCertificateConfiguration] | None = None
        self._tokens: Watched[Tokens] | None = None
        self.access: Access | None = None
        _check_options(options)
        try:
            if options.tls_cert is not None and options.tls_key is not None:
                files = TlsFiles(options.tls_cert, options.tls_key, options.tls_ca)
                self._certificates = Watched(files.paths, lambda: load_server_certificates(files))
            if options.tokens is not None:
                path = options.tokens
                self._tokens = Watched([path], lambda: _read_tokens(path))
                self.access = Access(self._tokens)
        except (ValueError, OSError) as error:
            raise StartError(str(error)) from None
        self._names_clients = options.tls_ca is not None
        self.kept_in_tls = (
            () if self._certificates is None or options.plaintext_links else tuple(k for k in KINDS if k != "grpc")
        )
        if set(links) <= set(self.kept_in_tls):
            raise StartError(
                f"--links {','.join(links)} leaves no kind of link within TLS; add grpc, or accept that bytes travel "
                "plain with --plaintext-links"
            )
        _check_address(options, listen)

    def add_port(self, server: grpc.Server, address: str) -> int:
        """The port that the server listens on; 0 if it cannot. Raises RuntimeError, too."""
        if self._certificates is None:
            return server.add_insecure_port(address)
        certificates = self._certificates
        first = certificates.value
        # For each connection: gRPC makes much of what it is given, and takes None for the same as before.
        given = [first]

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            now = certificates.value
            if now is given[0]:
                return None
            given[0] = now
            return now

        credentials = grpc.dynamic_ssl_server_credentials(
            first,
            renewed,  # type: ignore[arg-type]
            self._names_clients,
        )
        return server.add_secure_port(address, credentials)

    def reload(self) -> None:
        """Reads the files again; those that cannot be used leave what was read before in force."""
        for each in (self._certificates, self._tokens):
            if each is not None:
                each.reload()

    def describe(self) -> str:
        """For the log."""
        if self._certificates is None:
            transport = "plain text"
        else:
            transport = "TLS, clients have certificates" if self._names_clients else "TLS"
        return f"{transport}, {'no tokens' if self._tokens is None else f'{len(self._tokens.value)} tokens'}"


def _read_tokens(path: Path) -> Tokens:
    data = read_file(path, "--tokens")
    warn_if_others_may_read(path)
    try:
        return parse_tokens(data.decode())
    except UnicodeDecodeError:
        raise ValueError(f"--tokens {path} is no text file") from None
    except ValueError as error:
        raise ValueError(f"--tokens {path}: {error}") from None


def _check_options(options: SecurityOptions) -> None:
    if (options.tls_cert is None) != (options.tls_key is None):
        given, missing = ("--tls-cert", "--tls-key") if options.tls_key is None else ("--tls-key", "--tls-cert")
        raise StartError(f"{given} goes with {missing}; give both, or neither")
    for flag, asked in (
        ("--tls-ca", options.tls_ca is not None),
        ("--plaintext-links", options.plaintext_links),
    ):
        if asked and options.tls_cert is None:
            raise StartError(f"{flag} goes with TLS; give --tls-cert and --tls-key, too, or leave it away")


def _check_address(options: SecurityOptions, listen: str) -> None:
    """Raises StartError where strangers could reach the server and nothing would keep them out."""
    if is_loopback(split_address(listen)[0]):
        return
    open_to = []
    if options.tls_cert is None:
        open_to.append("whoever is on the network between can read and change what is sent")
    if options.tls_ca is None and options.tokens is None:
        open_to.append("whoever reaches it can read and overwrite every job")
    if not open_to:
        if options.insecure:
            _log.info("--insecure has no effect beside TLS and a check of who comes")
        return
    if not options.insecure:
        missing = []
        if options.tls_cert is None:
            missing.append("--tls-cert and --tls-key")
        if options.tls_ca is None and options.tokens is None:
            missing.append("--tls-ca or --tokens")
        raise StartError(
            f"{listen} is not a loopback address, and the server would be open there: {'; '.join(open_to)}. Give "
            f"{', and '.join(missing)} ('zero-ps certs' makes them for a test cluster; docs/security.md), listen on "
            "127.0.0.1, or accept it with --insecure"
        )
    _log.warning("INSECURE: %s is not a loopback address, and --insecure was given: %s", listen, "; ".join(open_to))
