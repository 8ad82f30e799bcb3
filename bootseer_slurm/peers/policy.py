"""A node as a reader: the chunks that it fetches now, and its next step after each answer.

The prefetch fetches eight chunks at a time, in the same order on all nodes. What somebody waits for (demand)
begins at once beside them. The way of each chunk is in `fetch`. The fuse: where more than a fifth of this
node's chunks came from the store because peers failed, its prefetch pauses for 1 s. Demand never does, and
neither does a node that heard no peer at all.

The owner does what the actions say, and tells what came of it, with the time: seconds of a clock that only
goes forward. It tells `here.liveness` of every node that it hears. It calls `overdue` every 50 ms while
chunks are under way or wait. Pure; not thread-safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from bootseer_slurm.peers.directory import Answer
from bootseer_slurm.peers.fetch import Cause, Fetch, Loss, ReadStore, Step, Viewpoint
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.listing import Listing, Offers

WINDOW = 16  # chunks; a rotation over all of them has the last nodes wait for the first chunks
OVERDUE_S = 0.05
STREAMS = 8  # chunks of the prefetch under way
_FUSE_CHUNKS = 16
_FUSE_PART = 0.2
_FUSE_S = 1.0
_NO_FAULT = {Cause.FIRST, Cause.NO_DIRECTORY, Cause.CUT_OFF}  # a pause would bring no peer


@dataclass(frozen=True, slots=True)
class CallSlow:
    """Tell a node that it is slow."""

    to: int


Action = Step | CallSlow


def in_order(chunks: Sequence[Chunk], node: int, nodes: int) -> list[Chunk]:
    """The order of one node among so many: that of the plan, rotated within each window of 16.

    All nodes want the same few chunks at a time, and not all of them the same one first. Few nodes begin as
    far apart as they can: else the first of them reads nearly all, and sends it to all others.
    """
    order: list[Chunk] = []
    for begin in range(0, len(chunks), WINDOW):
        window = chunks[begin : begin + WINDOW]
        turn = node * len(window) // nodes if nodes < len(window) else node % len(window)
        order += [*window[turn:], *window[:turn]]
    return order


class _Fuse:
    """How many chunks came, and how many of them from the store because peers failed."""

    def __init__(self, here: Viewpoint) -> None:
        self._here = here
        self.paused_until_s = 0.0
        self._received = self._fallbacks = 0

    def received(self) -> None:
        self._received += 1

    def passes(self, step: Step | None, now_s: float) -> list[Action]:
        """A step as a list; it is counted."""
        if step is None:
            return []
        if isinstance(step, ReadStore) and step.cause not in _NO_FAULT:
            self._fallbacks += 1
            if self._received >= _FUSE_CHUNKS and self._fallbacks > _FUSE_PART * self._received:
                self._received = self._fallbacks = 0
                if self._here.liveness.any_heard:
                    self.paused_until_s = now_s + _FUSE_S
        return [step]


class Policy:
    """The chunks that one node gets. offers: those that it had before; told some at a time, by the owner."""

    def __init__(self, here: Viewpoint) -> None:
        self._here = here
        self._queue: deque[Chunk] = deque()
        self._fetches: dict[Chunk, Fetch] = {}
        self._listing = Listing(here)
        self.offers = Offers(here, self._listing)
        self._prefetching = 0
        self._fuse = _Fuse(here)

    def prefetch(self, chunks: Iterable[Chunk], now_s: float) -> list[Action]:
        """Get these too, in this order (`in_order`)."""
        self._queue.extend(chunks)
        return self._fill(now_s)

    def demand(self, chunk: Chunk, now_s: float) -> list[Action]:
        """Somebody waits for this chunk: it begins at once, or goes before others from now on."""
        fetch = self._fetches.get(chunk)
        if fetch is None:
            return self._begin(chunk, now_s, demand=True)
        if fetch.demand:
            return []
        self._prefetching -= 1
        return self._fuse.passes(fetch.hurry(now_s), now_s) + self._fill(now_s)

    def answered(
        self, chunk: Chunk, owner: int, answer: Answer, now_s: float, *, has: bool = False
    ) -> list[Action]:
        """What a directory answered. owner: the node that was asked. has: as of the WANT."""
        if has:
            return [*self._listing.answered(chunk, owner, answer, now_s)]
        fetch = self._fetches.get(chunk)
        return self._fuse.passes(fetch.answered(owner, answer, now_s), now_s) if fetch else []

    def pending(self, chunk: Chunk, parent: int, hops: int, now_s: float) -> list[Action]:
        """A parent's sign of life: bytes of the chunk (hops 0), or PENDING with its hops."""
        fetch = self._fetches.get(chunk)
        return self._fuse.passes(fetch.pending(parent, hops, now_s), now_s) if fetch else []

    def hops(self, chunk: Chunk, now_s: float) -> int | None:
        """The hops of the PENDING that this node sends for a chunk; None: it sends none now."""
        fetch = self._fetches.get(chunk)
        return fetch.hops(now_s) if fetch else None

    def received(self, chunk: Chunk, parent: int | None, dur_s: float, now_s: float) -> list[Action]:
        """A chunk is here and its digests are right. parent: None is the store. dur_s: as of Pace."""
        fetch = self._fetches.pop(chunk, None)
        if fetch is None:
            self.offers.add([chunk])  # it came without a question, or was here
            return []
        if parent is None and fetch.store_since_s is not None:
            self._here.was_read(now_s - fetch.store_since_s)
        self._listing.add(chunk, fetch.level)
        self._prefetching -= not fetch.demand
        self._fuse.received()
        slow = parent is not None and self._here.liveness.pace.is_slow(parent, dur_s)
        return [*([CallSlow(parent)] if slow and parent is not None else []), *self._fill(now_s)]

    def failed(self, chunk: Chunk, peer: int, loss: Loss, now_s: float) -> list[Action]:
        """A peer that was asked for this chunk, directory or parent, did something else.

        loss STORE: the chunk cannot be had here, so it is not fetched any more; peer does not count.
        """
        if loss is Loss.STORE:
            given_up = self._fetches.pop(chunk, None)
            self._prefetching -= given_up is not None and not given_up.demand
            self._listing.forget(lambda each: each == chunk)
            return self._fill(now_s)
        if loss is Loss.REFUSED:
            self._here.liveness.refused(peer, now_s)
        elif loss is Loss.SILENT:
            self._here.liveness.silent(peer, now_s)
        elif loss is Loss.WRONG_DIGEST:
            self._here.liveness.ban(peer)
        self._listing.failed(chunk, peer)
        fetch = self._fetches.get(chunk)
        return self._fuse.passes(fetch.failed(peer, loss, now_s), now_s) if fetch else []

    def closed(self, blob: str, now_s: float) -> list[Action]:
        """Nothing of a blob is wanted any more, and this node has nothing of it."""
        self._queue = deque(chunk for chunk in self._queue if chunk.blob != blob)
        for chunk in [chunk for chunk in self._fetches if chunk.blob == blob]:
            self._prefetching -= not self._fetches.pop(chunk).demand
        self._listing.forget(lambda chunk: chunk.blob == blob)
        return self._fill(now_s)

    def overdue(self, now_s: float, reached: Set[int] = frozenset()) -> list[Action]:
        """What is to be done because time has passed. reached: as of Fetch.overdue."""
        actions: list[Action] = []
        for fetch in list(self._fetches.values()):
            actions += self._fuse.passes(fetch.overdue(now_s, reached), now_s)
        if missing := self._here.liveness.newly_missing():
            fetches = self._fetches.items()
            coming = {chunk: fetch.level for chunk, fetch in fetches if fetch.store_since_s is not None}
            actions = [*self._listing.again(missing, coming, now_s), *actions]
        return actions + self._fill(now_s)

    def _fill(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        while self._queue and self._prefetching < STREAMS and now_s >= self._fuse.paused_until_s:
            chunk = self._queue.popleft()
            if chunk not in self._fetches and chunk not in self._listing:
                actions += self._begin(chunk, now_s, demand=False)
        return actions

    def _begin(self, chunk: Chunk, now_s: float, *, demand: bool) -> list[Action]:
        fetch = self._fetches[chunk] = Fetch(chunk, self._here, now_s, demand=demand)
        self._prefetching += not demand
        return self._fuse.passes(fetch.look(now_s), now_s)
