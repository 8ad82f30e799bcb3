"""A running cluster as an object: what tests, demo and benchmarks do with scripts/cluster."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import network, settings
from .layout import DEFAULT_DIR, REPO, STORE, ClusterError, Layout, live

SCRIPT = REPO / "scripts" / "cluster"
BOOTSEER = str(settings.COMMAND)
HOOK = str(settings.HOOK)
ALICE = settings.USERS["alice"]
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
    """The cluster below `state_dir`. Machines: "n1" ..., "login", "store"; users: alice, bob (None: root)."""

    state_dir: Path
    node_count: int = 3

    @classmethod
    def default(cls, node_count: int = 3) -> Cluster:
        """The one that scripts/cluster uses."""
        return cls(Path(os.environ.get("BOOTSEER_CLUSTER_DIR", DEFAULT_DIR)), node_count)

    @property
    def nodes(self) -> list[str]:
        """Names of the compute nodes."""
        return [f"n{number}" for number in range(1, self.node_count + 1)]

    @property
    def shared(self) -> Path:
        """The folder on this host that is /shared in the cluster."""
        return self.state_dir / "shared"

    @property
    def up(self) -> bool:
        """Whether it runs."""
        return self.script("env", check=False).returncode == 0

    @property
    def store_sent_bytes(self) -> int:
        """The bytes that the store server has sent over its link until now."""
        return network.sent_bytes(live(Layout(self.state_dir)), STORE)

    def script(
        self, *args: str, timeout_s: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run scripts/cluster itself. Raises ClusterError with what it printed, unless check is off."""
        done = subprocess.run(
            [SCRIPT, *args],
            env=_environ(self.state_dir),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise ClusterError(
                f"scripts/cluster {' '.join(args)} failed ({done.returncode}):\n{done.stdout}{done.stderr}"
            )
        return done

    def exec(
        self, node: str, *command: str, user: str | None = None, input_text: str = "", timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a machine; whoever calls looks at the exit status."""
        return subprocess.run(
            _argv(node, command, user),
            env=_environ(self.state_dir),
            input=input_text,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def run(self, node: str, *command: str, user: str | None = None, timeout_s: float = 60) -> str:
        """The output of a command that is run in a machine. Raises ClusterError when it fails."""
        done = self.exec(node, *command, user=user, timeout_s=timeout_s)
        if done.returncode != 0:
            raise ClusterError(f"{' '.join(command)} failed on {node}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def start(self, node: str, *command: str) -> subprocess.Popen[str]:
        """Start a command in a machine, as root, with pipes to its stdin and stdout."""
        return subprocess.Popen(
            _argv(node, command),
            env=_environ(self.state_dir),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def sbatch(self, script_text: str, *args: str, user: str = "alice") -> int:
        """Submit a batch script on the login node, from the user's home, and return the job id."""
        if not script_text.startswith("#!"):
            script_text = f"#!/bin/bash\n{script_text}"
        done = self.exec("login", "sbatch", "--parsable", *args, user=user, input_text=script_text)
        match = re.match(r"\d+", done.stdout)
        if done.returncode != 0 or not match:
            raise ClusterError(f"sbatch failed ({done.returncode}): {done.stdout}{done.stderr}")
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
                raise ClusterError(
                    f"job {job_id} did not end in {timeout_s:g} s: {done.stdout}{done.stderr}\n{queue}"
                )
            time.sleep(0.2)

    def agent(self, node: str, action: str) -> None:
        """Start, stop, kill, crash or hang the agent of a node."""
        self.script("agent", node, action)


def _environ(state_dir: Path) -> dict[str, str]:
    return os.environ | {"BOOTSEER_CLUSTER_DIR": str(state_dir)}


def _argv(node: str, command: Sequence[str], user: str | None = None) -> list[str]:
    return [str(SCRIPT), "exec", *(["--user", user] if user else []), node, *command]
