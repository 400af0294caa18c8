"""Moves the bytes of chunks between memory and files, through the zarrs codec pipeline.

zarr's own indexing would write one array per call, out of one tensor as large as the parameter. A server
holds some chunks of each of many arrays, each in a tensor of its own. So the pipeline is driven one level
lower, where it takes any list of chunk files at once: with an array description in which each file is a
run of bytes (`uint8`). For uncompressed chunks that is exactly what the file is, and it moves dtypes that
zarrs does not know (bfloat16).
"""

import asyncio
import errno
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from zarr.buffer import default_buffer_prototype
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore, StorePath
from zarrs import ZarrsCodecPipeline

_BYTES = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [1],
    "data_type": "uint8",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "fill_value": 0,
    "codecs": [{"name": "bytes"}],
    "attributes": {},
}


@dataclass(frozen=True)
class Span:
    """The place in a buffer of one chunk file's bytes.

    key: the file's path, relative to the generation's folder.
    file_bytes: the size of the whole file.
    offset, size: in the buffer; `size` is less than `file_bytes` to read only the beginning of the file.
    """

    key: str
    file_bytes: int
    offset: int
    size: int


class ChunkFiles:
    """The chunk files of one generation. Methods may be called from several threads at once.

    Writing replaces a file in place, neither atomically nor synced: whoever calls sees to both. A file that
    has other names, as one that a generation links to, is left alone: a new one takes its place here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = LocalStore(folder)
        metadata = ArrayV3Metadata.from_dict(_BYTES)  # type: ignore[arg-type]
        self._dtype = metadata.data_type
        self._pipeline = ZarrsCodecPipeline.from_array_metadata_and_store(metadata, self._store)
        # Without this zarrs falls back to a pipeline of a fraction of the speed, and merely warns.
        if self._pipeline.impl is None:
            raise RuntimeError("zarrs does not accept plain byte arrays; install the pinned version of zarrs")
        self._config = ArrayConfig(order="C", write_empty_chunks=True)
        self._prototype = default_buffer_prototype()

    def write(self, spans: Sequence[Span], buffer: torch.Tensor) -> None:
        """Writes whole chunk files from a 1-d uint8 buffer. Raises OSError."""
        for span in spans:
            _give_up_if_linked(self._folder / span.key)
        self._run(spans, buffer, self._pipeline.write)
        # A missing file has to mean a missing chunk, also where a chunk is all zeros. zarrs 0.2.3 leaves
        # such files out whatever `write_empty_chunks` says (tried), so they are written here.
        for span in spans:
            file = self._folder / span.key
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(buffer[span.offset : span.offset + span.size].numpy().data)

    def read(self, spans: Sequence[Span], buffer: torch.Tensor) -> None:
        """Reads chunk files into a 1-d uint8 buffer. Raises OSError.

        zarr reads a missing file as zeros, so the caller has to know that the files are there.
        """
        self._run(spans, buffer, self._pipeline.read)

    def _run(self, spans, buffer, operation) -> None:  # type: ignore[no-untyped-def]
        batch = [
            (
                StorePath(self._store, span.key),
                self._spec(span.file_bytes),
                (slice(0, span.size),),
                (slice(span.offset, span.offset + span.size),),
                span.size == span.file_bytes,
            )
            for span in spans
        ]
        array = self._prototype.nd_buffer.from_numpy_array(buffer.numpy())
        try:
            asyncio.run(operation(batch, array))
        except RuntimeError as error:
            raise _as_os_error(error) from error

    def _spec(self, file_bytes: int) -> ArraySpec:
        return ArraySpec(
            shape=(file_bytes,),
            dtype=self._dtype,
            fill_value=np.uint8(0),
            config=self._config,
            prototype=self._prototype,
        )


def _give_up_if_linked(file: Path) -> None:
    """The one place that keeps what generations link to from being written: zarrs writes into files in place."""
    with suppress(FileNotFoundError):
        if file.stat().st_nlink > 1:
            file.unlink()


def _as_os_error(error: RuntimeError) -> OSError:
    """zarrs tells the system's error number only in its text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]) if found else errno.EIO, str(error))
