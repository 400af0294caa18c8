"""Several folders as one zarr store, without copying: a key is found in the folder that has it."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore


class UnionStore(Store):
    """What `folders` would be if they were copied over each other. Of a key that several have, the first
    folder's value is taken. It can only be read.
    """

    supports_writes: bool = False
    supports_deletes: bool = False
    supports_listing: bool = True

    def __init__(self, folders: Sequence[Path | str], *, read_only: bool = True) -> None:
        if not read_only:
            raise ValueError("a union of folders can only be read; open it with mode='r'")
        super().__init__(read_only=True)
        self._stores = [LocalStore(folder, read_only=True) for folder in folders]

    @property
    def folders(self) -> list[Path]:
        return [store.root for store in self._stores]

    def with_read_only(self, read_only: bool = False) -> Store:
        if not read_only:
            super().with_read_only(read_only)  # Raises NotImplementedError, as a store without writing does.
        return type(self)(self.folders)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        for store in self._stores:
            if (found := await store.get(key, prototype, byte_range)) is not None:
                return found
        return None

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    async def exists(self, key: str) -> bool:
        for store in self._stores:
            if await store.exists(key):
                return True
        return False

    async def getsize(self, key: str) -> int:
        for store in self._stores:
            if await store.exists(key):
                return await store.getsize(key)
        raise FileNotFoundError(key)

    async def list(self) -> AsyncIterator[str]:
        async for key in self._once(store.list() for store in self._stores):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self._once(store.list_prefix(prefix) for store in self._stores):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for key in self._once(store.list_dir(prefix) for store in self._stores):
            yield key

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.folders == self.folders

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return "union of " + ", ".join(map(str, self.folders))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(map(str, self.folders))})"

    async def _once(self, listings: Iterable[AsyncIterator[str]]) -> AsyncIterator[str]:
        seen: set[str] = set()
        for listing in listings:
            async for key in listing:
                if key not in seen:
                    seen.add(key)
                    yield key
