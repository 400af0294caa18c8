"""The average of trainers' gradients, and the memory that it is computed in."""

from pathlib import Path

import torch

from ps.chunk import Chunk
from ps.contributions import Contributions, Gradient, average, gradient_parts, new_average
from ps.shard import Shard
from ps.store import StoredParameter
from ps.tier import Area, Tier

SHAPE = (256, 256)


def chunk_in(tier: Tier, folder: Path) -> Chunk:
    manifest = [StoredParameter("w", SHAPE, torch.float32, "parameter", True)]
    (chunk,) = Shard(0, 1, manifest, tier=tier, areas=[Area(folder)])
    return chunk


def contributed(chunk: Chunk, values: torch.Tensor) -> Contributions:
    contributions = Contributions(f"gradient-{float(values[0, 0])}")
    incoming = chunk.tier.incoming((values.numel(),), values.dtype, "a test")
    incoming.tensor.copy_(values.view(-1))
    contributions.add(Gradient(chunk, None, incoming), 0)
    return contributions


def computed(chunk: Chunk, by_rank: list[Contributions]) -> torch.Tensor:
    into = new_average(chunk, by_rank, 0)
    assert into is not None
    before = chunk.tier.resident_bytes
    with chunk.tier.lease(gradient_parts(chunk, by_rank, 0), [into]):
        found = average(chunk, by_rank, 0, into)
        assert found is not None and found.data_ptr() == into.tensor.data_ptr()
        assert chunk.tier.resident_bytes == before + into.size
        found = found.clone()
    assert chunk.tier.resident_bytes == before
    return found


def test_it_is_computed_in_memory_that_the_tier_counts_and_uses_again(tmp_path: Path) -> None:
    chunk = chunk_in(Tier(16 << 20), tmp_path)
    one, two = torch.full(SHAPE, 1.0), torch.full(SHAPE, 2.5)
    narrow = contributed(chunk, one.bfloat16())
    assert torch.equal(computed(chunk, [narrow]), one)
    assert torch.equal(computed(chunk, [narrow, contributed(chunk, two)]), (one + two) / 2)
    chunk.tier.close()


def test_an_accumulator_in_the_weight_s_dtype_is_the_average_of_one(tmp_path: Path) -> None:
    chunk = chunk_in(Tier(16 << 20), tmp_path)
    alone = contributed(chunk, torch.ones(SHAPE))
    assert new_average(chunk, [alone], 0) is None
    (part,) = gradient_parts(chunk, [alone], 0)
    with chunk.tier.lease([part]):
        found = average(chunk, [alone], 0)
        assert found is not None and found.data_ptr() == part.tensor.data_ptr()
    assert average(chunk, [Contributions()], 0) is None
    chunk.tier.close()
