"""What the demo's job starts from: an image, an environment and a checkpoint, all real.

They lie in alice's folder on the cluster's shared storage and go with the cluster. The environment is made
for the image's Python: its packages are downloaded on this machine, which has the network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from cluster.client import Cluster
from cluster.layout import REPO, ClusterError

HERE = Path(__file__).resolve().parent
FOLDER = "home/alice/demo"  # below /shared
SUITE = "bookworm"
PYTHON = "3.11"  # of that suite
PACKAGES = [
    "jax",
    "flax",
    "optax",
    "transformers",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "matplotlib",
    "safetensors",
]
STRIPES = 8
ALICE = 20001
# Wheels run on the image's glibc when they are of these; older tags are what most of them have.
PLATFORMS = ["manylinux2014_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64"]


def make(cluster: Cluster, *, checkpoint_mib: int, step: Callable[[str], None]) -> None:
    """Make the inputs, where they are not there yet. step: told what is being made."""
    folder = cluster.shared / FOLDER
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(mode=0o755, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bootseer-demo-", dir="/var/tmp") as scratch:
        root = Path(scratch) / "root"
        step("image: Debian and Python, by mmdebstrap")
        _run("mmdebstrap", "--quiet", "--variant=minbase", "--include=python3", SUITE, str(root))
        (root / "shared").mkdir()
        step("image: squashfs")
        _run("mksquashfs", str(root), str(folder / "image.sqsh"), "-comp", "zstd", "-noappend", "-quiet",
             "-no-progress")  # fmt: skip
        step(f"environment: {' '.join(PACKAGES)}")
        _make_environment(cluster, root, Path(scratch) / "source")
        step("environment: byte-compiling")
        _in_image(
            cluster, root, "/usr/bin/python3", "-m", "compileall", "-q", "-j2", f"/shared/{FOLDER}/venv"
        )
        step(f"checkpoint: {checkpoint_mib} MiB of safetensors")
        for name in ("train.py", "checkpoint.py", "job.sh", "in_image.sh"):
            shutil.copy(HERE / name, folder / name)
        python, program = f"/shared/{FOLDER}/venv/bin/python", f"/shared/{FOLDER}/checkpoint.py"
        made = f"/shared/{FOLDER}/model.new"
        _in_image(cluster, root, python, program, made, str(checkpoint_mib))
    _run("chown", "-R", f"{ALICE}:{ALICE}", str(folder))
    (folder / "model.new").rename(folder / "model.safetensors")


def save(cluster: Cluster) -> None:
    """Put them into the store, as alice does once; shows the progress of each."""
    bootseer = str(REPO / ".venv" / "bin" / "bootseer")
    if cluster.exec("login", bootseer, "store", "init").returncode != 0:
        raise ClusterError("the store cannot be made")
    for command in (
        ("image", "push", f"/shared/{FOLDER}/image.sqsh"),
        ("env", "save", f"/shared/{FOLDER}/venv"),
        ("checkpoint", "stripe", "--stripes", str(STRIPES), f"/shared/{FOLDER}/model.safetensors"),
    ):
        cluster.show("login", bootseer, *command, user="alice")


def _make_environment(cluster: Cluster, root: Path, source: Path) -> None:
    venv = cluster.shared / FOLDER / "venv"
    _in_image(cluster, root, "/usr/bin/python3", "-m", "venv", "--without-pip", f"/shared/{FOLDER}/venv")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-compile"]
    target = ["--target", str(venv / "lib" / f"python{PYTHON}" / "site-packages"), "--upgrade"]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    _run(*pip, *target, *platforms, f"--python-version={PYTHON}", "--only-binary=:all:", *PACKAGES)
    # A copy: setuptools builds in the folder it is given.
    shutil.copytree(REPO / "bootseer_slurm", source / "bootseer_slurm")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPO / name, source)
    _run(*pip, *target, "--no-deps", str(source))


def _in_image(cluster: Cluster, root: Path, *command: str) -> None:
    # Byte code is what this is about: a machine may have it switched off.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    mounts = [
        "--bind",
        str(root),
        "/",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
        "--bind",
        str(cluster.shared),
        "/shared",
    ]
    _run("bwrap", *mounts, "--", *command, env=environ)


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise ClusterError(f"{command[0]} failed:\n{done.stdout[-3000:]}")
