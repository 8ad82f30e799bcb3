"""Two nodes that connect to each other at once: one connection stays, and nothing that was said is lost."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from bootseer_slurm.peers.child.links import Ended, Event, Heard, Links
from bootseer_slurm.peers.child.proving import Proven
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.local import Order
from bootseer_slurm.peers.messages import Pending

CHUNK = Chunk("ab" * 32, 0)


@dataclass
class End:
    """One node's links."""

    node: int

    def __post_init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        addresses = ("127.0.0.1", "127.0.0.1")
        order = Order(0, 0, (), bytes(32), self.node, addresses, (1,), ((0, 1),), 1e9, 1)
        self.links = Links(self.selector, order, lambda *_: None)

    def connected(self, link: socket.socket, *, is_own: bool) -> None:
        """A connection has been proven."""
        self.links.proving._results.append(Proven(1 - self.node, link, is_own))

    def turn(self) -> list[Event]:
        for key, mask in self.selector.select(0):
            key.data(mask, 0.0)
        return self.links.events(0.0)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        made = socket.create_connection(listening.getsockname())
        return made, listening.accept()[0]


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    low, high = End(0), End(1)
    yield low, high
    for end in (low, high):
        end.links.leave(1 - end.node)
        end.selector.close()


@pytest.mark.parametrize("lower_is_first", [True, False])
def test_of_two_connections_the_one_that_the_lower_node_made_stays(
    ends: tuple[End, End], lower_is_first: bool
) -> None:
    low, high = ends
    by_low, by_high = tcp_pair(), tcp_pair()
    heard: dict[int, list[int]] = {0: [], 1: []}

    def turns(count: int) -> None:
        for _ in range(count):
            for end in ends:
                for event in end.turn():
                    assert not isinstance(event, Ended), "nothing that was asked is in vain"
                    assert isinstance(event, Heard) and isinstance(event.what, Pending)
                    heard[end.node].append(event.what.hops)

    def say(hops: int) -> None:
        for end in ends:
            end.links.send(1 - end.node, Pending(CHUNK, hops))

    for number, is_lows in enumerate((lower_is_first, not lower_is_first)):
        made, accepted = by_low if is_lows else by_high
        low.connected(made if is_lows else accepted, is_own=is_lows)
        high.connected(accepted if is_lows else made, is_own=not is_lows)
        turns(1)
        say(number)
    turns(20)
    say(2)
    turns(5)
    assert heard == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert by_high[0].fileno() == by_high[1].fileno() == -1 and by_low[0].fileno() != -1
