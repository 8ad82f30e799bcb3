"""The demo's arms at one number of nodes and one rate of the store's link: plain, first, again, spelled."""

from __future__ import annotations

from collections.abc import Callable

from scripts.lib.bench.rows import Row
from scripts.lib.bench.start_rows import Result, describe, floor_row, limit_s, seconds_rows
from scripts.lib.cluster.client import Cluster
from scripts.lib.demo import arms
from scripts.lib.demo.starts import Tell

ROUNDS = 2
ARMS = (arms.PLAIN, arms.FIRST, arms.AGAIN, arms.SPELLED)
STEPS = arms.count(ARMS, ROUNDS)
BARE = 1.03  # of the spelled-out one
MANY = 4  # nodes, from which on more is asked than to be no slower than plain
FIRST_SHARE, AGAIN_SHARE = 0.75, 0.55  # of plain, there
NEAR_FLOOR = 1.1  # good enough, where the floor itself is near plain


def measure(cluster: Cluster, link: str, tell: Tell, done: Callable[[], None]) -> list[Row]:
    """The rows of one cell, on the cluster's first node_count nodes."""
    measured = arms.measure(cluster, ARMS, rounds=ROUNDS, store_link=link, tell=tell, done=done)
    return rows_of(arms.result(cluster, measured, link))


def rows_of(result: Result) -> list[Row]:
    """The rows of one cell's starts."""
    seconds = {name: arm["median_s"] for name, arm in result["arms"].items()}
    plain_s, floor_s = seconds["plain"], result["floor_s"]
    title = f"{result['nodes']} × {result['store_link']}"
    many = result["nodes"] >= MANY
    first_target = FIRST_SHARE if many else 1.0
    again_target = max(AGAIN_SHARE, NEAR_FLOOR * floor_s / plain_s) if many else 1.0

    def against_plain(name: str, target: float) -> Row:
        value, limit = seconds[name] / plain_s, limit_s(result) / plain_s
        return Row(f"{title}: {name} / plain", value, "×", target, limit, describe(result))

    bare = seconds["again"] / seconds["spelled"]
    return [
        floor_row(title, result, "again"),
        floor_row(title, result, "spelled"),
        Row(f"{title}: again / spelled", bare, "×", BARE, 1.0, describe(result)),
        against_plain("first", first_target),
        against_plain("again", min(again_target, 1.0)),
        *seconds_rows(title, result),
    ]
