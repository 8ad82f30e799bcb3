"""The node without Slurm (scripts.lib.node) as tests use it: what they ask it and do to it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from bootseer_slurm import mounts
from bootseer_slurm.agentapi import protocol
from bootseer_slurm.event_table import unlisted
from scripts.lib.cluster.layout import ClusterError, poll
from scripts.lib.node import Node as _Node

ALICE, BOB = 54321, 54322
# What a test changes in the agent's process can name these.
_BEFORE = "import sys, threading, time\nfrom bootseer_slurm.job import session\n"
_BEFORE += "from bootseer_slurm.service import agent, departures, endings, layouts, sessions, supervisor\n"
_BEFORE += "from bootseer_slurm.service.sockets import limits, parking, server\n"


def unit_rights(unit: str) -> list[str]:
    """The beginning of a command that has the rights of a unit, so that these suffice for all that it does."""
    path = Path(__file__).resolve().parents[2] / "conf/systemd" / unit
    lines = [line.partition("=") for line in path.read_text().splitlines()]
    kept = [name for key, _, names in lines if key == "CapabilityBoundingSet" for name in names.split()]
    assert kept and ("NoNewPrivileges", "=", "yes") in lines
    bounds = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in kept)])
    return ["setpriv", "--no-new-privs", f"--bounding-set={bounds}", "--"]


class Node(_Node):
    """A node's folder, and the agent that runs in it."""

    def launch(
        self, changes: str = "", *, prefix: Sequence[str] = (), pass_fds: Sequence[int] = (), **environ: str
    ) -> subprocess.Popen[bytes]:
        prefix = [*unit_rights("bootseer-agent.service"), *prefix]
        return super().launch(_BEFORE + changes, prefix=prefix, pass_fds=pass_fds, **environ)

    def ask(self, op: str, **fields: object) -> protocol.Message:
        """The reply to a request that brings no descriptors."""
        reply, fds = self.request(op, **fields)
        assert fds == []
        return reply

    def status(self) -> dict[str, object]:
        return dict(json.loads(protocol.first(self.ask("status"), "STATUS_JSON")))

    def jobs(self) -> set[int]:
        return {job["job"] for job in self.status()["jobs"]}  # type: ignore[attr-defined]

    @property
    def agent_pid(self) -> int:
        """Of the agent proper, the supervisor's child."""
        return int(str(self.status()["pid"]))

    def crash(self) -> None:
        """Kill the agent proper, and wait until another one answers."""
        pid = self.agent_pid
        os.kill(pid, 9)
        self.wait_for_another(pid)

    def wait_for_another(self, pid: int) -> None:
        """Wait until an agent answers that is not this one."""

        def answers() -> bool:
            with contextlib.suppress(OSError, ClusterError):  # killed in the middle of its answer
                return self.agent_pid != pid
            return False

        wait_until(answers)

    def environments(self) -> list[mounts.Mount]:
        """The mounts of environments, which the host does not see."""
        for process in self.processes:
            for link in Path(f"/proc/{process.pid}/fd").iterdir() if process.poll() is None else ():
                if os.readlink(link).startswith("mnt:["):
                    private = mounts.Namespace(os.open(link, os.O_RDONLY | os.O_CLOEXEC))
                    try:
                        return private.run(lambda: mounts.mounts_below(self.run / "env"))
                    finally:
                        private.close()
        return []

    def job_files(self) -> set[str]:
        return {path.name for path in (self.run / "jobs").iterdir()}

    def events(self, job: int, uid: int = ALICE) -> list[dict[str, object]]:
        """The job's events in the store, once its session has ended."""
        folder = self.folder / "store" / "users" / str(uid) / "events" / f"{job}.0"

        def ended() -> bool:
            return any('"session","name":"end"' in path.read_text() for path in folder.glob("*.jsonl"))

        wait_until(ended)
        events = [
            json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()
        ]
        assert [
            gap for each in events if (gap := unlisted(each["kind"], each["name"], each.keys() - {"v"}))
        ] == []
        return events

    def as_user(self, *command: str, uid: int = ALICE) -> str:
        """What a command of a user's prints."""
        done = subprocess.run(
            command,
            env={
                "PATH": "/usr/bin:/bin",
                "BOOTSEER_CONFIG": str(self.config),
                "HOME": str(self.folder / "data"),
            },
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
    assert poll(condition, timeout_s, interval_s=0.02)


def digest_of(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
