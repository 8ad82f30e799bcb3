"""Accounting rows of real jobs, read by slurm/jobs.py from the real slurmdbd."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bootseer_slurm.errors import NotFound
from bootseer_slurm.report.gather.gather import gather
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.slurm import jobs

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm_conf")]

SECOND = 1_000_000_000


class NoEvents:
    """A store in which no job has events."""

    def users(self) -> list[int]:
        return []

    def restarts(self, uid: int, job: int) -> list[int]:
        return []

    def event_files(self, uid: int, job: int, restart: int) -> list[tuple[str, str]]:
        return []


def wait_for(job_id: int, state: str) -> jobs.JobRecord:
    """The last run of a job once accounting has it in this state, which may be seconds after slurmctld."""
    deadline = time.monotonic() + 60
    while True:
        try:
            record = jobs.job(str(job_id))
            # slurmdbd learns of an early end before it learns the job's name.
            if record.state == state and record.name != "allocation":
                return record
        except NotFound:
            pass
        assert time.monotonic() < deadline, f"job {job_id} did not become {state}"
        time.sleep(0.3)


def uid_of(cluster: Any, user: str) -> int:
    return int(cluster.exec("login", "id", "-u", user).stdout)


def test_a_job_on_two_nodes_with_steps_and_a_hostile_name(cluster: Any) -> None:
    name = "a|b\n99|x|\x1fcomma,"
    before_s = int(time.time())
    job_id = cluster.sbatch("srun sleep 1\nsrun -N1 -n1 true\n", "-N2", "-n2", f"--job-name={name}")
    record = wait_for(job_id, "COMPLETED")
    assert (record.job, record.shown_id, record.restart) == (job_id, str(job_id), 0)
    assert (record.user, record.uid) == ("alice", uid_of(cluster, "alice"))
    assert record.name == name
    assert record.account and record.partition
    assert len(record.nodes) == 2 and set(record.nodes) <= set(cluster.nodes)
    assert (record.cpus, record.gpus) == (2, 0)
    assert record.submit_ns is not None and record.start_ns is not None and record.end_ns is not None
    assert before_s * SECOND <= record.submit_ns <= record.start_ns < record.end_ns <= time.time_ns()
    assert record.queue_s is not None and record.queue_s < 60
    steps = {step.step: step for step in record.steps}
    assert {"batch", "0", "1"} <= set(steps)
    assert steps["0"].name == "sleep" and set(steps["0"].nodes) == set(record.nodes)
    assert steps["0"].start_ns is not None and steps["0"].start_ns >= record.start_ns


def test_array_tasks_have_their_own_numbers(cluster: Any) -> None:
    job_id = cluster.sbatch("true\n", "--array=3-4")
    cluster.wait(job_id)
    records = jobs.records(str(job_id))
    assert sorted(record.shown_id for record in records) == [f"{job_id}_3", f"{job_id}_4"]
    third = jobs.job(f"{job_id}_3")
    assert (third.array_task, third.shown_id) == (3, f"{job_id}_3")
    assert len({record.job for record in records}) == 2
    assert jobs.job(str(job_id)).job == job_id


def test_parts_of_a_heterogeneous_job(cluster: Any) -> None:
    job_id = cluster.sbatch("#!/bin/bash\n#SBATCH -n1\n#SBATCH hetjob\n#SBATCH -n1\nsrun true\n")
    cluster.wait(job_id)
    assert {record.het_offset for record in jobs.records(str(job_id))} == {0, 1}
    second = jobs.job(f"{job_id}+1")
    assert (second.job, second.het_offset) == (job_id + 1, 1)
    assert jobs.job(str(job_id)).het_offset == 0


def test_a_requeued_job_has_two_runs_and_the_report_takes_the_last(cluster: Any) -> None:
    # The second run ends at once: Slurm counts the restarts for the script too.
    job_id = cluster.sbatch('[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || sleep 600\n', "--requeue")
    wait_for(job_id, "RUNNING")
    assert cluster.exec("login", "scontrol", "requeue", str(job_id)).returncode == 0
    # Slurm holds a requeued job back for two minutes; in the second of its requeue a node would refuse it.
    cluster.exec("login", "scontrol", "update", f"job={job_id}", "starttime=now+2")
    cluster.wait(job_id, timeout_s=180)
    first, second = jobs.records(str(job_id))
    assert (first.restart, second.restart) == (0, 1)
    assert (first.state, second.state) == ("REQUEUED", "COMPLETED")
    assert first.end_ns is not None and second.start_ns is not None and first.end_ns <= second.start_ns
    assert jobs.job(str(job_id), restart=0) == first
    with pytest.raises(NotFound):
        jobs.job(str(job_id), restart=2)
    report = analyse(gather(str(job_id), store=NoEvents()))
    assert (report.run.restart, report.run.record, report.queue_s) == (1, second, second.queue_s)
    assert report.run.silent_nodes == second.nodes


def test_a_job_that_waits_has_no_start_and_no_nodes(cluster: Any) -> None:
    job_id = cluster.sbatch("true\n", "--hold")
    try:
        record = wait_for(job_id, "PENDING")
        assert (record.start_ns, record.end_ns, record.nodes) == (None, None, ())
        assert record.queue_s is None
    finally:
        cluster.exec("login", "scancel", str(job_id))


def test_a_job_that_never_was_is_not_found(cluster: Any) -> None:
    with pytest.raises(NotFound, match="4000000"):
        jobs.records("4000000")
