"""A report as one object of plain values, and as JSON.

Owns the schema (docs/report.md); every figure comes from analyse.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from bootseer_slurm.report.startup.figures import Report, StageRow
from bootseer_slurm.report.startup.stages import NodeStart
from bootseer_slurm.report.startup.transfers import Transfer
from bootseer_slurm.report.startup.verdict import Verdict

SCHEMA = 3


def to_json(report: Report) -> str:
    """The report as one JSON object with a stable schema: docs/report.md."""
    return json.dumps(document(report), indent=2, allow_nan=False)


def document(report: Report) -> dict[str, Any]:
    """The report's figures under the names of its schema."""
    run, record = report.run, report.run.record
    return {
        "schema": SCHEMA,
        "job": run.job,
        "shown_id": record.shown_id if record else str(run.job),
        "restart": run.restart,
        "restarts": list(run.restarts),
        "user": record.user if record else None,
        "uid": run.uid,
        "account": record.account if record else None,
        "partition": record.partition if record else None,
        "job_name": record.name if record else None,
        "state": record.state if record else None,
        "mode": report.mode,
        "nodes": node_names(report),
        "silent_nodes": list(run.silent_nodes),
        "unended_nodes": list(report.unended_nodes),
        "gpus": report.gpus,
        "cpus": report.cpus,
        "queue_s": report.queue_s,
        "start_ns": report.start_ns,
        "start_from": "accounting" if record and record.start_ns else "events",
        "training_ns": report.training_ns,
        "training_from": report.training_from,
        "start_to_training_s": report.start_to_training_s,
        "wall_s": report.wall_s,
        "lost_gpu_s": report.lost_gpu_s,
        "lost_cpu_s": report.lost_cpu_s,
        "plain_s": report.plain.median_s if report.plain else None,
        "plain_count": report.plain.count if report.plain else None,
        "verdict": _verdict(report.verdict) if report.verdict else None,
        "stages": [_stage(row) for row in report.stages],
        "total": _stage(report.total) if report.total else None,
        "starts": [_start(start) for start in report.starts],
        "stragglers": [asdict(straggler) for straggler in report.stragglers],
        "transfers": [_transfer(row) for row in report.transfers],
        "problems": [asdict(problem) for problem in report.problems],
        "notes": list(report.notes),
    }


def node_names(report: Report) -> list[str]:
    """All nodes of the job, also those that sent nothing."""
    return list(report.run.node_names)


def _stage(row: StageRow) -> dict[str, Any]:
    return asdict(row) | {"slowest_over_median": row.ratio}


def _start(start: NodeStart) -> dict[str, Any]:
    return {
        "node": start.node,
        "begin_ns": start.begin_ns,
        "training_ns": start.training_ns,
        "total_s": start.total_s,
        "after_s": start.after_s,
        "stages": start.stages,
        "spans": [asdict(span) for span in start.spans],
        "clock_offset_s": start.clock.offset_s if start.clock else None,
        "clock_error_s": start.clock.error_s if start.clock else None,
    }


def _transfer(row: Transfer) -> dict[str, Any]:
    more = {"bytes_per_s": row.rate, "store_bytes": row.store_bytes, "waited_share": row.waited_share}
    return asdict(row) | more


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict) | {"text": verdict.text}
