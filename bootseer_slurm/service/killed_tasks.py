"""Tasks that are being killed while they wait for a mounted image or environment: their reads fail early.

Such a task ends only when its block came or its read failed, and Slurm drains the node after
UnkillableStepTimeout. The kernel does not say for whom a loop device reads. So while reads of mounted blobs
wait for seconds, the processes of their user are looked at: where all that wait in the kernel are being
killed, nobody is left who wants the bytes. Only reads fail that waited before that look. For one read of a
task the kernel asks several times, so the next looks follow soon. In any case no such read waits longer than
cache.reader.MOUNTED_PATIENCE_S.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Set
from pathlib import Path

from bootseer_slurm.artifacts.open_blobs import OpenBlobs

_log = logging.getLogger(__name__)

_LOOK_EVERY_S, _LOOK_AGAIN_S = 1.0, 0.2
_LONG_S = 3.0  # a read that waits for so long is worth a look at processes
_AGAIN_FOR_S = 10.0  # within it the kernel asks again for what failed, or for what lies behind it
_SETTLED_S = 0.1  # who waits for a read of this age is seen to wait
_SIGKILL = 1 << (signal.SIGKILL - 1)


def end_waits_of_killed(blobs: OpenBlobs, stop: threading.Event) -> None:
    """Have the reads of tasks that are being killed fail, until told to stop (a thread of its own)."""
    again_until_s = look_s = 0.0
    while True:
        again = time.monotonic() < again_until_s
        # Of 10,000 threads a look takes half a second, in the process that answers reads.
        if stop.wait(max(_LOOK_AGAIN_S, look_s) if again else _LOOK_EVERY_S):
            return
        try:
            begin_s = time.monotonic()
            if _look(blobs, _SETTLED_S if again else _LONG_S):
                again_until_s = time.monotonic() + _AGAIN_FOR_S
            look_s = time.monotonic() - begin_s
        except Exception:  # the next look may do better
            _log.exception("tasks that are being killed cannot be looked at")


def _look(blobs: OpenBlobs, longer_than_s: float) -> bool:
    """Fail the reads of blobs for which only killed tasks wait; tells whether there were any."""
    waiting = blobs.mounted_that_wait(longer_than_s)
    if not waiting:
        return False
    before_s = time.monotonic() - _SETTLED_S
    killed = users_being_killed({blob.reader.uid for blob in waiting})
    killed = killed and users_being_killed(killed)  # some may have come to wait behind the first look
    failed = [blob for blob in waiting if blob.reader.uid in killed and blob.fail_reads(before_s)]
    for blob in failed:
        _log.info("blob %s: reads failed: all tasks that wait are being killed", blob.reader.blob.id[:12])
    return bool(failed)


def users_being_killed(uids: Set[int]) -> set[int]:
    """Those of these users of whom some tasks wait in the kernel, each of which is being killed."""
    killed: set[int] = set()
    alive: set[int] = set()
    for uid, status in waiting_tasks(uids):
        # Of a thread, and of its process (proc_pid_status(5)).
        pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
        (killed if pending & _SIGKILL else alive).add(uid)
    return killed - alive


def waiting_tasks(uids: Set[int]) -> Iterator[tuple[int, dict[str, str]]]:
    """The user and the status of each thread of these users that waits without being interruptible.

    Without the users' processes that this one has begun: they wait for the store. By the real user: what
    shows mounts to a user has another one, and a task that did not exec yet has no entry of its user's.
    """
    for process in os.scandir("/proc"):
        if not process.name.isdecimal() or not (status := _status(process.path)):
            continue
        uid = int(status["Uid"].split()[0])
        if uid in uids and int(status["PPid"]) != os.getpid():
            yield from ((uid, each) for each in _threads(process.path) if each["State"].startswith("D"))


def _threads(process: str) -> Iterator[dict[str, str]]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        yield from filter(None, (_status(task.path) for task in os.scandir(f"{process}/task")))


def _status(task: str) -> dict[str, str]:
    """What the kernel says of a thread (proc_pid_status(5)); nothing of one that has ended."""
    try:
        lines = Path(task, "status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)
