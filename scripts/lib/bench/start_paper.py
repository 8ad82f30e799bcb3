"""The paper's comparison, on one node: each job imports and installs for itself, or starts with --bootseer.

stock   the container's layers come from a registry and are unpacked and made a squashfs, as enroot does; pip
        installs the packages from an index; cp copies the checkpoint (start_stock.sh)

All three come from the store server, over its link. The job is the demo's: the same packages of the same
versions, the same imports, the same weights. Measured from the hook in the prolog until training began.
"""

from __future__ import annotations

import itertools
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from scripts.lib.bench import index
from scripts.lib.bench.image_arms import registry
from scripts.lib.bench.image_inputs import Registry
from scripts.lib.bench.rows import Row
from scripts.lib.bench.start_rows import Result, describe, floor_row, limit_s, seconds_rows
from scripts.lib.cluster.client import ALICE, Cluster
from scripts.lib.cluster.layout import STORE
from scripts.lib.demo import arms, inputs
from scripts.lib.demo.starts import Start, Tell
from scripts.lib.host import run

ROUNDS = 2
SHORTER = 0.85
REFERENCE = "demo:1"
WORK = "/var/lib/bootseer/bench-start"  # on the node's disk
# The lock file is no requirements.txt: beside an environment that would be another environment.
JOB, STOCK_SH, LOCK = "stock_job.sh", "stock.sh", "stock_lock.txt"
HERE = Path(__file__).resolve().parent
STEPS = arms.count((arms.PLAIN,) * 4, ROUNDS)
JOB_SH = """#!/bin/bash
#SBATCH --job-name=demo-stock --ntasks-per-node=1 --mem=3G
mapfile -t modules < imports
srun --kill-on-bad-exit=1 ./{stock} {registry}/{reference} {index}simple/ {work} "${{modules[@]}}"
"""


@dataclass(frozen=True)
class Sources:
    """The offers of the store server beside /shared: the storage of a registry, and an index's root."""

    registry: Path
    index: Path


def measure(cluster: Cluster, link: str, tell: Tell, done: Callable[[], None]) -> list[Row]:
    """The rows of one link. cluster: of one node."""
    sources = make(cluster, tell)
    with registry(cluster, sources.registry) as images, index.serving(cluster, sources.index) as packages:
        folder = cluster.shared / inputs.FOLDER
        words = {"registry": images, "reference": REFERENCE, "index": packages, "work": WORK}
        (folder / JOB).write_text(JOB_SH.format(stock=STOCK_SH, **words))
        stock = arms.Arm("stock", ("--bootseer=observe",), arms.SAVED, JOB, _preparing(sources))
        chosen = [stock, arms.PLAIN, arms.FIRST, arms.AGAIN]
        measured = arms.measure(cluster, chosen, rounds=ROUNDS, store_link=link, tell=tell, done=done)
    result = arms.result(cluster, measured, link)
    return rows_of(result, _parts(folder, measured.arms["stock"]))


def rows_of(result: Result, parts: str) -> list[Row]:
    """The rows of one link's starts. parts: how long those of stock took, in words."""
    seconds = {name: arm["median_s"] for name, arm in result["arms"].items()}
    title = f"paper, {result['store_link']}"
    limit = 1 - limit_s(result) / seconds["stock"]

    def shorter(name: str) -> Row:
        how = f"{describe(result)}; of stock {parts}"
        value = 1 - seconds[name] / seconds["stock"]
        return Row(f"{title}: {name} shorter than stock by", value, "", SHORTER, limit, how, at_least=True)

    return [
        shorter("first"),
        shorter("again"),
        floor_row(title, result, "again"),
        *seconds_rows(title, result),
    ]


def make(cluster: Cluster, tell: Tell) -> Sources:
    """The demo's inputs in a registry and in an index, where they are not there yet. Raises ClusterError."""
    folder = cluster.state_dir / "bench-start"
    sources = Sources(folder / "registry", folder / "index")
    demo = cluster.shared / inputs.FOLDER
    of = (demo / "made.json").read_text()
    made = folder / "made"
    if not made.exists() or made.read_text() != of:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tell("image for the registry")
        _make_image(cluster, demo / "image.sqsh", folder, sources.registry)
        tell("wheels for the index")
        _make_index(demo / "venv" / "lib" / f"python{inputs.PYTHON}" / "site-packages", folder, sources.index)
        made.write_text(of)
    shutil.copy(folder / LOCK, demo / LOCK)
    shutil.copy(HERE / "start_stock.sh", demo / STOCK_SH)
    return sources


def _make_image(cluster: Cluster, squashfs: Path, folder: Path, storage: Path) -> None:
    """The demo's image with pip, as two layers in a registry's storage."""
    root, layout = folder / "root", f"{folder / 'oci'}:1"
    run("unsquashfs", "-no-progress", "-quiet", "-d", str(root), str(squashfs))
    run("umoci", "init", "--layout", str(folder / "oci"))
    run("umoci", "new", "--image", layout)
    run("umoci", "insert", "--image", layout, str(root), "/")
    pip = root / "opt" / "pip"
    run(*_pip("install", "--no-compile", "--target", str(pip)), "pip")
    inputs.in_image(cluster, root, "/usr/bin/python3", "-m", "compileall", "-q", "/opt/pip")
    run("umoci", "insert", "--image", layout, str(pip), "/opt/pip")
    with Registry(storage, "127.0.0.1:5999"):
        skopeo = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        run(*skopeo, f"oci:{layout}", f"docker://127.0.0.1:5999/{REFERENCE}")
    for made in (root, folder / "oci"):
        shutil.rmtree(made)


def _make_index(site: Path, folder: Path, root: Path) -> None:
    """Wheels of all that the demo's environment has, laid out as PEP 503 asks, and their versions."""
    wheels = folder / "wheels"
    found = metadata.distributions(path=[str(site)])
    frozen = sorted(f"{each.metadata['Name']}=={each.version}" for each in found)
    theirs = [line for line in frozen if not line.startswith("bootseer-slurm=")]
    where = ["--dest", str(wheels), f"--python-version={inputs.PYTHON}", "--only-binary=:all:", "--no-deps"]
    run(*_pip("download"), *where, *(f"--platform={each}" for each in inputs.PLATFORMS), *theirs)
    inputs.copy_source(folder / "source")
    run(*_pip("wheel"), "--no-deps", "--wheel-dir", str(wheels), str(folder / "source"))
    for wheel in wheels.iterdir():
        project = re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
        place = root / "simple" / project
        place.mkdir(parents=True, exist_ok=True)
        wheel.rename(place / wheel.name)
    for emptied in (wheels, folder / "source"):
        shutil.rmtree(emptied)
    (folder / LOCK).write_text("\n".join(frozen) + "\n")


def _pip(command: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", command, *options]


def _preparing(sources: Sources) -> Callable[[Cluster], None]:
    """As in every start (demo/starts.py) the server's files and the node's programs are in memory."""

    def prepare(cluster: Cluster) -> None:
        read = f"find {sources.registry} {sources.index} -type f -print0 | xargs -0 cat > /dev/null"
        programs = "skopeo --version; umoci --version; mksquashfs -version; squashfuse --help"
        ready = f"mkdir -p {WORK}; chown {ALICE}:{ALICE} {WORK}; {programs}; true"
        for machine, command in ((STORE, read), *((node, ready) for node in cluster.nodes)):
            cluster.run(machine, "bash", "-c", f"{{ {command}; }} >/dev/null", timeout_s=120)

    return prepare


def _parts(folder: Path, starts: list[Start]) -> str:
    """The seconds of each part, by the stamps of start_stock.sh in the last of its starts."""
    lines = (folder / f"{starts[-1].job_id}.out").read_text().splitlines()
    stamps = [line.split()[2:] for line in lines if " reached " in line]
    spans = [
        f"{name} {float(until_s) - float(since_s):.1f} s"
        for (_, since_s), (name, until_s) in itertools.pairwise(stamps)
    ]
    return ", ".join(spans)
