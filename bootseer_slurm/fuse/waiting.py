"""The reads that wait, in the memory of the process that serves: by the kernel's number, counted by user."""

from __future__ import annotations

import threading
from collections import Counter

from bootseer_slurm.fuse.ledger import Parked


class Waiting:
    """Parked reads that were not answered yet. Thread-safe."""

    def __init__(self) -> None:
        self._reads: dict[int, Parked] = {}
        self._of_user: Counter[int] = Counter()
        self._lock = threading.Lock()

    def add(self, parked: Parked) -> None:
        with self._lock:
            self._reads[parked.unique] = parked
            self._of_user[parked.uid] += 1

    def get(self, unique: int) -> Parked | None:
        return self._reads.get(unique)

    def count(self, uid: int) -> int:
        """How many reads of one user wait."""
        return self._of_user[uid]

    def take(self, parked: Parked) -> bool:
        """Take a read out; who gets True answers it, and nobody else does."""
        with self._lock:
            if self._reads.pop(parked.unique, None) is None:
                return False
            self._of_user[parked.uid] -= 1
            return True

    def clear(self) -> None:
        """Forget them all."""
        with self._lock:
            self._reads.clear()
            self._of_user.clear()
