"""DeepSpeed's ZeRO-3 with parameters and optimizer on the CPU or on NVMe. Runs where DeepSpeed is installed."""

import tempfile
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_set_full_fp32_param

from benchmarks.sides.phases import Phases
from benchmarks.sides.side import serve
from benchmarks.workload import LEARNING_RATE, Batches, Workload


class Zero3:
    """options: device, `cpu` or `nvme`; folder, for the latter."""

    def __init__(self, work: Workload, batches: Batches) -> None:
        self._engine: Any
        model = work.model()
        with tempfile.TemporaryDirectory(prefix="zero-ps-initial-") as folder:
            for number, weight in enumerate(model.parameters()):
                torch.save(weight.detach().clone(), f"{folder}/{number}.pt")
            self._engine, *_ = deepspeed.initialize(model=model, config=_config(work))
            # It has rounded them to bf16, on which updates that are small against a weight get lost at first.
            for number, weight in enumerate(self._engine.module.parameters()):
                safe_set_full_fp32_param(weight, torch.load(f"{folder}/{number}.pt"))
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
