"""What the jobs of `bench cpu` read: a checkpoint, an environment, and an image that has the same packages.

Image and environment take minutes, so they are kept below CACHE, in a folder named by the recipe's digest. On
the cluster's shared storage all lie in alice's folder, and go with the cluster.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.image_inputs import ALICE, PLATFORMS, PYTHON, SITE, SQUASHFS, SUITE, run
from cluster.client import Cluster

CACHE = Path("/var/tmp/bootseer-bench-cpu")
FOLDER = "home/alice/bench-cpu"  # below /shared
# Large libraries and thousands of small files: 0.6 GB.
PACKAGES = ["pyarrow==26.0.1", "jaxlib==0.10.2", "scipy==1.17.1", "pandas==3.1.1", "scikit-learn==1.9.1"]
CHECKPOINT_BYTES = 2**30
RECIPE = [SUITE, *PACKAGES, *PLATFORMS, *SQUASHFS, "1"]  # the last counts changes of this module


@dataclass(frozen=True)
class Inputs:
    """Their paths in the cluster."""

    checkpoint: str
    environment: str
    image: str


def make(cluster: Cluster, step: Callable[[str], None]) -> Inputs:
    """Make what is not there yet. step: told what is being made. Raises ClusterError."""
    kept = CACHE / hashlib.sha256("\n".join(RECIPE).encode()).hexdigest()[:12]
    if not (kept / "made").exists():
        shutil.rmtree(CACHE, ignore_errors=True)
        kept.mkdir(parents=True)
        _make_tree(kept / "root", step)
        step("squashfs")
        run("mksquashfs", str(kept / "root"), str(kept / "image.sqsh"), *SQUASHFS)
        (kept / "made").touch()
    folder = cluster.shared / FOLDER
    image, environment, checkpoint = (folder / name for name in ("image.sqsh", "env", "model.bin"))
    if not checkpoint.exists():
        step("copies on the shared storage")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run("cp", "--reflink=auto", str(kept / "image.sqsh"), str(image))
        run("/usr/bin/python3", "-m", "venv", "--without-pip", "--symlinks", str(environment))
        packages = environment / "lib" / f"python{PYTHON}" / "site-packages"
        run("cp", "-a", "--reflink=auto", f"{kept / 'root' / SITE}/.", str(packages))
        _make_checkpoint(folder / "model.new")
        run("chown", "-R", "-h", f"{ALICE}:{ALICE}", str(folder))
        (folder / "model.new").rename(checkpoint)
    return Inputs(*(f"/shared/{FOLDER}/{path.name}" for path in (checkpoint, environment, image)))


def _make_tree(root: Path, step: Callable[[str], None]) -> None:
    """The image's files, which every user may read."""
    step("Debian and Python, by mmdebstrap")
    run("mmdebstrap", "--quiet", "--variant=minbase", "--include=python3", SUITE, str(root))
    step(f"{len(PACKAGES)} packages from PyPI")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-compile"]
    where = ["--target", str(root / SITE), "--upgrade", f"--python-version={PYTHON}", "--only-binary=:all:"]
    run(*pip, *where, *(f"--platform={platform}" for platform in PLATFORMS), *PACKAGES)
    step("byte code")
    run("/usr/bin/python3", "-m", "compileall", "-q", "-j0", str(root / SITE), check=False)
    run("chmod", "-R", "a+rX", str(root))


def _make_checkpoint(path: Path) -> None:
    """Random bytes; an old time, for a young one would be waited for."""
    with path.open("wb") as file:
        for _ in range(CHECKPOINT_BYTES // 2**26):
            file.write(os.urandom(2**26))
    os.utime(path, (1_700_000_000, 1_700_000_000))
