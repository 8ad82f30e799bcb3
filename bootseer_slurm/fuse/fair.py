"""Work for a number of threads, shared fairly between users: no user can occupy them all."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class FairQueue(Generic[_Item]):
    """Items by user: users take turns, and of each at most `limit` are in hand at a time. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[int, deque[_Item]] = {}  # in the order of the users' turns
        self._in_hand: Counter[int] = Counter()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, uid: int, item: _Item) -> None:
        with self._changed:
            self._waiting.setdefault(uid, deque()).append(item)
            self._changed.notify()

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
                item = items.popleft()
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
