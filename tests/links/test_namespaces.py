"""Servers and trainers on different hosts, as far as one machine can be several: in network namespaces."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.models import Residual, batch, loss_of, seeded

_ROOT = Path(__file__).resolve().parents[2]
V4, V6 = "10.213.7.1", "fd00:213:7::1"
PORT = 7070
TIMEOUT = 300.0


@dataclass
class Hosts:
    """Two hosts with a cable between them. server, trainer: the names of their namespaces."""

    server: str
    trainer: str
    cable: str

    def run(self, host: str, *command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
        )

    def start(self, function: str, result: Path, **arguments: object) -> "subprocess.Popen[str]":
        """A trainer that calls a function of `tests.links.across`."""
        call = json.dumps(arguments)
        return self.run(
            self.trainer, sys.executable, "-m", "tests.ranks", f"links.across:{function}", call, str(result)
        )

    def set_cable(self, state: str) -> None:
        _ip("-n", self.server, "link", "set", self.cable, state)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and the 'ip' command")
    hosts = Hosts(f"zps-s{os.getpid()}", f"zps-t{os.getpid()}", "cable")
    try:
        for host in (hosts.server, hosts.trainer):
            _ip("netns", "add", host)
        _ip(
            "link",
            "add",
            "cable",
            "netns",
            hosts.server,
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            hosts.trainer,
        )
        for host, last in ((hosts.server, 1), (hosts.trainer, 2)):
            _ip("-n", host, "addr", "add", f"10.213.7.{last}/24", "dev", "cable")
            _ip("-n", host, "addr", "add", f"fd00:213:7::{last}/64", "dev", "cable", "nodad")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", "cable", "up")
    except subprocess.CalledProcessError as error:
        _remove(hosts)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield hosts
    _remove(hosts)


def _remove(hosts: Hosts) -> None:
    for host in (hosts.server, hosts.trainer):
        subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


@pytest.fixture(scope="module")
def server(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """It outlives cuts of the cable."""
    folder = tmp_path_factory.mktemp("data")
    process = hosts.run(
        hosts.server,
        *(sys.executable, "-m", "ps", "serve", "--shard", "0/1", "--data-dir", str(folder)),
        *("--listen", f"[::]:{PORT}", "--insecure", "--stop-on-stdin-eof", "--lease", "3"),
    )
    yield
    process.communicate(timeout=30)


@pytest.mark.parametrize("address", [f"{V4}:{PORT}", f"[{V6}]:{PORT}"], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("links", [None, ["grpc"]], ids=["best link", "grpc"])
def test_training_across_hosts_gives_the_bits_of_plain_torch(
    hosts: Hosts, server: None, tmp_path: Path, job_name: str, address: str, links: list[str] | None
) -> None:
    trainer = hosts.start("train", tmp_path / "result.pt", addresses=[address], job=job_name, links=links)
    output, _ = trainer.communicate(timeout=90)
    assert trainer.returncode == 0, output
    result = torch.load(tmp_path / "result.pt")
    assert result["links"] == (links or ["gloo"])
    plain = seeded(Residual)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    for step in range(3):
        loss_of(plain, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in plain.named_parameters():
        assert torch.equal(result["params"][name], value), name


def test_gloo_listens_where_the_server_says_that_it_is_reached(hosts: Hosts, tmp_path: Path, job_name: str) -> None:
    """--listen is where calls arrive, --advertise where links do: here another address of the same host. One that is
    no address of it is the reason for another link."""
    for advertised, port, expected in ((V6, PORT + 1, "gloo"), ("10.213.7.9", PORT + 2, "grpc")):
        process = hosts.run(
            hosts.server,
            *(sys.executable, "-m", "ps", "serve", "--data-dir", str(tmp_path / f"data-{port}"), "--insecure"),
            *("--listen", f"{V4}:{port}", "--advertise", advertised, "--stop-on-stdin-eof"),
        )
        try:
            trainer = hosts.start(
                "listening", tmp_path / f"{port}.pt", addresses=[f"{V4}:{port}"], job=job_name, links=["gloo", "grpc"]
            )
            output, _ = trainer.communicate(timeout=90)
            assert trainer.returncode == 0, output
        finally:
            said, _ = process.communicate(timeout=60)
        result = torch.load(tmp_path / f"{port}.pt")
        assert result["link"] == expected, (result, said)
        if expected == "gloo":
            assert V6 in result["peers"]
        else:
            assert f"cannot make its end of a gloo link at '{advertised}'" in result["not_chosen"]["gloo"]


@pytest.mark.parametrize("link", ["gloo", "grpc"])
def test_a_cut_cable_is_an_error_on_the_scale_of_a_lease(
    hosts: Hosts, server: None, tmp_path: Path, job_name: str, link: str
) -> None:
    trainer = hosts.start(
        "train_until_the_cable_is_cut",
        tmp_path / "result.pt",
        addresses=[f"{V4}:{PORT}"],
        job=job_name,
        links=[link],
        timeout=TIMEOUT,
    )
    assert trainer.stdout is not None
    lines = []
    while (line := trainer.stdout.readline()) != "training\n":
        lines.append(line)
        assert line, "".join(lines)
    hosts.set_cable("down")
    try:
        output, _ = trainer.communicate(timeout=90)
    finally:
        hosts.set_cable("up")
    assert trainer.returncode == 0, output
    result = torch.load(tmp_path / "result.pt")
    assert result["error"].split(":")[0] in ("ServerLost", "SessionLost", "ConnectError"), result
    # Pings notice it, long before the call's own deadline.
    assert result["seconds"] < 40, result
