"""What the coordinator of a model counts."""

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """Since the model was offloaded.

    gathers: uses of parameters by modules that needed them whole, those that always stay left out.
    hits: of these, how many found the parameter whole or on its way.
    stalled_seconds: by module, how long it waited for parameters.
    """

    gathers: int = 0
    hits: int = 0
    stalled_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def misses(self) -> int:
        return self.gathers - self.hits

    def gather(self, *, hit: bool) -> None:
        self.gathers += 1
        self.hits += hit

    def stalled(self, module: str, seconds: float) -> None:
        self.stalled_seconds[module] += seconds
