"""Two systemds for the tests: the real one in namespaces of its own, and its file descriptor store alone."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.node import Node, wait_until

# Descriptors at 3, 4 …, and the process that they are for, as sd_listen_fds(3) has them.
_PASS_ON = """
import os, sys
fds, names, command = [int(fd) for fd in sys.argv[1].split(",")], sys.argv[2], sys.argv[3:]
high = [os.dup2(fd, 1000 + number) for number, fd in enumerate(fds)]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
os.closerange(3 + len(high), 2000)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
os.execv(command[0], command)
"""


class FdStore:
    """Keeps descriptors as systemd does (sd_pid_notify_with_fds(3)), and gives them to the next supervisor."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self.fds: dict[str, int] = {}
        self.stored: list[str] = []  # names, as often as they were stored
        self.is_ready = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            content, fds, _, _ = socket.recv_fds(self._socket, 4096, 16)
            if content == b"":
                return
            said = dict(line.split("=", 1) for line in content.decode().splitlines())
            if "FDSTORE" in said:
                assert len(said["FDNAME"]) < 256 and ":" not in said["FDNAME"]
                self.fds[said["FDNAME"]] = fds[0]
                self.stored.append(said["FDNAME"])
            elif "FDSTOREREMOVE" in said:
                with contextlib.suppress(KeyError):
                    os.close(self.fds.pop(said["FDNAME"]))
            self.is_ready = self.is_ready or said.get("READY") == "1"

    def launch(self, node: Node, changes: str = "") -> subprocess.Popen[bytes]:
        """Start a supervisor as systemd would."""
        fds = {name: os.dup(fd) for name, fd in reversed(self.fds.items())}
        command = [sys.executable, "-c", _PASS_ON, ",".join(map(str, fds.values())), ":".join(fds)]
        try:
            return node.launch(
                changes,
                prefix=command if fds else (),
                pass_fds=tuple(fds.values()),
                NOTIFY_SOCKET=str(self.path),
            )
        finally:
            for fd in fds.values():
                os.close(fd)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.path))
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


@pytest.fixture
def fd_store(node: Node) -> Iterator[FdStore]:
    store = FdStore(node.folder)
    try:
        yield store
    finally:
        store.close()


CGROUP = next(
    (
        folder
        for folder in map(Path, ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"))
        if (folder / "cgroup.procs").exists()
    ),
    None,
)
# PID 1 of namespaces: what it mounts and starts is in them alone.
_START = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/systemd/system
printf '[Unit]\\nDefaultDependencies=no\\n' > /run/systemd/system/nothing.target
container=other exec /lib/systemd/systemd --system --unit=nothing.target --log-target=null --show-status=no
"""


class Systemd:
    """A systemd with no units but those that a test gives it."""

    def __init__(self) -> None:
        """Raises OSError or AssertionError where none can be run."""
        self._cgroup = Path(tempfile.mkdtemp(prefix="bootseer-systemd-", dir=CGROUP))
        enter = f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"'
        apart = [
            "unshare",
            "--fork",
            "--pid",
            "--mount",
            "--cgroup",
            "--ipc",
            "--uts",
            "--kill-child",
            "--mount-proc",
        ]
        self._process = subprocess.Popen(
            ["sh", "-c", enter, "sh", *apart, "sh", "-c", _START],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(lambda: self.ctl("list-units", check=False).returncode == 0)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of its PID 1, seen from here."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command where its units run."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-C"]
        return subprocess.run([*enter, *command], capture_output=True, text=True, check=check, timeout=60)

    def ctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", *words, check=check)

    def add(self, name: str, unit: str) -> None:
        """Give it a unit."""
        Path(f"/proc/{self.pid}/root/run/systemd/system", name).write_text(unit)
        self.ctl("daemon-reload")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid or self._process.pid, 9)  # and with it all that it started
        self._process.kill()
        self._process.wait()
        folders = [Path(folder) for folder, _, _ in os.walk(self._cgroup, topdown=False)]
        wait_until(lambda: all(map(_removed, folders)))


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    if CGROUP is None or not Path("/lib/systemd/systemd").exists():
        pytest.skip("needs systemd, and cgroups of version 2")
    made = Systemd()
    try:
        yield made
    finally:
        made.close()
