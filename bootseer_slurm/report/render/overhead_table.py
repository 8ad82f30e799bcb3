"""Show the overhead of a cluster: on a terminal with rich, or as JSON (docs/overhead.md).

Names come from users: they are only ever put into rich's Text, which has no markup, and are free of control
characters since they were put into the records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bootseer_slurm.report.totals.figures import EDGES_S, Group, Overhead
from bootseer_slurm.units import format_duration

JSON_SCHEMA = 1
_BAR_WIDTH = 30
_NAME_WIDTH = 48


def to_terminal(result: Overhead, console: Console) -> None:
    """Print the figures; a letter that the terminal cannot print becomes a question mark."""
    if not console.options.ascii_only:
        _print(result, console)
        return
    with console.capture() as capture:
        _print(result, console)
    console.file.write(capture.get().encode("ascii", errors="replace").decode("ascii"))


def _print(result: Overhead, console: Console) -> None:
    total, device = result.total, result.device.upper()
    since = datetime.fromtimestamp(result.since_ms / 1000, tz=timezone.utc)
    console.print(
        Text(f"Starts since {since:%Y-%m-%d %H:%M} UTC: {total.starts}, measured: {total.measured}", "bold")
    )
    if not total.measured:
        console.print("No start of that time says when training began.")
        return
    lost_h, used_h = result.lost_s(total) / 3600, result.used_s(total) / 3600
    console.print(
        Text(f"{_share(result, total)} of {used_h:,.1f} {device}-hours went by before training began: ")
        + Text(f"{lost_h:,.1f} {device}-hours", "bold red")
    )
    console.print()
    console.print(_histogram(total, console))
    shares = (("half", 0.5), ("90 %", 0.9), ("99 %", 0.99))
    within = (f"{name} within {_duration(total.percentile(share))}" for name, share in shares)
    console.print(f"{', '.join(within)}\n", highlight=False)
    tables = [
        ("By nodes", "nodes", result.sizes),
        ("By mode", "mode", result.modes),
        (f"By {result.trend_unit}", result.trend_unit, result.trend),
    ]
    if result.by != "size":
        left = result.group_count - len(result.groups)
        more = f" ({left} more)" if left else ""
        tables.insert(0, (f"Most lost, by {result.by}{more}", result.by, result.groups))
    for title, column, groups in tables:
        console.print(_groups(result, title, column, groups))
    console.print(_dearest(result))


def to_json(result: Overhead) -> str:
    """The figures as one JSON object."""

    def group(each: Group) -> dict[str, object]:
        return {
            "name": each.name,
            "starts": each.starts,
            "measured": each.measured,
            "p50_s": _rounded(each.percentile(0.5)),
            "p90_s": _rounded(each.percentile(0.9)),
            "p99_s": _rounded(each.percentile(0.99)),
            "used_s": round(result.used_s(each), 3),
            "lost_s": round(result.lost_s(each), 3),
            "share": result.share(each),
        }

    edges = [None if math.isinf(edge) else edge for edge in EDGES_S]
    content = {
        "schema": JSON_SCHEMA,
        "since_ms": result.since_ms,
        "device": result.device,
        "total": group(result.total),
        "histogram": {"edges_s": edges, "starts": result.total.histogram()},
        "by": result.by,
        "groups": [group(each) for each in result.groups],
        "group_count": result.group_count,
        "sizes": [group(each) for each in result.sizes],
        "modes": [group(each) for each in result.modes],
        "trend_unit": result.trend_unit,
        "trend": [group(each) for each in result.trend],
        "dearest": [
            {"job": each.shown_id, "user": each.user, "nodes": each.nodes}
            | {"start_s": round(each.start_s, 3), "lost_s": round(each.lost_s, 3)}
            for each in result.dearest
        ],
    }
    return json.dumps(content, indent=2)


def _histogram(total: Group, console: Console) -> Table:
    table = _table("Time from allocation until training began")
    table.add_column("", justify="right")
    table.add_column("starts", justify="right")
    table.add_column("")
    counts = total.histogram()
    used = [index for index, count in enumerate(counts) if count]
    for index in range(used[0], used[-1] + 1):
        low, high = EDGES_S[index], EDGES_S[index + 1]
        label = f"over {_edge(low)}" if math.isinf(high) else f"{_edge(low)} to {_edge(high)}"
        table.add_row(label, f"{counts[index]}", _bar(counts[index] / max(counts), console))
    return table


def _groups(result: Overhead, title: str, column: str, groups: Sequence[Group]) -> Table:
    table = _table(title)
    table.add_column(column)
    for heading in ("starts", "measured", "median", "90 %", f"{result.device.upper()}-hours lost", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups:
        table.add_row(
            Text(group.name if len(group.name) <= _NAME_WIDTH else f"...{group.name[-_NAME_WIDTH + 3 :]}"),
            f"{group.starts}",
            f"{group.measured}",
            _duration(group.percentile(0.5)),
            _duration(group.percentile(0.9)),
            f"{result.lost_s(group) / 3600:,.1f}",
            _share(result, group),
        )
    return table


def _dearest(result: Overhead) -> Table:
    table = _table("Dearest starts")
    for heading in ("job", "user"):
        table.add_column(heading)
    for heading in ("nodes", "start", f"{result.device.upper()}-hours lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in result.dearest[:5]:
        lost = f"{each.lost_s / 3600:,.1f}"
        table.add_row(
            Text(each.shown_id), Text(each.user), f"{each.nodes}", format_duration(each.start_s), lost
        )
    return table


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=Text(title, "bold"), title_justify="left")


def _bar(share: float, console: Console) -> Text:
    sign = "#" if console.options.ascii_only else "█"
    return Text(sign * max(1 if share else 0, round(share * _BAR_WIDTH)), "cyan")


def _edge(edge_s: float) -> str:
    for unit_s, unit in ((3600, "h"), (60, "min")):
        if edge_s >= unit_s:
            return f"{edge_s / unit_s:g} {unit}"
    return f"{edge_s:g} s"


def _duration(duration_s: float | None) -> str:
    return "-" if duration_s is None else format_duration(duration_s)


def _share(result: Overhead, group: Group) -> str:
    share = result.share(group)
    return "-" if share is None else f"{share:.2%}".replace("%", " %")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
