"""The row of a start: the overhead of a cluster is counted from these.

Owns the schema of the dataset (docs/overhead.md). Pure; a row is made of the same Report that `bootseer
report` shows. Every column but the job's own may be null: not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.report.startup.stages import STAGES, NodeStart

_MAX_BYTES = (1 << 63) - 1  # events are the user's, and may say any number
_MAX_TEXT = 256  # of names that users choose
_TIME = pa.timestamp("ms", tz="UTC")

SCHEMA = pa.schema(
    [
        pa.field("job", pa.uint32(), nullable=False),
        pa.field("restart", pa.int32(), nullable=False),
        pa.field("shown_id", pa.string()),
        pa.field("uid", pa.uint32(), nullable=False),
        pa.field("user", pa.string()),
        pa.field("account", pa.string()),
        pa.field("partition", pa.string()),
        pa.field("job_name", pa.string()),
        pa.field("state", pa.string()),
        pa.field("nodes", pa.int32()),
        pa.field("gpus", pa.int32()),
        pa.field("cpus", pa.int32()),
        pa.field("submit_time", _TIME),
        pa.field("eligible_time", _TIME),
        pa.field("start_time", _TIME, nullable=False),
        pa.field("end_time", _TIME),
        pa.field("training_time", _TIME),
        pa.field("training_from", pa.string()),
        pa.field("elapsed_s", pa.float64()),
        pa.field("queue_s", pa.float64()),
        pa.field("start_to_training_s", pa.float64()),
        *(pa.field(f"{stage}_s", pa.float64()) for stage in STAGES),
        pa.field("lost_gpu_s", pa.float64()),
        pa.field("lost_cpu_s", pa.float64()),
        pa.field("mode", pa.string()),
        pa.field("image", pa.string()),
        pa.field("environment", pa.string()),
        pa.field("checkpoint", pa.string()),
        pa.field("fetched_bytes", pa.int64()),
        pa.field("cached_bytes", pa.int64()),
        pa.field("problems", pa.int32()),
    ]
)
# These tell one start from another: job ids may be begun anew. Not the restart count: users name folders as
# they like, and one start of a job would count as often as its user says.
KEY = ("job", "start_time")

Row = Mapping[str, Any]


def row_of(report: Report) -> dict[str, Any] | None:
    """The row of a start that is over; None when accounting does not know its start, its end or its user."""
    record, run = report.run.record, report.run
    if record is None or record.start_ns is None or record.end_ns is None or record.uid is None:
        return None
    elapsed_s = max(0.0, (record.end_ns - record.start_ns) / 1e9)
    # A user writes his own marks: none may cost more than the job had.
    waited_s = report.start_to_training_s
    waited_s = None if waited_s is None else min(waited_s, elapsed_s)
    last = _last_start(report.starts)
    used = {kind: _used(report, kind) for kind in ("image", "environment", "checkpoint")}
    return {
        "job": run.job,
        "restart": run.restart,
        "shown_id": record.shown_id,
        "uid": record.uid,
        "user": _cut(record.user),
        "account": _cut(record.account),
        "partition": _cut(record.partition),
        "job_name": _cut(record.name),
        "state": record.state,
        "nodes": len(record.nodes) or None,
        "gpus": record.gpus,
        "cpus": record.cpus,
        "submit_time": _ms(record.submit_ns),
        "eligible_time": _ms(record.eligible_ns),
        "start_time": _ms(record.start_ns),
        "end_time": _ms(record.end_ns),
        "training_time": _ms(report.training_ns),
        "training_from": report.training_from,
        "elapsed_s": elapsed_s,
        "queue_s": report.queue_s,
        "start_to_training_s": waited_s,
        **{f"{stage}_s": last.stages.get(stage) if last else None for stage in STAGES},
        "lost_gpu_s": None if waited_s is None or not record.gpus else waited_s * record.gpus,
        "lost_cpu_s": None if waited_s is None or not record.cpus else waited_s * record.cpus,
        "mode": report.mode,
        **used,
        "fetched_bytes": _sum(transfer.fetched_bytes for transfer in report.transfers),
        "cached_bytes": _sum(transfer.cached_bytes for transfer in report.transfers),
        "problems": len(report.problems),
    }


def table_of(rows: Iterable[Row]) -> pa.Table:
    """The rows as a table of the schema."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)


def _last_start(starts: Iterable[NodeStart]) -> NodeStart | None:
    """The node that began training last: the start took as long as there."""
    trained = [start for start in starts if start.training_ns is not None]
    return max(trained, key=lambda start: start.training_ns or 0, default=None)


def _used(report: Report, kind: str) -> str | None:
    return next((_cut(each.target) for each in report.transfers if each.what == kind), None)


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return min(sum(known), _MAX_BYTES) if known else None


def _ms(time_ns: int | None) -> int | None:
    return None if time_ns is None else time_ns // 1_000_000


def _cut(text: str) -> str | None:
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean[:_MAX_TEXT] or None
