"""Made-up models for tests of what is stored: whole tensors, and the chunks that a shard holds of them."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from protos.layout import ChunkGrid, place_all
from ps.store.contents import ChunkState, CommitKey, GenerationHeader, OptimizerSpec, StateArray, StoredParameter

ADAM_STATE = {
    "step": StateArray("step", torch.float32, per_element=False),
    "exp_avg": StateArray("exp_avg", None, per_element=True),
    "exp_avg_sq": StateArray("exp_avg_sq", None, per_element=True),
}
"""What `torch.optim.AdamW` keeps."""


class Model:
    """Whole tensors of a model, random.

    values: by parameter index. states: by parameter index and name, for trained parameters; 0-d state
    has one number a chunk.
    """

    def __init__(self, manifest: Sequence[StoredParameter], states: Mapping[str, StateArray], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.manifest = tuple(manifest)
        self.state_arrays = dict(states)
        self.values = [random_tensor(p.shape, p.dtype, generator) for p in manifest]
        self.states = [
            {name: self._state(parameter, state, generator) for name, state in states.items()}
            if parameter.has_state
            else {}
            for parameter in manifest
        ]

    def header(
        self,
        shard: int = 0,
        num_shards: int = 1,
        *,
        step: int = 0,
        commit_id: str = "0",
        job: str = "gpt",
        optimizer: OptimizerSpec | None = None,
        metadata: str = "",
    ) -> GenerationHeader:
        return GenerationHeader(job, CommitKey(step, commit_id), shard, num_shards, self.manifest, optimizer, metadata)

    def chunks(self, shard: int = 0, num_shards: int = 1) -> Iterator[ChunkState[torch.Tensor]]:
        """The chunks of a shard in the order of the manifest, each a tensor of its own."""
        placement = place_all([p.shape for p in self.manifest], num_shards)
        for index, shards in enumerate(placement):
            for chunk, holder in enumerate(shards):
                if holder == shard:
                    state = {name: self._chunk_state(index, chunk, name) for name in self.states[index]}
                    yield ChunkState(index, chunk, self._chunk(index, chunk, self.values[index]), state)

    def _chunk(self, index: int, chunk: int, whole: torch.Tensor) -> torch.Tensor:
        if whole.dim() == 0:
            return whole.clone()
        start, stop = ChunkGrid.of(self.manifest[index].shape).row_range(chunk)
        return whole[start:stop].clone()

    def _chunk_state(self, index: int, chunk: int, name: str) -> torch.Tensor:
        whole = self.states[index][name]
        if self.state_arrays[name].per_element:
            return self._chunk(index, chunk, whole)
        return whole[chunk].clone()

    @staticmethod
    def _state(parameter: StoredParameter, state: StateArray, generator: torch.Generator) -> torch.Tensor:
        dtype = parameter.dtype if state.dtype is None else state.dtype
        shape = parameter.shape if state.per_element else (ChunkGrid.of(parameter.shape).num_chunks,)
        return random_tensor(shape, dtype, generator)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of any storable dtype; for integers over the whole range of int8."""
    if dtype == torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator) == 1
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.randint(0 if dtype == torch.uint8 else -128, 128, tuple(shape), generator=generator).to(dtype)
