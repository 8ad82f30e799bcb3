"""Show a report: on a terminal with rich, or as JSON.

Owns the looks and the JSON schema (docs/report.md); every figure comes from analyse. Texts from events, from
accounting and from users are only ever put into rich's Text, which has no markup.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bootseer_slurm.errors import InputError
from bootseer_slurm.report.analyse import Problem, Report, StageRow, Transfer
from bootseer_slurm.slurm.hostlist import fold
from bootseer_slurm.units import format_bytes, format_duration

JSON_SCHEMA = 1
# A stage is worth a colour only when the slowest node waits noticeably longer than the others.
_NOTICEABLE_S = 1.0
_SLOW, _VERY_SLOW = 1.5, 2.0
_LEVEL_STYLE = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True, slots=True)
class _Signs:
    """The few characters that a terminal without UTF-8 cannot print."""

    times: str
    dot: str
    arrow: str
    bar: str


_UTF8 = _Signs(times="×", dot="·", arrow="→", bar="█")
_ASCII = _Signs(times="x", dot="-", arrow="->", bar="#")


def to_terminal(report: Report, console: Console) -> None:
    """Print the report, fit to the console's width; from 80 columns on nothing that matters is cut."""
    if not console.options.ascii_only:
        _print(report, console, _UTF8)
        return
    # A name may hold letters that this terminal cannot print: a question mark is better than no report.
    with console.capture() as capture:
        _print(report, console, _ASCII)
    console.file.write(capture.get().encode("ascii", errors="replace").decode("ascii"))


def _print(report: Report, console: Console, signs: _Signs) -> None:
    console.print(_header(report, signs))
    if report.stages:
        console.print(_stage_table(report, signs, console.width), "")
    if report.transfers:
        console.print(_transfer_lines(report, console.width), "", sep="\n")
    remarks = Table.grid(padding=(0, 2))
    remarks.add_column(no_wrap=True)
    remarks.add_column(overflow="fold")
    for problem in report.problems:
        remarks.add_row(Text(problem.level, style=_LEVEL_STYLE[problem.level]), _problem_text(problem))
    if report.run.silent_nodes:
        remarks.add_row(
            Text("silent", style="yellow"), Text(f"{_fold(report.run.silent_nodes)} sent no events")
        )
    for note in report.notes:
        remarks.add_row(Text("note", style="dim"), Text(note))
    if remarks.row_count:
        console.print(remarks)


def to_json(report: Report) -> str:
    """The report as one JSON object with a stable schema: docs/report.md."""
    run, record = report.run, report.run.record
    content = {
        "schema": JSON_SCHEMA,
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
        "nodes": _node_names(report),
        "silent_nodes": list(run.silent_nodes),
        "gpus": report.gpus,
        "cpus": report.cpus,
        "queue_s": report.queue_s,
        "start_ns": report.start_ns,
        "start_from": "accounting" if record and record.start_ns else "events",
        "training_ns": report.training_ns,
        "start_to_training_s": report.start_to_training_s,
        "lost_gpu_s": report.lost_gpu_s,
        "lost_cpu_s": report.lost_cpu_s,
        "stages": [_stage_json(row) for row in report.stages],
        "total": _stage_json(report.total) if report.total else None,
        "starts": [asdict(start) | {"total_s": start.total_s} for start in report.starts],
        "transfers": [asdict(row) | {"bytes_per_s": row.rate} for row in report.transfers],
        "problems": [asdict(problem) for problem in report.problems],
        "notes": list(report.notes),
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _stage_json(row: StageRow) -> dict[str, object]:
    return asdict(row) | {"slowest_over_median": row.ratio}


def _node_names(report: Report) -> list[str]:
    """All nodes of the job, also those that sent nothing."""
    record = report.run.record
    if record and record.nodes:
        return list(record.nodes)
    return [*(sent.node for sent in report.run.nodes), *report.run.silent_nodes]


def _header(report: Report, signs: _Signs) -> Panel:
    run, record = report.run, report.run.record
    nodes = _node_names(report)
    where = f"{_count(len(nodes), 'node')} {_short(_fold(nodes), 40)}".strip()
    if record:
        who = f"{record.user or run.uid} {signs.dot} account {record.account} {signs.dot} {record.partition}"
        lines = [Text(f"{who} {signs.dot} {where}")]
    else:
        lines = [Text(f"uid {run.uid} {signs.dot} {where}")]
    facts = [f"state {record.state}"] if record else []
    if report.queue_s is not None:
        facts.append(f"queued {format_duration(report.queue_s)}")
    if report.mode:
        facts.append(f"mode {report.mode}")
    lines += [Text(f" {signs.dot} ".join(facts))] if facts else []
    waited_s = report.start_to_training_s
    since = "allocation" if record and record.start_ns else "first stamp"
    if waited_s is None:
        lines.append(Text("training: start not marked", style="yellow"))
    else:
        waited = (f"{since} {signs.arrow} training ", (format_duration(waited_s), "bold"))
        lines.append(Text.assemble(*waited, *_lost(report, signs)))
    name = f"{record.name}" if record else ""
    title = f"job {record.shown_id if record else run.job}"
    title += f" restart {run.restart}" if run.restart else ""
    title += f" {signs.dot} {_short(_one_line(name), 40)}" if name else ""
    return Panel(Group(*lines), title=Text(title, style="bold"), title_align="left", box=box.ROUNDED)


def _lost(report: Report, signs: _Signs) -> list[tuple[str, str]]:
    """What the waiting cost: in GPU time, or in CPU time where there is no GPU."""
    if report.lost_gpu_s is not None:
        count, unit, lost_s = report.gpus, "GPU", report.lost_gpu_s
    elif report.lost_cpu_s is not None:
        count, unit, lost_s = report.cpus, "CPU", report.lost_cpu_s
    else:
        return []
    amount = f"{lost_s:,.0f} {unit}-seconds" if lost_s < 36_000 else f"{lost_s / 3600:,.1f} {unit}-hours"
    detail = f" ({_count(count, unit)})"
    return [(f" {signs.dot} cost ", ""), (amount, "bold"), (detail, "dim")]


def _stage_table(report: Report, signs: _Signs, width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading, justify in (
        ("stage", "left"), ("median", "right"), ("slowest", "right"), ("on", "left"), ("slow/med", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    bar_width = max(8, min(40, width - 64))
    table.add_column("", width=bar_width, no_wrap=True)
    longest_s = max(row.slowest_s for row in report.stages)
    for row in report.stages:
        style = _stage_style(row)
        length = round(bar_width * row.slowest_s / longest_s) if longest_s > 0 else 0
        length = max(length, 1 if row.slowest_s > 0 else 0)
        table.add_row(*_stage_cells(row, signs, style), Text(signs.bar * length, style=style or "cyan"))
    if report.total:
        table.add_section()
        table.add_row(*_stage_cells(report.total, signs, _stage_style(report.total)), style="bold")
    return table


def _stage_cells(row: StageRow, signs: _Signs, style: str) -> list[Text]:
    ratio = "" if row.ratio is None or row.node_count < 2 else f"{min(row.ratio, 999):.1f}{signs.times}"
    return [
        Text(row.stage),
        Text(format_duration(row.median_s)),
        Text(format_duration(row.slowest_s)),
        Text(_short(row.slowest_node, 18)),
        Text(ratio, style=style),
    ]


def _stage_style(row: StageRow) -> str:
    if row.ratio is None or row.slowest_s - row.median_s < _NOTICEABLE_S or row.ratio < _SLOW:
        return ""
    return "red" if row.ratio >= _VERY_SLOW else "yellow"


def _transfer_lines(report: Report, width: int) -> Text:
    """One row per thing, over all nodes. Bytes are the sum over the nodes, the rate is the median node's.

    Laid out by hand: a path goes behind its row where there is room, else below it, and is not cut.
    """
    groups: dict[tuple[str, str], list[Transfer]] = defaultdict(list)
    for transfer in report.transfers:
        groups[(transfer.what, transfer.target)].append(transfer)
    heading = ("transfer", "fetched", "cached", "rate", "ready", "hits", "waited")
    rows = [_transfer_cells(what, transfers) for (what, _), transfers in groups.items()]
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = [Text(_aligned(heading, widths), style="bold")]
    for (_, target), row in zip(groups, rows, strict=True):
        figures = _aligned(row, widths)
        gap = "  " if len(figures) + 2 + len(target) <= width else "\n  "
        lines.append(Text.assemble(figures, (gap + target, "dim")))
    return Text("\n", overflow="fold").join(lines)


def _transfer_cells(what: str, rows: Sequence[Transfer]) -> tuple[str, ...]:
    fetched = [row.fetched_bytes for row in rows if row.fetched_bytes is not None]
    cached = [row.cached_bytes for row in rows if row.cached_bytes is not None]
    rates = [row.rate for row in rows if row.rate is not None]
    hit, miss = sum(row.hit_bytes for row in rows), sum(row.miss_bytes for row in rows)
    was_read = any(row.reads is not None for row in rows)
    return (
        what,
        format_bytes(sum(fetched)) if fetched else "-",
        format_bytes(sum(cached)) if cached else "-",
        f"{format_bytes(median(rates))}/s" if rates else "-",
        _ready(rows),
        f"{100 * hit / (hit + miss):.0f} %" if hit + miss else "-",
        format_duration(max(row.blocked_s for row in rows)) if was_read else "-",
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])


def _ready(rows: Sequence[Transfer]) -> str:
    """On how many nodes the prefetch had ended when training began; where that is not known, at all."""
    known = [row.in_time for row in rows if row.in_time is not None]
    if known:
        count, all_words, no_words = sum(known), "in time", "late"
    elif any(row.size_bytes is not None or row.dur_s is not None for row in rows):
        count, all_words, no_words = sum(row.dur_s is not None for row in rows), "ended", "not ended"
    else:
        return "-"
    if count in (0, len(rows)):
        return all_words if count else no_words
    return f"{count} of {len(rows)}"


def _problem_text(problem: Problem) -> Text:
    subject = " ".join(part for part in (problem.what, problem.target) if part)
    return Text(f"{_fold(problem.nodes)}: {subject + ': ' if subject else ''}{problem.message}")


def _fold(nodes: Sequence[str]) -> str:
    try:
        return fold(nodes)
    except InputError:
        return _count(len(nodes), "node")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
