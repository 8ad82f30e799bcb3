"""The threads that fetch what reads wait for, shared fairly between users: no user can occupy them all.

Owns: the queue of parked reads whose File is there, and the memory for their answers. Does not own: which
reads wait (waiting.py), and those that wait for their File (reads.py).

Threads: all are daemons, so a fetch that never comes back does not keep the process from ending.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from bootseer_slurm.fuse.ledger import Parked, make_outbox
from bootseer_slurm.fuse.nodes import File, read_local
from bootseer_slurm.fuse.waiting import WaitingReads

_USERS = 4  # that together may occupy all fetchers
_OUTBOXES = 4  # a fetcher needs one only while it answers
_Item = TypeVar("_Item")


class FairQueue(Generic[_Item]):
    """Items by user: users take turns, and of each at most `limit` are in hand at a time. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[int, OrderedDict[int, _Item]] = {}  # in the order of the users' turns
        self._in_hand: Counter[int] = Counter()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, uid: int, key: int, item: _Item) -> None:
        """key: of this item among its user's."""
        with self._changed:
            self._waiting.setdefault(uid, OrderedDict())[key] = item
            self._changed.notify()

    def forget(self, uid: int, key: int) -> None:
        """Drop an item, if nobody took it yet."""
        with self._changed:
            items = self._waiting.get(uid, OrderedDict())
            items.pop(key, None)
            if not items:
                self._waiting.pop(uid, None)

    def take(self) -> tuple[int, _Item] | None:
        """Wait for an item, and give it with its user; `done` says that it is not in hand any more.

        None once the queue was closed.
        """
        with self._changed:
            while not self._closed:
                uid = next((uid for uid in self._waiting if self._in_hand[uid] < self._limit), None)
                if uid is None:
                    self._changed.wait()
                    continue
                items = self._waiting.pop(uid)
                _, item = items.popitem(last=False)
                if items:
                    self._waiting[uid] = items  # behind the others
                self._in_hand[uid] += 1
                return uid, item
        return None

    def done(self, uid: int) -> None:
        with self._changed:
            self._in_hand[uid] -= 1
            if not self._in_hand[uid]:
                del self._in_hand[uid]
            self._changed.notify()

    def close(self) -> None:
        """Give no more items."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Turn(NamedTuple):
    """A parked read whose File is there. asked: the File's `ready` was, and said no."""

    parked: Parked
    file: File
    asked: bool


class Fetchers:
    """Answers parked reads, each in a thread that may wait for the store."""

    def __init__(self, waiting: WaitingReads, threads: int) -> None:
        """threads: how many reads may wait for the store at a time."""
        self._waiting = waiting
        self._turns: FairQueue[_Turn] = FairQueue(max(1, threads // _USERS))
        self._outboxes: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=self._live, name="bootseer-fuse-fetch", daemon=True)
            for _ in range(threads)
        ]

    def start(self) -> None:
        for _ in range(_OUTBOXES):
            self._outboxes.put(make_outbox())
        for thread in self.threads:
            thread.start()

    def put(self, parked: Parked, file: File, *, asked: bool) -> None:
        """Have a read answered from its File. asked: the File's `ready` was, and said no."""
        self._turns.put(parked.uid, parked.unique, _Turn(parked, file, asked))

    def forget(self, parked: Parked) -> None:
        """Drop a read that was answered otherwise."""
        self._turns.forget(parked.uid, parked.unique)

    def close(self) -> None:
        """Have the threads end, each after the read that it answers now."""
        self._turns.close()

    def _live(self) -> None:
        while self._fetch_next():
            pass

    def _fetch_next(self) -> bool:
        """Answer one waiting read; False at the end. Has its own frame: an idle thread holds no File."""
        taken = self._turns.take()
        if taken is None:
            return False
        uid, turn = taken
        try:
            self._fetch(turn)
        finally:
            self._turns.done(uid)
        return True

    def _fetch(self, turn: _Turn) -> None:
        parked = turn.parked
        if parked.unique not in self._waiting:
            return
        try:
            fd = None if turn.asked else turn.file.ready(parked.offset, parked.size)
            data = None
            if fd is None:
                data = memoryview(turn.file.fetch(parked.offset, parked.size)).cast("B")
                if len(data) != parked.size:
                    raise ValueError(f"{len(data)} bytes came instead of {parked.size} at {parked.offset}")
            with self._outbox() as outbox:
                part = outbox[: parked.size]
                if fd is not None:
                    read_local(turn.file, fd, parked.offset, part)
                elif data is not None:
                    part[:] = data
                self._waiting.finish(parked, part)
        except BaseException as error:
            self._waiting.finish(parked, error)

    @contextlib.contextmanager
    def _outbox(self) -> Iterator[memoryview]:
        outbox = self._outboxes.get()
        try:
            yield outbox
        finally:
            self._outboxes.put(outbox)
