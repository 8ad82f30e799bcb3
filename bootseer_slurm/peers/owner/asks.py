"""The chunks of a job that threads of the agent wait for. Thread-safe."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from bootseer_slurm.peers.local import Arrived

# The owner's number of the blob, and the chunk's own.
Key = tuple[int, int]


@dataclass(slots=True)
class Ask:
    """A chunk that a thread waits for. arrived: None where it is to be read from the store."""

    demand: bool
    answered: threading.Event = field(default_factory=threading.Event)
    arrived: Arrived | None = None


class Asks:
    """All of one job: one thread for each chunk."""

    def __init__(self) -> None:
        self._asks: dict[Key, Ask] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self, key: Key, *, demand: bool) -> Iterator[Ask]:
        """This thread asks for a chunk."""
        ask = Ask(demand)
        with self._lock:
            self._asks[key] = ask
        try:
            yield ask
        finally:
            with self._lock:
                if self._asks.get(key) is ask:
                    del self._asks[key]

    def answer(self, key: Key, arrived: Arrived | None) -> None:
        """The answer to whoever waits for it; the first one counts."""
        with self._lock:
            ask = self._asks.get(key)
            if ask is not None and not ask.answered.is_set():
                ask.arrived = arrived
                ask.answered.set()

    def hurry(self, key: Key) -> bool:
        """Somebody waits now for a chunk that was asked for ahead; False where that is known, or no use."""
        with self._lock:
            ask = self._asks.get(key)
            if ask is None or ask.demand or ask.answered.is_set():
                return False
            ask.demand = True
            return True

    def end(self, blob: int | None = None) -> None:
        """Have all that wait, of this blob or at all, read the store."""
        with self._lock:
            asks = [ask for (number, _), ask in self._asks.items() if blob in (None, number)]
        for ask in asks:
            ask.answered.set()
