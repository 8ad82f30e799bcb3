"""What a start would have cost plain: the observed starts of the same class, and only these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from bootseer_slurm.errors import StoreError
from bootseer_slurm.events import EventLog
from bootseer_slurm.report.gather.run import Run
from bootseer_slurm.report.startup.figures import PlainStarts
from bootseer_slurm.report.startup.plain import plain_starts
from bootseer_slurm.slurm.jobs import AccountingError, JobRecord
from tests.unit.records import RECORD, SECOND, START


class Starts:
    """Starts of alice's class: job id to mode and seconds until training began; None: not marked."""

    def __init__(self, starts: dict[int, tuple[str, float | None]]) -> None:
        self._starts = starts
        self.read: list[int] = []

    def alike(self, record: JobRecord) -> Sequence[JobRecord]:
        return [replace(RECORD, job=job, shown_id=str(job)) for job in self._starts]

    def users(self) -> list[int]:
        raise AssertionError("accounting says whose job it is")

    def restarts(self, uid: int, job: int) -> list[int]:
        # Every call lists all runs of the user: not to be done for a job that has nothing to tell.
        assert job in self.read
        return [0] if uid == 1000 and self._starts[job][0] else []

    def event_files(self, uid: int, job: int, restart: int) -> list[tuple[str, str]]:
        self.read.append(job)
        mode, trained_s = self._starts[job]
        if mode == "refused":
            raise StoreError("the service went away")
        if not mode:
            return []
        log = EventLog(job, restart, "n1")
        log.emit("hook", "begin", t_ns=START + SECOND)
        log.emit("session", "begin", t_ns=START + SECOND, mode=mode)
        if trained_s is not None:
            log.emit("mark", "training_started", t_ns=START + round(trained_s * SECOND), step="0", task=0)
        return [("n1", log.to_jsonl())]


def plain(
    starts: dict[int, tuple[str, float | None]], record: JobRecord | None = RECORD
) -> PlainStarts | None:
    known = Starts(starts)
    return plain_starts(Run(5, 0, (0,), 1000, record, (), (), ()), store=known, alike=known.alike)


def test_the_median_of_the_newest_observed_starts() -> None:
    starts: dict[int, tuple[str, float | None]] = {
        job: ("observe", 100 + job) for job in (99, 98, 97, 96, 95, 7)
    }
    assert plain(starts) == PlainStarts(5, 197)


@pytest.mark.parametrize(
    "start",
    [("prefetch", 10.0), ("observe", None), ("", None), ("refused", None)],
    ids=["prefetched", "not marked", "no events", "not readable"],
)
def test_what_is_no_plain_start_does_not_count(start: tuple[str, float | None]) -> None:
    assert plain({9: start, 8: ("observe", 60.0)}) == PlainStarts(1, 60)
    assert plain({9: start}) is None


def test_the_job_itself_does_not_count() -> None:
    assert plain({5: ("observe", 60.0)}) is None


def test_without_accounting_nothing_is_known() -> None:
    assert plain({8: ("observe", 60.0)}, record=None) is None

    def refuse(_: JobRecord) -> Sequence[JobRecord]:
        raise AccountingError("sacct did not answer")

    known = Starts({8: ("observe", 60.0)})
    assert plain_starts(Run(5, 0, (0,), 1000, RECORD, (), (), ()), store=known, alike=refuse) is None
