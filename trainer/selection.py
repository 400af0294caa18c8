"""What of a parameter is moved, as parts of the chunks that servers hold."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from protos.layout import ChunkGrid
from trainer.links import Run


@dataclass(frozen=True)
class Part:
    """What of one chunk is moved.

    runs: in elements of the flattened chunk, ascending and apart; together they are what is moved.
    start, count: where that is in the memory that it comes to or from, in elements.
    """

    chunk: int
    runs: tuple[Run, ...]
    start: int
    count: int


def everything(grid: ChunkGrid) -> Iterator[Part]:
    """All chunks of a parameter, to or from memory of the whole parameter."""
    for chunk in range(grid.num_chunks):
        start, stop = grid.element_range(chunk)
        yield Part(chunk, ((0, stop - start),), start, stop - start)


def elements(grid: ChunkGrid, first: int, end: int, origin: int = 0) -> Iterator[Part]:
    """Elements of the flattened parameter from `first` up to `end`. origin: with which one the memory begins."""
    if first == end:
        return
    chunk_elements = grid.chunk_elements(0)
    for chunk in range(first // chunk_elements, -(-end // chunk_elements)):
        start, stop = grid.element_range(chunk)
        low, high = max(start, first), min(stop, end)
        yield Part(chunk, ((low - start, high - start),), low - origin, high - low)


def rows(grid: ChunkGrid, numbers: torch.Tensor) -> Iterator[Part]:
    """Some rows, to or from memory of just those; a part without runs for each chunk that has none of them.

    numbers: int64, ascending, each once.
    """
    borders = torch.tensor([grid.row_range(chunk)[0] for chunk in range(grid.num_chunks)] + [grid.rows])
    places = torch.searchsorted(numbers, borders).tolist()
    width = grid.row_elements
    for chunk in range(grid.num_chunks):
        here = numbers[places[chunk] : places[chunk + 1]] - int(borders[chunk])
        gaps = (here.diff() > 1).nonzero().flatten()
        firsts = here[torch.cat([torch.zeros(min(1, len(here)), dtype=torch.int64), gaps + 1])].tolist()
        lasts = here[torch.cat([gaps, torch.full((min(1, len(here)),), len(here) - 1)])].tolist()
        runs = tuple((first * width, (last + 1) * width) for first, last in zip(firsts, lasts, strict=True))
        yield Part(chunk, runs, places[chunk] * width, len(here) * width)
