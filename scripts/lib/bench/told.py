"""The common parts of the benchmarks of starts: a job's hook as slurmd calls it, and its node's events."""

from __future__ import annotations

import json
from typing import Any

from scripts.lib.bench.image_arms import NODE, Result
from scripts.lib.cluster.client import ALICE, Cluster
from scripts.lib.cluster.layout import ClusterError, poll

EVENTS_PATIENCE_S = 60.0

Event = dict[str, Any]


def hook_environ(job_id: int, name: str, **wishes: str) -> dict[str, str]:
    """The hook's environment but SLURM_SCRIPT_CONTEXT, of alice's job; wishes: as SPANK_BOOTSEER_*."""
    return {
        "SLURM_JOB_ID": str(job_id),
        "SLURM_JOB_UID": str(ALICE),
        "SLURM_JOB_GID": str(ALICE),
        "SLURM_JOB_USER": "alice",
        "SLURM_JOB_ACCOUNT": "research",
        "SLURM_NODELIST": NODE,
        "SLURMD_NODENAME": NODE,
        "SLURM_JOB_PARTITION": "main",
        "SLURM_JOB_RESTART_COUNT": "0",
        "SPANK_BOOTSEER_MODE": "1",
        "SPANK_BOOTSEER_JOB_NAME": name,
        **{f"SPANK_BOOTSEER_{key}": value for key, value in wishes.items()},
    }


def events_of(cluster: Cluster, job_id: int) -> list[Event]:
    """The events of a job that has ended (docs/events.md). Raises ClusterError when none come."""
    path = cluster.shared / f"bootseer/users/{ALICE}/events/{job_id}.0/{NODE}.jsonl"
    ended = '"session","name":"end"'
    if not poll(lambda: path.exists() and ended in path.read_text(), timeout_s=EVENTS_PATIENCE_S):
        raise ClusterError(f"job {job_id} sent no events")
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(events: list[Event]) -> Result:
    """Of the prefetch hot_bytes and hot_s, and reads, reads_blocked; of all that the job started from."""
    hot = [event for event in events if (event["kind"], event["name"]) == ("prefetch", "hot")]
    access = [event for event in events if event["kind"] == "access"]
    result: Result = {name: sum(event[name] for event in access) for name in ("reads", "reads_blocked")}
    if hot:
        result["hot_bytes"] = sum(event["bytes"] for event in hot)
        result["hot_s"] = max(event["dur_s"] for event in hot)
    return result
