"""A user's AWS profiles without the programs in them: `credential_process` would run in the agent's service.

The process that reads for a job executes nothing at all (seccomp.py). This one packs, with programs of the
node's, so a filter cannot tell them apart. It reads copies in memory of ~/.aws instead.
"""

from __future__ import annotations

import contextlib
import os

_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
_PROGRAM = b"credential_process"
_LIMIT_BYTES = 1 << 20


def hide_programs() -> None:
    """Have the AWS library of this process find no programs. To be called as the user."""
    for variable, path in _FILES.items():
        content = b""
        with contextlib.suppress(OSError), open(os.path.expanduser(path), "rb") as file:
            content = file.read(_LIMIT_BYTES)
        lines = [line for line in content.splitlines(keepends=True) if _PROGRAM not in line.lower()]
        fd = os.memfd_create("bootseer-aws", os.MFD_CLOEXEC)
        os.write(fd, b"".join(lines))
        os.environ[variable] = f"/proc/self/fd/{fd}"  # open as long as this process lives
