"""What is killed at a stop: the processes of the agent's own service, and of no other."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.node import wait_until
from tests.integration.systemd import CGROUP

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or CGROUP is None, reason="needs root, and cgroups of version 2"
)
_END = "import sys; from bootseer_slurm.service.leftover import end_leftover; end_leftover(sys.argv[1])"


@pytest.fixture
def cgroup() -> Iterator[Path]:
    assert CGROUP is not None
    top = Path(tempfile.mkdtemp(prefix="bootseer-leftover-", dir=CGROUP))
    (top / "ours.service" / "job").mkdir(parents=True)
    (top / "other.service").mkdir()
    try:
        yield top
    finally:
        for folder in (top / "ours.service" / "job", top / "ours.service", top / "other.service", top):
            with contextlib.suppress(OSError):
                folder.rmdir()


def run_in(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh", *command])


def test_all_of_the_service_and_nobody_else_is_killed(cgroup: Path) -> None:
    ours, other = cgroup / "ours.service", cgroup / "other.service"
    sleeping = [run_in(folder, "sleep", "1000") for folder in (ours, ours / "job", other)]
    try:
        wait_until(
            lambda: all((folder / "cgroup.procs").read_text() for folder in (ours, ours / "job", other))
        )
        for unit in ("", "other.service", "service"):  # by a process that is not in it
            assert run_in(ours, sys.executable, "-c", _END, unit).wait(30) == 0
        assert [each.poll() for each in sleeping] == [None] * 3
        assert run_in(ours, sys.executable, "-c", _END, "ours.service").wait(30) == 0
        assert [each.wait(10) for each in sleeping[:2]] == [-9, -9] and sleeping[2].poll() is None
    finally:
        for each in sleeping:
            each.kill()
            each.wait()
