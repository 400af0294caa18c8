"""What trainers and `zero-ps status` say when they and a server do not come to terms."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

import trainer
from protos import zero_ps_pb2 as pb
from protos import zero_ps_pb2_grpc
from ps import LocalCluster
from tests.security.conftest import ROOT, Files
from tests.security.tokens import TOKENS, WRONG

TOKEN = TOKENS["train"][0]


def failure(addresses: list[str], credentials: trainer.Credentials) -> trainer.ZeroPsError:
    """Why one cannot connect; it is known long before the time is up."""
    began = time.monotonic()
    with pytest.raises(trainer.ZeroPsError) as error:
        trainer.connect(addresses, credentials=credentials, connect_timeout=60).close()
    assert time.monotonic() - began < 30
    assert TOKEN not in str(error.value) and WRONG not in str(error.value)
    return error.value


def test_plain_text_to_a_server_that_speaks_tls(secured: LocalCluster) -> None:
    error = failure(secured.addresses, trainer.Credentials(token=TOKEN))
    assert isinstance(error, trainer.ConnectError)
    assert "the server speaks TLS, and plain text was tried" in str(error) and "ZERO_PS_TLS_CA" in str(error)


def test_tls_to_a_server_that_speaks_plain_text(cluster: LocalCluster, files: Files) -> None:
    error = failure(cluster.addresses, files.credentials())
    assert isinstance(error, trainer.ConnectError) and "the server speaks plain text, and TLS was asked for" in str(
        error
    )


def test_an_authority_that_did_not_sign_the_servers_certificate(secured: LocalCluster, files: Files) -> None:
    error = failure(secured.addresses, files.credentials(ca=files.stranger / "ca.crt"))
    assert isinstance(error, trainer.ConnectError)
    assert f"is not from the authority in {files.stranger / 'ca.crt'}" in str(error)


@pytest.mark.parametrize(
    ("certificate", "message"),
    [
        ("expired-server", "the server's certificate has expired"),
        ("elsewhere", "the server's certificate is not for '127.0.0.1'"),
    ],
)
def test_a_servers_certificate_that_is_not_good(files: Files, certificate: str, message: str) -> None:
    key, cert = ((files.other / f"{certificate}.{end}").read_bytes() for end in ("key", "crt"))
    # zero-ps serve does not even start with the expired one; it runs on when one expires later.
    server = grpc.server(threads := ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, cert)]))
    server.start()
    error = failure([f"127.0.0.1:{port}"], trainer.Credentials(ca=files.other / "ca.crt"))
    server.stop(0)
    threads.shutdown()
    assert isinstance(error, trainer.ConnectError) and message in str(error)


def test_a_client_without_a_certificate_or_with_a_strangers(secured: LocalCluster, files: Files) -> None:
    error = failure(secured.addresses, files.credentials(cert=None, key=None))
    assert "the server asks for a client's certificate, and none was given" in str(error)
    theirs = files.credentials(cert=files.stranger / "client.crt", key=files.stranger / "client.key")
    error = failure(secured.addresses, theirs)
    assert f"the server refuses the certificate in {files.stranger / 'client.crt'}" in str(error)


def test_a_clients_certificate_that_has_expired(files: Files, start) -> None:
    ours = files.other
    server = start(*("--tls-cert", ours / "server.crt", "--tls-key", ours / "server.key", "--tls-ca", ours / "ca.crt"))
    expired = trainer.Credentials(ca=ours / "ca.crt", cert=ours / "expired-client.crt", key=ours / "expired-client.key")
    assert "expired-client.crt, which has expired" in str(failure([server.address], expired))
    # Without tokens a certificate is all it takes.
    good = trainer.Credentials(ca=ours / "ca.crt", cert=ours / "client.crt", key=ours / "client.key")
    trainer.connect(server.address, credentials=good).close()


def test_tokens_that_are_missing_unknown_or_not_enough(secured: LocalCluster, files: Files) -> None:
    for who, message in ((None, "the call brought none"), ("reader", "takes the right 'train' on job 'default'")):
        error = failure(secured.addresses, files.credentials(who))
        assert isinstance(error, trainer.AccessDenied) and message in str(error)
    error = failure(secured.addresses, files.credentials(None, token=WRONG))
    assert isinstance(error, trainer.AccessDenied) and "does not know the token" in str(error)


@pytest.mark.parametrize("address", ["10.0.0.1:7070", "[2001:db8::1]:7070", "ps0.example:7070", "0.0.0.0:7070"])
def test_a_token_does_not_leave_the_machine_in_plain_text(address: str) -> None:
    with pytest.raises(trainer.ConfigError, match="the token would travel to .* in plain text"):
        trainer.connect(address, credentials=trainer.Credentials(token=TOKEN), connect_timeout=60)
    assert trainer.Credentials(token=TOKEN, insecure=True).metadata(address) == (("authorization", f"Bearer {TOKEN}"),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cert": "client.crt"}, "give both cert and key"),
        ({"cert": "client.crt", "key": "client.key"}, "name the authority"),
        ({"ca": "none.crt"}, "none.crt cannot be read: No such file"),
        ({"ca": "client.key"}, "has no certificate that can be read"),
        ({"ca": "ca.crt", "cert": "client.crt", "key": "server.key"}, "do not belong together"),
        ({"ca": "ca.crt", "cert": "client.key", "key": "client.key"}, "cannot be used as certificate and key"),
        ({"token": TOKEN, "token_file": "tokens"}, "not both"),
        ({"token": f"{TOKEN}\nx: y"}, "is no token"),
        ({"token": ""}, "is no token"),
        ({"token": f"{TOKEN}\n"}, r"has white space around it.*give token.strip\(\), or the file's name as token_file"),
    ],
)
def test_credentials_that_do_not_fit(files: Files, fields: dict[str, str], message: str) -> None:
    given = {name: text if name == "token" else files.other / text for name, text in fields.items()}
    with pytest.raises(ValueError, match=message) as error:
        trainer.Credentials(**given)
    assert TOKEN not in str(error.value)


def test_a_token_file_that_has_none(files: Files, tmp_path: Path, cluster: LocalCluster) -> None:
    with pytest.raises(trainer.ConfigError, match="cannot be read"):
        trainer.connect(cluster.addresses, credentials=trainer.Credentials(token_file=tmp_path / "none"))
    with pytest.raises(trainer.ConfigError, match="is no token") as error:
        trainer.connect(cluster.addresses, credentials=trainer.Credentials(token_file=files.tokens))
    assert TOKEN not in str(error.value)


def test_no_secret_is_in_the_representation(files: Files) -> None:
    assert TOKEN not in repr(files.credentials()) and "client.key" in repr(files.credentials())


@pytest.fixture
def environment(files: Files) -> dict[str, str]:
    return files.environment()


def test_credentials_come_from_the_environment(
    secured: LocalCluster, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, job_name: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer.connect(secured.addresses, job=job_name).close()
    monkeypatch.setenv("ZERO_PS_TLS_CERT", "none.crt")
    with pytest.raises(trainer.ConfigError, match="credentials from the environment: none.crt cannot be read"):
        trainer.connect(secured.addresses, job=job_name)


def test_status_takes_flags_and_the_environment(secured: LocalCluster, environment: dict[str, str]) -> None:
    def status(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ps", "status", ",".join(secured.addresses), *flags],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        )

    found = status(**environment)
    assert found.returncode == 0 and "0/2" in found.stdout, found.stderr
    names = ("ca", "cert", "key")
    flags = [text for name in names for text in (f"--tls-{name}", environment[f"ZERO_PS_TLS_{name.upper()}"])]
    found = status(*flags)
    assert found.returncode == 1 and "UNAUTHENTICATED: this server asks for a token" in found.stdout
    found = status()
    assert found.returncode == 1 and "the server speaks TLS, and plain text was tried" in found.stdout


def test_a_port_that_speaks_tls_answers_nothing_else(secured: LocalCluster) -> None:
    """Plain HTTP/2, as any gRPC client without TLS speaks it."""
    with grpc.insecure_channel(secured.addresses[0]) as channel:
        stub = zero_ps_pb2_grpc.ParameterServerStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.Status(pb.StatusRequest(), timeout=10, metadata=(("authorization", f"Bearer {TOKEN}"),))
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("data", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", bytes(100)])
def test_who_connects_and_makes_no_sense_is_sent_away(secured: LocalCluster, data: bytes) -> None:
    host, _, port = secured.addresses[0].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as stranger:
        stranger.sendall(data)
        with contextlib.suppress(ConnectionError):
            while received := stranger.recv(1000):
                # An alert of TLS at most.
                assert len(received) < 50


def test_a_new_certificate_is_taken_and_a_broken_one_is_not(start, files: Files, tmp_path: Path) -> None:
    def put(certificate: Path, key: Path) -> None:
        shutil.copy(key, tmp_path / "key")
        shutil.copy(certificate, tmp_path / "crt")
        server.process.send_signal(signal.SIGHUP)

    def presented() -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        with context.wrap_socket(connection) as secure:
            return secure.getpeercert(binary_form=True) or b""

    def of(path: Path) -> bytes:
        return ssl.PEM_cert_to_DER_cert(path.read_text())

    ours = files.other
    for name, end in (("crt", "crt"), ("key", "key")):
        shutil.copy(ours / f"server.{end}", tmp_path / name)
    server = start("--tls-cert", tmp_path / "crt", "--tls-key", tmp_path / "key", "--tls-ca", ours / "ca.crt")
    good = trainer.Credentials(ca=ours / "ca.crt", cert=ours / "client.crt", key=ours / "client.key")
    with trainer.connect(server.address, credentials=good) as job:
        put(ours / "elsewhere.crt", ours / "elsewhere.key")
        server.log_with("read ")
        assert presented() == of(ours / "elsewhere.crt")
        put(ours / "server.crt", ours / "elsewhere.key")
        assert "stays in force" in server.log_with("stays in force")
        assert presented() == of(ours / "elsewhere.crt")
        put(ours / "expired-server.crt", ours / "expired-server.key")
        assert "expired at" in server.log_with("expired at")
        assert presented() == of(ours / "elsewhere.crt")
        # Who was connected still is.
        job.servers[0].describe(10)


def test_strangers_who_begin_health_checks_take_nobodys_place(start, files: Files) -> None:
    ours = files.other
    tls = ("--tls-cert", ours / "server.crt", "--tls-key", ours / "server.key")
    server = start(*tls, "--tokens", files.tokens, "--max-sessions", 2)
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait(60)
        yield b""

    channels = [
        trainer.Credentials(ca=ours / "ca.crt").open_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(6)
    ]
    try:
        checks = [
            channel.stream_unary("/grpc.health.v1.Health/Check").future(nothing(), timeout=60)
            for channel in channels
            for _ in range(60)
        ]
        for check in checks:
            assert health_pb2.HealthCheckResponse.FromString(check.result(30)).status == 1
        trainer.connect(server.address, credentials=trainer.Credentials(ca=ours / "ca.crt", token=TOKEN)).close()
    finally:
        never.set()
        for channel in channels:
            channel.close()
