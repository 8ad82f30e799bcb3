"""A node without Slurm, for tests and bench: a folder with a store, and a real agent that runs in it."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bootseer_slurm import mounts
from bootseer_slurm.agentapi import protocol
from bootseer_slurm.agentapi.operations import OPERATIONS, Asker
from scripts.lib.cluster.layout import ClusterError, poll

WAIT_S = 20.0
_MAIN = "\nimport sys\nfrom bootseer_slurm.__main__ import main\nsys.argv = ['bootseer', 'agent']\nmain()\n"


class Node:
    """A node's folder, and the supervisor that runs in it with its agent. Needs root and /dev/fuse."""

    def __init__(self, folder: Path, settings: str = "") -> None:
        """folder: is there and has none of this yet. settings: more lines of the configuration."""
        self.folder = folder
        self.run = folder / "run"
        self.socket = self.run / "agent.sock"
        self.root_socket = self.run / protocol.ROOT_SOCKET_NAME
        self.config = folder / "bootseer.toml"
        self.processes: list[subprocess.Popen[bytes]] = []
        (folder / "store" / "users").mkdir(parents=True)
        (folder / "store" / "users").chmod(0o1777)
        (folder / "data").mkdir()
        (folder / "data").chmod(0o1777)
        self.config.write_text(
            f'[store]\nuri = "file://{folder}/store"\n'
            f'[cache]\npath = "{folder}/cache"\nmin_free = "1MiB"\n'
            f'[agent]\nsocket = "{self.socket}"\nmounts = "{self.run}"\n'
            f'[shadow]\nroots = ["{folder}/data"]\n'
            f'[image]\nsite_key = "{folder}/site.key"\n{settings}'
        )

    def launch(
        self, changes: str = "", *, prefix: Sequence[str] = (), pass_fds: Sequence[int] = (), **environ: str
    ) -> subprocess.Popen[bytes]:
        """Start a supervisor. changes: Python that it runs first, so that an agent can be made to fail.

        prefix: a program that becomes it. pass_fds: it inherits these.
        """
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-c", changes + _MAIN],
                env=os.environ | {"BOOTSEER_CONFIG": str(self.config)} | environ,
                pass_fds=pass_fds,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def start(self, changes: str = "") -> subprocess.Popen[bytes]:
        """Start a supervisor and wait until its agent answers. Raises ClusterError."""
        process = self.launch(changes)
        up = poll(lambda: process.poll() is not None or self.answers(), WAIT_S, interval_s=0.02)
        if not up or process.poll() is not None:
            raise ClusterError(f"the agent does not answer: {self.log}", self.folder / "log")
        return process

    @property
    def log(self) -> str:
        """The log of all its processes."""
        return (self.folder / "log").read_text()

    def connect(self, path: Path | None = None) -> socket.socket:
        """A connection to the agent, by everybody's socket where none is said."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Python's own timeout would not wait for room in the backlog.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(WAIT_S), 0))
        link.connect(str(path or self.socket))
        link.settimeout(WAIT_S)
        return link

    def request(self, op: str, **fields: object) -> tuple[protocol.Message, list[int]]:
        """The reply to one request of root's, and its descriptors. Raises OSError, ClusterError."""
        if "UID" in fields:  # the hook and the plugin always say the group
            fields = {"GID": fields["UID"], **fields}
        path = self.root_socket if OPERATIONS[op].asker is Asker.ROOT else self.socket
        with self.connect(path) as link:
            link.sendall(protocol.encode([("OP", op), *((key, str(value)) for key, value in fields.items())]))
            link.shutdown(socket.SHUT_WR)
            reply, fds = protocol.receive(link)
        if ("STATUS", "ok") not in reply:
            raise ClusterError(f"{op}: {reply}", self.folder / "log")
        return reply, fds

    def answers(self) -> bool:
        """Whether an agent answers."""
        with contextlib.suppress(OSError, ClusterError):
            self.request("status")
            return True
        return False

    def clear(self) -> None:
        """Kill all of its processes, and unmount what they have left."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                agents = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                process.kill()
                poll(partial(_gone, agents), WAIT_S)
            process.wait()
        for mount in reversed(mounts.mounts_below(self.folder)):
            with contextlib.suppress(OSError):
                mounts.unmount(mount.point, force=True)


def _gone(pids: list[str]) -> bool:
    """Whether none of these processes is there."""
    return not any(Path("/proc", pid).exists() for pid in pids)
