"""A node as a parent: the chunks that it sends now, the nodes that wait for one, and those that go elsewhere.

A node may ask for a chunk that is still on its way here. It waits, and hears PENDING: at once, and then every
100 ms, as long as this node's own source moves. Eight chunks are sent at once (`slots`), first those that
somebody waits for. Where the chunks that are ready take more than 50 ms to send, the answer is BUSY, and the
directory names another node. Who has no other waits for up to 0.5 s of such chunks. Pure: time is a
parameter, in seconds of a clock that only goes forward. Not thread-safe.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.slots import Slots

PENDING_S = 0.1
QUEUE_S = 0.05
ONLY_QUEUE_S = 0.5
LEAF_S = 10.0
_TELLERS = 2  # one child may have a slow link itself
_MOST_GETS = 64  # of one node that get nothing yet


class Held(enum.Enum):
    """How much of a chunk this node has."""

    HERE = enum.auto()
    COMING = enum.auto()
    LACKS = enum.auto()


class Reply(enum.Enum):
    """What a node that asked for a chunk hears: it will be sent, elsewhere please, or not here."""

    QUEUED = enum.auto()
    BUSY = enum.auto()
    LACK = enum.auto()


@dataclass(frozen=True, slots=True)
class Get:
    """The question of one node for one chunk. demand: somebody waits for it. only: it has no other to ask."""

    chunk: Chunk
    reader: int
    demand: bool = False
    only: bool = False


class _Ready:
    """The questions for chunks that are here, in their order: first those that somebody waits for."""

    def __init__(self) -> None:
        self.size_bytes = 0  # of all their chunks
        self._demand: dict[Get, int] = {}  # and the bytes of its chunk
        self._prefetch: dict[Get, int] = {}

    def __len__(self) -> int:
        return len(self._demand) + len(self._prefetch)

    def gets(self) -> list[Get]:
        return [*self._demand, *self._prefetch]

    def add(self, get: Get, size_bytes: int) -> None:
        (self._demand if get.demand else self._prefetch)[get] = size_bytes
        self.size_bytes += size_bytes

    def take(self, get: Get) -> int:
        """It is no longer here; gives the bytes of its chunk."""
        size_bytes = (self._demand if get.demand else self._prefetch).pop(get)
        self.size_bytes -= size_bytes
        return size_bytes


class Uploads:
    """The chunks that one node sends. They may be of several sizes."""

    def __init__(self, bytes_per_s: float, size_of: Callable[[Chunk], int]) -> None:
        """bytes_per_s: what this node may send; the rate that is seen replaces it.

        size_of: gives the bytes of a chunk that is here.
        """
        self.slots = Slots(bytes_per_s)
        self._size_of = size_of
        self._waiting: dict[Chunk, list[Get]] = {}
        self._ready = _Ready()
        self._slow_to: set[int] = set()
        self._leaf_until_s = 0.0

    def asked(self, get: Get, held: Held) -> Reply:
        """The answer to one question; with QUEUED the chunk follows.

        The same question again, with demand say, takes the place of the first. Where the chunk is on its way,
        nothing is left to hurry.
        """
        if self.slots.is_sending(get.chunk, get.reader):
            return Reply.QUEUED
        self._drop(lambda each: (each.chunk, each.reader) == (get.chunk, get.reader))
        if held is Held.LACKS:
            return Reply.LACK
        many = sum(each.reader == get.reader for each in self.waiting()) >= _MOST_GETS
        if many or self._queue_s() > _patience_s(get):
            return Reply.BUSY
        if held is Held.COMING:
            self._waiting.setdefault(get.chunk, []).append(get)
        else:
            self._ready.add(get, self._size_of(get.chunk))
        return Reply.QUEUED

    def arrived(self, chunk: Chunk) -> list[int]:
        """A chunk is here, and goes to those that wait for it. Gives the nodes that hear BUSY instead."""
        busy = []
        for get in self._waiting.pop(chunk, ()):
            if self._queue_s() > _patience_s(get):
                busy.append(get.reader)
            else:
                self._ready.add(get, self._size_of(chunk))
        return busy

    def lost(self, is_lost: Callable[[Chunk], bool]) -> list[Get]:
        """Chunks that are so will not come. Gives those that get nothing of them, which hear LACK."""
        lost = [get for get in self.waiting() if is_lost(get.chunk)]
        self._drop(lambda get: is_lost(get.chunk))
        return lost

    def left(self, reader: int) -> None:
        """A node's connection ended: it waits for nothing, and its slots are free."""
        self.slots.left(reader)
        self._drop(lambda get: get.reader == reader)

    def waiting(self) -> list[Get]:
        """Those that get nothing yet: they hear PENDING every 100 ms."""
        coming = itertools.chain.from_iterable(self._waiting.values())
        return [*self._ready.gets(), *coming]

    def begin(self, now_s: float) -> Get | None:
        """The next chunk to send, where a slot is free."""
        for get in self._ready.gets():
            if self.slots.has_room(get.reader):
                self.slots.begin(get.chunk, get.reader, self._ready.take(get), now_s)
                return get
        return None

    def called_slow(self, reader: int, now_s: float) -> None:
        """A child says that this node is slow. Two say so: it serves nobody for 10 s."""
        self._slow_to.add(reader)
        if len(self._slow_to) >= _TELLERS:
            self._slow_to.clear()
            self._leaf_until_s = now_s + LEAF_S

    def serves(self, now_s: float) -> bool:
        """Whether others may be sent here now; said with each WANT."""
        return now_s >= self._leaf_until_s and self._queue_s() <= QUEUE_S

    def _queue_s(self) -> float:
        """How long it takes to send what is ready. One chunk is none, however slow this node is."""
        if len(self._ready) + self.slots.taken <= 1:
            return 0.0
        return (self._ready.size_bytes + self.slots.taken_bytes) / self.slots.bytes_per_s

    def _drop(self, is_dropped: Callable[[Get], bool]) -> None:
        """Those that get nothing yet and are so get nothing."""
        for chunk, gets in list(self._waiting.items()):
            kept = [get for get in gets if not is_dropped(get)]
            if kept:
                self._waiting[chunk] = kept
            else:
                del self._waiting[chunk]
        for get in filter(is_dropped, self._ready.gets()):
            self._ready.take(get)


def _patience_s(get: Get) -> float:
    """The longest queue that it may stand in."""
    if get.demand:
        return math.inf
    return ONLY_QUEUE_S if get.only else QUEUE_S
