"""What an agent tells of a start for the report: its reads, its load, its end, and of jobs that did not ask."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.node import ALICE, Node, node_of, wait_until

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
SIZE_BYTES = 6_000_000


def make_image(node: Node) -> None:
    """An image of alice's that no store has."""
    source = node.folder / "source"
    source.mkdir()
    (source / "payload").write_bytes(os.urandom(SIZE_BYTES))
    image = node.folder / "data" / "img.sqsh"
    subprocess.run(["mksquashfs", source, image, "-quiet", "-no-progress"], check=True, capture_output=True)
    os.chown(image, ALICE, ALICE)


@pytest.fixture
def node() -> Iterator[Node]:
    """A node whose starts end soon, with an image."""
    with node_of('[prefetch]\nstart_quiet = "1s"\ncold_rate = "0"\n[report]\nobserve = "all"\n') as made:
        make_image(made)
        made.start()
        yield made


@pytest.fixture
def stalled() -> Iterator[Node]:
    """A node with an image whose bytes come only once there is a file "flows" in its folder."""
    with node_of() as made:
        make_image(made)
        made.start(f"""
import contextlib, os
from bootseer_slurm.artifacts import source
real = source.ObjectSource.read

@contextlib.contextmanager
def read(self, *arguments, **fields):
    while not os.path.exists({str(made.folder / "flows")!r}):
        time.sleep(0.01)
    with real(self, *arguments, **fields) as view:
        yield view

source.ObjectSource.read = read
""")
        yield made


@contextlib.contextmanager
def reading(node: Node, job: int, count: int = 1) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A start in a step of which so many processes read the image; they have read it at the end."""
    fields: dict[str, Any] = {"JOB_ID": job, "UID": ALICE, "GID": ALICE, "BOOTSEER": "1"}
    fields["IMAGE"] = node.folder / "data" / "img.sqsh"
    node.ask("prolog", **fields)
    _, (fd,) = node.request("attach", **fields, STEP_ID=0)
    # Each its own part: of the same pages the kernel would ask only once. Without the kernel's readahead, which
    # may still wait when all have read.
    readers = [
        subprocess.Popen(["dd", f"if=/proc/self/fd/{fd}", "bs=1M", f"skip={number}", "count=1", "iflag=direct", "status=none"],
                         pass_fds=[fd], stdout=subprocess.DEVNULL)
        for number in range(count)
    ]  # fmt: skip
    os.close(fd)
    try:
        yield readers
        assert [reader.wait(20) for reader in readers] == [0] * count
    finally:
        for reader in readers:
            reader.kill()


def trains(node: Node, job: int) -> None:
    node.ask("mark", JOB_ID=job, NAME="training_started", TIME_NS=time.time_ns(), STEP_ID=0, TASK=0)


def started(node: Node, job: int) -> tuple[int, int]:
    """A start that reads its whole image in a step; gives when it began to read, and when it had read."""
    fields: dict[str, Any] = {"JOB_ID": job, "UID": ALICE, "GID": ALICE, "BOOTSEER": "1"}
    fields["IMAGE"] = node.folder / "data" / "img.sqsh"
    node.ask("prolog", **fields, HOOK_START_NS=time.time_ns())
    _, fds = node.request("attach", **fields, STEP_ID=0)
    begin_ns = time.time_ns()
    for fd in fds:
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            assert len(file.read()) > SIZE_BYTES
        os.close(fd)
    assert fds
    return begin_ns, time.time_ns()


def of_kind(events: list[dict[str, Any]], kind: str, name: str) -> list[dict[str, Any]]:
    return [event for event in events if (event["kind"], event["name"]) == (kind, name)]


def test_a_start_that_ends_in_quiet_trains_since_its_last_new_read(node: Node) -> None:
    begin_ns, end_ns = started(node, 1)
    file = node.folder / "store" / "users" / str(ALICE) / "events" / "1.0"
    wait_until(lambda: any('"training"' in path.read_text() for path in file.glob("*.jsonl")))
    time.sleep(0.5)
    node.ask("epilog", JOB_ID=1)
    events = node.events(1)
    (training,) = of_kind(events, "training", "io")
    assert begin_ns < training["t_ns"] < end_ns + 50_000_000, "not when the quiet was noticed"
    (access,) = of_kind(events, "access", "start")
    assert begin_ns <= access["first_ns"] <= access["last_ns"] <= end_ns
    assert access["origin_bytes"] + access["store_bytes"] >= SIZE_BYTES
    assert access["origin_bytes"] >= SIZE_BYTES, "no store has it"
    assert access["fetch_s"] > 0 and access["disk_s"] > 0
    (load,) = of_kind(events, "load", "start")
    assert load["dur_s"] < 20
    if Path("/proc/pressure/cpu").exists():
        assert 0 <= load["cpu_s"] <= load["dur_s"] * 1.1
    assert len(of_kind(events, "access", "summary")) == 1


def test_a_mark_ends_the_start_and_what_it_did_is_told_once(node: Node) -> None:
    started(node, 2)
    for _ in range(2):
        node.ask("mark", JOB_ID=2, NAME="training_started", TIME_NS=time.time_ns(), STEP_ID=0, TASK=0)
        time.sleep(2.3)
    node.ask("epilog", JOB_ID=2)
    events = node.events(2)
    assert len(of_kind(events, "access", "start")) == len(of_kind(events, "load", "start")) == 1
    assert len(of_kind(events, "mark", "training_started")) == 2


def test_a_job_that_did_not_ask_is_only_observed(node: Node) -> None:
    assert (node.run / "observe-all").exists()
    node.ask("prolog", JOB_ID=3, UID=ALICE, GID=ALICE, HOOK_START_NS=time.time_ns())
    assert node.job_files() == {"3"}, "by which the plugin and the epilog know of it"
    node.crash()
    assert node.jobs() == {3}, "the next agent too observes all"
    _, fds = node.request("attach", JOB_ID=3, UID=ALICE, GID=ALICE, STEP_ID=0)
    assert fds == []
    node.ask("epilog", JOB_ID=3)
    events = node.events(3)
    assert [event["mode"] for event in of_kind(events, "session", "begin")] == ["observe"]
    assert of_kind(events, "step", "attach")
    assert not [event for event in events if event["kind"] in ("prefetch", "plan", "access")]
    classes = node.folder / "store" / "users" / str(ALICE) / "classes"
    assert not classes.exists(), "nothing is remembered of what it did not ask for"


def test_a_job_that_asks_in_a_step_is_not_only_observed_any_more(node: Node) -> None:
    node.ask("prolog", JOB_ID=4, UID=ALICE, GID=ALICE, HOOK_START_NS=time.time_ns())
    image = node.folder / "data" / "img.sqsh"
    step = {"JOB_ID": 4, "UID": ALICE, "GID": ALICE, "BOOTSEER": "1", "IMAGE": image}
    _, fds = node.request("attach", **step, STEP_ID=0)
    assert len(fds) == 1
    os.close(fds[0])
    node.ask("epilog", JOB_ID=4)
    events = node.events(4)
    assert [event["mode"] for event in of_kind(events, "session", "mode")] == ["prefetch"]
    assert of_kind(events, "prefetch", "begin")


def test_a_job_that_wants_to_be_observed_only_stays_so(node: Node) -> None:
    node.ask("prolog", JOB_ID=5, UID=ALICE, GID=ALICE, BOOTSEER="observe")
    image = node.folder / "data" / "img.sqsh"
    _, fds = node.request("attach", JOB_ID=5, UID=ALICE, GID=ALICE, STEP_ID=0, BOOTSEER="1", IMAGE=image)
    assert fds == []


def test_an_agent_that_is_to_observe_those_who_ask_tells_the_hook_so() -> None:
    with node_of() as node:
        node.run.mkdir()
        (node.run / "observe-all").touch()
        node.start()
        assert not (node.run / "observe-all").exists()
        node.ask("prolog", JOB_ID=6, UID=ALICE, GID=ALICE)
        assert node.jobs() == set()


def test_what_an_importer_asks_for_is_told(node: Node) -> None:
    node.ask("prolog", JOB_ID=7, UID=ALICE, GID=ALICE, BOOTSEER="1")
    node.ask("image", JOB_ID=7, URI="docker://registry.example/none:1")
    node.ask("epilog", JOB_ID=7)
    (get,) = of_kind(node.events(7), "image", "get")
    assert (get["what"], get["target"]) == ("image", "docker://registry.example/none:1")


def test_reads_that_wait_for_a_slow_source_are_told(stalled: Node) -> None:
    with reading(stalled, 8, count=3):
        time.sleep(1.5)
        (stalled.folder / "flows").touch()
    trains(stalled, 8)
    stalled.ask("epilog", JOB_ID=8)
    events = stalled.events(8)
    (access,), (summary,) = of_kind(events, "access", "start"), of_kind(events, "access", "summary")
    assert 1 < access["longest_wait_s"] <= access["waited_s"] < 10
    assert access["blocked_s"] > 2 * access["waited_s"], "three reads waited side by side"
    assert summary["waited_s"] == pytest.approx(access["waited_s"])
    assert summary["longest_wait_s"] == pytest.approx(access["longest_wait_s"])


def test_a_read_that_waits_on_when_training_begins_counts_until_then(stalled: Node) -> None:
    with reading(stalled, 9):
        time.sleep(1)
        begin_s = time.monotonic()
        trains(stalled, 9)
        kept = stalled.run / "events" / "9.0"
        wait_until(lambda: '"kind":"load"' in kept.read_text())
        after_s = time.monotonic() - begin_s
        (stalled.folder / "flows").touch()
    stalled.ask("epilog", JOB_ID=9)
    events = stalled.events(9)
    (access,), (summary,) = of_kind(events, "access", "start"), of_kind(events, "access", "summary")
    assert access["waited_s"] == pytest.approx(access["longest_wait_s"])
    assert access["waited_s"] > 0.5
    assert after_s > 1.5, "the start is over later, for the marks of other tasks"
    assert summary["longest_wait_s"] >= access["longest_wait_s"] + after_s - 0.5


def test_a_job_is_told_what_reads_waited_since_its_own_begin(stalled: Node) -> None:
    """Jobs of one user share what reads a blob."""
    with reading(stalled, 10):
        time.sleep(2)
        with reading(stalled, 11):
            time.sleep(0.5)
            (stalled.folder / "flows").touch()
    for job in (10, 11):
        stalled.ask("epilog", JOB_ID=job)
    (first,), (second,) = (of_kind(stalled.events(job), "access", "start") for job in (10, 11))
    for name in ("waited_s", "longest_wait_s"):
        assert first[name] - 1.5 > second[name] > 0.2
