"""One start of the demo's job: made cold, submitted, watched, and measured.

Cold: no page is cached, the agents' caches are empty. Two things are not what is measured, and so are warm:
the disk of the store server, whose files are read into its memory, and each node's own programs (Slurm, the
agent, squashfuse), for which a small job runs first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from scripts.lib.cluster.client import BOOTSEER, Cluster
from scripts.lib.cluster.layout import ClusterError
from scripts.lib.demo import inputs, records
from scripts.lib.demo.meter import Meter

STAGES = ("prolog", "launch", "image", "environment", "checkpoint", "program")
MARKS = ("image_loaded", "environment_loaded", "checkpoint_loaded", "training_started")
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 120.0
LOOK_EVERY_S = 0.2
QUEUE_EVERY_S = 5.0  # asking Slurm costs CPU
PACK_TIMEOUT_S = 300.0
PACK_IDLE_S = 10.0
PACKED = ("packed", "failed")
NICENESS = "19"  # of what agents do in the background

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """One start of the job.

    total_s: from the hook in the prolog until training began, on the slowest node. stages: of the median
    node. store_bytes: that the store sent until then. cpu_s: of the whole machine, from submission until
    then; cpu_busy: the share of its cores. hot_bytes: of image and environment, what the plans held, over all
    nodes.
    """

    job_id: int
    checksum: str
    total_s: float
    stages: dict[str, float]
    store_bytes: float
    cpu_s: float
    cpu_busy: float
    hot_bytes: int


def make_cold(cluster: Cluster) -> None:
    """Forget what nodes and agents have cached; warm up what is not measured (see above)."""
    cluster.script("drop-caches", "--bootseer", "--shared")  # records were removed behind the nodes
    read = f"find /shared/{inputs.FOLDER} /shared/bootseer -type f -print0 | xargs -0 cat > /dev/null"
    cluster.run("store", "bash", "-c", read, timeout_s=END_TIMEOUT_S)
    programs = "squashfuse --help; bwrap --version; fusermount3 --version"
    place = [f"--nodelist={','.join(cluster.nodes)}", "--chdir=/tmp"]
    warm = ["srun", "--bootseer", "--job-name=warm-up", *place]
    warm += ["sh", "-c", f"{{ {programs}; true; }} >/dev/null 2>&1"]
    cluster.run("login", *warm, user="alice", timeout_s=END_TIMEOUT_S)


def start(
    cluster: Cluster,
    *options: str,
    tell: Tell,
    script: str = "job.sh",
    while_training: Callable[[int], None] = lambda job_id: None,
) -> Start:
    """Submit the job and see it through. Raises ClusterError when it fails.

    script: its name in the inputs' folder. while_training: called with the job's id when all nodes train,
    before the job is told to end.
    """
    folder = cluster.shared / inputs.FOLDER
    # Named, for the cluster may have more nodes, of which one may still be ending its last job.
    place = [f"--nodelist={','.join(cluster.nodes)}", f"--chdir=/shared/{inputs.FOLDER}"]
    output = f"--output=/shared/{inputs.FOLDER}/%j.out"
    with Meter(lambda: cluster.store_sent_bytes) as meter:
        submitted_ns = time.time_ns()
        job_id = cluster.sbatch((folder / script).read_text(), *place, output, *options)
        _watch(cluster, job_id, tell)
    while_training(job_id)
    tell("ending")
    stop = folder / f"stop.{job_id}"
    stop.touch()
    state = cluster.wait(job_id, END_TIMEOUT_S)
    stop.unlink()
    lines = (folder / f"{job_id}.out").read_text().splitlines()
    if state != "COMPLETED":
        raise ClusterError(f"job {job_id} ended as {state}:\n" + "\n".join(lines[-20:]))
    checksums = {line.split()[2] for line in lines if " checksum " in line}
    if len(checksums) != 1:
        raise ClusterError(f"the nodes of job {job_id} do not agree on the checksum: {checksums}")
    report = _read_report(cluster, job_id)
    trained_ns = max(each["training_ns"] for each in report["starts"])
    cpu_s = meter.cpu_s.growth(submitted_ns, trained_ns)
    return Start(
        job_id=job_id,
        checksum=checksums.pop(),
        # Accounting has the allocation's start in whole seconds, and so its stage is not counted.
        total_s=max(each["total_s"] - each["stages"]["allocation"] for each in report["starts"]),
        stages={stage: _stage_s(report, stage) for stage in STAGES},
        store_bytes=meter.sent_bytes.growth(submitted_ns, trained_ns),
        cpu_s=cpu_s,
        cpu_busy=cpu_s / ((psutil.cpu_count() or 1) * (trained_ns - submitted_ns) / 1e9),
        hot_bytes=_hot_bytes(cluster, job_id),
    )


def wait_packed(cluster: Cluster, job_id: int) -> None:
    """Wait until the agent of the job's first node has packed anew what the job starts from, where it does.

    Over when it says so of image and environment (events `snapshot`), when nothing works in the background
    any more, or when it takes too long.
    """
    journal = f"/run/bootseer/events/{job_id}.0"
    end_s = time.monotonic() + PACK_TIMEOUT_S
    busy_s = time.monotonic()
    while time.monotonic() < min(end_s, busy_s + PACK_IDLE_S):
        lines = cluster.exec("n1", "cat", journal).stdout.splitlines()
        events = [json.loads(line) for line in lines]
        told = [each for each in events if each["kind"] == "snapshot" and each["name"] in PACKED]
        if {"image", "environment"} <= {each.get("what") for each in told}:
            return
        if NICENESS in cluster.exec("n1", "ps", "-eo", "ni=").stdout.split():
            busy_s = time.monotonic()
        time.sleep(1)


def _watch(cluster: Cluster, job_id: int, tell: Tell) -> None:
    """Follow the marks that the job's tasks print, until all train."""
    path = cluster.shared / inputs.FOLDER / f"{job_id}.out"
    end_s = time.monotonic() + START_TIMEOUT_S
    asked_s = time.monotonic()
    while time.monotonic() < end_s:
        words = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        marks = [line[1] for line in words if len(line) == 2]
        waiting = [mark for mark in MARKS if marks.count(mark) < cluster.node_count]
        if not waiting:
            return
        tell(f"until {waiting[0]}, {marks.count(waiting[0])} of {cluster.node_count} nodes")
        if time.monotonic() - asked_s > QUEUE_EVERY_S:
            asked_s = time.monotonic()
            if not cluster.exec("login", "squeue", "-hj", str(job_id)).stdout.strip():
                return  # it has ended: whoever waits for that says how
        time.sleep(LOOK_EVERY_S)
    raise ClusterError(f"job {job_id} did not start in {START_TIMEOUT_S:g} s; its output is {path}")


def _read_report(cluster: Cluster, job_id: int) -> dict[str, Any]:
    """The job's report, once all nodes have told its end."""
    end_s = time.monotonic() + END_TIMEOUT_S
    while True:
        done = cluster.exec("login", BOOTSEER, "report", "--format", "json", str(job_id), user="alice")
        if done.returncode == 0:
            report: dict[str, Any] = json.loads(done.stdout)
            missing = report["silent_nodes"] or report["unended_nodes"]
            if not missing and report["total"] and len(report["starts"]) == cluster.node_count:
                return report
        if time.monotonic() > end_s:
            raise ClusterError(f"no whole report of job {job_id}: {done.stdout}{done.stderr}")
        time.sleep(0.5)


def _stage_s(report: dict[str, Any], stage: str) -> float:
    """The median node's time in a stage."""
    rows = [row for row in report["stages"] if row["stage"] == stage]
    return float(rows[0]["median_s"]) if rows else 0.0


def _hot_bytes(cluster: Cluster, job_id: int) -> int:
    """The bytes in the plans of image and environment, over all nodes."""
    lines: list[str] = []
    for path in (records.folder(cluster) / "events" / f"{job_id}.0").glob("*.jsonl"):
        lines += path.read_text().splitlines()
    hot = [each for each in map(json.loads, lines) if (each["kind"], each["name"]) == ("prefetch", "hot")]
    return sum(each["bytes"] for each in hot if each["what"] != "checkpoint")
