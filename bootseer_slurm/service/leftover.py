"""Ending what is left in the agent's service when that is stopped.

systemd must not do it: it would kill users' squashfuses whenever it starts the supervisor again (KillMode=).
And a process that a user began may have left its parent, but not the cgroup of the service. Only cgroups of
version 2 are looked at.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from bootseer_slurm import mounts

_log = logging.getLogger(__name__)

_LIMIT_S = 2.0  # one that a file system holds is not waited for
_LOOK_EVERY_S = 0.02


def end_leftover(unit: str) -> None:
    """Kill all other processes of this process's service, and those that they begin meanwhile.

    unit: the name of the service; where this process is in another one, or in none, nobody is killed.
    """
    folder = _service_folder(unit)
    deadline_s = time.monotonic() + _LIMIT_S
    while folder and (pids := list(_processes(folder))):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline_s:
            _log.warning("processes that cannot end are left: %s", pids)
            break
        time.sleep(_LOOK_EVERY_S)


def _service_folder(unit: str) -> Path | None:
    """The cgroup of the service; None where this process is not in it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    paths = [line[3:] for line in lines if line.startswith("0::")]
    roots = [mount.point for mount in mounts.mounts_below("/") if mount.fstype == "cgroup2"]
    parts = Path(paths[0]).parts[1:] if paths and roots else ()
    return roots[0].joinpath(*parts[: parts.index(unit) + 1]) if unit in parts else None


def _processes(folder: Path) -> Iterator[int]:
    """The processes in a cgroup and in those below it, but for this one and those of other namespaces."""
    for listed in folder.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):  # it was just removed
            for pid in map(int, listed.read_text().split()):
                if pid not in (0, os.getpid()):
                    yield pid
