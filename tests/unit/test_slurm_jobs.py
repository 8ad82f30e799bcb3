"""Accounting rows from what a real sacct printed, and every way in which sacct fails to answer.

The rows below were recorded from sacct 22.05.8 with its time format set to %s; "~" stands for the delimiter.
A small script on PATH plays them back, so that the command line and the environment are tested too.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.slurm import jobs
from bootseer_slurm.slurm.jobs import AccountingError

SECOND = 1_000_000_000

STEPS = (
    "1~1~a|b `q' ü\n99|x|y\x1fz~alice~20001~research~main~COMPLETED"
    "~1795429857~1795429857~1795429857~1795429858~2~billing=2,cpu=2,node=2~n[1-2]\n"
    "1.batch~1.batch~batch~~~research~~COMPLETED"
    "~1795429857~1795429857~1795429857~1795429858~1~cpu=1,mem=0,node=1~n1\n"
    "1.0~1.0~sleep~~~research~~COMPLETED"
    "~1795429857~1795429857~1795429857~1795429858~2~cpu=2,mem=0,node=2~n[1-2]\n"
)
ARRAY = (
    "2_1~6~arr~alice~20001~research~main~COMPLETED"
    "~1795429857~1795429857~1795429857~1795429857~1~billing=1,cpu=1,node=1~n1\n"
    "2_1.batch~6.batch~batch~~~research~~COMPLETED"
    "~1795429857~1795429857~1795429857~1795429857~1~cpu=1,mem=0,node=1~n1\n"
    "2_2~2~arr~alice~20001~research~main~COMPLETED"
    "~1795429857~1795429857~1795429857~1795429857~1~billing=1,cpu=1,node=1~n1\n"
)
HET = (
    "3+0~3~sbatch~alice~20001~research~main~COMPLETED"
    "~1795429857~1795429857~1795429858~1795429858~1~billing=1,cpu=1,node=1~n1\n"
    "3+1~4~sbatch~alice~20001~research~main~COMPLETED"
    "~1795429857~1795429857~1795429858~1795429858~1~billing=1,cpu=1,node=1~n2\n"
)
REQUEUED = (
    "5~5~again~alice~20001~research~main~REQUEUED"
    "~1795429857~1795429857~1795429858~1795429865~1~billing=1,cpu=1,node=1~n3\n"
    "5.batch~5.batch~batch~~~research~~CANCELLED"
    "~1795429858~1795429858~1795429858~1795429865~1~cpu=1,mem=0,node=1~n3\n"
    "5~5~again~alice~20001~research~main~RUNNING"
    "~1795429865~1795429868~1795429869~Unknown~1~billing=1,cpu=1,node=1~n3\n"
    "5.batch~5.batch~batch~~~research~~RUNNING"
    "~1795429869~1795429869~1795429869~Unknown~1~cpu=1,mem=0,node=1~n3\n"
)
PENDING = "7~7~held~alice~20001~research~main~PENDING~1795429857~Unknown~Unknown~Unknown~1~~None assigned\n"


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH; `play` puts a sacct into it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def play(folder: Path, output: str, *, errors: str = "", status: int = 0) -> None:
    """A sacct that prints this text with the delimiter that it is asked for, and keeps how it was called."""
    (folder / "output").write_bytes(output.encode())
    script = folder / "sacct"
    script.write_text(
        f"#!{sys.executable} -IS\n"
        "import os, sys\n"
        f"folder = {str(folder)!r}\n"
        "open(folder + '/called', 'w').write('\\n'.join([*sys.argv[1:], os.environ['SLURM_TIME_FORMAT']]))\n"
        "delimiter = next(a[12:] for a in sys.argv if a.startswith('--delimiter='))\n"
        "text = open(folder + '/output', 'rb').read().replace(b'~', delimiter.encode())\n"
        "sys.stdout.buffer.write(text)\n"
        f"sys.stderr.write({errors!r})\n"
        f"sys.exit({status})\n"
    )
    script.chmod(0o755)


def test_a_job_with_its_steps(sacct: Path) -> None:
    play(sacct, STEPS)
    (record,) = jobs.records(" 1 ")
    assert record == jobs.JobRecord(
        job=1,
        shown_id="1",
        array_task=None,
        het_offset=None,
        restart=0,
        user="alice",
        uid=20001,
        account="research",
        partition="main",
        name="a|b `q' ü\n99|x|y\x1fz",
        state="COMPLETED",
        submit_ns=1795429857 * SECOND,
        eligible_ns=1795429857 * SECOND,
        start_ns=1795429857 * SECOND,
        end_ns=1795429858 * SECOND,
        nodes=("n1", "n2"),
        cpus=2,
        gpus=0,
        steps=record.steps,
    )
    assert [(step.step, step.name, step.nodes) for step in record.steps] == [
        ("batch", "batch", ("n1",)),
        ("0", "sleep", ("n1", "n2")),
    ]
    called = (sacct / "called").read_text().splitlines()
    assert "--duplicates" in called and "--jobs=1" in called
    assert called[-1] == "%s"


def test_the_delimiter_is_another_one_each_time(sacct: Path) -> None:
    seen = set()
    for _ in range(3):
        play(sacct, STEPS)
        jobs.records("1")
        seen.add(next(part for part in (sacct / "called").read_text().split("\n") if "delimiter" in part))
    assert len(seen) == 3


def test_array_and_heterogeneous_parts(sacct: Path) -> None:
    play(sacct, ARRAY)
    assert [(record.job, record.array_task) for record in jobs.records("2")] == [(6, 1), (2, 2)]
    assert jobs.job("2_1").job == 6
    assert jobs.job("2").shown_id == "2_2"
    play(sacct, HET)
    assert [(record.job, record.het_offset) for record in jobs.records("3")] == [(3, 0), (4, 1)]
    assert jobs.job("3+1").nodes == ("n2",)
    with pytest.raises(NotFound) as caught:
        jobs.job("9")
    assert "3+0" in (caught.value.hint or "")


def test_requeued_runs_are_numbered_and_keep_their_steps(sacct: Path) -> None:
    play(sacct, REQUEUED)
    first, second = jobs.records("5")
    assert [(run.restart, run.state) for run in (first, second)] == [(0, "REQUEUED"), (1, "RUNNING")]
    assert (second.queue_s, second.end_ns) == (1, None)
    assert first.steps[0].state == "CANCELLED"
    assert second.steps[0].start_ns == second.start_ns
    assert jobs.job("5") == second
    assert jobs.job("5", restart=0) == first
    with pytest.raises(NotFound, match="no restart 4"):
        jobs.job("5", restart=4)


def test_a_job_of_another_user_under_the_same_id_is_no_earlier_run(sacct: Path) -> None:
    old, _, rest = REQUEUED.partition("\n")
    play(sacct, old.replace("alice~20001", "bob~20002") + "\n" + rest)
    (only,) = jobs.records("5")
    assert (only.restart, only.user) == (0, "alice")


def test_a_job_that_waits(sacct: Path) -> None:
    play(sacct, PENDING)
    record = jobs.job("7")
    assert (record.state, record.eligible_ns, record.start_ns, record.nodes) == ("PENDING", None, None, ())
    assert record.queue_s is None


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("billing=8,cpu=64,gres/gpu=8,mem=1T,node=2", 8),
        ("billing=8,cpu=64,gres/gpu:h100=8,gres/gpu=8,node=2", 8),
        ("cpu=64,gres/gpu:a100=2,gres/gpu:h100=4", 6),
        ("cpu=64,gres/gpumem=80G,gres/shard=4", 0),
        ("cpu=64,gres/gpu=x", 0),
        ("", 0),
    ],
)
def test_gpus_are_counted_once(sacct: Path, tres: str, gpus: int) -> None:
    play(sacct, STEPS.replace("billing=2,cpu=2,node=2", tres))
    assert jobs.job("1").gpus == gpus


def test_a_state_is_its_first_word(sacct: Path) -> None:
    play(sacct, STEPS.replace("COMPLETED", "CANCELLED by 1000", 1))
    assert jobs.job("1").state == "CANCELLED"


@pytest.mark.parametrize("text", ["", "\n\n", "rubbish\n", "1~1~short\n", "x~y" + "~" * 13 + "\n"])
def test_no_usable_row_is_not_found(sacct: Path, text: str) -> None:
    play(sacct, text)
    with pytest.raises(NotFound, match="no job 1"):
        jobs.records("1")


def test_sacct_that_fails_says_why(sacct: Path) -> None:
    why = "sacct: error: a first line\nsacct: error: Problem talking to the database: refused\x1b[0m\n"
    play(sacct, "", errors=why, status=1)
    with pytest.raises(AccountingError) as caught:
        jobs.records("1")
    assert caught.value.message == "sacct failed: Problem talking to the database: refused [0m"
    play(sacct, "", errors=why, status=0)
    with pytest.raises(AccountingError):
        jobs.records("1")
    play(sacct, STEPS, errors="sacct: a warning\n", status=0)
    assert len(jobs.records("1")) == 1


def test_sacct_that_hangs_is_given_up(sacct: Path) -> None:
    (sacct / "sacct").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (sacct / "sacct").chmod(0o755)
    with pytest.raises(AccountingError, match=r"did not answer in 0\.3 s"):
        jobs.records("1", timeout_s=0.3)


def test_no_sacct_or_one_that_cannot_run(sacct: Path) -> None:
    with pytest.raises(AccountingError, match="not installed"):
        jobs.records("1")
    (sacct / "sacct").write_text("not a program")
    (sacct / "sacct").chmod(0o755)
    with pytest.raises(AccountingError, match="cannot be run"):
        jobs.records("1")


@pytest.mark.parametrize("job_id", ["", "1,2", "1 --user=x", "-1", "1.0", "1_", "1_[1-2]", "1\n2", "１２"])
def test_what_is_no_job_id_never_reaches_sacct(sacct: Path, job_id: str) -> None:
    play(sacct, STEPS)
    with pytest.raises(InputError):
        jobs.records(job_id)
    assert not (sacct / "called").exists()


@pytest.mark.skipif(shutil.which("sacct") is None, reason="sacct is not installed")
def test_the_real_sacct_says_that_accounting_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=test\nSlurmctldHost=localhost\n")
    monkeypatch.setitem(os.environ, "SLURM_CONF", str(conf))
    with pytest.raises(BootseerError, match="disabled"):
        jobs.records("1")


def test_many_jobs_in_one_call(sacct: Path) -> None:
    play(sacct, STEPS + ARRAY + REQUEUED)
    found = jobs.records_of([5, 6, 1, 4_000_000, 5])
    assert {job: [record.restart for record in runs] for job, runs in found.items()} == {
        1: [0],
        5: [0, 1],
        6: [0],
    }
    assert found[6][0].shown_id == "2_1"
    assert [step.step for step in found[1][0].steps] == ["batch", "0"]
    assert "--jobs=1,5,6,4000000" in (sacct / "called").read_text()
    assert found[5] == jobs.records("5")[-2:]


def test_thousands_of_jobs_are_asked_for_in_parts_that_fit_a_command(sacct: Path) -> None:
    play(sacct, REQUEUED)
    found = jobs.records_of(range(1, 9001))
    assert [record.restart for record in found[5]] == [0, 1]  # though it was told three times
    assert "--jobs=8001," in (sacct / "called").read_text()
    assert jobs.records_of([]) == {}


def test_the_comment_of_a_jobs_last_run(sacct: Path) -> None:
    play(
        sacct,
        "5~of the first~1795429857~1795429858\n5.batch~~1795429857~1795429858\n"
        "5~two\nlines~1795429865~1795429869\n5.batch~~1795429865~1795429869\n7~~1795429857~Unknown\n",
    )
    assert jobs.admin_comments([5, 7]) == {5: "two\nlines", 7: ""}


def test_the_runs_of_a_class_are_those_with_its_very_name(sacct: Path) -> None:
    """sacct matches names of its own accord, and takes a list of them."""
    play(sacct, REQUEUED)
    _, last = jobs.records("5")
    play(sacct, REQUEUED + ARRAY)
    assert [(run.job, run.restart) for run in jobs.alike(last)] == [(5, 1), (5, 0)], "the newest first"
    called = (sacct / "called").read_text().split("\n")
    for argument in ("--uid=20001", "--accounts=research", "--name=again", "--allocations"):
        assert argument in called
    play(sacct, STEPS)
    (record,) = jobs.records("1")
    play(sacct, REQUEUED + STEPS)
    assert [run.job for run in jobs.alike(replace(record, name="a,b"))] == []
    assert not any("--name" in argument for argument in (sacct / "called").read_text().split("\n"))
