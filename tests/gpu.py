"""Servers and trainers that share the first GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ps import LocalCluster

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


@contextmanager
def host(name: str) -> Iterator[None]:
    """NCCL takes processes that it begins in for those of another host: two of one host may not share a GPU."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("NCCL_HOSTID", name)
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
        yield


def start_servers(servers: int, **options: Any) -> LocalCluster:
    with host("zero-ps servers"):
        return LocalCluster(servers, device="cuda:0", **options)


@contextmanager
def deterministic() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Without it torch refuses matrix products of cuBLAS.
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
