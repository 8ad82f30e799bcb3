"""A report for other programs: which formats there are, and those that are tables or traces.

    json      one object (document.py)            html      one page (html.py)
    csv       one row for each node and stage     parquet   the same rows
    perfetto  a trace that ui.perfetto.dev and chrome://tracing show, with one track for each node

Names come from users: the CSV has no control characters of theirs, and a cell that a spreadsheet would take
for a formula gets an apostrophe.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from bootseer_slurm.report.render.document import to_json
from bootseer_slurm.report.render.headline import printable
from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.report.startup.stages import NodeStart

_TEXTS = ("shown_id", "user", "account", "partition", "job_name", "node", "stage")
_NUMBERS = ("job", "restart", "begin_ns", "end_ns")
COLUMNS = (
    "job", "shown_id", "restart", "user", "account", "partition", "job_name", "node", "stage", "begin_ns",
    "end_ns", "duration_s", "derived",
)  # fmt: skip


def rows(report: Report) -> Iterator[dict[str, Any]]:
    """One row for each node and stage; begin_ns and end_ns are those of its first and its last span."""
    record = report.run.record
    job = {
        "job": report.run.job,
        "shown_id": record.shown_id if record else str(report.run.job),
        "restart": report.run.restart,
        "user": record.user if record else "",
        "account": record.account if record else "",
        "partition": record.partition if record else "",
        "job_name": record.name if record else "",
    }
    for start in report.starts:
        for stage, duration_s in start.stages.items():
            spans = [span for span in start.spans if span.stage == stage]
            yield job | {
                "node": start.node,
                "stage": stage,
                "begin_ns": spans[0].begin_ns,
                "end_ns": spans[-1].end_ns,
                "duration_s": duration_s,
                "derived": any(span.derived for span in spans),
            }


def to_csv(report: Report) -> bytes:
    """The rows, with a heading, as RFC 4180 has it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for row in rows(report):
        writer.writerow(row | {name: _cell(row[name]) for name in _TEXTS})
    return text.getvalue().encode()


def _cell(text: str) -> str:
    clean = printable(text)
    return f"'{clean}" if clean.lstrip().startswith(("=", "+", "-", "@")) else clean


def to_parquet(report: Report) -> bytes:
    """The rows as a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    types: dict[str, Any] = dict.fromkeys(_TEXTS, pa.string()) | dict.fromkeys(_NUMBERS, pa.int64())
    types |= {"duration_s": pa.float64(), "derived": pa.bool_()}
    schema = pa.schema([(name, types[name]) for name in COLUMNS])
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(list(rows(report)), schema=schema), sink)
    return bytes(sink.getvalue())


def to_perfetto(report: Report) -> bytes:
    """A trace in Chrome's JSON format, times in µs from the start of the allocation on.

    Source: "Trace Event Format", complete events (X) and metadata (M).
    """
    zero_ns = report.start_ns or 0
    record = report.run.record
    title = f"job {record.shown_id if record else report.run.job}"
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": f"start of {title}"}}
    ]
    causes = {each.node: f"{each.cause}: {each.detail}" for each in report.stragglers}
    for number, start in enumerate(report.starts, start=1):
        track = {"pid": 1, "tid": number}
        events.append({"ph": "M", **track, "name": "thread_name", "args": {"name": start.node}})
        events.append({"ph": "M", **track, "name": "thread_sort_index", "args": {"sort_index": number}})
        events += _slices(start, zero_ns, track, causes.get(start.node, ""))
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":")).encode()


def _slices(start: NodeStart, zero_ns: int, track: dict[str, int], cause: str) -> Iterator[dict[str, Any]]:
    for span in start.spans:
        yield {
            "ph": "X",
            **track,
            "name": span.stage,
            "cat": "start",
            "ts": (span.begin_ns - zero_ns) / 1e3,
            "dur": (span.end_ns - span.begin_ns) / 1e3,
            "args": {"derived": span.derived} | ({"straggler": cause} if cause else {}),
        }
    if start.training_ns is not None:
        ts = (start.training_ns - zero_ns) / 1e3
        yield {"ph": "i", "s": "t", **track, "name": "training", "cat": "start", "ts": ts}


def _html(report: Report) -> bytes:
    from bootseer_slurm.report.render.html import to_html  # with a library that no other format needs

    return to_html(report).encode("utf-8", "replace")


FORMATS: dict[str, Callable[[Report], bytes]] = {
    "json": lambda report: (to_json(report) + "\n").encode(),
    "csv": to_csv,
    "parquet": to_parquet,
    "html": _html,
    "perfetto": to_perfetto,
}
