"""DeepSpeed's ZeRO-3 with parameters and optimizer on the CPU or on NVMe. Runs where DeepSpeed is installed."""

from typing import Any

import deepspeed

from benchmarks.sides.phases import Phases
from benchmarks.sides.side import serve
from benchmarks.workload import LEARNING_RATE, Batches, Workload


class Zero3:
    """options: device, `cpu` or `nvme`; folder, for the latter."""

    def __init__(self, work: Workload, batches: Batches) -> None:
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=work.model(), config=_config(work))
        self._batches = batches
        self._phases = Phases()

    def step(self, index: int) -> float:
        x, y = self._batches.at(index)
        with self._phases("forward"):
            loss = self._engine(x, y)
        with self._phases("backward"):
            self._engine.backward(loss)
        with self._phases("update"):
            self._engine.step()
        return float(loss.item())

    def moved(self) -> dict[str, int]:
        return {}

    def spent(self) -> dict[str, float]:
        return self._phases.seconds


def _config(work: Workload) -> dict[str, object]:
    device = {"device": work.option("device")}
    if device["device"] == "nvme":
        device["nvme_path"] = work.option("folder")
    return {
        "train_batch_size": work.batch * work.world_size,
        "train_micro_batch_size_per_gpu": work.batch,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0.01}},
        "zero_optimization": {"stage": 3, "offload_param": device, "offload_optimizer": device},
        "steps_per_print": 1 << 30,
    }


if __name__ == "__main__":
    serve(Zero3)
