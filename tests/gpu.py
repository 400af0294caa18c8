"""Servers and trainers that share the first GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ps import LocalCluster

# Without it torch refuses matrix products of cuBLAS where they have to be deterministic, and it looks only once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


@contextmanager
def host(name: str) -> Iterator[None]:
    """NCCL takes processes that it begins in for those of another host: two of one host may not share a GPU."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("NCCL_HOSTID", name)
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
        # A network of the machine's may not lead back to it.
        monkeypatch.setenv("NCCL_NET", "Socket")
        yield


def start_servers(servers: int, **options: Any) -> LocalCluster:
    with host("zero-ps servers"):
        return LocalCluster(servers, device="cuda:0", **options)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
