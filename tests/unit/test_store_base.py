"""What every store does alike: on a folder, and on a file system of pyarrow."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs

from bootseer_slurm.errors import NotFound, StoreError
from bootseer_slurm.store import FileStore, Store, open_store
from bootseer_slurm.store.arrow import ArrowStore


@pytest.fixture(params=["file", "arrow"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return FileStore(tmp_path)
    assert isinstance(fs.FileSystem.from_uri(f"file://{tmp_path}")[0], fs.LocalFileSystem)
    return ArrowStore(f"file://{tmp_path}")


def test_what_is_written_is_read(store: Store) -> None:
    store.write("users/1/a", b"0123456789")
    reader = store.open("users/1/a")
    view = memoryview(bytearray(4))
    assert reader.size_bytes == 10
    assert reader.read_into(3, view) == 4
    assert bytes(view) == b"3456"
    assert reader.read_into(8, view) == 2, "short at the end"
    assert reader.read_into(20, view) == 0
    reader.close()
    assert store.read("users/1/a", limit_bytes=10) == b"0123456789"
    assert store.list("users/1") == ["a"]


def test_a_failed_write_leaves_the_old_object(store: Store) -> None:
    store.write("a", b"old")
    with pytest.raises(RuntimeError):
        with store.writer("a") as file:
            file.write(b"half")
            raise RuntimeError("killed")
    assert store.read("a", limit_bytes=10) == b"old"
    assert store.list("") == ["a"]


def test_what_is_missing(store: Store) -> None:
    with pytest.raises(NotFound):
        store.open("nothing")
    assert store.list("nothing") == []
    store.remove("nothing")


def test_too_large_for_its_kind(store: Store) -> None:
    store.write("a", b"12345")
    with pytest.raises(StoreError, match="more than the 4"):
        store.read("a", limit_bytes=4)


def test_remove_takes_folders(store: Store) -> None:
    store.write("x/y/z", b"1")
    store.remove("x")
    assert store.list("") == []


def test_an_unknown_uri_is_refused() -> None:
    with pytest.raises(StoreError):
        open_store("gopher://host/x")
