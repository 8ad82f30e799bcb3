"""The connections of a node to others: made when something is to be said, and one for each pair.

Where two nodes connect at once, the connection that the lower one made stays. Each end sends on that one as
soon as it has it. It closes its side of the other one when it has heard something on that which stays, for
then the far end has it too: so nothing is lost that was on its way. Not thread-safe.
"""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bootseer_slurm.peers.child.proving import Proven, Proving
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.local import Order
from bootseer_slurm.peers.messages import BadMessage, Message
from bootseer_slurm.peers.wire import Connection, OpenFile, Received

_MOST_LINKS = 4096
_SPARE_FILES = 256
_MOST_WAITING = 256  # messages to a node while its connection is made
_READS, _WRITES = selectors.EVENT_READ, selectors.EVENT_WRITE

# Where bytes of a chunk from a node shall lie (wire.Place).
Place = Callable[[int, Chunk, int, int], memoryview | None]
# A part of a chunk in a file: the chunk, the offset in it, the file, the offset there, and bytes.
Part = tuple[Chunk, int, OpenFile, int, int]


@dataclass(frozen=True, slots=True)
class Heard:
    """A node has said something, or sent bytes of a chunk."""

    node: int
    what: Message | Received


@dataclass(frozen=True, slots=True)
class Sent:
    """So many frames of bytes to a node have left."""

    node: int
    frames: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A node cannot be reached, or its connection ended: what it was asked is not answered.

    is_silent: it did not refuse either.
    """

    node: int
    is_silent: bool = False


Event = Heard | Sent | Ended


@dataclass(eq=False, slots=True)
class Link:
    """A connection. is_retired: this end says nothing more on it. has_ended: the far end does not."""

    node: int
    socket: socket.socket
    connection: Connection
    is_own: bool
    waits_for: int = _READS
    is_retired: bool = False
    has_ended: bool = False


class Links:
    """All proven connections of this node."""

    def __init__(self, selector: selectors.BaseSelector, order: Order, place: Place) -> None:
        self._selector = selector
        self._node = order.node
        self._place = place
        self._links: dict[int, dict[bool, Link]] = {}  # of a node, by whether this one made it
        self._waiting: dict[int, list[Message]] = {}
        self._touched: dict[Link, None] = {}
        self._events: list[Event] = []
        self._most = min(_MOST_LINKS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES)
        self.proving = Proving(selector, order)

    def send(self, node: int, message: Message, dial_s: float | None = None) -> None:
        """Say something to a node. dial_s: the time, where it is to be connected first; else it has to be."""
        link = self.link(node)
        if link is not None:
            try:
                link.connection.send(message)
            except BadMessage:
                self.leave(node)
            else:
                self._touched[link] = None
        elif dial_s is not None:
            waiting = self._waiting.setdefault(node, [])
            if len(waiting) < _MOST_WAITING:
                waiting.append(message)
            self.proving.dial(node, dial_s)

    def send_bytes(self, node: int, parts: Iterable[Part]) -> bool:
        """Send bytes of a chunk to a node; gives whether it is connected."""
        link = self.link(node)
        if link is None:
            return False
        for part in parts:
            link.connection.send_bytes(*part)
        self._touched[link] = None
        return True

    def ignore(self, node: int, chunk: Chunk) -> None:
        """What a node sends of this chunk just now goes nowhere."""
        for link in self._links.get(node, {}).values():
            link.connection.ignore(chunk)

    def events(self, now_s: float) -> list[Event]:
        """What has happened. Sends what is to be said."""
        for result in self.proving.results(now_s):
            if isinstance(result, Proven):
                self._add(result)
            elif result.node not in self._links:
                self._waiting.pop(result.node, None)
                self._events.append(Ended(result.node, result.is_silent))
        touched, self._touched = self._touched, {}
        for link in touched:
            self._write(link)
        events, self._events = self._events, []
        return events

    def link(self, node: int) -> Link | None:
        """The one that this end sends on: that which the lower node made, where it is there."""
        both = self._links.get(node)
        if not both:
            return None
        return both.get(self._node < node) or both[self._node > node]

    def _add(self, proven: Proven) -> None:
        node = proven.node
        if len(self._links) >= self._most and node not in self._links:
            proven.socket.close()
            return
        if proven.is_own in self._links.get(node, {}):
            self.leave(node)  # the node has begun anew
        connection = Connection(
            proven.socket, node, lambda chunk, offset, size: self._place(node, chunk, offset, size)
        )
        link = Link(node, proven.socket, connection, proven.is_own)
        self._links.setdefault(node, {})[proven.is_own] = link
        self._selector.register(link.socket, _READS, lambda mask, _: self._ready(link, mask))
        self.proving.cancel(node)
        for message in self._waiting.pop(node, ()):
            self.send(node, message)

    def _ready(self, link: Link, mask: int) -> None:
        if self._links.get(link.node, {}).get(link.is_own) is not link:
            return  # closed in this turn
        if mask & _WRITES:
            self._touched[link] = None
        if mask & _READS and not link.has_ended:
            self._read(link)

    def _read(self, link: Link) -> None:
        node = link.node
        try:
            heard = link.connection.read()
        except EOFError:
            other = self._links[node].get(not link.is_own)
            if other is None or link is self.link(node):
                self.leave(node)
            else:
                link.has_ended = link.is_retired = True
                self._touched[link] = None
            return
        except (BadMessage, OSError):
            self.leave(node)
            return
        self._events += [Heard(node, what) for what in heard]
        other = self._links[node].get(not link.is_own)
        if other is not None and heard and link is self.link(node) and not other.is_retired:
            other.is_retired = True
            self._touched[other] = None

    def _write(self, link: Link) -> None:
        """Send what the socket takes, and close what both ends are done with."""
        if self._links.get(link.node, {}).get(link.is_own) is not link:
            return
        try:
            frames = link.connection.write()
            if link.is_retired and not link.connection.wants_to_write:
                # Where both ends have said so, the kernel knows no such connection any more.
                with contextlib.suppress(OSError):
                    link.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.leave(link.node)
            return
        if frames:
            self._events.append(Sent(link.node, frames))
        if link.has_ended and not link.connection.wants_to_write:
            self._close(link)
            return
        waits_for = _WRITES * link.connection.wants_to_write | _READS * (not link.has_ended)
        if waits_for != link.waits_for:
            self._selector.modify(link.socket, waits_for, self._selector.get_key(link.socket).data)
            link.waits_for = waits_for

    def leave(self, node: int) -> None:
        """All is over with a node, until something is said to it again."""
        for link in [*self._links.get(node, {}).values()]:
            self._close(link)
        self._waiting.pop(node, None)
        self._events.append(Ended(node))

    def _close(self, link: Link) -> None:
        both = self._links[link.node]
        del both[link.is_own]
        if not both:
            del self._links[link.node]
        self._selector.unregister(link.socket)
        link.socket.close()
