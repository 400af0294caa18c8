"""A model that was built without zero-ps, trained with its parameters on servers started for the occasion.

    python examples/finetune.py

Shows: servers as child processes, `offload` of a finished model, a scheduler of torch, a commit, and reading
the result back from its zarr store with nothing but zarr.
"""

import tempfile
from pathlib import Path

import torch
import zarr
from torch import nn

import trainer
from ps import LocalCluster


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = x.pow(2).sum(dim=1, keepdim=True).sqrt()
    with tempfile.TemporaryDirectory() as folder, LocalCluster(servers=1, data_dir=folder) as cluster:
        model = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1))
        with trainer.connect(cluster.addresses, job="norms") as job:
            trainer.offload(model, job)
            optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
            for step in range(100):
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                if step % 20 == 0 or step == 99:
                    print(f"step {job.step}: loss {loss.item():.4f}")
            job.commit({"note": "from examples/finetune.py"})
            with trainer.gathered(model.parameters()):
                bias = model[4].bias.detach().clone()

        (generation,) = Path(cluster.data_dirs[0], "norms", "generations").glob("0*")
        stored = zarr.open_group(generation, mode="r")["weight/4.bias"]
        assert isinstance(stored, zarr.Array)
        print(f"the last bias: {bias.item():.6f} in the model, {stored[0]:.6f} in {generation.name}/weight/4.bias")


if __name__ == "__main__":
    main()
