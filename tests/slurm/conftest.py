"""A real Slurm cluster for tests (scripts/cluster): three nodes, two users, shared storage over the network.

The session takes the cluster that is up, or brings one up and takes it down at its end. Tests of other
folders get the same fixture by `pytest_plugins` or by lying here.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "cluster"
NODES = 3
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Cluster:
    """The cluster below `state_dir`. Nodes: "n1" ... and "login"; users: "alice" and "bob" (None: root)."""

    state_dir: Path

    @property
    def nodes(self) -> list[str]:
        """Names of the compute nodes."""
        return [f"n{number}" for number in range(1, NODES + 1)]

    @property
    def shared(self) -> Path:
        """The folder on this host that is /shared in the cluster."""
        return self.state_dir / "shared"

    @property
    def logs(self) -> Path:
        """The folder of the daemons' logs: slurmctld.log, n1.slurmd.log, n1.agent.log, ..."""
        return self.state_dir / "log"

    def script(
        self, *args: str, timeout_s: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run scripts/cluster itself; a failure fails the test with what it printed, unless check is off."""
        env = os.environ | {"BOOTSEER_CLUSTER_DIR": str(self.state_dir)}
        done = subprocess.run(
            [SCRIPT, *args], env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode != 0:
            pytest.fail(
                f"scripts/cluster {' '.join(args)} failed ({done.returncode}):\n{done.stdout}{done.stderr}"
            )
        return done

    def exec(
        self, node: str, *command: str, user: str | None = None, input_text: str = "", timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a node; whoever calls looks at the exit status."""
        env = os.environ | {"BOOTSEER_CLUSTER_DIR": str(self.state_dir)}
        argv = [str(SCRIPT), "exec", *(["--user", user] if user else []), node, *command]
        return subprocess.run(
            argv, env=env, input=input_text, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def sbatch(self, script_text: str, *args: str, user: str = "alice") -> int:
        """Submit a batch script on the login node, from the user's home, and return the job id."""
        if not script_text.startswith("#!"):
            script_text = f"#!/bin/bash\n{script_text}"
        done = self.exec("login", "sbatch", "--parsable", *args, user=user, input_text=script_text)
        match = re.match(r"\d+", done.stdout)
        if done.returncode != 0 or not match:
            pytest.fail(f"sbatch failed ({done.returncode}): {done.stdout}{done.stderr}")
        return int(match[0])

    def wait(self, job_id: int, timeout_s: float = 60) -> str:
        """Wait until sacct has the end of a job and return its state, of an array as "COMPLETED,FAILED"."""
        deadline = time.monotonic() + timeout_s
        while True:
            done = self.exec("login", "sacct", "-nPX", "-j", str(job_id), "-o", "State,End,JobName")
            rows = [line.split("|", 2) for line in done.stdout.splitlines()]
            # "CANCELLED by 0" is a state too.
            states = {state.split()[0] for state, _, _ in rows}
            # slurmctld tells slurmdbd of started jobs every 5 s. One that ended sooner is "allocation" until
            # then.
            if (
                rows
                and states <= ENDED
                and all(end != "Unknown" and name != "allocation" for _, end, name in rows)
            ):
                return ",".join(sorted(states))
            if time.monotonic() > deadline:
                queue = self.exec("login", "scontrol", "show", "job", str(job_id)).stdout
                pytest.fail(
                    f"job {job_id} did not end in {timeout_s:g} s: {done.stdout}{done.stderr}\n{queue}"
                )
            time.sleep(0.2)

    def agent(self, node: str, action: str) -> None:
        """Start, stop, kill or hang the agent of a node."""
        self.script("agent", node, action)


def _no_cluster_because() -> str:
    """Why this machine cannot hold a cluster, or nothing."""
    if os.geteuid() != 0:
        return "a cluster needs root"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    if tried.returncode != 0:
        return f"a cluster needs network namespaces: {tried.stderr.decode().strip()}"
    return ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of three nodes that is up."""
    if reason := _no_cluster_because():
        pytest.skip(reason)
    instance = Cluster(Path(os.environ.get("BOOTSEER_CLUSTER_DIR", "/var/tmp/bootseer-cluster")))
    was_up = instance.script("env", check=False).returncode == 0
    # Installing packages may take its time; says so at once when it is up with another number of nodes.
    instance.script("up", "--nodes", str(NODES), timeout_s=900)
    yield instance
    if not was_up:
        instance.script("down")


@pytest.fixture
def spare_cluster() -> Iterator[Cluster]:
    """A second cluster's place, where nothing is up; taken down afterwards."""
    if reason := _no_cluster_because():
        pytest.skip(reason)
    instance = Cluster(Path(f"/var/tmp/bootseer-cluster-test-{os.getpid()}"))
    yield instance
    instance.script("down")
