"""Several folders as one zarr store: zarr-python's own tests of stores, and what is special to a union."""

from pathlib import Path
from typing import Any

import pytest
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.testing.store import StoreTests

from ps.store.union_store import UnionStore

FOLDERS = 3


def folder_of(store: UnionStore, key: str) -> Path:
    """Where the tests put a key: all folders get some."""
    return store.folders[sum(key.encode()) % FOLDERS]


class WritableForTests(UnionStore):
    """Many of zarr's tests write what they read through the store. Here that goes beside it, to its folders."""

    async def set(self, key: str, value: Buffer) -> None:
        write(self, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        raise NotImplementedError


def write(store: UnionStore, key: str, value: Buffer) -> None:
    file = folder_of(store, key) / key
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(value.to_bytes())


class TestUnionStore(StoreTests[UnionStore, cpu.Buffer]):
    store_cls = WritableForTests
    buffer_cls = cpu.Buffer

    async def set(self, store: UnionStore, key: str, value: Buffer) -> None:
        write(store, key, value)

    async def get(self, store: UnionStore, key: str) -> Buffer:
        return self.buffer_cls.from_bytes((folder_of(store, key) / key).read_bytes())

    @pytest.fixture
    def store_kwargs(self, tmp_path: Path) -> dict[str, Any]:
        folders = [tmp_path / str(i) for i in range(FOLDERS)]
        for folder in folders:
            folder.mkdir()
        return {"folders": folders}

    def test_store_repr(self, store: UnionStore) -> None:
        assert all(str(folder) in repr(store) and str(folder) in str(store) for folder in store.folders)

    def test_store_supports_writes(self, store: UnionStore) -> None:
        assert not store.supports_writes and not store.supports_deletes

    def test_store_supports_listing(self, store: UnionStore) -> None:
        assert store.supports_listing

    def test_store_read_only(self, store: UnionStore) -> None:
        assert store.read_only
        with pytest.raises(AttributeError):
            store.read_only = False  # type: ignore[misc]

    @pytest.mark.parametrize("read_only", [True, False])
    async def test_store_open_read_only(self, open_kwargs: dict[str, Any], read_only: bool) -> None:
        if read_only:
            await super().test_store_open_read_only(open_kwargs, read_only)
        else:
            with pytest.raises(ValueError, match="can only be read"):
                await self.store_cls.open(**open_kwargs, read_only=False)

    async def test_read_only_store_raises(self, open_kwargs: dict[str, Any]) -> None:
        store = UnionStore(**open_kwargs)
        for operation in (store.set("foo", self.buffer_cls.from_bytes(b"bar")), store.delete("foo"), store.clear()):
            with pytest.raises((ValueError, NotImplementedError)):
                await operation

    async def test_with_read_only_store(self, open_kwargs: dict[str, Any]) -> None:
        store = UnionStore(**open_kwargs)
        assert store.with_read_only(True) == store
        with pytest.raises(NotImplementedError, match="with_read_only is not implemented for the"):
            store.with_read_only(False)

    async def test_clear(self, store: UnionStore) -> None:
        with pytest.raises(NotImplementedError):
            await store.clear()

    async def test_set(self, store: UnionStore) -> None:  # type: ignore[override]
        pytest.skip("nothing can be written")

    async def test_set_if_not_exists(self, store: UnionStore) -> None:
        pytest.skip("nothing can be written")

    async def test_a_folder_that_lacks_a_key_hides_no_other(self, store: UnionStore) -> None:
        for folder, value in ((store.folders[1], b"second"), (store.folders[2], b"third")):
            (folder / "key").write_bytes(value)
        found = await store.get("key", default_buffer_prototype())
        assert found is not None and found.to_bytes() == b"second"
        assert [key async for key in store.list()] == ["key"]
