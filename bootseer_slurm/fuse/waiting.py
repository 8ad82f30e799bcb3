"""The reads that wait: parked in the ledger, answered once, shared out among users.

Owns: who answers a parked read, and how many may wait. Does not own: what they wait for (reads.py), and who
fetches it (fetchers.py). Thread-safe; the lock is held for a few dictionary accesses.

The kernel has one table for the readahead of all users (max_background), and while that is full all others'
waits, and with it their reads. So fewer reads may wait than it has room for, and beyond that a read fails of
the user who has the most: each of N users has an Nth for certain, and one alone may have all. It fails of
what nobody needs: a thread that asks again does not wait for what it asked before, so that is readahead. Who
does come to need such a page asks for it again, alone, which is not readahead to the kernel.

A read that waits too long fails: some tasks that wait cannot be killed, and Slurm drains a node whose tasks
do not end. For one read of a task the kernel's squashfs asks for several blocks, one after the other and each
twice, whatever failed (24 requests, seen on Linux 6.18). So all reads of that file fail early for a while.
"""

from __future__ import annotations

import errno
import math
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.device import Device
from bootseer_slurm.fuse.ledger import Ledger, Parked
from bootseer_slurm.fuse.nodes import Node
from bootseer_slurm.fuse.protocol import Request

# Of the kernel's table: what is left is for requests that were not looked at yet.
_MOST_PARKED = protocol.MAX_BACKGROUND * 3 // 4
_EARLY_S = 0.3  # how long a read waits that fails early; a store that is there again may answer sooner
_HURRY_S = 15.0  # within it the kernel has asked for all that one read of a task needs


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


@dataclass(slots=True)
class _Wait:
    """A parked read. node: None of one that the next server does not know."""

    parked: Parked
    node: Node | None
    since_s: float = field(default_factory=time.monotonic)

    def has_waited(self, most_s: float) -> bool:
        """Whether it has waited for so long, or as its file allows; not while its node has no File."""
        file = self.node.file if self.node else None
        return file is not None and time.monotonic() - self.since_s >= min(most_s, file.patience_s)


class WaitingReads:
    """Parked reads that were not answered yet, by the kernel's number."""

    def __init__(self, device: Device, ledger: Ledger) -> None:
        self._device = device
        self._ledger = ledger
        self._reads: dict[int, _Wait] = {}
        self._users: dict[int, _OfUser] = {}
        self._hurried_until_s: dict[int, float] = {}  # by the id of a node whose reads fail early
        self._lock = threading.Lock()

    def __contains__(self, unique: int) -> bool:
        return unique in self._reads

    def park(self, request: Request, node: Node, offset: int, size: int) -> Parked:
        """Have a read of a node wait. offset and size: bytes, within the file."""
        parked = self._ledger.park(request.unique, node.id, offset, size, request.pid, node.uid)
        self.add(parked, node)
        return parked

    def add(self, parked: Parked, node: Node | None) -> None:
        """Take a read over that lies in the ledger already. node: None where it is not known any more."""
        with self._lock:
            self._reads[parked.unique] = _Wait(parked, node)
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
            wait = self._reads.pop(parked.unique, None)
            if wait is None:
                return
            if not isinstance(result, BaseException):
                self._hurried_until_s.pop(parked.node_id, None)
            elif wait.has_waited(math.inf):
                self._hurried_until_s[parked.node_id] = time.monotonic() + _HURRY_S
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
        wait = self._reads.get(unique)
        if wait is None:  # not here yet: the kernel asks again; answered meanwhile: it takes no notice
            self._device.send(protocol.error_reply(request.unique, errno.EAGAIN))
        elif _is_being_killed(wait.parked.pid):
            self.finish(wait.parked, protocol.failure(errno.EINTR))
            return wait.parked
        return None

    def fail_overdue(self) -> list[Parked]:
        """Fail the reads that have waited for too long; gives them."""
        with self._lock:
            hurried = self._hurried()
            overdue = [
                wait.parked
                for wait in self._reads.values()
                if wait.has_waited(_EARLY_S if wait.parked.node_id in hurried else math.inf)
            ]
        for parked in overdue:
            self.finish(parked, protocol.failure(errno.EIO))
        return overdue

    def fail(self, node_id: int, before_s: float) -> list[Parked]:
        """Fail the reads of a node that wait since before a time.monotonic(); gives them."""
        with self._lock:
            reads = [
                wait.parked
                for wait in self._reads.values()
                if wait.parked.node_id == node_id and wait.since_s < before_s
            ]
        for parked in reads:
            self.finish(parked, protocol.failure(errno.EIO))
        return reads

    @property
    def hurries(self) -> bool:
        """Whether there is a node whose reads fail early."""
        with self._lock:
            return bool(self._hurried())

    def _hurried(self) -> set[int]:
        """The nodes whose reads fail early now; with the lock held."""
        now_s = time.monotonic()
        for node_id in [each for each, until_s in self._hurried_until_s.items() if until_s <= now_s]:
            del self._hurried_until_s[node_id]
        return set(self._hurried_until_s)

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
