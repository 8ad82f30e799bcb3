"""The peer process of one job on one node. One thread, which waits for nothing but its sockets and the time.

    python -I -m bootseer_slurm.peers.child <socket fd>

The first message says whose it is (local.Order): until then it is its owner's, and reads nothing else. It has
the user's rights then, cannot execute anything, and is not traced. It has no store and no credentials. It
ends when the owner's end of the socket is closed. A node speaks for itself only: what it says of others is no
more than a place to look.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import selectors
import socket
import sys
import time

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.identity import User, close_to_tracers, gain_no_rights
from bootseer_slurm.peers.child.blobs import Blobs
from bootseer_slurm.peers.child.clock import Clock
from bootseer_slurm.peers.child.incoming import Incoming
from bootseer_slurm.peers.child.links import Ended, Event, Links, Sent
from bootseer_slurm.peers.child.lists import Lists
from bootseer_slurm.peers.child.owner import Owner
from bootseer_slurm.peers.child.reach import Reach
from bootseer_slurm.peers.child.reading import Reading, Ways
from bootseer_slurm.peers.child.serving import Serving
from bootseer_slurm.peers.fetch import Viewpoint
from bootseer_slurm.peers.groups import group_nodes, rings_of
from bootseer_slurm.peers.local import (
    Alive,
    CloseBlob,
    Counted,
    FromOwner,
    Have,
    Lost,
    OpenBlob,
    Order,
    Read,
    Started,
    Want,
    Wrong,
    receive_order,
)
from bootseer_slurm.peers.messages import Answered, AskList, Given, Join, Message, Pending, Refused, Slow
from bootseer_slurm.peers.policy import OVERDUE_S, Policy
from bootseer_slurm.peers.uploads import PENDING_S, Get
from bootseer_slurm.peers.wire import Received
from bootseer_slurm.seccomp import forbid_execution

_NICE = 10
_COUNTED_S = 1.0
_ALIVE_S, _IDLE_ALIVE_S = 0.25, 1.0
_DEMAND_WAITS_S = 0.15  # for the directory; who waits longer reads the store


class Peer:
    """One node among its peers: what its owner and the nodes say goes to the part that it is for."""

    def __init__(self, order: Order, ring: memoryview, owner: socket.socket) -> None:
        here = Viewpoint(order.node, rings_of(group_nodes(order.blocks), order.node))
        self._here = here
        nodes = len(order.addresses)
        self._selector = selectors.DefaultSelector()
        self._owner = Owner(self._selector, owner)
        self._policy = Policy(here)
        incoming = Incoming(ring, order.slots)
        blobs = Blobs()
        links = Links(self._selector, order, incoming.place)
        lists = Lists(here, links, nodes, blobs.may_be)
        self._clock = Clock()
        reach = Reach(links)
        self._ways = Ways(order.node, nodes, self._owner, links, lists, blobs, incoming, reach)
        self._serving = Serving(here, links, blobs, order.upload_bytes_per_s, self._policy.hops)
        self._reading = Reading(self._ways, self._policy)
        self._wants: list[tuple[Want, float]] = []  # until the directory is there, and since when
        self._counted = Counted({}, {}, {}, (), ())

    def run(self) -> None:
        """Work until the owner goes away."""
        self._owner.say(Started(self._ways.links.proving.listen()))
        overdue_s = pending_s = counted_s = alive_s = 0.0
        while not self._owner.has_gone:
            now_s = self._clock.now_s()
            self._hear(now_s)  # before anybody is called silent
            for message, fd in self._owner.heard():
                self._order(message, fd, now_s)
            self._begin(now_s)
            if now_s >= overdue_s:
                overdue_s = now_s + OVERDUE_S
                self._reading.overdue(now_s)
            if now_s >= pending_s:
                pending_s = now_s + PENDING_S
                self._serving.say_pending(now_s)
            if time.monotonic() >= alive_s:  # by the owner's clock, not the one that stands still with us
                alive_s = time.monotonic() + (_ALIVE_S if self._is_busy else _IDLE_ALIVE_S)
                self._owner.say(Alive(self._here.liveness.is_cut_off(now_s)))
            if now_s >= counted_s:
                counted_s = now_s + _COUNTED_S
                self._count()
            self._serving.go_on(now_s)
            self._hear(now_s)
            self._wait()

    def _hear(self, now_s: float) -> None:
        """What other nodes have said, until nothing is to be said: what is heard gives answers."""
        while events := self._ways.links.events(now_s):
            for event in events:
                self._node(event, now_s)

    def _wait(self) -> None:
        """Wait until a socket is ready, or something is to be done."""
        self._clock.waits()
        links, now_s = self._ways.links, self._clock.now_s()
        until_s = now_s + (OVERDUE_S if self._is_busy else _COUNTED_S)
        for other_s in (links.proving.until_s(), self._ways.lists.until_s(), self._serving.until_s()):
            until_s = until_s if other_s is None else min(until_s, other_s)
        timeout_s = max(0.0, until_s - now_s)
        ready = self._selector.select(timeout_s)
        self._clock.woke(max(until_s, now_s))
        for key, mask in ready:
            key.data(mask, self._clock.now_s())

    @property
    def _is_busy(self) -> bool:
        return (
            bool(self._wants) or self._ways.blobs.wants or self._serving.is_busy or bool(self._policy.offers)
        )

    def _begin(self, now_s: float) -> None:
        """Get what is wanted, once this node's part of the directory is there."""
        lists = self._ways.lists
        if not lists.ready:
            lists.go_on(now_s)
        if lists.ready and self._wants:
            wants, self._wants = self._wants, []
            for want, _ in wants:
                self._want(want, now_s)
        for late in [each for each in self._wants if each[0].demand and now_s - each[1] >= _DEMAND_WAITS_S]:
            self._wants.remove(late)
            for number in late[0].chunks:
                self._owner.say(Read(late[0].blob, number, demand=True))

    def _want(self, want: Want, now_s: float) -> None:
        chunks = (self._ways.blobs.chunk(want.blob, number) for number in want.chunks)
        known = [chunk for chunk in chunks if chunk is not None]
        self._reading.want(known, demand=want.demand, now_s=now_s)

    def _order(self, message: FromOwner, fd: int, now_s: float) -> None:
        """What the owner says. What it says of a blob that is not open is of one that it has closed."""
        if isinstance(message, OpenBlob):
            self._policy.offers.add(self._ways.blobs.open(message, fd))
        elif isinstance(message, Want):
            self._wants.append((message, now_s))
        elif isinstance(message, CloseBlob):
            self._close(message.blob, now_s)
        elif chunk := self._ways.blobs.chunk(message.blob, message.chunk):
            if not isinstance(message, Wrong):  # what was wanted before is over
                same = message.blob, (message.chunk,)
                self._wants = [each for each in self._wants if (each[0].blob, each[0].chunks) != same]
            match message:
                case Have():
                    self._reading.have(chunk, now_s)
                    self._serving.arrived(chunk, now_s)
                case Wrong():
                    self._reading.wrong(chunk, now_s)
                case Lost():
                    self._reading.lost(chunk, now_s)
                    self._serving.lost(lambda each: each == chunk)

    def _close(self, number: int, now_s: float) -> None:
        """The owner uses a blob no more: so does nobody here, and it may be opened anew by another number."""
        name = self._ways.blobs.close(number)
        if name is not None:
            self._reading.closed(name, now_s)
            self._serving.lost(lambda each: each.blob == name)

    def _node(self, event: Event, now_s: float) -> None:
        """What another node says or does."""
        if isinstance(event, Sent):
            self._serving.frames_sent(event.node, event.frames, now_s)
        elif isinstance(event, Ended):
            self._ways.lists.ended(event.node, now_s, is_silent=event.is_silent)
            self._serving.left(event.node, now_s)
            self._reading.ended(event.node, now_s, is_silent=event.is_silent)
        else:
            self._here.liveness.heard(event.node)
            self._ways.reach.heard(event.node, now_s)
            if isinstance(event.what, Received):
                self._reading.took(event.node, event.what, now_s)
            else:
                self._message(event.node, event.what, now_s)

    def _message(self, node: int, message: Message, now_s: float) -> None:
        match message:
            case AskList():
                self._ways.lists.asked(node, message)
            case Get():
                self._serving.asked(message, now_s)
            case Answered():
                self._reading.answered(node, message, now_s)
            case Pending() | Refused():
                self._reading.parent_said(node, message, now_s)
            case Join(level):
                self._ways.lists.joined(node, level)
            case Given():
                self._ways.lists.given(node, message, now_s)
            case Slow():
                self._serving.called_slow(node, now_s)

    def _count(self) -> None:
        """Tell the owner new figures, where there are some."""
        counts = self._reading.counts
        banned = tuple(sorted(self._here.liveness.banned))
        counted = Counted(
            dict(counts.received),
            dict(self._serving.sent),
            dict(+counts.fallbacks),
            tuple(sorted(counts.slow)),
            banned,
        )
        if counted != self._counted:
            self._counted = counted
            self._owner.say(counted)


def _become(order: Order) -> None:
    """Be the job's user for good; an owner that is not root has its own rights to give only."""
    gain_no_rights()
    if os.geteuid() == 0:
        User(order.uid, order.gid, order.user_groups).become()
    close_to_tracers()
    forbid_execution()


def main() -> None:
    """The process that the owner starts; see the module's first lines for its argument."""
    os.umask(0o077)
    link = socket.socket(fileno=int(sys.argv[1]))
    received = receive_order(link)
    if received is None:
        return  # it was a spare one, and is not needed
    order, ring_fd = received
    with contextlib.suppress(OSError, ValueError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.nice(_NICE)
    _become(order)
    ring = mmap.mmap(ring_fd, order.slots * CHUNK_BYTES)
    os.close(ring_fd)
    Peer(order, memoryview(ring), link).run()


if __name__ == "__main__":
    main()
