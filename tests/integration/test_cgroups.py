"""The groups of jobs, in a real cgroup of version 2 that is marked as systemd marks those it delegates."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm import cgroups
from tests.integration.node import ALICE, Node, node, wait_until

__all__ = ["node"]


def _root() -> Path | None:
    """Where cgroups of version 2 are mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return Path(line.split()[1])
    return None


pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        os.geteuid() != 0 or _root() is None or not os.access(_root() or "", os.W_OK),
        reason="needs root and cgroups of version 2",
    ),
]
_ENTER = "import os\nopen({procs!r}, 'w').write(str(os.getpid()))\n"


@pytest.fixture
def service() -> Iterator[Path]:
    """A delegated group, as a service has it; all in it is killed afterwards."""
    root = _root()
    assert root
    folder = Path(tempfile.mkdtemp(prefix="bootseer-test-", dir=root))
    os.setxattr(folder, "trusted.delegate", b"1")
    try:
        yield folder
    finally:
        (folder / "cgroup.kill").write_text("1\n")
        wait_until(lambda: "populated 0" in (folder / "cgroup.events").read_text())
        for inner in sorted(folder.rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):
                inner.rmdir()
        folder.rmdir()


def group_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line for line in lines if line.startswith("0::")).removeprefix("0::")


def test_a_jobs_processes_are_in_its_group_and_end_with_it(node: Node, service: Path) -> None:
    process = node.start(_ENTER.format(procs=str(service / "cgroup.procs")))
    assert group_of(process.pid).endswith("/agent") and group_of(node.agent_pid).endswith("/agent")
    node.ask("prolog", JOB_ID=7, UID=ALICE, BOOTSEER=1)
    group = service / "7.0"
    wait_until(lambda: (group / "cgroup.procs").read_text() != "")
    (pid,) = map(int, (group / "cgroup.procs").read_text().split())
    status = Path(f"/proc/{pid}/status")
    wait_until(lambda: f"Uid:\t{ALICE}" in status.read_text() and "Seccomp:\t2" in status.read_text())
    assert Path(f"/proc/{pid}/mem").stat().st_uid == 0, "and he cannot enter it"
    # What a program of the user's leaves behind, in a session of its own.
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    cgroups.JobGroup(group).add(left.pid)
    node.ask("epilog", JOB_ID=7)
    assert left.wait(20) == -9
    wait_until(lambda: not group.exists())


def test_the_next_agent_ends_groups_of_jobs_that_are_not_there(node: Node, service: Path) -> None:
    (service / "8.0").mkdir()
    left = subprocess.Popen(["sleep", "600"])
    cgroups.JobGroup(service / "8.0").add(left.pid)
    node.start(_ENTER.format(procs=str(service / "cgroup.procs")))
    assert left.wait(20) == -9
    wait_until(lambda: not (service / "8.0").exists())


def test_limits_are_written_where_the_kernel_has_them(tmp_path: Path) -> None:
    for file in ("pids.max", "memory.max"):
        (tmp_path / "7.0").mkdir(exist_ok=True)
        (tmp_path / "7.0" / file).touch()
    group = cgroups.job_group(tmp_path, "7.0")
    assert group.folder == tmp_path / "7.0"
    assert int((tmp_path / "7.0" / "pids.max").read_text()) >= 256
    assert int((tmp_path / "7.0" / "memory.max").read_text()) > 2**28


def test_without_a_group_of_its_own_nothing_is_touched(service: Path) -> None:
    os.removexattr(service, "trusted.delegate")
    code = _ENTER.format(procs=str(service / "cgroup.procs"))
    code += "from bootseer_slurm import cgroups; cgroups.settle(); print(cgroups.service_folder())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n" and [path for path in service.iterdir() if path.is_dir()] == []
    begin_s = time.monotonic()
    cgroups.NO_GROUP.add(1)
    cgroups.NO_GROUP.end()
    assert time.monotonic() - begin_s < 20
