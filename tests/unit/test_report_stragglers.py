"""Stragglers: which nodes are named, and which cause their own figures tell."""

from __future__ import annotations

import pytest

from bootseer_slurm.events import EventLog
from bootseer_slurm.report.gather.run import NodeEvents, Run
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import Report
from tests.unit.records import RECORD, SECOND, START

MIB = 1 << 20


def node(
    name: str, checkpoint_s: float = 10, *, trains_s: float | None = None, fetched: int = 1000 * MIB,
    cached: int = 0, fetch_s: float = 40, disk_s: float = 2, cpu_s: float = 1, hook_s: float = 0.5, told: bool = True, peers: int = 0,
) -> NodeEvents:  # fmt: skip
    """A start whose checkpoint takes so long, and what its agent tells of it."""
    log = EventLog(5, 0, name)

    def at(t_s: float, kind: str, event: str, **fields: str | int | float | None) -> None:
        log.emit(kind, event, t_ns=START + round(t_s * SECOND), **fields)

    at(hook_s, "hook", "begin")
    at(hook_s + 1, "step", "attach", step="0")
    at(hook_s + 2, "step", "task_start", step="0", task=0)
    loaded_s = hook_s + 2 + checkpoint_s
    at(loaded_s, "mark", "checkpoint_loaded", step="0", task=0)
    at(loaded_s + 1 if trains_s is None else trains_s, "mark", "training_started", step="0", task=0)
    if told:
        at(
            100, "access", "start", what="checkpoint", target="/c", store_bytes=fetched, origin_bytes=0,
            peer_bytes=peers, cached_bytes=cached, fetch_s=fetch_s, disk_s=disk_s,
        )  # fmt: skip
        at(100, "load", "start", dur_s=loaded_s, cpu_s=cpu_s)
    return NodeEvents(name, tuple(sorted(log.events(), key=lambda event: event.t_ns)), 0)


def report_of(*nodes: NodeEvents) -> Report:
    return analyse(Run(5, 0, (0,), 1000, RECORD, nodes, (), ()))


@pytest.mark.parametrize(
    ("slow", "cause"),
    [
        ({"checkpoint_s": 30, "fetch_s": 160}, "slow link"),
        ({"checkpoint_s": 30, "disk_s": 90}, "slow disk"),
        ({"checkpoint_s": 30, "fetched": 4000 * MIB, "fetch_s": 160, "disk_s": 8}, "cold cache"),
        ({"checkpoint_s": 30, "cpu_s": 25}, "contention"),
        ({"checkpoint_s": 30, "cpu_s": 25, "fetch_s": 160}, "contention"),
        ({"checkpoint_s": 30}, "not known"),
        ({"checkpoint_s": 30, "told": False}, "not known"),
        ({"hook_s": 20}, "late allocation"),
    ],
)
def test_the_cause_is_what_the_nodes_own_figures_tell(slow: dict[str, float], cause: str) -> None:
    report = report_of(node("n1"), node("n2"), node("n3", **slow), node("n4"))  # type: ignore[arg-type]
    (straggler,) = report.stragglers
    assert (straggler.node, straggler.cause) == ("n3", cause), straggler
    assert straggler.lost_s == pytest.approx(19.5 if cause == "late allocation" else 20)
    assert straggler.detail


def test_bytes_of_other_nodes_are_fetched_bytes_too() -> None:
    """The node that reads its copy from the store fetches no more than those that have it from there."""
    others = [node(name, fetched=0, peers=1000 * MIB) for name in ("n1", "n2")]
    (straggler,) = report_of(*others, node("n3", 30)).stragglers
    assert (straggler.node, straggler.cause) == ("n3", "not known")
    (straggler,) = report_of(*others, node("n3", 30, fetched=0, peers=1000 * MIB, fetch_s=160)).stragglers
    assert (straggler.node, straggler.cause) == ("n3", "slow link")


def test_a_cold_cache_among_warm_ones() -> None:
    warm = [node(name, 1, fetched=0, cached=1000 * MIB, fetch_s=0, disk_s=0) for name in ("n1", "n2")]
    (straggler,) = report_of(*warm, node("n3")).stragglers
    assert (straggler.node, straggler.cause) == ("n3", "cold cache")
    assert "had 0 B" in straggler.detail


def test_a_little_slower_is_no_straggler() -> None:
    assert report_of(node("n1"), node("n2"), node("n3", 14)).stragglers == ()
    short = (node("n1", 0.2), node("n2", 0.2), node("n3", 1.1))
    assert report_of(*short).stragglers == (), "five times as long, but less than a second"


def test_those_who_wait_for_the_slow_one_are_not_blamed() -> None:
    """All begin to train together: the time in which the others wait is in their last stage."""
    nodes = [node("n1", 5, trains_s=60), node("n2", 50, trains_s=60, fetch_s=400)]
    (straggler,) = report_of(*nodes).stragglers
    assert (straggler.node, straggler.stage, straggler.cause) == ("n2", "checkpoint", "slow link")


def test_the_worst_comes_first_and_one_node_alone_is_never_slow() -> None:
    report = report_of(node("n1"), node("n2", 30), node("n3", 50), node("n4"), node("n5"))
    assert [straggler.node for straggler in report.stragglers] == ["n3", "n2"]
    assert report_of(node("n1", 500)).stragglers == ()


def test_figures_that_no_agent_would_tell_break_nothing() -> None:
    wild = {"fetched": -5, "fetch_s": -1.0, "disk_s": 1e300, "cpu_s": -3.0, "cached": 1 << 62}
    report = report_of(node("n1"), node("n2"), node("n3", 30, **wild))  # type: ignore[arg-type]
    assert [straggler.node for straggler in report.stragglers] == ["n3"]
