"""A report as one HTML file: figures on top, below them a timeline of all nodes.

Owns the page (page/ beside this). The file needs nothing else: no script, font or picture is loaded, and its
Content-Security-Policy lets a browser run this one script, by its digest, and fetch nothing. Every text comes
from events, from accounting or from users, and is hostile: `_el` escapes it, the script only ever sets it as
text, and in its data no "<" is left.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from statistics import median
from typing import Any

from bootseer_slurm.report.render.document import node_names
from bootseer_slurm.report.render.headline import figures, headline, nodes_text, waited_text
from bootseer_slurm.report.startup.figures import Report, StageRow
from bootseer_slurm.report.startup.stages import STAGES, NodeStart
from bootseer_slurm.report.startup.stragglers import NOTICEABLE_S, SLOW, work_of
from bootseer_slurm.report.startup.transfers import Transfer
from bootseer_slurm.units import format_bytes, format_duration

_VERY_SLOW = 2.0
_ROWS = 50  # of stragglers, transfers and problems
_BAR = 1000  # units of the bars' coordinates


def to_html(report: Report) -> str:
    """The report as one self-contained HTML page."""
    css, script = _page("page.css"), _page("page.js")
    title, lead = headline(report)
    body = [
        _el("h1", title),
        _el("p", _who(report), cls="dim"),
        _el("p", f"{lead} {_verdict(report)}", cls="lead"),
        _cards(report),
        _stages(report),
        _timeline(report),
        _stragglers(report),
        _transfers(report),
        _remarks(report),
    ]
    return _filled(
        "page.html",
        policy=f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(css)}; "
        "base-uri 'none'; form-action 'none'",
        title=_el("title", title),
        css=css,
        body="".join(body),
        data=json.dumps(_data(report), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        script=script,
    )


def _page(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text("utf-8")


def _filled(name: str, **parts: str) -> _Html:
    """A piece of the page with its parts put in, all at once: what looks like a place in one is left."""
    return _Html(re.sub(r"\{\{([a-z]+)\}\}", lambda match: parts[match[1]], _page(name)))


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class _Html(str):
    """Text that is HTML already; every other text is escaped."""


def _el(name: str, *children: str, cls: str = "") -> _Html:
    inside = "".join(
        child if isinstance(child, _Html) else html.escape(_visible(child)) for child in children
    )
    attribute = f' class="{html.escape(cls)}"' if cls else ""
    return _Html(f"<{name}{attribute}>{inside}</{name}>")


def _visible(text: str) -> str:
    """A control or format character could make a name look like another one."""
    return "".join(c if c.isprintable() else " " for c in text)


def _who(report: Report) -> str:
    record, nodes = report.run.record, node_names(report)
    where = f"{len(nodes):,} nodes {nodes_text(nodes)[:120]}" if len(nodes) > 1 else "".join(nodes)
    if record is None:
        return f"uid {report.run.uid} · {where}"
    user = record.user or report.run.uid
    return f"{user} · account {record.account} · {record.partition} · {where} · {record.state}"


def _verdict(report: Report) -> str:
    """What held the start up, as a sentence; empty where that is not known."""
    text = report.verdict.text if report.verdict else ""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _cards(report: Report) -> _Html:
    return _Html(
        '<div class="cards">'
        + "".join(
            _el("div", _el("span", card.heading), _el("b", card.value), _el("span", card.detail))
            for card in figures(report)
        )
        + "</div>"
    )


def _table(heading: Sequence[str], rows: Iterable[str], numbers: Sequence[int]) -> _Html:
    cells = "".join(
        _el("th", text, cls="n" if column in numbers else "") for column, text in enumerate(heading)
    )
    return _Html(f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def _stages(report: Report) -> _Html:
    if not report.stages:
        return _Html("")
    longest_s = max(row.slowest_s for row in report.stages) or 1.0
    rows = [_stage_row(row, longest_s) for row in report.stages]
    if report.total:
        rows.append(_stage_row(report.total, 0.0))
    heading = ("stage", "median", "slowest", "on", "slowest/median", "median, and slowest in a lighter shade")
    said = _el("p", "~ not marked by the job: what its nodes saw of its image and its reads", cls="dim")
    derived = any(row.derived for row in report.stages)
    return _el(
        "section",
        _el("h2", "Where the time went"),
        _table(heading, rows, (1, 2, 4)),
        said if derived else _Html(""),
    )


def _stage_row(row: StageRow, longest_s: float) -> _Html:
    noticeable = row.ratio is not None and row.slowest_s - row.median_s >= NOTICEABLE_S
    slow = noticeable and (row.ratio or 0) >= SLOW
    style = ("very-slow" if (row.ratio or 0) >= _VERY_SLOW else "slow") if slow else ""
    ratio = "" if row.ratio is None or row.node_count < 2 else f"{min(row.ratio, 999):.1f} ×"
    known = row.stage in STAGES
    key = _Html(f'<span class="key {row.stage}"></span>') if known else _Html("")
    cells = _el("td", key, f"{row.stage} ~" if row.derived else row.stage)
    for text in (format_duration(row.median_s), format_duration(row.slowest_s)):
        cells = _Html(cells + _el("td", text, cls="n"))
    cells = _Html(cells + _el("td", row.slowest_node) + _el("td", ratio, cls=f"n {style}".strip()))
    bars = ""
    if known and longest_s:
        for shade, duration_s in (("slowest", row.slowest_s), ("median", row.median_s)):
            width = round(_BAR * duration_s / longest_s)
            bars += f'<rect class="{row.stage} {shade}" width="{width}" height="12" y="2"/>'
        bars = f'<svg viewBox="0 0 {_BAR} 16" preserveAspectRatio="none">{bars}</svg>'
    return _el("tr", _Html(cells + _el("td", _Html(bars), cls="bar")), cls="" if known else "total")


def _timeline(report: Report) -> _Html:
    if not report.starts:
        return _el("section", _el("p", "No node has sent events of this start."))
    used = [row.stage for row in report.stages]
    options = "".join(f'<option value="{STAGES.index(stage)}">longest {stage}</option>' for stage in used)
    legend = "".join(_el("span", _Html(f'<span class="key {stage}"></span>'), stage) for stage in used)
    return _filled("timeline.html", options=options, legend=legend)


def _stragglers(report: Report) -> _Html:
    if not report.stragglers:
        return _Html("")
    rows = [
        _el("tr", _el("td", each.node), _el("td", each.cause, cls="slow"), _el("td", each.stage),
            _el("td", format_duration(each.lost_s), cls="n"), _el("td", each.detail))
        for each in report.stragglers[:_ROWS]
    ]  # fmt: skip
    return _el(
        "section",
        _el("h2", "Nodes that held the start up"),
        _table(("node", "likely cause", "in stage", "over the median", "because"), rows, (3,)),
        _more(len(report.stragglers)),
    )


def _more(count: int) -> _Html:
    """How many rows a table has not."""
    return _el("p", f"and {count - _ROWS:,} more", cls="dim") if count > _ROWS else _Html("")


def _transfers(report: Report) -> _Html:
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in report.transfers:
        groups.setdefault((row.what, row.target), []).append(row)
    if not groups:
        return _Html("")
    lines = []
    for (what, target), rows in list(groups.items())[:_ROWS]:
        rates = [row.rate for row in rows if row.rate]
        hit, miss = sum(row.hit_bytes for row in rows), sum(row.miss_bytes for row in rows)
        in_time = [row.in_time for row in rows if row.in_time is not None]
        cells = [
            *(format_bytes(sum(getattr(row, name) or 0 for row in rows))
              for name in ("cached_bytes", "store_bytes", "origin_bytes")),
            f"{format_bytes(median(rates))}/s" if rates else "-",
            f"{sum(in_time):,} of {len(in_time):,}" if in_time else "-",
            f"{100 * hit / (hit + miss):.1f} %" if hit + miss else "-",
            format_bytes(miss),
            waited_text(rows),
        ]  # fmt: skip
        numbers = (_el("td", text, cls="n") for text in cells)
        lines.append(_el("tr", _el("td", what), _el("td", target, cls="dim"), *numbers))
    heading = (
        "what",
        "path",
        "from cache",
        "from store",
        "from original",
        "rate",
        "in time",
        "hits",
        "missed",
        "waited",
    )
    return _el(
        "section",
        _el("h2", "What was brought to the nodes"),
        _table(heading, lines, range(2, 10)),
        _more(len(groups)),
        _el(
            "p",
            "Bytes: sums over the nodes. Rate: the median node's. "
            "Waited: for how much of the start some read waited, on the worst node.",
            cls="dim",
        ),
    )


def _remarks(report: Report) -> _Html:
    lines = [
        (problem.level, f"{nodes_text(problem.nodes)}: "
         + " ".join(part for part in (problem.what, problem.target, problem.message) if part))
        for problem in report.problems[:_ROWS]
    ]  # fmt: skip
    if report.run.silent_nodes:
        lines.append(("warning", f"{nodes_text(report.run.silent_nodes)} sent no events"))
    if report.unended_nodes:
        lines.append(("warning", f"{nodes_text(report.unended_nodes)}: died, or the epilog still runs"))
    lines += [("note", note) for note in report.notes]
    if not lines:
        return _Html("")
    rows = [_el("tr", _el("td", level, cls=level), _el("td", text)) for level, text in lines]
    table = _Html(f"<table>{''.join(rows)}</table>")
    return _el("section", _el("h2", "Remarks"), table, _more(len(report.problems)))


def _data(report: Report) -> dict[str, Any]:
    """What the script draws, in seconds from the allocation on."""
    zero_ns = report.start_ns or 0
    sent = {each.node: each for each in report.run.nodes}
    causes = {each.node: f"{each.cause}: {each.detail}" for each in report.stragglers}
    brought: dict[str, list[Transfer]] = {}
    for row in report.transfers:
        brought.setdefault(row.node, []).append(row)
    nodes = [
        {
            "name": _visible(start.node),
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
            "cause": _visible(causes.get(start.node, "")),
        }
        for start in report.starts
    ]
    known = {start.node for start in report.starts}
    nodes += [
        {"name": _visible(name), "spans": [], "trained": False, "facts": [], "cause": ""}
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


def _facts(start: NodeStart, sent: dict[str, Any], rows: Sequence[Transfer]) -> list[str]:
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
