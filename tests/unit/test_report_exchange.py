"""Remarks on the exchange between nodes: who sent wrong bytes, who was slow, and what came from the store instead."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from bootseer_slurm.event_table import MAX_MESSAGE
from bootseer_slurm.report.render.formats import FORMATS
from bootseer_slurm.report.render.terminal import to_terminal
from bootseer_slurm.report.startup.figures import Report
from tests.unit.test_report_analyse import Node, report_of
from tests.unit.test_report_hostile import line
from tests.unit.test_report_hostile import report_of as report_of_lines

BAN = "sent wrong bytes, and is banned for this job"


def node(number: int, **told: str | int) -> Node:
    """A node that tells this at the job's end."""
    return Node(f"n{number}").started().at(60, "peers", "summary", received_bytes=9, sent_bytes=9, **told)


def rows(report: Report) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(problem.level, problem.message, problem.nodes) for problem in report.problems]


def test_a_node_that_sent_wrong_bytes_is_a_warning_of_those_who_say_so() -> None:
    report = report_of(node(1, banned="n3"), node(2, banned="n3,n1"), node(3), record=None)
    assert rows(report) == [("warning", f"n3 {BAN}", ("n1", "n2")), ("warning", f"n1 {BAN}", ("n2",))]


def test_slow_nodes_and_failures_are_one_note_each() -> None:
    report = report_of(
        node(1, slow="n3,n2", fallbacks=4), node(2, slow="n3", fallbacks=1_200), node(3), record=None
    )
    assert rows(report) == [
        ("info", "sent blocks to other nodes slowly", ("n3", "n2")),
        ("info", "read 1,204 chunks from the store because other nodes failed", ("n1", "n2")),
    ]
    (one,) = report_of(node(1, fallbacks=1), node(2, fallbacks=0), record=None).problems
    assert (one.message, one.nodes) == ("read 1 chunk from the store because other nodes failed", ("n1",))


def test_wrong_bytes_come_after_errors_and_before_notes() -> None:
    failing = node(1, slow="n2", banned="n2").at(5, "fault", "store", level="error", message="no store")
    report = report_of(failing.at(6, "plan", "unread", message="unread"), node(2), record=None)
    assert [level for level, _, _ in rows(report)] == ["error", "warning", "info", "info"]


def test_an_exchange_without_trouble_says_nothing() -> None:
    assert report_of(node(1), node(2, fallbacks=0), record=None).problems == ()


def test_the_name_at_a_cut_is_left_out() -> None:
    """The table of events cuts texts: of "n12" it may leave "n1", which is another node."""
    text = ",".join(["n2"] * 400)[: MAX_MESSAGE - 3] + ",n12"
    cut = report_of(node(1, banned=text), node(2), record=None)
    assert rows(cut) == [("warning", f"n2 {BAN}", ("n1",))]


@pytest.mark.parametrize("key", ["banned", "slow"])
@pytest.mark.parametrize(
    "names",
    [
        "\x1b[2J\u202en1",
        "[red]n1[/]",
        "<script>",
        "root: enter your password",
        "n1\nx",
        ",,,",
        "",
        5,
        -1e308,
        None,
    ],
)
def test_only_nodes_of_the_job_are_named(key: str, names: Any) -> None:
    report = report_of_lines(line("peers", "summary", **{key: names}))
    assert report.problems == ()


@pytest.mark.parametrize("count", [1e308, -1e308, -1, "many", None])
def test_numbers_beyond_all_reason_are_shown_in_every_format(count: Any) -> None:
    lines = [line("peers", "summary", fallbacks=count, banned="n1", slow="n1", received_bytes=count)] * 3
    lines.append(line("prefetch", "end", what="image", target="a", bytes=5, bytes_peers=count))
    report = report_of_lines(*lines)
    for write in FORMATS.values():
        assert write(report)
    screen = io.StringIO()
    to_terminal(report, Console(file=screen, width=120))
    assert f"n1: n1 {BAN}" in screen.getvalue()
    assert ("chunk" in screen.getvalue()) == (count == 1e308)
