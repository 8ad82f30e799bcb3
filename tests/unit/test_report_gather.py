"""Collect: joining event files and accounting, each of which may be missing, wrong or hostile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.events import EventLog
from bootseer_slurm.report.gather.gather import gather
from bootseer_slurm.report.gather.run import Run
from bootseer_slurm.report.gather.stored import StoredEvents
from bootseer_slurm.slurm.jobs import AccountingError, JobRecord
from bootseer_slurm.store import FileStore
from tests.nodelists import nodelist_of
from tests.unit.records import RECORD as BASE
from tests.unit.records import SECOND, START

RECORD = replace(BASE, job=77, shown_id="77", end_ns=START + 100 * SECOND, nodes=("n1", "n2", "n10"))


def write(
    root: Path,
    node: str,
    *,
    uid: int = 1000,
    job: int = 77,
    restart: int = 0,
    t_ns: int = START,
    nodelist: str = "n[1-2,10]",
) -> Path:
    """One node's file with a hook event and a session event."""
    log = EventLog(job, restart, node)
    log.emit("hook", "begin", t_ns=t_ns)
    log.emit("session", "begin", t_ns=t_ns + 1, nodelist=nodelist, mode="prefetch")
    path = root / "users" / str(uid) / "events" / f"{job}.{restart}" / f"{node}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(log.to_jsonl())
    return path


def run_of(
    root: Path, records: Sequence[JobRecord] | BootseerError = (RECORD,), job_id: str = "77", **more: int
) -> Run:
    def accounting(_: str) -> Sequence[JobRecord]:
        if isinstance(records, BootseerError):
            raise records
        return records

    return gather(job_id, store=StoredEvents(FileStore(root)), accounting=accounting, **more)


def test_events_and_accounting_are_joined(tmp_path: Path) -> None:
    for node in ("n2", "n1", "n10"):
        write(tmp_path, node)
    run = run_of(tmp_path)
    assert (run.job, run.restart, run.uid, run.record) == (77, 0, 1000, RECORD)
    assert {sent.node: len(sent.events) for sent in run.nodes} == {"n1": 2, "n2": 2, "n10": 2}
    assert run.silent_nodes == ()
    assert run.notes == ()


def test_a_node_that_sent_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path, "n1")
    write(tmp_path, "n2").write_text("rubbish\n")
    run = run_of(tmp_path)
    assert run.silent_nodes == ("n2", "n10")
    assert "lines left out because they are no events of this run: 1" in run.notes


def test_without_accounting_the_events_still_give_a_run(tmp_path: Path) -> None:
    write(tmp_path, "n1")
    run = run_of(tmp_path, AccountingError("sacct is not installed here"))
    assert run.record is None
    assert run.uid == 1000
    assert run.silent_nodes == ("n2", "n10")
    assert run.notes == ("without accounting: sacct is not installed here",)


def test_without_accounting_a_long_nodelist_makes_no_node_silent(tmp_path: Path) -> None:
    """Nor another one in its place: a list that is cut ends in the beginning of a name."""
    write(tmp_path, "n1", nodelist=nodelist_of(10_000))
    assert run_of(tmp_path, AccountingError("sacct is not installed here")).silent_nodes == ()


def test_accounting_that_does_not_know_the_job_is_no_reason_to_give_up(tmp_path: Path) -> None:
    write(tmp_path, "n1")
    assert run_of(tmp_path, NotFound("accounting has no job 77")).nodes[0].node == "n1"


def test_nothing_at_all_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        run_of(tmp_path, NotFound("accounting has no job 77"))
    assert "77" in caught.value.message


def test_a_job_without_events_says_so(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert run.silent_nodes == ("n1", "n2", "n10")
    assert any("without --bootseer" in note for note in run.notes)
    running = run_of(tmp_path, [replace(RECORD, end_ns=None, state="RUNNING")])
    assert any("when the job ends" in note for note in running.notes)


def test_the_last_restart_is_the_default_and_others_can_be_asked_for(tmp_path: Path) -> None:
    again = replace(RECORD, restart=1, start_ns=START + 300 * SECOND, end_ns=START + 400 * SECOND)
    write(tmp_path, "n1", restart=0)
    write(tmp_path, "n1", restart=1, t_ns=START + 301 * SECOND)
    last = run_of(tmp_path, [RECORD, again])
    assert (last.restart, last.restarts, last.record) == (1, (0, 1), again)
    assert "restart 1; this job also has restart 0" in last.notes
    first = run_of(tmp_path, [RECORD, again], restart=0)
    assert (first.restart, first.record) == (0, RECORD)
    with pytest.raises(NotFound, match="no restart 7"):
        run_of(tmp_path, [RECORD, again], restart=7)


def test_a_restart_that_still_waits_in_the_queue_is_not_reported(tmp_path: Path) -> None:
    waiting = replace(RECORD, restart=1, state="PENDING", start_ns=None, end_ns=None, nodes=())
    write(tmp_path, "n1")
    assert run_of(tmp_path, [RECORD, waiting]).restart == 0


def test_a_restart_that_sent_nothing_is_reported_as_silent(tmp_path: Path) -> None:
    again = replace(RECORD, restart=1, start_ns=START + 300 * SECOND, end_ns=START + 400 * SECOND)
    write(tmp_path, "n1", restart=0)
    run = run_of(tmp_path, [RECORD, again])
    assert (run.restart, run.nodes, run.silent_nodes) == (1, (), ("n1", "n2", "n10"))


def test_purged_records_do_not_shift_the_restarts(tmp_path: Path) -> None:
    """Accounting knows only the third run, and numbers it 0."""
    write(tmp_path, "n1", restart=2)
    run = run_of(tmp_path)
    assert (run.restart, run.restarts) == (2, (2,))
    assert run.record is not None
    assert run.record.start_ns == START


def test_the_record_is_the_one_in_whose_time_the_events_lie(tmp_path: Path) -> None:
    """Job ids were reset: an old job 77 of this user counts as a first run, but the events are of the new."""
    old = replace(RECORD, start_ns=START - 10**6 * SECOND, end_ns=START - 10**6 * SECOND + SECOND)
    new = replace(RECORD, restart=1)
    write(tmp_path, "n1", restart=0)
    run = run_of(tmp_path, [old, new], restart=0)
    assert run.record == new
    assert any("chosen by its time" in note for note in run.notes)


def test_an_array_task_is_found_under_its_own_number(tmp_path: Path) -> None:
    tasks = [replace(RECORD, job=78 + task, shown_id=f"77_{task}", array_task=task) for task in (1, 2)]
    write(tmp_path, "n1", job=80)
    run = run_of(tmp_path, tasks, job_id="77_2")
    assert (run.job, run.record, len(run.nodes)) == (80, tasks[1], 1)
    with pytest.raises(InputError) as caught:
        run_of(tmp_path, AccountingError("sacct is not installed here"), job_id="77_2")
    assert "SLURM_JOB_ID" in (caught.value.hint or "")


def test_another_users_events_of_this_job_are_not_believed(tmp_path: Path) -> None:
    write(tmp_path, "n1", uid=1000)
    write(tmp_path, "n2", uid=666)
    run = run_of(tmp_path)
    assert [sent.node for sent in run.nodes] == ["n1"]
    off = AccountingError("accounting is off")
    with pytest.raises(InputError, match="users 666, 1000"):
        run_of(tmp_path, off)
    assert [sent.node for sent in run_of(tmp_path, off, uid=1000).nodes] == ["n1"]


def test_lines_of_other_jobs_and_nodes_and_foreign_files_are_left_out(tmp_path: Path) -> None:
    mine = write(tmp_path, "n1")
    forged = EventLog(78, 0, "n1")
    forged.emit("fault", "x", message="of another job")
    other_node = EventLog(77, 0, "n2")
    other_node.emit("fault", "x", message="of another node")
    with mine.open("a") as file:
        file.write(forged.to_jsonl() + other_node.to_jsonl())
    write(tmp_path, "stranger")
    (mine.parent / "\x1b[2J.jsonl").write_text(mine.read_text())
    (mine.parent / "n2.jsonl").mkdir()
    (mine.parent / "notes.txt").write_text("not ours")
    run = run_of(tmp_path)
    assert [(sent.node, len(sent.events), sent.bad_lines) for sent in run.nodes] == [("n1", 2, 2)]
    assert "files left out because the job did not have their nodes: 1" in run.notes


@pytest.mark.parametrize(
    "job_id", ["", "x", "12;rm", "-1", "12 13", "1_2_3", "12+", "--jobs=1", "1" * 11, "٣"]
)
def test_what_is_no_job_id_is_refused(tmp_path: Path, job_id: str) -> None:
    with pytest.raises(InputError):
        run_of(tmp_path, job_id=job_id)
