"""Memory that the agent shares with a user's process: each read fills a slot of it.

The process is its user's, who can do with the memory what he likes. So it is sealed (sealed_memory.py), and
its content may change at any time: where bytes are compared with a promise, they are copied before. Demand
reads never wait for the prefetch, for some slots are kept for them. Thread-safe.
"""

from __future__ import annotations

import contextlib
import queue
from collections import defaultdict

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.errors import StoreError
from bootseer_slurm.sealed_memory import sealed_memory

DEMAND_SLOTS = 4  # as many blocked readers as are served at once beside the prefetch


class Ring:
    """Slots of CHUNK_BYTES, `streams` for the prefetch and DEMAND_SLOTS for reads that somebody waits for."""

    def __init__(self, streams: int) -> None:
        """Raises OSError. The descriptor `fd` is the caller's to close."""
        self.slots = streams + DEMAND_SLOTS
        self.fd, self._mapped = sealed_memory("bootseer-ring", self.slots * CHUNK_BYTES)
        self._memory = memoryview(self._mapped)
        self._free: dict[bool, queue.LifoQueue[int]] = {True: queue.LifoQueue(), False: queue.LifoQueue()}
        for slot in range(self.slots):
            self._free[slot >= streams].put(slot)
        self._streams = streams
        self._copies: defaultdict[int, memoryview] = defaultdict(lambda: memoryview(bytearray(CHUNK_BYTES)))

    def take(self, *, demand: bool, timeout_s: float) -> int:
        """A free slot. Raises StoreError when there is none in that time."""
        try:
            return self._free[demand].get(timeout=timeout_s)
        except queue.Empty:
            raise StoreError("all reads in flight are stuck") from None

    def give_back(self, slot: int) -> None:
        """Nobody writes to the slot any more."""
        self._free[slot >= self._streams].put(slot)

    def view(self, slot: int, size_bytes: int, *, fixed: bool) -> memoryview:
        """The bytes in a slot, until it is given back. fixed: a copy, which the process cannot change.

        Raises StoreError when the ring is closed.
        """
        try:
            view = self._memory[slot * CHUNK_BYTES :][:size_bytes]
        except ValueError:
            raise StoreError("the job is over") from None
        if not fixed:
            return view
        copy = self._copies[slot][:size_bytes]
        copy[:] = view
        return copy

    def close(self) -> None:
        """Give the memory back at once, 4 MiB for each slot that was used; not while a read looks at it."""
        with contextlib.suppress(BufferError):
            self._memory.release()
            self._mapped.close()
