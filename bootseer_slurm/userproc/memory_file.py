"""Files in memory, which carry content that is too long for a message from a user's process to the agent."""

from __future__ import annotations

import fcntl
import os

from bootseer_slurm.errors import IntegrityError


def make_memory_file(content: bytes) -> int:
    """A descriptor of a file in memory that holds this; the caller closes it. Raises OSError."""
    fd = os.memfd_create("bootseer-content", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
    except BaseException:
        os.close(fd)
        raise
    return fd


def memory_file_size(fd: int) -> int:
    """How many bytes a file in memory holds. Raises IntegrityError: the descriptor is a user's.

    Another file might be one of the user's own file system, which never answers.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # EINVAL of all files but those in memory (memfd_create(2))
        return os.fstat(fd).st_size
    except OSError as error:
        raise IntegrityError("the user's process gave a descriptor that is no file in memory") from error


def read_memory_file(fd: int, *, limit_bytes: int) -> bytes:
    """The first bytes of a file in memory, `limit_bytes` at most. Raises IntegrityError."""
    return os.pread(fd, min(memory_file_size(fd), limit_bytes), 0)
