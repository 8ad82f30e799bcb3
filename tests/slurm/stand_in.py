"""The stand-in for the agent (tests/spank/fake_agent.py) on a cluster's first node, and jobs that meet it.

It gives real detached mounts and writes down what it is asked; the real agent is stopped on that node meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.lib.cluster.client import Cluster

REPO = Path(__file__).resolve().parents[2]
FAKE_AGENT = REPO / "tests" / "spank" / "fake_agent.py"
NODE = "n1"
HOME = "/shared/home/alice"
SOCKET = "/run/bootseer/root.sock"


class Fake:
    """The stand-in for the agent on NODE."""

    def __init__(self, cluster: Cluster, log: str) -> None:
        self._cluster, self._log = cluster, log

    def requests(self, operation: str, count: int = 1) -> list[dict[str, Any]]:
        """What it was asked with that OP; waits until there are `count`."""
        deadline_s = time.monotonic() + 30
        while True:
            lines = self._cluster.exec(NODE, "cat", self._log).stdout.splitlines()
            found = [request for request in map(json.loads, lines) if request.get("OP") == operation]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline_s, lines
            time.sleep(0.1)


@contextmanager
def fake_agent(cluster: Cluster, *args: str) -> Iterator[Fake]:
    """Have the stand-in answer on NODE, in place of the agent."""
    cluster.agent(NODE, "stop")
    log = f"/run/fake-agent.{time.monotonic_ns()}"
    argv = [
        str(REPO / "scripts/cluster"),
        "exec",
        NODE,
        "/usr/bin/python3",
        str(FAKE_AGENT),
        SOCKET,
        log,
        *args,
    ]
    env = os.environ | {"BOOTSEER_CLUSTER_DIR": str(cluster.state_dir)}
    try:
        with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            word, pid = process.stdout.readline().split()
            assert word == "ready"
            try:
                yield Fake(cluster, log)
            finally:
                cluster.exec(NODE, "kill", pid)
    finally:
        cluster.exec(NODE, "rm", "-f", SOCKET, log)
        cluster.agent(NODE, "start")


def output(cluster: Cluster, script: str, *args: str, node: str = NODE) -> str:
    """What a batch job on one node prints; it must succeed."""
    job_id = cluster.sbatch(script, f"--nodelist={node}", "--output=out-%j", *args)
    path = cluster.shared / "home" / "alice" / f"out-{job_id}"
    state = cluster.wait(job_id)
    text = path.read_text()
    assert state == "COMPLETED", text
    return str(text)


def shown(path: Path) -> str:
    """The path in the cluster of something in `folder`."""
    return f"{HOME}/{path.parent.name}/{path.name}"


def make(path: Path, content: str) -> str:
    """Write alice's file; its path in the cluster."""
    path.write_text(content)
    os.chown(path, 20001, 20001)
    return shown(path)
