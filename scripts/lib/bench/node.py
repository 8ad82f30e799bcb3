"""One node's agent without Slurm, with a configuration of its own, for what is measured on the node."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from bootseer_slurm import mounts
from bootseer_slurm.agentapi import protocol
from scripts.lib.cluster.layout import ClusterError, poll

USER = 54321
_EVERY_S = 0.1


class Node:
    """A keeper with its agent, whose files lie in one folder. Root, and /dev/fuse."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self._socket = self.run / "agent.sock"

    @contextlib.contextmanager
    def running(self) -> Iterator[Node]:
        """It runs; at the end all that it made is gone. Raises ClusterError."""
        (self.folder / "store" / "users").mkdir(parents=True)
        (self.folder / "store" / "users").chmod(0o1777)
        config = self.folder / "bootseer.toml"
        config.write_text(
            f'[store]\nuri = "file://{self.folder}/store"\n[cache]\npath = "{self.folder}/cache"\n'
            f'[agent]\nsocket = "{self._socket}"\nblobs = "{self.run}/blobs"\n'
        )
        environ = os.environ | {"BOOTSEER_CONFIG": str(config)}
        command = [sys.executable, "-m", "bootseer_slurm", "agent"]
        with (self.folder / "log").open("wb") as log:
            self._keeper = subprocess.Popen(command, env=environ, stderr=log)
        try:
            if not poll(self._answers, timeout_s=20):
                raise ClusterError(f"the agent does not answer: {(self.folder / 'log').read_text()}")
            yield self
        finally:
            self._keeper.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(40)
            self._keeper.kill()
            self._keeper.wait()
            for mount in reversed(mounts.mounts_below(self.folder)):
                mounts.unmount(mount.point, force=True)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, ClusterError):
            self.ask("status")
            return True
        return False

    def ask(self, op: str, **fields: object) -> tuple[protocol.Message, list[int]]:
        """The reply to one request of root's, and its descriptors. Raises ClusterError."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(20)
            link.connect(str(self._socket))
            link.sendall(protocol.encode([("OP", op), *((key, str(value)) for key, value in fields.items())]))
            link.shutdown(socket.SHUT_WR)
            reply, fds = protocol.receive(link)
        if ("STATUS", "ok") not in reply:
            raise ClusterError(f"{op}: {reply}")
        return reply, fds

    def begin(self, job: int, checkpoint: str) -> None:
        """As the prolog of a job that names a checkpoint; it is prefetched from now on."""
        self.ask("prolog", JOB_ID=job, UID=USER, BOOTSEER=1, CHECKPOINT=checkpoint)

    def brought(self, job: int) -> tuple[Path, Path]:
        """Wait until the checkpoint is there whole; its FUSE file, and what a step sees in its place."""
        events = self.run / "events" / f"{job}.0"
        end = '"kind":"prefetch","name":"end"'
        if not poll(lambda: events.exists() and end in events.read_text(), timeout_s=300):
            raise ClusterError(f"not prefetched: {(self.folder / 'log').read_text()}")
        reply, (mount,) = self.ask("attach", JOB_ID=job, UID=USER, STEP_ID=0)
        given = dict(value.split("=", 1) for key, value in reply if key == "SETENV")
        return Path(given["BOOTSEER_CHECKPOINT"]), Path(f"/proc/{os.getpid()}/fd/{mount}")

    @contextlib.contextmanager
    def memory(self) -> Iterator[dict[str, int]]:
        """The most memory (PSS, bytes) of the agent's processes meanwhile: "all", and by what each is."""
        most: dict[str, int] = {}
        over = threading.Event()

        def look() -> None:
            while not over.wait(_EVERY_S):
                sizes = self._sizes()
                sizes["all"] = sum(sizes.values())
                most.update({name: max(most.get(name, 0), size) for name, size in sizes.items()})

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield most
        finally:
            over.set()
            thread.join()

    def _sizes(self) -> dict[str, int]:
        """What its processes take now; "fetch": all that the agent started."""
        keeper = psutil.Process(self._keeper.pid)
        sizes = {"keeper": 0, "agent": 0, "fetch": 0}
        for process in [keeper, *keeper.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                below = {keeper.pid: "agent", os.getpid(): "keeper"}
                sizes[below.get(process.ppid(), "fetch")] += process.memory_full_info().pss
        return sizes
