"""Peers as `bootseer doctor` shows them: this node's own part, and which nodes of a list can be reached.

Owns the words and the table; peers.owner tries.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bootseer_slurm.config import Config
from bootseer_slurm.errors import InputError

if TYPE_CHECKING:
    from bootseer_slurm.peers.owner.reachability import Reached

_MANY = 16  # nodes: fewer need no bar
_PORT_START = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def state(config: Config) -> tuple[bool | None, str]:
    """Whether this node can be a peer, None where that is not certain, and what it means."""
    from bootseer_slurm.image.signing import read_key
    from bootseer_slurm.peers.owner.addresses import is_loopback, look_up

    if config.peers.mode == "off":
        return False, "off by configuration: [peers] mode"
    key = read_key(config.image.site_key)
    if not key and os.geteuid() == 0:
        return False, f"no site key: nodes exchange nothing (bootseer image make-key): {key.reason}"
    host = config.peers.address.replace("{node}", own_name())
    addresses = list(look_up(host).values())
    shown = f"{host} is {' and '.join(addresses)}"
    if not addresses:
        return False, f"{host} has no address: nodes of a job exchange nothing ([peers] address)"
    others = [address for address in addresses if not is_loopback(address)]
    free, where = _free_ports((others or ["0.0.0.0"])[0], config.peers.ports)
    ports = f"{len(free)} of ports {_shown(config.peers.ports)} are free"
    if where:
        return False, f"{shown}, which is no address of this node: others cannot connect to it"
    doubts = []
    if not free:
        doubts.append("nodes that this one has not connected to get nothing from it")
    if not others:
        doubts.append("`bootseer doctor --peers` on another node shows the address that it has there")
    if not key:
        doubts.append("root sees whether there is a site key, which peers need")
    return (None, "; ".join([shown, ports, *doubts])) if doubts else (True, f"on: {shown}; {ports}")


def show_reach(config: Config, nodelist: str) -> bool:
    """Try the nodes of a hostlist, and print a table; gives whether all can be peers. Raises InputError."""
    from bootseer_slurm.peers.owner.reachability import Answer, reach
    from bootseer_slurm.slurm.hostlist import expand

    names = list(dict.fromkeys(expand(nodelist)))
    if not names:
        raise InputError("the nodelist is empty", hint='for instance --peers "$SLURM_JOB_NODELIST"')
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=len(names) < _MANY) as progress:
        task = progress.add_task("names and ports", total=2 * len(names))
        found = reach(
            names,
            config.peers.address,
            config.peers.ports,
            own=own_name(),
            advance=lambda: progress.advance(task),
        )
    bad = {Answer.SILENT, Answer.NO_ADDRESS}
    table = Table(show_edge=False, pad_edge=False)
    for title in ("node", "address", "answer", "what it means"):
        table.add_column(title, overflow="fold")
    for each in sorted(found, key=lambda each: each.answer in bad):  # what is bad is last, and in sight
        colour = "red" if each.answer in bad else "green"
        table.add_row(each.node, each.address or "", f"[{colour}]{each.answer.value}[/]", _meaning(each))
    out = Console(highlight=False)
    out.print(table)
    counts = Counter(each.answer for each in found)
    out.print("nodes:", ", ".join(f"{counts[each]} {each.value}" for each in Answer if counts[each]))
    return not bad & set(counts)


def own_name() -> str:
    """This node, as its agent names it."""
    return os.uname().nodename.split(".")[0]


def _meaning(reached: Reached) -> str:
    from bootseer_slurm.peers.owner.addresses import is_loopback
    from bootseer_slurm.peers.owner.reachability import PATIENCE_S, Answer

    ports = _shown(reached.ports)
    match reached.answer:
        case Answer.ACCEPTED:
            return f"a job's peer, or another program, listens on {ports}"
        case Answer.REFUSED:
            return "the machine is there and nothing listens: fine while no job with peers runs"
        case Answer.SILENT:
            return f"no answer of {ports} in {PATIENCE_S:g} s: a firewall, or the machine is off"
        case Answer.NO_ADDRESS:
            pass
    if not reached.found:
        return f"{reached.host} is not known here: a job with this node has no peers"
    if all(map(is_loopback, reached.found)):
        return f"{reached.host} is {reached.found[0]} here, which is this machine itself"
    return f"{reached.host} is {reached.found[0]} only, and the others have addresses of another family"


def _free_ports(address: str, ports: Sequence[int]) -> tuple[list[int], bool]:
    """The ports on which a job's user may listen now; and whether the address is not this node's."""
    try:
        first = int(_PORT_START.read_text())
    except (OSError, ValueError):
        first = 1024
    free = []
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        try:
            tried.bind((address, 0))
        except OSError:
            return [], True
    for port in ports:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((address, port))
                tried.listen(1)
            except OSError:
                continue
        if port >= first:
            free.append(port)
    return free, False


def _shown(ports: Sequence[int]) -> str:
    """7070-7085,7090"""
    runs: list[list[int]] = []
    for port in ports:
        if runs and port == runs[-1][-1] + 1:
            runs[-1].append(port)
        else:
            runs.append([port])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
