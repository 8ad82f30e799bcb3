"""The users of a blob, the sources that they brought, and what they are told of faults. Thread-safe."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

_log = logging.getLogger(__name__)

OnFault = Callable[[str, str], None]


# With more, the last nodes would wait for the first units, and a start for what it reads first.
_WINDOW_UNITS = 16


class Turn(NamedTuple):
    """All nodes want the same few units, `window` of them, and each another one first.

    So each reads its part of them from the store, and sends it to the others. first: this node's.
    """

    window: int
    first: int


class NotHere(Exception):
    """The source does not have these bytes now, which is no fault: the next one has them."""


class Source(Protocol):
    """Where a blob's bytes come from: "peers", "store", "origin"; "cache" for what is to be checked again."""

    name: str

    def read(
        self, offset: int, size_bytes: int, *, demand: bool, fixed: bool
    ) -> AbstractContextManager[memoryview]:
        """Bytes of the blob, a range within one chunk. Raises StoreError, NotHere.

        fixed: they stay what they are, so that what is checked is what is kept. Else whoever brings them may
        still change them, which saves a copy.
        """


@runtime_checkable
class Exchange(Source, Protocol):
    """A source that gives other nodes what this one has. Its unit is alike on all nodes.

    job_id: the job whose nodes they are. place: which node this is, and of how many.
    """

    job_id: int
    place: tuple[int, int]

    @property
    def unit_blocks(self) -> int:
        """How many blocks go at a time; 0 while other nodes cannot be reached."""

    def kept(self, first: int, count: int) -> None:
        """These blocks are in the cache's file, however they came."""

    def lost(self, first: int, count: int) -> None:
        """These blocks were fetched in vain, or are not kept."""

    def hurry(self, block: int) -> None:
        """Somebody waits for this block, which is being fetched."""

    def close(self) -> None:
        """Give and get no more."""


class BlobUser(Protocol):
    """Who uses a blob: a job, by a handle."""

    @property
    def sources(self) -> Sequence[Source]:
        """Where it can have the blob's bytes from."""

    @property
    def on_fault(self) -> OnFault:
        """To be told of damage, a full disk, a lost store: a name and a message."""


class Sources:
    """All sources of one blob: those named "store" before those named "origin", and the exchanges."""

    def __init__(self, blob_id: str) -> None:
        self._name = blob_id[:12]
        self._told: dict[BlobUser, set[str]] = {}  # of each user, what it was told already
        self._sources: tuple[Source, ...] = ()
        self._exchanges: tuple[Exchange, ...] = ()
        self._lock = threading.Lock()

    @property
    def all(self) -> tuple[Source, ...]:
        return self._sources

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Those that other nodes get something of."""
        return self._exchanges

    @property
    def exchange(self) -> Exchange | None:
        """The one that is asked: of the earliest job that reaches other nodes. One at a time.

        Of two jobs on the same nodes, each node could wait for the other one.
        """
        return next((exchange for exchange in self._exchanges if exchange.unit_blocks), None)

    @property
    def unit_blocks(self) -> int:
        """How many blocks nodes exchange at a time; 0 where they exchange none."""
        exchange = self.exchange
        return exchange.unit_blocks if exchange else 0

    @property
    def turn(self) -> Turn:
        """The order in which this node gets units."""
        exchange = self.exchange
        node, nodes = exchange.place if exchange else (0, 1)
        window = min(nodes, _WINDOW_UNITS)
        return Turn(window, node % window)

    def add(self, user: BlobUser) -> None:
        with self._lock:
            self._told[user] = set()
            self._take()

    def look_again(self) -> None:
        """A user has other sources now."""
        with self._lock:
            self._take()

    def remove(self, user: BlobUser) -> None:
        with self._lock:
            self._told.pop(user, None)
            self._take()

    def _take(self) -> None:
        """Take the sources of all users: peers of the earliest job first, as on all nodes."""
        sources = dict.fromkeys(source for user in self._told for source in user.sources)
        others = (source for source in sources if source.name != "peers")
        self._sources = tuple(sorted(others, key=lambda source: source.name != "store"))
        found = [source for source in sources if isinstance(source, Exchange)]
        self._exchanges = tuple(sorted(found, key=lambda exchange: exchange.job_id))

    def tell(self, name: str, message: str) -> None:
        """Report a fault to each user, the first of each name only: a lost store fails thousands of reads."""
        with self._lock:
            untold = [user for user, told in self._told.items() if name not in told]
            for user in untold:
                self._told[user].add(name)
        for user in untold:
            _log.warning("blob %s: %s: %s", self._name, name, message)
            user.on_fault(name, message)
