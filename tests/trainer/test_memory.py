"""The whole model is never in the trainer's memory."""

from ps import LocalCluster
from tests.ranks import run_ranks


def test_peak_memory_is_near_that_of_the_largest_submodule(cluster: LocalCluster, job_name: str) -> None:
    small, large = (
        run_ranks(
            "trainer.runs:peak_memory",
            cluster.addresses,
            1,
            timeout=110,
            job=f"{job_name}-{layers}",
            layers=layers,
            width=2048,
        )[0]
        for layers in (16, 48)
    )
    assert large["model"] == 48 * large["largest"]
    # What a trainer takes beyond its modules (gradients on their way, gRPC's buffers, holes in malloc's
    # heap) does not depend on the model; its layers are 16 MiB each.
    assert large["beyond"] - small["beyond"] < (large["model"] - small["model"]) / 6
    assert large["beyond"] < large["model"]
    # Two layers may be whole at a time: the model is 24 times as large as what the trainer holds.
    assert large["largest"] <= large["live"] <= large["reported"] <= large["limit"]
