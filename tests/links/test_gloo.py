"""The gloo link does what every link does, and what only it can get wrong."""

import grpc
import pytest

import trainer
from protos import gloo_pair, pair
from protos import zero_ps_pb2 as pb
from protos.zero_ps_pb2_grpc import ParameterServerStub
from ps import LocalCluster
from ps.links import Links
from tests.links.conformance import LinkConformance


class TestGlooLink(LinkConformance):
    kind = "gloo"
    lends = True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "nothing"}, "no 'nothing' link"),
        ({"kind": "grpc"}, "a grpc link needs no preparation"),
        ({"token": "t"}, "has 32 of the characters 0-9 and a-f"),
        ({"address": b""}, "needs the address of the trainer's end"),
        ({"address": bytes(pair.MAX_ADDRESS_BYTES + 1)}, "needs the address of the trainer's end"),
        ({"host": ""}, "and the server's host"),
        ({"host": "no.such.host.invalid"}, "cannot make its end of a gloo link at 'no.such.host.invalid'"),
    ],
)
def test_a_link_that_cannot_be_prepared_is_refused(
    cluster: LocalCluster, fields: dict[str, object], message: str
) -> None:
    good = {"kind": "gloo", "token": "0" * 32, "host": "127.0.0.1", "address": b"x"}
    request = pb.PrepareLinkRequest(**{**good, **fields})
    with grpc.insecure_channel(cluster.addresses[0]) as channel, pytest.raises(grpc.RpcError, match=message) as error:
        ParameterServerStub(channel).PrepareLink(request, timeout=20)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_an_offer_that_nobody_prepared_gets_the_next_best_link() -> None:
    links = Links(["gloo", "grpc"])
    chosen = links.choose([pb.LinkOffer(kind="gloo", token="x"), pb.LinkOffer(kind="grpc")])
    links.close()
    assert chosen.link.kind == "grpc"
    assert any("did not prepare it" in reason.reason for reason in chosen.not_chosen)


def test_without_a_way_to_the_server_the_link_is_grpc_and_says_why(
    cluster: LocalCluster, job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(host: str, port: int) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(gloo_pair, "local_address", fails)
    with trainer.connect(cluster.addresses, job=job_name, links=["gloo", "grpc"]) as job:
        assert all(link.kind == "grpc" for link in job.links)
        assert "no way to the server at '127.0.0.1': Network is unreachable" in job.links[0].not_chosen["gloo"]


def test_a_server_says_where_it_is_reached_if_that_is_not_where_calls_go(job_name: str) -> None:
    with (
        LocalCluster(1, flags=["--advertise", "localhost"]) as cluster,
        trainer.connect(cluster.addresses, job=job_name, links=["gloo"]) as job,
    ):
        assert {link.kind: link.address for link in job.servers[0].links}["gloo"] == "localhost"
    with (
        LocalCluster(1, flags=["--advertise", "no.such.host.invalid"]) as cluster,
        trainer.connect(cluster.addresses, job=job_name, links=["gloo", "grpc"]) as job,
    ):
        assert "no way to the server at 'no.such.host.invalid'" in job.links[0].not_chosen["gloo"]
