"""The nccl link: who gets one and why not, and on a GPU what every link does."""

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainer
from protos import nccl, nccl_pair
from protos import zero_ps_pb2 as pb
from ps import LocalCluster
from ps.cli import main
from ps.errors import StartError
from ps.links import Links
from ps.links.nccl import check_device
from tests.gpu import host, needs_gpu, start_servers
from tests.links import stand_in
from tests.links.conformance import LinkConformance

needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")


# ---------------------------------------------------------------- the library


def test_the_config_has_the_layout_of_nccl() -> None:
    """Of `ncclConfig_v21700` in nccl.h of NCCL 2.18, on 64 bits."""
    offsets = {name: getattr(nccl.Config, name).offset for name, *_ in nccl.Config._fields_}
    assert offsets == {
        "size": 0,
        "magic": 8,
        "version": 12,
        "blocking": 16,
        "cga_cluster_size": 20,
        "min_ctas": 24,
        "max_ctas": 28,
        "net_name": 32,
        "split_share": 40,
    }
    config = nccl.Config.not_blocking()
    assert config.size == ctypes.sizeof(nccl.Config) == 48
    assert (config.magic, config.version, config.blocking, config.net_name) == (0xCAFEBEEF, 21800, 0, None)
    undefined = ctypes.c_int(-(1 << 31)).value
    assert {config.cga_cluster_size, config.min_ctas, config.max_ctas, config.split_share} == {undefined}


def test_a_library_that_is_missing_or_another_is_an_error_that_names_it() -> None:
    with pytest.raises(OSError, match=r"NCCL cannot be used: .*libnccl.so.none"):
        nccl.Nccl("libnccl.so.none")
    with pytest.raises(OSError, match="NCCL cannot be used: .*ncclGetVersion"):
        nccl.Nccl("libc.so.6")


def test_an_invalid_use_says_what_two_processes_on_one_gpu_need() -> None:
    library = object.__new__(nccl.Nccl)
    library._library = SimpleNamespace(
        ncclGetErrorString=lambda code: b"invalid usage", ncclGetLastError=lambda handle: b"Duplicate GPU detected"
    )
    assert library.check(0, "ncclSend") == 0
    with pytest.raises(RuntimeError, match="ncclSend: invalid usage: Duplicate GPU detected; .* NCCL_HOSTID of"):
        library.check(5, "ncclSend")
    with pytest.raises(RuntimeError) as error:
        library.check(1, "ncclRecv")
    assert "NCCL_HOSTID" not in str(error.value)


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("name", ["cpu", "cuda:", "cuda:x", "0", "", "mps"])
def test_a_device_that_is_no_gpu_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["serve", "--data-dir", "x", "--device", name])
    assert exit.value.code == 2 and "name one as in cuda:0" in capsys.readouterr().err


@needs_none
def test_a_server_does_not_start_with_a_device_that_is_not_there() -> None:
    with pytest.raises(StartError, match="--device cuda:0 cannot be used: torch finds no CUDA device here"):
        check_device("cuda:0")
    with pytest.raises(RuntimeError, match="--device cuda:0 cannot be used"):
        LocalCluster(1, device="cuda:0")


def test_a_device_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "why_not", lambda: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(StartError, match="cuda:2 is not there: torch finds 2 CUDA devices"):
        check_device("cuda:2")


def test_a_server_without_a_device_says_that_it_has_none() -> None:
    chosen = Links(["nccl", "grpc"]).choose([pb.LinkOffer(kind="nccl", token="x"), pb.LinkOffer(kind="grpc")])
    assert chosen.link.kind == "grpc"
    assert {each.kind: each.reason for each in chosen.not_chosen}["nccl"] == (
        "the server has no GPU (zero-ps serve --device)"
    )


@pytest.fixture(scope="module")
def with_device() -> Iterator[LocalCluster]:
    """A server that has a GPU, as far as it knows."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in.patch(monkeypatch)
        with LocalCluster(1, device="cuda:0") as cluster:
            yield cluster


def test_a_trainer_without_a_gpu_gets_the_next_best_link_and_says_why(
    with_device: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "why_not", lambda: "torch finds no CUDA device here")
    with trainer.connect(with_device.addresses, job=job_name, links=["nccl", "gloo", "grpc"]) as job:
        assert job.links[0].kind == "gloo"
        assert "torch finds no CUDA device here" in job.links[0].not_chosen["nccl"]


def _no_communicator(*arguments: object) -> None:
    raise RuntimeError("ncclCommInitRankConfig: unhandled system error")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"version": 22703}, "the server has NCCL 22700 and this trainer 22703"),
        ({"unique_id": lambda: b"short"}, "takes two ids of 128 bytes"),
        ({}, "unhandled system error"),
    ],
)
def test_a_pair_that_cannot_be_made_leaves_gloo(
    with_device: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    stand_in.patch(monkeypatch)
    library = {"version": 22700, "unique_id": stand_in.unique_id, **wrong}
    monkeypatch.setattr(nccl, "library", lambda: SimpleNamespace(**library))
    if not wrong:
        monkeypatch.setattr(nccl_pair, "Communicator", _no_communicator)
    with trainer.connect(with_device.addresses, job=job_name, links=["nccl", "gloo", "grpc"]) as job:
        assert job.links[0].kind == "gloo"
        assert message in job.links[0].not_chosen["nccl"]


def test_what_comes_out_of_turn_is_not_taken_for_what_is_next() -> None:
    pair = object.__new__(nccl_pair.NcclPair)
    nccl_pair.Pair.__init__(pair)
    with pytest.raises(RuntimeError, match="parcel 2 was announced where parcel 0 comes next"):
        pair.receive(torch.empty(1), 2)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@needs_gpu
class TestNcclLink(LinkConformance):
    kind = "nccl"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _own_host(cls) -> Iterator[None]:
        with host("zero-ps trainer"):
            yield

    @classmethod
    def start(cls, **options: Any) -> LocalCluster:
        return start_servers(1, **options)
