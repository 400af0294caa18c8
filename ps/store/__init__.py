"""Generations on disk: immutable zarr v3 groups that are complete or do not exist.

`DataDir` is a server's data folder, `JobStore` one job in it. docs/storage.md describes the format.
Importing this package lets zarr-python open arrays of data type `bfloat16`.
"""

from ps.store.bfloat16 import register_bfloat16
from ps.store.chunk_file import read_tensor
from ps.store.contents import (
    ChunkFile,
    ChunkState,
    ChunkValue,
    CommitKey,
    GenerationHeader,
    OptimizerGroup,
    OptimizerSpec,
    StateArray,
    StoredParameter,
    Written,
)
from ps.store.data_dir import DataDir
from ps.store.errors import (
    DamagedError,
    DataDirError,
    DiskFullError,
    GenerationMissingError,
    NewerFormatError,
    StoreError,
)
from ps.store.job_store import JobStore

register_bfloat16()

__all__ = [
    "ChunkFile",
    "ChunkState",
    "ChunkValue",
    "CommitKey",
    "DamagedError",
    "DataDir",
    "DataDirError",
    "DiskFullError",
    "GenerationHeader",
    "GenerationMissingError",
    "JobStore",
    "NewerFormatError",
    "OptimizerGroup",
    "OptimizerSpec",
    "StateArray",
    "StoreError",
    "StoredParameter",
    "Written",
    "read_tensor",
    "register_bfloat16",
]
