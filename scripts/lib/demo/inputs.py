"""The artifacts that the demo's job starts from: an image, an environment and a checkpoint, all real.

They lie in alice's folder on the cluster's shared storage and go with the cluster. The environment is made
for the image's Python: its packages are downloaded on this machine, which has the network.

The packages are those whose imports read much for the CPU that they cost. Four nodes share this machine's
cores: with packages that compute for long while they are imported, these would be the limit, not the link.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.lib.cluster.client import ALICE, BOOTSEER, Cluster
from scripts.lib.cluster.layout import REPO
from scripts.lib.host import run

HERE = Path(__file__).resolve().parent
FOLDER = "home/alice/demo"  # below /shared
SUITE = "bookworm"
PYTHON = "3.11"  # of that suite
STRIPES = 8
# Wheels run on the image's glibc when they are of these; older tags are what most of them have.
PLATFORMS = ["manylinux2014_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64"]
STEPS = 8  # of make and save
MAKE_TIMEOUT_S = 600.0

Step = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """How large they are. imports: modules of the packages, as the job imports them."""

    packages: tuple[str, ...]
    imports: tuple[str, ...]
    checkpoint_mib: int


FULL = Inputs(
    packages=("jax", "pyarrow", "numba", "vtk", "av", "h5py", "safetensors"),
    imports=(
        "jax.numpy",
        "pyarrow.dataset",
        "pyarrow.flight",
        "numba.core.types",
        "vtkmodules.all",
        "av",
        "h5py",
    ),
    checkpoint_mib=64,
)
QUICK = Inputs(
    packages=("pyarrow", "numpy", "safetensors"),
    imports=("pyarrow.dataset", "pyarrow.flight"),
    checkpoint_mib=32,
)


def make(cluster: Cluster, inputs: Inputs, step: Step) -> None:
    """Make them, where they are not there yet. step: told what is being made."""
    folder = cluster.shared / FOLDER
    made = folder / "made.json"
    if made.exists() and json.loads(made.read_text()) == json.loads(json.dumps(asdict(inputs))):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)
    with tempfile.TemporaryDirectory(prefix="bootseer-demo-", dir="/var/tmp") as scratch:
        root = Path(scratch) / "root"
        step("image: Debian and Python, by mmdebstrap")
        run("mmdebstrap", "--quiet", "--variant=minbase", "--include=python3", SUITE, str(root))
        (root / "shared").mkdir()
        step("image: squashfs")
        compression = ("-comp", "zstd", "-Xcompression-level", "3")
        quietly = ("-noappend", "-quiet", "-no-progress")
        run("mksquashfs", str(root), str(folder / "image.sqsh"), *compression, *quietly)
        step(f"environment: {' '.join(inputs.packages)}")
        _make_environment(cluster, root, Path(scratch) / "source", inputs.packages)
        step("environment: byte code")
        compileall = ("-m", "compileall", "-q", "-j0", f"/shared/{FOLDER}/venv")
        in_image(cluster, root, "/usr/bin/python3", *compileall)
        step(f"checkpoint: {inputs.checkpoint_mib} MiB of safetensors")
        for name in ("train.py", "checkpoint.py", "job.sh", "in_image.sh"):
            shutil.copy(HERE / name, folder / name)
        (folder / "imports").write_text("\n".join(inputs.imports) + "\n")
        python, program = f"/shared/{FOLDER}/venv/bin/python", f"/shared/{FOLDER}/checkpoint.py"
        made_in_image = f"/shared/{FOLDER}/model.safetensors"
        in_image(cluster, root, python, program, made_in_image, str(inputs.checkpoint_mib))
    run("chown", "-R", f"{ALICE}:{ALICE}", str(folder))
    made.write_text(json.dumps(asdict(inputs)))


def save(cluster: Cluster, step: Step) -> None:
    """Put them into the store, as alice does once. What was saved or learned before is forgotten.

    The site has a key, as a real one: so the kernel mounts what its agents pack, and the environment is saved
    in a job, whose agent packs it.
    """
    shutil.rmtree(cluster.shared / f"bootseer/users/{ALICE}", ignore_errors=True)
    cluster.script("drop-caches", "--shared")  # they were removed behind the nodes
    in_job = ("srun", "--bootseer", "--job-name=save", "--nodes=1", "--chdir=/tmp")
    stripe = (BOOTSEER, "checkpoint", "stripe", "--stripes", str(STRIPES))
    commands = {
        "image into the store": (BOOTSEER, "image", "push", f"/shared/{FOLDER}/image.sqsh"),
        "environment into the store": (*in_job, BOOTSEER, "env", "save", f"/shared/{FOLDER}/venv"),
        "checkpoint into the store": (*stripe, f"/shared/{FOLDER}/model.safetensors"),
    }
    cluster.run("login", BOOTSEER, "store", "init", timeout_s=MAKE_TIMEOUT_S)
    if not (cluster.state_dir / "etc/bootseer/site.key").exists():
        cluster.run("login", BOOTSEER, "image", "make-key")
    for title, command in commands.items():
        step(title)
        cluster.run("login", *command, user="alice", timeout_s=MAKE_TIMEOUT_S)


def _make_environment(cluster: Cluster, root: Path, source: Path, packages: tuple[str, ...]) -> None:
    venv = cluster.shared / FOLDER / "venv"
    in_image(cluster, root, "/usr/bin/python3", "-m", "venv", "--without-pip", f"/shared/{FOLDER}/venv")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-compile"]
    target = ["--target", str(venv / "lib" / f"python{PYTHON}" / "site-packages"), "--upgrade"]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    run(*pip, *target, *platforms, f"--python-version={PYTHON}", "--only-binary=:all:", *packages)
    copy_source(source)
    run(*pip, *target, "--no-deps", str(source))


def copy_source(folder: Path) -> None:
    """This project, for pip: setuptools builds in the folder that it is given."""
    shutil.copytree(REPO / "bootseer_slurm", folder / "bootseer_slurm")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPO / name, folder)


def in_image(cluster: Cluster, root: Path, *command: str) -> None:
    """Run a command with the image's tree as /. Raises ClusterError when it fails."""
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
    run("bwrap", *mounts, "--", *command, env=environ)
