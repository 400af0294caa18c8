"""What `OffloadConfig` refuses, before anybody is asked for anything."""

import pytest
import torch
from torch import nn

import trainer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"param_persistence_threshold": -1}, "param_persistence_threshold has to be a whole number of at least 0"),
        ({"prefetch_bucket_size": 1.5}, "prefetch_bucket_size has to be a whole number of at least 0, not 1.5"),
        ({"max_inflight_push_bytes": True}, "max_inflight_push_bytes has to be a whole number of at least 0, not True"),
        ({"max_live_bytes": 0}, "max_live_bytes has to be a whole number of bytes or None, not 0"),
        ({"max_live_bytes": "1GiB"}, "max_live_bytes has to be a whole number of bytes or None, not '1GiB'"),
        ({"mode": "Group"}, "mode has to be 'auto', 'group' or 'direct', not 'Group'"),
        ({"leaf_modules": nn.Linear}, r"leaf_modules takes a tuple of .*; one of them is a tuple, too"),
        ({"leaf_modules": True}, "leaf_modules takes a tuple of classes of modules and names, not True"),
        ({"sparse_rows": nn.Embedding}, "sparse_rows takes a tuple of classes of modules and names"),
        ({"sparse_rows": "embedding"}, "sparse_rows takes a tuple of classes of modules and names, not 'embedding'"),
        ({"sparse_rows": None}, "sparse_rows takes a tuple of classes of modules and names, not None"),
        ({"sparse_rows": (3,)}, "sparse_rows takes classes of modules and names, not 3"),
        ({"untouched_rows": "keep"}, "is about the tables of sparse_rows, and there are none"),
        ({"max_staleness": -1}, "max_staleness has to be a whole number from 0 to"),
        ({"max_staleness": 1, "mode": "group"}, "does not go with mode='group'"),
        ({"gradient_reduction": "max"}, "gradient_reduction has to be 'mean' or 'sum', not 'max'"),
        ({"param_dtype": "bf16"}, "param_dtype has to be a floating-point torch.dtype, not 'bf16'"),
        ({"reduce_dtype": torch.int8}, "reduce_dtype has to be a floating-point torch.dtype, not torch.int8"),
    ],
)
def test_what_cannot_be_is_refused_and_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(trainer.ConfigError, match=message):
        trainer.OffloadConfig(**settings)


def test_lists_of_modules_are_as_good_as_tuples() -> None:
    trainer.OffloadConfig(sparse_rows=[nn.Embedding], leaf_modules=["blocks.0"])
