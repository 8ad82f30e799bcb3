"""The environment of `bench env`: the packages of `bench image`, in the forms that its arms start from.

Beside what image_inputs.py keeps, in the same folder: wheels/, the packages as pip downloads them, and more/,
wheels of what is installed later. On the cluster's shared storage, in alice's folder: the environment itself,
a tar of it, a venv of it as venv-pack packs that, and a second copy of it, to which more is installed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.lib.bench.image_inputs import PACKAGES, SITE, Inputs
from scripts.lib.cluster.client import ALICE, Cluster
from scripts.lib.demo.inputs import PLATFORMS, PYTHON
from scripts.lib.host import run

FOLDER = "home/alice/bench-env"  # below /shared
ARCHIVE = "home/alice/bench-env.tar.zst"
SECOND = "home/alice/bench-env-second"
VENV = "home/alice/bench-env-venv"
VENV_ARCHIVE = "home/alice/bench-env-venv.tar.gz"
VENV_SITE = f"lib/python{PYTHON}/site-packages"
MORE = ("scikit-learn", "joblib", "threadpoolctl", "polars")  # 10 MB of wheels, some there already
PEERS = Path("/var/tmp/bootseer-bench-peers-env")


@dataclass(frozen=True)
class Environment:
    """local: the tree on the node's disk. target: its path in the cluster, where all arms show it."""

    local: Path
    wheels: Path
    target: str
    archive: str
    venv_archive: str
    files: int
    size_bytes: int


def make(cluster: Cluster, inputs: Inputs, step: Callable[[str], None]) -> Environment:
    """Make what is not there yet. Raises ClusterError."""
    local, wheels = inputs.tree / SITE, inputs.image.with_name("wheels")
    for folder, packages in ((wheels, PACKAGES), (_more(wheels), ("--no-deps", *MORE))):
        if not (folder / "made").exists():
            step("wheels from PyPI")
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
            where = ["--dest", str(folder), f"--python-version={PYTHON}", "--only-binary=:all:"]
            run(*pip, *where, *(f"--platform={platform}" for platform in PLATFORMS), *packages)
            (folder / "made").touch()
    if not (PEERS / "made with venv-pack").exists():
        step("pip, uv and venv-pack")
        run("/usr/bin/python3", "-m", "venv", "--clear", str(PEERS))
        run(str(PEERS / "bin" / "pip"), "--quiet", "install", "uv", "venv-pack", "setuptools<81")
        (PEERS / "made with venv-pack").touch()
    shared, archive = cluster.shared / FOLDER, cluster.shared / ARCHIVE
    if not archive.exists():
        step("copy on the shared storage")
        run("cp", "-a", "--reflink=auto", str(local), str(shared))
        run("chown", "-R", f"{ALICE}:{ALICE}", str(shared))
        step("tar")
        run("tar", "--zstd", "-C", str(shared), "-cf", f"{archive}.new", ".")
        Path(f"{archive}.new").rename(archive)
    packed = cluster.shared / VENV_ARCHIVE
    if not packed.exists():
        step("venv-pack")
        venv = cluster.shared / VENV
        run("/usr/bin/python3", "-m", "venv", "--clear", "--without-pip", str(venv))
        run("cp", "-al", f"{shared}/.", str(venv / VENV_SITE))
        new = packed.with_name("bench-env-venv-new.tar.gz")  # whose ending says how it is compressed
        run(str(PEERS / "bin" / "venv-pack"), "--quiet", "--force", "-p", str(venv), "-o", str(new))
        new.chmod(0o644)
        new.rename(packed)
        run("rm", "-rf", str(venv))
    sizes = subprocess.run(
        ["find", str(local), "-type", "f", "-printf", "%s\n"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    return Environment(
        local=local,
        wheels=wheels,
        target=f"/shared/{FOLDER}",
        archive=f"/shared/{ARCHIVE}",
        venv_archive=f"/shared/{VENV_ARCHIVE}",
        files=len(sizes),
        size_bytes=sum(map(int, sizes)),
    )


def make_second(cluster: Cluster, environment: Environment) -> Environment:
    """The second copy, as the first is now. Raises ClusterError."""
    second = cluster.shared / SECOND
    run("rm", "-rf", str(second))
    run("cp", "-al", str(cluster.shared / FOLDER), str(second))
    return replace(environment, target=f"/shared/{SECOND}")


def install_more(cluster: Cluster, environment: Environment) -> None:
    """Install more packages to the second copy, as alice. Raises ClusterError."""
    uv = [str(PEERS / "bin" / "uv"), "pip", "install", "--quiet", "--no-cache", "--no-index", "--no-deps"]
    where = ["--python", str(PEERS / "bin" / "python"), "--target", str(cluster.shared / SECOND)]
    run(*uv, *where, "--find-links", str(_more(environment.wheels)), *MORE)
    run("chown", "-R", "-h", f"{ALICE}:{ALICE}", str(cluster.shared / SECOND))


def _more(wheels: Path) -> Path:
    return wheels.with_name("more")
