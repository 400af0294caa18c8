"""Certificates and tokens, made once, and servers that ask for them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import trainer
from ps import LocalCluster
from ps.authority import Authority, Issued
from ps.tools.certs import make_certs
from tests.security.tokens import TOKENS

ROOT = Path(__file__).resolve().parents[2]


class Files:
    """A folder as `zero-ps certs` makes it, and what is wrong in one way or another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "certs"
        make_certs(self.folder, [], timedelta(days=100))
        self.stranger = folder / "stranger"
        make_certs(self.stranger, [], timedelta(days=100))
        self.tokens = folder / "tokens"
        self.tokens.write_text("".join(f"{token} {rule}\n" for token, rule in TOKENS.values()))
        self.tokens.chmod(0o600)
        self.token_file = folder / "token"
        self.token_file.write_text(f"{TOKENS['train'][0]}\n")
        # An authority of which this test has the key, too.
        authority = Authority("another test", timedelta(days=400))
        past = datetime.now(UTC) - timedelta(days=30)
        self.other = folder / "other"
        self.other.mkdir()
        self._write("ca", authority.issued)
        self._write("server", authority.server(["localhost", "127.0.0.1"]))
        self._write("client", authority.client("client"))
        self._write("expired-server", authority.server(["127.0.0.1"], valid=timedelta(days=1), since=past))
        self._write("expired-client", authority.client("client", valid=timedelta(days=1), since=past))
        self._write("elsewhere", authority.server(["ps0.example"]))

    def _write(self, name: str, issued: Issued) -> None:
        (self.other / f"{name}.crt").write_bytes(issued.certificate)
        key = self.other / f"{name}.key"
        key.write_bytes(issued.key)
        key.chmod(0o600)

    def credentials(self, who: str | None = "train", **other: object) -> trainer.Credentials:
        """Of one who is in the tokens file, with a certificate of `folder`."""
        fields = {
            "ca": self.folder / "ca.crt",
            "cert": self.folder / "client.crt",
            "key": self.folder / "client.key",
            "token": who and TOKENS[who][0],
        }
        return trainer.Credentials(**{**fields, **other})

    def environment(self) -> dict[str, str]:
        """The same of `train`, as a process inherits it."""
        return {
            "ZERO_PS_TLS_CA": str(self.folder / "ca.crt"),
            "ZERO_PS_TLS_CERT": str(self.folder / "client.crt"),
            "ZERO_PS_TLS_KEY": str(self.folder / "client.key"),
            "ZERO_PS_TOKEN_FILE": str(self.token_file),
        }


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("security"))


@pytest.fixture(scope="session")
def secured(files: Files) -> Iterator[LocalCluster]:
    """Two servers with mutual TLS and tokens."""
    with LocalCluster(2, tls=files.folder, tokens=files.tokens) as cluster:
        yield cluster


def _serve(folder: Path, listen: str) -> list[str]:
    return [sys.executable, "-m", "ps", "serve", "--data-dir", str(folder / "data"), "--listen", listen]


class Started:
    """A server with arguments of its own."""

    def __init__(self, folder: Path, *arguments: object, listen: str = "127.0.0.1:0") -> None:
        self._log = folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*_serve(folder, listen), "--stop-on-stdin-eof", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        assert ready, self.log
        self.port = int(ready.split('"listening": "')[1].split('"')[0].rpartition(":")[2])
        self.address = f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def log_with(self, text: str) -> str:
        """The log, once it has something in it."""
        end = time.monotonic() + 20
        while text not in self.log and time.monotonic() < end:
            time.sleep(0.05)
        return self.log

    def stop(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts servers with arguments of their own."""
    started: list[Started] = []

    def begin(*arguments: object, listen: str = "127.0.0.1:0") -> Started:
        folder = tmp_path / f"server-{len(started)}"
        folder.mkdir()
        started.append(Started(folder, *arguments, listen=listen))
        return started[-1]

    yield begin
    for server in started:
        server.stop()


def refused(tmp_path: Path, *arguments: object, listen: str = "127.0.0.1:0") -> str:
    """What a server says that does not start."""
    result = subprocess.run(
        [*_serve(tmp_path, listen), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2, result.stderr
    assert not (tmp_path / "data").exists(), "it began before it looked"
    return result.stderr
