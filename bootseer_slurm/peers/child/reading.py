"""The chunks that this node gets: has its policy's actions done, and tells it what came of them.

No digest is compared here: what came is the owner's to look at, and is not here before the owner has it. Only
an answer to a question that is open counts.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers.child.blobs import Blobs
from bootseer_slurm.peers.child.incoming import Coming, Incoming
from bootseer_slurm.peers.child.links import Links
from bootseer_slurm.peers.child.lists import Lists
from bootseer_slurm.peers.child.owner import Owner
from bootseer_slurm.peers.child.reach import Reach
from bootseer_slurm.peers.directory import Moved, Parent, Want
from bootseer_slurm.peers.fetch import AskDirectory, AskParent, Cause, Loss, ReadStore
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.local import Arrived, Read
from bootseer_slurm.peers.messages import Answered, AskList, Pending, Refused, Slow
from bootseer_slurm.peers.policy import Action, CallSlow, Policy, in_order
from bootseer_slurm.peers.uploads import Held
from bootseer_slurm.peers.wire import Received


@dataclass(frozen=True, slots=True)
class Ways:
    """All that chunks come by, for this node among so many."""

    node: int
    nodes: int
    owner: Owner
    links: Links
    lists: Lists
    blobs: Blobs
    incoming: Incoming
    reach: Reach

    def free(self, chunk: Chunk) -> Coming | None:
        """A chunk's slot is free; what still comes of it goes nowhere."""
        return self.leave(chunk) or self.incoming.free(chunk)

    def leave(self, chunk: Chunk) -> Coming | None:
        """What still comes of a chunk goes nowhere; what is whole is the owner's. Gives what was left."""
        coming = self.incoming.leave(chunk)
        if coming is not None:
            self.links.ignore(coming.parent, chunk)
        return coming

    def read_store(self, chunk: Chunk, *, demand: bool) -> None:
        """Have the owner read a chunk from the store."""
        self.owner.say(Read(self.blobs.of(chunk).order.blob, chunk.number, demand))


@dataclass(slots=True)
class Counts:
    """Figures since the start: bytes by node, reads of the store by cause, and nodes that are slow."""

    received: Counter[int] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    slow: set[int] = field(default_factory=set)


class Asked:
    """What other nodes were asked, and have not said all of yet."""

    def __init__(self) -> None:
        self._gets: dict[int, set[Chunk]] = {}  # by node
        # By node and chunk, and whether that is here: the number of the last question.
        self._wants: dict[int, dict[tuple[Chunk, bool], int]] = {}
        self._number = 0

    def get(self, node: int, chunk: Chunk) -> None:
        """A node is sent GET."""
        self._gets.setdefault(node, set()).add(chunk)

    def got(self, node: int, chunk: Chunk) -> bool:
        """It has said all of that; gives whether it was asked."""
        gets = self._gets.get(node, set())
        was_asked = chunk in gets
        gets.discard(chunk)
        return was_asked

    def want(self, node: int, want: Want) -> int:
        """A node is sent WANT; gives its number. Answers to earlier ones of this kind count no more."""
        self._number = (self._number + 1) % 2**32
        self._wants.setdefault(node, {})[want.chunk, want.has] = self._number
        return self._number

    def answered(self, node: int, answered: Answered) -> bool | None:
        """Whether the WANT that this answers was of a node that has the chunk. None: it answers none."""
        wants = self._wants.get(node, {})
        for has in (False, True):
            if wants.get((answered.chunk, has)) == answered.number:
                del wants[answered.chunk, has]
                return has
        return None

    def nodes(self) -> set[int]:
        """Those that have not said all."""
        return {node for asked in (self._gets, self._wants) for node, each in asked.items() if each}

    def ended(self, node: int) -> list[Chunk]:
        """A node says nothing more. Gives the chunks that it was asked for."""
        wants = [chunk for chunk, _ in self._wants.pop(node, {})]
        return list(dict.fromkeys([*wants, *self._gets.pop(node, ())]))

    def closed(self, blob: str) -> None:
        """What is said of this blob from now on answers nothing."""
        for gets in self._gets.values():
            gets -= {chunk for chunk in gets if chunk.blob == blob}
        for node, wants in self._wants.items():
            kept = {key: number for key, number in wants.items() if key[0].blob != blob}
            self._wants[node] = kept


class Reading:
    """This node as a reader, among so many nodes."""

    def __init__(self, ways: Ways, policy: Policy) -> None:
        self.counts = Counts()
        self._ways = ways
        self._policy = policy
        self._asked = Asked()
        self._from_store: set[Chunk] = set()

    def want(self, chunks: Sequence[Chunk], *, demand: bool, now_s: float) -> None:
        """The owner wants these; each gets an answer, whatever was said of it before."""
        blobs = self._ways.blobs
        missing = [chunk for chunk in chunks if blobs.held(chunk) is not Held.HERE]
        for chunk in missing:
            blobs.of(chunk).wanted.add(chunk.number)
        for chunk in chunks:
            if chunk in self._from_store or chunk not in missing:
                self._ways.read_store(chunk, demand=demand)
        if not demand:
            order = in_order(missing, self._ways.node, self._ways.nodes)
            self._do(self._policy.prefetch(order, now_s), now_s)
            return
        for chunk in missing:
            self._do(self._policy.demand(chunk, now_s), now_s)

    def have(self, chunk: Chunk, now_s: float) -> None:
        """A chunk is in the data file."""
        blob = self._ways.blobs.of(chunk)
        blob.here.add(chunk.number)
        blob.wanted.discard(chunk.number)
        self._from_store.discard(chunk)
        coming = self._ways.free(chunk)
        parent = None
        if coming is not None and coming.is_whole:
            parent = coming.parent
            self.counts.received[parent] += coming.size_bytes
        # As long as a whole slot would have taken: chunks are of several sizes, and nodes are compared.
        dur_s = coming.dur_s * CHUNK_BYTES / coming.size_bytes if coming else 0.0
        self._do(self._policy.received(chunk, parent, dur_s, now_s), now_s)

    def wrong(self, chunk: Chunk, now_s: float) -> None:
        """A chunk that came has a wrong digest."""
        coming = self._ways.free(chunk)
        if coming is not None:
            self._do(self._policy.failed(chunk, coming.parent, Loss.WRONG_DIGEST, now_s), now_s)

    def lost(self, chunk: Chunk, now_s: float) -> None:
        """A chunk cannot be had."""
        blob = self._ways.blobs.of(chunk)
        blob.wanted.discard(chunk.number)
        blob.here.discard(chunk.number)
        self._from_store.discard(chunk)
        self._ways.free(chunk)
        self._do(self._policy.failed(chunk, self._ways.node, Loss.STORE, now_s), now_s)

    def closed(self, blob: str, now_s: float) -> None:
        """Nothing of a blob is wanted any more, and all its slots are free."""
        for chunk in self._ways.incoming.of(blob):
            self._ways.free(chunk)
        self._asked.closed(blob)
        self._from_store = {chunk for chunk in self._from_store if chunk.blob != blob}
        self._do(self._policy.closed(blob, now_s), now_s)

    def answered(self, node: int, answered: Answered, now_s: float) -> None:
        """A directory has answered."""
        chunk, answer = answered.chunk, answered.answer
        has = self._asked.answered(node, answered)
        if has is None:
            return
        named = (
            answer.node if isinstance(answer, Parent) else answer.owner if isinstance(answer, Moved) else 0
        )
        if named >= self._ways.nodes or (isinstance(answer, Parent) and named == self._ways.node):
            self._do(self._policy.failed(chunk, node, Loss.SILENT, now_s), now_s)  # no directory says so
            return
        self._do(self._policy.answered(chunk, node, answer, now_s, has=has), now_s)

    def parent_said(self, node: int, said: Pending | Refused, now_s: float) -> None:
        """A parent has a chunk on its way, or does not send it."""
        chunk = said.chunk
        if isinstance(said, Pending):
            self._do(self._policy.pending(chunk, node, said.hops, now_s), now_s)
        elif self._asked.got(node, chunk):
            loss = Loss.LACK if said.lacks else Loss.BUSY
            self._do(self._policy.failed(chunk, node, loss, now_s), now_s)

    def took(self, node: int, received: Received, now_s: float) -> None:
        """Bytes of a chunk have come."""
        coming = self._ways.incoming.took(node, received, now_s)
        if coming is None:
            return
        chunk = received.chunk
        self._policy.pending(chunk, node, 0, now_s)
        if coming.is_whole:
            self._asked.got(node, chunk)
            number = self._ways.blobs.of(chunk).order.blob
            self._ways.owner.say(Arrived(number, chunk.number, coming.slot, node, coming.dur_s))

    def ended(self, node: int, now_s: float, *, is_silent: bool) -> None:
        """A node cannot be reached, or its connection ended. is_silent: it did not refuse either."""
        loss = Loss.SILENT if is_silent else Loss.REFUSED
        for chunk in self._asked.ended(node):
            self._do(self._policy.failed(chunk, node, loss, now_s), now_s)

    def overdue(self, now_s: float) -> None:
        """What is to be done because time has passed."""
        for chunk, parent in self._ways.incoming.whole():
            self._policy.pending(chunk, parent, 0, now_s)  # it is the owner who takes his time
        reached = self._ways.reach.among(self._asked.nodes(), now_s)
        self._do(self._policy.overdue(now_s, reached), now_s)
        if self._ways.lists.ready:
            self._do(self._policy.offers.tell(now_s), now_s)

    def _do(self, actions: Iterable[Action], now_s: float) -> None:
        ways = self._ways
        to_do = deque(actions)
        while to_do:
            action = to_do.popleft()
            match action:
                case AskDirectory(to, level, want):
                    if not want.has:
                        ways.leave(want.chunk)  # of a parent that was left
                    if to != ways.node:
                        ways.links.send(to, AskList(level, want, self._asked.want(to, want)), now_s)
                    elif answer := ways.lists.want(level, want):
                        to_do += self._policy.answered(want.chunk, to, answer, now_s, has=want.has)
                case AskParent(to, get):
                    if ways.incoming.expect(get.chunk, to, ways.blobs.size_of(get.chunk)):
                        self._asked.get(to, get.chunk)
                        ways.links.send(to, get, now_s)
                    else:
                        to_do += self._policy.failed(get.chunk, to, Loss.BUSY, now_s)
                case ReadStore(chunk, demand, cause):
                    ways.leave(chunk)
                    self._from_store.add(chunk)
                    self.counts.fallbacks[cause.value] += cause is not Cause.FIRST
                    ways.read_store(chunk, demand=demand)
                case CallSlow(to):
                    self.counts.slow.add(to)
                    ways.links.send(to, Slow())
