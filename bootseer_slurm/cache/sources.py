"""The users of a blob, the sources that they brought, and what they are told of faults. Thread-safe."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

_log = logging.getLogger(__name__)

OnFault = Callable[[str, str], None]


class Source(Protocol):
    """Where a blob's bytes come from: "store" or "origin"; "cache" for what is to be checked again."""

    name: str

    def read(
        self, offset: int, size_bytes: int, *, demand: bool, fixed: bool
    ) -> AbstractContextManager[memoryview]:
        """Bytes of the blob, a range within one chunk. Raises StoreError.

        fixed: they stay what they are, so that what is checked is what is kept. Else whoever brings them may
        still change them, which saves a copy.
        """


class BlobUser(Protocol):
    """Who uses a blob: a job, by a handle."""

    @property
    def sources(self) -> Sequence[Source]:
        """Where it can have the blob's bytes from."""

    @property
    def on_fault(self) -> OnFault:
        """To be told of damage, a full disk, a lost store: a name and a message."""


class Sources:
    """All sources of one blob, those named "store" before those named "origin"."""

    def __init__(self, blob_id: str) -> None:
        self._name = blob_id[:12]
        self._told: dict[BlobUser, set[str]] = {}  # of each user, what it was told already
        self._sources: tuple[Source, ...] = ()
        self._lock = threading.Lock()

    @property
    def all(self) -> tuple[Source, ...]:
        return self._sources

    def add(self, user: BlobUser) -> None:
        with self._lock:
            self._told[user] = set()
            more = (*self._sources, *user.sources)
            self._sources = tuple(sorted(more, key=lambda source: source.name != "store"))

    def remove(self, user: BlobUser) -> None:
        with self._lock:
            self._told.pop(user, None)
            self._sources = tuple(source for source in self._sources if source not in user.sources)

    def tell(self, name: str, message: str) -> None:
        """Report a fault to each user, the first of each name only: a lost store fails thousands of reads."""
        with self._lock:
            untold = [user for user, told in self._told.items() if name not in told]
            for user in untold:
                self._told[user].add(name)
        for user in untold:
            _log.warning("blob %s: %s: %s", self._name, name, message)
            user.on_fault(name, message)
