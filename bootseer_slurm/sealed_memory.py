"""Memory that root shares with a process of a user's, who can do with its content what he likes."""

from __future__ import annotations

import fcntl
import mmap
import os

# Who reads what the process has cut off would be killed (SIGBUS). What it adds would outlive it.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def sealed_memory(name: str, size_bytes: int) -> tuple[int, mmap.mmap]:
    """A descriptor to give away, which the caller closes, and the memory mapped. Raises OSError.

    name: as /proc shows it (memfd_create(2)).
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd, mmap.mmap(fd, 0)
    except BaseException:
        os.close(fd)
        raise
