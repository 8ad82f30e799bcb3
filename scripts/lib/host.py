"""Commands on this host, as demo and benchmarks run them: one that fails is a ClusterError."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from scripts.lib.cluster.layout import ClusterError


def run(*command: str, env: Mapping[str, str] | None = None, check: bool = True) -> None:
    """Run a command. Raises ClusterError with the end of its output when it fails, unless check is off."""
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if check and done.returncode != 0:
        raise ClusterError(f"{command[0]} failed:\n{done.stdout[-3000:]}")


def output_of(*command: str, env: Mapping[str, str] | None = None) -> str:
    """The output of a command, without the end of its last line. Raises ClusterError when it fails."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip()
