"""Chunks on their way here: each from one node, into one slot of the ring.

Bytes of a chunk come in order. What another node sends of it goes nowhere, nor does what comes again.
"""

from __future__ import annotations

from dataclasses import dataclass

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.wire import MOST_DATA_BYTES, Received


@dataclass(slots=True)
class Coming:
    """One chunk. have_bytes: from its begin on. placed_bytes: those, and what a frame brings just now.

    first_s: when bytes of it came first.
    """

    parent: int
    slot: int
    size_bytes: int
    have_bytes: int = 0
    placed_bytes: int = 0
    first_s: float | None = None
    dur_s: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether it is the owner's turn."""
        return self.have_bytes == self.size_bytes


class Incoming:
    """The slots, and what comes into them."""

    def __init__(self, ring: memoryview, slots: int) -> None:
        self._ring = ring
        self._free = list(range(slots))
        self._coming: dict[Chunk, Coming] = {}

    def expect(self, chunk: Chunk, parent: int, size_bytes: int) -> bool:
        """Bytes of this chunk come from this node, or go on to come. False where no slot is free."""
        coming = self._coming.get(chunk)
        if coming is not None:
            return coming.parent == parent
        if not self._free:
            return False
        self._coming[chunk] = Coming(parent, self._free.pop(), size_bytes)
        return True

    def whole(self) -> list[tuple[Chunk, int]]:
        """The chunks that the owner looks at, and who sent them."""
        return [(chunk, coming.parent) for chunk, coming in self._coming.items() if coming.is_whole]

    def of(self, blob: str) -> list[Chunk]:
        """The chunks of a blob that have a slot."""
        return [chunk for chunk in self._coming if chunk.blob == blob]

    def place(self, node: int, chunk: Chunk, offset: int, size_bytes: int) -> memoryview | None:
        """Where a node's bytes go (links.Place)."""
        coming = self._coming.get(chunk)
        if coming is None or coming.parent != node or offset != coming.placed_bytes:
            return None
        # Whole frames only: a peer that sends byte after byte would give a sign of life with each.
        if size_bytes != min(MOST_DATA_BYTES, coming.size_bytes - offset):
            return None
        coming.placed_bytes += size_bytes
        begin = coming.slot * CHUNK_BYTES + offset
        return self._ring[begin : begin + size_bytes]

    def took(self, node: int, received: Received, now_s: float) -> Coming | None:
        """Bytes have come where they shall lie; the chunk's way, where it is still this node's."""
        coming = self._coming.get(received.chunk)
        if coming is None or coming.parent != node or received.offset != coming.have_bytes:
            return None
        if coming.first_s is None:
            coming.first_s = now_s
        coming.have_bytes += received.size_bytes
        coming.dur_s = now_s - coming.first_s
        return coming

    def leave(self, chunk: Chunk) -> Coming | None:
        """Nothing more of it is taken, as of `free`; but what the owner looks at stays as it is."""
        coming = self._coming.get(chunk)
        return None if coming is None or coming.is_whole else self.free(chunk)

    def free(self, chunk: Chunk) -> Coming | None:
        """Its slot is free, and nothing more of it is taken. Gives what its way was, if it had one."""
        coming = self._coming.pop(chunk, None)
        if coming is not None:
            self._free.append(coming.slot)
        return coming
