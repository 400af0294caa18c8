"""Which chunks of an announced step are updated first."""

import pytest
import torch

from ps.agreed_step import AgreedStep
from ps.contributions import Contributions
from ps.optimizer import Options
from ps.shard import Shard
from ps.store import StoredParameter
from ps.tier import Tier

BACKWARD = (3, 2, 1)
"""The order in which gradients come, of which the first parameter has none yet."""


@pytest.mark.parametrize(
    ("limit_bytes", "first"), [pytest.param(None, [1, 2], id="memory"), pytest.param(1 << 30, [3, 2], id="disk")]
)
def test_what_is_needed_first_or_where_memory_is_limited_what_came_first(
    limit_bytes: int | None, first: list[int]
) -> None:
    manifest = [StoredParameter(f"w{n}", (4, 4), torch.float32, "parameter", True) for n in range(4)]
    shard = Shard(0, 1, manifest, tier=Tier(limit_bytes))
    chunks = list(shard)
    contributions = Contributions()
    step = AgreedStep(shard, 0, Options([], [], {}), [contributions])
    for number in BACKWARD:
        contributions.finish(chunks[number], 0)
        assert step.look([chunks[number]])
    both = 2 * chunks[0].num_bytes()
    assert step.take(4 * chunks[0].num_bytes(), both) == []
    assert [chunk.parameter for chunk in step.take(0, both)] == first
    assert len(step.take(0, both)) == 1
    step.complete = True
    assert [chunk.parameter for chunk in step.take(0, both)] == [0, 1, 2, 3]
