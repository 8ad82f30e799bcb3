"""The end of what a user's process says, which may say anything for as long as it likes."""

from __future__ import annotations

import os
import select
import subprocess
import time

_KEPT_BYTES = 4096
_READ_BYTES = 65536
_LOOK_EVERY_MS = 500


def last_lines(process: subprocess.Popen[bytes], timeout_s: float) -> list[str]:
    """Wait until a process ends whose stdout is a pipe; gives the last lines of that, without empty ones.

    No more is kept, and what others leave open of the pipe is not waited for. Closes it.
    Raises subprocess.TimeoutExpired; the process runs on then.
    """
    assert process.stdout is not None
    deadline_s = time.monotonic() + timeout_s
    tail = b""
    with process.stdout as pipe:
        fd = pipe.fileno()
        os.set_blocking(fd, False)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            ended = process.poll() is not None
            if poll.poll(0 if ended else _LOOK_EVERY_MS):
                content = os.read(fd, _READ_BYTES)
                tail = (tail + content)[-_KEPT_BYTES:]
                if not content:
                    break
            if ended:
                break
            if time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired(process.args, timeout_s)
    process.wait(max(0.0, deadline_s - time.monotonic()))
    return [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
