"""A certificate authority for a test cluster, as long as it takes to sign what such a cluster needs."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")

_SKEW = timedelta(hours=1)
"""Clocks of other machines may be behind."""


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates with a key of its own (ECDSA, P-256).

    valid: how long it and what it signs hold. From an hour ago, unless `since` says otherwise.
    """

    def __init__(self, name: str, valid: timedelta) -> None:
        self._valid = valid
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        begin = datetime.now(UTC) - _SKEW
        usage = _usage(key_cert_sign=True, crl_sign=True)
        self._certificate = (
            _builder(self._name, self._name, self._key.public_key(), begin, begin + _SKEW + valid)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.issued = Issued(_pem(self._certificate), _key_pem(self._key))

    def server(self, hosts: Sequence[str], *, valid: timedelta | None = None, since: datetime | None = None) -> Issued:
        """For a server that is reached under these names and addresses. Raises ValueError for what is neither."""
        names = [_host(host) for host in hosts]
        return self._sign(hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, names, valid, since)

    def client(self, name: str, *, valid: timedelta | None = None, since: datetime | None = None) -> Issued:
        return self._sign(name, ExtendedKeyUsageOID.CLIENT_AUTH, [], valid, since)

    def _sign(
        self,
        name: str,
        purpose: x509.ObjectIdentifier,
        hosts: Sequence[x509.GeneralName],
        valid: timedelta | None,
        since: datetime | None,
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        begin = datetime.now(UTC) - _SKEW if since is None else since
        end = min(begin + _SKEW + (valid or self._valid), self._certificate.not_valid_after_utc)
        builder = (
            _builder(_name(name), self._name, key.public_key(), begin, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        return Issued(_pem(builder.sign(self._key, hashes.SHA256())), _key_pem(key))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        pass
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in text.removeprefix("*.").split(".")):
        raise ValueError(f"{text!r} is no name and no address of a host; write it as trainers do, without the port")
    return x509.DNSName(text)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
