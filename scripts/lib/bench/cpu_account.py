"""Whose CPU time it was: what groups of processes, and the kernel's own threads, have used.

By /proc, in seconds. A process counts with the children that it has waited for, so what ends meanwhile is in
its parent's. Not seen: interrupts that came while a core was idle, and what the kernel does in the name of a
process that is in no group. On this cluster that is a node's end of the network: with veth the sender's
process pays for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

KERNEL = "kernel threads"
_TICKS = os.sysconf("SC_CLK_TCK")
_PF_KTHREAD = 0x00200000  # linux/sched.h

Account = dict[str, dict[int, float]]  # of each group: its processes, and the seconds that each has used


def account(groups: dict[str, Iterable[int]]) -> Account:
    """The CPU seconds that these processes and each kernel thread of this machine have used until now."""
    seconds = {name: {pid: process_s(pid) for pid in pids} for name, pids in groups.items()}
    return seconds | {KERNEL: kernel_threads_s()}


def growth(before: Account, after: Account) -> dict[str, float]:
    """The seconds that each group used in between; a process that was not there before began with none."""
    return {
        name: sum(used_s - before.get(name, {}).get(pid, 0.0) for pid, used_s in each.items())
        for name, each in after.items()
    }


def process_s(pid: int) -> float:
    """All threads of a process, and its children that have ended; 0 when it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS
    return 0.0


def kernel_threads_s() -> dict[int, float]:
    """Each kernel thread of this machine: kworkers, which read ahead, write back, and serve loop devices."""
    seconds = {}
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(fields[6]) & _PF_KTHREAD:
                seconds[pid] = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    return seconds


def below(pid: int) -> list[psutil.Process]:
    """A process and all that it started, directly or not; nothing when it is gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []
