"""A node for tests: a folder with a store, and a real keeper with its agent in it. Needs root and /dev/fuse."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bootseer_slurm import mounts
from bootseer_slurm.agentapi import protocol
from bootseer_slurm.event_table import unlisted

ALICE, BOB = 54321, 54322
# What a test changes in the agent's process comes between these two.
_BEFORE = "import sys, threading, time\nfrom bootseer_slurm.agent import keeper, room, server, session, table\n"
_AFTER = "\nfrom bootseer_slurm.__main__ import main\nsys.argv = ['bootseer', 'agent']\nmain()\n"


class Node:
    """A node's folder, and the agent that runs in it."""

    def __init__(self, folder: Path, settings: str = "") -> None:
        self.folder = folder
        self.run = folder / "run"
        self.socket = self.run / "agent.sock"
        self.config = folder / "bootseer.toml"
        self.processes: list[subprocess.Popen[bytes]] = []
        (folder / "store" / "users").mkdir(parents=True)
        (folder / "store" / "users").chmod(0o1777)
        (folder / "data").mkdir()
        (folder / "data").chmod(0o1777)
        self.config.write_text(
            f'[store]\nuri = "file://{folder}/store"\n'
            f'[cache]\npath = "{folder}/cache"\nmin_free = "1MiB"\n'
            f'[agent]\nsocket = "{self.socket}"\nblobs = "{self.run}/blobs"\n'
            f'[shadow]\nroots = ["{folder}/data"]\n'
            f'[image]\nsite_key = "{folder}/site.key"\n{settings}'
        )

    def launch(self, changes: str = "") -> subprocess.Popen[bytes]:
        """Start an agent; changes: Python that it runs first."""
        process = subprocess.Popen(
            [sys.executable, "-c", _BEFORE + changes + _AFTER],
            env=os.environ | {"BOOTSEER_CONFIG": str(self.config)},
            stderr=(self.folder / "log").open("ab"),
        )
        self.processes.append(process)
        return process

    def start(self, changes: str = "") -> subprocess.Popen[bytes]:
        """Start an agent and wait until it answers."""
        process = self.launch(changes)
        wait_until(lambda: process.poll() is not None or self.answers())
        assert process.poll() is None, self.log
        return process

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def connect(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(20)
        link.connect(str(self.socket))
        return link

    def request(self, op: str, **fields: object) -> tuple[protocol.Message, list[int]]:
        """The reply to one request of root's, and its descriptors."""
        with self.connect() as link:
            link.sendall(protocol.encode([("OP", op), *((key, str(value)) for key, value in fields.items())]))
            link.shutdown(socket.SHUT_WR)
            reply, fds = protocol.receive(link)
        assert ("STATUS", "ok") in reply, reply
        return reply, fds

    def ask(self, op: str, **fields: object) -> protocol.Message:
        """The reply to a request that brings no descriptors."""
        reply, fds = self.request(op, **fields)
        assert fds == []
        return reply

    def answers(self) -> bool:
        with contextlib.suppress(OSError, AssertionError):
            self.ask("status")
            return True
        return False

    def status(self) -> dict[str, object]:
        return dict(json.loads(protocol.first(self.ask("status"), "STATUS_JSON")))

    def jobs(self) -> set[int]:
        return {job["job"] for job in self.status()["jobs"]}  # type: ignore[attr-defined]

    @property
    def agent_pid(self) -> int:
        """Of the agent proper, the keeper's child."""
        return int(str(self.status()["pid"]))

    def crash(self) -> None:
        """Kill the agent proper, and wait until another one answers."""
        pid = self.agent_pid
        os.kill(pid, 9)
        self.wait_for_another(pid)

    def wait_for_another(self, pid: int) -> None:
        """Wait until an agent answers that is not this one."""

        def answers() -> bool:
            with contextlib.suppress(OSError, AssertionError):  # killed in the middle of its answer
                return self.agent_pid != pid
            return False

        wait_until(answers)

    def job_files(self) -> set[str]:
        return {path.name for path in (self.run / "jobs").iterdir()}

    def events(self, job: int, uid: int = ALICE) -> list[dict[str, object]]:
        """The job's events in the store, once its session has ended."""
        folder = self.folder / "store" / "users" / str(uid) / "events" / f"{job}.0"

        def ended() -> bool:
            return any('"session","name":"end"' in path.read_text() for path in folder.glob("*.jsonl"))

        wait_until(ended)
        events = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
        assert [gap for each in events if (gap := unlisted(each["kind"], each["name"], each.keys() - {"v"}))] == []
        return events

    def as_user(self, *command: str, uid: int = ALICE) -> str:
        """What a command of a user's prints."""
        done = subprocess.run(
            command,
            env={"PATH": "/usr/bin:/bin", "BOOTSEER_CONFIG": str(self.config), "HOME": str(self.folder / "data")},
            user=uid,
            group=uid,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def bootseer(self, *arguments: str, uid: int = ALICE) -> str:
        """Run the command line as a user."""
        return self.as_user(str(Path(sys.executable).with_name("bootseer")), *arguments, uid=uid)

    def clear(self) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                agents = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                process.kill()
                wait_until(lambda agents=agents: not any(Path("/proc", pid).exists() for pid in agents))  # type: ignore[misc]
            process.wait()
        for mount in reversed(mounts.mounts_below(self.folder)):
            with contextlib.suppress(OSError):
                mounts.unmount(mount.point, force=True)


@contextlib.contextmanager
def node_of(settings: str = "") -> Iterator[Node]:
    """A node whose folder other users may enter, unlike tmp_path; settings: more of its configuration."""
    folder = Path(tempfile.mkdtemp(prefix="bootseer-node-"))
    folder.chmod(0o755)
    node = Node(folder, settings)
    try:
        yield node
    finally:
        node.clear()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def node() -> Iterator[Node]:
    with node_of() as made:
        yield made


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def digest_of(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
