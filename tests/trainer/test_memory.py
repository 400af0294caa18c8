"""The whole model is never in the trainer's memory."""

from ps import LocalCluster
from tests.ranks import run_ranks


def test_peak_memory_is_near_that_of_the_largest_submodule(cluster: LocalCluster, job_name: str) -> None:
    # 24 layers of 16 MiB: more than eight times what the trainer holds at once.
    memory = run_ranks(
        "trainer.runs:peak_memory", cluster.addresses, 1, timeout=110, job=job_name, layers=24, width=2048
    )[0]
    assert memory["model"] == 24 * memory["largest"]
    # A layer, its gradient, what is on its way to the servers (64 MiB at most), and gRPC's buffers.
    assert memory["beyond"] < memory["model"] / 2
