"""Copies: how often the nodes of a job read from the store what one of them needs."""

from __future__ import annotations

import html
import re

import pytest

from bootseer_slurm.events import EventLog
from bootseer_slurm.report.gather.run import NodeEvents, Run
from bootseer_slurm.report.render.headline import figures
from bootseer_slurm.report.render.html import to_html
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.report.startup.transfers import store_copies
from tests.unit.records import RECORD, SECOND, START

Fetched = tuple[int, int, int] | None
"""Bytes from store, original and other nodes; None: its node did not tell."""


def report_of(*nodes: dict[str, Fetched], silent: tuple[str, ...] = ()) -> Report:
    """nodes: what each fetched, by target."""
    sent = []
    for number, targets in enumerate(nodes, start=1):
        log = EventLog(5, 0, f"n{number}")
        for target, fetched in targets.items():
            about = {"what": "image", "target": target}
            log.emit("prefetch", "begin", t_ns=START + SECOND, bytes=1000 << 20, **about)
            if fetched is not None:
                store, origin, peers = (size << 20 for size in fetched)
                log.emit(
                    "prefetch", "end", t_ns=START + 2 * SECOND, dur_s=1.0, bytes=store + origin + peers,
                    bytes_origin=origin, bytes_peers=peers, **about,
                )  # fmt: skip
        sent.append(NodeEvents(log.node, tuple(log.events()), 0))
    return analyse(Run(5, 0, (0,), 1000, RECORD, tuple(sent), silent, ()))


@pytest.mark.parametrize(
    ("nodes", "copies"),
    [
        ([{"/a": (1000, 0, 0)}, {"/a": (0, 0, 1000)}, {"/a": (0, 0, 1000)}], 1.0),
        ([{"/a": (1000, 0, 0)}, {"/a": (1000, 0, 0)}, {"/a": (1000, 0, 0)}], 3.0),
        ([{"/a": (400, 0, 600)}, {"/a": (650, 0, 350)}], 1.05),
        ([{"/a": (100, 0, 0)}, {"/a": (900, 0, 100)}], 1.0),
        ([{"/a": (1000, 0, 0), "/b": (0, 0, 500)}, {"/a": (0, 0, 1000), "/b": (1000, 0, 0)}], 1.0),
        ([{"/a": (1000, 0, 0)}, {"/b": (1000, 0, 0)}], 1.0),
        ([{"/a": (0, 0, 0)}, {"/a": (0, 0, 0)}], None),
        ([{"/a": (1000, 0, 0)}], None),
        ([{"/a": (1000, 0, 0)}, {"/a": None}], None),
        ([{"/a": (1000, 0, 0), "/b": None}, {"/a": (0, 0, 1000), "/b": None}], 1.0),
        ([{"/a": (1000, 0, 0), "/b": (1, 999, 0)}, {"/a": (0, 0, 1000), "/b": (0, 1000, 0)}], 1.0),
        ([{"/b": (1, 999, 0)}, {"/b": (1, 999, 0)}], None),
        ([], None),
    ],
    ids=["one", "no peers", "shares", "warm", "two targets", "apart", "all cached", "one node", "not told",
         "brought nowhere", "beside originals", "originals", "nobody"],
)  # fmt: skip
def test_copies_are_bytes_of_the_store_over_the_most_that_a_node_fetched(
    nodes: list[dict[str, Fetched]], copies: float | None
) -> None:
    assert store_copies(report_of(*nodes).transfers) == (None if copies is None else pytest.approx(copies))


def headline_of(report: Report) -> tuple[str, str]:
    (figure,) = (each for each in figures(report) if each.heading == "fetched from the store")
    return figure.value, figure.detail


def test_the_headline_says_what_came_from_other_nodes_and_how_many_copies() -> None:
    report = report_of({"/a": (1024, 0, 0)}, {"/a": (512, 0, 512)})
    assert headline_of(report) == ("1.5 GiB", "1.50 copies · 512 MiB from other nodes · 0 B cached")
    assert "1.50 copies · 512 MiB from other nodes" in html.unescape(re.sub("<[^>]*>", "", to_html(report)))


def test_the_headline_says_no_copies_where_a_node_told_nothing_or_no_node_gave_bytes() -> None:
    nodes: list[dict[str, Fetched]] = [{"/a": (1024, 0, 0)}, {"/a": (512, 0, 512)}]
    assert headline_of(report_of(*nodes, silent=("n3",)))[1] == "512 MiB from other nodes · 0 B cached"
    assert headline_of(report_of(nodes[0], nodes[0]))[1] == "0 B cached"
