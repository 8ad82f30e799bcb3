"""The memory by which a peer process gives chunks: slots of 4 MiB."""

from __future__ import annotations

import fcntl
import mmap
import os

from bootseer_slurm.blob.manifest import CHUNK_BYTES


class Ring:
    """So many slots, until `close`. fd: of the memory, until `given`."""

    def __init__(self, slots: int) -> None:
        """Raises OSError."""
        self._slots = slots
        self.fd = os.memfd_create("bootseer-peers-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, slots * CHUNK_BYTES)
            # Who reads what the process has cut off would be killed (SIGBUS). What it adds would outlive it.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self._map = mmap.mmap(self.fd, 0)
        except BaseException:
            os.close(self.fd)
            raise

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
