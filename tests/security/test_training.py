"""Training with everything closed: the same bits, over the links that are allowed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import trainer
from ps import LocalCluster
from ps.tools.certs import make_certs
from tests.models import Residual, batch, loss_of, seeded
from tests.ranks import run_ranks
from tests.security.conftest import ROOT, Files
from tests.trainer.recovery.programs import Plain
from tests.trainer.runs import adamw, gathered_values

STEPS = 3


def train(addresses: list[str], job: str, credentials: trainer.Credentials, links: list[str] | None = None):
    """The parameters after some steps and a commit, and the links."""
    with trainer.connect(addresses, job=job, credentials=credentials, links=links) as connection:
        model = seeded(Residual)
        trainer.offload(model, connection)
        optimizer = adamw(model.parameters())
        for step in range(STEPS):
            loss_of(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        connection.commit()
        return gathered_values(model), connection.links


def check_same(values: dict[str, torch.Tensor]) -> None:
    plain = seeded(Residual)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    for step in range(STEPS):
        loss_of(plain, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in plain.named_parameters():
        assert torch.equal(values[name], value), name


def test_training_with_certificates_and_tokens_on_two_servers(
    secured: LocalCluster, files: Files, job_name: str
) -> None:
    job_name = f"open-{job_name}"
    values, links = train(secured.addresses, job_name, files.credentials())
    check_same(values)
    for link in links:
        assert link.kind == "grpc"
        for kind in ("shm", "nccl", "gloo"):
            assert link.not_chosen[kind] == "the server keeps bytes within TLS (zero-ps serve --plaintext-links)"
    # Another one may go on with it, and one that may only read may read it and no more.
    with trainer.connect(secured.addresses, job=job_name, credentials=files.credentials("admin")) as job:
        assert job.step == STEPS
    reader = files.credentials("reader")
    with pytest.raises(trainer.AccessDenied, match="takes the right 'train' on job 'open-"):
        trainer.connect(secured.addresses, job=job_name, credentials=reader)
    with trainer.connect(secured.addresses, job=job_name, credentials=reader, read_only=True) as job:
        model = seeded(Residual)
        trainer.offload(model, job)
        assert torch.equal(gathered_values(model)["head.weight"], values["head.weight"])


def test_several_trainers_with_credentials_from_the_environment(
    secured: LocalCluster, files: Files, job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in files.environment().items():
        monkeypatch.setenv(name, value)
    plain = Plain(lambda step: 2).train_to(STEPS)
    for result in run_ranks("trainer.runs:steps_of_adamw", secured.addresses, 2, job=job_name, steps=STEPS):
        plain.check(result["params"])


def test_a_trainer_recovers_from_a_lost_server_with_its_credentials(
    trusting: LocalCluster, files: Files, job_name: str
) -> None:
    disturbances = [lambda: trusting.restart(1)]
    with trainer.connect(trusting.addresses, job=job_name, credentials=files.credentials(), timeout=60) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = adamw(model.parameters())
        job.commit()
        while job.step < STEPS:
            with job.recovering(timeout=60):
                loss_of(model, batch(job.step)).backward()
                if job.step == 1 and disturbances:
                    disturbances.pop()()
                optimizer.step()
                optimizer.zero_grad()
        check_same(gathered_values(model))
    assert not disturbances


def test_a_link_that_is_not_encrypted_is_not_to_be_had_by_asking_for_it(
    secured: LocalCluster, files: Files, job_name: str
) -> None:
    with pytest.raises(trainer.RequestRefused, match="no link that both can use.*keeps bytes within TLS"):
        trainer.connect(secured.addresses, job=job_name, credentials=files.credentials(), links=["shm", "gloo"])


@pytest.fixture(scope="module")
def trusting(files: Files) -> Iterator[LocalCluster]:
    """Servers with TLS in a network that is trusted."""
    with LocalCluster(2, tls=files.folder, tokens=files.tokens, plaintext_links=True) as cluster:
        yield cluster


@pytest.mark.parametrize("link", ["shm", "gloo"])
def test_plain_links_beside_tls_where_they_are_allowed(
    trusting: LocalCluster, files: Files, job_name: str, link: str
) -> None:
    values, links = train(trusting.addresses, job_name, files.credentials(), None if link == "shm" else [link])
    check_same(values)
    assert [each.kind for each in links] == [link, link]


def test_the_folder_that_the_command_makes_is_all_it_takes(secured: LocalCluster, tmp_path: Path) -> None:
    """And it holds its secrets close, and overwrites nothing."""
    out = tmp_path / "new" / "security"

    def certs(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ps", "certs", str(out), *map(str, arguments)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            umask=0,
        )

    made = certs("--host", "ps0.example", "--host", "10.1.2.3", "--days", "2")
    assert made.returncode == 0, made.stderr
    modes = {path.name: path.stat().st_mode & 0o777 for path in (out, *out.iterdir())}
    assert modes.pop("security") == 0o700
    assert {name for name, mode in modes.items() if mode != 0o600} == {"ca.crt", "server.crt", "client.crt"}
    secrets = [(out / f"{right}.token").read_text().strip() for right in ("read", "train", "admin")]
    assert not [secret for secret in secrets if secret in made.stdout + made.stderr]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = certs()
    assert again.returncode == 2 and "nothing in it is overwritten" in again.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    text = subprocess.run(
        ["openssl", "x509", "-in", out / "server.crt", "-noout", "-ext", "subjectAltName"],
        check=False,
        capture_output=True,
        text=True,
    ).stdout
    if text:
        assert "DNS:ps0.example, IP Address:10.1.2.3, DNS:localhost, IP Address:127.0.0.1" in text


@pytest.mark.parametrize("host", ["ps 0", "", "a/b", "ps0:7070", "-", "ps0..example"])
def test_certificates_are_for_hosts(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match="is no name and no address of a host"):
        make_certs(tmp_path / "out", [host], timedelta(days=1))
    assert not (tmp_path / "out").exists()
