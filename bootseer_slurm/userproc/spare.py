"""Starts users' processes, one of them ahead of its job.

Python takes 60 ms to load such a process, and a job's first step would wait for that. So one is kept that has
loaded everything. It waits for its user as root, reads nothing but the agent's first message, and becomes
that user before it does anything else (worker/). No process serves two jobs.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass

_WORKER = "bootseer_slurm.userproc.worker"
_PEER = "bootseer_slurm.peers.child"
_END_S = 5.0  # for a killed process
_ENVIRON = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True, slots=True)
class Started:
    """A process that does not have a user yet, and the agent's end of its socket."""

    process: subprocess.Popen[bytes]
    socket: socket.socket

    def give_order(self, order: bytes, ring_fd: int) -> None:
        """Say whom it becomes, and give it the ring. Raises OSError."""
        socket.send_fds(self.socket, [order], [ring_fd])

    def end(self) -> None:
        """End it. One that became its user's just now can be held; subprocess collects it later."""
        self.socket.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)


def start(module: str = _WORKER) -> Started:
    """A new process without a user, which runs this module. Raises OSError, subprocess.SubprocessError."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with far:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", module, str(far.fileno())],
                pass_fds=(far.fileno(),),
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=_ENVIRON,
                start_new_session=True,
            )
        except BaseException:
            near.close()
            raise
    return Started(process, near)


class Spare:
    """Keeps one process ahead. Thread-safe."""

    def __init__(self, module: str = _WORKER) -> None:
        """module: what the processes run; it waits for the agent's first message."""
        self._module = module
        self._started: Started | None = None
        self._closed = False
        self._lock = threading.Lock()

    def take(self) -> Started:
        """The one that waits, else a new one. Raises OSError, subprocess.SubprocessError."""
        with self._lock:
            started, self._started = self._started, None
        if started is not None:
            if started.process.poll() is None:
                return started
            started.end()
        return start(self._module)

    def prepare(self) -> None:
        """Have one wait where none does. For a moment at which no job starts: when one is over, say."""
        with self._lock:
            if self._started is None and not self._closed:
                with contextlib.suppress(OSError, subprocess.SubprocessError):  # the next job starts its own
                    self._started = start(self._module)

    def close(self) -> None:
        """End the one that waits; there is no other one."""
        with self._lock:
            self._closed = True
            started, self._started = self._started, None
        if started is not None:
            started.end()


class Spares:
    """The processes that wait for the next job: one for its user's files, and one for its peers."""

    def __init__(self, *, with_peers: bool) -> None:
        """with_peers: whether the next job may have some."""
        self.users = Spare()
        self.peers = Spare(_PEER)
        self._with_peers = with_peers

    def prepare(self) -> None:
        """Have them wait; see Spare."""
        self.users.prepare()
        if self._with_peers:
            self.peers.prepare()

    def close(self) -> None:
        """End them."""
        for spare in (self.users, self.peers):
            spare.close()
