"""What the store knows of alice's starts: names, traces and job classes, small files beside the blobs.

They are what makes one arm differ from another, so each arm begins with the records that it is meant to have.
Blobs never change: records that were set aside still lead to theirs.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from cluster.client import Cluster
from cluster.layout import ClusterError
from demo.inputs import ALICE

RECORDS = ("names", "traces", "classes")
CLASSES = "classes"


def keep(cluster: Cluster, name: str) -> None:
    """Set the records aside as they are now."""
    aside = _aside(cluster, name)
    shutil.rmtree(aside, ignore_errors=True)
    for records in RECORDS:
        _copy(folder(cluster) / records, aside / records)


def restore(cluster: Cluster, name: str) -> None:
    """Give the store the names and traces that were set aside under this name, and no others.

    Job classes are only put back, for sshfs fails (libfuse 3.14, `unlink_node`) when a node writes a file anew that
    it knew and that was removed behind it. A start of which nothing shall be known needs a job name of its own.
    """
    for records in RECORDS:
        now, kept = folder(cluster) / records, _aside(cluster, name) / records
        for path in now.rglob("*"):
            if records != CLASSES and path.is_file() and not (kept / path.relative_to(now)).exists():
                path.unlink()
        _copy(kept, now)


def folder(cluster: Cluster) -> Path:
    """alice's folder of the store, as this host sees it."""
    return cluster.shared / f"bootseer/users/{ALICE}"


def _aside(cluster: Cluster, name: str) -> Path:
    return cluster.state_dir / "demo" / name


def _copy(source: Path, target: Path) -> None:
    """What is in a folder, if it is there, into another, with its owners and times."""
    if not source.exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["cp", "-a", f"{source}/.", target], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"records cannot be copied: {done.stderr.strip()}")
