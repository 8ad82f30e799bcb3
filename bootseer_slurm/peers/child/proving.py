"""New connections of a node, until both ends have proven that they are peers of the job.

Strangers may connect as they like. Few connections without a proof are kept, each for 500 ms at most, and a
new one takes the place of the oldest. So they cost no memory, and a peer's hello gets its turn. Where a port
of a node is refused, or no peer listens on it, the next port is tried. Not thread-safe.
"""

from __future__ import annotations

import selectors
import socket
from dataclasses import dataclass
from functools import partial

from bootseer_slurm.peers.child.handshake import HELLO_S, TAKEN_S, Answering, Dialling
from bootseer_slurm.peers.key import NoProof
from bootseer_slurm.peers.local import Order

_BACKLOG = 512
_ACCEPTS = 16  # at a time: others have their turn
_MOST_UNPROVEN = 64


@dataclass(frozen=True, slots=True)
class Proven:
    """A connection to a peer. is_own: this node made it."""

    node: int
    socket: socket.socket
    is_own: bool


@dataclass(frozen=True, slots=True)
class Unreached:
    """No peer can be reached there. is_silent: nothing refused."""

    node: int
    is_silent: bool


@dataclass(slots=True)
class _Dial:
    """A connection that is being made. ports: numbers of those that are left to try, this one first."""

    ports: list[int]
    handshake: Dialling | None = None


class Proving:
    """The connections of a node that are not proven yet.

    The selector's data are functions: called with the events of a socket, and the time.
    """

    def __init__(self, selector: selectors.BaseSelector, order: Order) -> None:
        self._selector = selector
        self._order = order
        self._callers: dict[Answering, None] = {}  # the oldest first
        self._dials: dict[int, _Dial] = {}
        self._first_port: dict[int, int] = {}  # of nodes that listen on another than their first
        self._results: list[Proven | Unreached] = []

    def listen(self) -> int:
        """Listen on the first port that is free; gives it, or 0."""
        address = self._order.addresses[self._order.node]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for port in self._order.ports:
            listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind((address, port))
                listening.listen(_BACKLOG)
            except OSError:
                listening.close()
                continue
            self._selector.register(listening, selectors.EVENT_READ, partial(self._accept, listening))
            return port
        return 0

    def dial(self, node: int, now_s: float) -> None:
        """Connect to a node, where that is not under way."""
        if node in self._dials:
            return
        count = len(self._order.ports)
        first = self._first_port.get(node, 0)
        self._dials[node] = _Dial([(first + number) % count for number in range(count)])
        self._try(node, now_s)

    def reaches(self, node: int) -> bool:
        """Whether a connection to this node is being made, and its kernel has taken the hello."""
        dial = self._dials.get(node)
        return dial is not None and dial.handshake is not None and dial.handshake.is_taken

    def cancel(self, node: int) -> None:
        """The node has connected to this one."""
        if (dial := self._dials.pop(node, None)) and dial.handshake:
            _close(self._selector, dial.handshake)

    def results(self, now_s: float) -> list[Proven | Unreached]:
        """What came of connections. Ends those that took too long."""
        for caller in [caller for caller in self._callers if caller.until_s <= now_s]:
            self._drop(caller)
        for node, dial in list(self._dials.items()):
            late_s = now_s - dial.handshake.until_s if dial.handshake else -1.0
            if late_s >= TAKEN_S - HELLO_S or (late_s >= 0.0 and not self.reaches(node)):
                # Another try now would take as long; the next time it begins with the next port.
                self._first_port[node] = dial.ports[1 % len(dial.ports)]
                self.cancel(node)
                self._results.append(Unreached(node, is_silent=True))
        results, self._results = self._results, []
        return results

    def until_s(self) -> float | None:
        """When one of them has taken too long."""
        callers = [caller.until_s for caller in [*self._callers][:1]]
        dials = [dial.handshake.until_s for dial in self._dials.values() if dial.handshake]
        return min([*callers, *dials], default=None)

    def _accept(self, listening: socket.socket, _mask: int, now_s: float) -> None:
        for _ in range(_ACCEPTS):
            try:
                link, _address = listening.accept()
            except OSError:  # none is left, or it has gone again
                return
            if len(self._callers) >= _MOST_UNPROVEN:
                self._drop(next(iter(self._callers)))
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            caller = Answering(self._order, link, now_s + TAKEN_S)
            self._callers[caller] = None
            self._selector.register(link, selectors.EVENT_READ, partial(self._hear, caller))

    def _hear(self, caller: Answering, _mask: int, _now_s: float) -> None:
        if caller not in self._callers:
            return  # dropped in this turn
        try:
            if not caller.step():
                return
        except (NoProof, OSError, EOFError):
            self._drop(caller)
            return
        del self._callers[caller]
        self._selector.unregister(caller.link)
        self._results.append(Proven(caller.node, caller.link, is_own=False))

    def _drop(self, caller: Answering) -> None:
        del self._callers[caller]
        _close(self._selector, caller)

    def _try(self, node: int, now_s: float) -> None:
        """The next port of a node, until one does not refuse at once."""
        dial = self._dials[node]
        while dial.ports:
            try:
                dial.handshake = Dialling(
                    self._order, node, self._order.ports[dial.ports[0]], now_s + HELLO_S
                )
            except OSError:
                del dial.ports[0]
                continue
            self._selector.register(dial.handshake.link, selectors.EVENT_WRITE, partial(self._go_on, node))
            return
        del self._dials[node]
        self._first_port.pop(node, None)
        self._results.append(Unreached(node, is_silent=False))

    def _go_on(self, node: int, _mask: int, now_s: float) -> None:
        dial = self._dials.get(node)
        if dial is None or dial.handshake is None:
            return  # cancelled in this turn
        handshake = dial.handshake
        try:
            if not handshake.step():
                self._selector.modify(
                    handshake.link, selectors.EVENT_READ, self._selector.get_key(handshake.link).data
                )
                return
        except (NoProof, OSError, EOFError):
            _close(self._selector, handshake)
            dial.handshake = None
            del dial.ports[0]
            self._try(node, now_s)
            return
        self._selector.unregister(handshake.link)
        self._first_port[node] = dial.ports[0]
        del self._dials[node]
        self._results.append(Proven(node, handshake.link, is_own=True))


def _close(selector: selectors.BaseSelector, handshake: Answering | Dialling) -> None:
    selector.unregister(handshake.link)
    handshake.link.close()
