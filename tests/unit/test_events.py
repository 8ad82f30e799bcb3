"""Events: round trips, hostile lines, and the log of a node."""

from __future__ import annotations

import json
import random
import resource
import threading
from pathlib import Path

import pytest

from bootseer_slurm.cgroups import NO_GROUP
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.events import MAX_LINE, Event, EventLog, parse_line, read_events
from bootseer_slurm.job.context import JobContext
from bootseer_slurm.slurm.allocation import Job

BASE: dict[str, object] = {
    "v": 1,
    "t_ns": 1_700_000_000_000_000_000,
    "job": 123,
    "restart": 0,
    "node": "n1",
    "kind": "mark",
    "name": "training_started",
}


def line(**changes: object) -> str:
    record = {**BASE, **changes}
    return json.dumps({key: value for key, value in record.items() if value is not ...})


def test_round_trip_keeps_every_field() -> None:
    event = Event(
        t_ns=1_700_000_000_123_456_789,
        job=7,
        restart=2,
        node="gpu-01.rack2",
        kind="prefetch",
        name="end",
        level="warning",
        step="0",
        task=3,
        target="/lustre/img/träin.sqsh",
        what="image",
        bytes=1 << 40,
        dur_s=1.25,
        source="store",
        message="one line",
        extra={"bytes_cached": 5, "rate": 0.5, "mode": "prefetch"},
    )
    text = event.to_json()
    assert text.isascii()
    assert "\n" not in text
    assert parse_line(text) == event


def test_absent_fields_are_not_written() -> None:
    event = Event(1, 2, 0, "n1", "hook", "begin")
    assert json.loads(event.to_json()) == {
        "v": 1, "t_ns": 1, "job": 2, "restart": 0, "node": "n1", "kind": "hook", "name": "begin",
    }  # fmt: skip


def test_an_extra_field_cannot_replace_a_known_one() -> None:
    event = Event(1, 2, 0, "n1", "hook", "begin", extra={"job": 99, "v": 2})
    assert parse_line(event.to_json()).job == 2


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "null",
        "[]",
        '"text"',
        "{",
        '{"v":1}',
        line(v=2),
        line(v=True),
        line(v=...),
        line(t_ns=...),
        line(t_ns=1.5),
        line(t_ns="1"),
        line(t_ns=-1),
        line(t_ns=1 << 63),
        line(job=True),
        line(job=-1),
        line(job=1 << 32),
        line(restart=None),
        line(node="../../etc"),
        line(node="n1\n"),
        line(node=""),
        line(node="n" * 300),
        line(kind="Mark"),
        line(kind=["mark"]),
        line(name="a b"),
        line(name="x" * 65),
        line(name="\x1b[31m"),
        line(level="fatal"),
        line(level=["info"]),
        line(step=0),
        line(step="0;1"),
        line(task="0"),
        line(task=-1),
        line(bytes=1.5),
        line(bytes=-1),
        line(dur_s=-0.1),
        line(dur_s="1"),
        line(dur_s=True),
        line(dur_s=1e300),
        line(target=5),
        line(what="Image!"),
        line(source=5),
        line(message={"a": 1}),
        line()[:-1] + ',"dur_s":NaN}',
        line()[:-1] + ',"extra_s":Infinity}',
        "[" * 100_000,
        line(message="x" * MAX_LINE),
        line()[:-1] + ',"bytes":' + "9" * 5000 + "}",
        line() + line(),
    ],
    ids=lambda text: text[:70],
)
def test_hostile_lines_are_refused_with_a_short_message(bad: str) -> None:
    with pytest.raises(BootseerError) as caught:
        parse_line(bad)
    assert len(caught.value.message) < 300
    assert caught.value.message.isprintable()


def test_text_cannot_disturb_a_terminal() -> None:
    event = parse_line(
        line(
            message="a\x1b[2J\nb\u202ec\ud800d\u2028e\x9bf",
            target="/x\r/y",
            job_name="\x07name\x00",
        )
    )
    assert event.message == "a [2J b c d e f"
    assert event.target == "/x /y"
    assert event.extra == {"job_name": "name"}


def test_extra_fields_are_kept_only_if_scalar_and_bounded() -> None:
    dropped = {"nothing": None, "nested": {"a": 1}, "many": [1], "BAD": 1, "huge": 1 << 70}
    event = parse_line(line(reads=3, rate=0.5, mode="observe", flag=True, **dropped))
    assert event.extra == {"reads": 3, "rate": 0.5, "mode": "observe", "flag": 1}
    many = parse_line(line(**{f"x{number}": number for number in range(500)}))
    assert len(many.extra) == 32


def test_long_texts_are_cut() -> None:
    event = parse_line(line(message="m" * 5000, target="/" * 5000, partition="p" * 40_000))
    assert (len(event.message or ""), len(event.target or "")) == (1000, 4096)
    assert len(str(event.extra["partition"])) == 16 * 1024


def test_a_long_nodelist_is_left_out_and_not_cut() -> None:
    """A list that is cut reads as the list of fewer nodes."""
    assert parse_line(line(nodelist="n," * 8192)).extra["nodelist"] == "n," * 8192
    assert "nodelist" not in parse_line(line(nodelist="n," * 8192 + "n")).extra
    log = EventLog(1, 0, "n1")
    log.emit("session", "begin", nodelist="n," * 20_000, mode="observe")
    assert log.events()[0].extra == {"mode": "observe"}


def test_number_of_an_extra_field_that_is_text_or_absent_is_zero() -> None:
    event = parse_line(line(reads="many", blocked_s=1.5))
    assert (event.number("reads"), event.number("hit_bytes"), event.number("blocked_s")) == (0, 0, 1.5)


def test_read_events_counts_the_bad_lines_and_keeps_the_rest() -> None:
    events, bad_count = read_events([line(), "", "  \n", "rubbish", line(job=5), line(job="5"), "{}"])
    assert [event.job for event in events] == [123, 5]
    assert bad_count == 3


def test_mutated_lines_raise_nothing_but_bootseer_errors() -> None:
    source = random.Random(11)
    good = Event(1, 2, 0, "n1", "prefetch", "end", bytes=5, dur_s=1.0, message="x", extra={"a": 1}).to_json()
    for _ in range(3000):
        text = list(good)
        for _ in range(source.randint(1, 4)):
            text[source.randrange(len(text))] = source.choice('\0",-0:[\\{\ud800\U0001f600')
        try:
            parse_line("".join(text)).to_json()
        except BootseerError:
            pass


def test_log_fills_in_job_node_and_time() -> None:
    log = EventLog(42, 1, "n3")
    assert log.emit("prefetch", "end", what="image", target="/a", bytes=10, bytes_cached=5, dur_s=None)
    (event,) = log.events()
    assert (event.job, event.restart, event.node) == (42, 1, "n3")
    assert event.t_ns > 1_700_000_000_000_000_000
    assert event.extra == {"bytes_cached": 5}
    assert log.emit("hook", "begin", t_ns=5) and log.events()[-1].t_ns == 5
    assert read_events(log.to_jsonl().splitlines()) == (log.events(), 0)


def test_log_refuses_what_could_not_be_read_again() -> None:
    log = EventLog(42, 1, "n3")
    with pytest.raises(BootseerError):
        log.emit("mark", "no spaces please")
    with pytest.raises(BootseerError):
        log.emit("mark", "x", t_ns=-5)
    assert log.events() == []


def test_log_goes_on_after_a_restart_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first = EventLog(1, 0, "n1", path=path)
    first.emit("hook", "begin", t_ns=1)
    first.close()
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("a") as file:
        file.write('{"v":1,"t_ns":2,"jo')
    second = EventLog(1, 0, "n1", path=path)
    second.emit("session", "begin", t_ns=3)
    assert [event.t_ns for event in second.events()] == [1, 3]
    events, bad_count = read_events(path.read_text().splitlines())
    assert [event.t_ns for event in events] == [1, 3]
    assert bad_count == 1
    second.close()
    second.emit("session", "end", t_ns=4)
    assert [event.t_ns for event in second.events()] == [1, 3, 4]


def test_log_keeps_events_in_memory_when_its_file_cannot_be_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path, tmp_path / "no" / "folder", tmp_path / "link"):
        caplog.clear()
        log = EventLog(1, 0, "n1", path=path)
        log.emit("hook", "begin")
        assert [event.name for event in log.events()] == ["begin"]
        assert len(caplog.records) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_log_keeps_events_in_memory_when_its_file_cannot_grow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(1, 0, "n1", path=tmp_path / "log")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        for number in range(5):
            log.emit("mark", f"event{number}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(log.events()) == 5
    assert len(caplog.records) == 1
    events, bad_count = read_events((tmp_path / "log").read_text().splitlines())
    assert (len(events), bad_count) == (1, 1)


def test_log_bounds_what_a_job_can_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventLog, "MAX_USER_EVENTS", 10)
    log = EventLog(1, 0, "n1")
    for _ in range(50):
        log.emit("mark", "again")
    log.emit("access", "summary", reads=5)
    log.emit("mark", "training_started")
    names = [event.name for event in log.events()]
    assert names == ["again"] * 10 + ["too_many_events", "summary", "training_started"]


def test_log_bounds_each_event_that_comes_in_a_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """100,000 faults of one loop were seen: they leave room for others, and for the end."""
    monkeypatch.setattr(EventLog, "MAX_EVENTS_OF_NAME", 10)
    log = EventLog(1, 0, "n1", path=tmp_path / "log")
    context = JobContext(Job(job_id=1, restart=0, uid=1, gid=1), "", "n1", Config(), log, NO_GROUP)
    for _ in range(50):
        context.fault("not_found", "no such file")
    assert sum("no such file" in record.message for record in caplog.records) == 10
    context.fault("corrupt", "another")
    log.emit("session", "end")
    expected = ["not_found"] * 10 + ["too_many_events", "corrupt", "end"]
    assert [event.name for event in log.events()] == expected
    log.close()
    again = EventLog(1, 0, "n1", path=tmp_path / "log")  # of the next agent
    assert not again.emit("fault", "not_found", level="warning", message="no such file")
    assert again.emit("fault", "corrupt", level="warning", message="another")


def test_log_takes_events_from_several_threads(tmp_path: Path) -> None:
    log = EventLog(1, 0, "n1", path=tmp_path / "log")

    def emit_many() -> None:
        for task in range(200):
            log.emit("mark", "m", task=task)

    threads = [threading.Thread(target=emit_many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events, bad_count = read_events((tmp_path / "log").read_text().splitlines())
    assert (len(events), bad_count) == (1600, 0)
    assert events == log.events()
