"""The page: that it needs nothing else, that no text of a user is HTML in it, and what it says."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import replace

import pytest

from bootseer_slurm.report.gather.run import Run
from bootseer_slurm.report.render.html import to_html
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import PlainStarts
from tests.unit.test_report_terminal import RECORD, make, make_with_peers, node_events

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{data}}{{script}}\u202e"


def data_of(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_nothing_is_loaded_and_only_this_script_may_run() -> None:
    page = to_html(make())
    assert not re.search(r"(?:src|href|action)\s*=|url\(|@import|https?:", page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none';")
    for kind, text in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_texts_of_users_are_never_html() -> None:
    record = replace(RECORD, name=ATTACK, account=ATTACK, partition=ATTACK, state=ATTACK)
    sent = node_events(1)
    hostile = replace(sent, events=tuple(
        replace(event, message=ATTACK if event.message else None, target=ATTACK if event.target else None)
        for event in sent.events
    ))  # fmt: skip
    run = Run(
        1234, 0, (0,), 1000, record, (hostile, replace(node_events(2), node="gpu-02")), ("gpu-03",), (ATTACK,)
    )
    page = to_html(analyse(run))
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<img" not in page
    assert "\u202e" not in page
    assert page.count(html.escape("<img src=x onerror=alert(2)>")) >= 6
    assert data_of(page)["nodes"]


def test_the_page_says_what_a_manager_asks() -> None:
    report = replace(make(nodes=3), plain=PlainStarts(4, 184.0))
    page = to_html(report)
    for text in (
        "Start of job 1234 · train-llama", "24 GPUs waited 1 min 32 s", "0.61 GPU-hours", "3 min 04 s",
        "this one is 50% shorter", "median of 4 that were observed", "queued 12.0 s before",
        "The longest stage is program", "9.0 GiB", "3.0 GiB cached", "gpu-03",
        "Held up by the checkpoint /ckpt/step_9000: gpu-03 waited 6.00 s for it (7 % of its start).",
        "3 of 3", "450 ms (", "waited longest for the checkpoint: 6.00 s (7 %)",
    ):  # fmt: skip
        assert text in page, text
    assert "no plain start of this job was observed" in to_html(make())


def transfer_table(page: str) -> list[list[str]]:
    """The cells of the table of transfers, its heading first."""
    table = page.split("<h2>What was brought to the nodes</h2>")[1].split("</table>")[0]
    return [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    ]


def test_bytes_of_other_nodes_have_a_column_where_there_are_some() -> None:
    heading, image, _ = transfer_table(to_html(make_with_peers(0, 3 << 30, 2 << 30)))
    assert heading[2:6] == ["from cache", "from peers", "from store", "rate"]
    assert image[2:5] == ["3.0 GiB", "5.0 GiB", "4.0 GiB"]
    assert len(image) == len(heading)
    report = make(nodes=3)
    heading, image, _ = transfer_table(to_html(report))
    assert heading[2:5] == ["from cache", "from store", "rate"]
    assert image[2:4] == ["3.0 GiB", "9.0 GiB"]
    assert len(image) == len(heading)
    rows = tuple(replace(row, origin_bytes=row.fetched_bytes) for row in report.transfers)
    heading, image, _ = transfer_table(to_html(replace(report, transfers=rows)))
    assert heading[2:6] == ["from cache", "from store", "from original", "rate"]
    assert image[2:5] == ["3.0 GiB", "0 B", "9.0 GiB"]


def test_the_data_has_every_node_and_its_spans() -> None:
    report = make(nodes=2)
    data = data_of(to_html(report))
    nodes = {node["name"]: node for node in data["nodes"]}  # type: ignore[attr-defined]
    assert list(nodes) == ["gpu-01", "gpu-02", "gpu-03"]
    assert nodes["gpu-03"]["spans"] == []
    assert [span[2] for span in nodes["gpu-02"]["spans"]] == pytest.approx([0.4, 1.6, 2.5, 12, 20, 52])
    assert data["median"] == pytest.approx((28 + 52) / 2)


def test_a_start_that_is_not_marked_and_one_without_events_have_a_page() -> None:
    assert "When training began is not known" in to_html(make(marked=False))
    assert "No node has sent events" in to_html(analyse(Run(9, 0, (0,), None, None, (), (), ())))


def test_a_thousand_nodes_are_less_than_half_a_megabyte(made_start: object) -> None:
    assert len(to_html(made_start(1000))) < 500_000  # type: ignore[operator]


def test_a_user_who_names_a_thousand_things_gets_no_endless_page() -> None:
    sent = node_events(1)
    reads = [event for event in sent.events if event.kind == "access"]
    faults = [replace(reads[0], kind="fault", name="x", message=f"fault {number}") for number in range(1000)]
    many = [replace(reads[0], target=f"/t{number}") for number in range(1000)]
    run = Run(1234, 0, (0,), 1000, RECORD, (replace(sent, events=(*sent.events, *many, *faults)),), (), ())
    page = to_html(analyse(run))
    assert "and 952 more" in page, "1,002 things, two of them its image and its checkpoint"
    assert "/t30<" in page and "/t900<" not in page
    assert "and 951 more" in page, "1,001 problems"
    assert len(page) < 120_000
