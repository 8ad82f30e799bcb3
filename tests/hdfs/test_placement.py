"""Where the objects of a file lie on a real HDFS: two replicas of each on three DataNodes."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bootseer_slurm
from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.checkpoint.stripe import stripe_file
from bootseer_slurm.checkpoint.striped import placement
from bootseer_slurm.cli import app
from bootseer_slurm.store import Store, open_store, webhdfs
from tests.hdfs.conftest import NODES, Hdfs

OBJECTS = 48
SMALL = os.urandom(10_000)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What is known of a NameNode's WebHDFS is known to the process."""
    webhdfs.of_authority.cache_clear()
    yield
    webhdfs.of_authority.cache_clear()


def write_small(store: Store, objects: int = OBJECTS) -> None:
    writer = store.spread()

    def write(index: int) -> None:
        with writer(f"{index}") as file:
            file.write(memoryview(SMALL))
            file.write(b"the end")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(objects)))


def source_file(folder: Path, chunks: int) -> Path:
    path = folder / "model.bin"
    path.write_bytes(os.urandom(CHUNK_BYTES) * chunks)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def test_each_datanode_has_as_many_objects(hdfs: Hdfs) -> None:
    store = open_store(f"{hdfs.uri}/even")
    write_small(store)
    counts: Counter[str] = Counter()
    for index in range(OBJECTS):
        assert store.read(f"{index}", limit_bytes=20_000) == SMALL + b"the end"
        counts.update(list(store.locations(f"{index}") or {}))
    assert len(counts) == len(NODES) and counts.total() == 2 * OBJECTS
    assert max(counts.values()) - min(counts.values()) <= 3
    assert len(store.scan("")) == OBJECTS, "what was given up is gone"


def test_where_a_file_lies(hdfs: Hdfs, tmp_path: Path) -> None:
    source, uri = source_file(tmp_path, 12), f"{hdfs.uri}/shown/model.bin"
    done = CliRunner().invoke(app, ["checkpoint", "stripe", str(source), uri, "--stripes", "12"])
    assert done.exit_code == 0 and "12 objects" in done.stdout
    found = placement(uri)
    assert found and sum(found.values()) == source.stat().st_size and len(found) == len(NODES)
    replica_bytes = source.stat().st_size / 24  # what one of an object's two counts for
    assert max(found.values()) - min(found.values()) <= 3 * replica_bytes
    assert f"on 3 servers; the fullest has {max(found.values()) / sum(found.values()):.1%}" in " ".join(
        done.stdout.split()
    )
    done = CliRunner().invoke(app, ["checkpoint", "placement", uri])
    assert done.exit_code == 0 and all(server in done.stdout for server in found)
    with open_store(f"{hdfs.uri}/shown").writer("plain") as file:
        file.write(SMALL)
    plain = placement(f"{hdfs.uri}/shown/plain")
    assert plain and sum(plain.values()) == len(SMALL) and len(plain) == 2


def test_striping_goes_on_where_it_was_interrupted(hdfs: Hdfs, tmp_path: Path) -> None:
    source, uri = source_file(tmp_path, 12), f"{hdfs.uri}/again/model.bin"
    lock, calls = threading.Lock(), 0

    def interrupt(_: int) -> None:
        nonlocal calls
        with lock:
            calls += 1
            if calls > 6:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        stripe_file(source, uri, objects=12, progress=interrupt)
    store = open_store(f"{hdfs.uri}/again/model.bin")
    (generation,) = (entry.name for entry in store.scan("") if entry.is_folder)
    before = {entry.name: entry.changed_s for entry in store.scan(generation)}
    assert len(before) == 6 and store.list("") == sorted([generation, "unfinished"])
    stripe_file(source, uri, objects=12)
    after = {entry.name: entry.changed_s for entry in store.scan(generation)}
    assert len(after) == 12 and {name: after[name] for name in before} == before
    with bootseer_slurm.open(uri) as file:
        assert file.read() == source.read_bytes()
    found = placement(uri)
    assert found and max(found.values()) - min(found.values()) <= 2 * CHUNK_BYTES


def configure(hdfs: Hdfs, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have WebHDFS looked for at another port of the NameNode's machine."""
    value = f"<property><name>dfs.namenode.http-address</name><value>0.0.0.0:{port}</value></property>"
    (folder / "hdfs-site.xml").write_text(f"<configuration>{value}</configuration>")
    monkeypatch.setenv("HADOOP_CONF_DIR", str(folder))


def test_without_webhdfs_it_is_not_looked_at(
    hdfs: Hdfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    configure(hdfs, tmp_path, 9, monkeypatch)
    store = open_store(f"{hdfs.uri}/blind")
    with caplog.at_level("INFO", "bootseer_slurm.store.webhdfs"):
        write_small(store, 16)
        assert store.locations("1") is None
    assert len(store.scan("")) == 16 and store.read("1", limit_bytes=20_000) == SMALL + b"the end"
    assert [record.message.partition(":")[2].partition(",")[0] for record in caplog.records] == [
        f"//{hdfs.uri.removeprefix('hdfs://')}: placement is not looked at"
    ]
    done = CliRunner().invoke(app, ["checkpoint", "placement", f"{hdfs.uri}/blind/1"])
    assert done.exit_code == 0 and "does not tell" in done.stdout


def test_one_that_hangs_is_asked_once(hdfs: Hdfs, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        web = webhdfs.of_authority(hdfs.uri.removeprefix("hdfs://"))
        monkeypatch.setattr(web, "addresses", [server.getsockname()])
        store = open_store(f"{hdfs.uri}/hangs")
        write_small(store, 1)
        write_small(store, 16)
        server.settimeout(0)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()
    assert len(store.scan("")) == 16
