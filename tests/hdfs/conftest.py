"""A real HDFS for the tests of this level: a NameNode and three DataNodes, two replicas of each block."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FOLDER = Path("/var/tmp/bootseer-hdfs-tests")
NODES = ("n1", "n2", "n3")


class Hdfs:
    """The cluster, and how its daemons are treated."""

    uri = ""

    def script(self, *arguments: str) -> str:
        """Run scripts/hdfs; what it prints."""
        done = subprocess.run(
            [str(REPO / "scripts" / "hdfs"), *arguments],
            env=os.environ | {"BOOTSEER_HDFS_DIR": str(FOLDER)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def block_files(self, node: str) -> list[Path]:
        """The block replicas on a DataNode's disk."""
        return [path for path in (FOLDER / node / "data").rglob("blk_*") if path.suffix != ".meta"]


@pytest.fixture(scope="session")
def hdfs_cluster() -> Iterator[Hdfs]:
    cluster = Hdfs()
    cluster.script("down")
    cluster.script("up", "--datanodes", str(len(NODES)), "--replication", "2")
    try:
        cluster.uri = cluster.script("uri")
        yield cluster
    finally:
        cluster.script("down")
        assert not FOLDER.exists(), "it leaves nothing"


@pytest.fixture
def hdfs(hdfs_cluster: Hdfs) -> Iterator[Hdfs]:
    """It, with all that it has running."""
    yield hdfs_cluster
    for node in ("namenode", *NODES):
        hdfs_cluster.script("control", node, "start")
    hdfs_cluster.script("link", "all", "off")
    hdfs_cluster.script("wait")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_java = shutil.which("java") is not None and any(Path("/var/tmp").glob("bootseer-hadoop-*"))
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.hdfs)
            if not has_java or os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs scripts/hdfs install, and root"))
