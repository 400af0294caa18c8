"""A server does not start where it would be open by mistake, nor with files that cannot be used."""

import os
from pathlib import Path

import pytest
import torch

from protos.credentials import is_loopback
from ps import LocalCluster
from ps.errors import StartError
from ps.security import Security, SecurityOptions
from tests.ps.client import start_job
from tests.security.conftest import Files, refused
from tests.security.tokens import TOKENS


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.9.10", "[::1]", "localhost", "LocalHost")),
        *((host, False) for host in ("0.0.0.0", "[::]", "10.0.0.1", "[fe80::1]", "ps0.example", "localhost.example")),
        # Whatever the system may make of them.
        *((host, False) for host in ("0", "127.1", "2130706433", "0x7f000001", "*", "unix", "localhost.")),
    ],
)
def test_what_is_a_loopback_address(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "ps0.example:7070"])
def test_other_addresses_than_loopback_take_tls(listen: str) -> None:
    with pytest.raises(StartError) as error:
        Security(SecurityOptions(), listen)
    assert f"{listen} is not a loopback address" in str(error.value)
    for way in ("--tls-cert", "--tls-key", "--tokens", "--insecure", "zero-ps certs"):
        assert way in str(error.value)


def test_neither_tls_nor_tokens_alone_are_enough(files: Files) -> None:
    tls = {"tls_cert": files.folder / "server.crt", "tls_key": files.folder / "server.key"}
    with pytest.raises(StartError, match="can read and change what is sent.*--tls-cert"):
        Security(SecurityOptions(tokens=files.tokens), "0.0.0.0:0")
    with pytest.raises(StartError, match="can read and overwrite every job.*--tls-ca or --tokens"):
        Security(SecurityOptions(**tls), "0.0.0.0:0")
    for enough in ({"tokens": files.tokens}, {"tls_ca": files.folder / "ca.crt"}):
        Security(SecurityOptions(**tls, **enough), "0.0.0.0:0")
    for enough in ({}, tls, {"tokens": files.tokens}):
        Security(SecurityOptions(**enough), "127.0.0.1:0")


def test_insecure_is_logged_loudly(start) -> None:
    log = start("--insecure", listen="0.0.0.0:0").log
    assert "WARNING" in log and "INSECURE: 0.0.0.0:0" in log
    assert "can read and change what is sent; whoever reaches it can read and overwrite every job" in log


def test_insecure_says_nothing_where_it_changes_nothing(caplog: pytest.LogCaptureFixture, files: Files) -> None:
    Security(SecurityOptions(insecure=True), "127.0.0.1:0")
    assert "INSECURE" not in caplog.text


def test_the_log_says_how_it_listens(secured: LocalCluster) -> None:
    assert f"(TLS, clients have certificates, {len(TOKENS)} tokens)" in secured.log(0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tls-cert", "server.crt"], "--tls-cert goes with --tls-key"),
        (["--tls-key", "server.key"], "--tls-key goes with --tls-cert"),
        (["--tls-ca", "ca.crt"], "--tls-ca goes with TLS"),
        (["--plaintext-links"], "--plaintext-links goes with TLS"),
        (["--tls-cert", "server.crt", "--tls-key", "server.key", "--links", "shm,gloo"], "no kind of link within TLS"),
        (["--tls-cert", "none.crt", "--tls-key", "server.key"], "none.crt cannot be read: No such file"),
        (["--tls-cert", "server.crt", "--tls-key", "none.key"], "none.key cannot be read: No such file"),
        (["--tls-cert", "server.crt", "--tls-key", "server.key", "--tls-ca", "none"], "none cannot be read"),
        (["--tls-cert", "server.crt", "--tls-key", "client.key"], "is not that of the certificate in"),
        (["--tls-cert", "server.key", "--tls-key", "server.key"], "server.key has no certificate"),
        (["--tls-cert", "server.crt", "--tls-key", "server.crt"], "cannot be used"),
        (["--tls-cert", "server.crt", "--tls-key", "server.key", "--tls-ca", "server.key"], "has no certificate"),
        (["--tls-cert", "expired-server.crt", "--tls-key", "expired-server.key"], "expired at 20"),
        (["--tokens", "none"], "none cannot be read: No such file"),
    ],
)
def test_what_does_not_fit_is_refused(files: Files, flags: list[str], message: str) -> None:
    fields = {}
    links = ("shm", "gloo", "grpc")
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if flag == "--plaintext-links":
            fields["plaintext_links"] = True
        elif flag == "--links":
            links = tuple(rest.pop(0).split(","))
        else:
            fields[flag[2:].replace("-", "_")] = files.other / rest.pop(0)
    with pytest.raises(StartError) as error:
        Security(SecurityOptions(**fields), "127.0.0.1:0", links)
    assert message in str(error.value)


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    said = refused(tmp_path, listen="0.0.0.0:0")
    assert said.startswith("zero-ps serve: 0.0.0.0:0 is not a loopback address") and said.count("\n") == 1


def test_an_encrypted_key_is_refused(tmp_path: Path, files: Files) -> None:
    from cryptography.hazmat.primitives import serialization

    plain = serialization.load_pem_private_key((files.other / "server.key").read_bytes(), None)
    key = tmp_path / "encrypted.key"
    key.write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(StartError, match="is encrypted"):
        Security(SecurityOptions(tls_cert=files.other / "server.crt", tls_key=key), "127.0.0.1:0")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_key_that_may_not_be_read_is_refused(tmp_path: Path, files: Files) -> None:
    key = tmp_path / "server.key"
    key.write_bytes((files.other / "server.key").read_bytes())
    key.chmod(0)
    with pytest.raises(StartError, match="Permission denied"):
        Security(SecurityOptions(tls_cert=files.other / "server.crt", tls_key=key), "127.0.0.1:0")


def test_secrets_that_others_may_read_are_warned_of(
    tmp_path: Path, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    key, tokens = tmp_path / "server.key", tmp_path / "tokens"
    for path, source in ((key, files.other / "server.key"), (tokens, files.tokens)):
        path.write_bytes(source.read_bytes())
        path.chmod(0o640)
    Security(SecurityOptions(tls_cert=files.other / "server.crt", tls_key=key, tokens=tokens), "127.0.0.1:0")
    for path in (key, tokens):
        assert f"{path} holds secrets and others than its owner may open it (mode 640)" in caplog.text


def test_what_a_server_writes_is_its_owners_alone(start, tmp_path: Path) -> None:
    """Also in a folder that was there and that others may open."""
    data = tmp_path / "shared"
    data.mkdir(mode=0o755)
    server = start("--data-dir", data)
    (client,) = start_job(server.address, {"w": torch.ones(30)})
    client.call("Commit", timeout_seconds=20)
    client.close()
    client.drop()
    found = [path for folder in (data, tmp_path / "server-0" / "data") for path in folder.rglob("*")]
    assert [path for path in found if path.is_file() and "weight" in path.parts]
    for path in found:
        assert not path.stat().st_mode & 0o077, f"{path} has mode {path.stat().st_mode:o}"
    assert f"{data} can be opened by others than its owner" in server.log_with("can be opened")
