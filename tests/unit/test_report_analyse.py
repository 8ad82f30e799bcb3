"""Analyse: stages, transfers, problems and cost, from hand-made events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bootseer_slurm.events import Event, EventLog
from bootseer_slurm.report.gather.run import NodeEvents, Offset, Run
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.report.startup.stages import STAGES
from bootseer_slurm.report.startup.transfers import Transfer
from bootseer_slurm.slurm.jobs import JobRecord
from tests.unit.records import RECORD, SECOND, START


class Node:
    """Hand-made events of one node; times are seconds after the allocation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log = EventLog(5, 0, name)

    def at(self, t_s: float, kind: str, name: str, **fields: str | int | float | None) -> Node:
        self.log.emit(kind, name, t_ns=START + round(t_s * SECOND), **fields)
        return self

    def started(self, hook_s: float = 0.5, attach_s: float = 2, task_s: float = 3) -> Node:
        self.at(hook_s, "hook", "begin").at(hook_s + 0.1, "hook", "received")
        return self.at(attach_s, "step", "attach", step="0").at(
            task_s, "step", "task_start", step="0", task=0
        )

    def sent(self) -> NodeEvents:
        def stamp(event: Event) -> int:
            return event.t_ns

        return NodeEvents(self.name, tuple(sorted(self.log.events(), key=stamp)), 0)


def report_of(*nodes: Node, record: JobRecord | None = RECORD, reader: Offset | None = None) -> Report:
    sent = tuple(node.sent() for node in nodes)
    return analyse(Run(5, 0, (0,), 1000, record, sent, (), ("a note of collect",), reader))


def read(node: Node, what: str, first_s: float, last_s: float) -> Node:
    """What the agent tells at the end of the start of the reads of a thing."""
    stamps = {"first_ns": START + round(first_s * SECOND), "last_ns": START + round(last_s * SECOND)}
    return node.at(60, "access", "start", what=what, target=f"/{what}", **stamps)


def mark(node: Node, t_s: float, name: str, task: int = 0, step: str = "0") -> Node:
    return node.at(t_s, "mark", name, step=step, task=task)


def test_every_stage_ends_at_its_stamp_and_together_they_are_the_whole() -> None:
    node = Node("n1").started()
    mark(node, 7, "image_loaded")
    mark(node, 9, "environment_loaded")
    mark(node, 19, "checkpoint_loaded")
    mark(node, 20, "training_started")
    report = report_of(node)
    start = report.starts[0]
    assert start.stages == pytest.approx(
        {
            "allocation": 0.5,
            "prolog": 1.5,
            "launch": 1,
            "image": 4,
            "environment": 2,
            "checkpoint": 10,
            "program": 1,
        }
    )
    assert list(start.stages) == list(STAGES)
    assert start.derived == ()
    assert sum(start.stages.values()) == pytest.approx(start.total_s)
    assert report.start_to_training_s == 20
    assert report.queue_s == 12
    assert report.lost_gpu_s == 24 * 20
    assert report.lost_cpu_s == 48 * 20
    assert report.notes == ("a note of collect", "clock offsets unknown: the store's times do not tell them")
    assert report.wall_s == 1000
    assert sum(start.stages.values()) + (start.after_s or 0) == pytest.approx(1000)


def test_marks_that_were_not_made_collapse_into_program() -> None:
    report = report_of(mark(Node("n1").started(), 20, "training_started"))
    assert report.starts[0].stages == pytest.approx(
        {"allocation": 0.5, "prolog": 1.5, "launch": 1, "program": 17}
    )


def test_the_last_task_of_the_slowest_node_counts() -> None:
    fast, slow = Node("n1").started(), Node("n2").started()
    for task, t_s in ((0, 10), (1, 14), (2, 12)):
        mark(fast, t_s, "training_started", task)
    mark(slow, 30, "training_started", 3)
    report = report_of(fast, slow)
    assert [start.total_s for start in report.starts] == [14, 30]
    assert report.start_to_training_s == 30
    assert report.total is not None
    assert (report.total.slowest_node, report.total.slowest_s, report.total.median_s) == ("n2", 30, 22)


def test_rows_give_median_slowest_and_ratio_over_the_nodes() -> None:
    nodes = [
        mark(Node(f"n{number}").started(task_s=task_s), 40, "training_started")
        for number, task_s in ((1, 3), (2, 4), (3, 12))
    ]
    launch = next(row for row in report_of(*nodes).stages if row.stage == "launch")
    assert (launch.node_count, launch.median_s, launch.slowest_s, launch.slowest_node) == (3, 2, 10, "n3")
    assert launch.ratio == 5


def test_a_task_that_marks_again_and_a_later_step_do_not_move_the_start() -> None:
    node = Node("n1").started()
    for t_s in (10, 50, 90):
        mark(node, t_s, "training_started")
    mark(node, 500, "training_started", step="1")
    mark(node, 499, "image_loaded", step="1")
    report = report_of(node)
    assert report.start_to_training_s == 10
    assert "image" not in report.starts[0].stages


def test_start_not_marked_gives_what_is_known() -> None:
    node = mark(Node("n1").started(), 7, "image_loaded")
    report = report_of(node)
    assert report.starts[0].stages == pytest.approx(
        {"allocation": 0.5, "prolog": 1.5, "launch": 1, "image": 4}
    )
    assert (report.training_ns, report.start_to_training_s, report.lost_gpu_s, report.total) == (None,) * 4
    assert any("start not marked" in note for note in report.notes)


def test_only_rank_0_marks() -> None:
    first = mark(Node("n1").started(), 10, "training_started")
    report = report_of(first, Node("n2").started())
    assert report.start_to_training_s == 10
    assert [start.training_ns is None for start in report.starts] == [False, True]
    assert "training_started was marked on 1 of 2 nodes" in report.notes


def test_without_hook_or_steps_the_rest_still_counts() -> None:
    no_hook = Node("n1").at(2, "step", "attach", step="0").at(3, "step", "task_start", step="0")
    mark(no_hook, 10, "training_started")
    no_plugin = Node("n2").at(0.5, "hook", "begin").at(0.6, "hook", "received")
    mark(no_plugin, 10, "training_started")
    nothing = Node("n3").at(5, "fault", "x", message="broken")
    report = report_of(no_hook, no_plugin, nothing)
    assert {start.node: start.stages for start in report.starts} == {
        "n1": pytest.approx({"allocation": 2, "launch": 1, "program": 7}),
        "n2": pytest.approx({"allocation": 0.5, "prolog": 0.1, "program": 9.4}),
    }


def test_the_extern_step_launches_no_task() -> None:
    node = Node("n1").at(0, "hook", "begin").at(1, "step", "attach", step="extern")
    node.at(1.1, "step", "task_start", step="extern").at(5, "step", "task_start", step="0", task=0)
    assert report_of(node).starts[0].stages == pytest.approx({"allocation": 0, "prolog": 1, "launch": 4})


def test_stamps_out_of_order_never_give_a_negative_stage() -> None:
    node = Node("n1").started(hook_s=5, attach_s=4, task_s=3)
    mark(node, 8, "checkpoint_loaded")
    mark(node, 9, "environment_loaded")
    mark(node, 2, "image_loaded")
    mark(node, 10, "training_started")
    stages = report_of(node).starts[0].stages
    assert min(stages.values()) >= 0
    assert sum(stages.values()) == pytest.approx(10)


def test_without_accounting_the_first_stamp_stands_for_the_allocation() -> None:
    report = report_of(mark(Node("n1").started(), 20, "training_started"), record=None)
    assert report.start_to_training_s == 19.5
    assert (report.queue_s, report.lost_gpu_s, report.lost_cpu_s) == (None, None, None)
    assert any("first stamp" in note for note in report.notes)


def test_a_job_without_gpus_has_lost_cpu_time_only() -> None:
    report = report_of(mark(Node("n1").started(), 20, "training_started"), record=replace(RECORD, gpus=0))
    assert (report.lost_gpu_s, report.lost_cpu_s) == (None, 960)


def test_a_clock_that_is_ahead_of_the_allocation_is_noted() -> None:
    early = Node("n1").started(hook_s=-2.5)
    in_the_same_second = Node("n2").started(hook_s=-0.9)
    notes = report_of(early, in_the_same_second).notes
    assert any("1 of 2 nodes began up to 2.5 s before" in note for note in notes)
    assert not any("clocks differ" in note for note in report_of(in_the_same_second).notes)


def test_transfers_join_prefetch_and_reads() -> None:
    node = mark(Node("n1").started(), 20, "training_started")
    about = {"what": "image", "target": "/img/a.sqsh"}
    node.at(1, "prefetch", "begin", bytes=1000, **about)
    node.at(5, "prefetch", "end", bytes=600, bytes_cached=400, dur_s=4.0, **about)
    for _ in range(2):
        node.at(
            30,
            "access",
            "summary",
            reads=5,
            read_bytes=80,
            hit_bytes=60,
            miss_bytes=20,
            blocked_s=0.5,
            **about,
        )
    node.at(2, "prefetch", "begin", bytes=5000, what="checkpoint", target="/ckpt")
    node.at(25, "prefetch", "end", bytes=5000, dur_s=23.0, what="checkpoint", target="/ckpt")
    node.at(2, "prefetch", "begin", bytes=7, what="environment", target="/venv")
    node.at(22, "access", "start", waited_s=0.2, longest_wait_s=0.1, blocked_s=0.4, **about)
    image, checkpoint, environment = report_of(node).transfers
    assert image == Transfer(
        "n1", "image", "/img/a.sqsh", 1000, 600, 400, 4.0, True, 10, 160, 120, 40, 1.0, 0, 0, 0.2, 0.1, 20
    )
    assert image.rate == 150
    assert image.waited_share == pytest.approx(0.01)
    assert (checkpoint.in_time, checkpoint.cached_bytes, checkpoint.reads) == (None, 0, None)
    assert environment.in_time is None
    assert (environment.fetched_bytes, environment.dur_s, environment.rate) == (None, None, None)


@pytest.mark.parametrize(
    ("told", "from_store", "from_origin", "from_peers"),
    [
        ({}, 600, 0, 0),
        ({"source": "store"}, 600, 0, 0),
        ({"source": "origin"}, 0, 600, 0),
        ({"source": "store", "bytes_origin": 200}, 400, 200, 0),
        ({"source": "store", "bytes_origin": 200, "bytes_peers": 390}, 10, 200, 390),
        ({"source": "peers", "bytes_origin": 0, "bytes_peers": 600}, 0, 0, 600),
        ({"bytes_origin": -900, "bytes_peers": -900}, 600, 0, 0),
        ({"bytes_origin": 9000, "bytes_peers": 9000}, 0, 9000, 9000),
    ],
    ids=["no source", "old: store", "old: origin", "no peers", "all three", "peers", "below 0", "too many"],
)
def test_fetched_bytes_are_those_of_store_original_and_peers(
    told: dict[str, str | int], from_store: int, from_origin: int, from_peers: int
) -> None:
    """Agents before peers did not tell bytes of them, and the first ones only the source of all bytes."""
    node = Node("n1").at(19, "prefetch", "end", bytes=600, dur_s=1.0, what="image", target="/a", **told)
    (image,) = report_of(node).transfers
    assert image.fetched_bytes == 600
    assert (image.store_bytes, image.origin_bytes, image.peer_bytes) == (from_store, from_origin, from_peers)


def test_where_nothing_was_brought_no_source_has_bytes() -> None:
    (image,) = report_of(Node("n1").at(2, "prefetch", "begin", bytes=7, what="image", target="/a")).transfers
    assert (image.store_bytes, image.origin_bytes, image.peer_bytes) == (None, None, None)


def test_the_bytes_of_a_prefetch_that_was_stopped_count() -> None:
    node = mark(Node("n1").started(), 20, "training_started")
    node.at(1, "prefetch", "begin", bytes=1000, what="image", target="/a")
    node.at(19, "prefetch", "stopped", bytes=600, bytes_cached=0, dur_s=18.0, what="image", target="/a")
    (image,) = report_of(node).transfers
    assert (image.fetched_bytes, image.in_time) == (600, None)


def test_a_problem_of_several_nodes_is_one_and_errors_come_first() -> None:
    nodes = [Node(f"n{number}").started() for number in (1, 2, 3)]
    for node in nodes:
        node.at(1, "shadow", "failed", what="image", target="/a", message="the original has changed")
        node.at(1, "shadow", "shown", what="checkpoint", target="/c")
    nodes[1].at(2, "fault", "store", level="error", message="store cannot be reached")
    nodes[1].at(3, "fault", "store", level="error", message="store cannot be reached")
    problems = report_of(*nodes).problems
    assert [(problem.level, problem.nodes) for problem in problems] == [
        ("error", ("n2",)),
        ("warning", ("n1", "n2", "n3")),
    ]
    assert problems[1].message == "not shown: the original has changed"


def test_a_snapshot_that_was_made_is_told() -> None:
    nodes = [Node(f"n{number}").started() for number in (1, 2)]
    nodes[0].at(
        30, "snapshot", "saved", what="environment", target="/venv", message="saved for the next start"
    )
    (problem,) = report_of(*nodes).problems
    assert (problem.level, problem.name, problem.nodes) == ("info", "snapshot_saved", ("n1",))
    assert (problem.target, problem.message) == ("/venv", "saved for the next start")


def test_a_thousand_nodes_take_little_time() -> None:
    nodes = [
        mark(Node(f"n{number}").started(), 20 + number / 100, "training_started") for number in range(1000)
    ]
    report = report_of(*nodes)
    assert report.total is not None
    assert (report.total.slowest_node, report.total.node_count) == ("n999", 1000)


def test_a_run_without_events_has_no_stages() -> None:
    report = report_of()
    assert (report.starts, report.stages, report.total, report.transfers) == ((), (), None, ())
    assert report.queue_s == 12


def test_a_container_that_pyxis_imports_has_an_image_stage_without_a_mark() -> None:
    node = Node("n1").started(task_s=9).at(2.5, "image", "get", what="image", target="docker://x")
    mark(node, 20, "training_started")
    (start,) = report_of(node).starts
    assert start.stages == pytest.approx(
        {"allocation": 0.5, "prolog": 1.5, "launch": 0.5, "image": 6.5, "program": 11}
    )
    assert start.derived == ("image",)
    marked = Node("n1").started(task_s=9).at(2.5, "image", "get", what="image", target="docker://x")
    mark(mark(marked, 10, "image_loaded"), 20, "training_started")
    (start,) = report_of(marked).starts
    assert (start.stages["image"], start.derived) == (pytest.approx(7.5), ()), "the mark is what counts"


def test_a_container_after_a_batch_script_has_begun() -> None:
    """The batch script's node has a step more, which starts before the container's."""
    node = Node("n1").at(0.5, "hook", "begin").at(1, "step", "attach", step="batch")
    node.at(1.5, "step", "task_start", step="batch", task=0).at(4, "step", "attach", step="0")
    node.at(5, "image", "get", what="image", target="docker://x").at(
        9, "step", "task_start", step="0", task=0
    )
    (start,) = report_of(mark(node, 20, "training_started")).starts
    spans = [(span.stage, (span.end_ns - START) / SECOND) for span in start.spans]
    assert spans == [
        ("allocation", 0.5), ("prolog", 1), ("launch", 1.5), ("program", 5), ("image", 9), ("program", 20)
    ]  # fmt: skip


def test_an_image_file_that_is_read_before_the_task_is_a_containers() -> None:
    node = mark(Node("n1").started(task_s=9), 20, "training_started")
    read(node, "image", 3, 18)
    (start,) = report_of(node).starts
    assert (start.stages["launch"], start.stages["image"]) == (pytest.approx(1), pytest.approx(6))
    mounted = mark(Node("n2").started(task_s=3), 20, "training_started")
    read(mounted, "image", 1, 8)
    (start,) = report_of(mounted).starts
    assert start.stages["image"] == pytest.approx(5), "read in the prolog, to mount it, and by the task"


def test_what_a_job_reads_gives_its_stages_where_it_marks_none() -> None:
    node = mark(Node("n1").started(), 40, "training_started")
    read(node, "image", 3.5, 20)
    read(node, "environment", 5, 12)
    read(node, "checkpoint", 15, 30)
    report = report_of(node)
    (start,) = report.starts
    spans = [
        (span.stage, (span.begin_ns - START) / SECOND, (span.end_ns - START) / SECOND) for span in start.spans
    ]
    assert spans == [
        ("allocation", 0, 0.5), ("prolog", 0.5, 2), ("launch", 2, 3), ("program", 3, 3.5),
        ("image", 3.5, 5), ("environment", 5, 12), ("program", 12, 15), ("checkpoint", 15, 30), ("program", 30, 40),
    ]  # fmt: skip
    assert sum(start.stages.values()) == pytest.approx(40)
    assert {row.stage for row in report.stages if row.derived} == {"image", "environment", "checkpoint"}


def test_what_was_read_early_to_mount_it_has_its_stage_all_the_same() -> None:
    node = mark(Node("n1").started(), 40, "training_started")
    read(node, "image", 3, 10)
    read(node, "environment", 1, 15)
    read(node, "checkpoint", 20, 30)
    (start,) = report_of(node).starts
    assert start.stages == pytest.approx(
        {
            "allocation": 0.5,
            "prolog": 1.5,
            "launch": 1,
            "image": 7,
            "environment": 5,
            "checkpoint": 10,
            "program": 15,
        }
    )


def test_reads_after_the_start_or_before_the_task_make_no_stage() -> None:
    node = mark(Node("n1").started(), 20, "training_started")
    read(node, "checkpoint", 25, 30)
    read(node, "environment", 0, 0)
    assert set(report_of(node).starts[0].stages) == {"allocation", "prolog", "launch", "program"}
    late = mark(Node("n1").started(), 20, "training_started")
    read(late, "checkpoint", 10, 30)
    assert report_of(late).starts[0].stages["checkpoint"] == pytest.approx(10), "only until training began"


@pytest.mark.parametrize(
    ("stamps", "source", "training_s"),
    [
        ({"mark": 30, "gpu": 20, "io": 10}, "mark", 30),
        ({"gpu": 20, "io": 10}, "gpu", 20),
        ({"io": 10}, "io", 10),
        ({}, None, None),
    ],
)
def test_what_tells_when_training_began(
    stamps: dict[str, float], source: str | None, training_s: float | None
) -> None:
    node = Node("n1").started()
    for name, t_s in stamps.items():
        mark(node, t_s, "training_started") if name == "mark" else node.at(t_s, "training", name)
    report = report_of(node, Node("n2").started())
    assert (report.training_from, report.start_to_training_s) == (source, training_s)
    assert any("on 1 of 2 nodes" in note for note in report.notes) is (source is not None)


def skewed(name: str, ahead_s: float, error_ms: float) -> Node:
    """A node that trains at 20 s, by a clock that is ahead and says so."""
    node = Node(name).started(ahead_s + 0.5, ahead_s + 2, ahead_s + 3)
    mark(node, ahead_s + 20, "training_started")
    read(node, "checkpoint", ahead_s + 5, ahead_s + 9)
    return node.at(ahead_s + 70, "clock", "store", offset_ms=ahead_s * 1e3, error_ms=error_ms)


def test_stamps_of_a_clock_that_is_surely_wrong_are_moved() -> None:
    true, ahead = report_of(skewed("n1", 0, 10), skewed("n2", 7.5, 10)).starts
    assert true.stages == pytest.approx(ahead.stages)
    assert ahead.clock is not None
    assert (ahead.clock.offset_s, ahead.clock.error_s) == pytest.approx((7.5, 0.01))
    assert any("the stamps of 1 were moved" in note for note in report_of(skewed("n2", 7.5, 10)).notes)


def test_an_offset_within_its_error_moves_nothing() -> None:
    (start,) = report_of(skewed("n1", 0.4, 500)).starts
    assert start.stages["allocation"] == pytest.approx(0.9)


def test_clocks_are_set_against_that_of_the_reader() -> None:
    """Node and reader are ahead of the store's server by the same: the node is right."""
    (start,) = report_of(skewed("n1", 0, 10), reader=Offset(0.0, 0.01)).starts
    assert start.stages["allocation"] == pytest.approx(0.5)
    node = Node("n1").started().at(70, "clock", "store", offset_ms=5000, error_ms=10)
    (start,) = report_of(mark(node, 20, "training_started"), reader=Offset(5.0, 0.01)).starts
    assert start.clock is not None and start.clock.offset_s == pytest.approx(0)
    assert start.stages["allocation"] == pytest.approx(0.5)


def test_a_node_that_told_no_end_is_named() -> None:
    ended = mark(Node("n1").started(), 20, "training_started").at(900, "session", "end")
    died = mark(Node("n2").started(), 20, "training_started")
    report = report_of(ended, died)
    assert report.unended_nodes == ("n2",)
    assert len(report.starts) == 2
    running = report_of(died, record=replace(RECORD, end_ns=None))
    assert running.unended_nodes == ()
    assert (running.wall_s, running.starts[0].after_s) == (None, None)


def test_the_session_that_turned_from_observe_is_no_plain_start() -> None:
    node = Node("n1").started().at(0.7, "session", "begin", mode="observe")
    assert report_of(node).mode == "observe"
    assert report_of(node.at(2, "session", "mode", mode="prefetch")).mode == "prefetch"
