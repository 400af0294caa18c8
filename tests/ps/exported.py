"""Made-up models that are exported and imported, and what is compared then."""

import torch

from ps.store import StoredParameter
from ps.store.testing import ADAM_STATE, Model


def few() -> list[StoredParameter]:
    """Two chunks of a matrix, and little else."""
    return [
        StoredParameter("up.weight", (2600, 1031), torch.float32, "parameter", True),
        StoredParameter("up.bias", (7,), torch.float32, "parameter", True),
        StoredParameter("frozen", (5, 3), torch.bfloat16, "parameter", False),
        StoredParameter("count", (), torch.int64, "buffer", False),
    ]


def adam_model(entries) -> Model:
    """With one `step` a parameter, as training leaves it."""
    model = Model(entries, ADAM_STATE)
    for number, state in enumerate(model.states):
        if state:
            state["step"].fill_(number + 3)
    return model


def values(model: Model) -> dict[str, torch.Tensor]:
    return {parameter.name: value for parameter, value in zip(model.manifest, model.values, strict=True)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
