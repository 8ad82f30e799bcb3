"""The reads that wait: parked in the ledger, answered once, shared out among users.

Owns: who answers a parked read, and how many may wait. Does not own: what they wait for (reads.py), and who
fetches it (fetchers.py). Thread-safe; the lock is held for a few dictionary accesses.

The kernel has one table for the readahead of all users (max_background), and while that is full all others'
waits, and with it their reads. So fewer reads may wait than it has room for, and beyond that a read fails of
the user who has the most: each of N users has an Nth for certain, and one alone may have all. It fails of
what nobody needs: a thread that asks again does not wait for what it asked before, so that is readahead. Who
does come to need such a page asks for it again, alone, which is not readahead to the kernel.
"""

from __future__ import annotations

import errno
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.device import Device
from bootseer_slurm.fuse.ledger import Ledger, Parked
from bootseer_slurm.fuse.nodes import Node
from bootseer_slurm.fuse.protocol import Request

# Of the kernel's table: what is left is for requests that were not looked at yet.
_MOST_PARKED = protocol.MAX_BACKGROUND * 3 // 4


@dataclass(slots=True)
class _OfUser:
    """The reads of one user by the kernel's number: each thread's latest, and earlier ones: readahead."""

    latest: dict[int, Parked] = field(default_factory=dict)
    ahead: dict[int, Parked] = field(default_factory=dict)
    _of_thread: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latest) + len(self.ahead)

    def add(self, parked: Parked) -> None:
        before = self._of_thread.get(parked.pid)
        if before is not None:
            self.ahead[before] = self.latest.pop(before)
        self.latest[parked.unique] = parked
        if parked.pid:  # 0: a thread outside of this process namespace, any one
            self._of_thread[parked.pid] = parked.unique

    def remove(self, parked: Parked) -> None:
        if self.ahead.pop(parked.unique, None) is None:
            self.latest.pop(parked.unique, None)
            self._of_thread.pop(parked.pid, None)

    def least_needed(self) -> Parked:
        """The readahead that reaches furthest; where there is none, the latest read."""
        reads = self.ahead or self.latest
        return reads[next(reversed(reads))]


class WaitingReads:
    """Parked reads that were not answered yet, by the kernel's number."""

    def __init__(self, device: Device, ledger: Ledger) -> None:
        self._device = device
        self._ledger = ledger
        self._reads: dict[int, Parked] = {}
        self._users: dict[int, _OfUser] = {}
        self._lock = threading.Lock()

    def __contains__(self, unique: int) -> bool:
        return unique in self._reads

    def park(self, request: Request, node: Node, offset: int, size: int) -> Parked:
        """Have a read of a node wait. offset and size: bytes, within the file."""
        parked = self._ledger.park(request.unique, node.id, offset, size, request.pid, node.uid)
        self.add(parked)
        return parked

    def add(self, parked: Parked) -> None:
        """Take a read over that lies in the ledger already."""
        with self._lock:
            self._reads[parked.unique] = parked
            self._users.setdefault(parked.uid, _OfUser()).add(parked)

    def drop_one_too_many(self) -> Parked | None:
        """Fail a read of the user who has the most, where more wait than may; gives which."""
        with self._lock:
            if len(self._reads) <= _MOST_PARKED:
                return None
            parked = max(self._users.values(), key=len).least_needed()
        self.finish(parked, protocol.failure(errno.EAGAIN))
        return parked

    def finish(self, parked: Parked, result: memoryview | BaseException) -> None:
        """Answer a parked read, unless that was done; only then it leaves the ledger."""
        with self._lock:
            if self._reads.pop(parked.unique, None) is None:
                return
            user = self._users[parked.uid]
            user.remove(parked)
            if not len(user):
                del self._users[parked.uid]
        if isinstance(result, BaseException):
            self._device.fail(parked.unique, result)
        else:
            self._device.reply(parked.unique, result)
        self._ledger.release(parked)

    def interrupt(self, request: Request) -> Parked | None:
        """Let go of a process that is being killed and waits in O_DIRECT or for a single page.

        Gives its read. Who waits for readahead needs no help. Other signals do not count: a read of an
        ordinary file does not end with EINTR.
        """
        (unique,) = protocol.INTERRUPT_IN.unpack_from(request.body)
        parked = self._reads.get(unique)
        if parked is None:  # not here yet: the kernel asks again; answered meanwhile: it takes no notice
            self._device.send(protocol.error_reply(request.unique, errno.EAGAIN))
        elif _is_being_killed(parked.pid):
            self.finish(parked, protocol.failure(errno.EINTR))
            return parked
        return None

    def clear(self) -> None:
        """Forget them all: what a fetch brings from here on is dropped."""
        with self._lock:
            self._reads.clear()
            self._users.clear()


def _is_being_killed(pid: int) -> bool:
    """Tell whether SIGKILL is pending for a thread, as it is after any fatal signal (proc_pid_status(5))."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    pending = next((int(line.split()[1], 16) for line in lines if line.startswith("SigPnd:")), 0)
    return bool(pending & 1 << (signal.SIGKILL - 1))
