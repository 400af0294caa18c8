"""Servers as child processes, for tests, notebooks and the demo."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_START_SECONDS = 60.0
_STOP_SECONDS = 120.0


class LocalCluster:
    """Parameter servers on this machine, one process each, on ports that the system chooses.

    They end with this object, and with this process however it ends.

    servers: how many; server i holds shard i.
    data_dir: folder for their data, one subfolder each; None for a temporary one, removed at the end. With several
        folders, on several disks, each server has a subfolder of each.
    memory: each server's limit in bytes, or as in '8GiB'; what does not fit goes to data_dir. threads: of each
        server's updates.
    lease: seconds after which a silent trainer counts as lost. keep: committed generations to keep.
    compress: of commits, by kind of array, as in "weight=zstd,state=zstd"; None for nothing.
    eviction: what leaves memory first where it is limited, "plan" (the default) or, to compare, "lru".
    links: kinds of link that trainers may use; None for all. device: each server's GPU for nccl links, as in 'cuda:0'.
    tls: a folder as `zero-ps certs` makes it; servers then speak TLS and ask clients for a certificate.
    tokens: a file of tokens and rights. plaintext_links: allows links beside TLS whose bytes are not encrypted.
    flags: further ones of `zero-ps serve`.

    Raises RuntimeError, with what the server said, if one does not start.
    """

    def __init__(
        self,
        servers: int = 2,
        *,
        data_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
        lease: float | None = None,
        keep: int | None = None,
        eviction: str | None = None,
        compress: str | None = None,
        links: Sequence[str] | None = None,
        device: str | None = None,
        tls: str | os.PathLike[str] | None = None,
        tokens: str | os.PathLike[str] | None = None,
        plaintext_links: bool = False,
        flags: Sequence[str] = (),
    ) -> None:
        if servers < 1:
            raise ValueError(f"a cluster has at least one server, not {servers}")
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if data_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="zero-ps-")
            data_dir = self._temporary.name
        if isinstance(data_dir, (str, os.PathLike)):
            data_dir = [data_dir]
        roots = [Path(root).absolute() for root in data_dir]
        self._options = [
            *_option("--memory", memory),
            *_option("--threads", threads),
            *_option("--lease", lease),
            *_option("--keep", keep),
            *_option("--eviction", eviction),
            *_option("--compress", compress),
            *_option("--links", None if links is None else ",".join(links)),
            *_option("--device", device),
            *_option("--tls-cert", tls and Path(tls, "server.crt")),
            *_option("--tls-key", tls and Path(tls, "server.key")),
            *_option("--tls-ca", tls and Path(tls, "ca.crt")),
            *_option("--tokens", tokens),
            *(["--plaintext-links"] if plaintext_links else []),
            *flags,
        ]
        self._logs = tempfile.TemporaryDirectory(prefix="zero-ps-logs-")
        # Of each server all its folders, and the first of them.
        self.disks = [[root / f"shard-{i}" for root in roots] for i in range(servers)]
        self.data_dirs = [folders[0] for folders in self.disks]
        self.addresses = ["127.0.0.1:0"] * servers
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * servers
        try:
            self._start(range(servers))
        except BaseException:
            self.close()
            raise

    def pid(self, server: int) -> int:
        """The process id of a server. Raises RuntimeError if it is not running."""
        process = self._processes[server]
        if process is None:
            raise RuntimeError(f"server {server} is not running")
        return process.pid

    def log(self, server: int) -> str:
        """What a server has written to stderr."""
        path = self._log_path(server)
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self, server: int) -> None:
        """Ends a server at once, as a crash would."""
        process = self._processes[server]
        if process is not None:
            process.kill()
            self._reap(server)

    def stop(self, *servers: int) -> None:
        """Asks servers to leave, all at once, and waits until they did. They commit what is at a step boundary."""
        for server in servers:
            if (process := self._processes[server]) is not None:
                process.terminate()
        for server in servers:
            self._reap(server)

    def restart(self, server: int) -> None:
        """Starts a server again on its address and folder; kills it first if it is running."""
        self.kill(server)
        self._start([server])

    def close(self) -> None:
        """Ends all servers; removes the data folder if it is a temporary one."""
        for process in self._processes:
            if process is not None and self._temporary is not None:
                # Nobody could use what they would commit.
                process.kill()
            elif process is not None:
                process.terminate()
        for server in range(len(self._processes)):
            self._reap(server)
        self._logs.cleanup()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _log_path(self, server: int) -> Path:
        return Path(self._logs.name) / f"server-{server}.log"

    def _start(self, servers: Sequence[int]) -> None:
        """Starts servers side by side and waits until all of them listen."""
        for server in servers:
            with self._log_path(server).open("ab") as log:
                self._processes[server] = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "ps", "serve", "--stop-on-stdin-eof"),
                        *("--shard", f"{server}/{len(self.addresses)}"),
                        *(part for folder in self.disks[server] for part in ("--data-dir", str(folder))),
                        *("--listen", self.addresses[server]),
                        *self._options,
                    ],
                    # Held open until this process ends, by which the server notices.
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=_environment(),
                    # Ctrl-C is for this process, which then ends its servers in order.
                    start_new_session=True,
                )
        end = time.monotonic() + _START_SECONDS
        for server in servers:
            self.addresses[server] = self._wait_until_ready(server, end)

    def _wait_until_ready(self, server: int, end: float) -> str:
        process = self._processes[server]
        assert process is not None and process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            received = os.read(process.stdout.fileno(), 4096) if readable else b""
            if not received:
                why = "ended" if readable else f"was not ready after {_START_SECONDS:g} s"
                self.kill(server)
                raise RuntimeError(f"server {server} {why}: {self.log(server).strip() or 'it said nothing'}")
            line += received
        return str(json.loads(line)["listening"])

    def _reap(self, server: int) -> None:
        process = self._processes[server]
        if process is None:
            return
        self._processes[server] = None
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        process.stdout.close()


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [name, str(value)]


def _environment() -> dict[str, str]:
    """The environment, in which the children find this very package wherever it was imported from."""
    here = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{inherited}" if inherited else here}
