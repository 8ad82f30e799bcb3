"""Stores and striped files on a real HDFS, and what may happen to it meanwhile."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

import bootseer_slurm
from bootseer_slurm.checkpoint.file import ParallelFile
from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.store import open_store
from tests.hdfs.conftest import NODES, Hdfs
from tests.integration.node import wait_until
from tests.stores import check_clock, check_dcp, check_fsspec, check_objects, check_striped

CONTENT = os.urandom(2**24) * 4


def write(hdfs: Hdfs, name: str) -> str:
    uri = f"{hdfs.uri}/faults/{name}"
    with bootseer_slurm.open(uri, "wb") as file:
        file.write(CONTENT)
    return uri


def test_objects(hdfs: Hdfs) -> None:
    check_objects(f"{hdfs.uri}/objects")


def test_clock(hdfs: Hdfs) -> None:
    check_clock(f"{hdfs.uri}/clock")


def test_striped(hdfs: Hdfs) -> None:
    check_striped(f"{hdfs.uri}/striped/model.pt")


def test_fsspec(hdfs: Hdfs) -> None:
    check_fsspec(f"bootseer+{hdfs.uri}/fs")


@pytest.mark.torch
def test_dcp(hdfs: Hdfs) -> None:
    pytest.importorskip("torch", reason="needs scripts/torch")
    check_dcp(f"{hdfs.uri}/dcp/step_1")


def test_one_gets_a_lease(hdfs: Hdfs) -> None:
    """Unlike other stores HDFS has an exclusive create."""
    stores = [open_store(f"{hdfs.uri}/lease") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda store: store.create("one", b"x"), stores))
    assert sorted(got) == [False] * 7 + [True]


def nothing_is_deleted(hdfs: Hdfs) -> bool:
    """Whether no DataNode has blocks to delete, or to tell the NameNode of."""
    url = f"http://{urlsplit(hdfs.uri).hostname}:9870/jmx?qry=Hadoop:service=NameNode,name=FSNamesystem"
    with urllib.request.urlopen(url, timeout=10) as reply:
        pending = json.load(reply)["beans"][0]["PendingDeletionBlocks"]
    time.sleep(3 if pending == 0 else 0.5)  # heartbeats are sent each second
    return bool(pending == 0)


def test_the_namenode_is_restarted(hdfs: Hdfs) -> None:
    uri = write(hdfs, "restarted")
    # One with something to report tells a NameNode that is away without a pause, by a whole core.
    wait_until(lambda: nothing_is_deleted(hdfs), 60)
    with ParallelFile(uri) as file:
        hdfs.script("control", "namenode", "kill")
        assert file.read() == CONTENT, "what is open is read on"
        hdfs.script("control", "namenode", "start")
        hdfs.script("wait")
    with ParallelFile(uri) as file:
        assert file.read() == CONTENT


def test_a_datanode_is_killed_in_the_middle_of_a_read(hdfs: Hdfs) -> None:
    uri = write(hdfs, "killed")
    hdfs.script("link", "all", "200mbit")
    found: list[object] = []

    def read() -> None:
        try:
            with ParallelFile(uri) as file:
                found.append(file.read())
        except BaseException as error:
            found.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.5)
    assert reader.is_alive(), "it had not ended yet"
    hdfs.script("control", "n2", "kill")
    reader.join(120)
    assert found == [CONTENT]


def test_a_datanode_hangs(hdfs: Hdfs) -> None:
    """It takes connections, and says nothing: its blocks are read from the other replica."""
    uri = write(hdfs, "hangs")
    hdfs.script("control", "n1", "hang")
    with ParallelFile(uri) as file:
        assert file.read() == CONTENT
    hdfs.script("control", "n1", "start")


def test_all_datanodes_come_back_while_a_file_is_open(hdfs: Hdfs) -> None:
    """Where its blocks are was learned when it was opened: each DataNode has another address for the client then."""
    uri = write(hdfs, "back")
    with ParallelFile(uri) as file:
        assert bytes(file.view(30_000_000, 10)) == CONTENT[30_000_000:30_000_010]
        for node in NODES:
            hdfs.script("control", node, "kill")
        with pytest.raises(StoreError, match="cannot be read"):
            file.view(0)
        for node in NODES:
            hdfs.script("control", node, "start")
        hdfs.script("wait")

        def is_read() -> bool:
            try:
                return bytes(file.view(0)) == CONTENT
            except StoreError:  # until all have told the NameNode which blocks they have
                return False

        wait_until(is_read, 60)


def damage(hdfs: Hdfs, nodes: tuple[str, ...], before: set[str]) -> None:
    """Change a byte in each large block replica on these nodes that is not named in `before`."""
    damaged = 0
    for node in nodes:
        for path in hdfs.block_files(node):
            if path.name not in before and path.stat().st_size > 2**20:
                with path.open("r+b") as file:
                    file.seek(12345)
                    byte = file.read(1)
                    file.seek(12345)
                    file.write(bytes([byte[0] ^ 1]))
                damaged += 1
    assert damaged


def blocks(hdfs: Hdfs) -> set[str]:
    return {path.name for node in NODES for path in hdfs.block_files(node)}


def test_a_replica_is_damaged(hdfs: Hdfs) -> None:
    before = blocks(hdfs)
    uri = write(hdfs, "damaged")
    damage(hdfs, ("n1",), before)
    with ParallelFile(uri) as file:
        assert file.read() == CONTENT


def test_all_replicas_are_damaged(hdfs: Hdfs) -> None:
    before = blocks(hdfs)
    uri = write(hdfs, "lost")
    damage(hdfs, NODES, before)
    with (
        pytest.raises(BootseerError, match=r"cannot be read|is not what was written"),
        ParallelFile(uri) as file,
    ):
        file.read()


def test_nobody_is_there() -> None:
    with pytest.raises(StoreError, match="cannot be"):
        open_store("hdfs://127.0.0.1:1/a").write("b", b"1")
