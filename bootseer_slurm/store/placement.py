"""Which servers hold how many objects of a file that is being written, and whether one more is too many.

Owns the rule alone; does not ask a store, and writes nothing. Thread-safe: objects are written in parallel.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

TRIES = 8  # of an object
_MORE = 8  # are given up than are kept, at most
_FEW = 16  # looks
_SLACK = 0.5  # of an object; without it the last of each round takes as many tries as there are servers


class Tally:
    """Which servers have how many objects of one file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()  # with the objects that were given up
        self._looks = 0
        self._objects = 0  # kept
        self._given_up = 0

    def add(self, servers: Iterable[str]) -> None:
        """Count an object that is there already."""
        self.takes(servers, last=True)

    def takes(self, servers: Iterable[str], *, last: bool) -> bool:
        """Whether an object that begins on these servers is kept; it is counted then. last: it must be."""
        names = list(servers)
        with self._lock:
            self._looks += 1
            self._seen.update(names)
            has = sum(self._kept[name] for name in names) / len(names)
            even = has <= self._share() + _SLACK
            # Where HDFS places by a rule of its own, say on the writer's node, it is in vain each time.
            if not even and not last and self._given_up < self._objects + _MORE:
                self._given_up += 1
                return False
            self._kept.update(names)
            self._objects += 1
            return True

    def _share(self) -> float:
        """The objects a server has when all have as many, also those that were not seen yet.

        How many these are is told by those that were seen only once (Good and Turing's estimate); at first
        one more is supposed.
        """
        unseen = sum(count == 1 for count in self._seen.values()) / self._seen.total()
        return self._kept.total() * (1 - unseen) / (len(self._seen) + (self._looks < _FEW))
