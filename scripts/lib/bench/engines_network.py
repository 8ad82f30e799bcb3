"""The network of `scripts/bench peers-engines`: a switch, a store and nodes, each a network namespace.

The switch's namespace holds the bridge, so nothing is added to the host's network. The store's link is
limited in both directions; the links of the nodes are as wide as the processor allows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.cluster.layout import ClusterError, poll
from scripts.lib.cluster.network import tbf
from scripts.lib.host import output_of, run

PREFIX = "bs-eng-"
SWITCH, STORE = "switch", "store"
_SUBNET = "10.213.7"
_GONE_S = 10.0


@dataclass(frozen=True)
class Network:
    """The namespaces that are up, by the names of their machines."""

    nodes: tuple[str, ...]

    def address(self, machine: str) -> str:
        """The IPv4 address of a machine; the switch has one too."""
        place = {SWITCH: 1, STORE: 2}.get(machine) or 11 + self.nodes.index(machine)
        return f"{_SUBNET}.{place}"

    def enter(self, machine: str) -> list[str]:
        """What goes before a command that shall run on a machine."""
        return ["nsenter", f"--net=/run/netns/{PREFIX}{machine}"]

    def limit_store(self, rate: str) -> None:
        """Limit the store's link to a rate, "1gbit"."""
        for machine, device in ((STORE, "eth0"), (SWITCH, STORE)):
            run(*self.enter(machine), "tc", "qdisc", "replace", "dev", device, "root", *tbf(rate))

    def limit_node(self, node: str, rate: str) -> None:
        """Limit a node's link; "": it is wide again."""
        for machine, device in ((node, "eth0"), (SWITCH, node)):
            change = (
                ["replace", "dev", device, "root", *tbf(rate)] if rate else ["del", "dev", device, "root"]
            )
            run(*self.enter(machine), "tc", "qdisc", *change)

    def store_sent_bytes(self) -> int:
        """Bytes that the store has sent over its link since it was made."""
        shown = output_of("ip", "-n", PREFIX + STORE, "-json", "-statistics", "link", "show", "eth0")
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])


@contextlib.contextmanager
def network(node_count: int) -> Iterator[Network]:
    """Make the namespaces; they and all processes in them end with the block. Raises ClusterError."""
    if os.geteuid() != 0:
        raise ClusterError("peers-engines makes network namespaces: run it as root")
    made = Network(tuple(f"n{number + 1}" for number in range(node_count)))
    remove()  # of a run that was killed
    try:
        _namespace(SWITCH)
        run(*made.enter(SWITCH), "ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        run(*made.enter(SWITCH), "ip", "address", "add", f"{made.address(SWITCH)}/24", "dev", "br0")
        run(*made.enter(SWITCH), "ip", "link", "set", "br0", "up")
        for machine in (STORE, *made.nodes):
            _namespace(machine)
            peer = ["peer", "name", "eth0", "netns", PREFIX + machine]
            run(*made.enter(SWITCH), "ip", "link", "add", machine, "type", "veth", *peer)
            run(*made.enter(SWITCH), "ip", "link", "set", machine, "master", "br0", "up")
            run(*made.enter(machine), "ip", "address", "add", f"{made.address(machine)}/24", "dev", "eth0")
            run(*made.enter(machine), "ip", "link", "set", "eth0", "up")
        yield made
    finally:
        remove()


def remove() -> None:
    """End what runs in namespaces of ours, and remove these; none need be there."""
    for name in _ours():
        for pid in output_of("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        poll(lambda name=name: not output_of("ip", "netns", "pids", name), _GONE_S)  # type: ignore[misc]
        run("ip", "netns", "delete", name)


def _ours() -> list[str]:
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(PREFIX + "*")) if folder.is_dir() else []


def _namespace(machine: str) -> None:
    done = subprocess.run(
        ["ip", "netns", "add", PREFIX + machine], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ClusterError(f"no network namespace can be made: {done.stderr.strip()}")
    run("ip", "-n", PREFIX + machine, "link", "set", "lo", "up")
