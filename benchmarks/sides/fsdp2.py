"""FSDP2 (`fully_shard`): parameters, gradients and optimizer sharded over the trainers, in their memory."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.sides.phases import Phases
from benchmarks.sides.side import serve
from benchmarks.workload import LEARNING_RATE, Batches, Workload


class Fsdp2:
    """fp32 masters, bf16 compute, gradients reduced in bf16: what the other sides do."""

    def __init__(self, work: Workload, batches: Batches) -> None:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (work.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        model = work.model()
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self._model = model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        self._batches = batches
        self._phases = Phases()

    def step(self, index: int) -> float:
        x, y = self._batches.at(index)
        with self._phases("forward"):
            loss: torch.Tensor = self._model(x, y)
        with self._phases("backward"):
            torch.autograd.backward(loss)
        with self._phases("update"):
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.item()

    def moved(self) -> dict[str, int]:
        return {}

    def spent(self) -> dict[str, float]:
        return self._phases.seconds


if __name__ == "__main__":
    serve(Fsdp2)
