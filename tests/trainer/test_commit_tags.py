"""Servers with several data folders, and commits that a tag keeps, seen from a trainer."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from ps.cli import main
from tests.models import Residual, seeded, train
from tests.trainer.runs import gathered_values

LARGE = {"vocabulary": 3001, "width": 700, "layers": 1}


def large() -> torch.nn.Module:
    return Residual(**LARGE)


def run(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(arguments)
    return status, out.getvalue()


def test_two_servers_with_two_disks_each_and_tags(tmp_path: Path) -> None:
    plain = seeded(large)
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True), range(8))
    losses: list[float] = []

    def steps(which: range, tags: dict[int, str]) -> None:
        nonlocal model
        with trainer.connect(cluster.addresses, job="gpt") as job:
            assert job.step == which.start
            with job.init():
                model = seeded(large, seed=which.start)
            trainer.offload(model, job)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
            for step in which:
                losses.extend(train(model, optimizer, [step]))
                job.commit(tag=tags.get(job.step), wait=job.step % 2 == 0)

    def restart() -> None:
        for server in range(2):
            cluster.kill(server)
            cluster.restart(server)

    model: torch.nn.Module
    roots = [tmp_path / "nvme0", tmp_path / "nvme1"]
    with LocalCluster(servers=2, data_dir=roots, keep=1) as cluster:
        folders = [str(folder) for disks in cluster.disks for folder in disks]
        steps(range(4), {1: "first", 2: "best", 3: "best"})
        addresses = ",".join(cluster.addresses)
        status, shown = run("status", addresses)
        assert status == 0 and shown.count(" 1(first),3(best),4 ") == 2
        assert run("verify", *folders)[0] == 0
        restart()
        steps(range(4, 6), {})
        assert run("status", addresses)[1].count(" 1(first),3(best),5,6 ") == 2
        status, said = run("untag", "best", *folders, "--job", "gpt")
        assert status == 0 and said.count("has lost the tag 'best'") == 2
        assert run("untag", "best", *folders, "--job", "gpt") == (
            1, "zero-ps untag: no commit of job 'gpt' in these folders has the tag 'best'\n",
        )  # fmt: skip
        restart()
        steps(range(6, 8), {})
        assert run("status", addresses)[1].count(" 1(first),7,8 ") == 2
        # Everything newer than what is tagged is gone on one server: the tagged one is what both have.
        for folder in cluster.disks[0]:
            for step in (7, 8):
                (folder / f"gpt/generations/{step:08d}").rename(folder / f"gone-{step}")
        restart()
        with trainer.connect(cluster.addresses, job="gpt") as job:
            assert job.step == 1
    assert losses == expected


def test_a_tag_has_to_be_a_name(cluster: LocalCluster, job_name: str) -> None:
    with trainer.connect(cluster.addresses, job=job_name) as job:
        model = trainer.offload(seeded(Residual), job)
        with pytest.raises(trainer.ConfigError, match="tag 'a/b' is not valid"):
            job.commit(tag="a/b")
        job.commit()
        job.commit(tag="kept")
        assert gathered_values(model)
        listed = Path(cluster.data_dirs[0]) / job_name / "generations/00000000/tag-kept"
        assert listed.exists()


@pytest.mark.parametrize("arguments", [["untag", "a/b", "{}"], ["untag", "best", "{}/nothing"]])
def test_untag_says_what_is_wrong(cluster: LocalCluster, arguments: list[str]) -> None:
    status, said = run(*(argument.format(cluster.data_dirs[0]) for argument in arguments))
    assert status == 2 and said.startswith("zero-ps untag: ")
