"""Messages to a process that may not listen: whoever says something never waits. Thread-safe."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections import deque

_MOST = 20_000  # messages that were not taken yet
_BUFFER_BYTES = 2**20


class Outbox:
    """Sends in order: at once where the socket has room, else in a thread of its own."""

    def __init__(self, link: socket.socket) -> None:
        """link: a SEQPACKET socket, which its owner closes."""
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._link = link
        self._unsent: deque[tuple[bytes, int]] = deque()
        self._lock = threading.Lock()
        self._has_sender = False  # a thread sends what waits
        self._is_over = False

    def put(self, message: bytes, fd: int = -1) -> bool:
        """Send a message, with a descriptor perhaps. False where too many wait, or nobody is there."""
        with self._lock:
            if self._is_over or len(self._unsent) >= _MOST:
                return False
            if not self._has_sender:
                try:
                    self._send(message, fd, socket.MSG_DONTWAIT)
                    return True
                except BlockingIOError:
                    pass
                except OSError:
                    return False
                try:
                    threading.Thread(target=self._send_rest, name="peers-outbox", daemon=True).start()
                except RuntimeError:  # no more threads may be
                    return False
                self._has_sender = True
            self._unsent.append((message, os.dup(fd) if fd >= 0 else -1))
            return True

    def close(self) -> None:
        """Send no more; the link must be shut down, so that nobody waits to send."""
        with self._lock:
            self._is_over = True
            for _, fd in self._unsent:
                if fd >= 0:
                    os.close(fd)
            self._unsent.clear()

    def _send(self, message: bytes, fd: int, flags: int = 0) -> None:
        # Not socket.send_fds: it leaves the flags out.
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        self._link.sendmsg([message], rights, flags)

    def _send_rest(self) -> None:
        """Send all that waits (a thread of its own)."""
        while True:
            with self._lock:
                if not self._unsent:
                    self._has_sender = False
                    return
                message, fd = self._unsent.popleft()
            with contextlib.suppress(OSError):  # whoever takes what the other end says sees that it is gone
                self._send(message, fd)
            if fd >= 0:
                os.close(fd)
