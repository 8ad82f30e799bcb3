"""The data from which the page's script draws the timeline of all nodes. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from bootseer_slurm.report.gather.run import NodeEvents
from bootseer_slurm.report.render.document import node_names
from bootseer_slurm.report.render.headline import printable, waited_text
from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.report.startup.stages import STAGES, NodeStart
from bootseer_slurm.report.startup.stragglers import work_of
from bootseer_slurm.report.startup.transfers import Transfer
from bootseer_slurm.units import format_bytes


def timeline(report: Report) -> dict[str, Any]:
    """Stages, and of each node its spans, facts and cause; in seconds from the allocation on."""
    zero_ns = report.start_ns or 0
    sent = {each.node: each for each in report.run.nodes}
    causes = {each.node: f"{each.cause}: {each.detail}" for each in report.stragglers}
    brought: dict[str, list[Transfer]] = {}
    for row in report.transfers:
        brought.setdefault(row.node, []).append(row)
    nodes = [
        {
            "name": printable(start.node),
            "spans": [
                [
                    STAGES.index(span.stage),
                    _s(span.begin_ns - zero_ns),
                    _s(span.end_ns - zero_ns),
                    int(span.derived),
                ]
                for span in start.spans
            ],
            "trained": start.training_ns is not None,
            "facts": _facts(start, sent, brought.get(start.node, [])),
            "cause": printable(causes.get(start.node, "")),
        }
        for start in report.starts
    ]
    known = {start.node for start in report.starts}
    nodes += [
        {"name": printable(name), "spans": [], "trained": False, "facts": [], "cause": ""}
        for name in node_names(report)
        if name not in known
    ]
    ends = [start.spans[-1].end_ns for start in report.starts if start.spans]
    return {
        "stages": list(STAGES),
        "nodes": nodes,
        "longest": sorted((str(node["name"]) for node in nodes), key=len)[-3:],
        "end": max(0.1, _s(max(ends, default=zero_ns) - zero_ns) * 1.02),
        "median": _s(median(ends) - zero_ns) if ends else 0,
    }


def _facts(start: NodeStart, sent: dict[str, NodeEvents], rows: Sequence[Transfer]) -> list[str]:
    did = work_of(sent[start.node])
    facts = []
    if did.fetched_bytes or did.cached_bytes:
        rate = f" at {format_bytes(did.rate)}/s a stream" if did.rate else ""
        facts.append(f"fetched {format_bytes(did.fetched_bytes)}{rate}, had {format_bytes(did.cached_bytes)}")
    waited = [row for row in rows if row.waited_s]
    if waited:
        worst = max(waited, key=lambda row: row.waited_s or 0.0)
        facts.append(f"waited longest for the {worst.what}: {waited_text([worst])}")
    if start.clock:
        facts.append(f"clock {start.clock.offset_s * 1000:+.0f} ms (± {start.clock.error_s * 1000:.0f} ms)")
    return facts


def _s(span_ns: float) -> float:
    return round(span_ns / 1e9, 3)
