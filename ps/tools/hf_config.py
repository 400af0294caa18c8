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
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise ValueError(
            f"{path} is of model_type {family!r}, whose parameters are not known here (known: {', '.join(FAMILIES)}); "
            "give --parameters instead"
        )
    try:
        return _gpt2(config) if family == "gpt2" else _llama(config, family)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; give --parameters instead") from None
    except TypeError:
        raise ValueError(f"{path} has a size that is not a number; give --parameters instead") from None


def _gpt2(config: dict[str, Any]) -> ModelSize:
    width, layers = int(config["n_embd"]), int(config["n_layer"])
    inner = int(config.get("n_inner") or 4 * width)
    attention = 4 * width * width + 4 * width
    mlp = 2 * width * inner + inner + width
    block = attention + mlp + 4 * width
    embeddings = (int(config["vocab_size"]) + int(config["n_positions"])) * width
    total = layers * block + embeddings + 2 * width
    return ModelSize(total, total, max(int(config["vocab_size"]) * width, width * inner))


def _llama(config: dict[str, Any], family: str) -> ModelSize:
    width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or width // heads)
    inner, vocabulary = int(config["intermediate_size"]), int(config["vocab_size"])
    queries, keys = heads * head, groups * head
    attention = 2 * width * queries + 2 * width * keys
    if family == "qwen2":
        attention += queries + 2 * keys
    elif config.get("attention_bias"):
        attention += queries + 2 * keys + width
    if family == "qwen3":
        attention += 2 * head
    mlp = 3 * width * inner
    experts, used, router = 1, 1, 0
    if family == "mixtral":
        experts, used = int(config["num_local_experts"]), int(config["num_experts_per_tok"])
        router = experts * width
    tied = bool(config.get("tie_word_embeddings", False))
    outside = vocabulary * width * (1 if tied else 2) + width

    def whole(mlps: int) -> int:
        return layers * (attention + mlps * mlp + router + 2 * width) + outside

    return ModelSize(whole(experts), whole(used), max(vocabulary * width, width * inner))
