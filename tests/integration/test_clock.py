"""A clock against a store's: what a file system tells, and what it cannot tell."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.errors import IntegrityError, StoreError
from bootseer_slurm.events import EventLog
from bootseer_slurm.job.publishing import Publisher
from bootseer_slurm.mounts import mount_of
from bootseer_slurm.report.gather.stored import reader_clock
from bootseer_slurm.slurm.allocation import Job
from bootseer_slurm.store import FileStore, clock_offset, local


@pytest.fixture
def shared(tmp_path: Path, mocker: MockerFixture) -> FileStore:
    """A store whose file system counts as one that has its server's times: this machine's own."""
    kind = mount_of(tmp_path).fstype
    mocker.patch.object(local, "_SERVER_TIMES", (kind,))
    return FileStore(tmp_path)


def test_a_clock_that_is_right_is_within_its_error(shared: FileStore, tmp_path: Path) -> None:
    offset_s, error_s = clock_offset(shared, "users/0/x.clock")
    assert abs(offset_s) <= error_s < 1
    assert not any(tmp_path.rglob("*.clock")), "nothing is left"


def test_a_clock_that_is_ahead_is_found(shared: FileStore, mocker: MockerFixture) -> None:
    true = time.time_ns
    mocker.patch("bootseer_slurm.store.base.time.time_ns", side_effect=lambda: true() + 90_000_000_000)
    offset_s, error_s = clock_offset(shared, "users/0/x.clock")
    assert abs(offset_s - 90) <= error_s < 1


def test_times_in_whole_seconds_widen_the_error(shared: FileStore, mocker: MockerFixture) -> None:
    changed_ns = FileStore.changed_ns
    mocker.patch.object(FileStore, "changed_ns", lambda store, path: changed_ns(store, path) // 10**9 * 10**9)
    offset_s, error_s = clock_offset(shared, "users/0/x.clock")
    assert abs(offset_s) <= error_s
    assert 0.5 <= error_s < 1.5


def test_a_file_system_with_the_writers_times_tells_nothing(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(StoreError, match="times of whoever writes"):
        clock_offset(store, "users/0/x.clock")
    assert not any(tmp_path.rglob("*.clock"))


def test_a_reader_without_events_of_his_own_writes_nothing(shared: FileStore, tmp_path: Path) -> None:
    assert reader_clock(shared) is None
    assert list(tmp_path.iterdir()) == []
    shared.write(f"users/{os.geteuid()}/events/7.0/n1.jsonl", b"\n")
    offset = reader_clock(shared)
    assert offset is not None
    assert abs(offset.ahead_s) <= offset.error_s
    assert not any(tmp_path.rglob("*.clock"))


def test_the_mount_of_a_path_is_the_innermost(tmp_path: Path) -> None:
    assert mount_of("/proc/self").fstype == "proc"
    assert mount_of(tmp_path).point in (tmp_path, *tmp_path.parents)
    (tmp_path / "link").symlink_to("/proc")
    assert mount_of(tmp_path / "link").fstype == "proc"
    with pytest.raises(FileNotFoundError):
        mount_of(tmp_path / "none")


@pytest.mark.parametrize(
    "answer", [float("nan"), float("inf"), IntegrityError("x")], ids=["nan", "inf", "none"]
)
def test_a_clock_that_is_no_number_does_not_cost_the_events(answer: Any, mocker: MockerFixture) -> None:
    """The process that says it is the user's."""
    process, log = mocker.Mock(), EventLog(7, 0, "n1")
    process.clock.side_effect = [answer if isinstance(answer, Exception) else (answer, 1.0)]
    Publisher(Job(7, 0, 1, 1), lambda: process).write_events(log)  # type: ignore[arg-type]
    assert process.write.call_count == 1 and log.events() == []
