"""The time that prolog and epilog of each job take on each node, as Slurm runs them: the hook, whole.

Slurm runs a folder's files in reverse order of their names. A first and a last one write the time, which
costs two processes of 1 ms each.
"""

from __future__ import annotations

from pathlib import Path

from .client import Cluster

_STAMP = """#!/bin/sh
echo "{kind} $SLURM_JOB_ID {mark} $(/bin/date +%s.%N)" >> {folder}/hooks.$SLURMD_NODENAME
"""


def stamp_hooks(cluster: Cluster, folder: Path) -> None:
    """Have each prolog and epilog write when it begins and ends, into a folder below /tmp."""
    for kind in ("prolog", "epilog"):
        for name, mark in (("99-stamp", "begins"), ("01-stamp", "ends")):
            path = cluster.state_dir / "etc" / "slurm" / f"{kind}.d" / name
            path.write_text(_STAMP.format(kind=kind, mark=mark, folder=folder))
            path.chmod(0o755)


def unstamp_hooks(cluster: Cluster) -> None:
    """Take out what `stamp_hooks` put in."""
    for path in (cluster.state_dir / "etc" / "slurm").glob("*log.d/*-stamp"):
        path.unlink()


def hook_times(folder: Path) -> dict[str, list[float]]:
    """The seconds of each prolog ("prolog") and epilog ("epilog") that has ended."""
    times: dict[str, list[float]] = {"prolog": [], "epilog": []}
    for path in folder.glob("hooks.*"):
        begun: dict[tuple[str, str], float] = {}
        for line in path.read_text().splitlines():
            kind, job, mark, seconds = line.split()
            if mark == "begins":
                begun[kind, job] = float(seconds)
            elif (kind, job) in begun:
                times[kind].append(float(seconds) - begun.pop((kind, job)))
    return times


def clear_hook_times(folder: Path) -> None:
    """Forget the times so far."""
    for path in folder.glob("hooks.*"):
        path.unlink()
