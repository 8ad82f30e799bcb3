"""Whether nodes can be reached as peers: by the address of each, and by what its ports answer.

For `bootseer doctor`: nothing of a job is needed. A connection says nothing, and is closed at once. All ports
of a node are tried side by side, and few nodes at a time.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bootseer_slurm.peers.owner.addresses import is_loopback, look_up

PATIENCE_S = 0.5
_NODES = 16  # at a time
_MOST_SOCKETS = 512  # at a time: a process may have 1024 files


class Answer(enum.Enum):
    """What a node says; SILENT and NO_ADDRESS keep a job's nodes from one another."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    SILENT = "silent"
    NO_ADDRESS = "no address"


@dataclass(frozen=True, slots=True)
class Reached:
    """What is known of one node. ports: those that gave this answer. found: all addresses of its name."""

    node: str
    host: str
    address: str | None
    answer: Answer
    ports: tuple[int, ...] = ()
    found: tuple[str, ...] = ()


def reach(
    names: Sequence[str], pattern: str, ports: Sequence[int], *, own: str, advance: Callable[[], object]
) -> list[Reached]:
    """Try all these nodes. pattern: as of `addresses_of`. own: the name of this node.

    advance: is called twice for each node, from any thread. Takes as long as look-ups of names, and 0.5 s for
    every 16 nodes or fewer.
    """
    hosts = [pattern.replace("{node}", name) for name in names]

    def find(host: str) -> dict[int, str]:
        found = look_up(host)
        advance()
        return found

    def probe(name: str, host: str, found: dict[int, str]) -> Reached:
        address = found.get(family)
        if address is None or (name != own and _is_elsewhere(host, address)):
            advance()
            return Reached(name, host, None, Answer.NO_ADDRESS, found=tuple(found.values()))
        answer, answering = knock(address, ports)
        advance()
        return Reached(name, host, address, answer, answering)

    nodes = max(1, min(_NODES, _MOST_SOCKETS // len(ports), len(names)))
    with ThreadPoolExecutor(nodes) as pool:
        addresses = list(pool.map(find, hosts))
        # Nodes of a job have addresses of one family: IPv4 unless more of them have IPv6.
        counts = Counter(family for found in addresses for family in found)
        family = max((socket.AF_INET, socket.AF_INET6), key=lambda each: counts[each])
        return list(pool.map(probe, names, hosts, addresses))


def knock(address: str, ports: Sequence[int]) -> tuple[Answer, tuple[int, ...]]:
    """Try a connection to each port; gives the answer of the node, and the ports that gave it.

    A silent port counts more than others: peers may have to use just that one.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    answers = dict.fromkeys(ports, Answer.SILENT)
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for port in ports:
            link = stack.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            error = link.connect_ex((address, port))
            if error == errno.EINPROGRESS:
                selector.register(link, selectors.EVENT_WRITE, (port, link))
            else:
                answers[port] = _answer(error)
        until_s = time.monotonic() + PATIENCE_S
        while selector.get_map() and (left_s := until_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                port, link = key.data
                answers[port] = _answer(link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
                selector.unregister(link)
    for answer in (Answer.SILENT, Answer.ACCEPTED):
        if given := tuple(port for port, each in answers.items() if each is answer):
            return answer, given
    return Answer.REFUSED, tuple(ports)


def _is_elsewhere(host: str, address: str) -> bool:
    """Whether a name of another node leads back to this one."""
    return is_loopback(address) and host != address


def _answer(error: int) -> Answer:
    """Of a connection that ended so. No way to the node is no answer of it."""
    if not error:
        return Answer.ACCEPTED
    return Answer.REFUSED if error == errno.ECONNREFUSED else Answer.SILENT
