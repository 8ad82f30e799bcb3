"""The cost of a job's start without Bootseer: the median of its class's own starts that were only observed.

A class is the jobs of one user with the same account and name, as accounting has them. Without accounting, or
without such starts whose events can be read, nothing is known. Reads events and accounting, writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from statistics import median

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.report.gather.gather import gather
from bootseer_slurm.report.gather.run import EventStore, Run
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import PlainStarts
from bootseer_slurm.slurm import jobs
from bootseer_slurm.slurm.jobs import JobRecord

log = logging.getLogger(__name__)

_STARTS = 5  # the newest
_LOOKED_AT = 100  # runs of the class, for these: a start of many nodes has many files


def plain_starts(
    run: Run,
    *,
    store: EventStore,
    alike: Callable[[JobRecord], Sequence[JobRecord]] = jobs.alike,
) -> PlainStarts | None:
    """The plain starts of this run's class, itself left out; None when none is known. Raises nothing."""
    record = run.record
    if record is None or record.uid is None:
        return None
    try:
        others = [other for other in alike(record) if (other.job, other.restart) != (run.job, run.restart)]
    except BootseerError as error:
        log.debug("no plain starts: %s", error)
        return None
    known: list[float] = []
    for other in others[:_LOOKED_AT]:
        waited_s = _waited_s(other, store)
        known += [] if waited_s is None else [waited_s]
        if len(known) == _STARTS:
            break
    return PlainStarts(len(known), median(known)) if known else None


def _waited_s(record: JobRecord, store: EventStore) -> float | None:
    """How long training was waited for in this run, if it was only observed."""
    try:
        first = next(iter(store.event_files(record.uid or 0, record.job, record.restart)), ("", ""))
        if '"mode":"observe"' not in first[1] or '"mode":"prefetch"' in first[1]:
            return None  # seen in one node's file: those of a thousand need not be read
        run = gather(str(record.job), store=store, accounting=lambda _: (record,), restart=record.restart)
    except BootseerError as error:
        log.debug("job=%d is left out: %s", record.job, error)
        return None
    report = analyse(run)
    return report.start_to_training_s if report.mode == "observe" else None
