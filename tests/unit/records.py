"""A job as accounting has it, for the tests of the report."""

from __future__ import annotations

from bootseer_slurm.slurm.jobs import JobRecord

SECOND = 1_000_000_000
START = 1_800_000_000 * SECOND

RECORD = JobRecord(
    job=5,
    shown_id="5",
    array_task=None,
    het_offset=None,
    restart=0,
    user="alice",
    uid=1000,
    account="ml",
    partition="gpu",
    name="train",
    state="COMPLETED",
    submit_ns=START - 20 * SECOND,
    eligible_ns=START - 12 * SECOND,
    start_ns=START,
    end_ns=START + 1000 * SECOND,
    nodes=("n1", "n2", "n3"),
    cpus=48,
    gpus=24,
)
