"""One node's part of a job's directory: which nodes asked for a chunk, and whom the next one asks.

The directory is spread over a ring of nodes. A chunk has a place on the ring, and the first live node from
there on keeps the chunk's list: the nodes that want the chunk, in the order in which they asked. Each gets
a parent that asked earlier. So a parent is fetching the chunk already, and no node waits for itself. The
first gets none: it reads the store, or asks the ring above.

A node that starts sends JOIN to the nodes behind it on the ring, eight at a time, until one of them answers.
It waits 25 ms for those before that one. It gets the lists whose first live node it is now, and answers no
WANT before. Others may still ask the old owner, which names the new one. A node that dies takes its lists
with it. The next on the ring begins with empty ones, and the nodes that have chunks of them say so as soon
as they miss the dead one. A node that asks before gets no parent, which costs one more read of that chunk.

Pure: no I/O and no clock. Not thread-safe.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

from bootseer_slurm.peers.groups import Chunk, Ring

JOIN_AT_ONCE = 8
JOIN_WAIT_S = 0.025
FAN_OUT = 2  # children of a node for one chunk: with 4 a node sends too much at once
_MOST_LISTS = 65_536  # 16 GiB of images: who asks for more gets no parent
_MOST_NAMED = 4  # parents of one reader for a chunk: it leaves three at most
_REPORTS = 2  # readers that must miss a node: one of them may have a broken link itself


@dataclass(frozen=True, slots=True)
class Want:
    """The question of one node: which node do I get this chunk from?

    serves: whether others may well get the chunk from this node. busy: parents of this chunk that said BUSY.
    lost: those that it has left for other reasons. missing: nodes that do not answer this one, whatever they
    were asked for. has: this node needs no parent, and only says that others may ask it.
    """

    chunk: Chunk
    reader: int
    serves: bool = True
    busy: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    has: bool = False


@dataclass(frozen=True, slots=True)
class First:
    """Nobody asked before: ask the ring above, or read the store where there is none."""


@dataclass(frozen=True, slots=True)
class Parent:
    """Get the chunk from this node, which has or fetches it. only: it is busy, and there is no other."""

    node: int
    only: bool = False


@dataclass(frozen=True, slots=True)
class Moved:
    """That chunk's list is kept by this node."""

    owner: int


Answer = First | Parent | Moved


class Service(enum.Enum):
    """Whether others are sent to a node for a chunk: yes, only where nobody else is left, or not at all."""

    YES = enum.auto()
    RELUCTANT = enum.auto()
    GONE = enum.auto()


@dataclass(frozen=True, slots=True)
class Row:
    """One node that asked for a chunk. children: how many were sent to it."""

    node: int
    children: int
    service: Service


@dataclass(frozen=True, slots=True)
class Handover:
    """Lists that go to another owner: for each chunk its rows, in the order of asking.

    live: the nodes of the ring that the old owner knows, which may own what the new one is asked for.
    """

    lists: dict[Chunk, tuple[Row, ...]]
    live: tuple[int, ...] = ()


@dataclass(slots=True)
class _List:
    """The nodes that asked for one chunk. full: so many at its head take no more children.

    named: the parents that a reader was sent to.
    """

    rows: list[Row] = field(default_factory=list)
    place_of: dict[int, int] = field(default_factory=dict)
    named: dict[int, tuple[int, ...]] = field(default_factory=dict)
    full: int = 0

    def add(self, row: Row) -> int:
        self.place_of[row.node] = len(self.rows)
        self.rows.append(row)
        return len(self.rows) - 1

    def name(self, reader: int, place: int) -> Parent:
        """Send a reader to the node at this place."""
        row = self.rows[place]
        self.rows[place] = replace(row, children=row.children + 1)
        if row.node not in (named := self.named.get(reader, ())):
            self.named[reader] = (*named, row.node)
        return Parent(row.node, only=row.service is not Service.YES)

    def left(self, reader: int, nodes: Sequence[int], service: Service) -> None:
        """A reader has left these parents. What it says of others counts for nobody."""
        for node in nodes:
            if node in self.named.get(reader, ()) and (place := self.place_of.get(node)) is not None:
                self.rows[place] = replace(self.rows[place], service=service)


class Directory:
    """The lists that one node keeps, of one ring."""

    def __init__(self, node: int, ring: Ring) -> None:
        self._node = node
        self._ring = ring
        self._members = frozenset(ring.members)
        self._lists: dict[Chunk, _List] = {}
        self._live: set[int] = {node}
        self._missed_by: dict[int, set[int]] = {}
        self._missed_of: dict[int, set[int]] = {}  # the same, by reader
        self._dead: set[int] = set()

    def want(self, want: Want) -> Answer:
        """The answer to one question; the node that asks is on the list from then on."""
        self._heard(want.reader)
        self._reported(want.reader, set(want.missing) - {self._node, want.reader})
        owner = self._owner(want.chunk, want.missing)
        if owner != self._node:
            return Moved(owner)
        if want.chunk not in self._lists and len(self._lists) >= _MOST_LISTS:
            return First()
        entry = self._lists.setdefault(want.chunk, _List())
        entry.left(want.reader, want.busy, Service.RELUCTANT)
        entry.left(want.reader, want.lost, Service.GONE)
        own = entry.place_of.get(want.reader)
        is_new = own is None
        if own is None:
            own = entry.add(Row(want.reader, 0, Service.YES if want.serves else Service.RELUCTANT))
        if want.has:
            return First()
        place = _parent(entry, own, self._dead.union(want.missing, want.lost), is_new)
        if place is None or len(entry.named.get(want.reader, ())) >= _MOST_NAMED:
            return First()
        return entry.name(want.reader, place)

    def join(self, node: int) -> Handover:
        """A node of the ring has started: the lists that are its own from now on."""
        self._live.add(node)
        self._heard(node)
        return self._give(node)

    def take(self, handover: Handover) -> dict[int, Handover]:
        """Keep lists that another node kept. Gives those of nodes that have joined meanwhile, by node."""
        self._live.update(self._members.intersection(handover.live) - self._dead)
        for chunk, rows in handover.lists.items():
            if chunk not in self._lists and len(self._lists) >= _MOST_LISTS:
                continue
            mine = self._lists.get(chunk, _List())
            merged = self._lists[chunk] = _List(named=mine.named)
            # Those of the old owner asked earlier. Those that are here keep their places among one another:
            # each was sent to one before it.
            for row in (*(row for row in rows if row.node not in mine.place_of), *mine.rows):
                if row.node not in merged.place_of:
                    merged.add(row)
        onward = {self._owner(chunk, ()) for chunk in handover.lists} - {self._node}
        return {node: self._give(node) for node in sorted(onward)}

    def _give(self, node: int) -> Handover:
        chunks = [chunk for chunk in self._lists if self._owner(chunk, ()) == node]
        lists = {chunk: tuple(self._lists.pop(chunk).rows) for chunk in chunks}
        return Handover(lists, tuple(sorted(self._live)))

    def owns(self, chunk: Chunk) -> bool:
        """Whether this node keeps the chunk's list, as far as it knows."""
        return self._owner(chunk, ()) == self._node

    def _owner(self, chunk: Chunk, missing: Sequence[int]) -> int:
        for node in self._ring.owners(chunk):
            if node == self._node or (node in self._live and node not in missing):
                return node
        raise AssertionError("a directory's own node is on its ring")

    def _heard(self, node: int) -> None:
        for reader in self._missed_by.pop(node, ()):
            self._missed_of[reader].discard(node)
        if node in self._dead:
            self._dead.discard(node)
            self._live.update(self._members & {node})

    def _reported(self, reader: int, nodes: set[int]) -> None:
        """A reader misses these nodes, and no others any more."""
        before = self._missed_of.get(reader, set())
        if nodes == before:
            return
        for node in before - nodes:
            readers = self._missed_by[node]
            readers.discard(reader)
            if not readers:
                del self._missed_by[node]
            if len(readers) < _REPORTS:
                self._dead.discard(node)
        for node in nodes - before:
            readers = self._missed_by.setdefault(node, set())
            readers.add(reader)
            if len(readers) >= _REPORTS:
                self._dead.add(node)
                self._live.discard(node)
        self._missed_of[reader] = nodes


def _parent(entry: _List, own: int, dead: Set[int], is_new: bool) -> int | None:
    """The place of the parent for the node at this place; it asked earlier. None where there is none.

    The earliest that has room for one more: so the tree is as flat as it can be. A reader that has left its
    parent finds all of them full, since it had its place in the tree. One child too many, or a wait for a
    busy node, is better than one more read from the store.
    """
    rows = entry.rows
    if is_new:
        while entry.full < own and not _has_room(rows[entry.full]):
            entry.full += 1
        for place in range(entry.full, own):
            if _has_room(rows[place]) and rows[place].node not in dead:
                return place
    left = [place for place in range(own) if rows[place].service is not Service.GONE]
    left = [place for place in left if rows[place].node not in dead]
    return min(left, key=lambda place: (rows[place].service.value, rows[place].children), default=None)


def _has_room(row: Row) -> bool:
    return row.service is Service.YES and row.children < FAN_OUT
