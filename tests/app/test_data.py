"""Batches: where they come from and what they depend on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.app.data import Corpus, find_files, standard_library


def corpus(size: int = 1000) -> Corpus:
    return Corpus(np.random.default_rng(1).integers(256, size=size, dtype=np.uint8))


def test_batch_is_a_function_of_seed_step_and_rank() -> None:
    place = {"seed": 3, "step": 120, "rank": 1, "size": 4, "context": 16}
    x, y = corpus().batch(**place)
    again, _ = corpus().batch(**place)
    assert torch.equal(x, again)
    for changed in ("seed", "step", "rank"):
        other, _ = corpus().batch(**{**place, changed: place[changed] + 1})
        assert not torch.equal(x, other), f"{changed} makes no difference"
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_batch_reaches_the_first_and_the_last_byte() -> None:
    tiny = Corpus(np.arange(6, dtype=np.uint8))
    x, y = tiny.batch(seed=0, step=0, rank=0, size=200, context=4)
    assert x.min() == 0
    assert y.max() == 5


def test_too_little_data_is_an_error_that_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match="has 4 bytes; a context of 4 needs at least 5"):
        Corpus(np.zeros(4, dtype=np.uint8)).check(4)


def test_files_are_read_in_order_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"2222")
    (tmp_path / "a").write_bytes(b"11")
    assert find_files([tmp_path]) == [tmp_path / "a", tmp_path / "b"]
    x, _ = Corpus.read(find_files([tmp_path])).batch(seed=0, step=0, rank=0, size=1, context=7)
    assert bytes(x[0].tolist()) == b"11\x002222"
    assert len(Corpus.read(find_files([tmp_path]), max_bytes=5)) <= 6


def test_default_data_is_text_and_never_the_tests_of_python() -> None:
    files = standard_library()
    assert files == sorted(files)
    assert len(files) > 100
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files)
