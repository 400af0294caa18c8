"""The files that TLS is made of, checked before anything listens with them."""

import logging
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509

from protos.credentials import read_file

_SOON = timedelta(days=14)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """certificate, key: of this server, as PEM; the certificate's file may go on with those that lead to its CA.
    ca: of the clients, who then have to have certificates.
    """

    certificate: Path
    key: Path
    ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.certificate, self.key) if self.ca is None else (self.certificate, self.key, self.ca)


def load_server_certificates(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    """For gRPC. Raises ValueError that names the file, what is wrong with it, and what to do."""
    certificate = read_file(files.certificate, "--tls-cert")
    key = read_file(files.key, "--tls-key")
    warn_if_others_may_read(files.key)
    _check_time(_certificates(files.certificate, certificate)[0], files.certificate)
    _check_pair(files)
    ca = None
    if files.ca is not None:
        ca = read_file(files.ca, "--tls-ca")
        for each in _certificates(files.ca, ca):
            _check_time(each, files.ca)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)


def warn_if_others_may_read(path: Path) -> None:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        _log.warning("%s holds secrets and others than its owner may open it (mode %o): chmod 600 it", path, mode)


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ValueError(f"{path} has no certificate that can be read; name a file in PEM format") from None


def _check_time(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise ValueError(f"the certificate in {path} expired at {end:%Y-%m-%d %H:%M} UTC; get a new one")
    if now < begin:
        raise ValueError(
            f"the certificate in {path} is valid from {begin:%Y-%m-%d %H:%M} UTC on, and it is {now:%Y-%m-%d %H:%M}; "
            "check this machine's clock"
        )
    if end - now < _SOON:
        _log.warning("the certificate in %s expires at %s UTC", path, f"{end:%Y-%m-%d %H:%M}")


def _check_pair(files: TlsFiles) -> None:
    """Raises ValueError for a key that cannot be used, and for one of another certificate."""

    def no_password() -> str:
        raise ValueError(f"{files.key} is encrypted; give a key without a passphrase (openssl pkey -in ... -out ...)")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(
                f"the key in {files.key} is not that of the certificate in {files.certificate}; name the two files "
                "that were made together"
            ) from None
        raise ValueError(
            f"{files.certificate} and {files.key} cannot be used: {error.reason or error}; name a certificate and its "
            "key in PEM format"
        ) from None
