"""What is kept of running jobs, read again by the same version, another one, and after a torn write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bootseer_slurm.artifacts.reattached import Found
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.job.journal import Added, Began, Journal
from bootseer_slurm.job.request import Request
from bootseer_slurm.slurm.allocation import Job

JOB = Job(7, 1, 20001, 20001, nodelist="n[1-4]", name="train \udcff", gpus=(0, 3))
BEGAN = Began(
    JOB,
    "n1",
    Request(observe=False, wanted=(ArtifactRef("image", "/a.sqsh"), ArtifactRef("environment", "/venv"))),
)
OTHERS = [Added(Request(observe=True, asked=False)), Found("file-00", "checkpoint", "/ckpt", "")]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path)
    made.begin(BEGAN)
    for each in OTHERS:
        made.add(7, each)  # type: ignore[arg-type]
    return made


def lines(tmp_path: Path) -> list[str]:
    return [line for line in (tmp_path / "jobs" / "7").read_text().splitlines() if line]


def test_what_was_kept_is_read_again(journal: Journal) -> None:
    assert list(journal.jobs()) == [(7, BEGAN, OTHERS)]
    journal.end(7, 1)
    assert list(journal.jobs()) == [] and journal.endings() == [BEGAN]


def test_what_an_earlier_version_kept_is_read(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "jobs" / "7").write_text("\n".join(lines(tmp_path)).replace('"wanted"', '"wishes"'))
    assert list(journal.jobs()) == [(7, BEGAN, OTHERS)]


def test_a_job_that_is_only_observed(tmp_path: Path) -> None:
    made, began = Journal(tmp_path), Began(JOB, "", None)
    made.begin(began)
    assert list(made.jobs()) == [(7, began, [])]


def test_what_another_version_knows_is_left_out(journal: Journal, tmp_path: Path) -> None:
    changed = []
    for line in lines(tmp_path):
        ((name, fields),) = json.loads(line).items()
        for each in (fields, fields.get("job", {}), fields.get("request") or {}):
            each["later"] = 1
        changed.append(json.dumps({name: fields}))
    (tmp_path / "jobs" / "7").write_text("\n".join([*changed, '{"Later": {}}', "[]", '{"Found": ']))
    assert list(journal.jobs()) == [(7, BEGAN, OTHERS)]


@pytest.mark.parametrize("first", ['[["JOB_ID", "7"]]', '{"Began": {"job": {"job_id": 7}}}', "", "{"])
def test_a_file_that_does_not_say_what_began_is_told_of(
    journal: Journal, tmp_path: Path, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "jobs" / "7"
    path.write_text("\n".join([first, *lines(tmp_path)[1:]]))
    assert list(journal.jobs()) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: does not say what began the job's session"
    ]


@pytest.mark.parametrize("line", [b"\x80\xff", b"[" * 50_000, b"{" + b'"a":{' * 50_000])
def test_a_damaged_line_costs_no_other(journal: Journal, tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "jobs" / "7"
    path.write_bytes(line + path.read_bytes() + line + b"\n")
    assert list(journal.jobs()) == [(7, BEGAN, OTHERS)]
