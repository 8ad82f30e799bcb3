"""The memory by which a peer process gives chunks: slots of 4 MiB."""

from __future__ import annotations

import os

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.sealed_memory import sealed_memory


class Ring:
    """So many slots, until `close`. fd: of the memory, until `given`."""

    def __init__(self, slots: int) -> None:
        """Raises OSError."""
        self._slots = slots
        self.fd, self._map = sealed_memory("bootseer-peers-ring", slots * CHUNK_BYTES)

    def given(self) -> None:
        """The process has it."""
        os.close(self.fd)

    def has(self, slot: int) -> bool:
        """Whether there is such a slot."""
        return slot < self._slots

    def copy(self, slot: int, size_bytes: int) -> memoryview | None:
        """The bytes in a slot, which the process could change; None once the ring was closed."""
        begin = slot * CHUNK_BYTES
        try:
            return memoryview(self._map[begin : begin + size_bytes])
        except ValueError:
            return None

    def close(self) -> None:
        """Give the memory back."""
        self._map.close()
