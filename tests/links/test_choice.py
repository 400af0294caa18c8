"""Which link comes of what a trainer offers and a server allows, and who is told why."""

import pytest

import trainer
from protos import zero_ps_pb2 as pb
from protos.links import KINDS, parse_kinds
from ps import LocalCluster
from ps.errors import Conflict
from ps.links import Links


def reasons(chosen) -> dict[str, str]:
    return {reason.kind: reason.reason for reason in chosen.not_chosen}


def test_a_trainer_that_offers_nothing_gets_grpc() -> None:
    chosen = Links().choose([])
    assert chosen.link.kind == "grpc"
    assert set(reasons(chosen)) == set(KINDS) - {"grpc"}


def test_kinds_that_the_server_does_not_allow_are_not_chosen() -> None:
    chosen = Links(("grpc",)).choose([pb.LinkOffer(kind=kind) for kind in KINDS])
    assert chosen.link.kind == "grpc"
    assert "--links" in reasons(chosen)["shm"]


def test_the_trainers_own_reason_is_kept() -> None:
    chosen = Links().choose([pb.LinkOffer(kind="shm", reason="no such memory here"), pb.LinkOffer(kind="grpc")])
    assert chosen.link.kind == "grpc"
    assert "no such memory here" in reasons(chosen)["shm"]


def test_nothing_in_common_is_an_error_with_every_reason() -> None:
    with pytest.raises(Conflict) as error:
        Links(("grpc",)).choose([pb.LinkOffer(kind="grpc", reason="the trainer does not allow it")])
    assert "grpc: the trainer does not allow it" in str(error.value) and "shm: the server" in str(error.value)


@pytest.mark.parametrize("text", ["", "tcp", "grpc,tcp"])
def test_kinds_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"shm, nccl, gloo, grpc"):
        parse_kinds(text.split(",") if text else ())


@pytest.mark.parametrize(
    ("links", "message"),
    [
        (["tcp"], r"links=\['tcp'\]: 'tcp' is no kind of link; name one or more of shm, nccl, gloo, grpc"),
        ([1], "1 is no kind of link"),
        ([], "no kind of link is named"),
        (3, "links has to be a list of kinds, of shm, nccl, gloo, grpc, not 3"),
    ],
)
def test_links_that_cannot_be_are_refused_before_anybody_is_asked(links: object, message: str) -> None:
    with pytest.raises(trainer.ConfigError, match=message):
        trainer.connect("127.0.0.1:1", links=links)


def test_kinds_may_stand_apart() -> None:
    assert parse_kinds(["grpc", " shm"]) == ("shm", "grpc")


def test_the_trainer_and_the_status_say_which_link_is_in_use_and_why(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name, links=["grpc"]) as job:
        assert [link.kind for link in job.links] == ["grpc", "grpc"]
        assert "the trainer does not allow it" in job.links[0].not_chosen["shm"]
        found = {job.name: job for job in job.servers[0].describe(10).jobs}[job_name]
        assert found.sessions[0].link == "grpc"
        assert {each.kind: each.reason for each in found.sessions[0].not_chosen} == dict(job.links[0].not_chosen)
