"""What every store must do, whatever it is on; run by the tests of each."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

import bootseer_slurm
from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.checkpoint.file import ParallelFile
from bootseer_slurm.checkpoint.striped import split
from bootseer_slurm.checkpoint.writer import StripedWriter
from bootseer_slurm.errors import NotFound, StoreError
from bootseer_slurm.store import clock_offset, open_store

CONTENT = os.urandom(3 * CHUNK_BYTES) * 3 + b"the end"


def check_objects(uri: str) -> None:
    """Small and large objects, and folders. uri: an empty folder of a store."""
    store = open_store(uri)
    assert store.scan("none") == [] and store.list("none") == []
    store.write("a/b/one", b"1")
    store.write("a/b/two", b"22")
    assert store.read("a/b/two", limit_bytes=10) == b"22"
    store.write("a/b/two", b"another")
    assert store.read("a/b/two", limit_bytes=10) == b"another"
    with pytest.raises(StoreError, match="more than the 3"):
        store.read("a/b/two", limit_bytes=3)
    for missing in ("a/b/none", "none/at/all"):
        with pytest.raises(NotFound):
            store.open(missing)
    assert store.list("a/b") == ["one", "two"]
    assert [(entry.name, entry.is_folder) for entry in store.scan("a")] == [("b", True)]
    assert [(entry.name, entry.size_bytes) for entry in sorted(store.scan("a/b"))] == [("one", 1), ("two", 7)]
    assert store.create("lease", b"first") and not store.create("lease", b"second")
    assert store.read("lease", limit_bytes=10) == b"first"
    with pytest.raises(RuntimeError), store.writer("a/b/two") as file:
        file.write(b"half of it")
        raise RuntimeError
    assert "half" not in str(store.list("a/b")) and len(store.scan("a/b")) <= 2
    reader = store.open("a/b/one")
    assert (
        reader.read_into(0, memoryview(bytearray(5))) == 1
        and reader.read_into(7, memoryview(bytearray(5))) == 0
    )
    reader.close()
    store.remove("a")
    store.remove("a")
    assert store.scan("a") == []


def check_striped(uri: str) -> None:
    """A striped file. uri: of a file that is not there, in a folder that is."""
    with pytest.raises(NotFound):
        bootseer_slurm.open(uri)
    with StripedWriter(uri, objects=5) as file:
        for start in range(0, len(CONTENT), 999_999):
            file.write(CONTENT[start : start + 999_999])
    with bootseer_slurm.open(uri) as file:
        assert file.read() == CONTENT
    with ParallelFile(uri) as file:
        assert (
            bytes(file.view(5 * CHUNK_BYTES - 7, 20)) == CONTENT[5 * CHUNK_BYTES - 7 : 5 * CHUNK_BYTES + 13]
        )
    old = ParallelFile(uri)
    with bootseer_slurm.open(uri, "wb") as file:
        file.write(b"second")
    assert old.read() == CONTENT, "who reads the one before reads on"
    old.close()
    with pytest.raises(RuntimeError), StripedWriter(uri) as file:
        file.write(CONTENT)
        raise RuntimeError
    for written in (b"third", b"fourth"):
        with bootseer_slurm.open(uri, "wb") as file:
            file.write(written)
    with bootseer_slurm.open(uri) as file:
        assert file.read() == b"fourth"
    folder, name = split(uri)
    assert len([entry for entry in open_store(folder).scan(name) if entry.is_folder]) == 2

    def read(_: int) -> bool:
        with ParallelFile(uri) as file:
            return file.read() == b"fourth"

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [True] * 8


def check_fsspec(url: str) -> None:
    """The same through fsspec. url: bootseer+… of a folder."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{path}/step_1/a", b"one")
    fs.pipe_file(f"{path}/step_1/b", b"two")
    assert sorted(fs.find(path)) == [f"{path}/step_1/a", f"{path}/step_1/b"]
    fs.mv(f"{path}/step_1/b", f"{path}/step_1/a")
    assert fs.cat_file(f"{path}/step_1/a") == b"two" and not fs.exists(f"{path}/step_1/b")
    fs.rm(f"{path}/step_1", recursive=True)
    assert not fs.exists(f"{path}/step_1/a")


def check_dcp(uri: str) -> None:
    """A checkpoint of torch.distributed.checkpoint, striped, through its own classes and our reader. uri: of its folder."""
    import torch
    import torch.distributed.checkpoint as dcp

    from bootseer_slurm.checkpoint.dcp import ParallelReader

    state = {
        "large": torch.randn(3, 1024, 1024),
        "half": torch.randn(6000, 1024).bfloat16(),
        "odd": torch.randn(3, 5),
        "none": torch.zeros(0, 4),
    }
    dcp.save({**state, "step": 7}, storage_writer=dcp.FsspecWriter(f"bootseer+{uri}"))
    for reader in (
        ParallelReader(uri),
        ParallelReader(f"bootseer+{uri}"),
        dcp.FsspecReader(f"bootseer+{uri}"),
    ):
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()} | {"step": 0}
        dcp.load(found, storage_reader=reader)
        assert found.pop("step") == 7
        assert all(found[name].equal(tensor) for name, tensor in state.items())


def check_clock(uri: str) -> None:
    """This machine's clock and its server's are the same one."""
    store = open_store(uri)
    offset_s, error_s = clock_offset(store, "users/7/.x.clock")
    assert abs(offset_s) <= error_s < 3
    assert [entry.name for entry in store.scan("users/7")] == []
