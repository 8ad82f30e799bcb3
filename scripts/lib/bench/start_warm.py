"""The cost of --bootseer for a job that has nothing to gain: its artifacts are on its node and in memory.

Two jobs on one node, no link limited, each with and without --bootseer, in rotating order. A run counts from
the allocation, as slurmctld logs it, until the job says that it is there. The value is the median of the
differences of one round.

empty   a batch script with one step, which says the time. Nothing is asked for
demo    the demo's imports and weights. plain, and bare with --bootseer: from a copy on the node's own disk,
        bound over the paths in /shared. cached: with the three options, from the agent's cache

Nothing is made cold between the runs, and the first of each arm, which is not counted, warms what it uses.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from scripts.lib.bench.rows import Row
from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.layout import CONTROLLER, ClusterError, Layout, poll
from scripts.lib.demo import arms, inputs, records
from scripts.lib.demo.starts import Tell, make_cold, start, wait_packed
from scripts.lib.host import run

ROUNDS = 12  # a multiple of the arms of both jobs, whose order rotates
TARGET_S = 0.1
NODE = "n1"
LOCAL = "bench-start-warm"  # below the node's /var/lib/bootseer
BOUND = ("image.sqsh", "venv", "model.safetensors")
PROGRAM = "warm_job.py"
TIMEOUT_S = 120.0
LOOK_EVERY_S = 0.002
HERE = Path(__file__).resolve().parent
EMPTY_SH = """#!/bin/bash
echo "script $EPOCHREALTIME"
srun bash -c 'echo "task $EPOCHREALTIME"'
"""
DEMO_SH = f"""#!/bin/bash
#SBATCH --ntasks-per-node=1 --mem=3G
mapfile -t modules < imports
srun ./in_image.sh venv/bin/python {PROGRAM} model.safetensors "${{modules[@]}}"
"""


@dataclass(frozen=True)
class Arm:
    """One way to start. bound: the inputs are those on the node's own disk."""

    name: str
    script: str
    options: tuple[str, ...] = ()
    bound: bool = False


EMPTY = (
    Arm("plain", EMPTY_SH),
    Arm("plain again", EMPTY_SH),
    Arm("bare", EMPTY_SH, ("--bootseer",)),
)
DEMO = (
    Arm("plain", DEMO_SH, bound=True),
    Arm("plain again", DEMO_SH, bound=True),
    Arm("bare", DEMO_SH, ("--bootseer",), bound=True),
    Arm("cached", DEMO_SH, ("--bootseer", *arms.OPTIONS)),
)
STEPS = (ROUNDS + 1) * (len(EMPTY) + len(DEMO)) + 2

Runs = dict[str, list[dict[str, float]]]


def measure(cluster: Cluster, tell: Tell, done: Callable[[], None]) -> list[Row]:
    """All rows. cluster: of one node."""
    cluster.script("link", "store", "off")
    tell("a start that learns, and packs")
    records.restore(cluster, arms.SAVED)
    make_cold(cluster)
    start(cluster, *arms.FIRST.options, tell=tell, while_training=lambda job_id: wait_packed(cluster, job_id))
    done()
    tell("a start that trains until all is on the node")
    start(cluster, *arms.SPELLED.options, tell=tell, while_training=lambda job_id: _wait_local(cluster))
    done()
    with _copied(cluster):
        empty = _rounds(cluster, "empty", EMPTY, tell, done)
        demo = _rounds(cluster, "demo", DEMO, tell, done)
    return [
        *rows_of("empty job, until its script", "script", empty),
        *rows_of("empty job, until its task", "task", empty),
        *rows_of("demo's job, all local", "trains", demo),
    ]


def rows_of(title: str, until: str, runs: Runs) -> list[Row]:
    """The seconds that each arm adds to plain until a mark; limit: those of a second plain arm, noise."""
    seconds = {name: [each[until] for each in results] for name, results in runs.items()}
    added = {name: _added_s(seconds["plain"], theirs) for name, theirs in seconds.items()}
    how = f"one node, no link limited, warm, from the allocation until {until}, {ROUNDS} rounds; "
    how += ", ".join(f"{name} {median(each):.3f} s" for name, each in seconds.items())
    how += "; from sbatch on: "
    since_sbatch = {
        name: median(each[until] + each["queued"] for each in results) for name, results in runs.items()
    }
    how += ", ".join(f"{name} {each_s:.3f} s" for name, each_s in since_sbatch.items())
    sent = {name: median(each["sent_bytes"] for each in results) for name, results in runs.items()}
    how += "; MB sent by the store: " + ", ".join(f"{name} {each / 1e6:.1f}" for name, each in sent.items())
    how += "; limit: a second plain arm"
    noise_s = abs(added["plain again"])
    return [
        Row(f"warm, {title}: {name} adds", added_s, "s", TARGET_S, noise_s, how)
        for name, added_s in added.items()
        if name not in ("plain", "plain again")
    ]


def _added_s(plain: list[float], theirs: list[float]) -> float:
    return median(with_it - without for with_it, without in zip(theirs, plain, strict=True))


@contextlib.contextmanager
def _copied(cluster: Cluster) -> Iterator[None]:
    """The inputs are on the node's own disk until the block ends, and the program beside those on /shared."""
    local = cluster.state_dir / NODE / "bootseer" / LOCAL
    shutil.rmtree(local, ignore_errors=True)
    local.mkdir()
    local.chmod(0o755)
    shutil.copy(HERE / "start_warm_job.py", cluster.shared / inputs.FOLDER / PROGRAM)
    try:
        for name in BOUND:
            run("cp", "-a", str(cluster.shared / inputs.FOLDER / name), str(local))
        yield
    finally:
        shutil.rmtree(local)


def _wait_local(cluster: Cluster) -> None:
    """Wait until the node's cache has all of each blob: its file has no holes then."""
    cache = cluster.state_dir / NODE / "bootseer" / "cache"

    def whole() -> bool:
        files = [path.stat() for path in cache.glob("*/*/data")]
        return len(files) > 0 and all(file.st_blocks * 512 >= file.st_size for file in files)

    if not poll(whole, TIMEOUT_S, 0.5):
        raise ClusterError(f"not all came to {NODE} in {TIMEOUT_S:g} s")


def _rounds(
    cluster: Cluster, job: str, chosen: tuple[Arm, ...], tell: Tell, done: Callable[[], None]
) -> Runs:
    """Each arm once in every round; the first round is not counted."""
    runs: Runs = {arm.name: [] for arm in chosen}
    for number in range(ROUNDS + 1):
        first = number % len(chosen)  # what one run leaves behind shall not always meet the same arm
        for arm in (*chosen[first:], *chosen[:first]):
            tell(f"{job}, round {number} of {ROUNDS}: {arm.name}")
            with _bound(cluster) if arm.bound else contextlib.nullcontext():
                # A class of its own, so that bare knows of nothing that another arm asked for.
                result = _run(cluster, arm, f"{job}-{arm.name.replace(' ', '-')}")
            if number > 0:
                runs[arm.name].append(result)
            done()
    return runs


def _run(cluster: Cluster, arm: Arm, job_name: str) -> dict[str, float]:
    """Seconds from the allocation until each mark; "queued": from sbatch until then; "sent_bytes"."""
    folder = cluster.shared / inputs.FOLDER
    place = [f"--nodelist={NODE}", f"--job-name={job_name}", f"--chdir=/shared/{inputs.FOLDER}"]
    output = f"--output=/shared/{inputs.FOLDER}/%j.out"
    sent_bytes = cluster.store_sent_bytes
    with _Allocations(Layout(cluster.state_dir).log(CONTROLLER, "slurmctld")) as allocations:
        submitted_s = time.time()
        job_id = cluster.sbatch(arm.script, *place, output, *arm.options)
        written = folder / f"{job_id}.out"
        whole = 1 if arm.script == DEMO_SH else 2

        def told() -> bool:
            return written.exists() and len(written.read_text().splitlines()) >= whole

        if not poll(told, TIMEOUT_S):
            raise ClusterError(f"job {job_id} did not say that it is there; its output is {written}")
        allocated_s = allocations.at_s(job_id)
    if not poll(lambda: not cluster.exec("login", "squeue", "-h").stdout.strip(), TIMEOUT_S, 0.3):
        raise ClusterError(f"job {job_id} does not end")
    words = [line.split() for line in written.read_text().splitlines()]
    marks = {name: float(at_s) - allocated_s for name, at_s in words}
    sent = cluster.store_sent_bytes - sent_bytes
    return {**marks, "queued": allocated_s - submitted_s, "sent_bytes": float(sent)}


class _Allocations:
    """When slurmctld said that it started jobs: its log has no times here, so a thread looks as it grows."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._at_s: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Allocations:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def at_s(self, job_id: int) -> float:
        """When a job, which has started, was allocated. Raises ClusterError when nothing said so."""
        if not poll(lambda: job_id in self._at_s, timeout_s=5):
            raise ClusterError(f"slurmctld did not log the allocation of job {job_id}")
        return self._at_s[job_id]

    def _look(self) -> None:
        with self._log.open() as file:
            file.seek(0, 2)
            while not self._over.wait(LOOK_EVERY_S):
                for line in file.read().splitlines():
                    if match := re.search(r"(?:Started|Allocate) JobId=(\d+)", line):
                        self._at_s[int(match[1])] = time.time()


@contextlib.contextmanager
def _bound(cluster: Cluster) -> Iterator[None]:
    """The node's own copies of the inputs, over their paths in /shared, until the block ends."""
    bound = []
    try:
        for name in BOUND:
            target = f"/shared/{inputs.FOLDER}/{name}"
            cluster.run(NODE, "mount", "--bind", f"/var/lib/bootseer/{LOCAL}/{name}", target)
            bound.append(target)
        yield
    finally:
        for target in bound:
            cluster.run(NODE, "umount", target)
