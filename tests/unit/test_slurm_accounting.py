"""Many jobs' rows by pyslurm, and that they are those of sacct.

pyslurm is made for one release of Slurm, which is not the one here: a module with the attributes that its
jobs have stands for it. What sacct printed was recorded (test_slurm_jobs.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bootseer_slurm.slurm import accounting, jobs
from tests.unit.test_slurm_jobs import ARRAY, HET, PENDING, REQUEUED, STEPS, play, sacct

__all__ = ["sacct"]
TRES = SimpleNamespace(gres={"gpu": SimpleNamespace(count=8), "gpu:h100": SimpleNamespace(count=8)})
GPU_JOB = "9~9~gpu~alice~20001~research~main~COMPLETED~100~100~110~200~64~cpu=64,gres/gpu=8,gres/gpu:h100=8~n[1-2]\n"


def job(number: int, **more: Any) -> SimpleNamespace:
    """A job as pyslurm.db has it, of one node and without steps."""
    made = {
        "id": number, "array_id": None, "array_task_id": None, "heterogeneous_id": 0, "heterogeneous_offset": 0,
        "requeue_count": 0, "user_name": "alice", "user_id": 20001, "account": "research", "partition": "main",
        "name": "sbatch", "state": "COMPLETED", "submit_time": 1795429857, "eligible_time": 1795429857,
        "start_time": 1795429857, "end_time": 1795429857, "nodelist": "n1", "cpus": 1, "allocated_tres": None, "steps": {},
    }  # fmt: skip
    return SimpleNamespace(**made | more)


def step(number: int | str, **more: Any) -> SimpleNamespace:
    made = {
        "id": number,
        "name": str(number),
        "state": "COMPLETED",
        "start_time": 1795429857,
        "end_time": 1795429858,
    }
    return SimpleNamespace(**made | {"nodelist": "n1"} | more)


@pytest.fixture
def pyslurm(monkeypatch: pytest.MonkeyPatch) -> dict[int, SimpleNamespace]:
    """The jobs that the module knows."""
    known: dict[int, SimpleNamespace] = {}

    class Jobs:
        @staticmethod
        def load(db_filter: SimpleNamespace) -> dict[int, SimpleNamespace]:
            return {number: known[number] for number in db_filter.ids if number in known}

    module = ModuleType("pyslurm")
    module.db = SimpleNamespace(Jobs=Jobs, JobFilter=SimpleNamespace)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyslurm", module)
    return known


def test_the_rows_are_those_of_sacct(sacct: Path, pyslurm: dict[int, SimpleNamespace]) -> None:
    text = STEPS + ARRAY + HET + PENDING + GPU_JOB
    numbers = [1, 2, 3, 4, 6, 7, 9]
    play(sacct, text)
    expected = jobs.records_of(numbers)
    assert set(expected) == set(numbers)
    end = 1795429858
    pyslurm |= {
        1: job(1, name="a|b `q' ü\n99|x|y\x1fz", end_time=end, nodelist="n[1-2]", cpus=2,
               steps={"batch": step("batch"), 0: step(0, name="sleep", nodelist="n[1-2]")}),
        2: job(2, name="arr", array_id=2, array_task_id=2),
        3: job(3, heterogeneous_id=3, start_time=end, end_time=end),
        4: job(4, heterogeneous_id=3, heterogeneous_offset=1, start_time=end, end_time=end, nodelist="n2"),
        6: job(6, name="arr", array_id=2, array_task_id=1, steps={"batch": step("batch", end_time=1795429857)}),
        7: job(7, name="held", state="PENDING", eligible_time=None, start_time=None, end_time=None, nodelist="None assigned"),
        9: job(9, name="gpu", submit_time=100, eligible_time=100, start_time=110, end_time=200, nodelist="n[1-2]",
               cpus=64, allocated_tres=TRES),
    }  # fmt: skip
    (sacct / "sacct").write_text("#!/bin/sh\nexit 1\n")  # all are pyslurm's
    assert accounting.records_of(numbers) == expected


def test_jobs_that_were_requeued_and_unknown_ones_are_left_to_sacct(
    sacct: Path, pyslurm: dict[int, SimpleNamespace]
) -> None:
    play(sacct, REQUEUED)
    pyslurm |= {1: job(1), 5: job(5, requeue_count=1)}
    found = accounting.records_of([1, 5, 4_000_000])
    assert [record.restart for record in found[5]] == [0, 1]
    assert found[1][0].job == 1
    assert "--jobs=5,4000000" in (sacct / "called").read_text()


def test_another_slurms_pyslurm_is_as_good_as_none(sacct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(sacct, STEPS)
    monkeypatch.setitem(sys.modules, "pyslurm", None)  # an ImportError
    assert accounting.records_of([1]) == jobs.records_of([1])


def test_a_pyslurm_that_fails_is_said_and_sacct_asked(
    sacct: Path, pyslurm: dict[int, SimpleNamespace], caplog: pytest.LogCaptureFixture
) -> None:
    play(sacct, STEPS)
    pyslurm[1] = SimpleNamespace(id=1, requeue_count=0)  # a version whose jobs lack what is asked for
    assert accounting.records_of([1]) == jobs.records_of([1])
    assert "pyslurm" in caplog.text
