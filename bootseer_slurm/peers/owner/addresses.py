"""The addresses by which the nodes of a job reach one another."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Sequence

from bootseer_slurm.errors import InputError

_LOOK_UPS = 16  # at a time
_ANY_PORT = 9  # nothing is sent there


def addresses_of(names: Sequence[str], pattern: str, own: int) -> tuple[str, ...]:
    """The address of each node, all of one family. pattern: "{node}-ib", say. own: the number of this node.

    Raises InputError where a name has none. May take as long as the look-ups of names.
    """
    hosts = [pattern.replace("{node}", name) for name in names]
    found = _look_up_all(hosts)
    for family in (socket.AF_INET, socket.AF_INET6):
        if all(each.get(family) for index, each in enumerate(found) if index != own):
            addresses = [each.get(family, "") for each in found]
            other = addresses[own - 1]
            if not addresses[own] or is_loopback(addresses[own]) > is_loopback(other):
                addresses[own] = _own_address(family, other)  # Debian has its own name mean 127.0.1.1
            return tuple(addresses)
    without = next((host for host, each in zip(hosts, found, strict=True) if not each), hosts[0])
    raise InputError(f"{without} has no address of the family that the others have")


def _look_up_all(hosts: Sequence[str]) -> list[dict[int, str]]:
    """As `look_up`, of each. Nobody waits for these threads when the agent ends, as for an executor's."""
    found: list[dict[int, str]] = [{} for _ in hosts]
    places = iter(enumerate(hosts))
    lock = threading.Lock()

    def look_up_next() -> None:
        while True:
            with lock:
                index, host = next(places, (-1, ""))
            if index < 0:
                return
            found[index] = look_up(host)

    threads = [threading.Thread(target=look_up_next, daemon=True) for _ in hosts[:_LOOK_UPS]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def look_up(host: str) -> dict[int, str]:
    """The first address of each family that a name has; {} where it has none. May take long."""
    addresses: dict[int, str] = {}
    try:
        for family, _, _, _, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            addresses.setdefault(family, str(place[0]))
    except (OSError, UnicodeError):
        return {}
    return addresses


def is_loopback(address: str) -> bool:
    """Whether it means whatever machine one is on."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _own_address(family: int, other: str) -> str:
    """The address from which this node reaches another one. Raises InputError."""
    with socket.socket(family, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect((other, _ANY_PORT))
        except OSError as error:
            raise InputError(f"{other} cannot be reached: {error.strerror}") from error
        return str(ipaddress.ip_address(asked.getsockname()[0].partition("%")[0]))
