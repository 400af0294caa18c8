"""Why a client and a server do not come to terms about TLS, which gRPC itself says of no connection that failed."""

import contextlib
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path

from protos.credential_flags import TLS_CA, TLS_CERT, TLS_KEY
from protos.credentials import Credentials


def why_refused(address: str, credentials: Credentials, timeout: float) -> str | None:
    """Connects once more to "host:port" and says why a secure connection, or a plain one, is not to be had.

    None where TLS is not to blame, as far as that can be told within `timeout` seconds: nobody may listen there.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal():
        return None
    try:
        with socket.create_connection((host, int(port)), timeout=timeout) as connection:
            if credentials.tls:
                return _tls(connection, host, credentials)
            return _plain(connection)
    except (OSError, ValueError):
        return None


def _tls(connection: socket.socket, host: str, credentials: Credentials) -> str | None:
    try:
        secured = credentials.ssl_context().wrap_socket(connection, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        return _of_the_server(error, host, credentials)
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE"):
            return (
                "the server speaks plain text, and TLS was asked for; start it with --tls-cert and --tls-key, or "
                "connect without a CA"
            )
        return _of_the_client(credentials) if "ALERT" in (error.reason or "") else None
    with secured:
        try:
            # A server of gRPC speaks first. One that does not like the client's certificate hangs up after the
            # handshake, gRPC's own without a word.
            refused = secured.recv(1) == b""
        except (ssl.SSLError, ConnectionError):
            refused = True
    return _of_the_client(credentials) if refused else None


def _of_the_server(error: ssl.SSLCertVerificationError, host: str, credentials: Credentials) -> str:
    match error.verify_code:
        case 10:
            return "the server's certificate has expired; it needs a new one (zero-ps serve --tls-cert)"
        case 9:
            return "the server's certificate is not valid yet; compare the clocks of the two machines"
        case 62 | 64:
            return (
                f"the server's certificate is not for {host!r}; connect under a name that it is for, or give the "
                "server one with this name (zero-ps certs --host)"
            )
    return (
        f"the server's certificate is not from the authority in {credentials.ca} ({error.verify_message}); name the "
        f"authority's file that belongs to this server (ca, --tls-ca or {TLS_CA})"
    )


def _of_the_client(credentials: Credentials) -> str:
    if credentials.cert is None:
        return (
            f"the server asks for a client's certificate, and none was given (cert and key, --tls-cert and --tls-key, "
            f"or {TLS_CERT} and {TLS_KEY})"
        )
    if _has_expired(Path(credentials.cert)):
        return f"the server refuses the certificate in {credentials.cert}, which has expired; get a new one"
    return (
        f"the server refuses the certificate in {credentials.cert}; it takes those of the CA that 'zero-ps serve "
        "--tls-ca' names"
    )


def _has_expired(path: Path) -> bool:
    from cryptography import x509

    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc < datetime.now(UTC)


def _plain(connection: socket.socket) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection) as secured, contextlib.suppress(OSError):
            secured.recv(1)
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return None
    return (
        f"the server speaks TLS, and plain text was tried; name its authority with trainer.Credentials(ca=...), "
        f"--tls-ca or {TLS_CA}"
    )
