"""`bootseer collect`: from new events in the store to records and AdminComment.

Owns what was done (one SQLite file) and the order of things; owners.py reads, archive.py has the dataset.
One at a time, by a lock; root on one machine of the cluster. Killed at any moment it goes on at the next run:
rows are put into the dataset before they are noted as done, and to put a row in twice is to put it in once.
A comment waits in the same file until accounting was seen to have it.

    <folder>/done.sqlite    done(uid, job, restart, changed_s): in the dataset, or not believed; as long as
                            its events are in the store
                            comment(job, shown_id, text, tries): to be written
    <folder>/lock           flock; its time: when a call last came to its end

A run of a job is looked at when its folder changed since, and its job is over. Whose job it is, accounting
says: events in another user's folder are left out for good.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.report.analyse import analyse
from bootseer_slurm.report.archive import Archive
from bootseer_slurm.report.collect import collect
from bootseer_slurm.report.frames import Frame
from bootseer_slurm.report.owners import OwnersEvents, as_owner, event_frames
from bootseer_slurm.report.records import COMMENT_PREFIX, Row, comment_of, row_of
from bootseer_slurm.report.stored import run_folders
from bootseer_slurm.slurm.accounting import records_of
from bootseer_slurm.slurm.jobs import AccountingError, JobRecord, admin_comments
from bootseer_slurm.slurm.sacctmgr import set_admin_comments
from bootseer_slurm.store import Store

_log = logging.getLogger(__name__)

_GRACE_S = 30.0  # nodes send their events when the job ends; what comes later is seen by the folder's time
_SETTLE_S = 5.0  # times of folders may have whole seconds: one that just changed may change unseen
_FORGET_S = 86400.0  # a job that accounting does not know by then is none
_USER_LIMIT = 20_000  # runs of one user at a time, the newest
_LIST_S = 300.0  # for listing one user's folder, which may have a million runs
_USER_LIMIT_S = 600.0  # for reading one user's files: the rest is read by the next call
_ACCOUNTING_TRIES = 3  # users in a row of whom accounting tells nothing, before it counts as down
_BATCH = 1000  # rows in memory
_TRIES = 5

_TABLES = """
CREATE TABLE IF NOT EXISTS done(
    uid INTEGER, job INTEGER, restart INTEGER, changed_s REAL, PRIMARY KEY(uid, job, restart));
CREATE TABLE IF NOT EXISTS comment(job INTEGER PRIMARY KEY, shown_id TEXT, text TEXT, tries INTEGER);
"""


@dataclass(frozen=True, slots=True, order=True)
class _Found:
    """A run that has events which were not seen yet."""

    job: int
    restart: int
    changed_s: float
    uid: int


@dataclass(slots=True)
class Harvest:
    """What one call did."""

    starts: int = 0  # put into the dataset
    waiting: int = 0  # whose job is not over, or not known to accounting yet
    refused: int = 0  # another user's job, or none
    comments: int = 0  # that AdminComment has now
    foreign_comments: int = 0  # left alone, for somebody else's is there
    problems: list[str] = field(default_factory=list)


def harvest(store_uri: str, folder: Path, *, grace_s: float = _GRACE_S) -> Harvest:
    """Read what is new in the store, add it to the records in `folder`, and write the comments.

    grace_s: how long a job has to be over. Raises BootseerError; what fails for one user or job is told in
    the result's problems.
    """
    if os.geteuid() != 0:
        raise InputError("collect reads all users' events: it runs as root", hint="sudo bootseer collect")
    result = Harvest()
    with _opened(folder) as state:
        work = _Work(store_uri, Archive(folder), state, grace_s, result)
        work.add_new()
        work.write_comments()
    return result


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[sqlite3.Connection]:
    """What was done. Raises BootseerError when another collect is at work, or the folder cannot be used."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.closing(sqlite3.connect(folder / "done.sqlite")) as state:
                state.executescript(_TABLES)
                yield state
            os.utime(folder / "lock")
    except BlockingIOError:
        raise BootseerError(f"records {folder}: another collect is at work") from None
    except (OSError, sqlite3.Error) as error:
        raise BootseerError(
            f"records {folder}: cannot be used: {error}", hint="see [records] path"
        ) from error


class _Work:
    """One call's work."""

    def __init__(
        self, store_uri: str, archive: Archive, state: sqlite3.Connection, grace_s: float, result: Harvest
    ) -> None:
        self._uri = store_uri
        self._archive = archive
        self._state = state
        self._grace_s = grace_s
        self._result = result

    def add_new(self) -> None:
        """Put the starts whose jobs are over into the dataset, and note what they are to be said of."""
        found: dict[int, list[_Found]] = {}
        for uid in OwnersEvents(self._uri).users():
            with self._for_user(uid):
                found[uid] = self._new_runs(uid)
        unanswered = 0
        # Any user can name jobs without end: those who name few are not to wait for that.
        for uid, runs in sorted(found.items(), key=lambda each: len(each[1])):
            try:
                accounting = records_of(run.job for run in runs)
                unanswered = 0
            except AccountingError as error:
                self._result.problems.append(f"user {uid}: {error.message}")
                unanswered += 1
                if unanswered == _ACCOUNTING_TRIES:
                    return
                continue
            with self._for_user(uid):
                self._add_new_of(uid, runs, accounting)

    def _add_new_of(
        self, uid: int, runs: list[_Found], accounting: Mapping[int, tuple[JobRecord, ...]]
    ) -> None:
        """Put one user's new starts into the dataset."""
        ready: list[_Found] = []
        refused: list[_Found] = []
        for run in runs:
            believed = self._is_believed(run, accounting.get(run.job, ()))
            if not believed:
                refused.append(run)
            elif self._is_over(run, accounting.get(run.job, ())):
                ready.append(run)
            else:
                self._result.waiting += 1
        with self._state:
            self._note(refused)
        deadline_s = time.monotonic() + _USER_LIMIT_S
        for start in range(0, len(ready), _BATCH):
            self._add(uid, ready[start : start + _BATCH], accounting, deadline_s)

    @contextlib.contextmanager
    def _for_user(self, uid: int) -> Iterator[None]:
        """One user's events that cannot be read hold up nobody else's."""
        try:
            yield
        except BootseerError as error:
            self._result.problems.append(f"user {uid}: {error.message}")
        except Exception as error:  # what one user wrote must not keep others' starts from being counted
            _log.exception("user %d", uid)
            self._result.problems.append(f"user {uid}: {type(error).__name__}, see the log")

    def _new_runs(self, uid: int) -> list[_Found]:
        """The runs whose folder changed since they were done, the newest first."""
        rows = self._state.execute("SELECT job, restart, changed_s FROM done WHERE uid = ?", (uid,))
        done = {(job, restart): changed_s for job, restart, changed_s in rows}

        def produce(store: Store) -> Iterator[Frame]:
            there = list(run_folders(store, uid))
            new = [each for each in there if done.get(each[:2]) != each[2]]
            new.sort(key=lambda each: each[2], reverse=True)
            for job, restart, changed_s in new[:_USER_LIMIT]:
                yield Frame({"job": job, "restart": restart, "changed_s": changed_s}, b"")
            # Where there is none at all, the store may be away.
            for job, restart in done.keys() - {each[:2] for each in there} if there else ():
                yield Frame({"job": job, "restart": restart, "gone": 1}, b"")

        found = [frame.header for frame in as_owner(uid, self._uri, produce, timeout_s=_LIST_S)]
        gone = [(uid, each["job"], each["restart"]) for each in found if "gone" in each]
        with self._state:  # else a user could have it grow without end
            self._state.executemany("DELETE FROM done WHERE uid = ? AND job = ? AND restart = ?", gone)
        new = (each for each in found if "gone" not in each)
        return [_Found(each["job"], each["restart"], each["changed_s"], uid) for each in new]

    def _is_believed(self, run: _Found, records: tuple[JobRecord, ...]) -> bool:
        """Whether the job is this user's, or may still turn out to be."""
        if records:
            return records[-1].uid in (None, run.uid)
        return not _is_old(run)

    def _is_over(self, run: _Found, records: tuple[JobRecord, ...]) -> bool:
        """Whether the job ended some time ago, and the folder is at rest."""
        latest_ns = (time.time() - self._grace_s) * 1e9
        if not any(record.end_ns is not None and record.end_ns <= latest_ns for record in records):
            return False
        return not 0 <= time.time() - run.changed_s < min(_SETTLE_S, self._grace_s)

    def _note(self, runs: Iterable[_Found], *, refused: bool = True) -> None:
        """Note runs as done, in the caller's transaction."""
        for run in runs:
            values = (run.uid, run.job, run.restart, run.changed_s)
            self._state.execute("INSERT OR REPLACE INTO done VALUES(?, ?, ?, ?)", values)
            self._result.refused += refused

    def _add(
        self,
        uid: int,
        runs: list[_Found],
        accounting: Mapping[int, tuple[JobRecord, ...]],
        deadline_s: float,
    ) -> None:
        """Put one user's starts into the dataset, then note them. What was read before a failure counts."""

        def produce(store: Store) -> Iterator[Frame]:
            for run in runs:
                yield from event_frames(store, uid, run.job, run.restart)

        by_key = {(run.job, run.restart): run for run in runs}
        rows: dict[tuple[int, int], Row | None] = {}
        failure: BootseerError | None = None
        limit_s = deadline_s - time.monotonic()
        sent = groupby(as_owner(uid, self._uri, produce, limit_s=limit_s), lambda frame: _key(frame.header))
        try:
            for key, frames in sent:
                rows[key] = self._checked_row(by_key[key], _texts(frames), accounting[key[0]])
        except BootseerError as error:
            failure = error
        else:
            for key in by_key.keys() - rows.keys():  # without a file
                rows[key] = self._checked_row(by_key[key], [], accounting[key[0]])
        self._keep({by_key[key]: row for key, row in rows.items()}, accounting)
        if failure is not None:
            raise failure

    def _checked_row(
        self, run: _Found, files: list[tuple[str, str]], records: tuple[JobRecord, ...]
    ) -> Row | None:
        """The row of a run, or None while its end is not known. What is wrong with it costs no other."""
        try:
            return _row(run, files, records)
        except Exception as error:
            _log.exception("job=%d", run.job)
            self._result.problems.append(
                f"user {run.uid}, job {run.job}: {type(error).__name__}, see the log"
            )
            return None

    def _keep(
        self, rows: Mapping[_Found, Row | None], accounting: Mapping[int, tuple[JobRecord, ...]]
    ) -> None:
        """Put rows into the dataset, then note their runs."""
        added: list[tuple[_Found, Row]] = []
        over: list[_Found] = []
        for run in sorted(rows):  # of two that claim to be one run of a job, the later one is believed
            row = rows[run]
            if row is not None:
                added.append((run, row))
            elif _is_old(run) and all(record.end_ns is not None for record in accounting[run.job]):
                over.append(run)  # of a run that accounting has forgotten
            else:
                self._result.waiting += 1
        self._archive.add(row for _, row in added)
        with self._state:
            for run, row in added:
                self._note([run], refused=False)
                # "12_[3-5]" are tasks that never ran, whatever their user wrote.
                if _is_last(accounting[run.job], row) and "[" not in row["shown_id"]:
                    text = comment_of(row)
                    values = (run.job, row["shown_id"], text)
                    self._state.execute("INSERT OR REPLACE INTO comment VALUES(?, ?, ?, 0)", values)
            self._note(over)
        self._result.starts += len(added)

    def write_comments(self) -> None:
        """Write the comments that wait, where nobody else wrote one, and see that accounting has them."""
        rows = self._state.execute("SELECT job, shown_id, text, tries FROM comment ORDER BY job").fetchall()
        try:
            for start in range(0, len(rows), _BATCH):
                self._write_comments(rows[start : start + _BATCH])
        except AccountingError as error:
            self._result.problems.append(f"comments wait: {error.message}")

    def _write_comments(self, rows: list[tuple[int, str, str, int]]) -> None:
        before = admin_comments(job for job, *_ in rows)
        ours = {job: before.get(job, "") for job, *_ in rows}
        foreign = {job for job, text in ours.items() if text and not text.startswith(COMMENT_PREFIX)}
        to_write = {shown: text for job, shown, text, _ in rows if job not in foreign and ours[job] != text}
        if to_write:
            set_admin_comments(to_write)
            ours = admin_comments(job for job, *_ in rows)
        there = {job for job, _, text, _ in rows if ours.get(job) == text}
        given_up = {job for job, _, _, tries in rows if tries + 1 >= _TRIES} - there - foreign
        with self._state:
            for job in there | foreign | given_up:
                self._state.execute("DELETE FROM comment WHERE job = ?", (job,))
            left = [(job,) for job, *_ in rows if job not in there | foreign | given_up]
            self._state.executemany("UPDATE comment SET tries = tries + 1 WHERE job = ?", left)
        self._result.comments += len(there)
        self._result.foreign_comments += len(foreign)
        if given_up:
            self._result.problems.append(f"AdminComment not taken by accounting, jobs: {len(given_up)}")


def _is_old(run: _Found) -> bool:
    """Whether its folder has not changed for a day. Folders in S3 have no time."""
    return run.changed_s > 0 and time.time() - run.changed_s > _FORGET_S


def _is_last(records: Iterable[JobRecord], row: Row) -> bool:
    """Whether a row is of the job's last run, whose AdminComment sacct shows."""
    last = [record.start_ns for record in records if record.start_ns is not None][-1:]
    return bool(last) and last[0] // 1_000_000 == row["start_time"]


def _key(header: Mapping[str, Any]) -> tuple[int, int]:
    return header["job"], header["restart"]


def _texts(frames: Iterable[Frame]) -> list[tuple[str, str]]:
    """(node, text) of one run's files."""
    return [(str(frame.header["node"]), frame.content.decode("utf-8", "replace")) for frame in frames]


class _ReadEvents:
    """The EventStore of one run whose files were read already."""

    def __init__(self, run: _Found, files: list[tuple[str, str]]) -> None:
        self._run = run
        self._files = files

    def users(self) -> list[int]:
        return [self._run.uid]

    def restarts(self, uid: int, job: int) -> list[int]:
        return [self._run.restart]

    def event_files(self, uid: int, job: int, restart: int) -> list[tuple[str, str]]:
        return self._files


def _row(run: _Found, files: list[tuple[str, str]], records: tuple[JobRecord, ...]) -> Row | None:
    """The row of a run, or None while its end is not known."""
    try:
        gathered = collect(
            str(run.job),
            store=_ReadEvents(run, files),
            accounting=lambda _: records,
            restart=run.restart,
            uid=run.uid,
        )
        return row_of(analyse(gathered))
    except BootseerError as error:
        _log.warning("job=%d left out: %s", run.job, error)
        return None
