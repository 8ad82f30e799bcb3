"""`bootseer overhead`: shares, distributions, growth with size, wasters and trend of many starts.

Owns the counting; render/overhead_table.py shows it. Records come as Parquet files or bytes, are read a batch
at a time and counted together at once. A percentile is right within 1 %.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from bootseer_slurm.config import Config
from bootseer_slurm.report.access.client import AnswerClient
from bootseer_slurm.report.access.protocol import RecordsRequest
from bootseer_slurm.report.records.archive import Archive
from bootseer_slurm.report.totals.counts import TOP, Counts, derived
from bootseer_slurm.report.totals.figures import Dear, Overhead
from bootseer_slurm.report.totals.tables import tables

BY = ("user", "account", "partition", "size", "image")
_DAYS_BY_DAY = 35


def overhead(sources: Iterable[Path | pa.Buffer], *, since_ms: int, by: str, days: float) -> Overhead:
    """The figures of the starts from `since_ms` (since 1970) on, grouped by one of BY.

    sources: Parquet files of records, or what is in them. days: how long that is; long times are shown by
    week. Raises BootseerError when one cannot be read.
    """
    unit = "day" if days <= _DAYS_BY_DAY else "week"
    dimensions = dict.fromkeys((by, "size", "mode", unit))
    counts = {name: Counts(name) for name in dimensions}
    with_gpu = False
    dearest: dict[str, pa.Table] = {}
    for table in tables(sources, since_ms):
        counted = derived(table, unit)
        with_gpu = with_gpu or bool(pc.any(pc.greater(counted["gpu_s"], 0.0)).as_py())
        for each in counts.values():
            each.add(counted)
        for lost in ("lost_gpu_s", "lost_cpu_s"):
            known = [dearest[lost]] if lost in dearest else []
            dearest[lost] = _dearest(pa.concat_tables([*known, table]), lost)
    if with_gpu:
        for each in counts.values():
            each.keep_gpu_jobs()
    total = counts[unit].total()
    device = "gpu" if with_gpu else "cpu"
    lost = f"lost_{device}_s"
    groups, group_count = counts[by].top(lost)
    return Overhead(
        since_ms=since_ms,
        by=by,
        device=device,
        trend_unit=unit,
        total=total,
        groups=groups,
        group_count=group_count,
        sizes=counts["size"].by_size(),
        modes=counts["mode"].by_name(),
        trend=counts[unit].by_name(),
        dearest=_dear_rows(dearest.get(lost), lost),
    )


def visible_records(config: Config, *, since_ms: int) -> Iterator[Path | pa.Buffer]:
    """The records that this person may see: root's own files, or the service's answer.

    Raises InputError when there is no service here.
    """
    if os.geteuid() == 0:
        yield from Archive(config.records.path).files(since_ms=since_ms)
    else:
        for frame in AnswerClient(config.records.socket).ask(RecordsRequest(since_ms)):
            yield pa.py_buffer(frame.content)


def _dearest(table: pa.Table, lost: str) -> pa.Table:
    return table.take(pc.select_k_unstable(table, k=TOP, sort_keys=[(lost, "descending")]))


def _dear_rows(table: pa.Table | None, lost: str) -> tuple[Dear, ...]:
    rows: Sequence[dict[str, object]] = [] if table is None else table.to_pylist()
    return tuple(
        Dear(
            shown_id=str(row["shown_id"]),
            user=str(row["user"] or "-"),
            nodes=int(str(row["nodes"] or 0)),
            start_s=float(str(row["start_to_training_s"])),
            lost_s=float(str(row[lost])),
        )
        for row in rows
        if row[lost]
    )
