"""The image that `bench image` starts from: Debian, Python and training frameworks from PyPI, byte-compiled.

Made once and kept, since it takes minutes: below CACHE, in a folder named by the recipe's digest (what an
older recipe made is deleted). In it:

    root/         the tree, on the disk's own file system
    image.sqsh    the same as squashfs, all root's
    registry/     the storage of a docker-registry that has it as `bench:1`, in two layers
    made          written last: without it the folder is made anew

On the cluster's shared storage the image lies in alice's folder and goes with the cluster.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.cluster.client import ALICE, Cluster
from scripts.lib.cluster.layout import ClusterError, poll
from scripts.lib.demo.inputs import PLATFORMS, PYTHON, SUITE
from scripts.lib.host import run

CACHE = Path("/var/tmp/bootseer-bench-image")
SITE = f"usr/local/lib/python{PYTHON}/dist-packages"
# A node's image has more in it than one job imports; see IMPORTS.
PACKAGES = [
    "tensorflow-cpu==2.21.0",
    "paddlepaddle==3.3.1",
    "jax==0.10.2",
    "jaxlib==0.10.2",
    "flax==0.12.8",
    "optax==0.2.8",
    "ray==2.60.0",
    "transformers==5.24.0",
    "datasets==5.2.0",
    "pandas==3.1.1",
    "scipy==1.17.1",
    "scikit-learn==1.9.1",
    "pyarrow==26.0.1",
    "onnxruntime==1.32.0",
    "matplotlib==3.11.2",
    "safetensors==0.8.0",
]
SQUASHFS = ["-comp", "zstd", "-Xcompression-level", "3", "-all-root", "-noappend", "-quiet", "-no-progress"]
# What the job imports, and folders that the arm which reads much of the image reads whole.
IMPORTS = ["jax", "flax.linen", "optax", "pandas", "pyarrow.parquet", "scipy.sparse", "transformers"]
HEAVY = ["tensorflow", "jaxlib"]
FOLDER = "home/alice/bench-image"  # below /shared
REFERENCE = "bench:1"
RECIPE = [SUITE, *PACKAGES, *PLATFORMS, *SQUASHFS, "1"]  # the last counts changes of this module


@dataclass(frozen=True)
class Inputs:
    """The inputs that were made: the tree, the image, the registry's storage, and sizes in bytes."""

    tree: Path
    image: Path
    registry: Path
    image_bytes: int
    tree_bytes: int
    sha256: str
    shared: str  # the image's path in the cluster


def make(cluster: Cluster, step: Callable[[str], None]) -> Inputs:
    """Make what is not there yet, and put the image on the cluster's shared storage.

    step: told what is being made. Raises ClusterError.
    """
    folder = kept(CACHE, RECIPE)
    if not (folder / "made").exists():
        _make_tree(folder, step)
        step("squashfs (minutes)")
        run("mksquashfs", str(folder / "root"), str(folder / "image.sqsh"), *SQUASHFS)
        (folder / "made").write_text(f"{_tree_bytes(folder / 'root')} {_sha256(folder / 'image.sqsh')}")
    tree_bytes, sha256 = (folder / "made").read_text().split()
    image = folder / "image.sqsh"
    place = cluster.shared / FOLDER
    if not (place / image.name).exists():
        step("copy on the shared storage")
        place.mkdir(exist_ok=True)
        run("cp", "--reflink=auto", str(image), str(place / "image.new"))
        run("chown", "-R", f"{ALICE}:{ALICE}", str(place))
        (place / "image.new").rename(place / image.name)
    shared = f"/shared/{FOLDER}/{image.name}"
    return Inputs(
        folder / "root", image, folder / "registry", image.stat().st_size, int(tree_bytes), sha256, shared
    )


def kept(cache: Path, recipe: Sequence[str]) -> Path:
    """The folder of what a recipe makes: empty, and without those of other recipes, until it has `made`."""
    folder = cache / hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:12]
    if not (folder / "made").exists():
        shutil.rmtree(cache, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def install(root: Path, packages: Sequence[str], step: Callable[[str], None]) -> None:
    """Packages for the Python of an image's tree, byte-compiled by it. Raises ClusterError."""
    step(f"{len(packages)} packages from PyPI (minutes)")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-compile"]
    where = ["--target", str(root / SITE), "--upgrade", f"--python-version={PYTHON}", "--only-binary=:all:"]
    run(*pip, *where, *(f"--platform={platform}" for platform in PLATFORMS), *packages)
    step("byte code")
    compiling = ["/usr/bin/python3", "-m", "compileall", "-q", "-j2", f"/{SITE}"]
    # Files for other versions of Python, which some packages hold, do not compile.
    _bwrap(root, *compiling, check=False)


def _make_tree(folder: Path, step: Callable[[str], None]) -> None:
    """root/, and the registry's two layers as it grows."""
    root, layout = folder / "root", f"{folder / 'oci'}:1"
    step("Debian and Python, by mmdebstrap")
    run("mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,libgomp1", SUITE, str(root))
    (root / "shared").mkdir()
    run("umoci", "init", "--layout", str(folder / "oci"))
    run("umoci", "new", "--image", layout)
    run("umoci", "insert", "--image", layout, str(root), "/")
    install(root, PACKAGES, step)
    step("layer of the registry's image (minutes)")
    run("umoci", "insert", "--image", layout, str(root / SITE), f"/{SITE}")
    step("registry")
    with Registry(folder / "registry", "127.0.0.1:5999"):
        target = f"docker://127.0.0.1:5999/{REFERENCE}"
        skopeo = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        run(*skopeo, f"oci:{layout}", target)
    shutil.rmtree(folder / "oci")


class Registry:
    """Debian's docker-registry over a folder, on this machine or (`start`) in a machine of the cluster."""

    def __init__(
        self, storage: Path, address: str, start: Callable[..., subprocess.Popen[str]] | None = None
    ) -> None:
        """address: HOST:PORT to listen on. Raises ClusterError when it is not there after 10 s."""
        self._config = storage.with_name("registry.yml")
        storage.mkdir(exist_ok=True)
        self._config.write_text(
            "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {storage}}}}}\nhttp: {{addr: '{address}'}}\n"
        )
        # What runs in a machine of the cluster is a child of what was started: it ends with its stdin.
        shell = f"docker-registry serve {self._config} 2>/dev/null & read -r end; kill $!"
        argv = ["sh", "-c", shell]
        self._process = (start or _start_here)(*argv)
        host, port = address.rsplit(":", 1)
        if not poll(lambda: _answers(host, int(port)), timeout_s=10):
            self.close()
            raise ClusterError(f"docker-registry does not answer on {address}")

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def _start_here(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(argv, stdin=subprocess.PIPE, text=True)


def _bwrap(root: Path, *command: str, check: bool) -> None:
    # Byte code is what this is about: a machine may have it switched off.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    mounts = ["--bind", str(root), "/", "--dev", "/dev", "--proc", "/proc"]
    run("bwrap", *mounts, "--", *command, env=environ, check=check)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        time.sleep(0.1)
        return False
    return True


def _tree_bytes(root: Path) -> int:
    done = subprocess.run(
        ["du", "-s", "--apparent-size", "--block-size=1", str(root)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[0])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
