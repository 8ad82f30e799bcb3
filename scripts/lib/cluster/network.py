"""The network: a bridge in the controller's namespace, one veth pair to each other machine and to the host.

The host has one end of one pair and an address in the network, nothing else: no bridge, no route, no firewall
rule.
A pair goes with either of its namespaces, so there is nothing to take down.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from .layout import CONTROLLER, ClusterError, State, poll
from .namespaces import run

BRIDGE = "br0"
RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg])bit")
UNIT_BITS = {"k": 1e3, "m": 1e6, "g": 1e9}
# tbf takes a GSO packet whole only when the bucket holds it; else it cuts it up, packet by packet. So never
# less than two of them. And never less than what the rate delivers while the kernel is late by some
# milliseconds.
GSO_BYTES = 65536
LATE_S = 0.004
# What may wait in front of the link; more is dropped, as a switch would.
QUEUE_S = 0.05


def connect_host(state: State) -> None:
    """Make the bridge on the controller, and link the host to it."""
    layout, ctl_pid = state.layout, state.init(CONTROLLER)
    link, address = layout.host_link, layout.address(CONTROLLER)
    _ip_batch(
        ctl_pid,
        "link set lo up",
        f"link add {BRIDGE} type bridge forward_delay 0 stp_state 0",
        f"link set {BRIDGE} up",
        f"address add {address}/24 dev {BRIDGE}",
    )
    _host("ip", "link", "add", link, "type", "veth", "peer", "name", "host", "netns", str(ctl_pid))
    state.host_linked = True
    state.save()
    _ip_batch(ctl_pid, f"link set host master {BRIDGE} up")
    _host("ip", "address", "add", f"{layout.host_address}/24", "dev", link)
    _host("ip", "link", "set", link, "up")


def connect_machine(state: State, node: str) -> None:
    """Link a node or the store server (its eth0) to the bridge."""
    node_pid, ctl_pid = state.init(node), state.init(CONTROLLER)
    # nsenter with the network only: a pid on ip's command line is read in the caller's PID namespace.
    net = ["nsenter", f"--net=/proc/{ctl_pid}/ns/net"]
    _host(*net, "ip", "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", str(node_pid))
    _ip_batch(ctl_pid, f"link set {node} master {BRIDGE} up")
    _ip_batch(
        node_pid,
        "link set lo up",
        f"address add {state.layout.address(node)}/24 dev eth0",
        "link set eth0 up",
    )


def set_link(state: State, node: str, rate: str) -> None:
    """Limit a machine's link in both directions to a rate ("500mbit", "1gbit"), or not at all ("off")."""
    node_pid, ctl_pid = state.init(node), state.init(CONTROLLER)
    for pid, device in ((node_pid, "eth0"), (ctl_pid, node)):
        if rate == "off":
            if "tbf" in run(pid, ["tc", "qdisc", "show", "dev", device]):
                run(pid, ["tc", "qdisc", "del", "dev", device, "root"])
        else:
            run(pid, ["tc", "qdisc", "replace", "dev", device, "root", *tbf(rate)])
    state.links[node] = rate
    state.save()


def sent_bytes(state: State, node: str) -> int:
    """Bytes that a machine has sent over its link since it was made."""
    for line in Path(f"/proc/{state.init(node)}/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "eth0":
            return int(counters.split()[8])
    raise ClusterError(f"{node} has no link")


def tbf(rate: str) -> list[str]:
    """What `tc qdisc replace … root` needs to limit a link to a rate ("500mbit"); raises ClusterError."""
    bits = rate_bits(rate)
    burst = max(2 * GSO_BYTES, int(bits / 8 * LATE_S))
    queue = burst + int(bits / 8 * QUEUE_S)
    return ["tbf", "rate", f"{int(bits)}bit", "burst", f"{burst}b", "limit", f"{queue}b"]


def rate_bits(rate: str) -> float:
    """Bits per second of "500mbit"; raises ClusterError."""
    match = RATE.fullmatch(rate)
    if not match or float(match[1]) == 0:
        raise ClusterError(f"not a rate: {rate!r} (write 100mbit, 1gbit, off)")
    return float(match[1]) * UNIT_BITS[match[2]]


def wait_gone(state: State) -> None:
    """Wait until the host's end has gone with the controller's network namespace; raises ClusterError."""
    device = Path("/sys/class/net") / state.layout.host_link
    if state.host_linked and not poll(lambda: not device.exists(), timeout_s=30):
        raise ClusterError(f"network device {device.name} is still there: who holds its network namespace?")


def _ip_batch(pid: int, *lines: str) -> None:
    run(pid, ["ip", "-batch", "-"], input_text="\n".join(lines) + "\n")


def _host(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)}: {done.stdout.strip()}")
