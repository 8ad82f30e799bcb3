"""The demo's arms: the ways in which one job can start, each several times and interleaved.

plain    image, environment and checkpoint are used from the shared storage (`--bootseer=observe`, which
         measures and changes nothing)
first    `--bootseer` and three options; nothing of this job has been recorded
again    a bare `--bootseer`: what to bring, and in which order, was learned at the first start
spelled  as again, with the three options

After the first of all starts the job goes on until the agent has packed anew, in the order of touch; what was
learned until then is what all later arms begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.layout import ClusterError
from scripts.lib.demo import inputs, records
from scripts.lib.demo.starts import STAGES, Start, Tell, make_cold, start, wait_packed

SAVED, LEARNED = "saved", "learned"
OPTIONS = (
    f"--bootseer-image=/shared/{inputs.FOLDER}/image.sqsh",
    f"--bootseer-env=/shared/{inputs.FOLDER}/venv",
    f"--bootseer-checkpoint=/shared/{inputs.FOLDER}/model.safetensors",
)


@dataclass(frozen=True)
class Arm:
    """One way to start.

    records: those that the store has when it begins (records.py). script: of the job, in the inputs' folder.
    prepare: what the nodes need beside, done when they are cold.
    """

    name: str
    options: tuple[str, ...]
    records: str
    script: str = "job.sh"
    prepare: Callable[[Cluster], None] = lambda cluster: None


PLAIN = Arm("plain", ("--bootseer=observe",), SAVED)
FIRST = Arm("first", ("--bootseer", *OPTIONS), SAVED)
AGAIN = Arm("again", ("--bootseer",), LEARNED)
SPELLED = Arm("spelled", ("--bootseer", *OPTIONS), LEARNED)


@dataclass
class Measured:
    """All that was measured. local: starts with all in the nodes' caches. rates: of the link, by dd."""

    arms: dict[str, list[Start]] = field(default_factory=dict)
    local: list[Start] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def bytes_per_s(self) -> float:
        """The rate of the store's link, in bytes/s."""
        return median(self.rates)


def measure(
    cluster: Cluster,
    arms: Sequence[Arm],
    *,
    rounds: int,
    store_link: str,
    tell: Tell,
    done: Callable[[], None],
) -> Measured:
    """Start each arm once in every round, on a cluster that has the inputs and whose store has them saved.

    The records of that must have been set aside as SAVED.
    tell: is told what happens. done: is called after each of `count` starts. Raises ClusterError, also when
    two starts did not load the same weights.
    """
    measured = Measured()
    for number in range(1, rounds + 1):
        cluster.script("link", "store", store_link)
        tell(f"round {number}: dd over the store's link")
        measured.rates.append(measure_link(cluster))
        for arm in arms:
            learns = arm == FIRST and number == 1
            say = _titled(tell, f"round {number}: {arm.name}")
            say("making all nodes cold")
            records.restore(cluster, arm.records)
            make_cold(cluster)
            arm.prepare(cluster)
            packs = _packing(cluster, store_link, say) if learns else _nothing
            started = start(cluster, *arm.options, tell=say, script=arm.script, while_training=packs)
            if learns:
                records.keep(cluster, LEARNED)
            measured.arms.setdefault(arm.name, []).append(started)
            done()
        say = _titled(tell, f"round {number}: all local")
        measured.local.append(start(cluster, *SPELLED.options, tell=say))
        done()
    checksums = {each.checksum for starts in (*measured.arms.values(), measured.local) for each in starts}
    if len(checksums) != 1:
        raise ClusterError(f"the weights differ between starts: {checksums}")
    return measured


def _titled(tell: Tell, title: str) -> Tell:
    return lambda text: tell(f"{title}, {text}")


def _packing(cluster: Cluster, store_link: str, tell: Tell) -> Callable[[int], None]:
    def wait(job_id: int) -> None:
        tell("waiting for what the agent packs")
        cluster.script("link", "store", "off")  # nothing is measured now
        wait_packed(cluster, job_id)
        cluster.script("link", "store", store_link)

    return wait


def _nothing(job_id: int) -> None:
    """The job ends as soon as it trains."""


def count(arms: Sequence[Arm], rounds: int) -> int:
    """How many starts `measure` makes."""
    return rounds * (len(arms) + 1)


def measure_link(cluster: Cluster) -> float:
    """The rate of the store's link, in bytes/s: all nodes read the checkpoint at once, cold, with dd."""
    cluster.script("drop-caches")
    path = f"{inputs.FOLDER}/model.safetensors"
    size_bytes = len((cluster.shared / path).read_bytes())  # and into the server's memory
    command = f"dd if=/shared/{path} of=/dev/null bs=4M 2>&1"
    running = [cluster.start(node, "sh", "-c", command) for node in cluster.nodes]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise ClusterError(f"dd failed: {said}")
    # Each by its own clock: they do not begin at quite the same moment.
    return sum(size_bytes / float(text.splitlines()[-1].split(", ")[-2].split()[0]) for text in said)


def result(cluster: Cluster, measured: Measured, store_link: str) -> dict[str, Any]:
    """The object that --json writes."""
    rate = measured.bytes_per_s
    medians = {name: median(each.total_s for each in starts) for name, starts in measured.arms.items()}
    checkpoint_bytes = (cluster.shared / inputs.FOLDER / "model.safetensors").stat().st_size
    # Of starts that have all: in others training may begin before all that the plan holds is there.
    hot_bytes = median(each.hot_bytes for each in measured.local)
    # Of one copy: the nodes give it to one another.
    floor_bytes = hot_bytes / cluster.node_count + checkpoint_bytes
    local_s = median(each.total_s for each in measured.local)
    return {
        "arms": {name: _arm(starts, rate) for name, starts in measured.arms.items()},
        "reduction_first": 1 - medians[FIRST.name] / medians[PLAIN.name],
        "reduction_again": 1 - medians[AGAIN.name] / medians[PLAIN.name],
        "floor_s": floor_bytes / rate + local_s,
        "floor_bytes": floor_bytes,
        "local_s": local_s,
        "checkpoint_bytes": checkpoint_bytes,
        "nodes": cluster.node_count,
        "store_link": store_link,
        "link_bytes_per_s": rate,
        "checksum": measured.local[0].checksum,
    }


def _arm(starts: Sequence[Start], rate: float) -> dict[str, Any]:
    """One arm's figures: medians of its starts."""
    return {
        "runs_s": [each.total_s for each in starts],
        "median_s": median(each.total_s for each in starts),
        "stages": {stage: median(each.stages[stage] for each in starts) for stage in STAGES},
        "store_bytes": median(each.store_bytes for each in starts),
        "cpu_s": median(each.cpu_s for each in starts),
        "cpu_busy": median(each.cpu_busy for each in starts),
        "link_busy": median(each.store_bytes / (rate * each.total_s) for each in starts),
        "jobs": [each.job_id for each in starts],
    }
