"""The store's records of alice's starts: names, traces and job classes, small files beside the blobs.

They are what makes one arm differ from another, so each arm begins with the records that it is meant to have.
Blobs never change: records that were set aside still lead to theirs.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from scripts.lib.cluster.client import ALICE, Cluster
from scripts.lib.cluster.layout import ClusterError

RECORDS = ("names", "traces", "classes")


def keep(cluster: Cluster, name: str) -> None:
    """Set the records aside as they are now."""
    aside = _aside(cluster, name)
    shutil.rmtree(aside, ignore_errors=True)
    for records in RECORDS:
        _copy(folder(cluster) / records, aside / records)


def restore(cluster: Cluster, name: str) -> None:
    """Give the store the records that were set aside under this name, and no others."""
    for records in RECORDS:
        shutil.rmtree(folder(cluster) / records, ignore_errors=True)
        _copy(_aside(cluster, name) / records, folder(cluster) / records)


def folder(cluster: Cluster) -> Path:
    """alice's folder of the store, as this host sees it."""
    return cluster.shared / f"bootseer/users/{ALICE}"


def _aside(cluster: Cluster, name: str) -> Path:
    return cluster.state_dir / "demo" / name


def _copy(source: Path, target: Path) -> None:
    """A folder, if it is there, under a new name, with its owners and times."""
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["cp", "-a", source, target], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"records cannot be copied: {done.stderr.strip()}")
