"""A real Slurm cluster for tests (scripts/cluster): three nodes, two users, shared storage over the network.

The session takes the cluster that is up, or brings one up and takes it down at its end. Tests of other
folders get the same fixture by `pytest_plugins` or by lying here.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lib.cluster.client import Cluster


def no_cluster_because() -> str:
    """Why this machine cannot hold a cluster, or nothing."""
    if os.geteuid() != 0:
        return "a cluster needs root"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    if tried.returncode != 0:
        return f"a cluster needs network namespaces: {tried.stderr.decode().strip()}"
    return ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of three nodes that is up."""
    if reason := no_cluster_because():
        pytest.skip(reason)
    instance = Cluster.default()
    was_up = instance.up
    # Installing packages may take its time; says so at once when it is up with another number of nodes.
    instance.script("up", "--nodes", str(instance.node_count), timeout_s=900)
    yield instance
    if not was_up:
        instance.script("down")


@pytest.fixture
def slurm_conf(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands run on this host and ask the cluster's daemons."""
    for line in cluster.script("env").stdout.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        if name == "SLURM_CONF":
            monkeypatch.setenv(name, value)


@pytest.fixture
def spare_cluster() -> Iterator[Cluster]:
    """A second cluster's place, where nothing is up; taken down afterwards."""
    if reason := no_cluster_because():
        pytest.skip(reason)
    instance = Cluster(Path(f"/var/tmp/bootseer-cluster-test-{os.getpid()}"))
    yield instance
    instance.script("down")


@pytest.fixture
def folder(cluster: Cluster) -> Iterator[Path]:
    """A folder of alice on the shared storage, as this host sees it; see `shown`."""
    path = cluster.shared / "home" / "alice" / f"plugin-{time.monotonic_ns()}"
    path.mkdir()
    os.chown(path, 20001, 20001)
    yield path
    for entry in path.iterdir():
        entry.unlink()
    path.rmdir()
