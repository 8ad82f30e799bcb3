"""A report as one HTML file: figures on top, below them a timeline of all nodes.

Owns the page (page/ beside this). The file needs nothing else: no script, font or picture is loaded, and its
Content-Security-Policy lets a browser run this one script, by its digest, and fetch nothing. Every text comes
from events, from accounting or from users, and is hostile: the template escapes all but our own style, script
and data, the script only ever sets a text as text, and in its data no "<" is left.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from statistics import median
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bootseer_slurm.report.render.document import node_names
from bootseer_slurm.report.render.headline import figures, headline, nodes_text, printable, waited_text
from bootseer_slurm.report.render.timeline import timeline
from bootseer_slurm.report.startup.figures import Report, StageRow
from bootseer_slurm.report.startup.stages import STAGES
from bootseer_slurm.report.startup.stragglers import NOTICEABLE_S, SLOW
from bootseer_slurm.report.startup.transfers import Transfer
from bootseer_slurm.units import format_bytes, format_duration

_VERY_SLOW = 2.0
_ROWS = 50  # of stragglers, transfers and problems
_BAR = 1000  # units of the bars' coordinates
_SOURCES = {
    "cached_bytes": "from cache",
    "peer_bytes": "from peers",
    "store_bytes": "from store",
    "origin_bytes": "from original",
}


class _StageCells(NamedTuple):
    """One row of the table of stages, as it is shown. bars: (shade, width) of each; none in a row of sums."""

    stage: str
    label: str
    median: str
    slowest: str
    node: str
    ratio: str
    ratio_class: str
    bars: tuple[tuple[str, int], ...]


def to_html(report: Report) -> str:
    """The report as one self-contained HTML page."""
    css, script = _file("page.css"), _file("page.js")
    title, lead = headline(report)
    sources = _sources(report)
    data = json.dumps(timeline(report), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(css)}; "
    page = _environment().get_template("page.html")
    return page.render(
        policy=Markup(policy + "base-uri 'none'; form-action 'none'"),
        css=Markup(css),
        script=Markup(script),
        data=Markup(data),
        title=title,
        who=_who(report),
        lead=f"{lead} {_verdict(report)}",
        cards=figures(report),
        stages=_stages(report),
        bar_width=_BAR,
        derived=any(row.derived for row in report.stages),
        started=bool(report.starts),
        legend=[(STAGES.index(row.stage), row.stage) for row in report.stages],
        stragglers=report.stragglers,
        transfers=_transfers(report, sources),
        sources=[_SOURCES[name] for name in sources],
        remarks=_remarks(report),
        problem_count=len(report.problems),
        limit=_ROWS,
    )


def _file(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text("utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__, "page"),
        autoescape=True,
        finalize=_finalized,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = format_duration
    return environment


def _finalized(value: object) -> object:
    """A control or format character could make a name look like another one."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _who(report: Report) -> str:
    record, nodes = report.run.record, node_names(report)
    where = f"{len(nodes):,} nodes {nodes_text(nodes)[:120]}" if len(nodes) > 1 else "".join(nodes)
    if record is None:
        return f"uid {report.run.uid} · {where}"
    user = record.user or report.run.uid
    return f"{user} · account {record.account} · {record.partition} · {where} · {record.state}"


def _verdict(report: Report) -> str:
    """The cause of a long start, as a sentence; empty where it is not known."""
    text = report.verdict.text if report.verdict else ""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _stages(report: Report) -> list[_StageCells]:
    if not report.stages:
        return []
    longest_s = max(row.slowest_s for row in report.stages) or 1.0
    rows = [_stage_cells(row, longest_s) for row in report.stages]
    return [*rows, _stage_cells(report.total, None)] if report.total else rows


def _stage_cells(row: StageRow, longest_s: float | None) -> _StageCells:
    noticeable = row.ratio is not None and row.slowest_s - row.median_s >= NOTICEABLE_S
    slow = noticeable and (row.ratio or 0) >= SLOW
    style = ("very-slow" if (row.ratio or 0) >= _VERY_SLOW else "slow") if slow else ""
    bars = () if longest_s is None else (("slowest", row.slowest_s), ("median", row.median_s))
    return _StageCells(
        stage=row.stage,
        label=f"{row.stage} ~" if row.derived else row.stage,
        median=format_duration(row.median_s),
        slowest=format_duration(row.slowest_s),
        node=row.slowest_node,
        ratio="" if row.ratio is None or row.node_count < 2 else f"{min(row.ratio, 999):.1f} ×",
        ratio_class=f"n {style}".strip(),
        bars=tuple((shade, round(_BAR * duration_s / (longest_s or 1.0))) for shade, duration_s in bars),
    )


def _sources(report: Report) -> list[str]:
    """The sources that have a column: other nodes and originals only where they gave something."""
    return [
        name
        for name in _SOURCES
        if name in ("cached_bytes", "store_bytes") or any(getattr(row, name) for row in report.transfers)
    ]


def _transfers(report: Report, sources: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """One row for each thing, over all nodes: its kind, its path, and the cells."""
    groups: dict[tuple[str, str], list[Transfer]] = {}
    for row in report.transfers:
        groups.setdefault((row.what, row.target), []).append(row)
    return [(what, target, _transfer_cells(rows, sources)) for (what, target), rows in groups.items()]


def _transfer_cells(rows: Sequence[Transfer], sources: Sequence[str]) -> list[str]:
    rates = [row.rate for row in rows if row.rate]
    hit, miss = sum(row.hit_bytes for row in rows), sum(row.miss_bytes for row in rows)
    in_time = [row.in_time for row in rows if row.in_time is not None]
    return [
        *(format_bytes(sum(getattr(row, name) or 0 for row in rows)) for name in sources),
        f"{format_bytes(median(rates))}/s" if rates else "-",
        f"{sum(in_time):,} of {len(in_time):,}" if in_time else "-",
        f"{100 * hit / (hit + miss):.1f} %" if hit + miss else "-",
        format_bytes(miss),
        waited_text(rows),
    ]


def _remarks(report: Report) -> list[tuple[str, str]]:
    """(level, text) of each."""
    remarks = []
    for problem in report.problems[:_ROWS]:
        parts = (problem.what, problem.target, problem.message)
        text = " ".join(part for part in parts if part)
        remarks.append((problem.level, f"{nodes_text(problem.nodes)}: {text}"))
    if report.run.silent_nodes:
        remarks.append(("warning", f"{nodes_text(report.run.silent_nodes)} sent no events"))
    if report.unended_nodes:
        remarks.append(("warning", f"{nodes_text(report.unended_nodes)}: died, or the epilog still runs"))
    return [*remarks, *(("note", note) for note in report.notes)]
