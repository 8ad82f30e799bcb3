"""What a user writes into his own event files, or calls his job, spoils nobody's reading of the report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bootseer_slurm.report.gather.gather import gather
from bootseer_slurm.report.render.formats import FORMATS
from bootseer_slurm.report.render.terminal import to_terminal
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.slurm.jobs import JobRecord
from tests.unit.records import RECORD, SECOND, START

HUGE = 1e308


class Files:
    """The files of one run, as its user wrote them."""

    def __init__(self, files: Sequence[tuple[str, str]]) -> None:
        self._files = files

    def users(self) -> list[int]:
        return [1000]

    def restarts(self, uid: int, job: int) -> list[int]:
        return [0]

    def event_files(self, uid: int, job: int, restart: int) -> Sequence[tuple[str, str]]:
        return self._files


def line(kind: str, name: str, t_ns: int = START + SECOND, **more: Any) -> str:
    return json.dumps(
        {"v": 1, "job": 5, "restart": 0, "node": "n1", "t_ns": t_ns, "kind": kind, "name": name} | more
    )


def report_of(*lines: str, record: JobRecord = RECORD) -> Report:
    begin = line("hook", "begin", START), line("session", "begin", START + 1, mode="prefetch")
    files = Files([("n1", "\n".join([*begin, *lines]))])
    return analyse(gather("5", store=files, accounting=lambda _: (record,)))


def access(**more: Any) -> str:
    return line("access", "start", what="image", target="a", **more)


@pytest.mark.parametrize(
    "lines",
    [
        [access(blocked_s=HUGE, fetch_s=HUGE, store_bytes=HUGE, reads=HUGE, hit_bytes=HUGE, miss_bytes=HUGE)] * 2,
        [access(waited_s=HUGE, longest_wait_s=HUGE)] * 2,
        [access(waited_s=-HUGE, longest_wait_s=-1)],
        [access(waited_s=HUGE, longest_wait_s=HUGE), line("mark", "training_started", START + SECOND, step="0", task=0)],
        [access(first_ns=HUGE, last_ns=HUGE), access(first_ns=-HUGE, last_ns=1)],
        [access(fetch_s=1e-320, store_bytes=HUGE, disk_s=1e-320), line("load", "start", dur_s=1e-320, cpu_s=HUGE)],
        [line("clock", "store", offset_ms=HUGE, error_ms=1.0)],
        [line("clock", "store", offset_ms=-HUGE, error_ms=1.0)],
        [line("prefetch", "end", what="image", target="a", bytes=(1 << 63) - 1, dur_s=1e-320, bytes_cached=-HUGE)],
        [line("mark", "training_started", (1 << 63) - 1, step="0", task=0)],
    ],
    ids=["sums", "waits", "waits behind", "waits of a start", "reads", "rates", "clock", "clock behind", "prefetch", "mark"],
)  # fmt: skip
def test_numbers_beyond_all_reason_are_shown_in_every_format(lines: list[str]) -> None:
    report = report_of(*lines)
    for write in FORMATS.values():
        assert write(report)
    screen = io.StringIO()
    to_terminal(report, Console(file=screen, width=120))
    assert "job 5" in screen.getvalue()


@pytest.mark.parametrize("name", ["training_started", "image_loaded"])
def test_no_stage_is_longer_than_the_job(name: str) -> None:
    """A mark's stamp is what the job says it is."""
    (start,) = report_of(line("mark", name, START + 10**17, step="0", task=0)).starts
    assert sum(start.stages.values()) + (start.after_s or 0.0) == 1000.0
    assert start.after_s == 0.0


def test_a_mode_that_we_do_not_know_is_none() -> None:
    assert report_of(line("session", "mode", mode="a" * 9999)).mode == "prefetch"
    begun = Files([("n1", line("session", "begin", mode="a" * 9999))])
    assert analyse(gather("5", store=begun, accounting=lambda _: (RECORD,))).mode is None


def test_a_table_for_spreadsheets_leaves_the_terminal_alone() -> None:
    report = report_of(record=replace(RECORD, name="\x1b]0;owned\x07\n=1+1"))
    text = FORMATS["csv"](report).decode()
    assert "\x1b" not in text and "\x07" not in text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["job_name"] for row in rows} == {" ]0;owned  =1+1"}
    report = report_of(record=replace(RECORD, name="\x0b=1+1"))
    assert next(csv.DictReader(io.StringIO(FORMATS["csv"](report).decode())))["job_name"] == "' =1+1"


def test_a_terminal_is_not_flooded() -> None:
    faults = [line("fault", "x", message=f"fault {number}") for number in range(1000)]
    reads = [line("access", "summary", what="image", target=f"/image{number}") for number in range(1000)]
    screen = io.StringIO()
    to_terminal(report_of(*faults, *reads), Console(file=screen, width=120))
    text = screen.getvalue()
    assert text.count("\n") < 150 and "fault 49" in text and "/image49" in text
    assert "and 950 problems more" in text and "and 950 more" in text


def test_nothing_of_accounting_reaches_the_terminal_but_letters() -> None:
    hostile = "\x1b[2J\x9b5m\u202e\n"
    names = {"name": hostile, "user": hostile, "account": hostile, "partition": hostile}
    screen = io.StringIO()
    to_terminal(report_of(record=replace(RECORD, **names)), Console(file=screen, width=120))
    assert all(letter.isprintable() or letter == "\n" for letter in screen.getvalue())


class Unread(str):
    """A text that is not to be looked into."""

    def __getitem__(self, _: object) -> str:
        raise AssertionError("parsed for nothing")


def test_files_of_nodes_that_the_job_did_not_have_are_not_parsed() -> None:
    files = Files(
        [*((f"x{number}", Unread()) for number in range(100)), ("n1", line("hook", "begin", START))]
    )
    run = gather("5", store=files, accounting=lambda _: (RECORD,))
    assert [sent.node for sent in run.nodes] == ["n1"]
    assert "files left out because the job did not have their nodes: 100" in run.notes
