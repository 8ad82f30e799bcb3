"""Show a report on a terminal, with rich.

Owns the looks; every figure comes from analyse. Texts from events, from
accounting and from users are only ever put into rich's Text, which has no markup.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bootseer_slurm.report.render.document import node_names
from bootseer_slurm.report.render.headline import TRAINING_SAID, nodes_text, printable, waited_text
from bootseer_slurm.report.startup.figures import Problem, Report, StageRow
from bootseer_slurm.report.startup.stragglers import NOTICEABLE_S, SLOW
from bootseer_slurm.report.startup.transfers import Transfer
from bootseer_slurm.units import format_bytes, format_duration

_VERY_SLOW = 2.0
_SHOWN_STRAGGLERS = 5
_SHOWN_ROWS = 50  # of transfers and problems: a user's own events could have any number
_DISPENSABLE = ("missed", "rate", "hits")  # columns that a narrow terminal does without, the first one first
_SOURCES = ("cached_bytes", "peer_bytes", "store_bytes", "origin_bytes")
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
    for straggler in report.stragglers[:_SHOWN_STRAGGLERS]:
        lost = f"{straggler.stage} {format_duration(straggler.lost_s)} longer than the median"
        remarks.add_row(
            Text("slow", style="bold yellow"),
            Text.assemble(f"{straggler.node}: ", (straggler.cause, "bold"), f" ({lost}); {straggler.detail}"),
        )
    if len(report.stragglers) > _SHOWN_STRAGGLERS:
        rest = [straggler.node for straggler in report.stragglers[_SHOWN_STRAGGLERS:]]
        remarks.add_row(
            Text("slow", style="bold yellow"),
            Text(f"and {_count(len(rest), 'node')} more: {nodes_text(rest)}"),
        )
    for problem in report.problems[:_SHOWN_ROWS]:
        remarks.add_row(Text(problem.level, style=_LEVEL_STYLE[problem.level]), _problem_text(problem))
    if len(report.problems) > _SHOWN_ROWS:
        remarks.add_row(
            Text("note", style="dim"), Text(f"and {len(report.problems) - _SHOWN_ROWS} problems more")
        )
    if report.run.silent_nodes:
        remarks.add_row(
            Text("silent", style="yellow"), Text(f"{nodes_text(report.run.silent_nodes)} sent no events")
        )
    if report.unended_nodes:
        remarks.add_row(
            Text("no end", style="yellow"),
            Text(f"{nodes_text(report.unended_nodes)}: died, or the epilog still runs"),
        )
    if any(row.derived for row in report.stages):
        remarks.add_row(
            Text("~", style="dim"),
            Text("the job does not mark this stage; the nodes saw its image and reads"),
        )
    for note in report.notes:
        remarks.add_row(Text("note", style="dim"), Text(note))
    if remarks.row_count:
        console.print(remarks)


def _header(report: Report, signs: _Signs) -> Panel:
    run, record = report.run, report.run.record
    nodes = node_names(report)
    where = f"{_count(len(nodes), 'node')} {_short(nodes_text(nodes), 40)}".strip()
    if record:
        who = f"{record.user or run.uid} {signs.dot} account {record.account} {signs.dot} {record.partition}"
        lines = [Text(printable(f"{who} {signs.dot} {where}"))]
    else:
        lines = [Text(f"uid {run.uid} {signs.dot} {where}")]
    facts = [f"state {record.state}"] if record else []
    if report.queue_s is not None:
        facts.append(f"queued {format_duration(report.queue_s)}")
    if report.wall_s is not None:
        facts.append(f"wall time {format_duration(report.wall_s)}")
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
        lines.append(_training_line(report, signs))
    if report.verdict:
        lines.append(Text(printable(report.verdict.text), style="bold" if report.verdict.names else ""))
    name = f"{record.name}" if record else ""
    title = f"job {record.shown_id if record else run.job}"
    title += f" restart {run.restart}" if run.restart else ""
    title += f" {signs.dot} {_short(printable(name), 40)}" if name else ""
    return Panel(Group(*lines), title=Text(title, style="bold"), title_align="left", box=box.ROUNDED)


def _lost(report: Report, signs: _Signs) -> list[tuple[str, str]]:
    """The cost of the waiting: in GPU time, or in CPU time where there is no GPU."""
    if report.lost_gpu_s is not None:
        count, unit, lost_s = report.gpus, "GPU", report.lost_gpu_s
    elif report.lost_cpu_s is not None:
        count, unit, lost_s = report.cpus, "CPU", report.lost_cpu_s
    else:
        return []
    amount = f"{lost_s:,.0f} {unit}-seconds" if lost_s < 36_000 else f"{lost_s / 3600:,.1f} {unit}-hours"
    detail = f" ({_count(count, unit)})"
    return [(f" {signs.dot} cost ", ""), (amount, "bold"), (detail, "dim")]


def _training_line(report: Report, signs: _Signs) -> Text:
    """How it is known that training began, and how long a plain start of this job class takes."""
    facts = [TRAINING_SAID[report.training_from or "mark"]]
    if report.mode != "observe":
        plain = report.plain
        facts.append(
            f"plain {format_duration(plain.median_s)} (median of {plain.count} starts)"
            if plain
            else "plain: unknown, no such start was observed"
        )
    return Text(f" {signs.dot} ".join(facts))


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
        Text(f"{row.stage} ~" if row.derived else row.stage),
        Text(format_duration(row.median_s)),
        Text(format_duration(row.slowest_s)),
        Text(_short(row.slowest_node, 18)),
        Text(ratio, style=style),
    ]


def _stage_style(row: StageRow) -> str:
    if row.ratio is None or row.slowest_s - row.median_s < NOTICEABLE_S or row.ratio < SLOW:
        return ""
    return "red" if row.ratio >= _VERY_SLOW else "yellow"


def _transfer_lines(report: Report, width: int) -> Text:
    """One row per thing, over all nodes. Bytes are the sum over the nodes, the rate is the median node's.

    Laid out by hand: a path goes behind its row where there is room, else below it, and is not cut.
    Columns that matter least are left out where the others have no room.
    """
    groups: dict[tuple[str, str], list[Transfer]] = defaultdict(list)
    for transfer in report.transfers:
        groups[(transfer.what, transfer.target)].append(transfer)
    more = len(groups) - _SHOWN_ROWS
    groups = dict(list(groups.items())[:_SHOWN_ROWS])
    heading = ("transfer", "cache", "peers", "store", "original", "rate", "ready", "hits", "missed", "waited")
    rows = [_transfer_cells(what, transfers) for (what, _), transfers in groups.items()]
    columns = dict(zip(heading, zip(heading, *rows, strict=True), strict=True))
    for name, source in (("peers", "peer_bytes"), ("original", "origin_bytes")):
        if not any(getattr(row, source) for row in report.transfers):
            del columns[name]
    for name in _DISPENSABLE:
        if sum(max(map(len, column)) + 1 for column in columns.values()) > width + 1:
            del columns[name]
    widths = [max(map(len, column)) for column in columns.values()]
    gap_width = 2 if sum(widths) + 2 * len(widths) <= width else 1
    table = [_aligned(cells, widths, gap_width) for cells in zip(*columns.values(), strict=True)]
    lines = [Text(table[0], style="bold")]
    for (_, target), figures in zip(groups, table[1:], strict=True):
        gap = "  " if len(figures) + 2 + len(target) <= width else "\n  "
        lines.append(Text.assemble(figures, (gap + target, "dim")))
    if more > 0:
        lines.append(Text(f"and {more} more", style="dim"))
    return Text("\n", overflow="fold").join(lines)


def _transfer_cells(what: str, rows: Sequence[Transfer]) -> tuple[str, ...]:
    rates = [row.rate for row in rows if row.rate is not None]
    hit, miss = sum(row.hit_bytes for row in rows), sum(row.miss_bytes for row in rows)
    return (
        what,
        *(_sum_text([getattr(row, name) for row in rows]) for name in _SOURCES),
        f"{format_bytes(median(rates))}/s" if rates else "-",
        _ready(rows),
        f"{100 * hit / (hit + miss):.0f} %" if hit + miss else "-",
        format_bytes(miss) if hit + miss else "-",
        waited_text(rows),
    )


def _sum_text(sizes: Sequence[int | None]) -> str:
    known = [size_bytes for size_bytes in sizes if size_bytes is not None]
    return format_bytes(sum(known)) if known else "-"


def _aligned(cells: Sequence[str], widths: Sequence[int], gap_width: int) -> str:
    first, *rest = cells
    return (" " * gap_width).join(
        [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
    )


def _ready(rows: Sequence[Transfer]) -> str:
    """On how many nodes no read waited noticeably; where that is not known, whether the prefetch ended."""
    told = [row.in_time for row in rows if row.in_time is not None]
    all_words, no_words = "in time", "late"
    if not told and any(row.size_bytes is not None or row.dur_s is not None for row in rows):
        told = [row.dur_s is not None for row in rows]
        all_words, no_words = "ended", "not ended"
    if not told:
        return "-"
    if len(told) == len(rows) and sum(told) in (0, len(told)):
        return all_words if told[0] else no_words
    return f"{sum(told)} of {len(told)}"


def _problem_text(problem: Problem) -> Text:
    subject = " ".join(part for part in (problem.what, problem.target) if part)
    return Text(f"{nodes_text(problem.nodes)}: {subject + ': ' if subject else ''}{problem.message}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
