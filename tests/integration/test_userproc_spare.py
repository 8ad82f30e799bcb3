"""Users' processes that are started ahead of their jobs."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bootseer_slurm.config import Config
from bootseer_slurm.errors import StoreError
from bootseer_slurm.identity import User
from bootseer_slurm.userproc.client import UserProcess, start_user_process
from bootseer_slurm.userproc.job_process import JobProcess
from bootseer_slurm.userproc.spare import Spare, Started

ALICE = User(20001, 20001, (20001, 20005))
END_S = 5.0
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@pytest.fixture
def spare() -> Iterator[Spare]:
    made = Spare()
    yield made
    made.close()


def waiting_process(spare: Spare) -> psutil.Process:
    """The one that is kept."""
    assert spare._started is not None
    return psutil.Process(spare._started.process.pid)


def start(spare: Spare, user: User = ALICE) -> UserProcess:
    """A process that has answered, and so has become its user."""
    process = start_user_process(user, "file:///", streams=1, timeout_s=5, take=spare.take)
    process.recall("c")
    return process


@as_root
def test_a_spare_process_becomes_the_user_for_good(spare: Spare) -> None:
    spare.prepare()
    waiting = waiting_process(spare)
    assert waiting.uids().real == 0
    process = start(spare)
    try:
        assert process._channel._process.pid == waiting.pid
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{waiting.pid}/status").read_text().splitlines()
        )
        assert status["Uid"].split() == ["20001"] * 4
        assert status["Gid"].split() == ["20001"] * 4
        assert status["Groups"].split() == ["20001", "20005"]
        for capabilities in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[capabilities], 16) == 0, capabilities
    finally:
        process.kill()


@as_root
def test_the_users_other_processes_cannot_look_into_it(spare: Spare) -> None:
    spare.prepare()
    process = start(spare)
    try:
        for name in ("fd", "mem", "environ"):
            command = ["setpriv", "--reuid=20001", "--regid=20001", "--clear-groups"]
            looking = ["ls"] if name == "fd" else ["head", "-c", "1"]
            path = f"/proc/{process._channel._process.pid}/{name}"
            done = subprocess.run([*command, *looking, path], capture_output=True, text=True)
            assert "Permission denied" in done.stderr, name
    finally:
        process.kill()


def test_no_process_serves_two_jobs(spare: Spare) -> None:
    spare.prepare()
    me = User(os.getuid(), os.getgid(), ())
    first, second = start(spare, me), start(spare, me)
    assert first._channel._process.pid != second._channel._process.pid
    first.kill()
    second.kill()


def test_a_spare_process_that_was_killed_is_not_taken(spare: Spare) -> None:
    spare.prepare()
    waiting = waiting_process(spare)
    waiting.kill()
    psutil.wait_procs([waiting], END_S)
    process = start(spare, User(os.getuid(), os.getgid(), ()))
    assert process._channel._process.pid != waiting.pid
    process.kill()


def test_a_spare_process_that_takes_no_order_is_ended(spare: Spare) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    deaf = subprocess.Popen(["sleep", "60"])
    spare._started = Started(deaf, here)
    with pytest.raises(StoreError, match="cannot be started"):
        start(spare)
    assert deaf.returncode is not None and here.fileno() == -1


def test_a_spare_process_ends_with_its_agent(spare: Spare) -> None:
    spare.prepare()
    waiting = waiting_process(spare)
    assert spare._started is not None
    spare._started.socket.close()  # as when the agent is killed
    _, alive = psutil.wait_procs([waiting], END_S)
    assert not alive


def test_the_next_one_waits_once_a_job_is_over_and_none_after_the_last(spare: Spare) -> None:
    job_process = JobProcess(os.getuid(), os.getgid(), Config(), spare)
    job_process()
    assert spare._started is None, "not while a job starts"
    job_process.kill()
    waiting = waiting_process(spare)
    spare.close()
    assert not waiting.is_running()
    spare.prepare()
    assert spare._started is None
