"""The common rows of the parts of `bench start`: those of one result of the demo's arms (demo/arms.py).

The floor, against which targets are set, is the time of the link plus that of a local start. The two overlap,
so a start can be faster than it; the rows' limit is the longer of the two, which no start can beat.
"""

from __future__ import annotations

from typing import Any

from scripts.lib.bench.rows import Row

BUSY_LIMIT = 0.6  # above it the cores may be the limit, and the floor, which is the link's, says nothing
ABOVE_FLOOR = 1.15

Result = dict[str, Any]


def limit_s(result: Result) -> float:
    """The time that no start can beat: the bytes over the link, or a start with all on the nodes."""
    return max(float(result["floor_bytes"] / result["link_bytes_per_s"]), float(result["local_s"]))


def floor_row(title: str, result: Result, name: str) -> Row:
    """An arm against the floor. No target where the cores may have been the limit."""
    arm = result["arms"][name]
    busy = arm["cpu_busy"] > BUSY_LIMIT
    how = describe(result)
    if busy:
        how += f"; {name}: the cores may be the limit ({arm['cpu_busy']:.0%} busy), so there is no target"
    value = arm["median_s"] / result["floor_s"]
    limit = limit_s(result) / result["floor_s"]
    return Row(f"{title}: {name} / floor", value, "×", None if busy else ABOVE_FLOOR, limit, how)


def seconds_rows(title: str, result: Result) -> list[Row]:
    """Each arm's seconds."""
    limit = limit_s(result)
    return [
        Row(f"{title}: {name}", arm["median_s"], "s", None, limit, describe(result))
        for name, arm in result["arms"].items()
    ]


def describe(result: Result) -> str:
    """The starts that were run, the floor, and the cost of each arm."""
    rounds = len(next(iter(result["arms"].values()))["runs_s"])
    node_count = result["nodes"]
    how = f"{node_count} node{'s' if node_count > 1 else ''}, the store's link at {result['store_link']} "
    how += f"(dd: {result['link_bytes_per_s'] / 1e6:.0f} MB/s), cold, medians of {rounds} rounds; "
    how += f"floor {result['floor_s']:.2f} s: {result['floor_bytes'] / 1e6:.0f} MB over the link, and "
    how += f"{result['local_s']:.2f} s of a start with all on the nodes"
    return "; ".join([how, *(_cost(name, arm) for name, arm in result["arms"].items())])


def _cost(name: str, arm: Result) -> str:
    said = f"{name} {arm['median_s']:.2f} s (" + ", ".join(f"{each:.2f}" for each in arm["runs_s"]) + "), "
    said += f"{arm['store_bytes'] / 1e6:.0f} MB sent, link {arm['link_busy']:.0%} busy, "
    return said + f"{arm['cpu_s']:.1f} core-seconds, cores {arm['cpu_busy']:.0%} busy"
