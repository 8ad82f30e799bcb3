"""The peers of a job on real TCP, beside the same nodes without them, and beside aria2 where it is installed.

Needs root and no cluster. A store and the nodes are network namespaces; the store's link is limited, and the
nodes' links are wide (engines_network.py). Each node has a peer process, and an owner that stands for the
agent (peers_owner.py). Arms take turns, and medians of the rounds count. docs/bench-peers.md has figures.
"""

from __future__ import annotations

import random
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from scripts.lib.bench.engines import SIZE_BYTES, found, machine, made_file
from scripts.lib.bench.engines_arms import ARMS, Arm, Inputs, Result, run_arm
from scripts.lib.bench.engines_network import network
from scripts.lib.bench.peers_owner import digests_of
from scripts.lib.bench.rows import Row
from scripts.lib.bench.spinner import spinner
from scripts.lib.cluster.network import rate_bits

ROUNDS = 3
PEERS = Arm("peers", "peers")
SKEWED = Arm("peers, 2 s apart", "peers", skew_s=2.0)
DISTURBED = "peers, one killed, one slow"
# After this part of the floor each node wants 256 KiB that the transfer has most likely not brought yet.
_DEMAND_AT = 0.25
_SEED = 15


@dataclass(frozen=True)
class Setup:
    """So many nodes, and the store's link. copies: that may be read. slow: a tenth of that link.

    with_others: measure what is beside the peers too; 16 nodes alone would take two minutes a round.
    """

    nodes: int
    rate: str
    slow: str
    copies: float
    with_others: bool = True

    @property
    def floor_s(self) -> float:
        """How long the store's link takes for one copy."""
        return SIZE_BYTES * 8 / rate_bits(self.rate)


_SETUPS = {
    "4": Setup(4, "1gbit", "100mbit", 1.05),
    "8": Setup(8, "500mbit", "50mbit", 1.05),
    "16": Setup(16, "250mbit", "25mbit", 1.1, with_others=False),
}
PARTS = tuple(_SETUPS)


def run(only: str = "") -> list[Row]:
    """All rows, or those of so many nodes. Raises ClusterError."""
    programs, versions = found()
    others = [arm for arm in ARMS[:2] if arm.engine in versions]
    # Only our own Python has what the peers need.
    programs = {name: path for name, path in programs.items() if name == "aria2c"}
    before = signal.signal(signal.SIGTERM, _stop)  # so that the namespaces go also then
    try:
        with tempfile.TemporaryDirectory(prefix="bs-eng-", dir="/var/tmp") as name:
            inputs = made_file(Path(name), programs)
            content = inputs.path.read_bytes()
            inputs.path.with_name(inputs.path.name + ".digests").write_bytes(digests_of(content))
            del content
            rows = []
            for part in [only] if only else PARTS:
                setup = _SETUPS[part]
                arms = [
                    *(others if setup.with_others else ()),
                    PEERS,
                    SKEWED,
                    Arm(DISTURBED, "peers", slow=setup.slow),
                ]
                rows += _rows(setup, arms, _measured(setup, arms, inputs), versions.get("aria2", ""))
            return rows
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: object) -> None:
    raise SystemExit(1)


def _measured(setup: Setup, arms: list[Arm], inputs: Inputs) -> dict[str, list[Result]]:
    """The results of all rounds, by the arm's name."""
    results: dict[str, list[Result]] = {arm.name: [] for arm in arms}
    chance = random.Random(_SEED)  # the same offsets in each run of the benchmark
    with spinner("peers") as step, network(setup.nodes) as machines:
        machines.limit_store(setup.rate)
        for number in range(ROUNDS):
            for arm in arms:
                step(f"{setup.nodes} nodes, {setup.rate}: {arm.name}, round {number + 1} of {ROUNDS}")
                wait_s = _DEMAND_AT * setup.floor_s
                results[arm.name].append(run_arm(machines, arm, inputs, wait_s, chance))
    return results


def _rows(setup: Setup, arms: list[Arm], results: dict[str, list[Result]], aria2: str) -> list[Row]:
    floor_s = setup.floor_s
    how = (
        f"{SIZE_BYTES / 2**20:.0f} MiB, the store's link {setup.rate}, the nodes' wide; the file in the "
        f"store's page cache, the nodes empty; medians of {ROUNDS}, arms in turns; {machine()}"
    ) + (f"; aria2 {aria2}" if aria2 else "")
    figures = {
        arm.name: _Figures.of(results[arm.name], (setup.nodes - 2 * bool(arm.slow)) * SIZE_BYTES / 1e9)
        for arm in arms
    }
    alone, quiet = figures.get(ARMS[0].name), figures[PEERS.name]
    rows = []
    for arm in arms:
        each = figures[arm.name]
        targets = _targets(arm, setup, each, quiet)
        title = f"{setup.nodes} nodes, {arm.name}"
        rows += [
            Row(f"{title}: last node", each.last_s, "s", targets.last_s, max(floor_s, arm.skew_s), how),
            Row(f"{title}: last/first", each.spread, "×", targets.spread, 1.0, how),
            Row(f"{title}: read from the store", each.copies, "copies", targets.copies, 1.0, how),
            Row(f"{title}: CPU", each.cpu, "core-s/GB", targets.cpu, alone.cpu if alone else None, how),
            Row(f"{title}: cores, busy", each.busy * 100, "%", None, None, how),
            Row(f"{title}: 256 KiB during", each.demand_s, "s", None, alone.demand_s if alone else None, how),
        ]
        if each.quiet_s is not None:
            rows.append(
                Row(f"{title}: 256 KiB alone", each.quiet_s, "s", None, alone.quiet_s if alone else None, how)
            )
    return rows


@dataclass(frozen=True)
class _Targets:
    """What an arm's figures may be at most."""

    last_s: float | None = None
    spread: float | None = None
    copies: float | None = None
    cpu: float | None = None


def _targets(arm: Arm, setup: Setup, figures: _Figures, quiet: _Figures) -> _Targets:
    """Those of our arms. quiet: the figures of PEERS."""
    if arm is PEERS:
        sent = max(0.0, 1 - figures.copies / setup.nodes)  # of each byte received, what a node has sent
        return _Targets(1.1 * setup.floor_s + 1, 1.15, setup.copies, 1.2 + 0.35 * sent)
    if arm is SKEWED:
        return _Targets(copies=1.1)
    return _Targets(1.15 * quiet.last_s, copies=1.2) if arm.name == DISTURBED else _Targets()


@dataclass(frozen=True)
class _Figures:
    """Medians of one arm. cpu: core-seconds of the nodes for each GB that they received."""

    last_s: float
    spread: float
    copies: float
    cpu: float
    busy: float
    demand_s: float
    quiet_s: float | None

    @classmethod
    def of(cls, results: list[Result], received_gb: float) -> _Figures:
        quiet_s = [each.first_quiet_s for each in results if each.first_quiet_s is not None]
        return cls(
            median(each.last_node_s for each in results),
            median(each.last_node_s / each.first_node_s for each in results),
            median(each.store_bytes / SIZE_BYTES for each in results),
            median(each.cpu_s / received_gb for each in results),
            median(each.busy for each in results),
            median(first_s for each in results for first_s in each.firsts_s),
            median(quiet_s) if quiet_s else None,
        )
