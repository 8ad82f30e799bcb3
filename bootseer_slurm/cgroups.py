"""A cgroup for what runs for each job in the agent's service, where systemd has delegated the service's own.

    <service>/agent          supervisor and agent
    <service>/<job.restart>  the job's user's process, and the programs that work for him in the background

The job's group bounds processes and memory, and ends with the job, with all that is in it: what a user's
process left behind goes too. Version 2 only (cgroups(7); systemd's CGROUP_DELEGATION), and to bound it takes
DelegateSubgroup= of systemd 254. Elsewhere all works as well: `bootseer doctor` tells.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

_AGENT = "agent"
_DELEGATED = "trusted.delegate"  # systemd's mark, with Delegate=yes
# Threads count. mksquashfs has three for each core.
_MOST_TASKS = 256 + 4 * (os.cpu_count() or 1)
# Of the node's memory: what a user's process and mksquashfs read counts as the group's page cache.
_MEMORY_SHARE = 4
_END_S = 2.0  # what is killed goes at once, but for one that a file system holds


class JobGroup:
    """The group of one job; one without a folder does nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def add(self, pid: int) -> None:
        """Have a process, and all that it begins, be in the group."""
        if self.folder is not None:
            with contextlib.suppress(OSError):  # it has ended, or the group has
                (self.folder / "cgroup.procs").write_text(f"{pid}\n")

    def end(self) -> None:
        """Kill all that is in it, and take it away."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            (self.folder / "cgroup.kill").write_text("1\n")
        deadline_s = time.monotonic() + _END_S
        while self.folder.exists() and time.monotonic() < deadline_s:
            with contextlib.suppress(OSError):  # busy while one of them is there
                self.folder.rmdir()
                return
            time.sleep(0.01)


NO_GROUP = JobGroup()


def settle() -> None:
    """Have this process, and what it begins, be in the group `agent` of the service's. For the supervisor."""
    service = service_folder()
    if service is None:
        return
    if _own_folder() == service:
        # systemd before 254 begins the service in its own group, and could not do so again below which groups
        # are bounded ("no internal processes", cgroups(7)).
        with contextlib.suppress(OSError):
            (service / _AGENT).mkdir(exist_ok=True)
            (service / _AGENT / "cgroup.procs").write_text(f"{os.getpid()}\n")
        return
    for controller in ("pids", "memory"):
        with contextlib.suppress(OSError):  # this kernel has it in version 1
            (service / "cgroup.subtree_control").write_text(f"+{controller}\n")


def service_folder() -> Path | None:
    """The folder of the service's delegated group; None without one."""
    folder = _own_folder()
    if folder is None:
        return None
    if folder.name == _AGENT:
        folder = folder.parent
    try:
        return folder if os.getxattr(folder, _DELEGATED) == b"1" else None
    except OSError:
        return None


def _own_folder() -> Path | None:
    """The folder of this process's group of version 2; None without one."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    mounted = [each.mountpoint for each in psutil.disk_partitions(all=True) if each.fstype == "cgroup2"]
    return Path(mounted[0], own) if own is not None and mounted else None


def job_group(service: Path | None, name: str) -> JobGroup:
    """The group of a job, made or found. Without the service's own there is none."""
    if service is None:
        return NO_GROUP
    folder = service / name
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return NO_GROUP
    for file, limit in (
        ("pids.max", _MOST_TASKS),
        ("memory.max", psutil.virtual_memory().total // _MEMORY_SHARE),
    ):
        with contextlib.suppress(OSError):
            (folder / file).write_text(f"{limit}\n")
    return JobGroup(folder)


def group_folders(service: Path | None) -> list[Path]:
    """The folders of all jobs' groups."""
    folders = service.iterdir() if service is not None else ()
    return [folder for folder in folders if folder.is_dir() and folder.name != _AGENT]
