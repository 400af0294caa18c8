"""`zero-ps serve --compress`: commits are compressed, whatever memory holds."""

import pytest
import torch

from ps import LocalCluster
from ps.cli import main
from ps.tools.verification import verify
from tests.ps.client import Client, start_job


@pytest.mark.parametrize("memory", [None, "4MiB"], ids=["in memory", "spilled"])
def test_a_server_commits_compressed_and_goes_on_from_it(tmp_path, memory):
    """Weights that are mostly zeros take little room; state is left as it is."""
    parameters = {f"w{number}": torch.full((256, 256), float(number)) for number in range(24)}
    with LocalCluster(1, data_dir=tmp_path, memory=memory, compress="weight=zstd") as cluster:
        (client,) = start_job(cluster.addresses[0], parameters, "SGD", lr=1.0, momentum=0.5)
        for step in range(2):
            for number in range(len(parameters)):
                client.push_gradient(number, torch.ones(256, 256), step=step)
            client.step(step)
            client.call("ZeroGrad", step=step + 1)
        client.call("Commit", step=2, timeout_seconds=60)
        assert verify(cluster.disks[0]).ok
        generation = cluster.data_dirs[0] / "job/generations/00000002"
        assert (generation / "weight/w3/c/0/0").stat().st_size < 1000
        assert (generation / "momentum_buffer/w3/c/0/0").stat().st_size == 256 * 256 * 4
        cluster.restart(0)
        again = Client(cluster.addresses[0])
        again.call("Restore", step=2)
        again.open_job(parameters)
        again.set_optimizer("SGD", lr=1.0, momentum=0.5)
        for number in range(len(parameters)):
            again.push_gradient(number, torch.ones(256, 256), step=2)
        again.step(2)
        for number, weight in enumerate(parameters.values()):
            assert torch.equal(again.pull(number, version=3), weight - 1 - 1.5 - 1.75)


@pytest.mark.parametrize("wrong", ["weight", "weight=lz77", "gradient=zstd", "weight=zstd,weight=zstd", ""])
def test_what_cannot_be_compressed_is_refused(capsys, tmp_path, wrong):
    with pytest.raises(SystemExit) as left:
        main(["serve", "--data-dir", str(tmp_path), "--compress", wrong])
    assert left.value.code == 2
    assert "--compress" in capsys.readouterr().err
