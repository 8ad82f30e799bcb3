"""`bootseer collect`: from new events in the store to records and AdminComment.

Owns the order of things: access/owners.py reads, records/archive.py has the dataset, records/done.py the
note of what was done. One at a time; root on one machine of the cluster. Killed at any moment it goes on at
the next run: rows are put into the dataset before they are noted as done, and to put a row in twice is to put
it in once. A comment waits in the note until accounting was seen to have it.

A run of a job is looked at when its folder changed since, and its job is over. Whose job it is, accounting
says: events in another user's folder are left out for good.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from bootseer_slurm.errors import BootseerError, InputError, StoreError
from bootseer_slurm.report.access.owners import OwnersEvents
from bootseer_slurm.report.gather.gather import gather
from bootseer_slurm.report.gather.stored import MAX_TEXT
from bootseer_slurm.report.records.archive import Archive
from bootseer_slurm.report.records.comments import comment_of, write_comments
from bootseer_slurm.report.records.done import Comment, Done, RunFolder, open_done
from bootseer_slurm.report.records.row import Row, row_of
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.slurm.accounting import records_of
from bootseer_slurm.slurm.jobs import AccountingError, JobRecord
from bootseer_slurm.userproc.forked import Limits

_log = logging.getLogger(__name__)

_GRACE_S = 30.0  # nodes send their events when the job ends; what comes later is seen by the folder's time
_QUIET_S = 5.0  # times of folders may have whole seconds: one that just changed may change unseen
_FORGET_S = 86400.0  # a job that accounting does not know by then is none
_USER_LIMIT = 20_000  # runs of one user at a time, the newest
_LIST_S = 300.0  # for listing one user's folder, which may have a million runs
_USER_LIMIT_S = 600.0  # for reading one user's files: the rest is read by the next call
_ACCOUNTING_TRIES = 3  # users in a row of whom accounting tells nothing, before it counts as down
_BATCH = 1000  # rows in memory

Accounting = Mapping[int, tuple[JobRecord, ...]]


@dataclass(slots=True)
class Collected:
    """The outcome of one call, in numbers of starts."""

    starts: int = 0  # put into the dataset
    waiting: int = 0  # whose job is not over, or not known to accounting yet
    refused: int = 0  # another user's job, or none
    comments: int = 0  # that AdminComment has now
    foreign_comments: int = 0  # left alone, for somebody else's is there
    problems: list[str] = field(default_factory=list)


def collect(store_uri: str, folder: Path, *, grace_s: float = _GRACE_S) -> Collected:
    """Read new events in the store, add their starts to the records in `folder`, and write the comments.

    grace_s: how long a job has to be over. Raises BootseerError; failures of one user or job are told in the
    result's problems.
    """
    if os.geteuid() != 0:
        raise InputError("collect reads all users' events: it runs as root", hint="sudo bootseer collect")
    result = Collected()
    with open_done(folder) as done:
        _Collector(store_uri, Archive(folder), done, grace_s, result).add_new()
        _write_comments(done, result)
    return result


class _Collector:
    """Puts new starts into the dataset, one user after the other."""

    def __init__(
        self, store_uri: str, archive: Archive, done: Done, grace_s: float, result: Collected
    ) -> None:
        self._uri = store_uri
        self._archive = archive
        self._done = done
        self._grace_s = grace_s
        self._result = result

    def add_new(self) -> None:
        """Put the starts whose jobs are over into the dataset, and note their comments."""
        found: dict[int, list[RunFolder]] = {}
        try:
            self._result.problems += OwnersEvents(self._uri).give_back()
        except StoreError as error:  # the starts of those who have theirs are added all the same
            self._result.problems.append(error.message)
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

    def _new_runs(self, uid: int) -> list[RunFolder]:
        """The runs whose folder changed since they were done, the newest first."""
        new, gone = OwnersEvents(self._uri).changed_runs(
            uid, self._done.runs_of(uid), Limits(silent_s=_LIST_S), most=_USER_LIMIT
        )
        # Else a user could have the note grow without end.
        self._done.forget(uid, ((each.job, each.restart) for each in gone))
        return [RunFolder(each.job, each.restart, each.changed_s, uid) for each in new]

    def _add_new_of(self, uid: int, runs: list[RunFolder], accounting: Accounting) -> None:
        """Put one user's new starts into the dataset."""
        ready: list[RunFolder] = []
        refused: list[RunFolder] = []
        for run in runs:
            records = accounting.get(run.job, ())
            if not _is_believed(run, records):
                refused.append(run)
            elif self._is_over(run, records):
                ready.append(run)
            else:
                self._result.waiting += 1
        self._done.add(refused)
        self._result.refused += len(refused)
        deadline_s = time.monotonic() + _USER_LIMIT_S
        for start in range(0, len(ready), _BATCH):
            self._add(uid, ready[start : start + _BATCH], accounting, deadline_s)

    def _is_over(self, run: RunFolder, records: Sequence[JobRecord]) -> bool:
        """Whether the job ended some time ago, and the folder is at rest."""
        latest_ns = (time.time() - self._grace_s) * 1e9
        if not any(record.end_ns is not None and record.end_ns <= latest_ns for record in records):
            return False
        return not 0 <= time.time() - run.changed_s < min(_QUIET_S, self._grace_s)

    def _add(self, uid: int, runs: Sequence[RunFolder], accounting: Accounting, deadline_s: float) -> None:
        """Put one user's starts into the dataset, then note them. Those read before a failure count."""

        by_key = {(run.job, run.restart): run for run in runs}
        rows: dict[tuple[int, int], Row | None] = {}
        failure: BootseerError | None = None
        limits = Limits(total_s=deadline_s - time.monotonic(), content_bytes=MAX_TEXT)
        sent = OwnersEvents(self._uri).files_of_runs(uid, list(by_key), limits)
        try:
            for key, files in groupby(sent, lambda each: (each[0].job, each[0].restart)):
                texts = [(file.node, text) for file, text in files]
                rows[key] = self._checked_row(by_key[key], texts, accounting[key[0]])
        except BootseerError as error:
            failure = error
        else:
            for key in by_key.keys() - rows.keys():  # without a file
                rows[key] = self._checked_row(by_key[key], [], accounting[key[0]])
        self._put({by_key[key]: row for key, row in rows.items()}, accounting)
        if failure is not None:
            raise failure

    def _checked_row(
        self, run: RunFolder, files: list[tuple[str, str]], records: tuple[JobRecord, ...]
    ) -> Row | None:
        """The row of a run, or None while its end is not known. A fault in it costs no other."""
        try:
            return _row(run, files, records)
        except Exception as error:
            _log.exception("job=%d", run.job)
            self._result.problems.append(
                f"user {run.uid}, job {run.job}: {type(error).__name__}, see the log"
            )
            return None

    def _put(self, rows: Mapping[RunFolder, Row | None], accounting: Accounting) -> None:
        """Put rows into the dataset, then note their runs."""
        added: dict[RunFolder, Row] = {}
        over: list[RunFolder] = []
        for run in sorted(rows):  # of two that claim to be one run of a job, the later one is believed
            row = rows[run]
            if row is not None:
                added[run] = row
            elif _is_old(run) and all(record.end_ns is not None for record in accounting[run.job]):
                over.append(run)  # of a run that accounting has forgotten
            else:
                self._result.waiting += 1
        self._archive.add(added.values())
        comments = (
            Comment(run.job, row["shown_id"], comment_of(row))
            for run, row in added.items()
            # "12_[3-5]" are tasks that never ran, whatever their user wrote.
            if _is_last(accounting[run.job], row) and "[" not in row["shown_id"]
        )
        self._done.add([*added, *over], comments)
        self._result.refused += len(over)
        self._result.starts += len(added)

    @contextlib.contextmanager
    def _for_user(self, uid: int) -> Iterator[None]:
        """One user's events that cannot be read hold up nobody else's."""
        try:
            yield
        except BootseerError as error:
            self._result.problems.append(f"user {uid}: {error.message}")
        except Exception as error:  # one user's events must not keep others' starts from being counted
            _log.exception("user %d", uid)
            self._result.problems.append(f"user {uid}: {type(error).__name__}, see the log")


def _write_comments(done: Done, result: Collected) -> None:
    """Write the comments that wait."""
    comments = done.comments()
    try:
        for start in range(0, len(comments), _BATCH):
            written = write_comments(done, comments[start : start + _BATCH])
            result.comments += written.there
            result.foreign_comments += written.foreign
            if written.given_up:
                result.problems.append(f"AdminComment not taken by accounting, jobs: {written.given_up}")
    except AccountingError as error:
        result.problems.append(f"comments wait: {error.message}")


def _is_believed(run: RunFolder, records: Sequence[JobRecord]) -> bool:
    """Whether the job is this user's, or may still turn out to be."""
    if records:
        return records[-1].uid in (None, run.uid)
    return not _is_old(run)


def _is_old(run: RunFolder) -> bool:
    """Whether its folder has not changed for a day. Folders in S3 have no time."""
    return run.changed_s > 0 and time.time() - run.changed_s > _FORGET_S


def _is_last(records: Iterable[JobRecord], row: Row) -> bool:
    """Whether a row is of the job's last run, whose AdminComment sacct shows."""
    last = [record.start_ns for record in records if record.start_ns is not None][-1:]
    return bool(last) and last[0] // 1_000_000 == row["start_time"]


class _ReadEvents:
    """The EventStore of one run whose files were read already."""

    def __init__(self, run: RunFolder, files: list[tuple[str, str]]) -> None:
        self._run = run
        self._files = files

    def users(self) -> list[int]:
        return [self._run.uid]

    def restarts(self, uid: int, job: int) -> list[int]:
        return [self._run.restart]

    def event_files(self, uid: int, job: int, restart: int) -> list[tuple[str, str]]:
        return self._files


def _row(run: RunFolder, files: list[tuple[str, str]], records: tuple[JobRecord, ...]) -> Row | None:
    """The row of a run, or None while its end is not known."""
    try:
        gathered = gather(
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
