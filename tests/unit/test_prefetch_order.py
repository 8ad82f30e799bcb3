"""The order in which nodes that exchange blocks bring them."""

from __future__ import annotations

from bootseer_slurm.cache.sources import Turn
from bootseer_slurm.prefetch.order import in_turn

RUNS = [(number, number, number) for number in range(6)]


def test_nodes_begin_each_window_with_another_run() -> None:
    assert [run[0] for run in in_turn(RUNS, Turn(4, 1))] == [1, 2, 3, 0, 5, 4]
    assert [run[0] for run in in_turn(RUNS, Turn(4, 3))] == [3, 0, 1, 2, 4, 5]


def test_a_node_alone_keeps_the_order() -> None:
    assert in_turn(RUNS, Turn(1, 0)) == RUNS
