"""The environment of `bench env`: the packages of `bench image`, in the forms that its arms start from.

Beside what image_inputs.py keeps, in the same folder: wheels/, the packages as pip downloads them. On the
cluster's shared storage, in alice's folder: the environment itself, and a tar of it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.image_inputs import ALICE, PACKAGES, PLATFORMS, PYTHON, SITE, Inputs, run
from cluster.client import Cluster

FOLDER = "home/alice/bench-env"  # below /shared
ARCHIVE = "home/alice/bench-env.tar.zst"
PEERS = Path("/var/tmp/bootseer-bench-peers-env")


@dataclass(frozen=True)
class Environment:
    """local: the tree on the node's disk. target: its path in the cluster, where all arms show it."""

    local: Path
    wheels: Path
    target: str
    archive: str
    files: int
    size_bytes: int


def make(cluster: Cluster, inputs: Inputs, step: Callable[[str], None]) -> Environment:
    """Make what is not there yet. Raises ClusterError."""
    local, wheels = inputs.tree / SITE, inputs.image.with_name("wheels")
    if not (wheels / "made").exists():
        step("wheels from PyPI")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
        where = ["--dest", str(wheels), f"--python-version={PYTHON}", "--only-binary=:all:"]
        run(*pip, *where, *(f"--platform={platform}" for platform in PLATFORMS), *PACKAGES)
        (wheels / "made").touch()
    if not (PEERS / "made").exists():
        step("pip and uv")
        run("/usr/bin/python3", "-m", "venv", "--clear", str(PEERS))
        run(str(PEERS / "bin" / "pip"), "--quiet", "install", "uv")
        (PEERS / "made").touch()
    shared, archive = cluster.shared / FOLDER, cluster.shared / ARCHIVE
    if not archive.exists():
        step("copy on the shared storage")
        run("cp", "-a", "--reflink=auto", str(local), str(shared))
        run("chown", "-R", f"{ALICE}:{ALICE}", str(shared))
        step("tar")
        run("tar", "--zstd", "-C", str(shared), "-cf", f"{archive}.new", ".")
        Path(f"{archive}.new").rename(archive)
    sizes = subprocess.run(
        ["find", str(local), "-type", "f", "-printf", "%s\n"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    return Environment(
        local, wheels, f"/shared/{FOLDER}", f"/shared/{ARCHIVE}", len(sizes), sum(map(int, sizes))
    )
