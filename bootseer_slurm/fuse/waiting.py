"""The reads that wait: parked in the ledger, answered once, counted by user.

Owns: who answers a parked read, and how many one user may have. Does not own: what they wait for (reads.py),
and who fetches it (fetchers.py). Thread-safe; the lock is held for a few dictionary accesses.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from pathlib import Path

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.device import Device
from bootseer_slurm.fuse.ledger import Ledger, Parked
from bootseer_slurm.fuse.nodes import Node
from bootseer_slurm.fuse.protocol import Request

_USER_PARKED = 1 << 12  # reads of one user that wait; more than the pages that his threads can wait for
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class WaitingReads:
    """Parked reads that were not answered yet, by the kernel's number."""

    def __init__(self, device: Device, ledger: Ledger) -> None:
        self._device = device
        self._ledger = ledger
        self._reads: dict[int, Parked] = {}
        self._of_user: Counter[int] = Counter()
        self._lock = threading.Lock()

    def __contains__(self, unique: int) -> bool:
        return unique in self._reads

    def park(self, request: Request, node: Node, offset: int, size: int) -> Parked:
        """Have a read of a node wait. offset and size: bytes, within the file.

        Raises OSError EAGAIN where its user has too many: the kernel drops readahead then, and asks again for
        single pages, which are taken.
        """
        if self._of_user[node.uid] >= _USER_PARKED and size > _PAGE_BYTES:
            raise protocol.failure(errno.EAGAIN)
        parked = self._ledger.park(request.unique, node.id, offset, size, request.pid, node.uid)
        self.add(parked)
        return parked

    def add(self, parked: Parked) -> None:
        """Take a read over that lies in the ledger already."""
        with self._lock:
            self._reads[parked.unique] = parked
            self._of_user[parked.uid] += 1

    def finish(self, parked: Parked, result: memoryview | BaseException) -> None:
        """Answer a parked read, unless that was done; only then it leaves the ledger."""
        with self._lock:
            if self._reads.pop(parked.unique, None) is None:
                return
            self._of_user[parked.uid] -= 1
        if isinstance(result, BaseException):
            self._device.fail(parked.unique, result)
        else:
            self._device.reply(parked.unique, result)
        self._ledger.release(parked)

    def interrupt(self, request: Request) -> None:
        """Let go of a process that is being killed and waits in O_DIRECT or for a single page.

        Who waits for readahead needs no help. Other signals do not count: a read of an ordinary file does not
        end with EINTR.
        """
        (unique,) = protocol.INTERRUPT_IN.unpack_from(request.body)
        parked = self._reads.get(unique)
        if parked is None:  # not here yet: the kernel asks again; answered meanwhile: it takes no notice
            self._device.send(protocol.error_reply(request.unique, errno.EAGAIN))
        elif _is_being_killed(parked.pid):
            self.finish(parked, protocol.failure(errno.EINTR))

    def clear(self) -> None:
        """Forget them all: what a fetch brings from here on is dropped."""
        with self._lock:
            self._reads.clear()
            self._of_user.clear()


def _is_being_killed(pid: int) -> bool:
    """Tell whether SIGKILL is pending for a thread, as it is after any fatal signal (proc_pid_status(5))."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    pending = next((int(line.split()[1], 16) for line in lines if line.startswith("SigPnd:")), 0)
    return bool(pending & 1 << (signal.SIGKILL - 1))
