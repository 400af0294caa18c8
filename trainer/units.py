"""Which submodules get hooks, and which subtrees are gathered as one."""

import sys
from collections.abc import Iterator

from torch import nn

from trainer.config import OffloadConfig
from trainer.errors import ConfigError


def choose_units(model: nn.Module, config: OffloadConfig) -> Iterator[tuple[str, nn.Module, bool]]:
    """Name, module and whether it is a leaf (gathered with everything below it), each module once.

    Raises ConfigError for a name in `leaf_modules` that the model does not have.
    """
    names = {leaf for leaf in config.leaf_modules if isinstance(leaf, str)}
    classes = tuple(leaf for leaf in config.leaf_modules if not isinstance(leaf, str))
    missing = names - {name for name, _ in model.named_modules()}
    if missing:
        raise ConfigError(f"OffloadConfig.leaf_modules names {sorted(missing)[0]!r}, which the model does not have")
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
        if module in seen:
            return
        seen.add(module)
        leaf = runs(module) and (
            name in names or isinstance(module, classes) or is_compiled(module) or _small(module, config)
        )
        yield name, module, leaf
        if leaf:
            seen.update(module.modules())
            return
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", model)


def runs(module: nn.Module) -> bool:
    """Whether the module has a forward; containers as `ModuleList` are never called and cannot gather."""
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def is_compiled(module: nn.Module) -> bool:
    """What `torch.compile` made is one unit: hooks inside would break its graph at every submodule."""
    # Whoever compiled something has imported dynamo; importing it for the question would take seconds.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return module._compiled_call_impl is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))


def _small(module: nn.Module, config: OffloadConfig) -> bool:
    threshold = config.module_granularity_threshold
    return threshold > 0 and sum(param.numel() for param in module.parameters()) <= threshold
