"""Several micro-batches, layer by layer."""

from collections.abc import Callable, Iterable, Sequence

import torch


def layer_by_layer(
    blocks: Iterable[Callable[[torch.Tensor], torch.Tensor]], micro_batches: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Takes all micro-batches through each block before the next one; what the last block made of each.

    To be called in the forward of an offloaded model, for the part of it that is a sequence of blocks. A
    backward of the sum of the losses then goes back in the same way, so each block is gathered twice in a
    step however many micro-batches there are, and each gradient is sent once. The price is that activations
    of all micro-batches are kept at once. The schedule is that of GreedySnake (Yue et al., 2025).

    Gradients add up in the order of the micro-batches, in the dtype of computation. In fp32 they have the bits
    that a backward for each micro-batch gives.
    """
    activations = list(micro_batches)
    for block in blocks:
        # Autograd runs last what was computed first; this way the first micro-batch's gradient is the first.
        for number in reversed(range(len(activations))):
            activations[number] = block(activations[number])
    return activations
