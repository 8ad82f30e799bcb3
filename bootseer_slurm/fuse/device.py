"""A server's side of /dev/fuse: takes messages from the kernel and sends it replies and notifications.

Owns: a descriptor of its own, and what the kernel's refusals mean. Does not own: the mount, the layout of
messages (protocol.py), and what is said.

Threads: safe from any. After `close` the descriptor goes with the last thread that still uses it.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

from bootseer_slurm.fuse import protocol

_log = logging.getLogger(__name__)

# What a write to /dev/fuse says when nobody waits for it: not known, taken back, or the mount is gone.
_NOBODY_WAITS = frozenset({errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED, errno.EPERM})


class _Descriptor:
    """A copy of a descriptor, closed with the last reference to this."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)

    def __del__(self) -> None:
        os.close(self.fd)


class Device:
    """/dev/fuse of one mount."""

    def __init__(self, fd: int, point: Path) -> None:
        """fd: is copied. point: for messages."""
        self._descriptor: _Descriptor | None = _Descriptor(fd)
        self._point = point

    def take(self, inbox: memoryview) -> memoryview | None:
        """Wait for a message; empty when there is none after all, None when the file system is gone."""
        descriptor = self._descriptor
        try:
            return None if descriptor is None else inbox[: os.readv(descriptor.fd, [inbox])]
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                return None
            if error.errno != errno.ENOENT:  # the request was taken back
                _log.error("/dev/fuse of %s: %s", self._point, error.strerror)
                time.sleep(0.1)
            return inbox[:0]

    def send(self, *parts: bytes | memoryview) -> bool:
        """Write one message; False when the kernel has no use for it."""
        descriptor = self._descriptor
        if descriptor is None:
            return False
        try:
            os.writev(descriptor.fd, parts)
        except OSError as error:
            if error.errno not in _NOBODY_WAITS:
                _log.error("/dev/fuse of %s: cannot write: %s", self._point, error.strerror)
            return False
        return True

    def reply(self, unique: int, payload: bytes | memoryview) -> bool:
        """Answer a request; False when nobody waits for the answer."""
        return self.send(protocol.reply_header(unique, len(payload)), payload)

    def fail(self, unique: int, error: BaseException) -> None:
        """Answer a request with an error; one that is no OSError is a bug, logged and shown as EIO."""
        number = errno.EIO
        if not isinstance(error, OSError):
            _log.error("%s: a request failed", self._point, exc_info=error)
        elif error.errno and error.errno in errno.errorcode:  # the kernel ignores replies with other numbers
            number = error.errno
        self.send(protocol.error_reply(unique, number))

    def close(self) -> None:
        """Take and send nothing more."""
        self._descriptor = None
