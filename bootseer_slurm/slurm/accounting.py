"""Many jobs' rows at once: by pyslurm where it is installed, else by sacct; both give the same.

Owns what pyslurm.db's attributes mean (as of 25.11.2). pyslurm is made for one release of Slurm, so it is an
extra. It gives the last run of a job only: jobs that were requeued are left to sacct, which gives all runs,
and so are those of which pyslurm says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from bootseer_slurm.errors import InputError
from bootseer_slurm.slurm import jobs
from bootseer_slurm.slurm.hostlist import expand
from bootseer_slurm.slurm.jobs import JobRecord, StepRecord

_log = logging.getLogger(__name__)


def records_of(numbers: Iterable[int]) -> dict[int, tuple[JobRecord, ...]]:
    """All runs, oldest first, of each of these jobs that accounting knows.

    numbers: what the jobs themselves have as SLURM_JOB_ID. Raises AccountingError.
    """
    wanted = set(numbers)
    found = {record.job: (record,) for record in _by_pyslurm(wanted)}
    return found | jobs.records_of(wanted - found.keys())


def _by_pyslurm(wanted: set[int]) -> list[JobRecord]:
    """The jobs that had one run only, as far as pyslurm tells; none without it."""
    try:
        from pyslurm import db
    except Exception as error:  # another Slurm's is a RuntimeError or worse
        _log.debug("without pyslurm: %s", error)
        return []
    try:
        loaded = db.Jobs.load(db.JobFilter(ids=sorted(wanted))) if wanted else {}
        return [_record(job) for job in loaded.values() if job.id in wanted and not job.requeue_count]
    except Exception as error:  # sacct may do better, and says why when it does not
        _log.warning("pyslurm: %s", error)
        return []


def _record(job: Any) -> JobRecord:
    is_task, is_part = job.array_task_id is not None, bool(job.heterogeneous_id)
    shown_id = f"{job.array_id}_{job.array_task_id}" if is_task else str(job.id)
    if is_part:
        shown_id = f"{job.heterogeneous_id}+{job.heterogeneous_offset}"
    return JobRecord(
        job=job.id,
        shown_id=shown_id,
        array_task=job.array_task_id if is_task else None,
        het_offset=job.heterogeneous_offset if is_part else None,
        restart=0,
        user=job.user_name or "",
        uid=job.user_id,
        account=job.account or "",
        partition=job.partition or "",
        name=job.name or "",
        state=_first_word(job.state),
        submit_ns=_time(job.submit_time),
        eligible_ns=_time(job.eligible_time),
        start_ns=_time(job.start_time),
        end_ns=_time(job.end_time),
        nodes=_nodes(job.nodelist),
        cpus=job.cpus or 0,
        gpus=_gpus(job.allocated_tres),
        steps=tuple(_step(step) for step in job.steps.values()),
    )


def _step(step: Any) -> StepRecord:
    return StepRecord(
        step=str(step.id),
        name=step.name or "",
        state=_first_word(step.state),
        start_ns=_time(step.start_time),
        end_ns=_time(step.end_time),
        nodes=_nodes(step.nodelist),
    )


def _gpus(tres: Any) -> int:
    """The untyped sum, else the sum over the types."""
    counts = {name: each.count for name, each in tres.gres.items()} if tres else {}
    typed = sum(count for name, count in counts.items() if name.startswith("gpu:"))
    return int(counts.get("gpu", typed))


def _time(time_s: int | None) -> int | None:
    return time_s * 1_000_000_000 if time_s else None


def _nodes(text: str | None) -> tuple[str, ...]:
    try:
        return tuple(expand(text or ""))
    except InputError:  # "None assigned"
        return ()


def _first_word(text: str | None) -> str:
    return (text or "").split(" ", 1)[0]
