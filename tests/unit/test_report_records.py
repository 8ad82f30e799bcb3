"""One row per start: what it holds, what a user cannot make of it, its line, and the files of rows."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.events import EventLog
from bootseer_slurm.report.gather.gather import gather
from bootseer_slurm.report.gather.stored import StoredEvents
from bootseer_slurm.report.records.archive import Archive
from bootseer_slurm.report.records.comments import comment_of
from bootseer_slurm.report.records.row import SCHEMA, row_of, table_of
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import Report
from bootseer_slurm.slurm.jobs import JobRecord
from bootseer_slurm.store import FileStore
from tests.unit.records import RECORD, SECOND, START

MS = 1_000_000


def report(root: Path, record: JobRecord = RECORD, *, training_s: float | None = 43.0) -> Report:
    """The report of a job of three nodes; the last of them trains after `training_s`."""
    for number, node in enumerate(record.nodes or ("n1",)):
        log = EventLog(record.job, 0, node)
        log.emit("hook", "begin", t_ns=START)
        log.emit("session", "begin", t_ns=START + 1, mode="prefetch")
        log.emit("step", "attach", t_ns=START + 2 * SECOND, step="0")
        log.emit("step", "task_start", t_ns=START + 3 * SECOND, step="0", task=number)
        log.emit("mark", "image_loaded", t_ns=START + (23 - number) * SECOND, step="0", task=number)
        log.emit("prefetch", "end", t_ns=START + 9 * SECOND, target="/img/a.sqsh", what="image", bytes=100,
                 dur_s=3.0, bytes_cached=50)  # fmt: skip
        if training_s is not None:
            late_ns = int((training_s - (len(record.nodes) - 1 - number)) * SECOND)
            log.emit("mark", "training_started", t_ns=START + late_ns, step="0", task=number)
        path = root / "users" / "1000" / "events" / f"{record.job}.0" / f"{node}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(log.to_jsonl())
    return analyse(
        gather(record.shown_id, store=StoredEvents(FileStore(root)), accounting=lambda _: (record,))
    )


def row(root: Path, record: JobRecord = RECORD, **more: Any) -> dict[str, Any]:
    made = row_of(report(root, record, **more))
    assert made is not None
    return made


def test_a_row_holds_the_start_the_job_and_what_it_used(tmp_path: Path) -> None:
    made = row(tmp_path)
    assert set(made) <= set(SCHEMA.names)
    assert (made["job"], made["restart"], made["uid"], made["user"], made["nodes"], made["gpus"]) == (
        5, 0, 1000, "alice", 3, 24)  # fmt: skip
    assert (made["start_time"], made["training_time"]) == (START // MS, START // MS + 43_000)
    assert (made["start_to_training_s"], made["training_from"], made["elapsed_s"]) == (43.0, "mark", 1000.0)
    assert (made["queue_s"], made["lost_gpu_s"], made["lost_cpu_s"]) == (12.0, 43.0 * 24, 43.0 * 48)
    assert (made["mode"], made["image"], made["environment"]) == ("prefetch", "/img/a.sqsh", None)
    assert (made["fetched_bytes"], made["cached_bytes"], made["problems"]) == (300, 150, 0)
    # Of the node that trained last, where they add up to the start.
    assert [made[f"{stage}_s"] for stage in ("prolog", "launch", "image", "environment", "program")] == [
        2.0, 1.0, 18.0, None, 22.0]  # fmt: skip
    assert table_of([made]).schema == SCHEMA


def test_a_start_that_says_nothing_has_a_row_without_figures(tmp_path: Path) -> None:
    made = row(tmp_path, training_s=None)
    assert (made["start_to_training_s"], made["lost_gpu_s"], made["training_from"]) == (None, None, None)
    assert comment_of(made) == "bootseer: start not marked, ran 16m40s"


def test_a_mark_far_away_costs_no_more_than_the_job_had(tmp_path: Path) -> None:
    made = row(tmp_path, training_s=1e6)
    assert (made["start_to_training_s"], made["lost_gpu_s"]) == (1000.0, 24_000.0)


@pytest.mark.parametrize("change", [{"end_ns": None}, {"start_ns": None}, {"uid": None}])
def test_without_the_end_or_the_owner_there_is_no_row(tmp_path: Path, change: dict[str, None]) -> None:
    made = report(tmp_path)
    run = replace(made.run, record=replace(RECORD, **change))
    assert row_of(replace(made, run=run)) is None


def test_names_are_cut_and_printable(tmp_path: Path) -> None:
    made = row(tmp_path, replace(RECORD, name="a\x1b[31m" + "x" * 9999))
    assert made["job_name"].startswith("a [31mx") and len(made["job_name"]) == 256


def test_the_line_for_accounting(tmp_path: Path) -> None:
    made = row(tmp_path)
    assert comment_of(made) == "bootseer: start 43s of 16m40s, 17 gpu-min, program 22s"
    made |= {
        "gpus": 0,
        "lost_gpu_s": None,
        "elapsed_s": 3725.0,
        "start_to_training_s": 320.0,
        "lost_cpu_s": 60.0,
    }
    assert comment_of(made) == "bootseer: start 5m20s of 1h02m, 1 cpu-min, program 22s"


def read(folder: Path, **which: int) -> list[dict[str, Any]]:
    files = list(Archive(folder).files(**which))
    return [row for path in files for row in pq.read_table(path, partitioning=None).to_pylist()]


def test_rows_are_kept_by_user_and_month_and_read_by_them(tmp_path: Path) -> None:
    made = row(tmp_path / "store")
    month_ms = 31 * 86400 * 1000
    Archive(tmp_path / "records").add(
        [made, made | {"job": 6, "uid": 2000}, made | {"job": 7, "start_time": made["start_time"] + month_ms}]
    )
    assert sorted(path.relative_to(tmp_path / "records").as_posix() for path in Archive(tmp_path / "records").files()) == [
        "2027-01/1000.parquet", "2027-01/2000.parquet", "2027-02/1000.parquet"]  # fmt: skip
    assert {each["job"] for each in read(tmp_path / "records", uid=1000)} == {5, 7}
    assert [
        each["job"] for each in read(tmp_path / "records", uid=1000, since_ms=made["start_time"] + month_ms)
    ] == [7]
    assert read(tmp_path / "records", uid=3000) == []
    for path in Archive(tmp_path / "records").files():
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def test_a_row_that_comes_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    made = row(tmp_path / "store")
    archive = Archive(tmp_path / "records")
    archive.add([made, made | {"restart": 1, "start_time": made["start_time"] + 1000}])
    archive.add([made | {"start_to_training_s": 50.0}, made | {"job": 6}])
    archive.add([made | {"start_to_training_s": 50.0}, made | {"job": 6}])
    found = read(tmp_path / "records")
    assert sorted((each["job"], each["restart"], each["start_to_training_s"]) for each in found) == [
        (5, 0, 50.0), (5, 1, 43.0), (6, 0, 43.0)]  # fmt: skip


def test_a_start_is_one_whatever_its_restart_is_said_to_be(tmp_path: Path) -> None:
    made = row(tmp_path / "store")
    archive = Archive(tmp_path / "records")
    archive.add([made, made | {"restart": 7}])
    archive.add([made | {"restart": 8}])
    assert [each["restart"] for each in read(tmp_path / "records")] == [8]


def test_a_file_that_cannot_be_written_leaves_the_one_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = row(tmp_path / "store")
    archive = Archive(tmp_path / "records")
    archive.add([made])

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BootseerError, match="No space left"):
        archive.add([made | {"job": 6}])
    assert [each["job"] for each in read(tmp_path / "records")] == [5]
    assert [path.name for path in (tmp_path / "records" / "2027-01").iterdir()] == ["1000.parquet"]


def test_without_a_folder_there_are_no_records(tmp_path: Path) -> None:
    assert read(tmp_path / "nowhere") == []
