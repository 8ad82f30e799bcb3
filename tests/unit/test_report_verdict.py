"""Readiness and the verdict: what is in time, what waiting cost, and which artifact held the start up."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from bootseer_slurm.events import BELOW_LAYER, EventLog
from bootseer_slurm.report.gather.run import NodeEvents, Run
from bootseer_slurm.report.render.html import to_html
from bootseer_slurm.report.render.terminal import to_terminal
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import Report
from tests.unit.records import RECORD, SECOND, START

VENV, IMAGE, CKPT = "/home/alice/venv", "/lustre/img/train.sqsh", "/ckpt/step_9000"


class Node:
    """A node whose start took so long, and what its agent tells of it. trained_s None: it told no training."""

    def __init__(self, name: str, trained_s: float | None = 60, *, mode: str = "prefetch") -> None:
        self._log = EventLog(5, 0, name)
        self.at(0.5, "hook", "begin").at(0.6, "session", "begin", mode=mode)
        self.at(2, "step", "attach", step="0").at(3, "step", "task_start", step="0", task=0)
        if trained_s is not None:
            self.at(trained_s, "mark", "training_started", step="0", task=0)

    def at(self, t_s: float, kind: str, name: str, **fields: Any) -> Node:
        self._log.emit(kind, name, t_ns=START + round(t_s * SECOND), **fields)
        return self

    def brought(self, what: str, target: str, end_s: float = 5) -> Node:
        self.at(1, "prefetch", "begin", what=what, target=target, bytes=1000)
        return self.at(end_s, "prefetch", "end", what=what, target=target, bytes=1000, dur_s=end_s - 1)

    def waited(
        self, what: str, target: str, waited_s: float, longest_s: float | None = None, **more: Any
    ) -> Node:
        self.brought(what, target)
        longest_s = waited_s if longest_s is None else longest_s
        about = {"what": what, "target": target, "reads": 10, "blocked_s": 4 * waited_s, **more}
        self.at(62, "access", "start", waited_s=waited_s, longest_wait_s=longest_s, **about)
        return self.at(
            900, "access", "summary", waited_s=waited_s + 99, longest_wait_s=longest_s + 99, **about
        )

    def sent(self) -> NodeEvents:
        return NodeEvents(self._log.node, tuple(sorted(self._log.events(), key=lambda event: event.t_ns)), 0)


def report_of(*nodes: Node) -> Report:
    return analyse(Run(5, 0, (0,), 1000, RECORD, tuple(node.sent() for node in nodes), (), ()))


def verdict_of(*nodes: Node) -> str | None:
    verdict = report_of(*nodes).verdict
    return verdict.text if verdict else None


def shown(report: Report, width: int = 120) -> str:
    screen = io.StringIO()
    to_terminal(report, Console(file=screen, width=width))
    return screen.getvalue()


def row_of(report: Report, what: str, width: int = 120) -> str:
    return next(line for line in shown(report, width).splitlines() if line.startswith(f"{what}  "))


def test_a_thing_whose_read_waited_13_s_is_late_though_its_prefetch_had_ended() -> None:
    report = report_of(Node("n1").waited("environment", VENV, 13.2))
    (row,) = report.transfers
    assert row.in_time is False
    assert (row.waited_s, row.longest_wait_s, row.start_s) == (13.2, 13.2, 60)
    assert "late" in row_of(report, "environment") and "13.2 s (22 %)" in row_of(report, "environment")


@pytest.mark.parametrize(("waited_s", "in_time"), [(0.0, True), (0.6, True), (0.61, False)])
def test_reads_may_wait_for_one_percent_of_their_nodes_start(waited_s: float, in_time: bool) -> None:
    report = report_of(Node("n1", 60).waited("image", IMAGE, waited_s))
    assert report.transfers[0].in_time is in_time


def test_many_short_waits_are_late_too() -> None:
    report = report_of(Node("n1").waited("image", IMAGE, 12, 0.1))
    assert "late" in row_of(report, "image") and "12.0 s (20 %)" in row_of(report, "image")
    assert verdict_of(Node("n1").waited("image", IMAGE, 12, 0.1)) == (
        f"held up by the image {IMAGE}: n1 waited 12.0 s for it (20 % of its start)"
    )


def test_an_older_agent_does_not_tell_and_nothing_is_guessed() -> None:
    node = Node("n1").brought("image", IMAGE)
    node.at(62, "access", "start", what="image", target=IMAGE, reads=10, blocked_s=13.0)
    report = report_of(node)
    (row,) = report.transfers
    assert (row.in_time, row.waited_s, row.longest_wait_s, row.blocked_s) == (None, None, None, 13.0)
    assert report.verdict is None
    line = row_of(report, "image")
    assert "ended" in line and line.split()[-2:] == ["-", IMAGE]


def test_words_in_place_of_seconds_are_not_known() -> None:
    report = report_of(Node("n1").waited("image", IMAGE, 0).at(63, "access", "start", what="image", target=IMAGE,
                       waited_s="none", longest_wait_s="none"))  # fmt: skip
    assert report.transfers[0].in_time is None


def test_an_agent_that_was_started_again_in_the_start_does_not_know() -> None:
    node = (
        Node("n1")
        .waited("image", IMAGE, 0)
        .at(30, "fault", "agent_restarted", level="warning", message="again")
    )
    report = report_of(node)
    assert (report.transfers[0].in_time, report.verdict) == (None, None)


def test_an_agent_that_was_started_again_after_the_start_changes_nothing() -> None:
    node = (
        Node("n1")
        .waited("image", IMAGE, 2)
        .at(300, "fault", "agent_restarted", level="warning", message="again")
    )
    node.at(900, "access", "start", what="image", target=IMAGE, waited_s=0.0, longest_wait_s=0.0)
    assert report_of(node).transfers[0].waited_s == 2


def test_a_start_of_which_nothing_is_known_has_no_verdict() -> None:
    report = report_of(Node("n1", None).waited("image", IMAGE, 13))
    assert (report.transfers[0].in_time, report.verdict) == (None, None)
    assert "13.0 s" in row_of(report, "image") and "%" not in row_of(report, "image")
    assert "held" not in shown(report)


def test_an_observed_start_has_no_verdict() -> None:
    assert verdict_of(Node("n1", mode="observe").waited("image", IMAGE, 13)) is None


def test_a_start_that_brought_nothing_has_no_verdict() -> None:
    assert verdict_of(Node("n1")) is None


def test_nodes_that_were_in_time_are_counted_among_those_that_told() -> None:
    nodes = [
        Node("n1").waited("image", IMAGE, 0),
        Node("n2").waited("image", IMAGE, 0),
        Node("n3").waited("image", IMAGE, 9),
    ]
    assert "2 of 3" in row_of(report_of(*nodes), "image")
    nodes[2] = Node("n3").brought("image", IMAGE)
    assert "2 of 2" in row_of(report_of(*nodes), "image"), "n3 told nothing, and is not taken to be late"


def test_the_slowest_nodes_longest_wait_is_what_held_the_start_up() -> None:
    fast = Node("n1", 40).waited("image", IMAGE, 30).waited("environment", VENV, 1)
    slow = Node("n2", 63).waited("image", IMAGE, 0.2).waited("environment", VENV, 13.2)
    report = report_of(fast, slow)
    sentence = f"held up by the environment {VENV}: n2 waited 13.2 s for it (21 % of its start)"
    assert report.verdict and report.verdict.text == sentence
    assert sentence in shown(report)
    assert f" H{sentence[1:]}." in to_html(report)


def test_where_nodes_wait_for_each_other_the_one_that_waited_for_bytes_is_named() -> None:
    waiting = Node("n1", 63).waited("environment", VENV, 0.1)
    cause = Node("n2", 62.9).waited("environment", VENV, 13.2)
    assert "n2 waited 13.2 s" in (verdict_of(waiting, cause) or "")


def test_a_node_that_told_no_training_began_with_the_last_one() -> None:
    """Often only rank 0 marks."""
    report = report_of(Node("n1", 60).waited("image", IMAGE, 0), Node("n2", None).waited("image", IMAGE, 15))
    assert [row.start_s for row in report.transfers] == [60, 60]
    assert report.verdict and report.verdict.text.endswith("n2 waited 15.0 s for it (25 % of its start)")


def test_nothing_held_it_up_when_no_read_waited_noticeably() -> None:
    nodes = [
        Node(f"n{number}").waited("image", IMAGE, 0.1).waited("checkpoint", CKPT, 0.15) for number in (1, 2)
    ]
    sentence = "nothing that was brought held it up: reads waited 250 ms in all"
    assert verdict_of(*nodes) == sentence
    assert f" N{sentence[1:]}." in to_html(report_of(*nodes))


def test_nothing_is_not_said_while_a_node_that_was_as_slow_has_not_told() -> None:
    assert verdict_of(Node("n1").waited("image", IMAGE, 0.1), Node("n2").brought("image", IMAGE)) is None
    assert verdict_of(Node("n1").waited("image", IMAGE, 9), Node("n2").brought("image", IMAGE)) is not None
    assert verdict_of(Node("n1", 40).waited("image", IMAGE, 9), Node("n2").brought("image", IMAGE)) is None


def test_the_files_of_a_checkpoint_are_one_artifact() -> None:
    node = Node("n1").waited("image", IMAGE, 1.5)
    for number, waited_s in enumerate((0.0, 0.9, 1.1)):
        node.waited("checkpoint", f"{CKPT}/{number}.safetensors", waited_s, 0.1)
    assert verdict_of(node) == (
        f"held up by the checkpoint {CKPT}/2.safetensors and 1 more: n1 waited up to 2.00 s for them (3 % of its start)"
    )


def test_a_snapshot_and_its_layer_are_one_environment() -> None:
    node = Node("n1").waited("environment", VENV, 2).waited("environment", VENV + BELOW_LAYER, 4)
    assert verdict_of(node) == (
        f"held up by the environment {VENV}: n1 waited up to 6.00 s for it (10 % of its start)"
    )


def test_no_more_is_waited_than_the_start_took() -> None:
    """A GPU may be busy before the last read of what the node takes for the start."""
    (row,) = report_of(Node("n1", 60).waited("image", IMAGE, 100)).transfers
    assert (row.waited_s, row.waited_share, row.longest_wait_s) == (60, 1, 100)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_long_waits_and_many_columns_fit_a_narrow_terminal(width: int) -> None:
    node = Node("n1", 900).waited(
        "environment", VENV, 754, read_bytes=1 << 30, hit_bytes=1 << 29, miss_bytes=700 << 20
    )
    node.at(6, "prefetch", "end", what="environment", target=VENV, bytes=1023 << 20, bytes_origin=859 << 20,
            bytes_cached=1023 << 20, dur_s=70.0)  # fmt: skip
    report = report_of(node)
    lines = shown(report, width).splitlines()
    assert max(map(len, lines)) <= width
    line = row_of(report, "environment", width)
    assert "12 min 34 s (84 %)" in line and "late" in line and "42 %" in line
    heading = next(line for line in lines if line.startswith("transfer"))
    assert ("missed" in heading, "original" in heading) == (width > 80, True)
