"""What must be true when the day is over, and what was not.

- Each task read right bytes, also where its input was damaged for a while.
- Each job ended as its fate says. No node was drained or down. No prolog took longer than a second.
- Nothing is left on a node: no session, no process of a user's, no mount, no file of a job.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from scripts.lib.chaos.inputs import Inputs
from scripts.lib.chaos.jobs import CANCELLED, FAILS, Jobs, TaskResult
from scripts.lib.cluster.client import BOOTSEER, Cluster
from scripts.lib.cluster.hook_times import hook_times
from scripts.lib.cluster.layout import Layout
from scripts.lib.cluster.settings import USERS

PROLOG_MOST_S = 1.0
LEFT_AFTER_S = 60.0
READ_FAILED = ("read_failed", "blob_not_held", "cannot be recovered", "reads failed")
FAILED_READS_SHOWN = 8
LOOK_FOR_LEFT = f"""
ls -A /run/bootseer/jobs /run/bootseer/env /run/bootseer/ending 2> /dev/null | grep -v -e ':$' -e '^$'
ps -o pid=,user=,args= -u {",".join(USERS)}
grep -e ' /run/bootseer/env/' -e squashfs /proc/self/mounts
{BOOTSEER} status | grep -A1 '"jobs": \\[$'
"""


@dataclass
class Findings:
    """The figures of a run, and all that was not as it must be."""

    states: Counter[str] = field(default_factory=Counter)
    tasks: int = 0
    shadowed: int = 0
    bytes: int = 0
    refused: int = 0
    prologs_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def find(cluster: Cluster, jobs: Jobs, inputs: Inputs, events_since: float) -> Findings:
    """Look at everything; the faults are over, and the jobs too."""
    findings = Findings()
    results = list(jobs.task_results())
    _look_at_tasks(findings, results, jobs, inputs)
    _look_at_jobs(findings, results, jobs, cluster)
    _look_at_prologs(findings, jobs.results)
    _look_at_nodes(findings, cluster, events_since)
    return findings


def _look_at_tasks(findings: Findings, results: list[TaskResult], jobs: Jobs, inputs: Inputs) -> None:
    users = {job.id: job.user for job in jobs.all}
    for result in results:
        user = users[result.job_id]
        findings.tasks += 1
        findings.shadowed += bool(result.shadows)
        findings.bytes += result.bytes
        for name, found in result.digests.items():
            if not inputs.right(user, name, found, result.begun, result.ended) and not inputs.replaced(
                user, name, result.begun, result.ended
            ):
                how = "a shadow" if name in result.shadows else "the original"
                what = inputs.told(user, name, found, result.begun)
                findings.wrong.append(f"job {result.job_id} on {result.node}: {name}, {how}: {what}")
        findings.refused += len(result.errors)


def _look_at_jobs(findings: Findings, results: list[TaskResult], jobs: Jobs, cluster: Cluster) -> None:
    refused = {result.job_id for result in results if result.errors}
    for job in jobs.all:
        findings.states[job.state] += 1
        allowed = {"COMPLETED"}
        if job.fate == FAILS or job.id in refused:
            allowed = {"FAILED"}
        elif job.fate == CANCELLED:
            allowed |= {"CANCELLED", "FAILED"}  # srun may see its task killed before the script is
        if not set(job.state.split(",")) <= allowed:
            findings.wrong.append(f"job {job.id} ({job.asked}, {job.fate}) ended as {job.state or 'nothing'}")
    for result in results:
        for name, error in result.errors.items():
            findings.wrong.append(f"job {result.job_id} on {result.node}: {name}: {error}")
            findings.wrong += _failed_reads(cluster, result.node)


def _failed_reads(cluster: Cluster, node: str) -> list[str]:
    """What the agents of a node said of reads that they failed: a task sees an error number only."""
    log = Layout(cluster.state_dir).log(node, "agent").read_text(errors="replace")
    lines = [line for line in log.splitlines() if any(each in line for each in READ_FAILED)]
    return lines[-FAILED_READS_SHOWN:]


def _look_at_prologs(findings: Findings, results: Path) -> None:
    findings.prologs_s = hook_times(results)["prolog"]
    if slow := [seconds for seconds in findings.prologs_s if seconds > PROLOG_MOST_S]:
        findings.wrong.append(f"{len(slow)} prologs took up to {max(slow):.2f} s")


def _look_at_nodes(findings: Findings, cluster: Cluster, events_since: float) -> None:
    idle = cluster.run("login", "sinfo", "--noheader", "--Node", "--format=%N %T")
    findings.wrong += [f"node {line}" for line in idle.splitlines() if not line.endswith(" idle")]
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(events_since))
    events = cluster.run(
        "login", "sacctmgr", "-nP", "show", "event", f"start={since}", "format=NodeName,State,Reason"
    )
    findings.wrong += [f"node event {line}" for line in events.splitlines() if line.startswith("n")]
    for node in cluster.nodes:
        left = _left_on(cluster, node)
        findings.wrong += [f"left on {node}: {line}" for line in left.splitlines()[:5]]


def _left_on(cluster: Cluster, node: str) -> str:
    """What is left on a node after a while; the end of a session may take some seconds."""
    deadline = time.monotonic() + LEFT_AFTER_S
    while (
        left := cluster.exec(node, "bash", "-c", LOOK_FOR_LEFT).stdout.strip()
    ) and time.monotonic() < deadline:
        time.sleep(1)
    return left
