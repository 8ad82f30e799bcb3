"""`bootseer report`: the figures of one start, as this person may see it."""

from __future__ import annotations

from dataclasses import replace

from bootseer_slurm.config import Config
from bootseer_slurm.report.access.client import visible_events
from bootseer_slurm.report.gather.gather import gather
from bootseer_slurm.report.gather.stored import reader_clock
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.report.startup.plain import plain_starts
from bootseer_slurm.store import open_store


def report(job_id: str, config: Config, *, restart: int | None = None) -> Report:
    """The report of one run of a job: the last, or the one with this restart count.

    job_id: as sacct shows it. Raises InputError, NotFound, StoreError.
    """
    events = visible_events(config)
    run = gather(job_id, store=events, restart=restart)
    run = replace(run, reader_clock=reader_clock(open_store(config.store.uri)))
    return analyse(run, plain=plain_starts(run, store=events))
