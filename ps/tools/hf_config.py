"""How many parameters a model has, from its Hugging Face `config.json`: transformer decoders of a few families."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelSize:
    """parameters: of the model, tied ones once. active: that one token is computed with; fewer with experts.

    largest_layer: parameters of the largest submodule that is gathered by itself, an embedding or a linear layer.
    tensors: how many parameters in the sense of torch there are; 0 where that is not known.
    """

    parameters: int
    active: int
    largest_layer: int
    tensors: int = 0


def read(path: Path) -> ModelSize:
    """Raises OSError, and ValueError for what is no configuration of a known family."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise ValueError(
            f"{path} is of model_type {family!r}, whose parameters are not known here (known: {', '.join(FAMILIES)}); "
            "give --parameters instead"
        )
    sizes = _Sizes(config)
    try:
        return _gpt2(sizes) if family == "gpt2" else _llama(sizes, family)
    except ValueError as error:
        raise ValueError(f"{path} {error}; give --parameters instead") from None


class _Sizes:
    """A configuration, of which each size is checked when it is asked for."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    def __call__(self, name: str, default: int | None = None) -> int:
        """default: where it is not stated, or null; without one it has to be. Raises ValueError."""
        value = self._config.get(name)
        if value is None and default is not None:
            return default
        if name not in self._config:
            raise ValueError(f"lacks {name!r}")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
            raise ValueError(f"has {name} = {value!r:.50}, which is not a whole number from 1 to {_MOST:,}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self._config.get(name, default))


_MOST = 1 << 30


def _gpt2(size: _Sizes) -> ModelSize:
    width, layers = size("n_embd"), size("n_layer")
    inner = size("n_inner", 4 * width)
    attention = 4 * width * width + 4 * width
    mlp = 2 * width * inner + inner + width
    block = attention + mlp + 4 * width
    embedding = size("vocab_size") * width
    total = layers * block + embedding + size("n_positions") * width + 2 * width
    if not size.flag("tie_word_embeddings", True):
        total += embedding
    return ModelSize(total, total, max(embedding, width * inner))


def _llama(size: _Sizes, family: str) -> ModelSize:
    width, layers = size("hidden_size"), size("num_hidden_layers")
    heads = size("num_attention_heads")
    # Where a file leaves it away, what the family's own configuration has.
    groups = size("num_key_value_heads", 8 if family in ("mistral", "mixtral") else heads)
    head = size("head_dim", 128 if family == "qwen3" else max(1, width // heads))
    inner, vocabulary = size("intermediate_size"), size("vocab_size")
    queries, keys = heads * head, groups * head
    attention = 2 * width * queries + 2 * width * keys
    if family == "qwen2":
        attention += queries + 2 * keys
    elif size.flag("attention_bias"):
        attention += queries + 2 * keys + width
    if family == "qwen3":
        attention += 2 * head
    mlp = 3 * width * inner
    if size.flag("mlp_bias"):
        mlp += 2 * inner + width
    experts, used, router = 1, 1, 0
    if family == "mixtral":
        experts, used = size("num_local_experts"), size("num_experts_per_tok")
        router = experts * width
    outside = vocabulary * width * (1 if size.flag("tie_word_embeddings") else 2) + width

    def whole(mlps: int) -> int:
        return layers * (attention + mlps * mlp + router + 2 * width) + outside

    return ModelSize(whole(experts), whole(used), max(vocabulary * width, width * inner))
