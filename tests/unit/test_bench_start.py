"""The rows of `scripts/bench start`: what is asked of which cell, from results as the demo's arms give them."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.lib.bench import start, start_demo, start_paper, start_warm
from scripts.lib.bench.rows import Row
from scripts.lib.cluster.client import Cluster


def result(nodes: int, cpu_busy: float = 0.4, **seconds: float) -> dict[str, Any]:
    """A result with these arms, each of two runs that took as long, and a floor of 10 s."""
    arms = {
        name: {
            "runs_s": [each_s, each_s],
            "median_s": each_s,
            "store_bytes": 1e9,
            "link_busy": 0.9,
            "cpu_s": 8.0,
            "cpu_busy": cpu_busy,
        }
        for name, each_s in seconds.items()
    }
    return {
        "arms": arms,
        "floor_s": 10.0,
        "floor_bytes": 5e8,
        "local_s": 5.0,
        "nodes": nodes,
        "store_link": "1gbit",
        "link_bytes_per_s": 1e8,
    }


def by_metric(rows: list[Row]) -> dict[str, Row]:
    """The rows by what follows the title. No metric is there twice."""
    found = {row.metric.partition(": ")[2]: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_four_nodes_are_to_save_a_quarter_and_then_nearly_half() -> None:
    rows = by_metric(start_demo.rows_of(result(4, plain=40, first=29, again=11, spelled=11)))
    first, again = rows["first / plain"], rows["again / plain"]
    assert (first.value, first.target, first.met) == (29 / 40, 0.75, True)
    assert (again.value, again.target, again.met) == (11 / 40, 0.55, True)
    assert again.limit == first.limit == 5 / 40, "the link and what is local can overlap"
    assert rows["again / floor"].value == pytest.approx(1.1) and rows["again / floor"].met
    assert rows["again / floor"].limit == 0.5
    assert rows["again / spelled"].value == 1 and rows["again / spelled"].target == 1.03
    assert rows["again"].value == 11 and rows["again"].target is None and rows["again"].limit == 5


def test_where_the_floor_is_near_plain_to_be_near_the_floor_is_enough() -> None:
    near = by_metric(start_demo.rows_of(result(4, plain=12, first=12, again=10.9, spelled=11)))
    assert near["again / plain"].target == pytest.approx(11 / 12) and near["again / plain"].met
    above = by_metric(start_demo.rows_of(result(4, plain=10.5, first=10, again=10.6, spelled=11)))
    assert above["again / plain"].target == 1, "slower than plain is never enough"
    assert not above["again / plain"].met


@pytest.mark.parametrize("nodes", [1, 2])
def test_few_nodes_are_to_be_no_slower_than_plain(nodes: int) -> None:
    rows = by_metric(start_demo.rows_of(result(nodes, plain=20, first=21, again=20, spelled=20)))
    assert rows["first / plain"].target == rows["again / plain"].target == 1
    assert rows["again / plain"].met and not rows["first / plain"].met


def test_cores_that_are_the_limit_take_the_target_from_the_floor_only() -> None:
    slow = result(4, cpu_busy=0.61, plain=40, first=39, again=30, spelled=30)
    rows = by_metric(start_demo.rows_of(slow))
    for name in ("again / floor", "spelled / floor"):
        assert rows[name].target is None and rows[name].met is None
        assert "the cores may be the limit (61% busy)" in rows[name].how
    assert rows["first / plain"].met is False


def test_how_tells_of_what_was_measured() -> None:
    how = by_metric(start_demo.rows_of(result(1, plain=20, first=20, again=20, spelled=20)))["again"].how
    for said in (
        "1 node,",
        "1gbit (dd: 100 MB/s)",
        "2 rounds",
        "1000 MB sent",
        "8.0 core-seconds",
        "90% busy",
    ):
        assert said in how


def test_the_papers_comparison_is_of_what_stock_takes() -> None:
    rows = by_metric(start_paper.rows_of(result(1, stock=100, plain=20, first=16, again=12), "pull 3.0 s"))
    first, again = rows["first shorter than stock by"], rows["again shorter than stock by"]
    assert (first.value, first.target, first.met) == (0.84, 0.85, False)
    assert again.value == 0.88 and again.met and again.limit == 0.95
    assert "pull 3.0 s" in again.how


def test_the_cost_of_a_warm_job_is_the_median_of_the_rounds_differences() -> None:
    def runs(*seconds: float) -> list[dict[str, float]]:
        return [{"task": each, "queued": 0.5, "sent_bytes": 1e6} for each in seconds]

    measured = {
        "plain": runs(1.0, 2.0, 9.0),
        "plain again": runs(1.0, 2.1, 8.0),
        "bare": runs(1.3, 2.05, 9.1),
    }
    (row,) = start_warm.rows_of("empty", "task", measured)
    assert row.value == pytest.approx(0.1) and row.limit == 0
    assert row.target == 0.1 and "bare 2.050 s" in row.how and "bare 2.550 s" in row.how


def test_each_part_names_cells_and_every_cell_is_a_part() -> None:
    names = [cell.name for cell in start.cells(Cluster.default(4))]
    assert len(set(names)) == len(names) == 13
    for part in start.PARTS:
        assert any(name == part or name.startswith(f"{part}-") for name in names)
    assert set(names) <= set(start.PARTS)
