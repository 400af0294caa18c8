"""Python programs as forks of one process that has imported what they import, which takes a core two seconds.

`Popen` is that of `subprocess` as far as tests and `LocalCluster` use it, for commands such as
[sys.executable, "-m", "ps", "serve"]. What has to be there when an interpreter starts cannot be had by a fork:
with another LD_PRELOAD or PYTHONPATH a program is started as usual.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from subprocess import PIPE, STDOUT, TimeoutExpired
from typing import IO, Any

__all__ = ["PIPE", "STDOUT", "Fork", "Popen", "Process", "TimeoutExpired"]

_ROOT = Path(__file__).parent.parent
_MAX_BYTES = 1 << 17
_LONGEST_POLL_SECONDS = 0.05


def _at_start(env: Mapping[str, str]) -> tuple[str, set[str]]:
    """What counts only when an interpreter starts."""
    return env.get("LD_PRELOAD", ""), {*env.get("PYTHONPATH", "").split(os.pathsep)} - {"", str(_ROOT)}


_STARTED_WITH = _at_start(os.environ)


def Popen(command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any) -> "Process":
    env = dict(os.environ if env is None else env)
    if list(command[:2]) == [sys.executable, "-m"] and _at_start(env) == _STARTED_WITH:
        return Fork(command, env, **options)
    return subprocess.Popen(command, env=env, **options)


class Fork:
    """A process, as `subprocess.Popen` has it. command: ["python", "-m", module, *arguments]."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        cwd: str | os.PathLike[str] = ".",
        stdin: int | None = None,
        stdout: "int | IO[Any] | None" = None,
        stderr: "int | IO[Any] | None" = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        self.args = command
        self.returncode: int | None = None
        self.stdin: IO[Any] | None = None
        self.stdout: IO[Any] | None = None
        self._lock = threading.Lock()
        theirs, close = [], []
        if stdin == PIPE:
            there, here = os.pipe()
            self.stdin = os.fdopen(here, "wb", 0)
            close.append(there)
            theirs.append(there)
        else:
            close.append(os.open(os.devnull, os.O_RDONLY))
            theirs.append(close[-1])
        if stdout == PIPE:
            here, there = os.pipe()
            self.stdout = os.fdopen(here) if text else os.fdopen(here, "rb", 0)
            close.append(there)
            theirs.append(there)
        else:
            theirs.append(1 if stdout is None else _number(stdout))
        theirs.append(2 if stderr is None else theirs[1] if stderr == STDOUT else _number(stderr))
        what = {"command": list(command[2:]), "env": dict(env), "cwd": os.path.abspath(cwd), "own": start_new_session}
        self.pid = int(_parent().ask(what, theirs))
        for number in close:
            os.close(number)

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                self.returncode = _parent().ask({"status": self.pid})
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        pause = 0.001
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                assert timeout is not None
                raise TimeoutExpired(self.args, timeout)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[Any, None]:
        end = None if timeout is None else time.monotonic() + timeout
        said: list[Any] = []
        assert self.stdout is not None
        reader = threading.Thread(target=lambda: said.append(self.stdout.read()), daemon=True)  # type: ignore[union-attr]
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            assert timeout is not None
            raise TimeoutExpired(self.args, timeout)
        self.wait(None if end is None else max(1.0, end - time.monotonic()))
        return said[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _path() -> str:
    return os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))


Process = Fork | subprocess.Popen[Any]


def _number(file: "int | IO[Any]") -> int:
    return file if isinstance(file, int) else file.fileno()


class _Parent:
    """The process whose forks they are, as this one sees it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
                cwd=_ROOT,
                pass_fds=[theirs.fileno()],
                # Threads are not forked, not even those that numpy starts when it is imported.
                env={**os.environ, "PYTHONPATH": _path(), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                # Ctrl-C is for the tests.
                start_new_session=True,
            )
        atexit.register(self.close)

    def ask(self, what: object, files: Sequence[int] = ()) -> Any:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(what).encode()], files)
            answer = self._socket.recv(_MAX_BYTES)
        assert answer, "the process whose forks the tests use has ended"
        return json.loads(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@cache
def _parent() -> _Parent:
    return _Parent()


# ---------------------------------------------------------------- in the other process


def _serve(number: int) -> Callable[[], None]:
    """Forks until nobody can ask for it any more; in a fork, returns what it is to run."""
    statuses: dict[int, int] = {}

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                statuses[found[0]] = os.waitstatus_to_exitcode(found[1])

    signal.signal(signal.SIGCHLD, reap)
    requests = socket.socket(fileno=number)
    while True:
        message, files, _, _ = socket.recv_fds(requests, _MAX_BYTES, 3)
        if not message:
            os._exit(0)
        what = json.loads(message)
        if "status" in what:
            requests.send(json.dumps(statuses.pop(what["status"], None)).encode())
        elif pid := os.fork():
            for file in files:
                os.close(file)
            requests.send(json.dumps(pid).encode())
        else:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            return _program(what, files)


def _program(what: Mapping[str, Any], files: Sequence[int]) -> Callable[[], None]:
    if what["own"]:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(what["env"])
    os.chdir(what["cwd"])
    module, *arguments = what["command"]
    sys.argv = [module, *arguments]
    return lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)


def _main() -> None:
    import torch

    import trainer.app.loop  # noqa: F401

    # The first optimizer loads more of torch.
    torch.optim.SGD([torch.zeros(1)])
    assert len(os.listdir("/proc/self/task")) == 1
    gc.collect()
    gc.freeze()
    _serve(int(sys.argv[1]))()


if __name__ == "__main__":
    _main()
