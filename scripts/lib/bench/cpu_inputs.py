"""The inputs of `bench cpu`'s jobs: a checkpoint, an environment, and an image that has the same packages.

Image and environment take minutes, so they are kept below CACHE, in a folder named by the recipe's digest. On
the cluster's shared storage all lie in alice's folder, and go with the cluster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.bench.image_inputs import SITE, SQUASHFS, install, kept
from scripts.lib.cluster.client import ALICE, Cluster
from scripts.lib.demo.inputs import PLATFORMS, PYTHON, SUITE
from scripts.lib.host import run

CACHE = Path("/var/tmp/bootseer-bench-cpu")
FOLDER = "home/alice/bench-cpu"  # below /shared
# Large libraries and thousands of small files: 0.6 GB.
PACKAGES = ["pyarrow==26.0.1", "jaxlib==0.10.2", "scipy==1.17.1", "pandas==3.1.1", "scikit-learn==1.9.1"]
CHECKPOINT_BYTES = 2**30
RECIPE = [SUITE, *PACKAGES, *PLATFORMS, *SQUASHFS, "2"]  # the last counts changes of this module


@dataclass(frozen=True)
class Inputs:
    """Their paths in the cluster."""

    checkpoint: str
    environment: str
    image: str


def make(cluster: Cluster, step: Callable[[str], None]) -> Inputs:
    """Make what is not there yet. step: told what is being made. Raises ClusterError."""
    made = kept(CACHE, RECIPE)
    if not (made / "made").exists():
        _make_tree(made / "root", step)
        step("squashfs")
        run("mksquashfs", str(made / "root"), str(made / "image.sqsh"), *SQUASHFS)
        (made / "made").touch()
    folder = cluster.shared / FOLDER
    image, environment, checkpoint = (folder / name for name in ("image.sqsh", "env", "model.bin"))
    if not checkpoint.exists():
        step("copies on the shared storage")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run("cp", "--reflink=auto", str(made / "image.sqsh"), str(image))
        run("/usr/bin/python3", "-m", "venv", "--without-pip", "--symlinks", str(environment))
        packages = environment / "lib" / f"python{PYTHON}" / "site-packages"
        run("cp", "-a", "--reflink=auto", f"{made / 'root' / SITE}/.", str(packages))
        _make_checkpoint(folder / "model.new")
        run("chown", "-R", "-h", f"{ALICE}:{ALICE}", str(folder))
        (folder / "model.new").rename(checkpoint)
    return Inputs(*(f"/shared/{FOLDER}/{path.name}" for path in (checkpoint, environment, image)))


def _make_tree(root: Path, step: Callable[[str], None]) -> None:
    """The image's files, which every user may read."""
    step("Debian and Python, by mmdebstrap")
    run("mmdebstrap", "--quiet", "--variant=minbase", "--include=python3", SUITE, str(root))
    install(root, PACKAGES, step)
    run("chmod", "-R", "a+rX", str(root))


def _make_checkpoint(path: Path) -> None:
    """Random bytes; an old time, for a young one would be waited for."""
    with path.open("wb") as file:
        for _ in range(CHECKPOINT_BYTES // 2**26):
            file.write(os.urandom(2**26))
    os.utime(path, (1_700_000_000, 1_700_000_000))
