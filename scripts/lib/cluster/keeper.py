"""A service manager for one program, as systemd is one: python3 keeper.py COMMAND...

What a signal kills is started again, with the descriptors that it had stored (sd_pid_notify_with_fds(3),
sd_listen_fds(3)). SIGTERM is passed on. Ends with the program that ends by itself. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from types import FrameType
from typing import NoReturn

ADDRESS = "\0bootseer-keeper"  # each node has a network namespace, and so its own
RESTART_S = 1.0  # RestartSec= of conf/systemd/bootseer-agent.service
_LOOK_S = 0.05
_FIRST_FD = 3
_ABOVE = 1000  # where descriptors are put aside while the lower ones are filled


class Keeper:
    """The program, and what it has stored."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._fds: dict[str, int] = {}
        self._child = 0
        self._stopping = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(ADDRESS)

    def run(self) -> int:
        """Keep it running; gives its exit status."""
        signal.signal(signal.SIGTERM, self._stop)
        while True:
            self._child = self._start()
            status = os.waitstatus_to_exitcode(self._watch())
            if status >= 0 or self._stopping:
                return max(status, 0)
            time.sleep(RESTART_S)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGTERM)

    def _start(self) -> int:
        child = os.fork()
        if child == 0:
            self._become()
        return child

    def _become(self) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        names, environ = list(reversed(self._fds)), os.environ | {"NOTIFY_SOCKET": f"@{ADDRESS[1:]}"}
        for number, name in enumerate(names):
            os.dup2(self._fds[name], _ABOVE + number)
        for number in range(len(names)):
            os.dup2(_ABOVE + number, _FIRST_FD + number)
        if names:
            environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(names))}
            environ["LISTEN_FDNAMES"] = ":".join(names)
        os.closerange(_FIRST_FD + len(names), _ABOVE * 2)
        os.execve(self._command[0], self._command, environ)

    def _watch(self) -> int:
        """Store what it wants to be stored, until it ends; gives its wait status."""
        while True:
            while select.select([self._socket], [], [], _LOOK_S)[0]:
                self._take()
            ended, status = os.waitpid(self._child, os.WNOHANG)
            if ended:
                return status

    def _take(self) -> None:
        content, fds, _, _ = socket.recv_fds(self._socket, 4096, 16)
        said = dict(line.split("=", 1) for line in content.decode().splitlines())
        name = said.get("FDNAME", "")
        if "FDSTORE" in said:
            self._fds[name] = fds.pop()
        elif "FDSTOREREMOVE" in said and name in self._fds:
            os.close(self._fds.pop(name))
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    sys.exit(Keeper(sys.argv[1:]).run())
