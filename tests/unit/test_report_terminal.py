"""Render: what a person reads at several widths, and the JSON that programs read."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from bootseer_slurm.events import EventLog
from bootseer_slurm.report.gather.run import NodeEvents, Run
from bootseer_slurm.report.render.document import to_json
from bootseer_slurm.report.render.terminal import to_terminal
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.slurm.jobs import JobRecord
from tests.unit.records import RECORD as BASE
from tests.unit.records import SECOND, START

ABOUT_IMAGE = {"what": "image", "target": "/lustre/images/team/nemo-24.07-patched.sqsh"}
ABOUT_CHECKPOINT = {"what": "checkpoint", "target": "/ckpt/step_9000"}

RECORD = replace(
    BASE,
    job=1234,
    shown_id="1234",
    name="train-llama",
    nodes=("gpu-01", "gpu-02", "gpu-03"),
    cpus=192,
)


def node_events(number: int, *, marked: bool = True, peer_bytes: int | None = None) -> NodeEvents:
    """A start of some 40 s; each node is slower than the one before.

    peer_bytes: of the image's 3 GiB; None: an agent before peers.
    """
    log = EventLog(1234, 0, f"gpu-{number:02d}")

    def at(t_s: float, kind: str, name: str, **fields: str | int | float | None) -> None:
        log.emit(kind, name, t_ns=START + round(t_s * SECOND), **fields)

    at(0.4, "hook", "begin")
    at(0.45, "hook", "received")
    at(0.5, "session", "begin", mode="prefetch", nodelist="gpu-[01-03]")
    at(0.6, "prefetch", "begin", bytes=4 << 30, **ABOUT_IMAGE)
    at(0.7, "prefetch", "begin", bytes=30 << 30, **ABOUT_CHECKPOINT)
    at(1.6, "step", "attach", step="0")
    at(2.5, "step", "task_start", step="0", task=0)
    at(9 + number, "prefetch", "end", bytes=3 << 30, bytes_cached=1 << 30, bytes_peers=peer_bytes,
       dur_s=8.4 + number, **ABOUT_IMAGE)  # fmt: skip
    at(6 + 3 * number, "mark", "image_loaded", step="0", task=0)
    at(10 + 5 * number, "mark", "environment_loaded", step="0", task=0)
    if marked:
        at(20 + 8 * number**2, "mark", "training_started", step="0", task=0)
    reads = {"reads": 900, "read_bytes": 1 << 30, "hit_bytes": 900 << 20, "miss_bytes": 124 << 20}
    at(100, "access", "start", waited_s=0.15 * number, longest_wait_s=0.1, **reads, **ABOUT_IMAGE)
    at(100, "access", "start", waited_s=2.0 * number, longest_wait_s=2.0, **ABOUT_CHECKPOINT)
    at(101, "access", "summary", blocked_s=15.0 * number, **reads, **ABOUT_IMAGE)
    at(1.7, "shadow", "failed", message="the original has changed since", **ABOUT_CHECKPOINT)
    if number == 2:
        at(3, "fault", "cache_full", level="error", message="cache disk is full, reading from the store")
    return NodeEvents(log.node, tuple(log.events()), 0)


def make(*, nodes: int = 2, marked: bool = True, record: JobRecord | None = RECORD) -> Report:
    sent = tuple(node_events(number, marked=marked) for number in range(1, nodes + 1))
    silent = tuple(node for node in RECORD.nodes if node not in {one.node for one in sent})
    return analyse(Run(1234, 0, (0,), 1000, record, sent, silent, ()))


def make_with_peers(*peer_bytes: int) -> Report:
    """A start on so many nodes; of the image's 3 GiB each had so much from the others."""
    sent = tuple(node_events(number, peer_bytes=size) for number, size in enumerate(peer_bytes, start=1))
    return analyse(Run(1234, 0, (0,), 1000, replace(RECORD, nodes=tuple(n.node for n in sent)), sent, (), ()))


def shown(report: Report, width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    to_terminal(report, Console(file=file, width=width, force_terminal=False))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_terminal_shows_all_that_matters_at_each_width(width: int) -> None:
    text = shown(make(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for part in (
        "job 1234 · train-llama", "alice · account ml · gpu · 3 nodes gpu-[01-03]", "queued 12.0 s",
        "allocation → training 52.0 s", "1,248 GPU-seconds", "(24 GPUs)",
        "prolog", "launch", "image", "environment", "program", "total", "gpu-02",
        "6.0 GiB", "2.0 GiB", "in time", "88 %", "248 MiB", "300 ms (1 %)", "4.00 s (8 %)",
        "held up by the checkpoint /ckpt/step_9000: gpu-02 waited 4.00 s for it (8 %",
        "warning  gpu-[01-02]: checkpoint /ckpt/step_9000:", "error    gpu-02: cache disk is full",
        "late",
        "/lustre/images/team/nemo-24.07-patched.sqsh",
        "silent   gpu-03 sent no events",
    ):  # fmt: skip
        assert part in text, part
    assert "checkpoint_loaded" not in text


def test_the_slowest_node_is_set_against_the_median() -> None:
    lines = shown(make(nodes=3), 80).splitlines()
    image = next(line for line in lines if line.startswith("image "))
    assert image.split()[:6] == ["image", "9.50", "s", "12.5", "s", "gpu-03"]
    assert "1.3×" in image
    bars = {line.split()[0]: line.count("█") for line in lines if "█" in line}
    assert bars["program"] == max(bars.values())
    assert bars["prolog"] >= 1


@pytest.mark.parametrize("width", [80, 100])
def test_bytes_of_other_nodes_have_a_column_where_there_are_some(width: int) -> None:
    lines = shown(make_with_peers(0, 3 << 30, 2 << 30), width).splitlines()
    heading = next(line for line in lines if line.startswith("transfer"))
    image = lines[lines.index(heading) + 1]
    assert heading.split()[:4] == ["transfer", "cache", "peers", "store"]
    assert image.split()[:7] == ["image", "3.0", "GiB", "5.0", "GiB", "4.0", "GiB"]
    assert max(len(line) for line in lines) <= width
    for report in (make(nodes=3), make_with_peers(0, 0, 0)):
        assert "peers" not in shown(report, width)


@pytest.mark.parametrize("width", [80, 100])
def test_all_sources_and_a_long_wait_fit(width: int) -> None:
    report = make_with_peers(0, 1000 << 20)
    rows = tuple(
        replace(row, what="environment", fetched_bytes=1533 << 20, cached_bytes=511 << 20,
                origin_bytes=511 << 20, peer_bytes=511 << 20, miss_bytes=0, waited_s=1219.0, start_s=1220.0)
        for row in report.transfers
    )  # fmt: skip
    lines = shown(replace(report, transfers=rows), width).splitlines()
    heading = next(line for line in lines if line.startswith("transfer"))
    first = lines[lines.index(heading) + 1]
    assert max(len(heading), len(first)) <= width
    for part in ("cache", "peers", "store", "original", "ready", "waited"):
        assert part in heading
    assert first.endswith("(100 %)")


def test_start_not_marked_is_said() -> None:
    text = shown(make(marked=False), 80)
    assert "start not marked" in text
    assert "GPU-seconds" not in text
    assert "total" not in text


def test_a_job_without_gpu_costs_cpu_time() -> None:
    assert "9,984 CPU-seconds" in shown(make(record=replace(RECORD, gpus=0)), 80)


def test_without_accounting_the_table_is_still_there() -> None:
    text = shown(make(record=None), 80)
    assert "uid 1000" in text
    assert "first stamp → training" in text
    assert "program" in text


def test_a_run_without_events_shows_the_header_only() -> None:
    report = analyse(Run(1234, 0, (0,), 1000, RECORD, (), RECORD.nodes, ("no events: no agent",)))
    text = shown(report, 80)
    assert "gpu-[01-03] sent no events" in text
    assert "no events: no agent" in text
    assert "median" not in text


def test_a_terminal_without_utf8_gets_ascii() -> None:
    text = shown(make(record=replace(RECORD, name="träin", user="zoë")), 80, "ascii")
    assert "tr?in" in text
    assert "allocation -> training" in text
    assert "###" in text


def test_names_with_markup_and_control_characters_do_no_harm() -> None:
    record = replace(RECORD, name="[bold red]x[/]\x1b[2J\ny", account="[link=http://e]a")
    text = shown(make(record=record), 80)
    assert "[bold red]x[/] [2J y" in text
    assert "[link=http://e]a" in text
    assert "\x1b" not in text


def test_long_names_and_many_nodes_fit() -> None:
    record = replace(
        RECORD,
        name="n" * 300,
        nodes=tuple(f"rack{number % 7}-gpu-{number * 3:05d}.cluster.example" for number in range(1000)),
    )
    text = shown(make(record=record), 80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "1000 nodes" in text
    assert len(text.splitlines()) < 50


def test_json_has_the_documented_schema() -> None:
    content = json.loads(to_json(make()))
    assert content["schema"] == 3
    assert (content["job"], content["restart"], content["user"], content["gpus"]) == (1234, 0, "alice", 24)
    assert content["nodes"] == ["gpu-01", "gpu-02", "gpu-03"]
    assert content["silent_nodes"] == ["gpu-03"]
    assert (content["queue_s"], content["start_to_training_s"], content["lost_gpu_s"]) == (12, 52, 1248)
    assert content["start_from"] == "accounting"
    image = next(row for row in content["stages"] if row["stage"] == "image")
    assert image == {
        "stage": "image",
        "node_count": 2,
        "median_s": 8.0,
        "slowest_s": 9.5,
        "slowest_node": "gpu-02",
        "derived": False,
        "slowest_over_median": 9.5 / 8,
    }
    assert content["starts"][0]["stages"]["environment"] == pytest.approx(6)
    assert content["total"]["slowest_node"] == "gpu-02"
    assert {row["node"] for row in content["transfers"]} == {"gpu-01", "gpu-02"}
    assert content["transfers"][0]["bytes_per_s"] == pytest.approx((3 << 30) / 9.4)
    image, checkpoint = (row for row in content["transfers"] if row["node"] == "gpu-02")
    assert (image["in_time"], image["waited_s"], image["longest_wait_s"], image["start_s"]) == (
        True,
        0.3,
        0.1,
        52,
    )
    assert image["waited_share"] == pytest.approx(0.3 / 52)
    assert (image["blocked_s"], checkpoint["in_time"]) == (30, False)
    assert content["verdict"] == {
        "node": "gpu-02",
        "what": "checkpoint",
        "names": ["/ckpt/step_9000"],
        "waited_s": 4,
        "share": pytest.approx(4 / 52),
        "at_most": False,
        "text": "held up by the checkpoint /ckpt/step_9000: gpu-02 waited 4.00 s for it (8 % of its start)",
    }
    assert content["problems"][0]["name"] == "cache_full"


def test_json_has_the_bytes_of_each_source() -> None:
    first, second = (
        row for row in json.loads(to_json(make_with_peers(0, 2 << 30)))["transfers"] if row["what"] == "image"
    )
    keys = ("fetched_bytes", "store_bytes", "origin_bytes", "peer_bytes")
    assert [first[key] for key in keys] == [3 << 30, 3 << 30, 0, 0]
    assert [second[key] for key in keys] == [3 << 30, 1 << 30, 0, 2 << 30]


def test_json_of_an_empty_run_is_valid() -> None:
    content = json.loads(to_json(analyse(Run(9, 0, (0,), None, None, (), (), ()))))
    assert (content["user"], content["stages"], content["total"], content["start_ns"]) == (
        None,
        [],
        None,
        None,
    )
    assert content["verdict"] is None
