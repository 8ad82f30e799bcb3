"""Engines that share a file among nodes, beside the same nodes without any: can one of them carry peers?

Needs root and no cluster. A store and four nodes are network namespaces; the store's link is limited, and
the nodes' links are wide. It installs no engine: it says which it found and how to get the others. Arms take
turns, and medians of the rounds count. docs/bench-peers-engines.md has the figures and the decision.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console

from scripts.lib.bench.digest import processor
from scripts.lib.bench.engines_arms import ARMS, Arm, Inputs, Result, run_arm
from scripts.lib.bench.engines_network import network
from scripts.lib.bench.rows import Row
from scripts.lib.bench.spinner import spinner
from scripts.lib.cluster.network import rate_bits

NODES = 4
ROUNDS = 3
SIZE_BYTES = 256 * 2**20
PARTS = ("1gbit", "250mbit")
# After this part of the floor each node wants 256 KiB that the transfer has most likely not brought yet.
_DEMAND_AT = 0.25
_SEED = 15

GET = {
    "aria2": "apt-get install aria2",
    "libtorrent": ".venv/bin/pip install libtorrent, or apt-get install python3-libtorrent",
}


def run(only: str = "") -> list[Row]:
    """All rows, or those of one rate of the store's link. Raises ClusterError."""
    programs, versions = found()
    arms = [arm for arm in ARMS if arm.engine in versions]
    console = Console()
    for engine, how in GET.items():
        state = f"found, {versions[engine]}" if engine in versions else f"not found; {how}"
        console.print(f"{engine}: {state}", style="dim", markup=False)
    before = signal.signal(signal.SIGTERM, _stop)  # so that the namespaces go also then
    try:
        with tempfile.TemporaryDirectory(prefix="bs-eng-", dir="/var/tmp") as name:
            inputs = made_file(Path(name), programs)
            rows = []
            for rate in [only] if only else PARTS:
                rows += rows_of(rate, arms, measured(rate, arms, inputs), versions)
            return rows
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: object) -> None:
    raise SystemExit(1)


def measured(rate: str, arms: list[Arm], inputs: Inputs) -> dict[str, list[Result]]:
    """The results of all rounds, by the arm's name."""
    results: dict[str, list[Result]] = {arm.name: [] for arm in arms}
    chance = random.Random(_SEED)  # the same offsets in each run of the benchmark
    with spinner(rate) as step, network(NODES) as machines:
        machines.limit_store(rate)
        for number in range(ROUNDS):
            for arm in arms:
                step(f"{rate}: {arm.name}, round {number + 1} of {ROUNDS}")
                wait_s = _DEMAND_AT * floor_s(rate)
                results[arm.name].append(run_arm(machines, arm, inputs, wait_s, chance))
    return results


def floor_s(rate: str) -> float:
    """How long the store's link takes for one copy of the file."""
    return SIZE_BYTES * 8 / rate_bits(rate)


def rows_of(
    rate: str, arms: list[Arm], results: dict[str, list[Result]], versions: dict[str, str]
) -> list[Row]:
    """The rows of one rate."""
    floor = floor_s(rate)
    found_s = {arm.name: _medians(results[arm.name]) for arm in arms}
    alone = found_s[ARMS[0].name]
    rows = []
    for arm in arms:
        each = found_s[arm.name]
        how = f"{NODES} nodes, {SIZE_BYTES / 2**20:.0f} MiB, the store's link {rate}, the nodes' wide; the "
        how += "file in the store's page cache, the nodes empty; "
        how += f"medians of {ROUNDS}, arms in turns; {machine()}"
        how += "".join(f"; {engine} {version}" for engine, version in versions.items() if version)
        sent = max(0.0, 1 - each["copies"] / NODES)  # of each byte received, the part that a node has sent
        title = f"{rate}, {arm.name}"
        target = None if arm.engine == "direct" else 1.0
        rows += [
            Row(f"{title}: last node", each["last_s"], "s", target and 1.1 * floor + 1, floor, how),
            Row(f"{title}: last/first", each["spread"], "×", target and 1.15, 1.0, how),
            Row(f"{title}: read from the store", each["copies"], "copies", target and 1.05, 1.0, how),
            Row(
                f"{title}: CPU of the nodes",
                each["cpu"],
                "core-s/GB",
                target and 1.2 + 0.35 * sent,
                alone["cpu"],
                how + "; received by all nodes; limit: without an engine",
            ),
            Row(f"{title}: both cores, busy", each["busy"] * 100, "%", None, None, how),
            Row(f"{title}: 256 KiB during the transfer", each["demand_s"], "s", None, alone["demand_s"], how),
        ]
        if "stranger" in each:
            metric = f"{title}: bytes given to another user who asks"
            rows.append(Row(metric, each["stranger"] * 100, "% of runs", 0.0, None, how))
        if "quiet_s" in each:
            metric = f"{title}: 256 KiB, nothing else going"
            rows.append(Row(metric, each["quiet_s"], "s", None, alone["quiet_s"], how))
    return rows


def _medians(results: list[Result]) -> dict[str, float]:
    received_gb = NODES * SIZE_BYTES / 1e9
    figures = {
        "last_s": median(each.last_node_s for each in results),
        "spread": median(each.last_node_s / each.first_node_s for each in results),
        "copies": median(each.store_bytes / SIZE_BYTES for each in results),
        "cpu": median(each.cpu_s / received_gb for each in results),
        "busy": median(each.busy for each in results),
        "demand_s": median(first_s for each in results for first_s in each.firsts_s),
    }
    quiet_s = [each.first_quiet_s for each in results if each.first_quiet_s is not None]
    asked = [each.stranger_got for each in results if each.stranger_got is not None]
    if asked:
        figures["stranger"] = sum(asked) / len(asked)
    return figures | ({"quiet_s": median(quiet_s)} if quiet_s else {})


def made_file(folder: Path, programs: dict[str, str]) -> Inputs:
    """A file of random bytes, all of it in the page cache."""
    path = folder / "file"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(SIZE_BYTES // 2**20):
            block = os.urandom(2**20)
            digest.update(block)
            file.write(block)
    return Inputs(path, SIZE_BYTES, digest.hexdigest(), programs)


def found() -> tuple[dict[str, str], dict[str, str]]:
    """The programs of the engines that this machine has, and the version of each of these engines."""
    programs: dict[str, str] = {}
    versions = {"direct": ""}
    if aria2c := shutil.which("aria2c"):
        programs["aria2c"] = aria2c
        versions["aria2"] = _first_line(aria2c, "--version").split()[-1]
    for python in (sys.executable, "/usr/bin/python3"):
        if version := _first_line(python, "-c", "import libtorrent; print(libtorrent.version)"):
            programs["python with libtorrent"] = python
            versions["libtorrent"] = version
            break
    return programs, versions


def _first_line(*command: str) -> str:
    """The first line that a command prints, or nothing where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else ""


def machine() -> str:
    """The machine, in words."""
    return f"{processor()}, {os.cpu_count()} cores, Linux {os.uname().release.split('-')[0]}"
