"""The store and the objects that a user's process has open; the agent reads them by number. Thread-safe."""

from __future__ import annotations

import threading

from bootseer_slurm.store import ObjectReader, Store, open_store


class StoreOfUser:
    """The store, opened when it is first needed."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._store: Store | None = None
        self._lock = threading.Lock()

    def open(self) -> Store:
        """The store. Raises StoreError."""
        with self._lock:
            if self._store is None:
                self._store = open_store(self._uri)
            return self._store


class Handles:
    """Open objects, several behind a number where a blob is striped. They stay open with the process."""

    def __init__(self) -> None:
        self._objects: list[list[ObjectReader]] = []
        self._lock = threading.Lock()

    def keep(self, objects: list[ObjectReader]) -> int:
        """The number of a handle to these objects."""
        with self._lock:
            self._objects.append(objects)
            return len(self._objects) - 1

    def object(self, handle: int, index: int) -> ObjectReader:
        """One of them. Raises IndexError."""
        return self._objects[handle][index]
