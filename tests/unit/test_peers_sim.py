"""Simulated jobs, small ones: all nodes finish, and they read about one copy together."""

from __future__ import annotations

import pytest

from scripts.lib.bench.peers_model import Outcome, simulate
from scripts.lib.bench.peers_sim import run
from scripts.lib.bench.peers_store import SharedStore
from scripts.lib.bench.peers_world import Inputs, Job

SLOW_STORE = Inputs(store_rates=((1, 1.25e8),))
FAST_STORE = Inputs(store_rates=((1, 2.5e9),))
SIZE_BYTES = 128 * 2**20


def check(outcome: Outcome, nodes: int, copies: float) -> None:
    assert outcome.unfinished == 0 and len(outcome.finish_s) == nodes
    assert 1.0 <= outcome.copies <= copies


@pytest.mark.parametrize("inputs", [SLOW_STORE, FAST_STORE])
@pytest.mark.parametrize("nodes", [1, 2, 3, 16, 100, 200])
def test_quiet_nodes_read_one_copy(nodes: int, inputs: Inputs) -> None:
    outcome = simulate(Job(nodes, SIZE_BYTES), inputs)
    check(outcome, nodes, copies=1.0)
    assert outcome.causes == {"first": 32}
    assert outcome.finish_s[-1] < 1.6 * outcome.finish_s[0]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("nodes", [3, 16, 100, 200])
def test_nodes_that_start_seconds_apart_read_one_copy(nodes: int, seed: int) -> None:
    check(simulate(Job(nodes, SIZE_BYTES, skew_s=1.0, seed=seed), SLOW_STORE), nodes, copies=1.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("nodes", [4, 16, 100, 200])
def test_deaths_and_slow_nodes_cost_little(nodes: int, seed: int) -> None:
    """A node that dies may have its eight streams' chunks from the store on its way, and keeps some lists."""
    few = max(1, nodes // 100)
    outcome = simulate(Job(nodes, SIZE_BYTES, skew_s=1.0, dead=few, slow=few, seed=seed), SLOW_STORE)
    check(outcome, nodes - 2 * few, copies=1 + few * 12 / 32)
    assert outcome.largest_upload < 3


def test_a_tenth_of_the_nodes_may_die() -> None:
    check(simulate(Job(100, SIZE_BYTES, dead=10), SLOW_STORE), 90, copies=1.3)


def test_a_run_is_the_same_each_time_and_another_with_another_seed() -> None:
    job = Job(40, SIZE_BYTES, skew_s=0.5, dead=2, slow=2, seed=5)
    assert simulate(job, FAST_STORE) == simulate(job, FAST_STORE)
    other = Job(40, SIZE_BYTES, skew_s=0.5, dead=2, slow=2, seed=6)
    assert simulate(job, FAST_STORE) != simulate(other, FAST_STORE)


def test_readers_share_the_store() -> None:
    store: SharedStore[str] = SharedStore(((1, 100.0), (2, 120.0), (4, 140.0)))
    store.begin("first", 100, now_s=0.0)
    store.begin("second", 100, now_s=0.5)
    # 50 are left of the first, and both get 60 a second from now on.
    assert store.next_end_s() == pytest.approx(0.5 + 50 / 60)
    assert store.ended(1.0) == []
    assert store.ended(0.5 + 50 / 60) == ["first"]
    assert store.next_end_s() == pytest.approx(0.5 + 50 / 60 + 50 / 100)


def test_the_bench_gives_a_row_for_each_figure() -> None:
    rows = {row.metric: row for row in run("16")}
    copies = rows["16 nodes, 1 Gbit/s, quiet: copies"]
    assert copies.value == 1.0 and copies.limit == 1.0
    assert all(row.value == 0 for metric, row in rows.items() if metric.endswith("unfinished"))
    assert rows["16 nodes, 1 Gbit/s, disturbed: last/first"].value < 1.3
    assert "16 nodes, 20 Gbit/s, disturbed: last/first" not in rows, "the skew is longer than the transfer"
