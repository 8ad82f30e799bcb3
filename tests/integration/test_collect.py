"""`bootseer collect` with real users' folders: what is new, whose it is, and being killed at any moment."""

from __future__ import annotations

import os
import pwd
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from msgspec import Struct

from bootseer_slurm.errors import BootseerError, IntegrityError
from bootseer_slurm.events import EventLog
from bootseer_slurm.report import collect as module
from bootseer_slurm.report.access import owners
from bootseer_slurm.report.access.owners import EventFile, OwnersEvents
from bootseer_slurm.report.collect import Collected, collect
from bootseer_slurm.report.records.archive import Archive
from bootseer_slurm.report.records.done import open_done
from bootseer_slurm.userproc.forked import Limits, read_as_user
from tests.integration.accounting import Accounting
from tests.integration.node import ALICE, BOB, unit_rights

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NOW_S = int(time.time())
START_S = NOW_S - 7200


class Site:
    """A store, accounting, and the folder of the records."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        self.uri = f"file://{self.store}"
        self.records = folder / "records"
        self.accounting = Accounting(folder / "bin")
        (self.store / "users").mkdir(parents=True)
        (self.store / "users").chmod(0o1777)
        self.config = folder / "bootseer.toml"
        self.config.write_text(f'[store]\nuri = "{self.uri}"\n[records]\npath = "{self.records}"\n')

    def put(self, uid: int, job: int, *, restart: int = 0, start_s: int = START_S, training_s: float = 40,
            node: str = "n1", owner: int | None = None) -> Path:  # fmt: skip
        """One node's events in a user's folder."""
        log = EventLog(job, restart, node)
        start_ns = start_s * 10**9
        log.emit("hook", "begin", t_ns=start_ns)
        log.emit("session", "begin", t_ns=start_ns + 1, mode="prefetch")
        log.emit("mark", "training_started", t_ns=start_ns + int(training_s * 1e9), step="0", task=0)
        events = self.store / "users" / str(uid) / "events"
        path = events / f"{job}.{restart}" / f"{node}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(log.to_jsonl())
        for each in (events.parent, events, path.parent, path):
            os.chown(each, uid if owner is None else owner, 0)
            each.chmod(0o700 if each.is_dir() else 0o600)
        os.utime(path.parent, (start_s + 60, start_s + 60))
        return path

    def run(self, uid: int, job: int, **more: Any) -> None:
        """A job that is over, with its events."""
        self.put(uid, job, **more)
        self.accounting.add(job, uid, start_s=START_S, end_s=START_S + 1000)

    def collect(self) -> Collected:
        return collect(self.uri, self.records)

    def rows(self) -> list[dict[str, Any]]:
        files = Archive(self.records).files()
        return sorted((row for path in files for row in pq.read_table(path, partitioning=None).to_pylist()),
                      key=lambda row: (row["job"], row["restart"]))  # fmt: skip


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="bootseer-collect-"))
    folder.chmod(0o755)
    made = Site(folder)
    monkeypatch.setenv("PATH", f"{made.accounting.folder}:{os.environ['PATH']}")
    yield made
    shutil.rmtree(folder)


def test_finished_jobs_get_a_row_and_a_comment_once(site: Site) -> None:
    site.run(ALICE, 7)
    site.run(BOB, 8, training_s=80)
    first = site.collect()
    assert (first.starts, first.comments, first.waiting, first.refused, first.problems) == (2, 2, 0, 0, [])
    assert [(row["job"], row["uid"], row["start_to_training_s"], row["lost_gpu_s"]) for row in site.rows()] == [
        (7, ALICE, 40.0, 320.0), (8, BOB, 80.0, 640.0)]  # fmt: skip
    assert site.accounting.comments["7"] == "bootseer: start 40s of 16m40s, 5 gpu-min, program 40s"
    again = site.collect()
    assert (again.starts, again.comments, site.accounting.writes) == (0, 0, 2)


def test_a_job_that_runs_waits_and_one_whose_node_was_late_is_counted_again(site: Site) -> None:
    site.put(ALICE, 7)
    site.accounting.add(7, ALICE, start_s=START_S, end_s=None)
    assert (site.collect().waiting, site.rows()) == (1, [])
    site.accounting.end(7, START_S + 1000)
    assert site.collect().starts == 1
    path = site.put(ALICE, 7, training_s=100)
    os.utime(path.parent, (NOW_S - 600, NOW_S - 600))
    assert site.collect().starts == 1
    assert [row["start_to_training_s"] for row in site.rows()] == [100.0]
    assert "start 1m40s" in site.accounting.comments["7"]


def test_a_job_that_has_just_ended_and_a_folder_that_has_just_changed_wait(site: Site) -> None:
    site.put(ALICE, 7, start_s=NOW_S - 100)
    site.accounting.add(7, ALICE, start_s=NOW_S - 100, end_s=int(time.time()))
    site.run(ALICE, 8)
    os.utime(site.store / f"users/{ALICE}/events/8.0")
    assert (site.collect().waiting, site.rows()) == (2, [])


def test_somebody_elses_comment_stays(site: Site) -> None:
    site.run(ALICE, 7)
    site.run(ALICE, 8)
    site.accounting.comment("7", "refunded, see ticket 12")
    site.accounting.comment("8", "bootseer: of an older version")
    result = site.collect()
    assert (result.comments, result.foreign_comments) == (1, 1)
    assert site.accounting.comments["7"] == "refunded, see ticket 12"
    assert site.accounting.comments["8"].startswith("bootseer: start 40s")


def test_only_the_last_run_of_a_requeued_job_is_commented(site: Site) -> None:
    site.put(ALICE, 7, training_s=500)
    site.put(ALICE, 7, restart=1, start_s=START_S + 2000, training_s=20)
    site.accounting.add(7, ALICE, start_s=START_S, end_s=START_S + 1000, State="REQUEUED")
    site.accounting.add(7, ALICE, start_s=START_S + 2000, end_s=START_S + 3000)
    assert site.collect().starts == 2
    assert [(row["restart"], row["start_to_training_s"]) for row in site.rows()] == [(0, 500.0), (1, 20.0)]
    assert site.accounting.comments == {"7": "bootseer: start 20s of 16m40s, 3 gpu-min, program 20s"}


def test_a_task_of_an_array_is_commented_by_its_own_name(site: Site) -> None:
    site.put(ALICE, 7)
    site.accounting.add(7, ALICE, start_s=START_S, end_s=START_S + 1000, shown_id="5_2")
    site.collect()
    assert list(site.accounting.comments) == ["5_2"]


def test_events_of_another_users_job_are_not_believed(site: Site) -> None:
    site.put(ALICE, 8, training_s=900)  # Alice's folder, Bob's job
    site.run(BOB, 8)
    result = site.collect()
    assert (result.starts, result.refused) == (1, 1)
    assert [(row["uid"], row["start_to_training_s"]) for row in site.rows()] == [(BOB, 40.0)]
    assert site.collect().refused == 0  # and they are not looked at again


def test_a_folder_under_anothers_number_is_not_read(site: Site) -> None:
    """Anybody can make users/<uid> where there is none yet."""
    site.accounting.add(8, BOB, start_s=START_S, end_s=START_S + 1000)
    path = site.put(BOB, 8, owner=ALICE)
    for each in (path, path.parent, path.parent.parent, path.parent.parent.parent):
        each.chmod(0o777)
    result = site.collect()
    assert (result.starts, site.rows(), site.accounting.comments) == (0, [], {})
    assert ["another user" in problem for problem in result.problems] == [True]
    assert OwnersEvents(site.uri).restarts(BOB, 8) == []


def test_a_link_in_a_users_folder_leads_to_nothing_that_he_may_not_read(site: Site) -> None:
    secret = site.put(BOB, 8)
    site.put(ALICE, 7).unlink()
    (site.store / f"users/{ALICE}/events/7.0/n1.jsonl").symlink_to(secret)
    assert list(OwnersEvents(site.uri).event_files(ALICE, 7, 0)) == []
    assert [node for node, _ in OwnersEvents(site.uri).event_files(BOB, 8, 0)] == ["n1"]


def test_reading_is_done_as_the_owner_for_good(site: Site) -> None:
    def produce(_: object) -> Iterator[tuple[Struct, bytes]]:
        yield Rights([*os.getresuid(), *os.getresgid(), *os.getgroups()], os.listdir("/proc/self/fd")), b""
        with pytest.raises(PermissionError):
            os.setuid(0)

    with (site.records.parent / "secret").open("w"):
        ((rights, _),) = read_as_user(ALICE, site.uri, produce, Rights)
    assert rights.ids == [ALICE] * 3 + [65534] * 3
    assert len(rights.fds) == 4  # three, and the listing's own


class Rights(Struct):
    """The ids and descriptors of the process that reads."""

    ids: list[int]
    fds: list[str]


class Number(Struct):
    n: int


def test_a_piece_of_another_kind_is_refused(site: Site) -> None:
    def produce(_: object) -> Iterator[tuple[Struct, bytes]]:
        yield Rights([1], []), b""

    with pytest.raises(IntegrityError, match="cannot be"):
        list(read_as_user(ALICE, site.uri, produce, Number))


def test_the_number_that_would_leave_it_root_is_no_user(site: Site) -> None:
    """setresuid(2) of 2^32 - 1 changes nothing, and anybody can make a folder of that name."""
    nobody = (1 << 32) - 1
    site.put(nobody, 7, owner=ALICE)
    site.accounting.add(7, nobody, start_s=START_S, end_s=START_S + 1000)

    def produce(_: object) -> Iterator[tuple[Struct, bytes]]:
        yield Number(os.geteuid()), b""

    for uid in (nobody, nobody + 1, -1):
        with pytest.raises(BootseerError, match="no such user"):
            list(read_as_user(uid, site.uri, produce, Number))
    assert (site.collect().starts, site.rows()) == (0, [])


@pytest.mark.parametrize("act", ["os.kill(os.getpid(), 9)", "time.sleep(60)", "os._exit(0)"])
def test_a_reader_that_dies_or_hangs_is_an_error_of_one_user(site: Site, act: str) -> None:
    def produce(_: object) -> Iterator[tuple[Struct, bytes]]:
        yield Number(1), b"x" * 2_000_000
        exec(act)
        yield Number(2), b""

    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    with pytest.raises(BootseerError):
        list(read_as_user(ALICE, site.uri, produce, Number, Limits(silent_s=0.5)))
    assert len({path.name for path in Path("/proc/self/fd").iterdir()} - before) <= 1
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_slow_file_system_is_not_taken_for_one_that_hangs(site: Site) -> None:
    def produce(_: object) -> Iterator[tuple[Struct, bytes]]:
        for number in range(4):
            time.sleep(0.5)
            yield Number(number), b""

    assert len(list(read_as_user(ALICE, site.uri, produce, Number, Limits(silent_s=1.5)))) == 4


def test_one_users_unreadable_folder_holds_up_nobody(site: Site) -> None:
    site.run(ALICE, 7)
    site.run(BOB, 8)
    (site.store / f"users/{ALICE}/events").chmod(0)
    result = site.collect()
    assert [row["job"] for row in site.rows()] == [8]
    assert len(result.problems) == 1 and f"user {ALICE}" in result.problems[0]


def test_rubbish_of_a_user_costs_his_own_figures_only(site: Site) -> None:
    site.run(ALICE, 7)
    site.run(BOB, 8)
    folder = site.store / f"users/{ALICE}/events"
    (folder / "7.0" / "n1.jsonl").write_bytes(b"\0\xff{" * 1000)
    (folder / "7.0" / "not a node\n.jsonl").write_text("{}")
    (folder / "99999999999.0").mkdir()
    (folder / "7").mkdir()
    os.mkfifo(folder / "7.0" / "n2.jsonl")
    os.utime(folder / "7.0", (NOW_S - 600, NOW_S - 600))
    result = site.collect()
    assert [(row["job"], row["start_to_training_s"]) for row in site.rows()] == [(7, None), (8, 40.0)]
    assert result.problems == []


def test_numbers_that_are_too_large_are_cut(site: Site) -> None:
    site.run(ALICE, 7)
    site.run(BOB, 8)
    path = site.store / f"users/{ALICE}/events/7.0/n1.jsonl"
    log = EventLog(7, 0, "n1")
    for target in "ab":
        log.emit(
            "prefetch",
            "end",
            what="image",
            target=target,
            bytes=(1 << 63) - 1,
            bytes_cached=(1 << 63) - 1,
            dur_s=1e9,
        )
    path.write_text(path.read_text() + log.to_jsonl())
    assert site.collect().problems == []
    assert [(row["job"], row["fetched_bytes"]) for row in site.rows()] == [(7, (1 << 63) - 1), (8, None)]


def test_a_fault_of_ours_with_one_job_holds_up_no_other(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.run(ALICE, 7)
    site.run(BOB, 8)
    site.run(ALICE, 9)
    real = module.row_of

    def fails(report: Any) -> Any:
        if report.run.job == 7:
            raise ZeroDivisionError("a bug")
        return real(report)

    monkeypatch.setattr(module, "row_of", fails)
    assert site.collect().problems == [f"user {ALICE}, job 7: ZeroDivisionError, see the log"]
    assert [row["job"] for row in site.rows()] == [8, 9]


def test_one_users_jobs_of_which_sacct_cannot_tell_hold_up_nobody(site: Site) -> None:
    for job in (666, 7):
        site.run(ALICE, job)
    site.run(BOB, 8)
    real = site.accounting.folder / "sacct"
    real.rename(real.with_name("real"))
    real.write_text(
        '#!/bin/sh\ncase "$*" in *666*) echo "sacct: error: too many" >&2; exit 1;; esac\nexec "$(dirname "$0")/real" "$@"\n'
    )
    real.chmod(0o755)
    result = site.collect()
    assert [row["job"] for row in site.rows()] == [8]
    assert result.problems == [f"user {ALICE}: sacct failed: too many"]


def test_a_job_counts_once_however_many_runs_its_user_makes_up(site: Site) -> None:
    site.run(ALICE, 7)
    for restart in (3, 9):
        site.put(ALICE, 7, restart=restart)
    site.collect()
    assert [(row["job"], row["lost_gpu_s"]) for row in site.rows()] == [(7, 320.0)]


def test_a_run_that_goes_on_for_days_is_not_given_up(site: Site) -> None:
    """Its folder is there since its start was over; the job's first run has ended."""
    site.put(ALICE, 7, start_s=NOW_S - 300_000)
    site.put(ALICE, 7, restart=1, start_s=NOW_S - 200_000)
    site.accounting.add(7, ALICE, start_s=NOW_S - 300_000, end_s=NOW_S - 250_000, State="NODE_FAIL")
    site.accounting.add(7, ALICE, start_s=NOW_S - 200_000, end_s=None)
    assert (site.collect().starts, site.collect().waiting) == (1, 1)
    site.accounting.end(7, NOW_S - 1000)
    assert site.collect().starts == 1
    assert [row["restart"] for row in site.rows()] == [0, 1]


def test_a_folder_without_a_time_waits_for_accounting(site: Site) -> None:
    """As those of S3."""
    os.utime(site.put(ALICE, 7).parent, (0, 0))
    assert (site.collect().waiting, site.collect().refused) == (1, 0)
    site.accounting.add(7, ALICE, start_s=START_S, end_s=START_S + 1000)
    assert site.collect().starts == 1


def test_what_a_user_calls_the_tasks_that_never_ran_stops_no_comment(site: Site) -> None:
    site.put(ALICE, 7)
    site.accounting.add(7, ALICE, start_s=START_S, end_s=START_S + 1000, shown_id="7_[3-5%2]")
    site.run(BOB, 8)
    assert site.collect().problems == []
    assert list(site.accounting.comments) == ["8"]


def test_a_store_that_cannot_be_listed_is_said(site: Site) -> None:
    site.collect()
    os.utime(site.records / "lock", (NOW_S - 9000, NOW_S - 9000))
    (site.store / "users").rmdir()
    (site.store / "users").touch()
    with pytest.raises(BootseerError, match="cannot be listed"):
        site.collect()
    assert (site.records / "lock").stat().st_mtime == NOW_S - 9000  # `bootseer doctor` shows it


def test_what_is_known_of_events_goes_with_them(site: Site) -> None:
    def noted() -> list[tuple[int]]:
        with sqlite3.connect(site.records / "done.sqlite") as state:
            return state.execute("SELECT job FROM done ORDER BY job").fetchall()

    for job in (7, 8):
        site.run(ALICE, job)
    site.collect()
    shutil.rmtree(site.store / f"users/{ALICE}/events/7.0")
    assert (site.collect().starts, noted()) == (0, [(8,)])
    (site.store / f"users/{ALICE}").rename(site.store / "away")  # not all of them are gone at once
    (site.store / f"users/{ALICE}").mkdir()
    os.chown(site.store / f"users/{ALICE}", ALICE, 0)
    assert (site.collect().problems, noted()) == ([], [(8,)])
    assert [row["job"] for row in site.rows()] == [7, 8]


def test_numbers_that_are_no_jobs_are_not_asked_for(site: Site) -> None:
    site.run(ALICE, 7)
    for name in ("0.0", "4294967296.0", "9999999999.0"):
        (site.store / f"users/{ALICE}/events" / name).mkdir()
    result = site.collect()
    assert (result.starts, result.waiting, result.refused) == (1, 0, 0)


def test_a_user_whose_files_never_end_is_stopped_and_what_was_read_counts(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = owners.event_pieces

    def endless(store: Any, uid: int, job: int, restart: int) -> Iterator[tuple[EventFile, bytes]]:
        yield from real(store, uid, job, restart)
        while job == 8:
            yield EventFile(job, restart, "n1"), b""
            time.sleep(0.01)

    monkeypatch.setattr(owners, "event_pieces", endless)
    monkeypatch.setattr(module, "_USER_LIMIT_S", 1.0)
    site.run(ALICE, 8)
    site.run(ALICE, 7)
    os.utime(site.store / f"users/{ALICE}/events/7.0", (NOW_S - 60, NOW_S - 60))  # the newest is read first
    site.run(BOB, 9)
    result = site.collect()
    assert [row["job"] for row in site.rows()] == [7, 9]
    assert (
        len(result.problems) == 1 and f"user {ALICE}" in result.problems[0] and "in 1 s" in result.problems[0]
    )


def test_of_one_run_no_more_is_read_than_it_may_cost(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        site.put(ALICE, 7, node=f"n{number}").write_bytes(b"x" * 1000)
    monkeypatch.setattr("bootseer_slurm.report.access.owners._RUN_LIMIT_BYTES", 2500)
    assert len(list(OwnersEvents(site.uri).event_files(ALICE, 7, 0))) == 2


def test_a_job_that_accounting_never_knew_is_given_up_after_a_day(site: Site) -> None:
    site.put(ALICE, 7)
    assert (site.collect().waiting, site.collect().refused) == (1, 0)
    os.utime(site.store / f"users/{ALICE}/events/7.0", (NOW_S - 90_000, NOW_S - 90_000))
    assert (site.collect().refused, site.collect().refused) == (1, 0)


def test_comments_wait_while_accounting_does_not_take_them(site: Site) -> None:
    site.run(ALICE, 7)
    real = (site.accounting.folder / "sacctmgr").read_text()
    (site.accounting.folder / "sacctmgr").write_text("#!/bin/sh\necho slurmdbd is down >&2\nexit 2\n")
    result = site.collect()
    assert (result.starts, result.comments) == (1, 0)
    assert "slurmdbd is down" in result.problems[0]
    (site.accounting.folder / "sacctmgr").write_text("#!/bin/sh\nexit 0\n")  # says nothing, does nothing
    assert (site.collect().comments, site.collect().comments) == (0, 0)
    (site.accounting.folder / "sacctmgr").write_text(real)
    assert site.collect().comments == 1


def test_a_comment_that_is_never_taken_is_given_up(site: Site) -> None:
    site.run(ALICE, 7)
    (site.accounting.folder / "sacctmgr").write_text("#!/bin/sh\nexit 0\n")
    told = [problem for _ in range(7) for problem in site.collect().problems]
    assert told == ["AdminComment not taken by accounting, jobs: 1"]


def test_rows_that_were_written_but_not_noted_are_not_there_twice(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.run(ALICE, 7)

    def interrupt(row: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "comment_of", interrupt)
        with pytest.raises(KeyboardInterrupt):  # after the dataset, before the note
            site.collect()
    assert len(site.rows()) == 1
    assert site.collect().starts == 1
    assert (len(site.rows()), site.accounting.writes) == (1, 1)


def collect_command(site: Site) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*unit_rights("bootseer-collect.service"), sys.executable, "-m", "bootseer_slurm", "--config", str(site.config), "collect"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_killed_again_and_again_it_loses_nothing_and_writes_nothing_twice(site: Site) -> None:
    monkey_s = 0.0
    for job in range(100, 160):
        site.run(ALICE if job % 2 else BOB, job)
    for _ in range(12):
        process = collect_command(site)
        monkey_s += 0.08
        time.sleep(0.2 + monkey_s)
        process.kill()
        process.communicate()
    done = collect_command(site)
    output, _ = done.communicate()
    assert done.returncode == 0, output
    assert [row["job"] for row in site.rows()] == list(range(100, 160))
    assert set(site.accounting.comments) == {str(job) for job in range(100, 160)}


def test_two_at_once_do_not_meet(site: Site) -> None:
    site.run(ALICE, 7)
    results: list[Collected | BootseerError] = []

    def once() -> None:
        try:
            results.append(site.collect())
        except BootseerError as error:
            results.append(error)

    with open_done(site.records):
        thread = threading.Thread(target=once)
        thread.start()
        thread.join()
    assert isinstance(results[0], BootseerError) and "another collect" in results[0].message
    assert site.collect().starts == 1


def test_the_command_is_roots_and_says_what_it_did(site: Site) -> None:
    site.run(ALICE, 7)
    output, _ = collect_command(site).communicate()
    assert output.startswith("starts added: 1, ")
    assert site.records.stat().st_mode & 0o777 == 0o700
    command = [sys.executable, "-m", "bootseer_slurm", "--config", str(site.config), "collect"]
    refused = subprocess.run(
        command, user=ALICE, group=ALICE, extra_groups=[], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and "runs as root" in refused.stderr


def test_a_folder_that_another_has_made_is_given_to_its_user(site: Site) -> None:
    """Anybody can be first in users/: its user could then keep nothing in the store."""
    known = pwd.getpwnam("nobody")  # who is in every passwd file; the others are in none
    users = site.store / "users"
    site.run(BOB, 7)
    for uid in (known.pw_uid, *range(900_000, 900_300)):  # whom nobody knows: they stay, and cost nothing
        (users / str(uid)).mkdir()
        (users / str(uid) / "events").mkdir()
        os.chown(users / str(uid), BOB, BOB)
    (users / "900001" / "events").rmdir()
    (users / "900001").rmdir()
    (users / "900001").symlink_to("/etc")
    output, _ = collect_command(site).communicate()
    given = f"users/{known.pw_uid} was made by user {BOB}, and is its own user's now"
    assert given in output and "300 folders" in output and "starts added: 1, " in output
    status = (users / str(known.pw_uid)).stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (known.pw_uid, known.pw_gid, 0o700)
    (aside,) = users.glob(f".put-aside-{known.pw_uid}-*")
    assert aside.stat().st_uid == BOB and [path.name for path in aside.iterdir()] == ["events"]
    site.run(known.pw_uid, 8)
    result = site.collect()
    assert len(result.problems) == 1 and result.problems[0].startswith("300 folders") and result.starts == 1
